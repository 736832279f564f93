//! Commands of xen-locus in dom0, and what they must answer. A guest is given by its name.

use std::time::{Duration, Instant};

use serde_json::Value;

use super::patches;
use crate::guest::Guest;
use crate::scenario::Ctx;
use crate::verdict::Verdict;
use crate::{check, check_eq};

/// Applies a payload for Debian 12's kernel; the command must end with 0. Returns what it printed.
pub fn apply(ctx: &Ctx, guest: &str, patch: &str) -> Result<String, Verdict> {
    let file = patches::file(patch);
    ctx.dom0.ok(&format!("xen-locus apply {guest} {file}"))
}

/// Reverts a patch; the command must end with 0. Returns what it printed.
pub fn revert(ctx: &Ctx, guest: &str, patch: &str) -> Result<String, Verdict> {
    ctx.dom0.ok(&format!("xen-locus revert {guest} {patch}"))
}

/// Reverts all patches; the command must end with 0. Returns what it printed.
pub fn revert_all(ctx: &Ctx, guest: &str) -> Result<String, Verdict> {
    ctx.dom0.ok(&format!("xen-locus revert {guest} --all"))
}

/// Applies the payload in a file of dom0, and returns the report, which must have this `result`.
pub fn apply_json(ctx: &Ctx, guest: &Guest, file: &str, result: &str) -> Result<Value, Verdict> {
    let report = ctx.json(&format!("xen-locus -o json apply {} {file}", guest.name))?;
    check_eq!(report["result"], result, "{report}");
    check_eq!(report["domid"], guest.domid, "{report}");
    Ok(report)
}

/// Reverts a patch; the report must say so.
pub fn revert_json(ctx: &Ctx, guest: &Guest, patch: &str) -> Result<(), Verdict> {
    let report = ctx.json(&format!("xen-locus -o json revert {} {patch}", guest.name))?;
    check_eq!(report["result"], "reverted", "{report}");
    Ok(())
}

/// Runs a command that must end with `rc` and say `words` on stderr.
pub fn refused(ctx: &Ctx, cmd: &str, rc: i32, words: &str) -> Result<(), Verdict> {
    let out = ctx.dom0.sh(cmd)?;
    let said = out.err_text();
    check_eq!(out.rc, rc, "exit code of `{cmd}` ({said})");
    check!(
        said.contains(words),
        "`{cmd}` does not say {words:?}: {said}"
    );
    Ok(())
}

/// What `status` says of a guest.
pub fn status(ctx: &Ctx, guest: &str) -> Result<Value, Verdict> {
    ctx.json(&format!("xen-locus -o json status {guest}"))
}

/// Names of the patches that `status` lists, undermost first.
pub fn listed(ctx: &Ctx, guest: &str) -> Result<Vec<String>, Verdict> {
    let status = status(ctx, guest)?;
    let name = |p: &Value| p["name"].as_str().unwrap_or("?").to_owned();
    Ok(patches_of(&status)?.iter().map(name).collect())
}

/// The list of patches in what `status` says.
pub fn patches_of(status: &Value) -> Result<&[Value], Verdict> {
    let patches = status["patches"].as_array().map(Vec::as_slice);
    patches.ok_or_else(|| Verdict::failure(format!("no patches: {status}")))
}

/// Checks that exactly these patches are listed by `status`, undermost first, and all are in force.
/// Returns the status.
pub fn in_force(ctx: &Ctx, guest: &Guest, patches: &[&str]) -> Result<Value, Verdict> {
    let status = status(ctx, &guest.name)?;
    all_applied(&status, guest, patches_of(&status)?.iter(), patches)?;
    Ok(status)
}

/// Checks these patches, which `status` may list among others that are `gone`: that were in force in an
/// earlier kernel of the guest.
fn in_force_now(ctx: &Ctx, guest: &Guest, patches: &[&str]) -> Result<(), Verdict> {
    let status = status(ctx, &guest.name)?;
    let listed = patches_of(&status)?.iter();
    let present = listed.filter(|p| p["state"] != "gone");
    all_applied(&status, guest, present, patches)
}

fn all_applied<'s>(
    status: &Value,
    guest: &Guest,
    listed: impl Iterator<Item = &'s Value> + Clone,
    patches: &[&str],
) -> Result<(), Verdict> {
    check_eq!(status["domid"], guest.domid, "{status}");
    let names: Vec<&str> = listed.clone().filter_map(|p| p["name"].as_str()).collect();
    check_eq!(names, patches, "{status}");
    let sound = listed.clone().all(|p| p["state"] == "applied");
    check!(sound, "not all are in force: {status}");
    Ok(())
}

