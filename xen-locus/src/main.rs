//! The command `xen-locus`: parses, runs, and turns the outcome into an exit code.

use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::Parser;
use xen_locus::cli::{self, args::Cli};
use xen_locus::error;

fn main() -> ExitCode {
    let code = match Cli::try_parse() {
        Ok(args) => cli::run(&args).unwrap_or_else(|e| {
            // The library's errors say all in one sentence; others have a chain of causes.
            match e.downcast_ref::<error::Error>() {
                Some(known) => eprintln!("xen-locus: {known}"),
                None => eprintln!("xen-locus: {e:#}"),
            }
            cli::exit_code(&e)
        }),
        Err(e) => {
            // A closed stdout or stderr leaves nobody to tell.
            let _ = e.print();
            match e.kind() {
                ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => error::ExitCode::Done,
                _ => error::ExitCode::Usage,
            }
        }
    };
    ExitCode::from(code as u8)
}
