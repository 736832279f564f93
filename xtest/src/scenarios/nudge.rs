//! `nudge`: threads that sleep in a replaced function are woken and restart their system call. Nothing else in the
//! guest changes.

use std::time::Duration;

use super::steps::guest_log::Log;
use super::steps::patches::{file_for, DRAIN};
use super::steps::wait::until;
use super::steps::{sleepers, tool};
use crate::guest::{Guest, GuestSpec, Kind};
use crate::payloads::Which;
use crate::profile::{PV1, PVH};
use crate::scenario::{Ctx, Scenario};
use crate::suites::{Suite, BOOKWORM, TRIXIE};
use crate::verdict::Verdict;
use crate::{check, check_eq};

/// Scenarios that are short enough for a usual run.
pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "nudge-pv",
        summary: "threads of a PV guest that sleep in a replaced function are woken and leave it",
        profile: &PV1,
        run: |ctx| nudge(ctx, Kind::Pv, &BOOKWORM, 31),
    },
    Scenario {
        name: "nudge-pvh",
        summary: "threads of a PVH guest that sleep in a replaced function are woken and leave it",
        profile: &PVH,
        run: |ctx| nudge(ctx, Kind::Pvh, &BOOKWORM, 9),
    },
];

/// Scenarios that take too long for a usual run.
pub const MATRIX: &[Scenario] = &[Scenario {
    name: "nudge-trixie-pv",
    summary: "the same with the PV kernel of Debian 13",
    profile: &PV1,
    run: |ctx| nudge(ctx, Kind::Pv, &TRIXIE, 9),
}];

/// The number of threads that sleep.
const SLEEPERS: usize = 5;

/// Runs `nudge`. Returns its result, the number of threads that sleep, and the number that it woke.
fn nudged(ctx: &Ctx, guest: &Guest, what: &str) -> Result<(String, usize, u64), Verdict> {
    let said = ctx.json(&format!("xen-locus -o json nudge {} {what}", guest.name))?;
    eprintln!("nudge: {}: {what}: {said}", guest.name);
    let asleep = said["asleep"].as_array().map_or(0, Vec::len);
    let result = said["result"].as_str().unwrap_or_default().to_owned();
    Ok((result, asleep, said["woken"].as_u64().unwrap_or_default()))
}

/// How often each thread went to sleep, by thread id.
fn sleeps(guest: &Guest) -> Result<Vec<(u32, u64)>, Verdict> {
    let text = guest.ok("for pid in $(pidof pause); do \
         echo $pid $(sed -n 's/^voluntary_ctxt_switches:\\s*//p' /proc/$pid/status); done")?;
    let number = |word: Option<&str>| word.and_then(|w| w.parse().ok()).unwrap_or(0);
    let mut all: Vec<(u32, u64)> = text
        .lines()
        .map(|line| {
            let mut words = line.split_whitespace();
            let pid = u32::try_from(number(words.next())).unwrap_or(0);
            (pid, number(words.next()))
        })
        .collect();
    all.sort_unstable();
    check_eq!(all.len(), SLEEPERS, "{text}");
    Ok(all)
}

/// Checks that the threads are the same, and that each went to sleep again since `before`.
fn slept_again(guest: &Guest, before: &[(u32, u64)]) -> Result<(), Verdict> {
    let again = |((pid, was), (same, is)): (&(u32, u64), &(u32, u64))| pid == same && is > was;
    until(Duration::from_secs(60), || {
        let after = sleeps(guest)?;
        Ok(if before.iter().zip(&after).all(again) {
            Ok(())
        } else {
            Err(format!("before {before:?}, after {after:?}"))
        })
    })
}

/// A guest with a kernel of this release, and the file in dom0 of the payload for it.
fn guest(ctx: &mut Ctx, kind: Kind, suite: &'static Suite) -> Result<(Guest, String), Verdict> {
    if *suite == BOOKWORM {
        let guest = ctx.ensure_guest(GuestSpec::new(kind.name(), kind))?;
        return Ok((guest, file_for(suite, DRAIN)));
    }
    let spec = GuestSpec::new(&format!("nudge-{}", suite.name), kind);
    let guest = ctx.ensure_guest(spec.suite(suite).memory(256))?;
    let made = ctx.kernels.payloads(suite, Which::All)?;
    let payload = made.iter().find(|(name, _)| name == DRAIN);
    let (_, file) = payload.ok_or_else(|| Verdict::Error(format!("no payload {DRAIN}")))?;
    let path = file_for(suite, DRAIN);
    ctx.dom0.put(&path, 0o644, &std::fs::read(file)?)?;
    Ok((guest, path))
}

