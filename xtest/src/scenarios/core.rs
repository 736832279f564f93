//! Saved cores: every read-only command says of a core what it says of the guest it was saved from.

use std::time::Duration;

use serde_json::Value;

use super::steps::patches::{self, CMDLINE_FILE, PAIR};
use super::steps::tool;
use crate::check_eq;
use crate::guest::{GuestSpec, Kind};
use crate::profile::{HVM, PV1, PVH};
use crate::scenario::{Ctx, Scenario};
use crate::verdict::Verdict;

/// Part of every run.
pub const SCENARIOS: &[Scenario] = &[Scenario {
    name: "core-pv",
    summary: "read-only commands say of a PV guest's core what they say of the paused guest",
    profile: &PV1,
    run: |ctx| core(ctx, Kind::Pv),
}];

/// Beside the matrix of kernels: `xl dump-core` tries every frame below 4 GiB of such a guest, which
/// takes ten minutes on an emulated machine.
pub const MATRIX: &[Scenario] = &[
    Scenario {
        name: "core-pvh",
        summary: "read-only commands say of a PVH guest's core what they say of the paused guest",
        profile: &PVH,
        run: |ctx| core(ctx, Kind::Pvh),
    },
    Scenario {
        name: "core-hvm",
        summary: "read-only commands say of an HVM guest's core, with KASLR, what they say of the \
                  paused guest",
        profile: &HVM,
        run: |ctx| core(ctx, Kind::Hvm),
    },
];

fn core(ctx: &mut Ctx, kind: Kind) -> Result<(), Verdict> {
    let guest = ctx.ensure_guest(GuestSpec::new(kind.name(), kind))?;
    let name = &guest.name;
    // xl dump-core left out frames of a PVH guest's arena, so only a PV guest is saved with a patch.
    let patched = kind == Kind::Pv;
    if patched {
        tool::apply(ctx, name, PAIR)?;
    }
    ctx.dom0.ok(&format!("xl pause {name}"))?;
    let result = compare(ctx, name, if patched { "patched" } else { "ready" });
    ctx.dom0
        .ok(&format!("xl unpause {name}; rm -f /tmp/core*"))?;
    result?;
    // The guest lives on.
    if patched {
        tool::revert(ctx, name, PAIR)?;
    }
    guest.ok("true")?;
    Ok(())
}

fn compare(ctx: &Ctx, name: &str, status: &str) -> Result<(), Verdict> {
    // Of an auto-translated guest xl tries every frame up to 4 GiB, where its special pages are.
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
            // What the trimmed core says must come from it alone.
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

fn views(ctx: &Ctx, whom: &str) -> Result<[Value; 5], Verdict> {
    // Millions of bytes of symbols are compared by their digest.
    let symbols = ctx.dom0.ok(&format!(
        "xen-locus info{whom} --symbols '*' | sha256sum | cut -d' ' -f1"
    ))?;
    Ok([
        plain(ctx.json(&format!("xen-locus -o json info{whom}"))?),
        plain(ctx.json(&format!("xen-locus -o json info{whom} --tasks"))?),
        symbols.into(),
        plain(ctx.json(&format!("xen-locus -o json status{whom}"))?),
        plain(ctx.json(&format!("xen-locus -o json check{whom} {CMDLINE_FILE}"))?),
    ])
}

/// Without what tells a domain from a core, and what a core alone can say.
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