/// Checks what a guest shows ([`patches::check_words`]), and that exactly these patches are in force
/// ([`in_force`]). Returns the status.
pub fn shows(
    ctx: &Ctx,
    guest: &Guest,
    words: [&str; 3],
    patches: &[&str],
) -> Result<Value, Verdict> {
    patches::check_words(guest, words)?;
    in_force(ctx, guest, patches)
}

/// Like [`shows`], for a guest that may have rebooted: `status` may also list patches that are `gone`.
pub fn shows_now(
    ctx: &Ctx,
    guest: &Guest,
    words: [&str; 3],
    patches: &[&str],
) -> Result<(), Verdict> {
    patches::check_words(guest, words)?;
    in_force_now(ctx, guest, patches)
}

/// Checks that `status` lists no patch.
pub fn no_patches(ctx: &Ctx, guest: &str) -> Result<(), Verdict> {
    check_eq!(listed(ctx, guest)?, Vec::<String>::new(), "patches left");
    Ok(())
}

/// Threads that `status` says are still in the old version of the undermost patch.
pub fn draining(ctx: &Ctx, guest: &str) -> Result<Vec<Value>, Verdict> {
    let status = status(ctx, guest)?;
    let all = status["patches"][0]["draining"].as_array().cloned();
    all.ok_or_else(|| Verdict::failure(format!("no draining: {status}")))
}

/// What `info` says of a guest, with more options.
pub fn info(ctx: &Ctx, guest: &str, options: &str) -> Result<Value, Verdict> {
    ctx.json(&format!("xen-locus -o json info {guest} {options}"))
}

/// SHA-256 of the guest's kernel text, and its length, which must be that of a kernel.
pub fn text_digest(ctx: &Ctx, guest: &str) -> Result<String, Verdict> {
    let said = ctx.dom0.ok(&digest_of_text("xen-locus", guest))?;
    check!(is_long_enough(&said), "the text of {guest}: {said}");
    Ok(said)
}

/// A shell command that prints how long the text of a guest is that `tool` reads, then its digest. It fails if `tool`
/// does.
fn digest_of_text(tool: &str, guest: &str) -> String {
    format!(
        "at=/tmp/digested.$$; {tool} info {guest} --raw text >$at && wc -c <$at && sha256sum <$at; \
         rc=$?; rm -f $at; [ $rc = 0 ]"
    )
}

/// Whether the first line is the length of a kernel's text.
fn is_long_enough(said: &str) -> bool {
    let first = said.lines().next().map(|n| n.trim().parse::<u64>());
    first.is_some_and(|bytes| bytes.is_ok_and(|n| n > KERNEL_TEXT))
}

/// The text of a guest's kernel as it was once, in a file of dom0.
pub struct Text {
    file: String,
}

impl Text {
    /// Saves the text.
    pub fn save(ctx: &Ctx, guest: &str) -> Result<Self, Verdict> {
        let file = format!("/tmp/text-{guest}");
        let size = ctx.dom0.ok(&format!(
            "xen-locus info {guest} --raw text >{file} && wc -c <{file}"
        ))?;
        let bytes = size.trim().parse::<u64>().unwrap_or(0);
        check!(bytes > KERNEL_TEXT, "the text of {guest}: {size} bytes");
        Ok(Self { file })
    }

    /// Checks that the text is what it was, byte for byte. Otherwise the failure names the first function that is not.
    pub fn check_unchanged(self, ctx: &Ctx, guest: &Guest) -> Result<(), Verdict> {
        let (name, file) = (&guest.name, self.file);
        let differs = ctx.dom0.ok(&format!(
            "xen-locus info {name} --raw text >{file}.now; cmp -l {file} {file}.now 2>&1 | head -n 8; \
             rm -f {file} {file}.now"
        ))?;
        if differs.is_empty() {
            return Ok(());
        }
        let info = info(ctx, name, "")?;
        let base = info["text_base"].as_str().and_then(|text| {
            let digits = text.strip_prefix("0x")?;
            u64::from_str_radix(digits, 16).ok()
        });
        // cmp counts from 1.
        let first = differs.split_whitespace().next();
        let first = first.and_then(|n| n.parse::<u64>().ok()?.checked_sub(1));
        let place = base.zip(first).map_or(0, |(base, at)| base + at);
        let symbol = guest.sh(&format!(
            "sort /proc/kallsyms | awk -v at={place:016x} '$1 > at {{exit}} {{line = $0}} END {{print line}}'"
        ))?;
        Err(Verdict::failure(format!(
            "the text of {name} is not what it was, first at {place:#x} ({}): place, byte before, byte now:\n{differs}",
            symbol.text()
        )))
    }
}

/// No kernel here has less text, in bytes.
const KERNEL_TEXT: u64 = 8_000_000;

