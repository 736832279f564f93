//! Saved cores: every read-only command reports the same about a core as about the guest it was saved from.

use std::time::Duration;

use serde_json::Value;

use super::steps::patches::{self, CMDLINE_FILE, PAIR};
use super::steps::tool;
use crate::check_eq;
use crate::guest::{GuestSpec, Kind};
use crate::profile::{HVM, PV1, PVH};
use crate::scenario::{Ctx, Scenario};
use crate::verdict::Verdict;

/// Scenarios that are short enough for a usual run.
pub const SCENARIOS: &[Scenario] = &[Scenario {
    name: "core-pv",
    summary: "read-only commands report the same about a PV guest's core as about the paused guest",
    profile: &PV1,
    run: |ctx| core(ctx, Kind::Pv),
}];

/// Scenarios that take too long for a usual run: `xl dump-core` tries every frame below 4 GiB of such a guest,
/// which takes ten minutes on an emulated machine.
pub const MATRIX: &[Scenario] = &[
    Scenario {
        name: "core-pvh",
        summary:
            "read-only commands report the same about a PVH guest's core as about the paused guest",
        profile: &PVH,
        run: |ctx| core(ctx, Kind::Pvh),
    },
    Scenario {
        name: "core-hvm",
        summary:
            "read-only commands report the same about the core of an HVM guest with KASLR as about \
                  the paused guest",
        profile: &HVM,
        run: |ctx| core(ctx, Kind::Hvm),
    },
];

fn core(ctx: &mut Ctx, kind: Kind) -> Result<(), Verdict> {
    // Only a PV guest is saved with a patch, because xl dump-core leaves out frames of a PVH guest's arena. An earlier scenario
    // may have left one.
    let patched = kind == Kind::Pv;
    if !patched {
        ctx.destroy_guest(kind.name())?;
    }
    let guest = ctx.ensure_guest(GuestSpec::new(kind.name(), kind))?;
    let name = &guest.name;
    if patched {
        tool::apply(ctx, name, PAIR)?;
    }
    ctx.expects_long_pauses();
    if !patched {
        // It is paused for minutes. Then all its CPUs would report a stall at once, each in the middle of the others' lines.
        guest.ok(&watchdogs(false))?;
    }
    ctx.dom0.ok(&format!("xl pause {name}"))?;
    let result = compare(ctx, name, if patched { "patched" } else { "ready" });
    ctx.dom0
        .ok(&format!("xl unpause {name}; rm -f /tmp/core*"))?;
    result?;
    // The guest still runs.
    if patched {
        tool::revert(ctx, name, PAIR)?;
    }
    guest.ok("true")?;
    if !patched {
        guest.ok(&format!("sleep 2; {}", watchdogs(true)))?;
    }
    Ok(())
}

/// Switches the guest's watchdogs on or off.
fn watchdogs(on: bool) -> String {
    format!(
        "echo {} >/proc/sys/kernel/watchdog; echo {} >/sys/module/rcupdate/parameters/rcu_cpu_stall_suppress",
        u8::from(on),
        u8::from(!on)
    )
}

fn compare(ctx: &Ctx, name: &str, status: &str) -> Result<(), Verdict> {
    // In an auto-translated guest xl tries every frame up to 4 GiB, where its special pages are.
    let dump = format!("xl dump-core {name} /tmp/core");
    let out = ctx.dom0.sh_timeout(&dump, Duration::from_secs(1200))?;
    check_eq!(out.rc, 0, "{dump}: {}", out.err_text());
    let live = views(ctx, &format!(" {name}"))?;
    let row = plain(tool::list_row(ctx, name)?);
    check_eq!(row["status"], status, "{row}");

    for file in ["/tmp/core", "/tmp/core.small"] {
        if file == "/tmp/core.small" {
            let sizes = ctx.dom0.ok(&format!(
                "locus-core trim /tmp/core {file} {CMDLINE_FILE} {} && \
                 echo \"compressed by gzip: $(gzip -c {file} | wc -c) bytes\"",
                patches::file(PAIR)
            ))?;
            eprintln!("xtest: {name}: {}", sizes.replace('\n', "; "));
            ctx.dom0.note(&sizes);
            // What is read from the trimmed core must come from it alone.
            ctx.dom0.ok("rm /tmp/core")?;
        }
        let saved = views(ctx, &format!(" --core {file}"))?;
        for (what, (live, saved)) in WHAT.iter().zip(live.iter().zip(&saved)) {
            check_eq!(saved, live, "{what} of {file} and of {name}");
        }
        let list = ctx.json(&format!("xen-locus -o json list --core {file}"))?;
        check_eq!(plain(list["domains"][0].clone()), row, "list of {file}");
    }
    Ok(())
}

/// The commands, and what is compared of each.
const WHAT: [&str; 5] = [
    "info",
    "info --tasks",
    "info --symbols *",
    "status",
    "check",
];

fn views(ctx: &Ctx, target: &str) -> Result<[Value; 5], Verdict> {
    // Millions of bytes of symbols are compared by their digest.
    let symbols = ctx.dom0.ok(&format!(
        "xen-locus info{target} --symbols '*' | sha256sum | cut -d' ' -f1"
    ))?;
    Ok([
        plain(ctx.json(&format!("xen-locus -o json info{target}"))?),
        plain(ctx.json(&format!("xen-locus -o json info{target} --tasks"))?),
        symbols.into(),
        plain(ctx.json(&format!("xen-locus -o json status{target}"))?),
        plain(ctx.json(&format!("xen-locus -o json check{target} {CMDLINE_FILE}"))?),
    ])
}

/// Removes the fields that tell a domain from a core, and those that only one of them has.
fn plain(mut value: Value) -> Value {
    if let Some(map) = value.as_object_mut() {
        for key in [
            "domid",
            "domain",
            "name",
            "uuid",
            "core",
            "total_ms",
            "blockers",
            "not_checked",
        ] {
            map.remove(key);
        }
    }
    value
}
