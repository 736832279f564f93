//! The command `xen-locus`, built so that a test can make it fail or die at any of its calls, or see nobody in
//! the way.

use std::process::ExitCode;

fn main() -> ExitCode {
    xen_locus::cli::main()
}
