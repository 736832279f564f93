//! Payloads that were in force before: they are applied again, used again, and don't outgrow what a guest can carry.

use std::thread;
use std::time::Duration;

use super::steps::patches::{self, CMDLINE, THREE};
use super::steps::tool;
use crate::guest::{GuestSpec, Kind};
use crate::profile::{PV1, PVH};
use crate::scenario::{Ctx, Scenario};
use crate::verdict::Verdict;
use crate::{check, check_eq};

/// Scenarios that are short enough for a usual run.
pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "timer-pv",
        summary: "a payload of a PV guest whose timer is pending is applied again, and the timer runs out",
        profile: &PV1,
        run: |ctx| timer(ctx, Kind::Pv),
    },
    Scenario {
        name: "timer-pvh",
        summary: "a payload of a PVH guest whose timer is pending is applied again, and the timer runs out",
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

/// Starts a timer of 15 s at each read of `/proc/cmdline`.
const TIMER: &str = "locus_timer";
/// Longer than that.
const RAN_OUT: Duration = Duration::from_secs(20);
/// The file that a guest is saved to.
const SAVED: &str = "/tmp/saved";

fn timer(ctx: &mut Ctx, kind: Kind) -> Result<(), Verdict> {
    let name = format!("timer-{}", kind.name());
    let guest = ctx.ensure_guest(GuestSpec::new(&name, kind).memory(112))?;
    let read = || guest.ok("cat /proc/cmdline");
    tool::apply(ctx, &name, TIMER)?;
    for fired in 0..3 {
        let line = format!("fired={fired}");
        check_eq!(read()?, line, "the timer is started again");
        // The kernel's timers lead into it while it is applied again.
        tool::revert(ctx, &name, TIMER)?;
        tool::apply(ctx, &name, TIMER)?;
        thread::sleep(RAN_OUT);
    }
    check_eq!(read()?, "fired=3");
    tool::revert(ctx, &name, TIMER)?;
    ctx.dom0.ok(&format!("xen-locus verify {name}"))?;
    ctx.destroy_guest(&name)
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
