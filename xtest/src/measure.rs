//! `xtest bench`: how long guests are paused, beside the floor of the same run.
//!
//! Absolute times on an emulated machine mean little; the ratios within one run mean more.

use std::time::Duration;

use anyhow::{anyhow, Result};

use crate::bench::Bench;
use crate::guest::{GuestSpec, Kind};
use crate::scenario::{Ctx, PV, PVH};
use crate::verdict::Verdict;

/// Measures PV and PVH guests under load, and prints a table for each.
pub fn run(bench: &Bench, rounds: u32) -> Result<()> {
    for (profile, kind) in [(&PV, Kind::Pv), (&PVH, Kind::Pvh)] {
        let mut machine = bench.boot(profile, 0)?;
        let result = measure(&mut machine.ctx, kind, rounds);
        machine.collect_logs();
        result.map_err(|v| anyhow!("{v}"))?;
    }
    Ok(())
}

fn measure(ctx: &mut Ctx, kind: Kind, rounds: u32) -> Result<(), Verdict> {
    let guest = ctx.ensure_guest(GuestSpec::new(kind.name(), kind))?;
    guest.start_workload()?;
    let name = &guest.name;
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

fn row(what: &str, mut values: Vec<u64>, reference: u64) {
    values.sort_unstable();
    let median = quantile(&values, 50);
    #[allow(clippy::cast_precision_loss)] // microseconds
    let ratio = median as f64 / reference.max(1) as f64;
    println!(
        "{what:<32} {median:>8} {:>8} {:>8}  {ratio:>6.2}",
        quantile(&values, 99),
        values.last().copied().unwrap_or(0)
    );
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