/// The guest's line of `list`.
pub fn list_row(ctx: &Ctx, guest: &str) -> Result<Value, Verdict> {
    let list = ctx.json("xen-locus -o json list")?;
    let mut rows = list["domains"].as_array().into_iter().flatten();
    let row = rows.find(|row| row["name"] == guest).cloned();
    row.ok_or_else(|| Verdict::failure(format!("no {guest} in {list}")))
}

/// The actions that `history` tells of a guest, oldest first; the log must be intact.
pub fn actions(ctx: &Ctx, guest: &str) -> Result<Vec<Value>, Verdict> {
    let history = ctx.json(&format!("xen-locus -o json history {guest}"))?;
    check_eq!(history["intact"], true, "{history}");
    let actions = history["actions"].as_array().cloned();
    actions.ok_or_else(|| Verdict::failure(format!("no actions: {history}")))
}

/// A shell loop that applies and reverts `count` times with this program, and ends at the first command
/// that fails. `applied` and `reverted` are the arguments of the two commands.
pub fn cycles(program: &str, applied: &str, reverted: &str, count: u32) -> String {
    format!(
        "for i in $(seq {count}); do {program} apply {applied} && {program} revert {reverted} || \
         {{ echo \"cycle $i: $?\"; exit 1; }}; done"
    )
}

/// Runs a command of `xen-locus-faults` that is killed at its `nth` place, counted from the one called
/// `from`. Returns whether it has so many places; if it does not, it must end with 0.
pub fn killed_at(ctx: &Ctx, nth: u32, from: &str, command: &str) -> Result<bool, Verdict> {
    let out = ctx.dom0.sh(&format!(
        "XEN_LOCUS_FAULT={nth}:kill:{from} xen-locus-faults {command}"
    ))?;
    let said = out.err_text();
    let hit = said.contains("xen-locus: fault: ");
    check!(hit != (out.rc == 0), "place {nth}: {} {said}", out.rc);
    Ok(hit)
}

/// The longest time of a bounded command on an emulated machine, where half a gibibyte of guest memory
/// takes 20 to 30 s to read.
const PATIENCE: Duration = Duration::from_secs(120);
/// The most memory of a bounded command, in KiB: `RLIMIT_DATA`, for which mapped guest memory does not
/// count.
const MEMORY: u64 = 96 << 10;

/// How a bounded command ended, and what it took.
pub struct Bounded {
    /// Its exit code.
    pub rc: i32,
    /// What it said on stderr.
    pub said: String,
    /// How long it took.
    pub took: Duration,
}

/// Runs a command of xen-locus with bounded time and memory. It must end in time, and must not panic.
pub fn bounded(ctx: &Ctx, command: &str) -> Result<Bounded, Verdict> {
    let began = Instant::now();
    let cmd = format!("ulimit -d {MEMORY} && exec xen-locus {command}");
    let out = ctx.dom0.sh_timeout(&cmd, PATIENCE)?;
    let took = began.elapsed();
    check!(!out.timed_out, "{command} did not end in {PATIENCE:?}");
    let said = out.err_text();
    check!(!said.contains("panicked"), "{command}: {said}");
    let rc = out.rc;
    Ok(Bounded { rc, said, took })
}

/// A command for the guest's shell that runs in the folder of its tracing, which is mounted first.
pub fn in_tracing(cmd: &str) -> String {
    format!(
        "mkdir -p /run/tracing && {{ mount -t tracefs t /run/tracing 2>/dev/null || true; }} && \
         cd /run/tracing && {cmd}"
    )
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Output};

    use super::{cycles, digest_of_text, is_long_enough};

    fn shell(cmd: &str) -> Output {
        let out = Command::new("sh").args(["-c", cmd]).output();
        out.unwrap()
    }

    #[test]
    fn cycles_run_both_commands_and_end_at_the_first_that_fails() {
        let out = shell(&cycles("echo", "guest file", "guest name", 2));
        let once = "apply guest file\nrevert guest name\n";
        assert_eq!(String::from_utf8_lossy(&out.stdout), once.repeat(2));
        assert_eq!(out.status.code(), Some(0));
        let out = shell(&cycles("false", "guest file", "guest name", 2));
        assert_eq!(String::from_utf8_lossy(&out.stdout), "cycle 1: 1\n");
        assert_eq!(out.status.code(), Some(1));
    }

    #[test]
    fn the_digest_of_nothing_is_no_digest() {
        // A tool that fails, and one that succeeds and prints nothing.
        assert_eq!(
            shell(&digest_of_text("false", "guest")).status.code(),
            Some(1)
        );
        let out = shell(&digest_of_text("true", "guest"));
        let said = String::from_utf8_lossy(&out.stdout);
        assert!(out.status.success() && said.lines().count() == 2, "{said}");
        assert!(!is_long_enough(&said), "{said}");
        assert!(!is_long_enough(""));
        assert!(is_long_enough("8000001\n0123  -\n"));
    }
}