/// `step` is the distance of the places at which a nudge is killed.
fn nudge(ctx: &mut Ctx, kind: Kind, suite: &'static Suite, step: usize) -> Result<(), Verdict> {
    let (guest, file) = guest(ctx, kind, suite)?;
    let name = guest.name.clone();
    let none = ("already".to_owned(), 0, 0);
    check_eq!(nudged(ctx, &guest, &file)?, none);
    sleepers::begin(&guest, SLEEPERS, SLEEPERS)?;
    let log = Log::begin(ctx, &guest)?;
    let untouched = tool::text_digest(ctx, &name)?;

    // They block apply. When woken, they enter the old version again.
    let before = sleeps(&guest)?;
    let dry = ctx.json(&format!("xen-locus -N -o json nudge {name} {file}"))?;
    check_eq!(dry["result"], "would-nudge", "{dry}");
    check_eq!(sleeps(&guest)?, before);
    let all = ("nudged".to_owned(), SLEEPERS, SLEEPERS as u64);
    check_eq!(nudged(ctx, &guest, &file)?, all);
    slept_again(&guest, &before)?;
    check_eq!(tool::text_digest(ctx, &name)?, untouched);

    killed(ctx, &guest, &file, &untouched, step)?;

    // They are in the replaced version. When woken, they enter the new one.
    ctx.dom0
        .ok(&format!("xen-locus apply {name} {file} --entry-only"))?;
    check_eq!(tool::draining(ctx, &name)?.len(), SLEEPERS);
    let before = sleeps(&guest)?;
    check_eq!(nudged(ctx, &guest, DRAIN)?, all);
    slept_again(&guest, &before)?;
    check_eq!(tool::draining(ctx, &name)?.len(), 0);
    check_eq!(nudged(ctx, &guest, DRAIN)?, none);

    ctx.dom0
        .ok(&format!("xen-locus revert {name} {DRAIN} --entry-only"))?;
    check_eq!(tool::text_digest(ctx, &name)?, untouched);
    sleepers::end(&guest)?;
    log.nothing_new(ctx, &guest)?;
    let history = ctx.dom0.ok(&format!("xen-locus history {name}"))?;
    check!(history.contains("nudge"), "{history}");
    ctx.dom0
        .ok(&format!("xen-locus -o json verify {name}"))
        .map(drop)
}

/// After a nudge that is killed at any place, `recover` restores the guest's text. Every second time it has no journal, as on
/// another host: then the guest's memory alone tells of the gate, and who only reads names it.
fn killed(
    ctx: &Ctx,
    guest: &Guest,
    file: &str,
    untouched: &str,
    step: usize,
) -> Result<(), Verdict> {
    let name = &guest.name;
    let (mut kills, mut stood) = (0, 0);
    for nth in (1..).step_by(step) {
        let hit = tool::killed_at(ctx, nth, "journal", &format!("nudge {name} {file}"))?;
        if !hit {
            // It may take a moment until all threads sleep again.
            sleepers::await_asleep(guest, SLEEPERS)?;
            break;
        }
        kills += 1;
        if kills % 2 == 0 {
            ctx.dom0.ok("rm -f /var/lib/xen-locus/journal/*")?;
            let leads = tool::text_digest(ctx, name)? != untouched;
            let status = ctx.dom0.sh(&format!("xen-locus status {name}"))?;
            check_eq!(status.rc, 0, "place {nth}: {}", status.err_text());
            let is_named = status.err_text().contains("a nudge of ");
            check!(is_named || !leads, "place {nth}: {}", status.err_text());
            stood += u32::from(leads);
        }
        let found = ctx.json(&format!("xen-locus -o json recover {name}"))?;
        let result = found["result"].as_str().unwrap_or_default();
        check!(
            matches!(result, "undone" | "nothing-to-do"),
            "place {nth}: {found}"
        );
        check_eq!(tool::text_digest(ctx, name)?, untouched, "place {nth}");
        sleeps(guest)?;
    }
    eprintln!(
        "nudge: {name}: {kills} kills; the gate stood after {stood} of those without a journal"
    );
    check!(kills > 3, "{kills} kills");
    Ok(())
}
