//! Payloads that were in force before: they are applied again, used again, reclaimed, and don't outgrow what a guest can
//! carry.

use std::thread;
use std::time::Duration;

use super::steps::patches::{self, CMDLINE, THREE};
use super::steps::tool;
use crate::guest::{Guest, GuestSpec, Kind};
use crate::profile::{PV1, PVH};
use crate::scenario::{Ctx, Scenario};
use crate::verdict::Verdict;
use crate::{check, check_eq};

/// Scenarios that are short enough for a usual run.
pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "timer-pv",
        summary: "a payload of a PV guest whose timer is pending is applied again, and is reclaimed when it ran out",
        profile: &PV1,
        run: |ctx| timer(ctx, Kind::Pv),
    },
    Scenario {
        name: "timer-pvh",
        summary: "a payload of a PVH guest whose timer is pending is applied again, and is reclaimed when it ran out",
        profile: &PVH,
        run: |ctx| timer(ctx, Kind::Pvh),
    },
    Scenario {
        name: "bigdata-pvh",
        summary: "a payload that a PVH guest could not take along is refused, and the guest is saved and restored",
        profile: &PVH,
        run: bigdata,
    },
    Scenario {
        name: "record-turns-pv",
        summary: "a payload of a PV guest is applied again on another one and killed at every call: records always fit",
        profile: &PV1,
        run: record_turns,
    },
];

/// Scenarios that take too long for a usual run.
pub const MATRIX: &[Scenario] = &[
    Scenario {
        name: "many-payloads-pv",
        summary:
            "200 payloads come and go in the life of a PV guest, reclaimed only when check warns",
        profile: &PV1,
        run: |ctx| many_payloads(ctx, Kind::Pv),
    },
    Scenario {
        name: "many-payloads-pvh",
        summary:
            "200 payloads come and go in the life of a PVH guest, reclaimed only when check warns",
        profile: &PVH,
        run: |ctx| many_payloads(ctx, Kind::Pvh),
    },
    Scenario {
        name: "reclaim-killed-pv",
        summary: "reclaim is killed at each of its calls, of reads in a row at the first: recover puts back or goes on, and the payload is reclaimed",
        profile: &PV1,
        run: reclaim_killed,
    },
];

/// Starts a timer of 40 s at each read of `/proc/cmdline`.
const TIMER: &str = "locus_timer";
/// Longer than that.
const RAN_OUT: Duration = Duration::from_secs(45);
/// The file that a guest is saved to.
const SAVED: &str = "/tmp/saved";

fn timer(ctx: &mut Ctx, kind: Kind) -> Result<(), Verdict> {
    let name = format!("timer-{}", kind.name());
    let guest = ctx.ensure_guest(GuestSpec::new(&name, kind).memory(112))?;
    let read = || guest.ok("cat /proc/cmdline");
    tool::apply(ctx, &name, TIMER)?;
    for fired in 0..2 {
        let line = format!("fired={fired}");
        check_eq!(read()?, line, "the timer is started again");
        // The kernel's timers lead into it while it is applied again.
        tool::revert(ctx, &name, TIMER)?;
        tool::apply(ctx, &name, TIMER)?;
        thread::sleep(RAN_OUT);
    }
    check_eq!(read()?, "fired=2");
    tool::revert(ctx, &name, TIMER)?;
    let reclaim = format!("xen-locus reclaim {name} {TIMER}");
    tool::refused(ctx, &reclaim, 2, "leads into it")?;
    thread::sleep(RAN_OUT);
    reclaimed(ctx, &name)?;
    ctx.dom0.ok(&format!("xen-locus verify {name}"))?;
    tool::apply(ctx, &name, TIMER)?;
    check_eq!(read()?, "fired=0", "in a payload of its own");
    tool::revert(ctx, &name, TIMER)?;
    ctx.destroy_guest(&name)
}

/// Reclaims all that is parked. What is found in the way may go by itself, so there are some attempts.
fn reclaimed(ctx: &Ctx, guest: &str) -> Result<(), Verdict> {
    let mut said = String::new();
    for _ in 0..5 {
        let limit = Duration::from_secs(1200);
        let out = ctx
            .dom0
            .sh_timeout(&format!("xen-locus reclaim {guest}"), limit)?;
        if out.rc == 0 {
            return Ok(());
        }
        said = out.err_text();
        check_eq!(out.rc, 2, "reclaim: {said}");
        thread::sleep(Duration::from_secs(2));
    }
    Err(Verdict::failure(format!("reclaim never succeeds: {said}")))
}

