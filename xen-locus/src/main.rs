//! The command `xen-locus`.

use std::process::ExitCode;

fn main() -> ExitCode {
    xen_locus::cli::main()
}
