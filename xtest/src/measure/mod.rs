//! `xtest bench`: how long guests are paused and what reading their kernel costs. Both are compared with lower
//! bounds of the same run, and with the guest's own livepatch.
//!
//! Absolute times on an emulated machine mean little; ratios within one run mean more. Times by the host's clock
//! contain the host's noise. So the machine's clock counts instructions by default: that tells how much work is
//! done, the same on every host, but nothing about caches or about two CPUs at once. Nothing here fails because
//! something is slow: targets are printed beside the measured values.

mod inside;
mod pauses;
mod plot;
mod points;
mod reading;
mod report;
mod stats;
mod wanted;

use std::sync::{Mutex, PoisonError};
use std::thread::{self, ScopedJoinHandle};
use std::time::{Duration, Instant};

use anyhow::{anyhow, bail, Result};

use crate::guest::{Guest, GuestSpec, Kind, Mitigations};
use crate::host;
use crate::qemu_faults;
use crate::scenario::Ctx;
use crate::testbed::Testbed;
use crate::verdict::Verdict;
use points::{points, Point, BASE};
use report::{OfGuests, Report};
use wanted::CALLS;
pub use wanted::{Clock, Wanted};

/// Memory of the guests, in MiB: room for 8,000 threads.
const MEMORY: u32 = 768;
/// The limit on threads that a guest is given.
const MANY_THREADS: u32 = 20_000;
/// How often measuring at a point is tried if QEMU loses the guest.
const TRIES: u32 = 3;
/// How often the guest's own livepatch is applied.
const LIVEPATCHES: u32 = 20;

/// Measures PV and PVH guests, prints the results, and writes them as JSON and as a plot into the target folder.
pub fn run(testbed: &Testbed, wanted: &Wanted) -> Result<()> {
    let began = Instant::now();
    let report = Mutex::new(Report {
        schema: 1,
        kernel: testbed.root.release.clone(),
        clock: wanted.clock,
        rounds: wanted.rounds,
        guests: Vec::new(),
    });
    let one = |(profile, kind)| -> Result<()> {
        let mut machine = testbed.boot(profile, 0)?;
        let found = measure(&mut machine.ctx, kind, wanted);
        machine.collect_logs();
        if !wanted.reading {
            // After each guest, so that an interrupted run leaves a report.
            let mut report = report.lock().unwrap_or_else(PoisonError::into_inner);
            report.guests.push(found);
            print(testbed, &report)?;
        }
        Ok(())
    };
    let machines = wanted.machines();
    match wanted.clock {
        Clock::Host => machines.into_iter().try_for_each(one)?,
        // These machines don't see the host's time, so they don't disturb each other.
        Clock::Instructions => thread::scope(|scope| {
            let all: Vec<_> = machines
                .into_iter()
                .map(|m| scope.spawn(move || one(m)))
                .collect();
            let ended = |t: ScopedJoinHandle<'_, Result<()>>| {
                t.join().map_err(|_| anyhow!("it panicked"))?
            };
            all.into_iter().try_for_each(ended)
        })?,
    }
    eprintln!("xtest: that took {} s", began.elapsed().as_secs());
    let report = report.into_inner().unwrap_or_else(PoisonError::into_inner);
    if report.guests.iter().any(|g| !g.missing.is_empty()) {
        bail!("not all could be measured");
    }
    Ok(())
}

/// Prints the results of the last guest, and writes the report as JSON and as a plot.
fn print(testbed: &Testbed, report: &Report) -> Result<()> {
    if let Some(last) = report.guests.last() {
        println!("{}: {}", last.kind, report.clock);
        println!("{last}");
    }
    let dir = testbed.paths.base.join("bench");
    std::fs::create_dir_all(&dir)?;
    let name = match report.clock {
        Clock::Host => "host",
        Clock::Instructions => "instructions",
    };
    let (json, svg) = (
        dir.join(format!("{name}.json")),
        dir.join(format!("{name}.svg")),
    );
    host::replace(&json, &serde_json::to_vec_pretty(report)?)?;
    host::replace(&svg, plot::svg(report).as_bytes())?;
    println!("{}\n{}\n", json.display(), svg.display());
    Ok(())
}

