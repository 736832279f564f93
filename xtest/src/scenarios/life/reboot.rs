//! Guests reboot. Their patches are gone, are reported as gone, and are applied again if that is wanted.

use std::time::Duration;

use crate::guest::{Guest, GuestSpec, Kind};
use crate::profile::{PV1, PVH};
use crate::scenario::{Ctx, Scenario};
use crate::scenarios::steps::patches::{CMDLINE, PAIR, SLEEPER};
use crate::scenarios::steps::tool::{self, shows_now};
use crate::scenarios::steps::{daemon, wait};
use crate::verdict::Verdict;
use crate::{check, check_eq};

/// Scenarios that take too long for a usual run: each guest starts four times.
pub const MATRIX: &[Scenario] = &[
    Scenario {
        name: "reboot-pv",
        summary:
            "status knows what a PV guest lost when it rebooted; the daemon can apply it again",
        profile: &PV1,
        run: |ctx| reboots(ctx, Kind::Pv),
    },
    Scenario {
        name: "reboot-pvh",
        summary:
            "status knows what a PVH guest lost when it rebooted; the daemon can apply it again",
        profile: &PVH,
        run: |ctx| reboots(ctx, Kind::Pvh),
    },
];

/// Where the daemon says what it does.
const SAID: &str = "/tmp/reapply.log";

/// Reboots the guest, and waits until it takes commands.
fn reboot(ctx: &mut Ctx, spec: &GuestSpec) -> Result<Guest, Verdict> {
    let old = ctx.guest(&spec.name)?;
    let _ = old.try_sh("reboot -f", Duration::from_secs(2), Duration::from_secs(2));
    let guest = wait::until(Duration::from_secs(60), || {
        // A domain gets its name some time after it is there.
        let guest = ctx.adopt_guest(spec.clone()).ok();
        let new = guest.filter(|guest| guest.domid != old.domid);
        Ok(new.ok_or_else(|| format!("{} does not reboot", spec.name)))
    })?;
    let limit = Duration::from_secs(150);
    guest.try_sh("true", Duration::from_secs(30), limit)?;
    Ok(guest)
}

/// Checks the names and states of patches. The state is `gone` for those that were in force before the reboot.
fn states(ctx: &Ctx, name: &str, expected: &[(&str, &str)]) -> Result<(), Verdict> {
    let status = tool::status(ctx, name)?;
    let patches = tool::patches_of(&status)?;
    let seen: Vec<(&str, &str)> = patches
        .iter()
        .filter_map(|p| Some((p["name"].as_str()?, p["state"].as_str()?)))
        .collect();
    check_eq!(seen, expected, "{status}");
    for patch in patches {
        let reason = match patch["state"] == "gone" {
            true => "guest-rebooted".into(),
            false => serde_json::Value::Null,
        };
        check_eq!(patch["reason"], reason, "{status}");
    }
    Ok(())
}

/// Waits until the daemon has said all of `words`.
fn said(ctx: &Ctx, words: &[&str]) -> Result<(), Verdict> {
    wait::until(Duration::from_secs(90), || {
        let log = ctx.dom0.ok(&format!("cat {SAID}"))?;
        Ok(if words.iter().all(|w| log.contains(w)) {
            Ok(())
        } else {
            Err(format!("the daemon says no {words:?}: {log}"))
        })
    })
}

fn reboots(ctx: &mut Ctx, kind: Kind) -> Result<(), Verdict> {
    let name = format!("reboot-{}", kind.name());
    let spec = GuestSpec::new(&name, kind).config("on_reboot=\"restart\"");
    let guest = ctx.ensure_guest(spec.clone())?;
    for patch in [PAIR, CMDLINE, SLEEPER] {
        tool::apply(ctx, &name, patch)?;
    }
    // One that was reverted before the reboot is not missed.
    tool::revert(ctx, &name, SLEEPER)?;
    shows_now(ctx, &guest, ["live", "live", "live"], &[PAIR, CMDLINE])?;

    let guest = reboot(ctx, &spec)?;
    states(ctx, &name, &[(PAIR, "gone"), (CMDLINE, "gone")])?;
    let table = ctx.dom0.ok(&format!("xen-locus status {name}"))?;
    check_eq!(table.matches("gone (guest rebooted)").count(), 2, "{table}");
    shows_now(ctx, &guest, ["", "", ""], &[])?;
    let row = tool::list_row(ctx, &name)?;
    check!(row["patches"] == 0 && row["status"] == "ready", "{row}");

    // One patch is applied again by hand.
    tool::apply(ctx, &name, CMDLINE)?;
    states(ctx, &name, &[(PAIR, "gone"), (CMDLINE, "applied")])?;
    shows_now(ctx, &guest, ["live", "", ""], &[CMDLINE])?;

    // The daemon applies all again: in a guest that already runs, and in one that reboots later.
    ctx.dom0.ok(&format!("rm -f {SAID}"))?;
    daemon::start_as(ctx, "xen-locus daemon --reapply", SAID)?;
    said(ctx, &[&format!("{PAIR}: applied")])?;
    states(ctx, &name, &[(CMDLINE, "applied"), (PAIR, "applied")])?;
    shows_now(ctx, &guest, ["live", "live", "live"], &[CMDLINE, PAIR])?;
    ctx.dom0.ok(&format!("echo > {SAID}"))?;
    let guest = reboot(ctx, &spec)?;
    said(
        ctx,
        &[&format!("{PAIR}: applied"), &format!("{CMDLINE}: applied")],
    )?;
    shows_now(ctx, &guest, ["live", "live", "live"], &[CMDLINE, PAIR])?;
    let actions = tool::actions(ctx, &name)?;
    let last = actions.last();
    check!(
        last.is_some_and(|a| a["who"] == "daemon --reapply" && a["result"] == "applied"),
        "{actions:?}"
    );

    // A payload with another content is not applied again.
    ctx.dom0.ok(&format!(
        "xen-locus revert {name} {PAIR}; echo > {SAID}; \
         echo >> /var/lib/xen-locus/payloads/{CMDLINE}.ko"
    ))?;
    let guest = reboot(ctx, &spec)?;
    said(
        ctx,
        &[&format!("{CMDLINE} is not applied again"), "SHA-256"],
    )?;
    states(ctx, &name, &[(CMDLINE, "gone")])?;
    shows_now(ctx, &guest, ["", "", ""], &[])?;
    // Revert means that the patch is no longer wanted.
    tool::revert(ctx, &name, CMDLINE)?;
    states(ctx, &name, &[])?;
    daemon::stop(ctx)?;
    ctx.destroy_guest(&name)
}
