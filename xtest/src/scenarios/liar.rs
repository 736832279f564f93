//! A module makes a guest's kernel lie about itself. The guest is refused in bounded time and memory, and it, its
//! neighbour and dom0 run on.

use super::steps::patches::CMDLINE_FILE;
use super::steps::tool::{bounded, Bounded};
use crate::guest::{GuestSpec, Kind};
use crate::profile::{PV1, PVH};
use crate::scenario::{Ctx, Scenario};
use crate::verdict::Verdict;
use crate::{check, check_eq};

/// Scenarios that are short enough for a usual run.
pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "liar-pv",
        summary: "a PV guest that lies about its lists, types and names is refused soon",
        profile: &PV1,
        run: |ctx| liar(ctx, Kind::Pv),
    },
    Scenario {
        name: "liar-pvh",
        summary: "a PVH guest that lies, about its page tables too, is refused soon",
        profile: &PVH,
        run: |ctx| liar(ctx, Kind::Pvh),
    },
];

/// The lies of `patches/test/liar`, and words of what `info` says about each.
const LIES: [(&str, &str); 7] = [
    ("tasks", "does not come back to its head"),
    ("threads", "does not come back to its head"),
    ("modules", "does not come back to its head"),
    ("btf", "BTF"),
    ("banner", "linux_banner"),
    ("names", "no kallsyms table"),
    ("pages", "no kallsyms table"),
];
fn liar(ctx: &mut Ctx, kind: Kind) -> Result<(), Verdict> {
    let guest = ctx.ensure_guest(GuestSpec::new("liar", kind))?;
    let neighbour = ctx.ensure_guest(GuestSpec::new("neighbour", Kind::Pv))?;
    let module = ctx.payloads.join("locus_liar/locus_liar.ko");
    guest.put_module("/tmp/liar.ko", &module)?;
    for (lie, words) in LIES {
        // Xen checks the page tables of a PV guest, so they can't contain a lie.
        if lie == "pages" && kind == Kind::Pv {
            continue;
        }
        guest.ok(&format!("insmod /tmp/liar.ko lie={lie}"))?;
        let said = refused_with(ctx, lie, words)?;
        guest.ok("rmmod locus_liar")?;
        eprintln!("liar: {} {lie}: {said}", kind.name());
        check_eq!(info(ctx, "liar")?.rc, 0, "info after {lie}");
        check_eq!(info(ctx, "neighbour")?.rc, 0, "info of the neighbour");
        neighbour.ok("true")?;
    }
    ctx.destroy_guest("liar")
}

fn info(ctx: &Ctx, guest: &str) -> Result<Bounded, Verdict> {
    bounded(ctx, &format!("--no-cache info {guest}"))
}

/// Runs all commands that only read while the guest lies.
fn refused_with(ctx: &Ctx, lie: &str, words: &str) -> Result<String, Verdict> {
    let found = info(ctx, "liar")?;
    check_eq!(found.rc, 3, "info with the lie {lie}: {}", found.said);
    check!(
        found.said.contains(words),
        "info with the lie {lie} does not say {words:?}: {}",
        found.said
    );
    // These commands don't need to know what some lies are about. They refuse the others.
    let mut ends = Vec::new();
    let check = format!("check liar {CMDLINE_FILE}");
    // `info` with what was stored of it before it lied.
    for command in ["info liar", "status liar", &check, "list"] {
        let other = bounded(ctx, command)?;
        check!(
            [0, 2, 3].contains(&other.rc),
            "{command} with the lie {lie} ended with {}: {}",
            other.rc,
            other.said
        );
        ends.push(format!("{command}: {} in {:?}", other.rc, other.took));
    }
    Ok(format!("info: {:?}; {}", found.took, ends.join("; ")))
}
