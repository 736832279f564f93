//! One daemon works for two guests, and is killed with both workers while both guests are paused: each request is carried out once.

use std::time::Duration;

use super::steps::patches::{self, PAIR};
use super::steps::{daemon, tool, wait};
use crate::guest::{Guest, GuestSpec, Kind};
use crate::profile::PV1;
use crate::scenario::{Ctx, Scenario};
use crate::verdict::Verdict;
use crate::{check, check_eq};

/// Scenarios that take too long for a usual run.
pub const MATRIX: &[Scenario] = &[Scenario {
    name: "two-paused-pv",
    summary: "a daemon and its two workers are killed at each call while both guests are paused: each request is carried out once",
    profile: &PV1,
    run: two_paused,
}];

/// The guests.
const NAMES: [&str; 2] = ["one", "two"];
/// What the daemon says.
const LOG: &str = "/var/log/daemon.log";
/// Longest time until both runs are held: they share one emulated processor with their guests.
const HELD: Duration = Duration::from_secs(90);
/// Longest wait until a guest runs again.
const RUNS: Duration = Duration::from_secs(30);
/// Longest wait for an answer.
const ANSWER: Duration = Duration::from_secs(360);
/// The fewest calls at which both must have been killed: two marks, a write for each function, and the call that unpauses.
const FEWEST: u32 = 5;
/// More calls than a pause has.
const MOST: u32 = 40;
/// How often a run may not be held: its guardian was quicker than the script that is to stop it, or its first attempt failed, and
/// the next one needs the guardian.
const MISSES: u32 = 6;

/// Holds the runs of two requests in their guests' pauses: stops the guardian of each when that is prepared, and waits until the
/// run is stopped at its fault. Prints the ids of runs and guardians, and a line for each run that is held. From the moment at which
/// there may be a guardian until that is stopped, it starts no process: that would take too long. If a run is not held, it
/// kills the daemon, which would begin the request again and again.
const HOLD: &str = r#"
exec 2>/dev/null
daemon=$1
# Sets found to the child of process $1 whose command line ends with $2.
child() {
	for f in /proc/$1/task/*/children; do
		all=
		read -r all <$f
		for found in $all; do
			line=
			read -r line </proc/$found/cmdline
			case "$line" in *"$2") return 0 ;; esac
		done
	done
	return 1
}
hold() {
	until child $daemon "--work=request/$1"; do
		[ -e /proc/$daemon ] || return 1
		usleep 20000
	done
	run=$found
	echo "run $run"
	until child $run xen-locus-guardian; do [ -e /proc/$run ] || return 1; done
	guardian=$found
	# One that waits (in futex, system call 202) is prepared.
	until read -r call _ </proc/$guardian/syscall && [ "$call" = 202 ]; do [ -e /proc/$run ] || return 1; done
	kill -STOP $guardian
	echo "guardian $guardian"
	for i in $(seq 500); do
		read -r _ _ state _ </proc/$run/stat || return 1
		read -r _ _ other _ </proc/$guardian/stat || return 1
		[ "$state$other" = TT ] && echo held && return 0
		usleep 20000
	done
	return 1
}
# First comes what the daemon does for itself.
until [ "$(xenstore-read /tool/xen-locus/pid)" = $daemon ]; do
	[ -e /proc/$daemon ] || exit 1
	usleep 100000
done
sleep 1
while [ -n "$(cat /proc/$daemon/task/*/children)" ]; do usleep 100000; done
sh -c "$2"
{ hold $3 || kill -KILL $daemon; } &
{ hold $4 || kill -KILL $daemon; } &
wait
"#;

/// How many of the guests are paused.
fn count_paused(ctx: &Ctx) -> Result<usize, Verdict> {
    let [one, two] = NAMES;
    let states = ctx.dom0.ok(&format!(
        "xl list | awk '$1 == \"{one}\" || $1 == \"{two}\" {{print $5}}'"
    ))?;
    check_eq!(states.lines().count(), NAMES.len(), "guests: {states}");
    Ok(states.lines().filter(|state| state.contains('p')).count())
}

