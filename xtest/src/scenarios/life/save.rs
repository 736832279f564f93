//! Guests are saved and restored with patches in force.

use std::time::Duration;

use super::text::Text;
use crate::guest::{GuestSpec, Kind};
use crate::profile::{HVM, PV1, PVH};
use crate::scenario::{Ctx, Scenario};
use crate::scenarios::steps::patches::{CMDLINE, PAIR, THREE, TWO};
use crate::scenarios::steps::tool::{self, shows_now};
use crate::verdict::Verdict;
use crate::{check, check_eq};

/// Scenarios that are short enough for a usual run.
pub const SCENARIOS: &[Scenario] = &[Scenario {
    name: "save-pv",
    summary: "three patches survive save and restore of a PV guest, and revert restores its text",
    profile: &PV1,
    run: |ctx| save(ctx, Kind::Pv),
}];

/// Scenarios that take too long for a usual run.
pub const MATRIX: &[Scenario] = &[
    Scenario {
        name: "save-pvh",
        summary:
            "three patches survive save and restore of a PVH guest, and revert restores its text",
        profile: &PVH,
        run: |ctx| save(ctx, Kind::Pvh),
    },
    Scenario {
        name: "save-hvm",
        summary:
            "three patches survive save and restore of an HVM guest, and revert restores its text",
        profile: &HVM,
        run: |ctx| save(ctx, Kind::Hvm),
    },
];

/// The file that the guest is saved to.
const FILE: &str = "/tmp/saved";

/// Saves the guest twice, while it runs on. Returns the shorter time, in seconds.
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
    let text = Text::of(ctx, &name)?;
    for patch in [PAIR, CMDLINE, TWO] {
        tool::apply(ctx, &name, patch)?;
    }
    let seen = ["two", "two", "live"];
    shows_now(ctx, &guest, seen, &[PAIR, CMDLINE, TWO])?;
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
    shows_now(ctx, &guest, seen, &[PAIR, CMDLINE, TWO])?;
    std::thread::sleep(Duration::from_secs(1));
    guest.went_on(rounds)?;

    // In the restored guest, another patch is applied and all are reverted.
    tool::apply(ctx, &name, THREE)?;
    shows_now(
        ctx,
        &guest,
        ["three", "two", "live"],
        &[PAIR, CMDLINE, TWO, THREE],
    )?;
    tool::revert_all(ctx, &name)?;
    shows_now(ctx, &guest, ["", "", ""], &[])?;
    text.check(ctx, &name, kind)?;
    ctx.destroy_guest(&name)
}
