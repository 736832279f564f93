//! `locus-man FOLDER`: writes the manual pages of `xen-locus` and its commands, from the same types
//! as `--help`.

use anyhow::{Context as _, Result};
use clap::CommandFactory as _;
use xen_locus::cli::args::Cli;

fn main() -> Result<()> {
    let folder = std::env::args_os()
        .nth(1)
        .context("usage: locus-man FOLDER")?;
    let command = Cli::command();
    clap_mangen::generate_to(command, &folder)
        .with_context(|| format!("writing pages to {}", folder.display()))
}
