//! `xtest bench`: how long guests are paused and what reading their kernel costs, beside the least
//! that either could cost in the same run.
//!
//! Absolute times on an emulated machine mean little; the ratios within one run mean more.

use std::time::Duration;

use anyhow::{anyhow, Result};

use crate::bench::Bench;
use crate::guest::{GuestSpec, Kind};
use crate::scenario::{Ctx, PV, PVH};
use crate::verdict::Verdict;

/// Measures PV and PVH guests, idle for reading and under load for pauses, and prints tables; those
/// about pauses not if only `reading` is asked for.
pub fn run(bench: &Bench, rounds: u32, reading: bool) -> Result<()> {
    for (profile, kind) in [(&PV, Kind::Pv), (&PVH, Kind::Pvh)] {
        let mut machine = bench.boot(profile, 0)?;
        let result = measure(&mut machine.ctx, kind, rounds, reading);
        machine.collect_logs();
        result.map_err(|v| anyhow!("{v}"))?;
    }
    Ok(())
}

fn measure(ctx: &mut Ctx, kind: Kind, rounds: u32, only_reading: bool) -> Result<(), Verdict> {
    let guest = ctx.ensure_guest(GuestSpec::new(kind.name(), kind))?;
    let name = &guest.name;
    reading(ctx, name, rounds.min(10))?;
    if only_reading {
        return Ok(());
    }
    guest.start_workload()?;
    let floor = ctx.json(&format!("locus-floor {name} {rounds}"))?;
    let of = |key: &str| -> Vec<u64> {
        let values = floor.get(key).and_then(|v| v.as_array());
        values
            .into_iter()
            .flatten()
            .filter_map(serde_json::Value::as_u64)
            .collect()
    };
    let contexts = of("contexts_us");
    let reference = quantile(&contexts, 50);
    println!("{name}: pauses in microseconds, guest of 2 vCPUs under load, {rounds} of each");
    println!(
        "{:<32} {:>8} {:>8} {:>8}  {:>6}",
        "", "median", "p99", "max", "ratio"
    );
    row("empty pause and unpause", of("empty_us"), reference);
    row("with all vCPU contexts (floor)", contexts, reference);
    for (patch, what) in [
        ("locus_cmdline", "apply, 1 function"),
        ("locus_proc_pair", "apply, 2 functions"),
    ] {
        row(what, applies(ctx, name, patch, rounds)?, reference);
    }
    println!();
    Ok(())
}

/// What `info` costs: cold, with what it kept, and beside mapping and copying as much as it read.
fn reading(ctx: &Ctx, guest: &str, rounds: u32) -> Result<(), Verdict> {
    let (mut cold, mut warm) = (Vec::new(), Vec::new());
    let (mut copy, mut both) = (Vec::new(), Vec::new());
    ctx.dom0.ok(&format!("xen-locus info {guest} >/dev/null"))?;
    for _ in 0..rounds {
        cold.push(cost(ctx, &format!("--no-cache info {guest}"))?);
        let kib = cold.last().map_or(0, |c| c.kib);
        let least = ctx.json(&format!("locus-copy {guest} {kib}"))?;
        let us = |key| least.get(key).and_then(serde_json::Value::as_u64);
        copy.extend(us("copy_us"));
        both.extend(us("open_us").zip(us("copy_us")).map(|(o, c)| o + c));
        warm.push(cost(ctx, &format!("info {guest}"))?);
    }
    let us = |costs: &[Cost]| costs.iter().map(|c| c.us).collect::<Vec<_>>();
    let most = |costs: &[Cost], of: fn(&Cost) -> u64| costs.iter().map(of).max().unwrap_or(0);
    println!("{guest}: reading the kernel for info, microseconds, idle guest, {rounds} of each");
    println!(
        "{:<32} {:>8} {:>8} {:>8}  {:>6} {:>9} {:>9}",
        "", "median", "p99", "max", "ratio", "read KiB", "peak KiB"
    );
    let reference = quantile(&both, 50);
    row("map and copy as much", copy, reference);
    row("open the guest, map and copy", both, reference);
    for (what, costs) in [
        ("info, nothing kept", cold),
        ("info, with what was kept", warm),
    ] {
        let (kib, peak) = (most(&costs, |c| c.kib), most(&costs, |c| c.peak_kib));
        println!("{} {kib:>9} {peak:>9}", line(what, us(&costs), reference));
    }
    println!();
    Ok(())
}

/// What `xen-locus -v info` said of its cost.
struct Cost {
    kib: u64,
    us: u64,
    peak_kib: u64,
}

fn cost(ctx: &Ctx, cmd: &str) -> Result<Cost, Verdict> {
    let out = ctx.dom0.sh(&format!("xen-locus -v {cmd} >/dev/null"))?;
    let said = out.err_text();
    let number = |before: &str, after: &str| -> Option<u64> {
        let rest = said.split_once(before)?.1;
        rest.split_once(after)?.0.trim().parse().ok()
    };
    let found = || {
        Some(Cost {
            kib: number("read ", " KiB of guest")?,
            us: number("guest memory in ", " us")?,
            peak_kib: number("peak memory ", " kB")?,
        })
    };
    found().ok_or_else(|| Verdict::failure(format!("`{cmd}` said {said:?}")))
}

/// Pauses of as many applies, each reverted again.
fn applies(ctx: &Ctx, guest: &str, patch: &str, rounds: u32) -> Result<Vec<u64>, Verdict> {
    let cmd = format!(
        "for i in $(seq {rounds}); do xen-locus -o json apply {guest} /payloads/{patch}.ko \
         --max-pause 1s || exit; xen-locus -o json revert {guest} {patch} --max-pause 1s >/dev/null \
         || exit; done"
    );
    let out = ctx
        .dom0
        .sh_timeout(&cmd, Duration::from_secs(u64::from(rounds) * 30))?;
    if out.rc != 0 {
        let said = out.err_text();
        return Err(Verdict::failure(format!(
            "{patch}: ended with {}: {said}",
            out.rc
        )));
    }
    let text = out.text();
    Ok(text
        .lines()
        .filter_map(|line| line.trim().strip_prefix("\"pause_us\": "))
        .filter_map(|value| value.trim_end_matches(',').parse().ok())
        .collect())
}

fn row(what: &str, values: Vec<u64>, reference: u64) {
    println!("{}", line(what, values, reference));
}

fn line(what: &str, mut values: Vec<u64>, reference: u64) -> String {
    values.sort_unstable();
    let median = quantile(&values, 50);
    #[allow(clippy::cast_precision_loss)] // microseconds
    let ratio = median as f64 / reference.max(1) as f64;
    format!(
        "{what:<32} {median:>8} {:>8} {:>8}  {ratio:>6.2}",
        quantile(&values, 99),
        values.last().copied().unwrap_or(0)
    )
}

/// The value below which `percent` of all lie.
fn quantile(values: &[u64], percent: usize) -> u64 {
    let mut sorted = values.to_vec();
    sorted.sort_unstable();
    let last = sorted.len().saturating_sub(1);
    sorted
        .get((last * percent).div_ceil(100))
        .copied()
        .unwrap_or(0)
}