/// Checks that the guest goes on from here.
fn goes_on(guest: &Guest) -> Result<(), Verdict> {
    let before = guest.rounds()?;
    wait::until(RUNS, || {
        let now = guest.rounds()?;
        Ok(match now > before {
            true => Ok(()),
            false => Err(format!("{} stays at round {before}", guest.name)),
        })
    })
}

/// A failure, with what the daemon said.
fn with_log(ctx: &Ctx, verdict: &Verdict) -> Verdict {
    let log = ctx.dom0.sh(&format!("tail -n 40 {LOG}"));
    let log = log.map_or_else(|e| e.to_string(), |out| out.text());
    Verdict::failure(format!("{verdict}\nthe daemon said: {log}"))
}

/// A daemon that works for both guests, and whose runs were to be held.
struct Held {
    daemon: String,
    runs: Vec<String>,
    guardians: Vec<String>,
    /// Runs that are stopped at the fault, whose guardians are stopped too.
    count: usize,
    /// What the script printed.
    said: String,
}

impl Held {
    /// Starts the daemon, makes these requests, and holds their runs at this call, counted from the mark before the first write.
    fn new(ctx: &Ctx, nth: u32, ids: &[String; 2], ops: [&str; 2]) -> Result<Self, Verdict> {
        ctx.dom0.ok(&format!("rm -f {LOG}"))?;
        daemon::start_as(
            ctx,
            &format!("env 'XEN_LOCUS_FAULT={nth}:stop:mark writing' xen-locus-faults daemon"),
            LOG,
        )?;
        let pid = ctx.dom0.ok("cat /run/daemon.pid")?;
        let [first, second] = ids;
        let submit = [
            daemon::submission(first, ops[0], NAMES[0], PAIR),
            daemon::submission(second, ops[1], NAMES[1], PAIR),
        ];
        let said = ctx.dom0.sh_timeout(
            &format!(
                "sh /tmp/hold-both.sh {pid} '{}' {first} {second}",
                submit.join("; ")
            ),
            HELD,
        )?;
        let said = said.text();
        let of = |what: &str| -> Vec<String> {
            let lines = said.lines().filter_map(|line| line.strip_prefix(what));
            lines.map(str::to_owned).collect()
        };
        Ok(Self {
            daemon: pid,
            runs: of("run "),
            guardians: of("guardian "),
            count: of("held").len(),
            said,
        })
    }

    /// Kills the runs and the daemon by their ids, and waits until they are gone. The runs come first: if the daemon dies while
    /// they are stopped, the kernel lets the process group that it leaves behind go on (`kill_orphaned_pgrp`, kernel/exit.c).
    fn kill(&self, ctx: &Ctx) -> Result<(), Verdict> {
        let ids = format!("{} {}", self.runs.join(" "), self.daemon);
        ctx.dom0.ok(&format!(
            "kill -KILL {ids}; for id in {ids}; do while [ -e /proc/$id ] && ! grep -q ') Z' /proc/$id/stat; do usleep 10000; done; done"
        ))?;
        Ok(())
    }

    /// Lets the guardians go on, and waits until they let the guests run.
    fn let_run(&self, ctx: &Ctx, guests: &[Guest]) -> Result<(), Verdict> {
        for guardian in &self.guardians {
            // It may have ended before it could be stopped.
            ctx.dom0.sh(&format!("kill -CONT {guardian}"))?;
        }
        wait::until(RUNS, || {
            Ok(match count_paused(ctx)? {
                0 => Ok(()),
                n => Err(format!("the guardians leave {n} of the guests paused")),
            })
        })?;
        guests.iter().try_for_each(goes_on)
    }
}

/// Where both runs were when they were held.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    /// In their pauses.
    InPause,
    /// One of them behind its pause.
    Behind,
    /// One was not held.
    Missed,
}

