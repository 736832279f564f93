//! Payloads are parked in a PVH guest up to the last pages of its arena, and the guest takes them along when it is restored
//! and migrated. And `reclaim` of some is killed at each of its calls.

use std::thread;
use std::time::Duration;

use serde_json::Value;

use super::steps::guest_log::Log;
use super::steps::patches::{self, CMDLINE, PAIR, THREE};
use super::steps::tool::{self, shows_now};
use crate::consoles;
use crate::guest::{Guest, GuestSpec, Kind};
use crate::profile::PVH;
use crate::scenario::{Ctx, Scenario};
use crate::verdict::Verdict;
use crate::{check, check_eq};

/// Scenarios that take too long for a usual run.
pub const MATRIX: &[Scenario] = &[
    Scenario {
        name: "carried-pvh",
        summary: "a PVH guest whose arena is full is restored and migrated, and all of it is reclaimed there",
        profile: &PVH,
        run: carried,
    },
    Scenario {
        name: "reclaim-killed-pvh",
        summary: "reclaim of three payloads is killed at each write, and at each other call, of those of one name in a row at the first",
        profile: &PVH,
        run: reclaim_killed,
    },
];

/// A payload of more than fifty pages.
const LARGE: &str = "locus_many";
/// A payload of its own, by its digest.
const COPY: &str = "/tmp/carried.ko";
/// The arena is full enough if more pages than this are in use. There are 239.
const FULL: u64 = 225;
/// What `check` says when the arena has no more pages, and when the guest may have no more memory.
const NO_ROOM: [&str; 2] = ["arena pages in one run", "more pages of memory"];
/// The file that the guest is saved to.
const SAVED: &str = "/tmp/carried.saved";
/// What the guest is saved, restored or migrated in.
const MOVING: Duration = Duration::from_secs(300);
/// For a command that looks through all memory of a guest.
const SEARCHING: Duration = Duration::from_secs(1200);
/// What is found in the way of `reclaim` may go by itself.
const TRIES: u32 = 10;
/// Between two tries.
const BETWEEN: Duration = Duration::from_secs(2);

/// What a kernel logs when it is suspended and goes on elsewhere (`do_suspend`, drivers/xen/manage.c), and then what a busy
/// host makes it log.
const MOVED: &[&str] = &[
    "Freezing user space processes",
    "Freezing remaining freezable tasks",
    "OOM killer disabled",
    "suspending xenstore",
    "Grant tables using version",
    "OOM killer enabled",
    "Restarting tasks",
    "done.",
    "hrtimer: interrupt took",
    "clocksource",
    "sched: ",
    "random: crng",
];

fn carried(ctx: &mut Ctx) -> Result<(), Verdict> {
    let name = "carried-pvh";
    let spec = GuestSpec::new(name, Kind::Pvh);
    ctx.destroy_guest(name)?;
    let mut guest = ctx.ensure_guest(spec.clone())?;
    guest.start_workload()?;
    let log = Log::begin(ctx, &guest)?;
    check_eq!(pages(&arena(ctx, name)?, "used")?, 0, "pages in use before");
    let full = fill(ctx, name)?;
    let live = ["live", "", ""];
    shows_now(ctx, &guest, live, &[CMDLINE])?;
    log.nothing_new(ctx, &guest)?;

    let moves = [
        format!("xl save {name} {SAVED} >/dev/null && xl restore {SAVED} >/dev/null && rm {SAVED}"),
        format!(
            "xl migrate -s '' {name} 'xl migrate-receive' </dev/null >/tmp/carried.log 2>&1 || \
             {{ cat /tmp/carried.log >&2; exit 1; }}"
        ),
    ];
    for how in &moves {
        let (rounds, old) = (guest.rounds()?, guest.domid);
        let out = ctx.dom0.sh_timeout(how, MOVING)?;
        check_eq!(out.rc, 0, "`{how}`: {} {}", out.text(), out.err_text());
        guest = ctx.adopt_guest(spec.clone())?;
        check!(
            guest.domid != old,
            "it is domain {old} still, after `{how}`"
        );
        shows_now(ctx, &guest, live, &[CMDLINE])?;
        is_clean(ctx, name)?;
        check_eq!(arena(ctx, name)?, full, "the arena after `{how}`");
        thread::sleep(Duration::from_secs(1));
        guest.went_on(rounds)?;
        only_moved(&log, &guest)?;
        log.mark(ctx, &guest)?;
    }

    tool::revert(ctx, name, CMDLINE)?;
    shows_now(ctx, &guest, ["", "", ""], &[])?;
    guest.ok("killall spin-workload")?;
    reclaimed(ctx, name)?;
    check_eq!(pages(&arena(ctx, name)?, "used")?, 0, "pages in use after");
    let no_room = no_room(ctx, name, &patches::file(LARGE))?;
    check_eq!(no_room, None, "what check says after reclaim");
    tool::apply(ctx, name, CMDLINE)?;
    shows_now(ctx, &guest, live, &[CMDLINE])?;
    is_clean(ctx, name)?;
    tool::revert_all(ctx, name)?;
    log.nothing_new(ctx, &guest)?;
    ctx.destroy_guest(name)
}

