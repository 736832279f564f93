//! Patches are applied to a running guest and reverted, many times, under load.

use std::time::Duration;

use serde_json::Value;

use super::steps::guest_log::Log;
use super::steps::patches::{check, file, put_check, CMDLINE, DRAIN, PAIR, SLEEPER};
use super::steps::{sleepers, tool};
use crate::guest::{Guest, GuestSpec, Kind};
use crate::profile::{HVM, PV, PV1, PVH};
use crate::scenario::{Ctx, Scenario};
use crate::verdict::Verdict;
use crate::{check, check_eq};

/// Scenarios that are short enough for a usual run.
pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "apply-pv",
        summary: "patches are applied to a PV guest under load and reverted, 20 times in a row",
        profile: &PV,
        run: |ctx| apply(ctx, Kind::Pv, 20),
    },
    Scenario {
        name: "apply-pvh",
        summary: "patches are applied to a PVH guest under load and reverted, 10 times in a row",
        profile: &PVH,
        run: |ctx| apply(ctx, Kind::Pvh, 10),
    },
    Scenario {
        name: "apply-hvm",
        summary: "patches are applied to an HVM guest with KASLR under load and reverted, 10 times in a row",
        profile: &HVM,
        run: |ctx| apply(ctx, Kind::Hvm, 10),
    },
    Scenario {
        name: "blocked-pv",
        summary:
            "a thread that sleeps in the old function blocks apply, one in the new function revert",
        profile: &PV1,
        run: |ctx| blocked(ctx, Kind::Pv),
    },
    Scenario {
        name: "drain-pv",
        summary:
            "with --entry-only a thread finishes in the version it entered, and status reports it",
        profile: &PV1,
        run: |ctx| drains(ctx, Kind::Pv),
    },
    Scenario {
        name: "arena-is-kernel-only-pv",
        summary: "user mode of a PV guest can neither read nor write the arena",
        profile: &PV1,
        run: |ctx| kernel_only(ctx, Kind::Pv),
    },
];

/// The guest's own kernel lists the patch as a module, with its symbols, and does not unload it.
fn is_a_module(guest: &Guest, name: &str) -> Result<(), Verdict> {
    let line = guest.ok(&format!("grep '^{name} ' /proc/modules"))?;
    let words: Vec<&str> = line.split_whitespace().collect();
    let arena = words
        .get(5)
        .is_some_and(|at| at.starts_with("0xffffffffff6"));
    check!(
        words.get(4) == Some(&"Live") && arena,
        "/proc/modules says {line:?}"
    );
    let symbols = guest.ok(&format!("grep -c '\\[{name}\\]' /proc/kallsyms"))?;
    check!(symbols != "0", "/proc/kallsyms has nothing of {name}");
    let out = guest.sh(&format!("rmmod {name}; rmmod -f {name}"))?;
    check!(
        out.rc != 0 && guest.ok("cat /proc/modules")?.contains(name),
        "it was unloaded: {}",
        out.err_text()
    );
    Ok(())
}

fn apply(ctx: &mut Ctx, kind: Kind, count: u32) -> Result<(), Verdict> {
    let guest = ctx.ensure_guest(GuestSpec::new(kind.name(), kind))?;
    for patch in [CMDLINE, PAIR] {
        put_check(&guest, patch)?;
        check(&guest, patch, "before")?;
    }
    if kind == Kind::Hvm {
        text_is_where_info_says(ctx, &guest)?;
    }
    let log = Log::begin(ctx, &guest)?;
    only_asked(ctx, &guest)?;
    one_patch(ctx, &guest)?;
    two_patches(ctx, &guest)?;
    many_times(ctx, &guest, count)?;
    log.nothing_new(ctx, &guest)?;
    tool::no_patches(ctx, &guest.name)
}

/// KASLR has moved the kernel's text, and `info` reports the right address.
fn text_is_where_info_says(ctx: &Ctx, guest: &Guest) -> Result<(), Verdict> {
    let info = tool::info(ctx, &guest.name, "")?;
    let text = guest.ok("grep ' T _text$' /proc/kallsyms | cut -d' ' -f1")?;
    check_eq!(
        info["text_base"],
        format!("0x{text}"),
        "KASLR: where the text is"
    );
    Ok(())
}

