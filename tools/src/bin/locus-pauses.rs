//! `locus-pauses DOMAIN [PAYLOAD]`: measures pauses of a guest.
//!
//! Each round measures these pauses, in microseconds:
//!
//! - an empty pause, by libxenctrl's calls, as any program makes them
//! - the same with all vCPU contexts read: the lower limit for a pause of `xen-locus apply`
//! - a pause with all vCPU contexts read as xen-locus reads them, in the call that pauses
//! - with a payload: the same with one write to the kernel's code
//! - with a payload: apply and revert, by one process that changes the guest again and again, as the daemon does
//!
//! The output is JSON. For apply and revert it also has the attempts and the milliseconds from start to end, or why
//! the change failed.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use clap::Parser;
use locus_guest::{MemoryMut as _, WindowMut};
use locus_payload::Payload;
use locus_xen::PauseCalls;
use serde_json::{json, Value};
use xen_locus::apply::{Options, Report};
use xen_locus::domain::Domain;
use xen_locus::guard::guardian;
use xen_locus::guard::worker::Guarded;
use xen_locus::machine::{kernel_of, Guard, Machine as _, Paused};
use xen_locus::ops;
use xen_locus::ops::host::Host;
use xen_locus::plan::Mode;

/// The cache of the kernel's symbols and types, which the daemon uses too.
const CACHE: &str = "/var/cache/xen-locus";
/// Pauses of one kind that are measured in a row, because starting a guardian takes much longer than a pause.
const AT_ONCE: u32 = 10;
/// A change that takes longer has failed.
const TIMEOUT: Duration = Duration::from_secs(30);
/// Least time for which the guest runs between two pauses, because a change too meets a guest that was running.
const BETWEEN: Duration = Duration::from_millis(5);
/// Long enough for an emulated machine, whose pauses are what is measured.
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
    /// End after this many seconds
    #[arg(long, default_value_t = 3600)]
    limit: u64,
    /// Count the first pauses of the process too; otherwise they only warm up
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
        // A process can have one guardian at a time, and a change starts its own.
        {
            let calls = PauseCalls::one_by_one(domain.control(), &domain.info, &[])?;
            let guard = Guarded::start(calls, &domain.watched_run(&[]))?;
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

    /// Writes the bytes that are there already.
    fn rewrite(&self) -> Result<()> {
        let mut bytes = [0; 8];
        self.window.read(self.offset, &mut bytes)?;
        Ok(self.window.write(self.offset, &bytes)?)
    }
}

fn read(paused: &dyn Paused) -> Result<()> {
    Ok(paused.vcpus().map(|_| ())?)
}

/// Microseconds of a pause with `work` in it: of the second of two pauses, or of the first if `first`. Between them
/// the guest runs for a while, and this process keeps its caches warm.
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
    let operator = host.operator("locus-pauses".into());
    let change = |action: &dyn Fn(&Domain<'_>) -> xen_locus::error::Result<Report>| match host
        .guest(name)
        .and_then(|domain| action(&domain))
    {
        Ok(report) => json!(report),
        Err(error) => json!({ "error": error.to_string() }),
    };
    [
        change(&|domain| ops::apply(&operator, domain, payload, Mode::Apply, &options)),
        change(&|domain| ops::revert(&operator, domain, &payload.name, None, &options)),
    ]
}