/// Fills the arena with parked payloads, none of them twice: large ones, then small ones, each while there is room. Puts the
/// last one in force, and returns what `status` says of the arena then.
fn fill(ctx: &Ctx, name: &str) -> Result<Value, Verdict> {
    let (large, _) = park(ctx, name, LARGE)?;
    let (small, no_room) = park(ctx, name, CMDLINE)?;
    check!(large > 0 && small > 0, "{large} large ones, {small} small");
    // It has pages already.
    let file = copy(ctx, CMDLINE, small - 1)?;
    ctx.dom0.ok(&format!("xen-locus apply {name} {file}"))?;
    let full = arena(ctx, name)?;
    let said =
        format!("{name}: {large} large payloads and {small} small ones: {full}; then: {no_room}");
    ctx.dom0.note(&said);
    eprintln!("xtest: {said}");
    check!(pages(&full, "used")? > FULL, "{said}");
    Ok(full)
}

/// Applies and reverts copies of a payload until there is no room for one. Returns how many there are, and what `check` said.
fn park(ctx: &Ctx, name: &str, patch: &str) -> Result<(u32, String), Verdict> {
    let mut count = 0;
    loop {
        let file = copy(ctx, patch, count)?;
        if let Some(said) = no_room(ctx, name, &file)? {
            return Ok((count, said));
        }
        ctx.dom0.ok(&format!("xen-locus apply {name} {file}"))?;
        tool::revert(ctx, name, patch)?;
        count += 1;
    }
}

/// The same payload with other bytes behind it.
fn copy(ctx: &Ctx, patch: &str, n: u32) -> Result<String, Verdict> {
    let file = patches::file(patch);
    ctx.dom0
        .ok(&format!("cat {file} >{COPY} && echo {n} >>{COPY}"))?;
    Ok(COPY.to_owned())
}

/// What `check` says of a payload for which there is no room; `None` if there is. It must say nothing else against it.
fn no_room(ctx: &Ctx, name: &str, file: &str) -> Result<Option<String>, Verdict> {
    let out = ctx.dom0.sh(&format!("xen-locus check {name} {file}"))?;
    let said = out.err_text();
    if out.rc == 0 {
        return Ok(None);
    }
    let is_room = NO_ROOM.iter().any(|words| said.contains(words));
    check!(out.rc == 3 && is_room, "check {file}: {} {said}", out.rc);
    Ok(Some(said))
}

/// How full the arena is, as `status` says.
fn arena(ctx: &Ctx, name: &str) -> Result<Value, Verdict> {
    Ok(tool::status(ctx, name)?["arena"].clone())
}

/// A number of pages in that.
fn pages(arena: &Value, what: &str) -> Result<u64, Verdict> {
    let number = arena[what].as_u64();
    number.ok_or_else(|| Verdict::failure(format!("no {what}: {arena}")))
}

/// Checks that `verify` finds no difference. Returns what it says.
fn is_clean(ctx: &Ctx, name: &str) -> Result<Value, Verdict> {
    let said = ctx.json(&format!("xen-locus -o json verify {name}"))?;
    check_eq!(said["result"], "clean", "{said}");
    Ok(said)
}

/// Checks that the guest logged nothing since the mark but that it was suspended and went on.
fn only_moved(log: &Log, guest: &Guest) -> Result<(), Verdict> {
    let said = consoles::read(&log.since(guest)?);
    // The runner knows how often the machine stood still, and judges stalls by that.
    let judged = consoles::judge(said.reports, &[], usize::MAX);
    let is_new = |line: &String| !MOVED.iter().any(|words| line.contains(words));
    let mut new: Vec<String> = said.others.into_iter().filter(is_new).collect();
    new.extend(judged.wrong.into_iter().flat_map(|report| report.lines));
    check!(
        new.is_empty(),
        "new in the guest's kernel log:\n{}",
        new.join("\n")
    );
    Ok(())
}

