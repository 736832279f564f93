//! `xtest bench`: how long guests are paused and what reading their kernel costs, beside the least
//! that either could cost in the same run, and beside the guest's own livepatch.
//!
//! Absolute times on an emulated machine mean little; the ratios within one run mean more. Nothing
//! here fails because something is slow: what must hold is printed beside what was measured.

mod inside;
mod pauses;
mod plot;
mod points;
mod reading;
mod report;
mod stats;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{bail, Result};

use crate::bench::Bench;
use crate::guest::{Guest, GuestSpec, Kind};
use crate::image;
use crate::scenario::{Ctx, PV, PVH};
use crate::verdict::Verdict;
use points::{points, Point, BASE};
use report::{OfGuests, Report};

/// Memory of the guests, in MiB: room for 8,000 threads.
const MEMORY: u32 = 768;
/// Threads that a guest may have for certain.
const MANY_THREADS: u32 = 20_000;
/// Times that the guest's own livepatch is applied.
const LIVEPATCHES: u32 = 20;

/// What is measured beside the points: calls of a function, and the guest's own livepatch.
const CALLS: &str = "calls";

/// What to measure.
#[derive(Debug, Clone)]
pub struct Wanted {
    /// Changes of each kind at the base point; other points have half as many.
    pub rounds: u32,
    /// Fewer points.
    pub quick: bool,
    /// Only guests of this type.
    pub kind: Option<Kind>,
    /// Only these points, and [`CALLS`]; all where there is none.
    pub only: Vec<String>,
    /// Only what reading costs, which else is left out.
    pub reading: bool,
    /// Longest time for one point.
    pub limit: Duration,
}

/// Measures PV and PVH guests, prints what was found, and writes it as JSON and as a plot into the
/// target folder.
pub fn run(bench: &Bench, wanted: &Wanted) -> Result<()> {
    let began = Instant::now();
    let mut report = Report {
        schema: 1,
        kernel: bench.root.release.clone(),
        rounds: wanted.rounds,
        guests: Vec::new(),
    };
    let mut files = None;
    for (profile, kind) in [(&PV, Kind::Pv), (&PVH, Kind::Pvh)] {
        if wanted.kind.is_some_and(|only| only != kind) {
            continue;
        }
        let mut machine = bench.boot(profile, 0)?;
        let found = measure(&mut machine.ctx, kind, wanted);
        machine.collect_logs();
        if wanted.reading {
            continue;
        }
        println!("{found}");
        report.guests.push(found);
        // Each time: a long run that is ended has something to show.
        files = Some(write(bench, &report)?);
    }
    if let Some((json, svg)) = files {
        println!("{}\n{}", json.display(), svg.display());
    }
    eprintln!("xtest: that took {} s", began.elapsed().as_secs());
    if report.guests.iter().any(|g| !g.missing.is_empty()) {
        bail!("not all could be measured");
    }
    Ok(())
}

/// Writes the report as JSON and as a plot, and says where.
fn write(bench: &Bench, report: &Report) -> Result<(PathBuf, PathBuf)> {
    let dir = bench.paths.base.join("bench");
    std::fs::create_dir_all(&dir)?;
    let (json, svg) = (dir.join("bench.json"), dir.join("bench.svg"));
    image::replace(&json, &serde_json::to_vec_pretty(report)?)?;
    image::replace(&svg, plot::svg(report).as_bytes())?;
    Ok((json, svg))
}

/// Measures all points in guests of one type; what goes wrong at one is said in the end.
fn measure(ctx: &mut Ctx, kind: Kind, wanted: &Wanted) -> OfGuests {
    let mut found = OfGuests {
        kind: kind.name(),
        points: Vec::new(),
        livepatch: None,
        calls: None,
        targets: Vec::new(),
        missing: Vec::new(),
    };
    let is_wanted = |name: &str| wanted.only.is_empty() || wanted.only.iter().any(|n| n == name);
    if wanted.reading || is_wanted(CALLS) {
        let first = before(ctx, kind, wanted, &mut found);
        note(&mut found, "reading and livepatch", first);
    }
    if wanted.reading {
        return found;
    }
    for point in points(wanted.quick) {
        if !is_wanted(&point.name()) {
            continue;
        }
        let began = Instant::now();
        let result = at(ctx, kind, wanted, point).map(|measured| {
            let took = began.elapsed().as_secs();
            eprintln!("xtest: {}: {measured} ({took} s)", kind.name());
            found.points.push(measured);
        });
        note(&mut found, &point.name(), result);
    }
    found.judge();
    found
}

