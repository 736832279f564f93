//! Guests start anew: what was in force is gone, is said to be, and is applied again if that is wanted.

use std::time::{Duration, Instant};

use super::{shows, words, ONE, PAIR};
use crate::guest::{Guest, GuestSpec, Kind};
use crate::limits;
use crate::profile::{PV1, PVH};
use crate::scenario::{Ctx, Scenario};
use crate::verdict::Verdict;
use crate::{check, check_eq};

/// What takes too long for a usual run: each guest starts four times.
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

/// One that is taken back before the guest starts anew.
const BACK: &str = "locus_sleeper";

/// Starts the daemon, which applies again what was lost.
const START: &str = "mkdir -p /var/lib/xen-locus/payloads && \
                     cp /payloads/*.ko /var/lib/xen-locus/payloads/ && \
                     (xen-locus daemon --reapply >/tmp/reapply.log 2>&1 & echo $! >/run/daemon.pid)";

/// Restarts the guest's kernel, and waits until it takes commands.
fn reboot(ctx: &mut Ctx, spec: &GuestSpec) -> Result<Guest, Verdict> {
    let old = ctx.guest(&spec.name)?;
    let _ = old.try_sh("reboot -f", Duration::from_secs(2), Duration::from_secs(2));
    let began = Instant::now();
    let limit = limits::scaled(Duration::from_secs(60));
    loop {
        // Its name comes some time after it does.
        let guest = ctx.adopt_guest(spec.clone());
        if let Some(guest) = guest.ok().filter(|g| g.domid != old.domid) {
            let limit = Duration::from_secs(150);
            guest.try_sh("true", Duration::from_secs(30), limit)?;
            return Ok(guest);
        }
        check!(began.elapsed() < limit, "{} does not start anew", spec.name);
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// Checks patches and their states, in JSON, with `gone` for those that went with the old kernel.
fn states(ctx: &Ctx, name: &str, expected: &[(&str, &str)]) -> Result<(), Verdict> {
    let status = ctx.json(&format!("xen-locus -o json status {name}"))?;
    let patches = status["patches"].as_array().cloned().unwrap_or_default();
    let seen: Vec<(&str, &str)> = patches
        .iter()
        .filter_map(|p| Some((p["name"].as_str()?, p["state"].as_str()?)))
        .collect();
    check_eq!(seen, expected, "{status}");
    for patch in &patches {
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
    let began = Instant::now();
    let limit = limits::scaled(Duration::from_secs(90));
    loop {
        let log = ctx.dom0.ok("cat /tmp/reapply.log")?;
        if words.iter().all(|w| log.contains(w)) {
            return Ok(());
        }
        check!(
            began.elapsed() < limit,
            "the daemon says no {words:?}: {log}"
        );
        std::thread::sleep(Duration::from_millis(500));
    }
}

fn reboots(ctx: &mut Ctx, kind: Kind) -> Result<(), Verdict> {
    let name = format!("reboot-{}", kind.name());
    let spec = GuestSpec::new(&name, kind).config("on_reboot=\"restart\"");
    let guest = ctx.ensure_guest(spec.clone())?;
    for patch in [PAIR, ONE, BACK] {
        ctx.dom0
            .ok(&format!("xen-locus apply {name} /payloads/{patch}.ko"))?;
    }
    ctx.dom0.ok(&format!("xen-locus revert {name} {BACK}"))?;
    shows(ctx, &guest, &words("live", "live", "live"), &[PAIR, ONE])?;

    let guest = reboot(ctx, &spec)?;
    states(ctx, &name, &[(PAIR, "gone"), (ONE, "gone")])?;
    let table = ctx.dom0.ok(&format!("xen-locus status {name}"))?;
    check_eq!(table.matches("gone (guest rebooted)").count(), 2, "{table}");
    shows(ctx, &guest, &words("", "", ""), &[])?;
    let list = ctx.json("xen-locus -o json list")?;
    let listed = list["domains"].as_array().into_iter().flatten();
    let row = listed.into_iter().find(|d| d["name"] == *name);
    check!(
        row.is_some_and(|d| d["patches"] == 0 && d["status"] == "ready"),
        "{list}"
    );

    // One is applied again by hand.
    ctx.dom0
        .ok(&format!("xen-locus apply {name} /payloads/{ONE}.ko"))?;
    states(ctx, &name, &[(PAIR, "gone"), (ONE, "applied")])?;
    shows(ctx, &guest, &words("live", "", ""), &[ONE])?;

    // All are by the daemon: of the guest that runs, and of one that starts while it does.
    ctx.dom0.ok(START)?;
    said(ctx, &[&format!("{PAIR}: applied")])?;
    states(ctx, &name, &[(ONE, "applied"), (PAIR, "applied")])?;
    shows(ctx, &guest, &words("live", "live", "live"), &[ONE, PAIR])?;
    ctx.dom0.ok("echo > /tmp/reapply.log")?;
    let guest = reboot(ctx, &spec)?;
    said(
        ctx,
        &[&format!("{PAIR}: applied"), &format!("{ONE}: applied")],
    )?;
    shows(ctx, &guest, &words("live", "live", "live"), &[ONE, PAIR])?;
    let history = ctx.json(&format!("xen-locus -o json history {name}"))?;
    let last = history["actions"].as_array().and_then(|a| a.last());
    check!(
        last.is_some_and(|a| a["who"] == "daemon --reapply" && a["result"] == "applied"),
        "{history}"
    );

    // Another file is another patch.
    ctx.dom0.ok(&format!(
        "xen-locus revert {name} {PAIR}; echo > /tmp/reapply.log; \
         echo >> /var/lib/xen-locus/payloads/{ONE}.ko"
    ))?;
    let guest = reboot(ctx, &spec)?;
    said(ctx, &[&format!("{ONE} is not applied again"), "SHA-256"])?;
    states(ctx, &name, &[(ONE, "gone")])?;
    shows(ctx, &guest, &words("", "", ""), &[])?;
    // To take it back is to want it no more.
    ctx.dom0.ok(&format!("xen-locus revert {name} {ONE}"))?;
    states(ctx, &name, &[])?;
    ctx.dom0.ok("kill $(cat /run/daemon.pid); sleep 1")?;
    ctx.destroy_guest(&name)
}