/// Reclaims all that is parked.
fn reclaimed(ctx: &Ctx, name: &str) -> Result<(), Verdict> {
    let mut said = String::new();
    for _ in 0..TRIES {
        let reclaim = format!("xen-locus reclaim {name}");
        let out = ctx.dom0.sh_timeout(&reclaim, SEARCHING)?;
        if out.rc == 0 {
            return Ok(());
        }
        said = out.err_text();
        check_eq!(out.rc, 2, "reclaim: {said}");
        thread::sleep(BETWEEN);
    }
    Err(Verdict::failure(format!("reclaim never succeeds: {said}")))
}

/// The payloads whose `reclaim` is killed, in the order in which they are parked.
const PARKED: [&str; 3] = [PAIR, CMDLINE, THREE];
/// How many there are.
const ALL: usize = PARKED.len();
/// No part of `reclaim` has so many calls.
const CALLS_MAX: u32 = 400;
/// The first calls with which a payload is taken out of the guest's lists.
const WRITES: [&str; 2] = ["mark writing", "write to the guest"];
/// The last call of a step in which one of them is taken out of the guest's lists.
const STEP_ENDS: &str = "guard: let go";
/// What a program with faults says before it is killed, and then the name of the call.
const KILLED_AT: &str = "xen-locus: fault: kill at ";

fn reclaim_killed(ctx: &mut Ctx) -> Result<(), Verdict> {
    let name = "reclaimed-pvh";
    ctx.destroy_guest(name)?;
    // Small, because all of its memory is looked through hundreds of times.
    let guest = ctx.ensure_guest(GuestSpec::new(name, Kind::Pvh).memory(112))?;
    each_call(ctx, &guest)?;
    ctx.destroy_guest(name)
}

fn each_call(ctx: &Ctx, guest: &Guest) -> Result<(), Verdict> {
    let log = Log::begin(ctx, guest)?;
    let mut subject = Subject {
        ctx,
        guest,
        there: 0,
        listed: 0,
    };
    let mut steps = Vec::new();
    for out in 0..ALL {
        steps.push((
            subject.before_writing(out)?,
            subject.killed_from_writing(out)?,
        ));
    }
    let (last, left) = subject.killed_from_last_look()?;
    let said = format!(
        "{}: calls before the writes and from there on: {steps:?}; from the last look on: {last}",
        guest.name
    );
    ctx.dom0.note(&said);
    eprintln!("xtest: {said}");
    let enough = steps
        .iter()
        .all(|(before, writing)| *before > 10 && *writing > 5);
    check!(enough && last > 30, "{said}");
    check_eq!(left, [true; ALL + 1], "how many were left after a kill");
    subject.make(0)?;
    reclaimed(ctx, &guest.name)?;
    subject.look()?;
    check_eq!((subject.there, subject.listed), (0, 0), "payloads left");
    patches::cmdline_is_untouched(guest)?;
    log.nothing_new(ctx, guest)
}

/// How a run of `reclaim` ended that was to be killed.
enum Ended {
    /// It was killed, at the call with this name.
    Killed(String),
    /// By itself: it has not so many calls.
    Done,
    /// Something was in its way, which may go by itself.
    Blocked(String),
}

/// The guest, and what became of its payloads.
struct Subject<'a> {
    ctx: &'a Ctx,
    guest: &'a Guest,
    /// How many have pages.
    there: usize,
    /// How many of these the guest lists as modules. The others are out of its lists.
    listed: usize,
}

