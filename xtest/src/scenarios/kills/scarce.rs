//! The tool has too little memory, or no room for what it must write.

use std::collections::BTreeMap;

use super::actions::ACTIONS;
use super::subject::{nothing_left, Subject, Tally};
use crate::guest::Kind;
use crate::scenario::Ctx;
use crate::scenarios::steps::patches::PAIR;
use crate::scenarios::steps::tool;
use crate::verdict::Verdict;
use crate::{check, check_eq};

pub fn no_journal(ctx: &mut Ctx, kind: Kind) -> Result<(), Verdict> {
    let mut subject = Subject::new(ctx, kind)?;
    subject.clear(ctx)?;
    let name = &subject.guest.name.clone();
    let apply = format!("xen-locus apply {name} /payloads/{PAIR}.ko");
    for (place, options) in [
        ("/var/lib/xen-locus/journal", "ro"),
        ("/var/lib/xen-locus/journal", "size=4k"),
        ("/run/xen-locus/guard", "size=4k"),
    ] {
        let out = ctx.dom0.sh(&format!(
            "mkdir -p {place}; mount -t tmpfs -o {options},mode=700 none {place} || exit 64
             echo full >{place}/file; {apply}; rc=$?; umount {place}; exit $rc"
        ))?;
        let said = out.err_text();
        check!(
            out.rc == 1 && said.contains(place) && said.contains("nothing was changed"),
            "{place} {options}: {} {said}",
            out.rc
        );
        check!(!subject.is_new()?, "{place} {options}: it was applied");
        check_eq!(subject.status(ctx)?, false);
    }
    ctx.dom0.ok(&apply)?;
    check!(subject.is_new()?, "it is not applied");
    subject.clear(ctx)?;
    unrecorded(ctx, &subject, &apply)?;
    subject.clear(ctx)?;
    nothing_left(ctx)
}

/// If the audit log has no room, the change is still made, and the next run logs it.
fn unrecorded(ctx: &Ctx, subject: &Subject, apply: &str) -> Result<(), Verdict> {
    let (name, log) = (&subject.guest.name, "/var/log/xen-locus");
    let out = ctx.dom0.sh(&format!(
        "mkdir -p {log}; mount -t tmpfs -o size=4k,mode=700 none {log} || exit 64
         echo full >{log}/file; {apply}; rc=$?; umount {log}; exit $rc"
    ))?;
    check!(
        out.rc == 0 && out.err_text().contains("not logged"),
        "{log} full: {} {}",
        out.rc,
        out.err_text()
    );
    check!(subject.is_new()?, "it is not applied");
    let found = ctx.json(&format!("xen-locus -o json recover {name}"))?;
    check_eq!(found["result"], "finished", "{found}");
    let actions = tool::actions(ctx, name)?;
    check!(
        actions.last().is_some_and(|a| {
            a["op"] == "recover" && a["of"] == "apply" && a["in_force"][0]["name"] == PAIR
        }),
        "{actions:?}"
    );
    Ok(())
}

/// Gives the tool more and more memory, until it has enough.
pub fn no_memory(ctx: &mut Ctx, kind: Kind) -> Result<(), Verdict> {
    let mut subject = Subject::new(ctx, kind)?;
    let name = subject.guest.name.clone();
    let mut tally = Tally::default();
    let mut reasons = BTreeMap::<String, u32>::new();
    for action in ACTIONS {
        let command = action.command(&name);
        let verb = action.name;
        // KiB of address space. With less, the libraries can't be loaded.
        let mut limit = 12_000;
        loop {
            check!(limit < 4 << 20, "{verb} takes more than 4 GiB");
            subject.prepare(ctx, action)?;
            let was = subject.is_new()?;
            let cmd = format!("sh -c 'ulimit -v {limit}; exec xen-locus --no-cache {command}'");
            let done = subject.kill(ctx, "", &cmd, &mut tally)?;
            let rc = done["rc"].as_i64();
            let said = done["stderr"].as_str().unwrap_or_default();
            let what = format!("{verb} with {limit} KiB: {done}");
            let last = said.lines().last().unwrap_or_default();
            check!(
                rc == Some(0) || last.starts_with("xen-locus: "),
                "no word of why: {what}"
            );
            match rc {
                Some(0) => break,
                Some(1 | 2) => check_eq!(subject.is_new()?, was, "{what}"),
                Some(6) => {}
                _ => return Err(Verdict::failure(what)),
            }
            *reasons.entry(format!("{rc:?} {}", why(last))).or_default() += 1;
            subject.recover(ctx, &mut tally)?;
            limit += limit / 2;
        }
        subject.progresses()?;
        eprintln!("{name}: {verb} takes {limit} KiB");
    }
    subject.clear(ctx)?;
    nothing_left(ctx)?;
    check!(
        reasons.keys().any(|s| s.contains("out of memory")),
        "memory was never the reason: {reasons:?}"
    );
    eprintln!("{name}: {reasons:#?}");
    Ok(())
}

/// A message without its digits.
fn why(message: &str) -> String {
    message.chars().filter(|c| !c.is_ascii_digit()).collect()
}