/// `check` and a dry run change nothing.
fn only_asked(ctx: &Ctx, guest: &Guest) -> Result<(), Verdict> {
    let (name, file) = (&guest.name, file(CMDLINE));
    let out = ctx.dom0.sh(&format!("xen-locus check {name} {file}"))?;
    check_eq!(out.rc, 0, "check: {}", out.err_text());
    ctx.dom0
        .ok(&format!("xen-locus --dry-run apply {name} {file}"))?;
    check(guest, CMDLINE, "before")
}

/// One patch takes effect, and both the guest and the tool show it.
fn one_patch(ctx: &Ctx, guest: &Guest) -> Result<(), Verdict> {
    let report = apply_as(ctx, guest, CMDLINE, "applied")?;
    check!(
        report["pause_us"].as_u64().is_some_and(|us| us > 0),
        "no pause: {report}"
    );
    check_eq!(report["functions"], 1);
    check(guest, CMDLINE, "after")?;
    apply_as(ctx, guest, CMDLINE, "already")?;
    is_a_module(guest, CMDLINE)?;
    let row = tool::list_row(ctx, &guest.name)?;
    check!(
        row["status"] == "patched" && row["patches"] == 1 && row["kernel"] == *ctx.release,
        "list: {row}"
    );
    Ok(())
}

/// Two patches are in force at once, and are reverted in either order.
fn two_patches(ctx: &Ctx, guest: &Guest) -> Result<(), Verdict> {
    for (first, second) in [(CMDLINE, PAIR), (PAIR, CMDLINE)] {
        for patch in [first, second] {
            if !tool::listed(ctx, &guest.name)?.contains(&patch.to_owned()) {
                apply_as(ctx, guest, patch, "applied")?;
            }
            check(guest, patch, "after")?;
        }
        tool::revert_json(ctx, guest, first)?;
        check(guest, first, "before")?;
        check(guest, second, "after")?;
        tool::revert_json(ctx, guest, second)?;
        check(guest, second, "before")?;
    }
    Ok(())
}

/// A patch is applied and reverted `count` times in a guest under load.
fn many_times(ctx: &Ctx, guest: &Guest, count: u32) -> Result<(), Verdict> {
    let name = &guest.name;
    guest.start_workload()?;
    let rounds = guest.rounds()?;
    let cycles = tool::cycles(
        "xen-locus",
        &format!("{name} {}", file(PAIR)),
        &format!("{name} {PAIR}"),
        count,
    );
    let out = ctx.dom0.sh_timeout(&cycles, Duration::from_secs(900))?;
    check_eq!(
        out.rc,
        0,
        "{count} cycles: {} {}",
        out.text(),
        out.err_text()
    );
    guest.went_on(rounds)?;
    // Beside the workload, on one processor, other guests would take minutes to start.
    guest.ok("killall spin-workload; true")?;
    for patch in [CMDLINE, PAIR] {
        check(guest, patch, "before")?;
    }
    Ok(())
}

/// Applies a patch. The report must have this result and the name of the patch.
fn apply_as(ctx: &Ctx, guest: &Guest, patch: &str, result: &str) -> Result<Value, Verdict> {
    let report = tool::apply_json(ctx, guest, &file(patch), result)?;
    check_eq!(report["patch"], patch, "{report}");
    Ok(report)
}

fn blocked(ctx: &mut Ctx, kind: Kind) -> Result<(), Verdict> {
    let guest = ctx.ensure_guest(GuestSpec::new(kind.name(), kind))?;
    let name = &guest.name;
    let file = file(SLEEPER);
    let try_apply = format!("xen-locus -o json apply {name} {file} --timeout 2s");
    let try_revert = format!("xen-locus -o json revert {name} {SLEEPER} --timeout 2s");
    let sleeper = |cmd: &str, what: &str, function: &str, frame: &str| -> Result<(), Verdict> {
        let blocking = format!("xen-locus -o json blocking {name} {what}");
        check_eq!(ctx.json(&blocking)?["blockers"], serde_json::json!([]));
        let pids = sleepers::begin(&guest, 1, 1)?;
        let out = ctx.dom0.sh(cmd)?;
        check_eq!(out.rc, 2, "{cmd}: {}", out.err_text());
        let report = out.json()?;
        check_eq!(report["result"], "blocked", "{report}");
        check_eq!(ctx.json(&blocking)?["blockers"], report["blockers"]);
        let stacks = ctx
            .dom0
            .ok(&format!("xen-locus -v blocking {name} {what}"))?;
        for words in [" pause (S) reliable", "[<0>] schedule+", frame] {
            check!(stacks.contains(words), "no {words:?} in {stacks}");
        }
        let blocker = &report["blockers"][0];
        check_eq!(blocker["comm"], "pause", "{report}");
        check_eq!(blocker["reason"], "sleeping-on", "{report}");
        check_eq!(blocker["function"], function, "{report}");
        check_eq!(blocker["pid"].to_string(), pids[0], "{report}");
        check!(
            out.err_text().contains("pause"),
            "stderr names no one: {}",
            out.err_text()
        );
        sleepers::end(&guest)
    };
    sleeper(&try_apply, &file, "__x64_sys_pause", "sys_pause+")?;
    tool::no_patches(ctx, name)?;
    check_eq!(ctx.json(&try_apply)?["result"], "applied");
    sleeper(&try_revert, SLEEPER, "__x64_sys_pause", "[locus_sleeper]")?;
    check_eq!(tool::listed(ctx, name)?, [SLEEPER]);
    check_eq!(ctx.json(&try_revert)?["result"], "reverted");
    Ok(())
}

