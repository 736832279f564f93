//! Guests are saved and restored with patches in force.

use std::time::Duration;

use super::{shows, words, ONE, PAIR, TWO};
use crate::guest::{GuestSpec, Kind};
use crate::scenario::{Ctx, Scenario, PV1, PVH};
use crate::verdict::Verdict;
use crate::{check, check_eq};

/// See the names.
pub const SCENARIOS: &[Scenario] = &[Scenario {
    name: "save-pv",
    summary: "three patches outlive save and restore of a PV guest, and leave its text as it was",
    profile: &PV1,
    run: |ctx| save(ctx, Kind::Pv),
}];

/// What takes too long for a usual run.
pub const MATRIX: &[Scenario] = &[Scenario {
    name: "save-pvh",
    summary: "three patches outlive save and restore of a PVH guest, and leave its text as it was",
    profile: &PVH,
    run: |ctx| save(ctx, Kind::Pvh),
}];

/// Comes after the restore, on top.
const THREE: &str = "locus_stack_three";
/// Where the guest is saved to.
const FILE: &str = "/tmp/saved";

/// SHA-256 of the guest's whole kernel text; the text itself stays in `file`.
pub(super) fn text(ctx: &Ctx, name: &str, file: &str) -> Result<String, Verdict> {
    let sum = ctx.dom0.ok(&format!(
        "xen-locus info {name} --raw text >{file} && test $(wc -c <{file}) -gt 8000000 \
         && sha256sum <{file}"
    ))?;
    Ok(sum)
}

/// Saves the guest, which runs on, twice; returns the shorter time, in seconds.
fn time_of_save(ctx: &Ctx, name: &str) -> Result<f64, Verdict> {
    let mut best = f64::INFINITY;
    for _ in 0..2 {
        let clock = "cut -d' ' -f1 /proc/uptime";
        let times = ctx.dom0.ok(&format!(
            "{clock}; xl save -c {name} {FILE} >/dev/null && {clock} && rm {FILE}"
        ))?;
        let times: Vec<f64> = times.lines().filter_map(|l| l.parse().ok()).collect();
        let [from, to] = times[..] else {
            return Err(Verdict::Error(format!("clock: {times:?}")));
        };
        best = best.min(to - from);
    }
    Ok(best)
}

fn save(ctx: &mut Ctx, kind: Kind) -> Result<(), Verdict> {
    let name = format!("save-{}", kind.name());
    let spec = GuestSpec::new(&name, kind);
    let guest = ctx.ensure_guest(spec.clone())?;
    guest.start_workload()?;
    let before = time_of_save(ctx, &name)?;
    let sum = text(ctx, &name, "/tmp/text.before")?;
    for patch in [PAIR, ONE, TWO] {
        ctx.dom0
            .ok(&format!("xen-locus apply {name} /payloads/{patch}.ko"))?;
    }
    let seen = words("two", "two", "live");
    shows(ctx, &guest, &seen, &[PAIR, ONE, TWO])?;
    let after = time_of_save(ctx, &name)?;
    let said = format!("{name}: save: {before:.2} s unpatched, {after:.2} s with three patches");
    ctx.dom0.note(&said);
    eprintln!("xtest: {said}");
    let slower = after > 2.0 * before + 1.0;
    check!(!slower, "a save takes much longer: {said}");

    let rounds = guest.rounds()?;
    let old = guest.domid;
    ctx.dom0.ok(&format!("xl save {name} {FILE} >/dev/null"))?;
    let gone = ctx.dom0.sh(&format!("xen-locus status {name}"))?;
    check_eq!(gone.rc, 1, "status while it is saved: {}", gone.err_text());
    ctx.dom0
        .ok(&format!("xl restore {FILE} >/dev/null && rm {FILE}"))?;
    let guest = ctx.adopt_guest(spec)?;
    check!(
        guest.domid != old,
        "the restored guest is domain {old} still"
    );
    shows(ctx, &guest, &seen, &[PAIR, ONE, TWO])?;
    std::thread::sleep(Duration::from_secs(1));
    check!(guest.rounds()? > rounds, "the workload stands still");

    // What was applied here before is undone, and more applied, where it is now.
    ctx.dom0
        .ok(&format!("xen-locus apply {name} /payloads/{THREE}.ko"))?;
    shows(
        ctx,
        &guest,
        &words("three", "two", "live"),
        &[PAIR, ONE, TWO, THREE],
    )?;
    ctx.dom0.ok(&format!("xen-locus revert {name} --all"))?;
    shows(ctx, &guest, &words("", "", ""), &[])?;
    let again = text(ctx, &name, "/tmp/text.after")?;
    let differ = ctx
        .dom0
        .sh("cmp -l /tmp/text.before /tmp/text.after | head -20")?;
    check_eq!(
        again,
        sum,
        "SHA-256 of the kernel's text ({})",
        differ.text()
    );
    eprintln!("xtest: {name}: SHA-256 of the kernel's text, before and after: {again}");
    ctx.dom0.ok("rm -f /tmp/text.before /tmp/text.after")?;
    let log = guest.ok("dmesg")?;
    for word in ["Oops", "BUG:", "WARNING:", "general protection"] {
        check!(!log.contains(word), "{word} in the guest's log: {log}");
    }
    ctx.destroy_guest(&name)
}
