//! Measures what reading a guest's kernel costs.

use super::stats;
use crate::scenario::Ctx;
use crate::verdict::Verdict;

/// Prints what `info` costs without and with its cache, and what mapping and copying as much memory costs.
pub fn reading(ctx: &Ctx, guest: &str, rounds: u32) -> Result<(), Verdict> {
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
    let reference = stats::quantile(&both, 50);
    row("map and copy as much", copy, reference);
    row("open the guest, map and copy", both, reference);
    for (what, costs) in [("info, without cache", cold), ("info, with cache", warm)] {
        let (kib, peak) = (most(&costs, |c| c.kib), most(&costs, |c| c.peak_kib));
        println!("{} {kib:>9} {peak:>9}", line(what, us(&costs), reference));
    }
    println!();
    Ok(())
}

/// The cost that `xen-locus -v info` reports.
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

fn row(what: &str, values: Vec<u64>, reference: u64) {
    println!("{}", line(what, values, reference));
}

fn line(what: &str, mut values: Vec<u64>, reference: u64) -> String {
    values.sort_unstable();
    let median = stats::quantile(&values, 50);
    #[allow(clippy::cast_precision_loss)] // microseconds
    let ratio = median as f64 / reference.max(1) as f64;
    format!(
        "{what:<32} {median:>8} {:>8} {:>8}  {ratio:>6.2}",
        stats::quantile(&values, 99),
        values.last().copied().unwrap_or(0)
    )
}
