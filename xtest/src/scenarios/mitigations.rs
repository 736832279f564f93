//! Guests with page-table isolation, and one without any mitigation. All other guests have what their kernel chooses.

use std::time::Duration;

use super::steps::guest_log::Log;
use super::steps::patches::{check, cmdline_is_untouched, file, put_check, DRAIN, PAIR};
use super::steps::sleepers;
use super::steps::tool::{self, Text};
use crate::check_eq;
use crate::guest::{Guest, GuestSpec, Kind, Mitigations};
use crate::profile::{HVM, PV1, PVH};
use crate::scenario::{Ctx, Scenario};
use crate::verdict::Verdict;

/// Scenarios that are short enough for a usual run.
pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "plain-pv",
        summary: "a PV guest without mitigations is patched",
        profile: &PV1,
        run: |ctx| plain(ctx, Kind::Pv),
    },
    Scenario {
        name: "pti-pvh",
        summary: "a PVH guest with page-table isolation is read and patched, idle and with all vCPUs in user mode",
        profile: &PVH,
        run: |ctx| isolation(ctx, Kind::Pvh, 3, 2),
    },
    Scenario {
        name: "pti-hvm",
        summary: "an HVM guest with page-table isolation is read and patched, idle and with all vCPUs in user mode",
        profile: &HVM,
        run: |ctx| isolation(ctx, Kind::Hvm, 3, 2),
    },
];

/// The same, more often.
pub const MATRIX: &[Scenario] = &[
    Scenario {
        name: "pti-often-pvh",
        summary: "a PVH guest with page-table isolation is read 200 times and patched 100 times",
        profile: &PVH,
        run: |ctx| isolation(ctx, Kind::Pvh, 100, 50),
    },
    Scenario {
        name: "pti-often-hvm",
        summary: "an HVM guest with page-table isolation is read 200 times and patched 100 times",
        profile: &HVM,
        run: |ctx| isolation(ctx, Kind::Hvm, 100, 50),
    },
];

/// A program that never leaves user mode by itself, on each of the guest's two vCPUs.
const SPIN: &str = "for mask in 1 2; do taskset $mask sh -c 'while :; do :; done' & echo $!; \
    done > /run/spin.pids; sleep 1";

fn isolation(ctx: &mut Ctx, kind: Kind, reads: u32, cycles: u32) -> Result<(), Verdict> {
    // Other HVM guests have no isolation.
    let name = match kind {
        Kind::Hvm => "isolated-hvm",
        Kind::Pv | Kind::Pvh => kind.name(),
    };
    let spec = GuestSpec::new(name, kind).mitigations(Mitigations::Isolation);
    let guest = ctx.ensure_guest(spec)?;
    put_check(&guest, PAIR)?;
    let info = tool::info(ctx, name, "")?;
    check_eq!(info["pti"], true, "{info}");
    let log = Log::begin(ctx, &guest)?;
    read_and_patch(ctx, &guest, reads, cycles)?;
    guest.ok(SPIN)?;
    read_and_patch(ctx, &guest, reads, cycles)?;
    nudged(ctx, &guest)?;
    guest.ok("kill $(cat /run/spin.pids)")?;
    log.nothing_new(ctx, &guest)?;
    tool::no_patches(ctx, name)?;
    if kind == Kind::Hvm {
        ctx.destroy_guest(name)?;
    }
    Ok(())
}

/// `info` works `reads` times, and a patch is applied, verified and reverted, then `cycles` times more.
pub(super) fn read_and_patch(
    ctx: &Ctx,
    guest: &Guest,
    reads: u32,
    cycles: u32,
) -> Result<(), Verdict> {
    let name = &guest.name;
    let untouched = Text::save(ctx, name)?;
    // Without a cache, so that it finds the symbols each time.
    in_time(
        ctx,
        &format!(
            "for i in $(seq {reads}); do xen-locus --no-cache info {name} >/dev/null || \
             {{ echo \"info $i: $?\"; exit 1; }}; done"
        ),
    )?;
    tool::apply(ctx, name, PAIR)?;
    check(guest, PAIR, "after")?;
    ctx.dom0.ok(&format!("xen-locus verify {name}"))?;
    tool::revert(ctx, name, PAIR)?;
    in_time(
        ctx,
        &tool::cycles(
            "xen-locus",
            &format!("{name} {}", file(PAIR)),
            &format!("{name} {PAIR}"),
            cycles,
        ),
    )?;
    check(guest, PAIR, "before")?;
    untouched.check_unchanged(ctx, guest)
}

fn in_time(ctx: &Ctx, cmd: &str) -> Result<(), Verdict> {
    let out = ctx.dom0.sh_timeout(cmd, Duration::from_secs(1800))?;
    check_eq!(out.rc, 0, "`{cmd}`: {} {}", out.text(), out.err_text());
    Ok(())
}

/// A thread that sleeps in a function is woken, and leaves it.
fn nudged(ctx: &Ctx, guest: &Guest) -> Result<(), Verdict> {
    sleepers::begin(guest, 1, 1)?;
    let said = ctx.json(&format!(
        "xen-locus -o json nudge {} {}",
        guest.name,
        file(DRAIN)
    ))?;
    check_eq!(said["result"], "nudged", "{said}");
    sleepers::end(guest)
}

fn plain(ctx: &mut Ctx, kind: Kind) -> Result<(), Verdict> {
    let spec = GuestSpec::new(&format!("plain-{}", kind.name()), kind);
    let guest = ctx.ensure_guest(spec.mitigations(Mitigations::Off))?;
    let info = tool::info(ctx, &guest.name, "")?;
    let chosen = &info["cpu"]["mitigations"]["spectre_v2_enabled"];
    check_eq!(*chosen, "SPECTRE_V2_NONE", "{info}");
    put_check(&guest, PAIR)?;
    tool::apply(ctx, &guest.name, PAIR)?;
    check(&guest, PAIR, "after")?;
    tool::revert(ctx, &guest.name, PAIR)?;
    check(&guest, PAIR, "before")?;
    cmdline_is_untouched(&guest)?;
    ctx.destroy_guest(&guest.name)
}
