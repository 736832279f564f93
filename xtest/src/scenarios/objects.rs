//! Payloads that replace functions of the guest's modules, and use their symbols.

use super::steps::patches::SLEEPER;
use super::steps::tool;
use crate::guest::{Guest, GuestSpec, Kind};
use crate::profile::{PV1, PVH};
use crate::scenario::{Ctx, Scenario};
use crate::verdict::Verdict;
use crate::{check, check_eq};

/// Scenarios that are short enough for a usual run.
pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "objects-pv",
        summary: "a function of a PV guest's module is replaced, with the help of another module",
        profile: &PV1,
        run: |ctx| objects(ctx, Kind::Pv),
    },
    Scenario {
        name: "objects-pvh",
        summary: "a function of a PVH guest's module is replaced, with the help of another module",
        profile: &PVH,
        run: |ctx| objects(ctx, Kind::Pvh),
    },
];

/// The same patch as `patches/cmdline`, in kpatch's form.
fn kpatch(ctx: &Ctx, guest: &Guest) -> Result<(), Verdict> {
    let show = ctx.dom0.ok("xen-locus show /payloads/locus_kpatch.ko")?;
    for words in ["kpatch", "cmdline_proc_show number 1 in vmlinux"] {
        check!(show.contains(words), "show says no {words:?}: {show}");
    }
    let before = guest.ok("cat /proc/cmdline")?;
    tool::apply(ctx, "objects", "locus_kpatch")?;
    let after = guest.ok("cat /proc/cmdline")?;
    check_eq!(after, format!("{before} locus=kpatch"));
    tool::revert(ctx, "objects", "locus_kpatch")?;
    check_eq!(guest.ok("cat /proc/cmdline")?, before);
    Ok(())
}

/// What the guest itself does with a function: a shell command to begin it, words of the refusal, and a shell command
/// to end it.
const HELD: [(&str, &str, &str); 2] = [
    (
        "echo 'p:locus cmdline_proc_show' > kprobe_events && echo 1 > events/kprobes/enable",
        "a kprobe of the guest's own stands at",
        "echo 0 > events/kprobes/enable && echo > kprobe_events",
    ),
    (
        "echo cmdline_proc_show > set_ftrace_filter && echo function > current_tracer",
        "traced by the guest itself",
        "echo nop > current_tracer && echo > set_ftrace_filter",
    ),
];

/// Functions that the guest itself traces, probes or livepatches are refused, and the refusal says why.
fn held(ctx: &Ctx, guest: &Guest) -> Result<(), Verdict> {
    let apply = "xen-locus apply objects /payloads/locus_kpatch.ko";
    for (begin, words, end) in HELD {
        guest.ok(&tool::in_tracing(begin))?;
        tool::refused(ctx, apply, 2, words)?;
        guest.ok(&tool::in_tracing(end))?;
    }
    let module = ctx.payloads.join("locus_sleeper/locus_sleeper.ko");
    guest.put_module("/tmp/locus_sleeper.ko", &module)?;
    guest.ok("insmod /tmp/locus_sleeper.ko")?;
    let same = "xen-locus apply objects /payloads/locus_sleeper.ko";
    tool::refused(ctx, same, 2, "livepatched by the guest itself")?;
    let there = "/sys/kernel/livepatch/locus_sleeper";
    guest.ok(&format!(
        "for i in $(seq 60); do echo 0 > {there}/enabled && break; sleep 1; done; \
         for i in $(seq 60); do [ -e {there} ] || break; sleep 1; done; rmmod locus_sleeper"
    ))?;
    // Nothing uses the functions any more.
    for name in ["locus_kpatch", SLEEPER] {
        let out = ctx
            .dom0
            .sh(&format!("xen-locus check objects /payloads/{name}.ko"))?;
        check_eq!(out.rc, 0, "check {name}: {}", out.err_text());
    }
    Ok(())
}

const NAME: &str = "locus_object_dummy";
/// The result of `crc_itu_t(0, "locus", 5)`: CRC-16/XMODEM, which has the same polynomial and initial value.
const CRC: &str = "25768";

fn objects(ctx: &mut Ctx, kind: Kind) -> Result<(), Verdict> {
    let guest = ctx.ensure_guest(GuestSpec::new("objects", kind))?;
    let apply = format!("xen-locus apply objects /payloads/{NAME}.ko");
    let show = ctx
        .dom0
        .ok(&format!("xen-locus show /payloads/{NAME}.ko"))?;
    check!(
        show.contains("dummy_get_stats64 number 1 in dummy"),
        "show: {show}"
    );
    kpatch(ctx, &guest)?;
    held(ctx, &guest)?;
    // What the payload needs is loaded step by step.
    tool::refused(ctx, &apply, 3, "module dummy is not loaded")?;
    guest.ok("insmod /lib/modules/dummy.ko")?;
    tool::refused(ctx, &apply, 3, "no symbol crc_itu_t")?;
    tool::refused(ctx, &apply, 3, "crc-itu-t")?;
    guest.ok("insmod /lib/modules/crc_itu_t.ko")?;
    tool::refused(
        ctx,
        "xen-locus apply objects /payloads/locus_object_sympos.ko",
        3,
        "dummy_get_stats64 number 7: it has 1",
    )?;
    received(&guest, "0")?;

    // The second time its code is already in the arena.
    for _ in 0..2 {
        ctx.dom0.ok(&apply)?;
        received(&guest, CRC)?;
        let status = tool::status(ctx, "objects")?;
        let patch = &status["patches"][0];
        check_eq!(patch["state"], "applied", "{status}");
        check_eq!(patch["functions"][0]["object"], "dummy", "{status}");
        let old = guest.ok("grep ' dummy_get_stats64' /proc/kallsyms | cut -d' ' -f1")?;
        check_eq!(patch["functions"][0]["old"], format!("0x{old}"));
        tool::revert(ctx, "objects", NAME)?;
        received(&guest, "0")?;
    }

    // Either the module can't be unloaded, or the unloading is noticed.
    ctx.dom0.ok(&apply)?;
    let state = || -> Result<String, Verdict> {
        let status = tool::status(ctx, "objects")?;
        Ok(status["patches"][0]["state"]
            .as_str()
            .unwrap_or("?")
            .to_owned())
    };
    let revert = format!("xen-locus revert objects {NAME}");
    if guest.sh("rmmod dummy")?.rc == 0 {
        check_eq!(state()?, "gone");
        tool::refused(ctx, &revert, 1, "module dummy")?;
        tool::refused(ctx, &apply, 1, "not in force any more")?;
        guest.ok("insmod /lib/modules/dummy.ko")?;
        // At the same address or another, the module is as it was built.
        received(&guest, "0")?;
        check!(state()? != "applied", "a module that was loaded again");
        tool::refused(ctx, &revert, 1, NAME)?;
        received(&guest, "0")?;
    } else {
        check_eq!(state()?, "applied");
        received(&guest, CRC)?;
        // A reverted patch stays in the arena, and keeps its references to the module.
        ctx.dom0.ok(&revert)?;
        received(&guest, "0")?;
    }
    ctx.destroy_guest("objects")
}

/// Checks the number of received packets that the device of the module reports.
fn received(guest: &Guest, packets: &str) -> Result<(), Verdict> {
    let seen = guest.ok("cat /sys/class/net/dummy0/statistics/rx_packets")?;
    check_eq!(seen, packets, "packets received");
    Ok(())
}
