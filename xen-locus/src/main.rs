//! The command `xen-locus`.

use std::process::ExitCode;

#[global_allocator]
static MEMORY: locus_xen::ExitingAllocator = locus_xen::ExitingAllocator {
    failed: xen_locus::error::ExitCode::Failed as i32,
    uncertain: xen_locus::error::ExitCode::Uncertain as i32,
};

fn main() -> ExitCode {
    xen_locus::cli::main()
}