fn note(found: &mut OfGuests, what: &str, result: Result<(), Verdict>) {
    if let Err(why) = result {
        eprintln!("xtest: {}: {what}: {why}", found.kind);
        found.missing.push(format!("{what}: {why}"));
    }
}

/// What wants a guest that xen-locus has not changed yet.
fn before(ctx: &mut Ctx, kind: Kind, wanted: &Wanted, found: &mut OfGuests) -> Result<(), Verdict> {
    let guest = guest(ctx, kind, BASE.vcpus)?;
    if wanted.reading {
        return reading::reading(ctx, &guest.name, wanted.rounds.min(10));
    }
    // Idle: what the load takes of the CPU is no cost of a call.
    found.calls = Some(inside::calls(ctx, &guest)?);
    prepare(&guest, BASE)?;
    let rounds = wanted.rounds.min(LIVEPATCHES);
    found.livepatch = Some(inside::livepatch(ctx, &guest, &BASE.payload(), rounds)?);
    Ok(())
}

fn at(
    ctx: &mut Ctx,
    kind: Kind,
    wanted: &Wanted,
    point: Point,
) -> Result<pauses::Measured, Verdict> {
    let guest = guest(ctx, kind, point.vcpus)?;
    prepare(&guest, point)?;
    // Each is an apply and a revert: two pauses.
    let rounds = if point == BASE {
        wanted.rounds
    } else {
        wanted.rounds.div_ceil(2)
    };
    pauses::measure(ctx, &guest, point, rounds, wanted.limit)
}

/// The guest with so many vCPUs; others are destroyed, for the machine has no memory for two.
fn guest(ctx: &mut Ctx, kind: Kind, vcpus: u32) -> Result<Guest, Verdict> {
    let name = |vcpus: u32| format!("bench-{}-{vcpus}", kind.name());
    for other in [1, 2, 4, 8].into_iter().filter(|&n| n != vcpus) {
        ctx.destroy_guest(&name(other))?;
    }
    let spec = GuestSpec::new(&name(vcpus), kind)
        .memory(MEMORY)
        .vcpus(vcpus);
    ctx.ensure_guest(spec)
}

/// Gives a guest the load and the threads of a point.
fn prepare(guest: &Guest, point: Point) -> Result<(), Verdict> {
    let wanted = u64::from(point.threads);
    // Some come and go.
    let enough = guest.threads()?.abs_diff(wanted) <= wanted / 20;
    if !point.load || !enough {
        guest.ok("killall spin-workload bench-load 2>/dev/null; true")?;
    }
    if !enough {
        // Without the load: beside it, thousands of threads take minutes to begin.
        set_threads(guest, wanted)?;
    }
    if point.load {
        start_load(guest)?;
    }
    Ok(())
}

/// Has a guest have so many threads, its own included.
fn set_threads(guest: &Guest, wanted: u64) -> Result<(), Verdict> {
    guest
        .ok("killall sleepers 2>/dev/null; while pidof sleepers >/dev/null; do sleep 0.2; done")?;
    let more = wanted.saturating_sub(guest.threads()?);
    if more == 0 {
        return Ok(());
    }
    let cmd = format!(
        "echo {MANY_THREADS} > /proc/sys/kernel/threads-max; rm -f /run/sleepers; \
         sleepers {more} >/run/sleepers 2>&1 & \
         until [ -s /run/sleepers ]; do sleep 0.2; done; cat /run/sleepers"
    );
    let out = guest.sh_timeout(&cmd, Duration::from_secs(600))?;
    if !out.text().ends_with("threads") {
        let (rc, said) = (out.rc, out.text());
        return Err(Verdict::failure(format!("{more} threads: {rc}: {said}")));
    }
    Ok(())
}

/// Processes, files, network and disk: all that a guest does.
fn start_load(guest: &Guest) -> Result<(), Verdict> {
    guest.start_workload()?;
    guest.ok("pidof bench-load >/dev/null && exit; \
         [ -e /sys/module/loop ] || insmod /lib/modules/loop.ko || exit; \
         [ -e /tmp/disk ] || { dd if=/dev/zero of=/tmp/disk bs=1M count=2 2>/dev/null && \
         losetup /dev/loop0 /tmp/disk; } || exit; ifconfig lo 127.0.0.1 up || exit; \
         bench-load /dev/loop0 >/run/bench-load.log 2>&1 & \
         sleep 1; pidof bench-load >/dev/null || { cat /run/bench-load.log; exit 1; }")?;
    Ok(())
}
