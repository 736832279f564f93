//! The tool is killed, at any moment: the guest runs on, wholly old or wholly new.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::Value;

use super::steps::patches::{self, CMDLINE, PAIR};
use super::steps::tool;
use crate::guest::{Guest, GuestSpec, Kind};
use crate::profile::{PV, PVH};
use crate::scenario::{Ctx, Scenario};
use crate::verdict::Verdict;
use crate::{check, check_eq};

/// See the names.
pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "kills-pv",
        summary: "killed 25 times at random moments, the tool leaves the guest running, old or new",
        profile: &PV,
        run: |ctx| random(ctx, Kind::Pv, 25),
    },
    Scenario {
        name: "faults-pv",
        summary:
            "killed at every 13th of its calls from the journal on, it leaves the guest old or new",
        profile: &PV,
        run: |ctx| injected(ctx, Kind::Pv, "kill", 13, &ACTIONS),
    },
    Scenario {
        name: "both-die-pv",
        summary: "where the guardian is killed too the guest stays paused until recover settles it",
        profile: &PV,
        run: |ctx| both_die(ctx, Kind::Pv),
    },
    Scenario {
        name: "faults-recover-pv",
        summary: "where recover is killed as well, at every 37th of its calls, the next one settles it",
        profile: &PV,
        run: |ctx| recover_dies(ctx, Kind::Pv, 37),
    },
    Scenario {
        name: "no-journal-pv",
        summary: "a journal that can't be written, and no room for a guardian's file: exit 1, nothing done; a full log: the next run records it",
        profile: &PV,
        run: |ctx| no_journal(ctx, Kind::Pv),
    },
    Scenario {
        name: "no-memory-pv",
        summary: "with too little memory for itself, however much that is, it says so, and the guest is old or new",
        profile: &PV,
        run: |ctx| no_memory(ctx, Kind::Pv),
    },
];

/// What takes too long for a usual run.
pub const MATRIX: &[Scenario] = &[
    Scenario {
        name: "kills-200-pv",
        summary: "killed 200 times at random moments",
        profile: &PV,
        run: |ctx| random(ctx, Kind::Pv, 200),
    },
    Scenario {
        name: "faults-all-apply-pv",
        summary: "apply is killed at each of its calls from the journal on",
        profile: &PV,
        run: |ctx| injected(ctx, Kind::Pv, "kill", 1, &[APPLY]),
    },
    Scenario {
        name: "faults-all-revert-pv",
        summary: "revert is killed at each of its calls from the journal on",
        profile: &PV,
        run: |ctx| injected(ctx, Kind::Pv, "kill", 1, &[REVERT]),
    },
    Scenario {
        name: "faults-all-replace-pv",
        summary: "replace is killed at each of its calls from the journal on",
        profile: &PV,
        run: |ctx| injected(ctx, Kind::Pv, "kill", 1, &[REPLACE]),
    },
    Scenario {
        name: "faults-recover-all-pv",
        summary: "killed at each of its calls, recover leaves what the next one settles",
        profile: &PV,
        run: |ctx| recover_dies(ctx, Kind::Pv, 1),
    },
    Scenario {
        name: "fails-all-pv",
        summary: "each of its calls from the journal on fails once: exit code and guest agree",
        profile: &PV,
        run: |ctx| injected(ctx, Kind::Pv, "fail", 1, &ACTIONS),
    },
    Scenario {
        name: "stops-pv",
        summary: "stopped at every 7th of its calls from the journal on, it is killed where it holds the guest",
        profile: &PV,
        run: |ctx| injected(ctx, Kind::Pv, "stop", 7, &ACTIONS),
    },
    Scenario {
        name: "kills-pvh",
        summary: "killed 60 times at random moments at work on a PVH guest",
        profile: &PVH,
        run: |ctx| random(ctx, Kind::Pvh, 60),
    },
];

/// Longest time for which a guest may be paused, the pause of the run that is killed included.
const PAUSE_MAX_US: u64 = 200_000;

