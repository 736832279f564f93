//! The command `xen-locus`.

use std::process::ExitCode;

#[global_allocator]
static MEMORY: xen_locus::xen::Memory = xen_locus::xen::Memory;

fn main() -> ExitCode {
    xen_locus::cli::main()
}