/// A thread that sleeps in the old version finishes there. `status` reports it until it has left.
fn drains(ctx: &mut Ctx, kind: Kind) -> Result<(), Verdict> {
    let guest = ctx.ensure_guest(GuestSpec::new(kind.name(), kind))?;
    let name = &guest.name;
    let draining = || -> Result<Vec<String>, Verdict> {
        let all = tool::draining(ctx, name)?;
        Ok(all.iter().map(|b| b["pid"].to_string()).collect())
    };
    let old = sleepers::begin(&guest, 1, 1)?.concat();
    let apply = |more: &str, patch: &str| {
        let cmd = format!("xen-locus apply {name} {} --timeout 2s {more}", file(patch));
        ctx.dom0.sh(&cmd)
    };
    let out = apply("--entry-only", SLEEPER)?;
    check_eq!(out.rc, 3, "{}", out.err_text());
    check_eq!(apply("", DRAIN)?.rc, 2);
    let out = apply("--entry-only", DRAIN)?;
    check_eq!(out.rc, 0, "{}", out.err_text());
    check_eq!(draining()?, [old.as_str()]);
    let table = ctx.dom0.ok(&format!("xen-locus status {name}"))?;
    check!(table.contains("draining 1"), "{table}");

    // Another patch on top has to wait for it too.
    check_eq!(apply("", SLEEPER)?.rc, 2);
    // A thread that enters now is in the new version, and is not counted.
    sleepers::begin(&guest, 1, 2)?;
    check_eq!(draining()?, [old.as_str()]);
    sleepers::end_one(&guest, &old)?;
    check_eq!(draining()?, Vec::<String>::new());
    let table = ctx.dom0.ok(&format!("xen-locus status {name}"))?;
    check!(table.contains(" applied "), "{table}");

    // It blocks revert, except with --entry-only; then it still leaves the new version safely.
    let new = guest.ok("pidof pause")?;
    let revert = format!("xen-locus revert {name} {DRAIN} --timeout 2s");
    check_eq!(ctx.dom0.sh(&revert)?.rc, 2);
    ctx.dom0.ok(&format!("{revert} --entry-only"))?;
    tool::no_patches(ctx, name)?;
    check_eq!(guest.ok("pidof pause")?, new);
    sleepers::end(&guest)
}

fn kernel_only(ctx: &mut Ctx, kind: Kind) -> Result<(), Verdict> {
    const SEGV: i32 = 128 + 11;
    let guest = ctx.ensure_guest(GuestSpec::new(kind.name(), kind))?;
    apply_as(ctx, &guest, CMDLINE, "applied")?;
    // The directory, then the payload's code, constants and variables.
    for page in 1..5 {
        let at = format!("ffffffffff{:03x}000", 0x600 + page);
        for way in ["r", "w"] {
            let rc = guest.sh(&format!("peek-arena {at} {way}"))?.rc;
            check_eq!(rc, SEGV, "user mode at {at} ({way})");
        }
    }
    // The probe does work: it can read its own text.
    let own = guest.sh("peek-arena 400000 r")?;
    check_eq!(
        own.rc,
        0,
        "the probe reads its own text: {}",
        own.err_text()
    );
    tool::revert_json(ctx, &guest, CMDLINE)
}