fn bigdata(ctx: &mut Ctx) -> Result<(), Verdict> {
    const FILE: &str = "/payloads/locus_bigdata.ko";
    let name = "bigdata-pvh";
    let spec = GuestSpec::new(name, Kind::Pvh);
    let guest = ctx.ensure_guest(spec.clone())?;
    let arena =
        || -> Result<String, Verdict> { Ok(tool::info(ctx, name, "")?["arena"].to_string()) };
    let before = arena()?;
    for command in ["check", "apply"] {
        let command = format!("xen-locus {command} {name} {FILE}");
        tool::refused(ctx, &command, 3, "this pvh guest has 239")?;
    }
    check_eq!(arena()?, before, "the arena");
    tool::apply(ctx, name, CMDLINE)?;
    let rounds = guest.start_workload().and_then(|()| guest.rounds())?;
    ctx.dom0.ok(&format!("xl save {name} {SAVED} >/dev/null"))?;
    ctx.dom0
        .ok(&format!("xl restore {SAVED} >/dev/null && rm {SAVED}"))?;
    let guest = ctx.adopt_guest(spec)?;
    check!(patches::cmdline_is_live(&guest)?, "not in force any more");
    thread::sleep(Duration::from_secs(1));
    guest.went_on(rounds)?;
    tool::revert(ctx, name, CMDLINE)?;
    ctx.destroy_guest(name)
}

fn record_turns(ctx: &mut Ctx) -> Result<(), Verdict> {
    let name = "turns-pv";
    let guest = ctx.ensure_guest(GuestSpec::new(name, Kind::Pv))?;
    tool::apply(ctx, name, CMDLINE)?;
    tool::revert(ctx, name, CMDLINE)?;
    // It lies on this one now, so its record says something else each time.
    tool::apply(ctx, name, THREE)?;
    let command = format!("apply {name} {}", patches::file(CMDLINE));
    let mut nth = 1;
    let (mut news, mut olds) = (0, 0);
    while tool::killed_at(ctx, nth, "journal", &command)? {
        let status = ctx.dom0.sh(&format!("xen-locus status {name}"))?;
        // In the middle of the writes only `recover` tells.
        check!(
            matches!(status.rc, 0 | 6),
            "place {nth}: status: {}",
            status.err_text()
        );
        ctx.dom0.ok(&format!("xen-locus recover {name}"))?;
        ctx.dom0.ok(&format!("xen-locus verify {name}"))?;
        match tool::listed(ctx, name)?.len() {
            1 => olds += 1,
            _ => {
                news += 1;
                tool::revert(ctx, name, CMDLINE)?;
            }
        }
        // Every other time it lies on the kernel's own function.
        if nth % 2 == 0 {
            tool::revert_all(ctx, name)?;
            if nth % 4 == 0 {
                tool::apply(ctx, name, CMDLINE)?;
                tool::revert(ctx, name, CMDLINE)?;
            }
            tool::apply(ctx, name, THREE)?;
        }
        nth += 1;
    }
    check!(olds > 10 && news > 0, "{olds} undone, {news} finished");
    tool::revert_all(ctx, name)?;
    patches::cmdline_is_untouched(&guest)?;
    ctx.destroy_guest(name)
}

/// Payloads in one life of a guest.
const MANY: u32 = 200;

fn many_payloads(ctx: &mut Ctx, kind: Kind) -> Result<(), Verdict> {
    let name = format!("many-{}", kind.name());
    let spec = GuestSpec::new(&name, kind).memory(112);
    let mut guest = ctx.ensure_guest(spec.clone())?;
    let used = |ctx: &Ctx| -> Result<u64, Verdict> {
        let info = tool::info(ctx, &name, "")?;
        info["arena"]["used"]
            .as_u64()
            .ok_or_else(|| Verdict::failure(format!("no arena: {info}")))
    };
    let (mut most, mut warnings, mut killed) = (0, 0, false);
    for n in 0..MANY {
        let file = patches::another(ctx, n)?;
        let check = ctx.dom0.sh(&format!("xen-locus check {name} {file}"))?;
        let said = check.err_text();
        check_eq!(check.rc, 0, "payload {n}: {said}");
        if said.contains("xen-locus reclaim") {
            warnings += 1;
            if !killed {
                killed_while_reclaiming(ctx, &name)?;
                killed = true;
            }
            reclaimed(ctx, &name)?;
            check_eq!(used(ctx)?, 0, "pages in use after reclaim");
        }
        ctx.dom0.ok(&format!("xen-locus apply {name} {file}"))?;
        check!(patches::cmdline_is_live(&guest)?, "payload {n} is not live");
        tool::revert(ctx, &name, CMDLINE)?;
        patches::cmdline_is_untouched(&guest)?;
        most = most.max(used(ctx)?);
    }
    let said = format!("{name}: {warnings} warnings, at most {most} pages in use");
    ctx.dom0.note(&said);
    eprintln!("xtest: {said}");
    check!(warnings > 2, "{said}");
    saved(ctx, &spec, &mut guest)?;
    ctx.dom0.ok(&format!(
        "xen-locus apply {name} {}",
        patches::another(ctx, MANY)?
    ))?;
    check!(patches::cmdline_is_live(&guest)?, "not live after restore");
    ctx.dom0.ok(&format!("xen-locus verify {name}"))?;
    tool::revert_all(ctx, &name)?;
    ctx.destroy_guest(&name)
}

