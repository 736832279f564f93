//! What the guest does to a function or a module between the look of the tool and its writes, and afterwards.

use std::time::{Duration, Instant};

use super::steps::guest_log::Log;
use super::steps::patches::{file, CMDLINE, CMDLINE_FILE, SLEEPER};
use super::steps::{sleepers, tool};
use crate::guest::{Guest, GuestSpec, Kind};
use crate::profile::{PV1, PVH};
use crate::scenario::{Ctx, Scenario};
use crate::verdict::Verdict;
use crate::{check, check_eq};

/// Scenarios that are short enough for a usual run.
pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "kprobe-late-pv",
        summary: "a kprobe that a PV guest registers after apply, or during its wait, is never written over",
        profile: &PV1,
        run: |ctx| kprobes(ctx, Kind::Pv),
    },
    Scenario {
        name: "kprobe-late-pvh",
        summary: "a kprobe that a PVH guest registers after apply, or during its wait, is never written over",
        profile: &PVH,
        run: |ctx| kprobes(ctx, Kind::Pvh),
    },
    Scenario {
        name: "module-going-pv",
        summary: "a module that a payload uses goes during the wait: refused; another one comes and goes: applied",
        profile: &PV1,
        run: |ctx| modules(ctx, Kind::Pv),
    },
];

/// What is said of a kprobe that stands in the way.
pub(super) const KPROBE: &str = "a kprobe of the guest's own stands at";

/// A command of xen-locus that runs in dom0 meanwhile.
struct Meanwhile;

impl Meanwhile {
    fn begin(ctx: &Ctx, command: &str) -> Result<Meanwhile, Verdict> {
        ctx.dom0.ok(&format!(
            "rm -f /run/late.rc; (sh -c 'xen-locus {command} >/run/late.log 2>&1; echo $? >/run/late.rc.new; \
             mv /run/late.rc.new /run/late.rc' </dev/null >/dev/null 2>&1 &); sleep 3; [ ! -e /run/late.rc ]"
        ))?;
        Ok(Meanwhile)
    }

    /// Waits for its end: exit code, and what it printed.
    fn end(self, ctx: &Ctx) -> Result<(String, String), Verdict> {
        let began = Instant::now();
        while ctx.dom0.sh("[ -e /run/late.rc ]")?.rc != 0 {
            check!(
                began.elapsed() < Duration::from_secs(120),
                "it does not end"
            );
            std::thread::sleep(Duration::from_millis(500));
        }
        let rc = ctx.dom0.ok("cat /run/late.rc")?;
        Ok((rc, ctx.dom0.ok("cat /run/late.log")?))
    }
}

fn kprobes(ctx: &mut Ctx, kind: Kind) -> Result<(), Verdict> {
    let guest = ctx.ensure_guest(GuestSpec::new(kind.name(), kind))?;
    let log = Log::begin(ctx, &guest)?;
    after(ctx, &guest)?;
    during(ctx, &guest)?;
    log.nothing_new(ctx, &guest)?;
    tool::no_patches(ctx, &guest.name)
}

/// A kprobe is registered on the redirect, and stays disabled. It has a copy of the redirect.
fn after(ctx: &Ctx, guest: &Guest) -> Result<(), Verdict> {
    let name = &guest.name;
    let trace = |cmd: &str| guest.ok(&tool::in_tracing(cmd));
    let before = guest.ok("cat /proc/cmdline")?;
    let live = format!("{before} locus=live");
    tool::apply(ctx, name, CMDLINE)?;
    trace("echo 'p:late cmdline_proc_show+5' > kprobe_events")?;
    tool::refused(
        ctx,
        &format!("xen-locus revert {name} {CMDLINE}"),
        2,
        KPROBE,
    )?;
    let all = format!("xen-locus apply {name} {}", file("locus_stack_all"));
    tool::refused(ctx, &all, 2, KPROBE)?;
    // Enabled, it changes the first byte of the redirect.
    trace("echo 1 > events/kprobes/late/enable")?;
    check_eq!(guest.ok("cat /proc/cmdline")?, live);
    tool::refused(
        ctx,
        &format!("xen-locus revert {name} {CMDLINE}"),
        2,
        KPROBE,
    )?;
    let again = format!("xen-locus apply {name} {CMDLINE_FILE}");
    tool::refused(ctx, &again, 2, "has drifted")?;
    trace("echo 0 > events/kprobes/late/enable")?;
    check_eq!(guest.ok("cat /proc/cmdline")?, live);
    trace("echo > kprobe_events")?;
    tool::revert(ctx, name, CMDLINE)?;
    check_eq!(guest.ok("cat /proc/cmdline")?, before);
    // What it copies now is the kernel's own.
    trace(
        "echo 'p:late cmdline_proc_show+5' > kprobe_events && echo 1 > events/kprobes/late/enable",
    )?;
    check_eq!(guest.ok("cat /proc/cmdline")?, before);
    trace("echo 0 > events/kprobes/late/enable && echo > kprobe_events")?;
    check_eq!(guest.ok("cat /proc/cmdline")?, before);
    Ok(())
}

