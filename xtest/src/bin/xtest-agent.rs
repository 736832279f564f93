//! The testbed's agent in dom0. `xtest-agent PORT` serves the runner's requests on a port. Called `guest`, it
//! runs a command in a guest.

#![forbid(unsafe_code)]

use std::path::Path;
use std::process::ExitCode;

use anyhow::{bail, Result};
use xtest::agent;

fn main() -> Result<ExitCode> {
    let args: Vec<String> = std::env::args().collect();
    match args.as_slice() {
        [me, name, cmd @ ..] if me.ends_with("guest") && !cmd.is_empty() => {
            Ok(ExitCode::from(agent::guest_command(name, &cmd.join(" "))?))
        }
        [me, ..] if me.ends_with("guest") => bail!("usage: guest NAME COMMAND…"),
        [_, port] => agent::serve(Path::new(port)).map(|()| ExitCode::SUCCESS),
        _ => bail!("usage: xtest-agent PORT"),
    }
}
