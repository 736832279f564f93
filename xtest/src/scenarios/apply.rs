//! A patch takes effect in a running guest and goes away again, many times, under a workload.

use std::path::Path;
use std::time::Duration;

use serde_json::Value;

use crate::guest::{Guest, GuestSpec, Kind};
use crate::profile::{HVM, PV, PV1, PVH};
use crate::scenario::{Ctx, Scenario};
use crate::verdict::Verdict;
use crate::{check, check_eq};

/// See the names.
pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "apply-pv",
        summary: "patches come and go in a PV guest under load, 20 times in a row",
        profile: &PV,
        run: |ctx| apply(ctx, Kind::Pv, 20),
    },
    Scenario {
        name: "apply-pvh",
        summary: "patches come and go in a PVH guest under load, 10 times in a row",
        profile: &PVH,
        run: |ctx| apply(ctx, Kind::Pvh, 10),
    },
    Scenario {
        name: "apply-hvm",
        summary: "patches come and go in an HVM guest with KASLR under load, 10 times in a row",
        profile: &HVM,
        run: |ctx| apply(ctx, Kind::Hvm, 10),
    },
    Scenario {
        name: "blocked-pv",
        summary:
            "a thread that sleeps in the old function blocks applying, one in the new reverting",
        profile: &PV1,
        run: |ctx| blocked(ctx, Kind::Pv),
    },
    Scenario {
        name: "drain-pv",
        summary:
            "with --entry-only a thread goes on in the version it entered, and status tells of it",
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

/// A payload of `patches/` and the folder of its check.
struct Patch {
    name: &'static str,
    folder: &'static str,
}

const CMDLINE: Patch = Patch {
    name: "locus_cmdline",
    folder: "cmdline",
};
const PAIR: Patch = Patch {
    name: "locus_proc_pair",
    folder: "version-loadavg",
};

impl Patch {
    fn file(&self) -> String {
        format!("/payloads/{}.ko", self.name)
    }

    /// Puts the patch's own check into the guest.
    fn install_check(&self, guest: &Guest) -> Result<(), Verdict> {
        let top = Path::new(env!("CARGO_MANIFEST_DIR")).join("../patches");
        let script = std::fs::read(top.join(self.folder).join("check.sh"))?;
        guest.put(&format!("/tmp/{}.sh", self.name), 0o755, &script)
    }

    /// Runs the patch's own check in the guest.
    fn check(&self, guest: &Guest, phase: &str) -> Result<(), Verdict> {
        let out = guest.sh(&format!("sh /tmp/{}.sh {phase}", self.name))?;
        check_eq!(
            out.rc,
            0,
            "{} {phase}: {} {}",
            self.name,
            out.text(),
            out.err_text()
        );
        Ok(())
    }
}

fn apply_json(ctx: &Ctx, guest: &Guest, patch: &Patch, result: &str) -> Result<Value, Verdict> {
    let report = ctx.json(&format!(
        "xen-locus -o json apply {} {}",
        guest.name,
        patch.file()
    ))?;
    check_eq!(report["result"], result, "{report}");
    check_eq!(report["patch"], patch.name);
    check_eq!(report["domid"], guest.domid);
    Ok(report)
}

fn revert(ctx: &Ctx, guest: &Guest, patch: &Patch) -> Result<(), Verdict> {
    let report = ctx.json(&format!(
        "xen-locus -o json revert {} {}",
        guest.name, patch.name
    ))?;
    check_eq!(report["result"], "reverted", "{report}");
    Ok(())
}

fn applied(ctx: &Ctx, guest: &Guest) -> Result<Vec<String>, Verdict> {
    let status = ctx.json(&format!("xen-locus -o json status {}", guest.name))?;
    let patches = status["patches"].as_array().cloned().unwrap_or_default();
    Ok(patches
        .iter()
        .map(|p| p["name"].as_str().unwrap_or("?").to_owned())
        .collect())
}

/// What the guest's kernel has said, less what an emulated machine on a busy host makes it say.
fn kernel_log(guest: &Guest) -> Result<Vec<String>, Verdict> {
    const HOST_IS_BUSY: [&str; 4] = [
        "hrtimer: interrupt took",
        "clocksource",
        "sched: RT throttling",
        "random: crng",
    ];
    let log = guest.ok("dmesg")?;
    let lines = log
        .lines()
        .filter(|line| !HOST_IS_BUSY.iter().any(|noise| line.contains(noise)));
    Ok(lines.map(str::to_owned).collect())
}

/// How often Xen has found its platform timer wrapped: QEMU did not run it for seconds.
fn stalls(ctx: &Ctx) -> Result<String, Verdict> {
    ctx.dom0
        .ok("xl dmesg | grep -c 'unexpectedly wrapped' || true")
}

/// The guest's own kernel shows the patch among its modules, with its symbols, and keeps it.
fn is_a_module(guest: &Guest, patch: &Patch) -> Result<(), Verdict> {
    let name = patch.name;
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
    let name = &guest.name;
    for patch in [&CMDLINE, &PAIR] {
        patch.install_check(&guest)?;
        patch.check(&guest, "before")?;
    }
    if kind == Kind::Hvm {
        let info = ctx.json(&format!("xen-locus -o json info {name}"))?;
        let text = guest.ok("grep ' T _text$' /proc/kallsyms | cut -d' ' -f1")?;
        check_eq!(
            info["text_base"],
            format!("0x{text}"),
            "KASLR: where the text is"
        );
    }
    let log = kernel_log(&guest)?;
    let stalls_before = stalls(ctx)?;

    let out = ctx
        .dom0
        .sh(&format!("xen-locus check {name} {}", CMDLINE.file()))?;
    check_eq!(out.rc, 0, "check: {}", out.err_text());
    ctx.dom0.ok(&format!(
        "xen-locus --dry-run apply {name} {}",
        CMDLINE.file()
    ))?;
    CMDLINE.check(&guest, "before")?;

    let report = apply_json(ctx, &guest, &CMDLINE, "applied")?;
    check!(
        report["pause_us"].as_u64().is_some_and(|us| us > 0),
        "no pause: {report}"
    );
    check_eq!(report["functions"], 1);
    CMDLINE.check(&guest, "after")?;
    apply_json(ctx, &guest, &CMDLINE, "already")?;
    is_a_module(&guest, &CMDLINE)?;
    let list = ctx.json("xen-locus -o json list")?;
    let row = list["domains"]
        .as_array()
        .and_then(|d| d.iter().find(|d| d["name"] == **name));
    check!(
        row.is_some_and(|d| d["status"] == "patched"
            && d["patches"] == 1
            && d["kernel"] == *ctx.release),
        "list: {list}"
    );

    // Two patches at once, reverted in either order.
    for (first, second) in [(&CMDLINE, &PAIR), (&PAIR, &CMDLINE)] {
        for patch in [first, second] {
            if !applied(ctx, &guest)?.contains(&patch.name.to_owned()) {
                apply_json(ctx, &guest, patch, "applied")?;
            }
            patch.check(&guest, "after")?;
        }
        revert(ctx, &guest, first)?;
        first.check(&guest, "before")?;
        second.check(&guest, "after")?;
        revert(ctx, &guest, second)?;
        second.check(&guest, "before")?;
    }

    guest.start_workload()?;
    let rounds = guest.rounds()?;
    let cycles = format!(
        "for i in $(seq {count}); do xen-locus apply {name} {pair} && xen-locus revert {name} {patch} || \
         {{ echo \"cycle $i: $?\"; exit 1; }}; done",
        pair = PAIR.file(),
        patch = PAIR.name,
    );
    let out = ctx.dom0.sh_timeout(&cycles, Duration::from_secs(900))?;
    check_eq!(
        out.rc,
        0,
        "{count} cycles: {} {}",
        out.text(),
        out.err_text()
    );
    let later = guest.rounds()?;
    check!(
        later > rounds,
        "the workload stood still: {rounds} rounds before, {later} after"
    );
    // Guests that start beside it on one processor would take minutes.
    guest.ok("killall spin-workload; true")?;
    for patch in [&CMDLINE, &PAIR] {
        patch.check(&guest, "before")?;
    }
    let new: Vec<String> = kernel_log(&guest)?
        .into_iter()
        .filter(|line| !log.contains(line))
        .collect();
    // Xen itself says when the emulated machine stood still, dom0 and all; RCU in the guest notices.
    let stood_still = stalls(ctx)? != stalls_before
        && new
            .first()
            .is_some_and(|line| line.contains("rcu: INFO: rcu_preempt"));
    if stood_still {
        eprintln!("xtest: {name}: the machine stood still, so RCU stalls in its log do not count");
        ctx.dom0
            .note("the machine stood still: RCU stalls in the guest's log do not count");
    } else {
        check_eq!(
            new,
            Vec::<String>::new(),
            "new lines in the guest's kernel log"
        );
    }
    check_eq!(applied(ctx, &guest)?, Vec::<String>::new(), "patches left");
    Ok(())
}

fn blocked(ctx: &mut Ctx, kind: Kind) -> Result<(), Verdict> {
    let guest = ctx.ensure_guest(GuestSpec::new(kind.name(), kind))?;
    let name = &guest.name;
    let try_apply =
        format!("xen-locus -o json apply {name} /payloads/locus_sleeper.ko --timeout 2s");
    let try_revert = format!("xen-locus -o json revert {name} locus_sleeper --timeout 2s");
    let sleeper = |cmd: &str, what: &str, function: &str, frame: &str| -> Result<(), Verdict> {
        let blocking = format!("xen-locus -o json blocking {name} {what}");
        check_eq!(ctx.json(&blocking)?["blockers"], serde_json::json!([]));
        guest.ok("pause & sleep 1")?;
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
        let pid = guest.ok("pidof pause")?;
        check_eq!(blocker["pid"].to_string(), pid, "{report}");
        check!(
            out.err_text().contains("pause"),
            "stderr names no one: {}",
            out.err_text()
        );
        guest.ok("killall pause; sleep 1")?;
        Ok(())
    };
    let file = "/payloads/locus_sleeper.ko";
    sleeper(&try_apply, file, "__x64_sys_pause", "sys_pause+")?;
    check_eq!(applied(ctx, &guest)?, Vec::<String>::new());
    check_eq!(ctx.json(&try_apply)?["result"], "applied");
    sleeper(
        &try_revert,
        "locus_sleeper",
        "__x64_sys_pause",
        "[locus_sleeper]",
    )?;
    check_eq!(applied(ctx, &guest)?, ["locus_sleeper"]);
    check_eq!(ctx.json(&try_revert)?["result"], "reverted");
    Ok(())
}

/// What sleeps in the old version goes on there, and is told of, until it leaves.
fn drains(ctx: &mut Ctx, kind: Kind) -> Result<(), Verdict> {
    let guest = ctx.ensure_guest(GuestSpec::new(kind.name(), kind))?;
    let name = &guest.name;
    let draining = || -> Result<Vec<String>, Verdict> {
        let status = ctx.json(&format!("xen-locus -o json status {name}"))?;
        let all = status["patches"][0]["draining"].as_array().cloned();
        let all = all.ok_or_else(|| Verdict::failure(format!("no draining: {status}")))?;
        Ok(all.iter().map(|b| b["pid"].to_string()).collect())
    };
    guest.ok("pause & sleep 1")?;
    let old = guest.ok("pidof pause")?;
    let apply = |more: &str, file: &str| {
        let cmd = format!("xen-locus apply {name} /payloads/{file}.ko --timeout 2s {more}");
        ctx.dom0.sh(&cmd)
    };
    let out = apply("--entry-only", "locus_sleeper")?;
    check_eq!(out.rc, 3, "{}", out.err_text());
    check_eq!(apply("", "locus_drain")?.rc, 2);
    let out = apply("--entry-only", "locus_drain")?;
    check_eq!(out.rc, 0, "{}", out.err_text());
    check_eq!(draining()?, [old.as_str()]);
    let table = ctx.dom0.ok(&format!("xen-locus status {name}"))?;
    check!(table.contains("draining 1"), "{table}");

    // Another on top waits for him too.
    check_eq!(apply("", "locus_sleeper")?.rc, 2);
    // Whoever comes now is in the new version, and not counted.
    guest.ok("pause & sleep 1")?;
    check_eq!(draining()?, [old.as_str()]);
    guest.ok(&format!("kill {old}; sleep 1"))?;
    check_eq!(draining()?, Vec::<String>::new());
    let table = ctx.dom0.ok(&format!("xen-locus status {name}"))?;
    check!(table.contains(" applied "), "{table}");

    // He is in the way of reverting unless the same is asked for; and comes out of it all the same.
    let new = guest.ok("pidof pause")?;
    let revert = format!("xen-locus revert {name} locus_drain --timeout 2s");
    check_eq!(ctx.dom0.sh(&revert)?.rc, 2);
    ctx.dom0.ok(&format!("{revert} --entry-only"))?;
    check_eq!(applied(ctx, &guest)?, Vec::<String>::new());
    check_eq!(guest.ok("pidof pause")?, new);
    guest.ok(&format!("kill {new}; sleep 1; ! pidof pause"))?;
    Ok(())
}

fn kernel_only(ctx: &mut Ctx, kind: Kind) -> Result<(), Verdict> {
    const SEGV: i32 = 128 + 11;
    let guest = ctx.ensure_guest(GuestSpec::new(kind.name(), kind))?;
    apply_json(ctx, &guest, &CMDLINE, "applied")?;
    // The directory, and the payload's code, constants and variables behind it.
    for page in 1..5 {
        let at = format!("ffffffffff{:03x}000", 0x600 + page);
        for way in ["r", "w"] {
            let rc = guest.sh(&format!("peek-arena {at} {way}"))?.rc;
            check_eq!(rc, SEGV, "user mode at {at} ({way})");
        }
    }
    // The probe can see: the vsyscall page in front of it is, in some kernels, open to reading.
    let own = guest.sh("peek-arena 400000 r")?;
    check_eq!(
        own.rc,
        0,
        "the probe reads its own text: {}",
        own.err_text()
    );
    revert(ctx, &guest, &CMDLINE)
}