/// A kprobe is registered while the tool waits for a thread that sleeps in the function.
fn during(ctx: &Ctx, guest: &Guest) -> Result<(), Verdict> {
    let trace = |cmd: &str| guest.ok(&tool::in_tracing(cmd));
    let apply = format!("apply {} {} --timeout 60s", guest.name, file(SLEEPER));
    sleepers::begin(guest, 1, 1)?;
    let waits = Meanwhile::begin(ctx, &apply)?;
    trace("echo 'p:late __x64_sys_pause+5' > kprobe_events")?;
    guest.ok("killall pause")?;
    let (rc, said) = waits.end(ctx)?;
    check_eq!(rc, "2", "{said}");
    check!(said.contains(KPROBE), "{said}");
    trace("echo 1 > events/kprobes/late/enable")?;
    sleepers::begin(guest, 1, 1)?;
    sleepers::end(guest)?;
    trace("echo 0 > events/kprobes/late/enable && echo > kprobe_events")?;
    // One elsewhere does not end the wait.
    sleepers::begin(guest, 1, 1)?;
    let waits = Meanwhile::begin(ctx, &apply)?;
    trace("echo 'p:late version_proc_show' > kprobe_events")?;
    guest.ok("killall pause")?;
    let (rc, said) = waits.end(ctx)?;
    check_eq!(rc, "0", "{said}");
    trace("echo > kprobe_events")?;
    tool::revert(ctx, &guest.name, SLEEPER)?;
    Ok(())
}

/// A module, what it exports, and a payload that calls it.
const GOING: &str = "locus_going";
const USES: &str = "locus_uses_going";

fn modules(ctx: &mut Ctx, kind: Kind) -> Result<(), Verdict> {
    let guest = ctx.ensure_guest(GuestSpec::new("going", kind))?;
    let apply = format!("apply {} {} --timeout 90s", guest.name, file(USES));
    let before = guest.ok("cat /proc/cmdline")?;
    let module = ctx.payloads.join(GOING).join(format!("{GOING}.ko"));
    guest.put_module("/tmp/going.ko", &module)?;
    // What the kernel says of modules from elsewhere it says once.
    guest.ok(&format!(
        "insmod /tmp/going.ko && rmmod {GOING} && insmod /lib/modules/dummy.ko && rmmod dummy"
    ))?;
    let log = Log::begin(ctx, &guest)?;
    // The module goes, slowly. While it does, and when it is gone, nothing may be put in force that calls it.
    guest.ok("insmod /tmp/going.ko delay=15000")?;
    sleepers::begin(&guest, 1, 1)?;
    let waits = Meanwhile::begin(ctx, &apply)?;
    guest.ok(&format!(
        "(rmmod {GOING} >/dev/null 2>&1 &); for i in $(seq 60); do \
         if grep -q going /sys/module/{GOING}/initstate; then killall pause; exit; fi; sleep 1; done; exit 1"
    ))?;
    let (rc, said) = waits.end(ctx)?;
    check_eq!(rc, "3", "{said}");
    check!(
        said.contains("locus_going_helper") && said.contains(GOING),
        "{said}"
    );
    check_eq!(guest.ok("cat /proc/cmdline")?, before);
    tool::no_patches(ctx, &guest.name)?;
    // Other modules come and go, and change the list that the payload is linked into.
    guest.ok("insmod /tmp/going.ko")?;
    sleepers::begin(&guest, 1, 1)?;
    let waits = Meanwhile::begin(ctx, &apply)?;
    guest.ok("for i in 1 2 3; do insmod /lib/modules/dummy.ko && rmmod dummy || exit; done; killall pause")?;
    let (rc, said) = waits.end(ctx)?;
    check_eq!(rc, "0", "{said}");
    check_eq!(guest.ok("cat /proc/cmdline")?, format!("{before} locus=42"));
    let out = guest.sh(&format!("rmmod {GOING}"))?;
    check!(
        out.rc != 0,
        "the module went although a payload in force calls it"
    );
    tool::revert(ctx, &guest.name, USES)?;
    check_eq!(guest.ok("cat /proc/cmdline")?, before);
    log.nothing_new(ctx, &guest)
}