/// What became of a payload whose `reclaim` was killed, when `recover` had resolved that.
#[derive(Debug, PartialEq)]
enum Fate {
    /// It was not killed, because it has not so many calls.
    NotKilled,
    /// It is parked as before.
    Parked,
    /// It is out of the guest's lists.
    Out,
    /// It is gone.
    Gone,
}

fn reclaim_killed(ctx: &mut Ctx) -> Result<(), Verdict> {
    let name = "killed-pv";
    let guest = ctx.ensure_guest(GuestSpec::new(name, Kind::Pv))?;
    let park = || -> Result<(), Verdict> {
        tool::apply(ctx, name, CMDLINE)?;
        tool::revert(ctx, name, CMDLINE)?;
        Ok(())
    };
    park()?;
    let mut out_at = 1;
    let mut seen = killed_at(ctx, name, out_at)?;
    while seen == Fate::Parked {
        out_at += 1;
        seen = killed_at(ctx, name, out_at)?;
    }
    // From here on its only journal is that of the last step.
    let (mut nth, mut gone) = (0, 0);
    while seen != Fate::NotKilled {
        if seen == Fate::Gone {
            gone += 1;
            park()?;
            check_eq!(
                killed_at(ctx, name, out_at)?,
                Fate::Out,
                "at {out_at} again"
            );
        }
        nth += 1;
        seen = killed_at(ctx, name, nth)?;
    }
    let said = format!("{name}: out at call {out_at}, then {nth} calls, gone after {gone} of them");
    eprintln!("xtest: {said}");
    check!(out_at > 10 && nth > 10 && gone > 1, "{said}");
    park()?;
    check!(!patches::cmdline_is_live(&guest)?, "live after revert");
    reclaimed(ctx, name)?;
    ctx.destroy_guest(name)
}

/// Kills `reclaim` of the only parked payload at its `nth` call after a journal began, and lets `recover` resolve it.
fn killed_at(ctx: &Ctx, name: &str, nth: u32) -> Result<Fate, Verdict> {
    let command = format!("reclaim {name} {CMDLINE}");
    if !tool::killed_at(ctx, nth, "journal:rows", &command)? {
        return Ok(Fate::NotKilled);
    }
    let recovered = ctx.dom0.sh(&format!("xen-locus recover {name}"))?;
    let told = format!("{}{}", recovered.text(), recovered.err_text());
    check_eq!(recovered.rc, 0, "call {nth}: {told}");
    ctx.dom0.ok(&format!("xen-locus verify {name}"))?;
    if tool::info(ctx, name, "")?["arena"]["used"] == 0 {
        return Ok(Fate::Gone);
    }
    Ok(match told.contains("out of the guest's lists") {
        true => Fate::Out,
        false => Fate::Parked,
    })
}

/// Kills `reclaim` at some of its calls: the payloads are parked or gone, and nothing else changed.
fn killed_while_reclaiming(ctx: &Ctx, name: &str) -> Result<(), Verdict> {
    let command = format!("reclaim {name} {CMDLINE}");
    // After some hundred calls it only reads memory.
    for nth in (1..400).step_by(7) {
        let out = ctx.dom0.sh_timeout(
            &format!("XEN_LOCUS_FAULT={nth}:kill:journal xen-locus-faults {command}"),
            Duration::from_secs(1200),
        )?;
        if !out.err_text().contains("xen-locus: fault: ") {
            break;
        }
        ctx.dom0.ok(&format!("xen-locus recover {name}"))?;
        ctx.dom0.ok(&format!("xen-locus verify {name}"))?;
    }
    Ok(())
}

/// Saves and restores the guest.
fn saved(ctx: &mut Ctx, spec: &GuestSpec, guest: &mut Guest) -> Result<(), Verdict> {
    let name = guest.name.clone();
    ctx.dom0.ok(&format!("xl save {name} {SAVED} >/dev/null"))?;
    ctx.dom0
        .ok(&format!("xl restore {SAVED} >/dev/null && rm {SAVED}"))?;
    *guest = ctx.adopt_guest(spec.clone())?;
    Ok(())
}
