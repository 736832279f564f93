//! The guest's own livepatch, which xen-locus is compared with: the same files, loaded from inside.

use std::time::Duration;

use serde::Serialize;

use super::stats::Samples;
use crate::guest::Guest;
use crate::scenario::Ctx;
use crate::verdict::Verdict;

/// The module whose function is called, and the payload that replaces it by an equal one.
const SUBJECT: &str = "locus_bench";
const PATCH: &str = "locus_bench_patch";

/// How often calls of a function are measured in each state, alternating with calls of the unpatched function.
const READINGS: u32 = 3;

/// How long the guest's own livepatch takes, in microseconds of the guest's clock.
#[derive(Debug, Serialize)]
pub struct Livepatch {
    /// Time from insmod until the end of the transition.
    pub apply_us: Samples,
    /// Time of insmod alone.
    pub insmod_us: Samples,
    /// Time from disabling until the end of that transition.
    pub revert_us: Samples,
}

/// Loads a payload in the guest and unloads it, `rounds` times.
///
/// This must come before xen-locus applies it, because a reverted patch stays in the guest's list of modules.
pub fn livepatch(
    ctx: &Ctx,
    guest: &Guest,
    payload: &str,
    rounds: u32,
) -> Result<Livepatch, Verdict> {
    let file = bring(ctx, guest, payload)?;
    let limit = Duration::from_secs(60 + 20 * u64::from(rounds));
    let out = guest.sh_timeout(&format!("livepatch-time {file} {payload} {rounds}"), limit)?;
    let text = out.text();
    let rows: Vec<Vec<u64>> = text
        .lines()
        .map(|l| l.split(' ').filter_map(|w| w.parse().ok()).collect())
        .collect();
    if out.rc != 0 || rows.iter().any(|row| row.len() != 3) {
        return Err(Verdict::failure(format!(
            "livepatch in the guest: {} {text} {}",
            out.rc,
            out.err_text()
        )));
    }
    let column = |n: usize| {
        let values = rows.iter().filter_map(|row| row.get(n).copied());
        Samples::from(values.collect::<Vec<_>>())
    };
    Ok(Livepatch {
        apply_us: column(0),
        insmod_us: column(1),
        revert_us: column(2),
    })
}

/// What one call of a function costs, in picoseconds.
#[derive(Debug, Serialize)]
pub struct Calls {
    /// Of the original function.
    pub unpatched: Samples,
    /// Of the function that xen-locus redirects.
    pub ours: Samples,
    /// Of the function that the guest's own livepatch redirects.
    pub livepatch: Samples,
}

/// Measures calls of a function of a module that is loaded for this purpose, in an idle guest.
pub fn calls(ctx: &Ctx, guest: &Guest) -> Result<Calls, Verdict> {
    if !guest.ok("cat /proc/modules")?.contains(SUBJECT) {
        guest.insmod(&ctx.payloads.join(format!("{SUBJECT}/{SUBJECT}.ko")))?;
    }
    let read = || -> Result<Vec<u64>, Verdict> {
        let text = guest.ok(&format!("cat /proc/{SUBJECT}"))?;
        Ok(text.lines().filter_map(|l| l.parse().ok()).collect())
    };
    let mut unpatched = read()?;
    let (mut livepatch, mut ours) = (Vec::new(), Vec::new());

    let file = bring(ctx, guest, PATCH)?;
    let wait = format!(
        "until [ \"$(cat /sys/kernel/livepatch/{PATCH}/transition 2>/dev/null || echo 0)\" = 0 ]; \
         do sleep 0.1; done"
    );
    for _ in 0..READINGS {
        guest.ok(&format!("insmod {file} && {wait}"))?;
        livepatch.extend(read()?);
        guest.ok(&format!(
            "echo 0 > /sys/kernel/livepatch/{PATCH}/enabled; {wait}; \
             until rmmod {PATCH} 2>/dev/null; do sleep 0.1; done"
        ))?;
        unpatched.extend(read()?);
    }

    // xen-locus comes last, because a reverted patch stays in the guest's list of modules.
    let name = &guest.name;
    for _ in 0..READINGS {
        ctx.dom0.ok(&format!(
            "xen-locus apply {name} /payloads/{PATCH}.ko --max-pause 1s"
        ))?;
        ours.extend(read()?);
        ctx.dom0
            .ok(&format!("xen-locus revert {name} {PATCH} --max-pause 1s"))?;
        unpatched.extend(read()?);
    }
    Ok(Calls {
        unpatched: unpatched.into(),
        ours: ours.into(),
        livepatch: livepatch.into(),
    })
}

impl Calls {
    /// What a redirect adds to a call, divided by what the livepatch adds. `None` if the livepatch adds nothing
    /// measurable.
    pub fn overhead(&self) -> Option<f64> {
        let added = |to: &Samples| to.p50.checked_sub(self.unpatched.p50);
        let livepatch = added(&self.livepatch).filter(|&ps| ps > 0)?;
        Some(super::stats::ratio(
            added(&self.ours).unwrap_or(0),
            livepatch,
        ))
    }
}

/// Copies a payload's file to the guest.
fn bring(ctx: &Ctx, guest: &Guest, payload: &str) -> Result<String, Verdict> {
    let there = format!("/tmp/{payload}.ko");
    let here = ctx.payloads.join(format!("{payload}/{payload}.ko"));
    guest.put_module(&there, &here)?;
    Ok(there)
}
