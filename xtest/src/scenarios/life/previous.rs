//! A guest that an earlier build patched is of use to this one: what that build wrote into the guest and on dom0's disk is
//! read for ever.

use super::text::Text;
use crate::guest::{Guest, GuestSpec, Kind, Mitigations};
use crate::paths::Paths;
use crate::previous::{self, Previous};
use crate::profile::{PV1, PVH};
use crate::scenario::{Ctx, Scenario};
use crate::scenarios::steps::patches::{self, CMDLINE, PAIR, TWO};
use crate::scenarios::steps::tool;
use crate::verdict::Verdict;
use crate::{check, check_eq};

/// Scenarios that take too long for a usual run: they build that build.
pub const MATRIX: &[Scenario] = &[
    Scenario {
        name: "previous-pv",
        summary: "a PV guest that an earlier build patched is listed, verified, patched on and reverted by this one",
        profile: &PV1,
        run: |ctx| previous(ctx, Kind::Pv),
    },
    Scenario {
        name: "previous-pvh",
        summary: "a PVH guest that an earlier build patched is listed, verified, patched on and reverted by this one",
        profile: &PVH,
        run: |ctx| previous(ctx, Kind::Pvh),
    },
];

/// That build, in dom0.
const OLD: &str = "/tmp/previous/xen-locus";
/// The same, to be killed.
const OLD_FAULTS: &str = "/tmp/previous/xen-locus-faults";

fn place(ctx: &Ctx, built: &Previous) -> Result<(), Verdict> {
    for (path, file) in [(OLD, &built.tool), (OLD_FAULTS, &built.faults)] {
        ctx.dom0.put(path, 0o755, &std::fs::read(file)?)?;
    }
    Ok(())
}

fn previous(ctx: &mut Ctx, kind: Kind) -> Result<(), Verdict> {
    let Some(built) = previous::build(&Paths::find()?)? else {
        return Err(Verdict::skip(
            "the history of this clone does not have the earlier build",
        ));
    };
    place(ctx, &built)?;
    let name = format!("previous-{}", kind.name());
    // The earlier build can't read a guest with page-table isolation.
    let spec = GuestSpec::new(&name, kind).mitigations(Mitigations::Default);
    let guest = ctx.ensure_guest(spec)?;
    let text = Text::of(ctx, &name)?;
    interrupted(ctx, &guest)?;
    patched_on(ctx, &guest, kind)?;
    if kind == Kind::Pv {
        taken_over(ctx, &guest)?;
    }
    text.check(ctx, &name, kind)?;
    ctx.destroy_guest(&name)
}

/// The earlier build applies two patches, this one a third, and reverts all.
fn patched_on(ctx: &Ctx, guest: &Guest, kind: Kind) -> Result<(), Verdict> {
    let name = &guest.name;
    for patch in [CMDLINE, PAIR] {
        ctx.dom0
            .ok(&format!("{OLD} apply {name} {}", patches::file(patch)))?;
    }
    tool::in_force(ctx, guest, &[CMDLINE, PAIR])?;
    let row = tool::list_row(ctx, name)?;
    check_eq!(row["patches"], 2, "{row}");
    let verified = ctx.json(&format!("xen-locus -o json verify {name}"))?;
    check_eq!(verified["patches"], 2, "{verified}");
    let again = ctx.json(&format!(
        "xen-locus -o json apply {name} {}",
        patches::file(PAIR)
    ))?;
    check_eq!(again["result"], "already", "{again}");
    tool::apply(ctx, name, TWO)?;
    tool::in_force(ctx, guest, &[CMDLINE, PAIR, TWO])?;
    ctx.dom0.ok(&format!("xen-locus verify {name}"))?;
    // The earlier build reads what this one wrote, too. In a PVH guest it does not know the pages that this one takes, and
    // refuses the guest.
    let old = ctx.dom0.sh(&format!("{OLD} verify {name}"))?;
    let (code, words) = match kind {
        Kind::Pvh => (6, "is no page of the arena"),
        _ => (0, ""),
    };
    check_eq!(old.rc, code, "{}", old.err_text());
    check!(old.err_text().contains(words), "{}", old.err_text());
    tool::revert_all(ctx, name)?;
    patches::check_words(guest, ["", "", ""])?;
    tool::no_patches(ctx, name)?;
    // One log, written by both.
    check!(tool::actions(ctx, name)?.len() >= 4, "actions are missing");
    Ok(())
}

/// What the earlier build parked stays as it is when this build applies the same file, because there is no room for a
/// second record beside it. The earlier build reverts what this one applied.
fn taken_over(ctx: &Ctx, guest: &Guest) -> Result<(), Verdict> {
    let name = &guest.name;
    let pages = |ctx: &Ctx| -> Result<String, Verdict> {
        let info = tool::info(ctx, name, "")?;
        Ok(info["arena"].to_string())
    };
    let before = pages(ctx)?;
    tool::apply(ctx, name, CMDLINE)?;
    check!(pages(ctx)? != before, "no pages of its own: {before}");
    check!(patches::cmdline_is_live(guest)?, "not applied");
    ctx.dom0.ok(&format!("{OLD} revert {name} {CMDLINE}"))?;
    patches::cmdline_is_untouched(guest)
}

/// The earlier build is killed in the middle of a write: this one knows its journal and says how that ended.
fn interrupted(ctx: &Ctx, guest: &Guest) -> Result<(), Verdict> {
    let name = &guest.name;
    let out = ctx.dom0.sh(&format!(
        "XEN_LOCUS_FAULT='3:kill:mark writing' {OLD_FAULTS} apply {name} {}",
        patches::file(PAIR)
    ))?;
    check!(out.rc != 0, "it was not killed: {}", out.err_text());
    let found = ctx.json(&format!("xen-locus -o json recover {name}"))?;
    check_eq!(found["result"], "undone", "{found}");
    check_eq!(found["patch"], PAIR, "{found}");
    patches::check_words(guest, ["", "", ""])?;
    tool::no_patches(ctx, name)
}