/// What the kills of a scenario came to.
#[derive(Debug, Default)]
struct Tally {
    kills: u32,
    in_pause: u32,
    not_hit: u32,
    old: u32,
    new: u32,
    finished: u32,
    undone: u32,
    nothing_to_do: u32,
    longest_pause_us: u64,
    /// Exit codes of those that were not killed.
    codes: Vec<i64>,
}

/// The guest under test.
struct Subject {
    guest: Guest,
    /// The check script in the guest of the payload [`PAIR`].
    check: String,
    /// Of its workload, when it was looked at last.
    rounds: u64,
}

impl Subject {
    fn new(ctx: &mut Ctx, kind: Kind) -> Result<Subject, Verdict> {
        let guest = ctx.ensure_guest(GuestSpec::new(kind.name(), kind))?;
        let check = patches::put_check(&guest, PAIR)?;
        guest.start_workload()?;
        let rounds = guest.rounds()?;
        Ok(Subject {
            guest,
            check,
            rounds,
        })
    }

    /// What runs in the guest, by what its files in /proc show.
    fn is_new(&self) -> Result<bool, Verdict> {
        let check = &self.check;
        let cmd = format!("sh {check} after && exit 10; sh {check} before && exit 11");
        let out = self.guest.sh(&cmd)?;
        match out.rc {
            10 => Ok(true),
            11 => Ok(false),
            _ => Err(Verdict::failure(format!(
                "the guest is neither old nor new: {}",
                out.text()
            ))),
        }
    }

    /// What the tool says of it.
    fn status(&self, ctx: &Ctx) -> Result<bool, Verdict> {
        let status = tool::status(ctx, &self.guest.name)?;
        match tool::patches_of(&status)? {
            [] => Ok(false),
            [one] if one["name"] == CMDLINE => Ok(false),
            [one] if one["name"] == PAIR && one["state"] == "applied" => Ok(true),
            _ => Err(Verdict::failure(format!("status says {status}"))),
        }
    }

    /// Runs the tool under `locus-kill` and looks at what is left.
    fn kill(
        &mut self,
        ctx: &Ctx,
        when: &str,
        cmd: &str,
        tally: &mut Tally,
    ) -> Result<Value, Verdict> {
        let name = &self.guest.name;
        let killed = ctx.json(&format!("locus-kill {name} {when} -- {cmd}"))?;
        let what = format!("{cmd} {when}: {killed}");
        check_eq!(killed["stuck"], false, "{what}");
        let pause = killed["longest_pause_us"].as_u64().unwrap_or(u64::MAX);
        tally.longest_pause_us = tally.longest_pause_us.max(pause);
        check!(pause <= PAUSE_MAX_US, "paused for too long: {what}");
        match killed["signal"].as_i64() {
            Some(9) => tally.kills += 1,
            _ => tally.not_hit += 1,
        }
        tally.in_pause += u32::from(killed["killed_in_pause"] == true);
        let new = self.is_new()?;
        check_eq!(self.status(ctx)?, new, "status after {what}");
        *(if new { &mut tally.new } else { &mut tally.old }) += 1;
        Ok(killed)
    }

    /// What `recover` says, which must be what the guest shows; a second time there is nothing to do.
    fn recover(&self, ctx: &Ctx, tally: &mut Tally) -> Result<(), Verdict> {
        let recover = format!("xen-locus -o json recover {}", self.guest.name);
        let found = ctx.json(&recover)?;
        let new = self.is_new()?;
        match (found["result"].as_str(), found["op"].as_str()) {
            (Some("nothing-to-do"), _) => tally.nothing_to_do += 1,
            (Some("finished"), Some(op)) => {
                check_eq!(new, op == "apply", "{found}");
                tally.finished += 1;
            }
            (Some("undone"), Some(op)) => {
                check_eq!(new, op == "revert", "{found}");
                tally.undone += 1;
            }
            _ => return Err(Verdict::failure(format!("recover says {found}"))),
        }
        check_eq!(ctx.json(&recover)?["result"], "nothing-to-do");
        check_eq!(self.status(ctx)?, new, "status after {found}");
        let verify = format!("xen-locus -o json verify {}", self.guest.name);
        check_eq!(ctx.json(&verify)?["result"], "clean", "after {found}");
        Ok(())
    }

