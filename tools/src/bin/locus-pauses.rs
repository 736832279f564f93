//! `locus-pauses DOMAIN [PAYLOAD]`: what a pause costs before any work is done in it, and what a
//! process that changes a guest again and again, as the daemon does, pauses it for.
//!
//! Each round has an empty pause, a pause in which all vCPU contexts are read (the floor under that
//! of `xen-locus apply`), both by libxenctrl's calls, as any program makes them; the same contexts read as
//! xen-locus does, in the call that pauses; and, with a payload, that with one write to the kernel's code in it,
//! and the payload's apply and revert. Printed as JSON: microseconds of each pause, and of each change
//! attempts and milliseconds from start to end, or why it failed.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use clap::Parser;
use locus_guest::{MemoryMut as _, WindowMut};
use locus_payload::Payload;
use locus_xen::Pauses;
use serde_json::{json, Value};
use xen_locus::apply::{Options, Report};
use xen_locus::domain::Domain;
use xen_locus::guard::guardian;
use xen_locus::guard::worker::Guarded;
use xen_locus::machine::{kernel_of, Guard, Machine as _, Paused};
use xen_locus::ops;
use xen_locus::ops::host::Host;
use xen_locus::plan::Mode;

/// Where the kernel's symbols and types are kept between two changes, as the daemon does.
const CACHE: &str = "/var/cache/xen-locus";
/// Rounds of which each kind of pause is measured one after the other: starting a guardian takes much longer.
const AT_ONCE: u32 = 10;
/// A change that takes longer has failed.
const TIMEOUT: Duration = Duration::from_secs(30);
/// How long the guest runs between two pauses, at least: a change is made to one that runs.
const BETWEEN: Duration = Duration::from_millis(5);
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
    /// End when so many seconds have passed
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
    let (mut together, mut writes) = (Vec::new(), Vec::new());
    let code = payload.as_ref().map(|p| Code::of(&domain, p)).transpose()?;
    let mut left = args.rounds;
    while left > 0 && began.elapsed().as_secs() < args.limit {
        let rounds = left.min(AT_ONCE);
        left -= rounds;
        // A change has a guardian of its own, and a process one at a time.
        {
            let calls = Pauses::one_by_one(domain.control(), &domain.info, &[])?;
            let guard = Guarded::start(calls, &domain.task(&[]))?;
            for _ in 0..rounds {
                empty.push(pause(&guard, args.cold, &|_| Ok(()))?);
                contexts.push(pause(&guard, args.cold, &|paused| read(paused))?);
            }
        }
        let guard = domain.guard(&[])?;
        for _ in 0..rounds {
            together.push(pause(&*guard, args.cold, &|paused| read(paused))?);
            if let Some(code) = &code {
                writes.push(pause(&*guard, args.cold, &|paused| {
                    read(paused)?;
                    code.rewrite()
                })?);
            }
        }
        drop(guard);
        if let Some(payload) = &payload {
            for _ in 0..rounds {
                if began.elapsed().as_secs() < args.limit {
                    changes.extend(cycle(&host, &args.domain, payload));
                }
            }
        }
    }
    println!(
        "{}",
        json!({
            "schema": 1,
            "empty_us": empty,
            "contexts_us": contexts,
            "together_us": together,
            "write_us": writes,
            "changes": changes,
        })
    );
    Ok(())
}

/// The first bytes of the first function that a payload replaces.
struct Code {
    window: Box<dyn WindowMut>,
    offset: usize,
}

impl Code {
    fn of(domain: &Domain<'_>, payload: &Payload) -> Result<Code> {
        let mut objects = payload.klp.objects.iter();
        let first = objects.find_map(|o| o.funcs.first().filter(|_| o.name.is_none()));
        let first = first.context("the payload replaces no function of the kernel itself")?;
        let kernel = kernel_of(domain)?;
        let at = kernel.function(&first.old_name, first.old_sympos)?;
        Ok(Code {
            window: domain.map_mut(&kernel.space.frames(at, 8)?)?,
            offset: at.offset(),
        })
    }

    /// Writes what stands there.
    fn rewrite(&self) -> Result<()> {
        let mut bytes = [0; 8];
        self.window.read(self.offset, &mut bytes)?;
        Ok(self.window.write(self.offset, &bytes)?)
    }
}

fn read(paused: &dyn Paused) -> Result<()> {
    Ok(paused.vcpus().map(|_| ())?)
}

/// Microseconds of a pause with `work` in it: the second of two, unless the first is wanted. Between them the
/// guest runs for a while, as before any pause, and what the work needs is kept at hand.
fn pause(guard: &dyn Guard, first: bool, work: &dyn Fn(&dyn Paused) -> Result<()>) -> Result<u64> {
    let once = || -> Result<u64> {
        let paused = guard.pause()?;
        let done = work(&*paused);
        let took = paused.end().context("unpausing")?;
        done?;
        Ok(u64::try_from(took.as_micros())?)
    };
    let took = once()?;
    if first {
        return Ok(took);
    }
    let began = Instant::now();
    while began.elapsed() < BETWEEN {
        guard.vcpus()?;
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
        change(&|domain| ops::apply(&desk, domain, payload, Mode::Apply, &options)),
        change(&|domain| ops::revert(&desk, domain, &payload.name, None, &options)),
    ]
}
