//! What happens to guests in their lives, with patches in force: they are saved and restored, moved,
//! started anew, destroyed, and get more or less of memory and processors.

mod crash;
mod destroy;
mod migrate;
mod reboot;
mod save;
mod sizes;

use crate::guest::Guest;
use crate::scenario::{Ctx, Scenario};
use crate::verdict::Verdict;
use crate::{check, check_eq};

/// See the names.
pub fn scenarios() -> Vec<Scenario> {
    [save::SCENARIOS, destroy::SCENARIOS].concat()
}

/// What takes too long for a usual run.
pub fn matrix() -> Vec<Scenario> {
    [
        save::MATRIX,
        destroy::MATRIX,
        crash::MATRIX,
        reboot::MATRIX,
        sizes::MATRIX,
        migrate::MATRIX,
    ]
    .concat()
}

/// Replaces `version_proc_show` and `loadavg_proc_show`: word "live" in both.
const PAIR: &str = "locus_proc_pair";
/// Replaces `cmdline_proc_show`: word "live".
const ONE: &str = "locus_cmdline";
/// Replaces `cmdline_proc_show` and `version_proc_show`: word "two" in both.
const TWO: &str = "locus_stack_two";

/// What `/proc/cmdline`, `/proc/version` and `/proc/loadavg` show with these words in them; empty for the
/// kernel's own text.
fn words(cmdline: &str, version: &str, loadavg: &str) -> String {
    [cmdline, version, loadavg]
        .map(|w| format!("{w}."))
        .join("\n")
}

/// Checks these words, and that `status` has these patches in force, undermost first.
fn shows(ctx: &Ctx, guest: &Guest, words: &str, patches: &[&str]) -> Result<(), Verdict> {
    let seen = guest.ok(
        "for f in cmdline version loadavg; do echo $(tr ' ' '\\n' </proc/$f | sed -n 's/^locus=//p').; done",
    )?;
    check_eq!(seen, words, "what the guest shows");
    let status = ctx.json(&format!("xen-locus -o json status {}", guest.name))?;
    check_eq!(status["domid"], guest.domid, "{status}");
    let listed = status["patches"].as_array().cloned().unwrap_or_default();
    let in_force = listed.iter().filter(|p| p["state"] != "gone");
    let names: Vec<&str> = in_force
        .clone()
        .filter_map(|p| p["name"].as_str())
        .collect();
    check_eq!(names, patches, "{status}");
    let sound = in_force.clone().all(|p| p["state"] == "applied");
    check!(sound, "not all are in force: {status}");
    Ok(())
}