    /// The other one of apply and revert.
    fn next(&self, ctx: &Ctx) -> Result<String, Verdict> {
        let name = &self.guest.name;
        Ok(match self.status(ctx)? {
            true => format!("xen-locus revert {name} {PAIR}"),
            false => format!("xen-locus apply {name} /payloads/{PAIR}.ko"),
        })
    }

    /// Makes `patch`, and nothing else, be in force.
    fn prepare(&self, ctx: &Ctx, patch: Option<&str>) -> Result<(), Verdict> {
        let name = &self.guest.name;
        let there = tool::listed(ctx, name)?;
        if patch.is_some_and(|patch| there == [patch]) {
            return Ok(());
        }
        if !there.is_empty() {
            tool::revert_all(ctx, name)?;
        }
        if let Some(patch) = patch {
            tool::apply(ctx, name, patch)?;
        }
        Ok(())
    }

    fn progresses(&mut self) -> Result<(), Verdict> {
        let now = self.guest.rounds()?;
        check!(now > self.rounds, "the workload stands still at {now}");
        self.rounds = now;
        Ok(())
    }
}

/// Numbers that are the same in each run (xorshift).
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit.max(1)
    }
}

fn random(ctx: &mut Ctx, kind: Kind, kills: u32) -> Result<(), Verdict> {
    let mut subject = Subject::new(ctx, kind)?;
    let mut tally = Tally::default();
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let mut length = 400_000;
    while tally.kills < kills {
        let cmd = subject.next(ctx)?;
        let when = match random.below(2) {
            0 => format!("--after {}", random.below(length)),
            _ => format!("--in-pause {}", random.below(1000)),
        };
        let done = subject.kill(ctx, &when, &cmd, &mut tally)?;
        if done["signal"].is_null() {
            length = done["total_us"].as_u64().unwrap_or(length);
        }
        // Else the next run does so by itself.
        if random.below(2) == 0 {
            subject.recover(ctx, &mut tally)?;
        }
        // The next run finds nothing in its way.
        if tally.kills % 4 == 0 {
            let cmd = subject.next(ctx)?;
            ctx.dom0.ok(&cmd)?;
            subject.progresses()?;
        }
    }
    tool::revert_all(ctx, &subject.guest.name)?;
    check_eq!(subject.is_new()?, false);
    subject.recover(ctx, &mut tally)?;
    nothing_left(ctx)?;
    eprintln!("{}: {tally:?}", subject.guest.name);
    Ok(())
}

