//! Payloads that several scenarios apply, and what a guest shows when they are in force.
//!
//! A payload that replaces the function behind a file of `/proc` adds `locus=WORD` to that file.

use std::path::Path;

use crate::check_eq;
use crate::guest::Guest;
use crate::scenario::Ctx;
use crate::suites::{Suite, BOOKWORM};
use crate::verdict::Verdict;

/// Replaces `cmdline_proc_show`: word "live" in `/proc/cmdline`.
pub const CMDLINE: &str = "locus_cmdline";
/// The file in dom0 of [`CMDLINE`] for Debian 12's kernel.
pub const CMDLINE_FILE: &str = "/payloads/locus_cmdline.ko";
/// Replaces `version_proc_show` and `loadavg_proc_show`: word "live" in both files.
pub const PAIR: &str = "locus_proc_pair";
/// Replaces `cmdline_proc_show` and `version_proc_show`: word "two" in both files.
pub const TWO: &str = "locus_stack_two";
/// Replaces `cmdline_proc_show`: word "three".
pub const THREE: &str = "locus_stack_three";
/// Replaces the system call in which the guest's program `pause` sleeps.
pub const SLEEPER: &str = "locus_sleeper";
/// Replaces the same system call.
pub const DRAIN: &str = "locus_drain";

/// Payloads with a check script, and their folders below `patches/`.
const CHECKS: [(&str, &str); 2] = [(CMDLINE, "cmdline"), (PAIR, "version-loadavg")];

/// The file in dom0 of a payload for Debian 12's kernel.
pub fn file(patch: &str) -> String {
    format!("/payloads/{patch}.ko")
}

/// The file in dom0 of a payload for the kernel of this release.
pub fn file_for(suite: &Suite, patch: &str) -> String {
    if *suite == BOOKWORM {
        file(patch)
    } else {
        format!("/payloads/{}/{patch}.ko", suite.name)
    }
}

/// Puts the payload's check script into the guest, and returns its path there.
pub fn put_check(guest: &Guest, patch: &str) -> Result<String, Verdict> {
    let folder = CHECKS.iter().find(|(name, _)| *name == patch);
    let (_, folder) = folder.ok_or_else(|| Verdict::Error(format!("{patch} has no check")))?;
    let top = Path::new(env!("CARGO_MANIFEST_DIR")).join("../patches");
    let script = std::fs::read(top.join(folder).join("check.sh"))?;
    let path = check_path(patch);
    guest.put(&path, 0o755, &script)?;
    Ok(path)
}

/// Runs the check script, which must find the guest as it is `before` or `after` applying.
pub fn check(guest: &Guest, patch: &str, phase: &str) -> Result<(), Verdict> {
    let out = guest.sh(&format!("sh {} {phase}", check_path(patch)))?;
    check_eq!(
        out.rc,
        0,
        "{patch} {phase}: {} {}",
        out.text(),
        out.err_text()
    );
    Ok(())
}

fn check_path(patch: &str) -> String {
    format!("/tmp/{patch}.sh")
}

/// Whether `/proc/cmdline` has the word of [`CMDLINE`] at its end.
pub fn cmdline_is_live(guest: &Guest) -> Result<bool, Verdict> {
    Ok(guest.ok("cat /proc/cmdline")?.ends_with(" locus=live"))
}

/// Checks that no payload's word is in `/proc/cmdline`.
pub fn cmdline_is_untouched(guest: &Guest) -> Result<(), Verdict> {
    let seen = guest.ok("cat /proc/cmdline")?;
    check_eq!(seen.contains("locus="), false, "the guest shows {seen:?}");
    Ok(())
}

/// A command for the guest that prints the words in `/proc/cmdline`, `/proc/version` and `/proc/loadavg`, each with a dot
/// behind it. One process, because a busy guest takes long to start one.
pub const WORDS: &str = "awk '{for (i = 1; i <= NF; i++) if ($i ~ /^locus=/) \
     w[FILENAME] = w[FILENAME] substr($i, 7)} END {print w[\"/proc/cmdline\"] \".\"; \
     print w[\"/proc/version\"] \".\"; print w[\"/proc/loadavg\"] \".\"}' \
     /proc/cmdline /proc/version /proc/loadavg";

/// What [`WORDS`] prints for these words. An empty one means the kernel's own text.
pub fn printed(words: [&str; 3]) -> String {
    words.map(|word| format!("{word}.")).join("\n")
}

/// Checks the words in `/proc/cmdline`, `/proc/version` and `/proc/loadavg`, in this order; an empty
/// one means the kernel's own text.
pub fn check_words(guest: &Guest, words: [&str; 3]) -> Result<(), Verdict> {
    check_eq!(guest.ok(WORDS)?, printed(words), "what the guest shows");
    Ok(())
}

/// The words that a guest shows while these patches are in force, the undermost first.
pub fn words_of(patches: &[&str]) -> [&'static str; 3] {
    let mut shown = [""; 3];
    for patch in patches {
        let words = match *patch {
            CMDLINE => ["live", "", ""],
            PAIR => ["", "live", "live"],
            TWO => ["two", "two", ""],
            THREE => ["three", "", ""],
            _ => ["", "", ""],
        };
        for (shown, word) in shown.iter_mut().zip(words) {
            if !word.is_empty() {
                *shown = word;
            }
        }
    }
    shown
}

/// A payload of its own, by its digest: the same module with other bytes behind it.
pub fn another(ctx: &Ctx, n: u32) -> Result<String, Verdict> {
    let made = "/tmp/another.ko";
    ctx.dom0.ok(&format!(
        "cat {} >{made} && echo {n} >>{made}",
        file(CMDLINE)
    ))?;
    Ok(made.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_uppermost_patch_of_a_function_shows() {
        assert_eq!(words_of(&[]), ["", "", ""]);
        assert_eq!(words_of(&[TWO, PAIR, THREE]), ["three", "live", "live"]);
        assert_eq!(words_of(&[TWO, THREE]), ["three", "two", ""]);
        assert_eq!(printed(["", "two", ""]), ".\ntwo.\n.");
    }
}
