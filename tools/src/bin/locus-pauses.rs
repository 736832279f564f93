//! `locus-pauses DOMAIN [PAYLOAD]`: what a pause costs before any work is done in it, and what a
//! process that changes a guest again and again, as the daemon does, pauses it for.
//!
//! Each round has an empty pause, a pause in which all vCPU contexts are read (the floor under that
//! of `xen-locus apply`), and, with a payload, its apply and revert. Printed as JSON: microseconds of
//! each pause, and of each change attempts and milliseconds from start to end, or why it failed.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use clap::Parser;
use serde_json::{json, Value};
use xen_locus::apply::{Options, Report};
use xen_locus::cli::Host;
use xen_locus::domain::Domain;
use xen_locus::guard::guardian;
use xen_locus::guest::Guard;
use xen_locus::guest::Machine as _;
use xen_locus::patch::Payload;
use xen_locus::plan::Mode;
use xen_locus::service;

/// Where the kernel's symbols and types are kept between two changes, as the daemon does.
const CACHE: &str = "/var/cache/xen-locus";
/// A change that takes longer has failed.
const TIMEOUT: Duration = Duration::from_secs(30);
/// How fast an emulated machine looks is what is to be found out.
const MAX_PAUSE: Duration = Duration::from_secs(1);

/// Measure pauses: empty ones, the floor, and of changes
#[derive(Parser)]
struct Args {
    /// Name or id
    domain: String,
    /// Payload to apply and revert
    payload: Option<PathBuf>,
    /// Rounds
    #[arg(long, default_value_t = 100)]
    rounds: u32,
    /// End after the round in which so many seconds have passed
    #[arg(long, default_value_t = 3600)]
    limit: u64,
    /// Count the first pauses of the process too, which else are made to warm up
    #[arg(long)]
    cold: bool,
}

fn main() -> Result<()> {
    if guardian::is_meant() {
        let _ = guardian::main();
        return Ok(());
    }
    let args = Args::parse();
    let host = Host::open(Some(Path::new(CACHE)))?;
    let domain = host.guest(&args.domain)?;
    let payload = args.payload.as_deref().map(Payload::read).transpose()?;
    if let (Some(payload), false) = (&payload, args.cold) {
        cycle(&host, &args.domain, payload);
    }
    let began = Instant::now();
    let (mut empty, mut contexts, mut changes) = (Vec::new(), Vec::new(), Vec::new());
    let guard = domain.guard(&[])?;
    for _ in 0..args.rounds {
        if began.elapsed().as_secs() >= args.limit {
            break;
        }
        empty.push(pause(&domain, &*guard, false, args.cold)?);
        contexts.push(pause(&domain, &*guard, true, args.cold)?);
        if let Some(payload) = &payload {
            changes.extend(cycle(&host, &args.domain, payload));
        }
    }
    println!(
        "{}",
        json!({ "schema": 1, "empty_us": empty, "contexts_us": contexts, "changes": changes })
    );
    Ok(())
}

/// Microseconds of a pause: the second of two, unless the first is wanted.
fn pause(domain: &Domain<'_>, guard: &dyn Guard, with_contexts: bool, first: bool) -> Result<u64> {
    let once = || -> Result<u64> {
        let paused = guard.pause()?;
        if with_contexts {
            domain.vcpus()?;
        }
        let took = paused.end().context("unpausing")?;
        Ok(u64::try_from(took.as_micros())?)
    };
    let took = once()?;
    if first {
        return Ok(took);
    }
    once()
}

/// Applies a payload and takes it back.
fn cycle(host: &Host, name: &str, payload: &Payload) -> [Value; 2] {
    let options = Options {
        timeout: TIMEOUT,
        max_pause: MAX_PAUSE,
        ..Options::default()
    };
    let desk = host.desk("locus-pauses".into());
    let change = |action: &dyn Fn(&Domain<'_>) -> xen_locus::error::Result<Report>| match host
        .guest(name)
        .and_then(|domain| action(&domain))
    {
        Ok(report) => json!(report),
        Err(error) => json!({ "error": error.to_string() }),
    };
    [
        change(&|domain| service::apply(&desk, domain, payload, Mode::Apply, &options)),
        change(&|domain| service::revert(&desk, domain, &payload.name, &options)),
    ]
}
