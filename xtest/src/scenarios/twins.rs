//! Two guests with the same UUID or the same name, and names that are hard to write.

use super::steps::patches::{self, CMDLINE, CMDLINE_FILE};
use super::steps::tool;
use crate::guest::{Guest, GuestSpec, Kind};
use crate::profile::PV1;
use crate::scenario::{Ctx, Scenario};
use crate::verdict::Verdict;
use crate::{check, check_eq};

/// Scenarios that take too long for a usual run.
pub const MATRIX: &[Scenario] = &[Scenario {
    name: "twins-pv",
    summary: "two guests with one UUID are not changed or taken for each other, nor are two with one name",
    profile: &PV1,
    run: twins,
}];

const UUID: &str = "5e5e5e5e-1111-4222-8333-444444444444";

fn twins(ctx: &mut Ctx) -> Result<(), Verdict> {
    let spec = |name: &str| GuestSpec::new(name, Kind::Pv).config(&format!("uuid=\"{UUID}\""));
    let one = ctx.ensure_guest(spec("twin-one"))?;
    tool::apply(ctx, &one.name, CMDLINE)?;
    let two = ctx.ensure_guest(spec("twin-two"))?;
    let both = [&one, &two].map(|guest| format!("{} ({})", guest.name, guest.domid));
    let refused = |command: &str| -> Result<(), Verdict> {
        let out = ctx.dom0.sh(&format!("xen-locus {command}"))?;
        check_eq!(out.rc, 3, "{command}: {}", out.text());
        let said = out.err_text();
        check!(
            both.iter().all(|name| said.contains(name)),
            "{command}: {said}"
        );
        Ok(())
    };
    refused(&format!("apply {} {CMDLINE_FILE}", two.name))?;
    refused(&format!("check {} {CMDLINE_FILE}", two.name))?;
    refused(&format!("revert {} {CMDLINE}", one.name))?;
    refused(&format!("revert {} --all", one.name))?;
    // Nothing that the log says of one is said of the other.
    let patches = |guest: &Guest| -> Result<String, Verdict> {
        let status = ctx.json(&format!("xen-locus -o json status {}", guest.name))?;
        let all = status["patches"].as_array().cloned().unwrap_or_default();
        let told = |p: &serde_json::Value| format!("{} {}", p["name"], p["state"]);
        Ok(all.iter().map(told).collect::<Vec<_>>().join(", "))
    };
    check_eq!(patches(&one)?, format!("\"{CMDLINE}\" \"applied\""));
    check_eq!(patches(&two)?, "");
    let list = ctx.dom0.ok("xen-locus list")?;
    check_eq!(list.matches("have the same UUID").count(), 2, "{list}");
    ctx.dom0.ok("xen-locus recover")?;

    // The same name, and one that is no text, and one that looks like an option.
    let rename = |name: &str| {
        let node = format!("/local/domain/{}/name", two.domid);
        ctx.dom0.ok(&format!(
            "xenstore-write -- {node} \"$(printf -- '{name}')\""
        ))
    };
    rename(&one.name)?;
    let out = ctx.dom0.sh(&format!("xen-locus info {}", one.name))?;
    check_eq!(out.rc, 1, "{}", out.text());
    let (a, b) = (one.domid.min(two.domid), one.domid.max(two.domid));
    let both = [
        format!("domains {a} and {b} have the name"),
        format!("{:?}", one.name),
        "give the id".to_owned(),
    ];
    check!(
        both.iter().all(|words| out.err_text().contains(words)),
        "{}",
        out.err_text()
    );
    rename("\\377\\376")?;
    ctx.dom0.ok(&format!("xen-locus info {}", two.domid))?;
    ctx.dom0.ok("xen-locus list && xen-locus status")?;
    rename("-two")?;
    let shown = ctx.dom0.ok("xen-locus info -- -two")?;
    check!(shown.contains("-two"), "{shown}");
    rename(&two.name)?;

    // When one is gone, the other is as any guest.
    ctx.destroy_guest(&two.name)?;
    tool::revert_all(ctx, &one.name)?;
    patches::cmdline_is_untouched(&one)?;
    ctx.destroy_guest(&one.name)
}
