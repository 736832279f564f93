//! Guests get less and more memory and processors, and are suspended, with patches in force and while others are
//! applied.

use std::time::{Duration, Instant};

use crate::check;
use crate::guest::{Guest, GuestSpec, Kind};
use crate::profile::{PV1, PVH};
use crate::scenario::{Ctx, Scenario};
use crate::scenarios::steps::patches::{CMDLINE, PAIR, TWO};
use crate::scenarios::steps::tool::{self, shows_now};
use crate::scenarios::steps::wait;
use crate::verdict::Verdict;

/// Scenarios that take too long for a usual run.
pub const MATRIX: &[Scenario] = &[
    Scenario {
        name: "sizes-pv",
        summary:
            "patches are applied and stay while a PV guest loses and gains memory and vCPUs, and sleeps",
        profile: &PV1,
        run: |ctx| sizes(ctx, Kind::Pv),
    },
    Scenario {
        name: "sizes-pvh",
        summary:
            "patches are applied and stay while a PVH guest loses and gains memory and vCPUs, and sleeps",
        profile: &PVH,
        run: |ctx| sizes(ctx, Kind::Pvh),
    },
];

/// Waits until `cmd` prints a wanted number in the guest. Returns the number.
fn until(guest: &Guest, cmd: &str, wanted: impl Fn(u64) -> bool) -> Result<u64, Verdict> {
    wait::until(Duration::from_secs(60), || {
        let text = guest.ok(cmd)?;
        let number = text.parse().ok().filter(|&n| wanted(n));
        Ok(number.ok_or_else(|| format!("`{cmd}` still says {text:?}")))
    })
}

/// A command that prints the memory of the guest's kernel, in KiB.
const MEMORY: &str = "awk '/^MemTotal/ {print $2}' /proc/meminfo";
const CPUS: &str = "nproc";

/// Checks that each CPU shows the word in `/proc/cmdline`.
fn on_each(guest: &Guest, cpus: u32, word: &str) -> Result<(), Verdict> {
    for cpu in 0..cpus {
        let mask = 1 << cpu;
        let line = guest.ok(&format!("taskset {mask:x} cat /proc/cmdline"))?;
        let word = format!("locus={word}");
        check!(line.ends_with(&word), "CPU {cpu} has no {word}: {line}");
    }
    Ok(())
}

fn sizes(ctx: &mut Ctx, kind: Kind) -> Result<(), Verdict> {
    let name = format!("sizes-{}", kind.name());
    let spec = GuestSpec::new(&name, kind).config("maxmem=256\nmaxvcpus=3");
    let guest = ctx.ensure_guest(spec)?;
    guest.start_workload()?;
    let rounds = guest.rounds()?;
    let xl = |line: &str| ctx.dom0.ok(&format!("xl {line}"));
    let apply = |patch: &str| tool::apply(ctx, &name, patch);

    // Memory: less, then more than at the start, then more than the kernel reserved room for.
    apply(CMDLINE)?;
    let start = until(&guest, MEMORY, |_| true)?;
    xl(&format!("mem-set {name} 150"))?;
    let small = until(&guest, MEMORY, |kib| kib + 30_000 < start)?;
    shows_now(ctx, &guest, ["live", "", ""], &[CMDLINE])?;
    apply(PAIR)?;
    shows_now(ctx, &guest, ["live", "live", "live"], &[CMDLINE, PAIR])?;
    xl(&format!("mem-set {name} 240"))?;
    let large = until(&guest, MEMORY, |kib| kib > start + 30_000)?;
    shows_now(ctx, &guest, ["live", "live", "live"], &[CMDLINE, PAIR])?;
    let added = hot_add(ctx, &guest, large)?;
    shows_now(ctx, &guest, ["live", "live", "live"], &[CMDLINE, PAIR])?;
    eprintln!("xtest: {name}: memory {start} KiB, then {small}, {large}, {added}");

    // Processors: one of two is removed while a patch is applied, then two are added.
    xl(&format!("vcpu-set {name} 1"))?;
    until(&guest, CPUS, |n| n == 1)?;
    shows_now(ctx, &guest, ["live", "live", "live"], &[CMDLINE, PAIR])?;
    apply(TWO)?;
    shows_now(ctx, &guest, ["two", "two", "live"], &[CMDLINE, PAIR, TWO])?;
    xl(&format!("vcpu-set --ignore-host {name} 3"))?;
    // The kernel announces them (drivers/xen/cpu_hotplug.c). Bringing them online is a task of udev in the guest.
    let up = "for cpu in 1 2; do echo 1 >/sys/devices/system/cpu/cpu$cpu/online; done 2>/dev/null";
    until(&guest, &format!("{up}; {CPUS}"), |n| n == 3)?;
    on_each(&guest, 3, "two")?;
    tool::revert(ctx, &name, TWO)?;
    on_each(&guest, 3, "live")?;
    shows_now(ctx, &guest, ["live", "live", "live"], &[CMDLINE, PAIR])?;

    sleeps(ctx, &guest)?;
    tool::revert_all(ctx, &name)?;
    shows_now(ctx, &guest, ["", "", ""], &[])?;
    std::thread::sleep(Duration::from_secs(1));
    guest.went_on(rounds)?;
    ctx.destroy_guest(&name)
}

/// Makes the guest's kernel add memory beyond the room that it reserved at the start (mm/memory_hotplug.c, by
/// drivers/xen/balloon.c). `xl mem-set` never asks for more than that room, so this writes the node in XenStore.
fn hot_add(ctx: &Ctx, guest: &Guest, before: u64) -> Result<u64, Verdict> {
    let (name, domid) = (&guest.name, guest.domid);
    guest.ok("echo online >/sys/devices/system/memory/auto_online_blocks")?;
    ctx.dom0.ok(&format!(
        "xl mem-max {name} 420 && xenstore-write /local/domain/{domid}/memory/target $((400 * 1024))"
    ))?;
    until(guest, MEMORY, |kib| kib > before + 100_000)
}

/// Suspends the guest to RAM, which is suspend to idle here, by the kernel's own test of it: tasks are frozen and
/// devices are down for five seconds. A patch is applied meanwhile.
///
/// The test waits in a loop that counts cycles. On an emulated machine that took over twenty seconds of the
/// guest's clock, and its watchdog reported a lockup; so the watchdog gets more time.
fn sleeps(ctx: &Ctx, guest: &Guest) -> Result<(), Verdict> {
    let name = &guest.name;
    guest.ok("echo 60 >/proc/sys/kernel/watchdog_thresh")?;
    let began = Instant::now();
    guest.ok("echo platform >/sys/power/pm_test && \
         (sleep 2; echo mem >/sys/power/state; echo $? >/tmp/slept) >/dev/null 2>&1 &")?;
    std::thread::sleep(Duration::from_secs(3));
    tool::apply(ctx, name, TWO)?;
    let applied = began.elapsed();
    until(guest, "cat /tmp/slept 2>/dev/null || echo 99", |rc| rc == 0)?;
    let log = guest.ok("dmesg | grep -i -e 'PM: suspend' -e 'suspend debug' ")?;
    check!(log.contains("suspend exit"), "it did not sleep: {log}");
    eprintln!(
        "xtest: {name}: applied after {applied:?}, awake after {:?}: {log}",
        began.elapsed()
    );
    shows_now(ctx, guest, ["two", "two", "live"], &[CMDLINE, PAIR, TWO])
}