/// Measures all points in guests of one type. Failures are reported at the end.
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
        let what = "reading, calls and livepatch";
        let first = again(ctx, kind, BASE, what, |ctx| before(ctx, kind, wanted));
        let first = first.map(|inside| (found.calls, found.livepatch) = inside.unzip());
        note(&mut found, what, first);
    }
    if wanted.reading {
        return found;
    }
    for point in points(kind, wanted.quick) {
        if !is_wanted(&point.name()) {
            continue;
        }
        let began = Instant::now();
        let what = point.name();
        let result = again(ctx, kind, point, &what, |ctx| at(ctx, kind, wanted, point));
        let result = result.map(|measured| {
            let took = began.elapsed().as_secs();
            eprintln!("xtest: {}: {measured} ({took} s)", kind.name());
            found.points.push(measured);
        });
        note(&mut found, &what, result);
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

/// Measures what needs a guest that xen-locus has not changed yet.
fn before(
    ctx: &mut Ctx,
    kind: Kind,
    wanted: &Wanted,
) -> Result<Option<(inside::Calls, inside::Livepatch)>, Verdict> {
    let guest = guest(ctx, kind, BASE)?;
    if wanted.reading {
        reading::reading(ctx, &guest.name, wanted.rounds.min(10))?;
        return Ok(None);
    }
    // The guest is idle, because the load would add to the cost of a call.
    let calls = inside::calls(ctx, &guest)?;
    prepare(&guest, BASE)?;
    let rounds = wanted.rounds.min(LIVEPATCHES);
    let livepatch = inside::livepatch(ctx, &guest, &BASE.payload(), rounds)?;
    Ok(Some((calls, livepatch)))
}

/// Measures, and measures again if QEMU loses the guest of this point.
fn again<T>(
    ctx: &mut Ctx,
    kind: Kind,
    point: Point,
    what: &str,
    measure: impl Fn(&mut Ctx) -> Result<T, Verdict>,
) -> Result<T, Verdict> {
    let mut tries = 0;
    loop {
        tries += 1;
        let why = match measure(ctx) {
            Err(why) => why,
            measured => return measured,
        };
        let log = format!("/var/log/guest-{}.log", name(kind, point));
        let console = ctx.dom0.sh(&format!("tail -n 60 {log}"))?.text();
        let lost = qemu_faults::equal_gs_bases(&console);
        if tries == TRIES || !lost {
            let by = if lost {
                " (QEMU's known fault, SVM)"
            } else {
                ""
            };
            return Err(Verdict::failure(format!(
                "{why}{by}; the guest's console ends:\n{console}"
            )));
        }
        let kind = kind.name();
        eprintln!("xtest: {kind}: {what}: QEMU lost the guest (SVM), once more: {why}");
    }
}

/// Measures at a point.
fn at(
    ctx: &mut Ctx,
    kind: Kind,
    wanted: &Wanted,
    point: Point,
) -> Result<pauses::Measured, Verdict> {
    let guest = guest(ctx, kind, point)?;
    prepare(&guest, point)?;
    // Each round is an apply and a revert: two pauses.
    let rounds = if point == BASE {
        wanted.rounds
    } else {
        wanted.rounds.div_ceil(2)
    };
    beside(ctx, point.beside, || {
        pauses::measure(ctx, &guest, point, rounds, wanted)
    })
}

/// Measures while `count` processes of dom0 do nothing but compute. Each must have run until the end.
fn beside<T>(
    ctx: &Ctx,
    count: u32,
    measure: impl FnOnce() -> Result<T, Verdict>,
) -> Result<T, Verdict> {
    if count == 0 {
        return measure();
    }
    ctx.dom0.ok(&format!(
        "for i in $(seq {count}); do sh -c 'while :; do :; done' >/dev/null 2>&1 </dev/null & \
         echo $!; done >/run/beside"
    ))?;
    let measured = measure();
    ctx.dom0
        .ok("rc=0; for pid in $(cat /run/beside); do kill $pid || rc=1; done; exit $rc")?;
    measured
}

fn name(kind: Kind, point: Point) -> String {
    let more = match point.mitigations {
        Mitigations::Off => "",
        Mitigations::Default => "-default",
        Mitigations::Isolation => "-isolation",
    };
    format!("bench-{}-{}{more}", kind.name(), point.vcpus)
}

/// The guest of a point. Others are destroyed, because the machine has no memory for two.
fn guest(ctx: &mut Ctx, kind: Kind, point: Point) -> Result<Guest, Verdict> {
    let own = name(kind, point);
    if ctx.guest(&own).is_err() {
        ctx.destroy_all()?;
    }
    let spec = GuestSpec::new(&own, kind)
        .memory(MEMORY)
        .vcpus(point.vcpus)
        .mitigations(point.mitigations);
    ctx.ensure_guest(spec)
}

/// Gives a guest the load and the threads of a point.
fn prepare(guest: &Guest, point: Point) -> Result<(), Verdict> {
    let wanted = u64::from(point.threads);
    // Some threads come and go.
    let enough = guest.threads()?.abs_diff(wanted) <= wanted / 20;
    if !point.load || !enough {
        guest.ok("killall spin-workload bench-load 2>/dev/null; true")?;
    }
    if !enough {
        // Without the load, because with it thousands of threads take minutes to start.
        set_threads(guest, wanted)?;
    }
    if point.load {
        start_load(guest)?;
    }
    Ok(())
}

/// Brings the number of threads in a guest to `wanted`, its own included.
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

/// Starts a load on processes, files, network and disk.
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