impl Subject<'_> {
    /// Counts the payloads. `verify` must find no difference.
    fn look(&mut self) -> Result<(), Verdict> {
        let said = is_clean(self.ctx, &self.guest.name)?;
        let there = said["parked"]
            .as_u64()
            .and_then(|n| usize::try_from(n).ok());
        self.there = there.ok_or_else(|| Verdict::failure(format!("no parked: {said}")))?;
        let lines = self.guest.ok("grep -c '^locus_' /proc/modules || true")?;
        self.listed = lines
            .parse()
            .map_err(|_| Verdict::Error(format!("lines of /proc/modules: {lines:?}")))?;
        Ok(())
    }

    /// Makes all be parked, and so many of them be out of the guest's lists.
    fn make(&mut self, out: usize) -> Result<(), Verdict> {
        let name = self.guest.name.clone();
        for round in 0..TRIES {
            let is_out = self.there.saturating_sub(self.listed);
            if self.there == ALL && is_out == out {
                return Ok(());
            }
            if self.there == ALL && is_out < out {
                // The run ends when the next one is out.
                self.kill(1, "mark unpausing")?;
                continue;
            }
            if is_out > out || round > 0 {
                reclaimed(self.ctx, &name)?;
                self.there = 0;
            }
            // That which was parked last goes first.
            for patch in PARKED.iter().skip(self.there) {
                tool::apply(self.ctx, &name, patch)?;
                tool::revert(self.ctx, &name, patch)?;
            }
            self.look()?;
        }
        let Self { there, listed, .. } = self;
        Err(Verdict::failure(format!(
            "{there} payloads are there and {listed} of them listed, expected that {out} of {ALL} are not"
        )))
    }

    /// Kills `reclaim` of all at its `nth` call, counted from the first one called `from`, and lets `recover` resolve it.
    fn kill(&mut self, nth: u32, from: &str) -> Result<Ended, Verdict> {
        let name = &self.guest.name;
        let command =
            format!("XEN_LOCUS_FAULT='{nth}:kill:{from}' xen-locus-faults reclaim {name}");
        let out = self.ctx.dom0.sh_timeout(&command, SEARCHING)?;
        let said = out.err_text();
        let call = said.lines().find_map(|line| line.split_once(KILLED_AT));
        let ended = match (call, out.rc) {
            (Some((_, call)), _) => Ended::Killed(call.to_owned()),
            (None, 0) => Ended::Done,
            (None, 2) => Ended::Blocked(said),
            (None, rc) => return Err(Verdict::failure(format!("`{command}`: {rc} {said}"))),
        };
        let recovered = self.ctx.dom0.sh(&format!("xen-locus recover {name}"))?;
        let why = recovered.err_text();
        check_eq!(recovered.rc, 0, "recover after `{command}`: {why}");
        self.look()?;
        Ok(ended)
    }

    /// The same while so many are out of the guest's lists. Returns the name of the call; `None` if the run has not so many.
    fn killed(&mut self, out: usize, nth: u32, from: &str) -> Result<Option<String>, Verdict> {
        let mut why = String::new();
        for _ in 0..TRIES {
            self.make(out)?;
            match self.kill(nth, from)? {
                Ended::Killed(call) => return Ok(Some(call)),
                Ended::Done => return Ok(None),
                Ended::Blocked(said) => why = said,
            }
            thread::sleep(BETWEEN);
        }
        Err(Verdict::failure(format!("reclaim never succeeds: {why}")))
    }

    /// Kills the step that takes the next one out of the guest's lists at each call up to its first write. Returns how many
    /// these are.
    fn before_writing(&mut self, out: usize) -> Result<u32, Verdict> {
        for nth in 1..CALLS_MAX {
            let call = self.killed(out, nth, "journal:rows")?;
            let Self { there, listed, .. } = *self;
            // It may pass a few calls more or less than the last time.
            let taken_out = ALL.saturating_sub(listed + out);
            check!(
                call.is_some() && there == ALL && taken_out <= 1,
                "killed at {call:?}, with {out} out: {there} there, {listed} listed"
            );
            if taken_out == 1 || call.is_some_and(|call| WRITES.contains(&&*call)) {
                return Ok(nth);
            }
        }
        Err(Verdict::failure("it does not write"))
    }

    /// Kills that step at each call from its first write on. Returns how many these are.
    fn killed_from_writing(&mut self, out: usize) -> Result<u32, Verdict> {
        let (mut undone, mut done) = (0, 0);
        for nth in 1..CALLS_MAX {
            let call = self.killed(out, nth, "mark writing")?;
            let Self { there, listed, .. } = *self;
            let what = format!("{call:?}, with {out} out: {there} there, {listed} listed");
            check!(call.is_some() && there == ALL, "killed at {what}");
            match ALL.saturating_sub(listed + out) {
                0 => undone += 1,
                1 => done += 1,
                _ => return Err(Verdict::failure(format!("killed at {what}"))),
            }
            if call.as_deref() == Some(STEP_ENDS) {
                check!(
                    undone > 2 && done > 2,
                    "{undone} undone, {done} done: {what}"
                );
                return Ok(nth);
            }
        }
        Err(Verdict::failure("its step does not end"))
    }

    /// Kills the last look and the steps that give back memory at each call, all being out of the guest's lists. Returns how
    /// many these are; and for each number of payloads whether so many were left after a kill.
    fn killed_from_last_look(&mut self) -> Result<(u32, [bool; ALL + 1]), Verdict> {
        let mut left = [false; ALL + 1];
        for nth in 1..CALLS_MAX {
            let call = self.killed(ALL, nth, "mark pausing:rows")?;
            let Self { there, listed, .. } = *self;
            check!(
                there <= ALL && listed == 0,
                "killed at {call:?}: {there} there, {listed} listed"
            );
            if call.is_none() {
                check_eq!(there, 0, "payloads left after reclaim");
                return Ok((nth - 1, left));
            }
            left[there] = true;
        }
        Err(Verdict::failure("it does not end"))
    }
}