/// The guests, and what is asked of them in the next round.
struct Rounds {
    guests: Vec<Guest>,
    ops: [&'static str; 2],
    count: u32,
}

impl Rounds {
    /// One request for each guest, whose runs are killed with their daemon at this call. The guests change their parts after it.
    fn hold_and_kill(&mut self, ctx: &Ctx, nth: u32) -> Result<Place, Verdict> {
        let round = self.count;
        self.count += 1;
        let mut before = Vec::new();
        for name in NAMES {
            before.push(tool::actions(ctx, name)?.len());
        }
        let ids = self.ops.map(|op| format!("both-{op}-{round}"));
        let held = Held::new(ctx, nth, &ids, self.ops)?;
        let place = match (held.count, count_paused(ctx)?) {
            (2, 2) => Place::InPause,
            (2, _) => Place::Behind,
            _ => Place::Missed,
        };
        if place == Place::Missed {
            eprintln!(
                "two-paused-pv: round {round}, call {nth}: not both were held: {:?}",
                held.said
            );
        }
        held.kill(ctx)?;
        if place == Place::InPause {
            check_eq!(count_paused(ctx)?, 2, "paused guests whose runs are dead");
        }
        let runs = held.let_run(ctx, &self.guests);
        runs.map_err(|verdict| with_log(ctx, &verdict))?;
        daemon::start(ctx)?;
        for (i, id) in ids.iter().enumerate() {
            let done = self.is_done(ctx, i, before[i], id);
            done.map_err(|verdict| with_log(ctx, &verdict))?;
        }
        daemon::stop(ctx)?;
        self.ops.reverse();
        Ok(place)
    }

    /// Checks that the request for a guest is carried out, once, and that the guest is as it should be.
    fn is_done(&self, ctx: &Ctx, i: usize, before: usize, id: &str) -> Result<(), Verdict> {
        let (name, guest) = (NAMES[i], &self.guests[i]);
        daemon::answered(ctx, id, ANSWER)?;
        daemon::was_carried_out_once(ctx, name, before, id)?;
        let applied = self.ops[i] == "apply";
        let phase = if applied { "after" } else { "before" };
        patches::check(guest, PAIR, phase)?;
        let expected: &[&str] = if applied { &[PAIR] } else { &[] };
        tool::in_force(ctx, guest, expected)?;
        ctx.dom0.ok(&format!("xen-locus verify {name}"))?;
        goes_on(guest)
    }
}

fn two_paused(ctx: &mut Ctx) -> Result<(), Verdict> {
    ctx.expects_long_pauses();
    ctx.destroy_all()?;
    let mut guests = Vec::new();
    for name in NAMES {
        let guest = ctx.ensure_guest(GuestSpec::new(name, Kind::Pv))?;
        patches::put_check(&guest, PAIR)?;
        guest.start_workload()?;
        guests.push(guest);
    }
    tool::apply(ctx, NAMES[1], PAIR)?;
    ctx.dom0.put("/tmp/hold-both.sh", 0o755, HOLD.as_bytes())?;
    let mut rounds = Rounds {
        guests,
        ops: ["apply", "revert"],
        count: 0,
    };
    let (mut shown, mut misses) = (0, 0);
    loop {
        // Two rounds for each call.
        let nth = shown / 2 + 1;
        check!(nth <= MOST, "both guests are still paused at call {MOST}");
        match rounds.hold_and_kill(ctx, nth)? {
            Place::InPause => shown += 1,
            Place::Behind => break,
            Place::Missed => misses += 1,
        }
        check!(
            misses <= MISSES,
            "{misses} times a run was not held, and {shown} times both were"
        );
    }
    eprintln!("two-paused-pv: both guests were paused {shown} times, and {misses} times not both");
    check!(
        shown >= 2 * FEWEST,
        "both guests were paused {shown} times only: it shows nothing"
    );
    ctx.destroy_all()
}
