//! Every action is logged, and a change of the log is detected.

use super::steps::patches::{self, CMDLINE, CMDLINE_FILE};
use super::steps::tool;
use crate::guest::{GuestSpec, Kind};
use crate::profile::PV1;
use crate::scenario::{Ctx, Scenario};
use crate::verdict::Verdict;
use crate::{check, check_eq};

/// Scenarios that are short enough for a usual run.
pub const SCENARIOS: &[Scenario] = &[Scenario {
    name: "history-pv",
    summary:
        "every action is in the audit log, changes of the log are detected, and nothing is done without it",
    profile: &PV1,
    run: history,
}];

const LOG: &str = "/var/log/xen-locus/audit.jsonl";

fn history(ctx: &mut Ctx) -> Result<(), Verdict> {
    let guest = ctx.ensure_guest(GuestSpec::new("pv", Kind::Pv))?;
    let name = &guest.name;
    let before = tool::actions(ctx, name)?.len();
    ctx.dom0
        .ok(&format!("xen-locus -N apply {name} {CMDLINE_FILE}"))?;
    tool::apply(ctx, name, CMDLINE)?;
    let out = ctx.dom0.sh(&format!(
        "xen-locus apply {name} /payloads/locus_no_such_function.ko"
    ))?;
    check_eq!(out.rc, 3, "{}", out.err_text());
    tool::revert_all(ctx, name)?;
    let all = tool::actions(ctx, name)?;
    let new = all.get(before..).unwrap_or_default();
    let said = |key: &str| -> Vec<String> {
        let text = |a: &serde_json::Value| a[key].to_string().trim_matches('"').to_owned();
        new.iter().map(text).collect()
    };
    check_eq!(said("op"), ["apply", "apply", "revert"]);
    check_eq!(said("result"), ["applied", "not-applicable", "reverted"]);
    check_eq!(said("exit"), ["0", "3", "0"]);
    check_eq!(said("patch"), [CMDLINE, "locus_no_such_function", CMDLINE]);
    let (sums, uuids) = (said("sha256"), said("uuid"));
    let sum = ctx.dom0.ok(&format!("sha256sum < {CMDLINE_FILE}"))?;
    check!(
        sum.starts_with(&sums[0]) && sums[0] == sums[2],
        "{sum}: {sums:?}"
    );
    check!(uuids[0].len() == 36 && uuids[0] == uuids[2], "{uuids:?}");
    check!(
        said("who").iter().all(|who| who.starts_with("uid 0")),
        "{new:?}"
    );
    let (was, is) = (said("text_before"), said("text_after"));
    check!(
        was[0] == is[2] && is[0] == was[2] && was[0] != is[0],
        "{new:?}"
    );
    let table = ctx.dom0.ok(&format!("xen-locus history {name}"))?;
    check!(
        table.contains("not-applicable") && table.contains("uid 0"),
        "{table}"
    );

    // The log is edited, then restored.
    ctx.dom0.ok(&format!(
        "cp -a {LOG} /tmp/audit-copy && sed -i '$s/reverted/applied/' {LOG}"
    ))?;
    let out = ctx.dom0.sh("xen-locus -o json history")?;
    check_eq!(out.rc, 1, "{}", out.text());
    check_eq!(out.json()?["intact"], false);
    check!(
        out.err_text().contains("is not what was written"),
        "{}",
        out.err_text()
    );
    ctx.dom0.ok(&format!("sed '$d' /tmp/audit-copy > {LOG}"))?;
    let out = ctx.dom0.sh("xen-locus history")?;
    check_eq!(out.rc, 1, "{}", out.text());
    ctx.dom0
        .ok(&format!("cp -a /tmp/audit-copy {LOG}; xen-locus history"))?;

    ctx.dom0.ok(&format!("sed '1d' /tmp/audit-copy > {LOG}"))?;
    let out = ctx.dom0.sh("xen-locus history")?;
    check!(
        out.rc == 1 && out.err_text().contains("cut at its front"),
        "{}",
        out.text()
    );
    ctx.dom0
        .ok(&format!("cp -a /tmp/audit-copy {LOG}; xen-locus history"))?;
    rotated(ctx, name)?;

    // If nothing can be logged, nothing is done.
    ctx.dom0
        .ok(&format!("mv {LOG} /tmp/audit-copy && mkdir {LOG}"))?;
    let out = ctx
        .dom0
        .sh(&format!("xen-locus apply {name} {CMDLINE_FILE}"))?;
    ctx.dom0
        .ok(&format!("rmdir {LOG} && mv /tmp/audit-copy {LOG}"))?;
    check_eq!(out.rc, 1, "{}", out.err_text());
    check!(out.err_text().contains("audit log"), "{}", out.err_text());
    patches::cmdline_is_untouched(&guest)
}

/// The log is rotated between two runs, and then emptied. What the guest had is known in both cases.
fn rotated(ctx: &Ctx, name: &str) -> Result<(), Verdict> {
    tool::apply(ctx, name, CMDLINE)?;
    ctx.dom0.ok(&format!("mv {LOG} {LOG}.1"))?;
    tool::revert_all(ctx, name)?;
    let history = ctx.json("xen-locus -o json history")?;
    check_eq!(history["intact"], true, "{history}");
    check_eq!(history["actions"].as_array().map(Vec::len), Some(1));
    check_eq!(history["actions"][0]["begins"], "rotated", "{history}");
    tool::apply(ctx, name, CMDLINE)?;
    ctx.dom0.ok(&format!(": >{LOG}; xen-locus status {name}"))?;
    let out = ctx.dom0.sh("xen-locus history")?;
    check!(
        out.rc == 1 && out.err_text().contains("emptied or removed"),
        "{}",
        out.text()
    );
    tool::revert_all(ctx, name)?;
    let out = ctx.dom0.sh("xen-locus -o json history")?;
    check_eq!(out.rc, 1, "{}", out.text());
    check_eq!(out.json()?["actions"][0]["begins"], "lost");
    check_eq!(out.json()?["actions"][0]["in_force"], serde_json::json!([]));
    // Rotated once more it is intact, for the scenarios after this one.
    ctx.dom0.ok(&format!("mv {LOG} {LOG}.2"))?;
    tool::apply(ctx, name, CMDLINE)?;
    tool::revert_all(ctx, name)?;
    ctx.dom0.ok("xen-locus history")?;
    Ok(())
}
