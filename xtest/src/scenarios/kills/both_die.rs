//! The guardian is killed together with the tool, and then the run of `recover` too.

use super::subject::{nothing_left, Subject, Tally};
use crate::guest::Kind;
use crate::scenario::Ctx;
use crate::scenarios::steps::patches::PAIR;
use crate::scenarios::steps::tool;
use crate::verdict::Verdict;
use crate::{check, check_eq};

/// Stops a run at a place inside its pause, stops the guardian before it can notice, and kills both.
const BOTH_DIE: &str = r#"
guardian() { ps | awk '/xen-locus-guardia[n]/ {print $1}'; }
XEN_LOCUS_FAULT="$1" xen-locus-faults apply "$2" /payloads/locus_proc_pair.ko >/tmp/both.log 2>&1 &
pid=$!
# One that waits (in futex, system call 202) is prepared.
until g=$(guardian) && [ -n "$g" ] && grep -q '^202 ' /proc/$g/syscall; do
	[ -e /proc/$pid/stat ] || break
	usleep 1000
done 2>/dev/null
kill -STOP $g
while [ -e /proc/$pid/stat ] && ! grep -q ') T' /proc/$pid/stat; do usleep 20000; done
kill -9 $g $pid
wait $pid
cat /tmp/both.log
xl list "$2" | awk 'NR == 2 {print "state " $5}'
"#;

pub fn both_die(ctx: &mut Ctx, kind: Kind) -> Result<(), Verdict> {
    let mut subject = Subject::new(ctx, kind)?;
    let name = &subject.guest.name.clone();
    // In the middle of a write; and after all writes, if that pause was the one that made the change.
    for (place, results) in [
        ("3:stop:mark writing", &["undone"][..]),
        ("1:stop:mark unpausing", &["finished", "undone"]),
    ] {
        for by_itself in [false, true] {
            both_killed(ctx, &mut subject, place)?;
            if by_itself {
                let out = ctx
                    .dom0
                    .sh(&format!("xen-locus apply {name} /payloads/{PAIR}.ko"))?;
                let said = out.err_text();
                check!(
                    out.rc == 0 && results.iter().any(|result| said.contains(result)),
                    "{} {said}",
                    out.text()
                );
                check!(subject.is_new()?, "apply did nothing after {place}");
            } else {
                let found = ctx.json(&format!("xen-locus -o json recover {name}"))?;
                let result = found["result"].as_str().unwrap_or_default();
                check!(results.contains(&result), "{place}: {found}");
                check_eq!(subject.is_new()?, result == "finished", "{place}");
            }
        }
    }
    subject.clear(ctx)?;
    nothing_left(ctx)
}

/// Kills both while the guest is paused. If the guardian is quicker than the script that is to stop it, this
/// shows nothing and is tried again.
fn both_killed(ctx: &Ctx, subject: &mut Subject, place: &str) -> Result<(), Verdict> {
    const TRIES: u32 = 8;
    let name = subject.guest.name.clone();
    ctx.expects_long_pauses();
    let mut said = String::new();
    ctx.dom0
        .put("/tmp/both-die.sh", 0o755, BOTH_DIE.as_bytes())?;
    for _ in 0..TRIES {
        subject.clear(ctx)?;
        said = ctx
            .dom0
            .ok(&format!("sh /tmp/both-die.sh '{place}' {name}"))?;
        let state = said.lines().find_map(|l| l.strip_prefix("state "));
        if state.is_some_and(|s| s.contains('p')) {
            return Ok(());
        }
        check!(
            said.contains("died at work"),
            "neither paused nor resolved: {said}"
        );
    }
    Err(Verdict::failure(format!(
        "the guardian was quicker each of {TRIES} times: {said}"
    )))
}

/// A run and its guardian are killed in the middle of a write. Then `recover` is killed at its first place, then
/// further on in steps of `step` places.
pub fn recover_dies(ctx: &mut Ctx, kind: Kind, step: u32) -> Result<(), Verdict> {
    let mut subject = Subject::new(ctx, kind)?;
    let name = subject.guest.name.clone();
    let mut tally = Tally::default();
    let mut nth = 1;
    loop {
        both_killed(ctx, &mut subject, "3:stop:mark writing")?;
        let hit = tool::killed_at(ctx, nth, "recover", &format!("recover {name}"))?;
        tally.kills += u32::from(hit);
        ctx.dom0.ok(&format!("xen-locus recover {name}"))?;
        let new = subject.is_new()?;
        check!(
            !new,
            "what was half written was not taken back, place {nth}"
        );
        subject.recover(ctx, &mut tally)?;
        subject.progresses()?;
        if !hit {
            break;
        }
        nth += step;
    }
    subject.clear(ctx)?;
    nothing_left(ctx)?;
    eprintln!(
        "{name}: recover, killed at place 1 to {nth}: {} kills",
        tally.kills
    );
    check!(tally.kills > 0, "recover was never killed");
    Ok(())
}