/// An action that is made to end early: what it is called, the patch that is in force before, if any,
/// and the command.
type Action = (&'static str, Option<&'static str>, &'static str);

/// In a guest that has just started a payload's first way in is the longest.
const APPLY: Action = ("apply", None, "apply {} /payloads/locus_proc_pair.ko");
const REVERT: Action = ("revert", Some(PAIR), "revert {} locus_proc_pair");
const REPLACE: Action = (
    "replace",
    Some(CMDLINE),
    "replace {} /payloads/locus_proc_pair.ko",
);
const ACTIONS: [Action; 3] = [APPLY, REVERT, REPLACE];

/// Makes each action end at its first place, at its second, and so on, in steps of `step`, until it ends by
/// itself.
fn injected(
    ctx: &mut Ctx,
    kind: Kind,
    what: &str,
    step: u32,
    actions: &[Action],
) -> Result<(), Verdict> {
    for &(action, before, command) in actions {
        ctx.destroy_guest(kind.name())?;
        let mut subject = Subject::new(ctx, kind)?;
        let mut tally = Tally::default();
        let name = subject.guest.name.clone();
        let command = command.replace("{}", &name);
        let mut nth = 1;
        loop {
            subject.prepare(ctx, before)?;
            let cmd =
                format!("env XEN_LOCUS_FAULT={nth}:{what}:journal xen-locus-faults {command}");
            let done = subject.kill(ctx, "", &cmd, &mut tally)?;
            let said = done["stderr"].as_str().unwrap_or_default();
            let hit = said.contains("xen-locus: fault: ");
            // What it says of the guest is true.
            if let Some(rc) = done["rc"].as_i64() {
                let new = subject.is_new()?;
                let expected = (action != "revert") == (rc == 0);
                check!(
                    new == expected || rc == 6,
                    "guest is new: {new}, and {cmd} says {done}"
                );
                tally.codes.push(rc);
            }
            if !hit {
                break;
            }
            // Every other time the next run does so by itself.
            if nth % 2 == 0 {
                subject.recover(ctx, &mut tally)?;
            }
            if nth % 16 == 0 {
                subject.progresses()?;
            }
            nth += step;
        }
        subject.prepare(ctx, None)?;
        subject.recover(ctx, &mut tally)?;
        nothing_left(ctx)?;
        eprintln!("{name}: {action}, {what} at place 1 to {nth}: {tally:?}");
    }
    Ok(())
}

/// Stops a run at a place inside its pause, with the guardian stopped before it can notice, and kills both.
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

fn both_die(ctx: &mut Ctx, kind: Kind) -> Result<(), Verdict> {
    let subject = Subject::new(ctx, kind)?;
    let name = &subject.guest.name;
    // In a write, after its first access; and when all is written, if that pause was the one.
    for (place, results) in [
        ("3:stop:mark writing", &["undone"][..]),
        ("1:stop:mark unpausing", &["finished", "undone"]),
    ] {
        for by_itself in [false, true] {
            both_killed(ctx, &subject, place)?;
            if by_itself {
                let out = ctx
                    .dom0
                    .sh(&format!("xen-locus apply {name} /payloads/{PAIR}.ko"))?;
                let told = out.err_text();
                check!(
                    out.rc == 0 && results.iter().any(|result| told.contains(result)),
                    "{} {told}",
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
    subject.prepare(ctx, None)?;
    nothing_left(ctx)
}

/// Kills both, the guest being paused. The guardian may be quicker than the script that is to stop it:
/// then nothing is shown, and it is done again.
fn both_killed(ctx: &Ctx, subject: &Subject, place: &str) -> Result<(), Verdict> {
    const TRIES: u32 = 8;
    let name = &subject.guest.name;
    let mut said = String::new();
    ctx.dom0
        .put("/tmp/both-die.sh", 0o755, BOTH_DIE.as_bytes())?;
    for _ in 0..TRIES {
        subject.prepare(ctx, None)?;
        said = ctx
            .dom0
            .ok(&format!("sh /tmp/both-die.sh '{place}' {name}"))?;
        let state = said.lines().find_map(|l| l.strip_prefix("state "));
        if state.is_some_and(|s| s.contains('p')) {
            return Ok(());
        }
        check!(
            said.contains("died at work"),
            "neither paused nor settled: {said}"
        );
    }
    Err(Verdict::failure(format!(
        "the guardian was quicker each of {TRIES} times: {said}"
    )))
}

/// A run and its guardian are killed in the middle of a write, then the `recover` that settles it at its first
/// place, at its next one, and so on in steps of `step`.
fn recover_dies(ctx: &mut Ctx, kind: Kind, step: u32) -> Result<(), Verdict> {
    let mut subject = Subject::new(ctx, kind)?;
    let name = subject.guest.name.clone();
    let mut tally = Tally::default();
    let mut nth = 1;
    loop {
        both_killed(ctx, &subject, "3:stop:mark writing")?;
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
    subject.prepare(ctx, None)?;
    nothing_left(ctx)?;
    eprintln!(
        "{name}: recover, killed at place 1 to {nth}: {} kills",
        tally.kills
    );
    Ok(())
}

fn no_journal(ctx: &mut Ctx, kind: Kind) -> Result<(), Verdict> {
    let subject = Subject::new(ctx, kind)?;
    subject.prepare(ctx, None)?;
    let name = &subject.guest.name;
    let apply = format!("xen-locus apply {name} /payloads/{PAIR}.ko");
    for (place, options) in [
        ("/var/lib/xen-locus/journal", "ro"),
        ("/var/lib/xen-locus/journal", "size=4k"),
        ("/run/xen-locus/guard", "size=4k"),
    ] {
        let out = ctx.dom0.sh(&format!(
            "mkdir -p {place}; mount -t tmpfs -o {options} none {place} || exit 64
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
    subject.prepare(ctx, None)?;
    unrecorded(ctx, &subject, &apply)?;
    subject.prepare(ctx, None)?;
    nothing_left(ctx)
}

/// Where the audit log has no room what was done is done, and the next run records it.
fn unrecorded(ctx: &Ctx, subject: &Subject, apply: &str) -> Result<(), Verdict> {
    let (name, log) = (&subject.guest.name, "/var/log/xen-locus");
    let out = ctx.dom0.sh(&format!(
        "mkdir -p {log}; mount -t tmpfs -o size=4k none {log} || exit 64
         echo full >{log}/file; {apply}; rc=$?; umount {log}; exit $rc"
    ))?;
    check!(
        out.rc == 0 && out.err_text().contains("not recorded"),
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
fn no_memory(ctx: &mut Ctx, kind: Kind) -> Result<(), Verdict> {
    let mut subject = Subject::new(ctx, kind)?;
    let name = subject.guest.name.clone();
    let mut tally = Tally::default();
    let mut said = BTreeMap::<String, u32>::new();
    for (action, before, command) in ACTIONS {
        let command = command.replace("{}", &name);
        // KiB of address space: less does not load the libraries.
        let mut limit = 12_000;
        loop {
            check!(limit < 4 << 20, "{action} takes more than 4 GiB");
            subject.prepare(ctx, before)?;
            let was = subject.is_new()?;
            let cmd = format!("sh -c 'ulimit -v {limit}; exec xen-locus --no-cache {command}'");
            let done = subject.kill(ctx, "", &cmd, &mut tally)?;
            let rc = done["rc"].as_i64();
            let told = done["stderr"].as_str().unwrap_or_default();
            let what = format!("{action} with {limit} KiB: {done}");
            let last = told.lines().last().unwrap_or_default();
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
            *said.entry(format!("{rc:?} {}", why(last))).or_default() += 1;
            subject.recover(ctx, &mut tally)?;
            limit += limit / 3;
        }
        subject.progresses()?;
        eprintln!("{name}: {action} takes {limit} KiB");
    }
    subject.prepare(ctx, None)?;
    nothing_left(ctx)?;
    check!(
        said.keys().any(|s| s.contains("out of memory")),
        "memory was never the matter: {said:?}"
    );
    eprintln!("{name}: {said:#?}");
    Ok(())
}

/// A message without the numbers in it.
fn why(message: &str) -> String {
    message.chars().filter(|c| !c.is_ascii_digit()).collect()
}

/// No guardian and no file of one is left.
fn nothing_left(ctx: &Ctx) -> Result<(), Verdict> {
    // Of guests that an earlier scenario destroyed in the middle something may be noted still.
    ctx.dom0.ok("xen-locus recover")?;
    std::thread::sleep(Duration::from_millis(500));
    let left = ctx
        .dom0
        .ok("ls /run/xen-locus/guard /var/lib/xen-locus/journal | grep -v : ; ps | grep xen-locus-guardia[n]; true")?;
    check_eq!(left, "");
    Ok(())
}
