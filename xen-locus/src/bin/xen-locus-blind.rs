//! The command `xen-locus`, built to see nobody in the way. It breaks guests, and shows thereby that the
//! tests of what it lacks can fail.

use std::process::ExitCode;

fn main() -> ExitCode {
    xen_locus::cli::main()
}
