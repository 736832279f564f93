//! `locus-floor DOMAIN [ROUNDS]`: what a pause costs before any work is done in it.
//!
//! Prints, as JSON, microseconds of each of ROUNDS empty pauses, and of each of ROUNDS pauses in
//! which all vCPU contexts are read: the floor under the pause of `xen-locus apply`.

use anyhow::{Context as _, Result};
use clap::Parser;
use serde_json::json;
use xen_locus::cli::Host;
use xen_locus::guard::guardian;
use xen_locus::guest::Machine as _;

/// Measure the floor under a pause
#[derive(Parser)]
struct Args {
    /// Name or id
    domain: String,
    /// Pauses of each kind
    #[arg(default_value_t = 100)]
    rounds: u32,
}

fn main() -> Result<()> {
    if guardian::is_meant() {
        let _ = guardian::main();
        return Ok(());
    }
    let args = Args::parse();
    let host = Host::open(None)?;
    let domain = host.guest(&args.domain)?;
    let guard = domain.guard(&[])?;
    let pause = |with_contexts: bool| -> Result<u128> {
        let paused = guard.pause()?;
        if with_contexts {
            domain.vcpus()?;
        }
        Ok(paused.end().context("unpausing")?.as_micros())
    };
    // The first of each is warm-up.
    let measure = |with_contexts: bool| -> Result<Vec<u128>> {
        (0..=args.rounds)
            .map(|_| pause(with_contexts))
            .skip(1)
            .collect()
    };
    let empty = measure(false)?;
    let contexts = measure(true)?;
    println!(
        "{}",
        json!({ "schema": 1, "empty_us": empty, "contexts_us": contexts })
    );
    Ok(())
}
