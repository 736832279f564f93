//! A guest changes its memory while dom0 reads it, uses what dom0 wrote, or floods XenStore. dom0 reports what
//! it saw, and nothing but that guest is harmed.
//!
//! `patches/test/hostile` is the module in that guest.

use std::time::{Duration, Instant};

mod ends;

use ends::Ends;

use super::steps::patches::{self, CMDLINE, CMDLINE_FILE};
use super::steps::{daemon, tool};
use crate::guest::{Guest, GuestSpec, Kind};
use crate::profile::{PV, PV1, PVH};
use crate::scenario::{Ctx, Scenario};
use crate::verdict::Verdict;
use crate::{check, check_eq};

/// Scenarios that are short enough for a usual run.
pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "hostile-own-pv",
        summary: "a PV guest that uses the arena's addresses or pages itself is refused, and its data is intact",
        profile: &PV1,
        run: |ctx| own(ctx, Kind::Pv),
    },
    Scenario {
        name: "hostile-remap-pv",
        summary: "a PV guest whose arena is mapped elsewhere is refused by name, and nothing is written",
        profile: &PV1,
        run: |ctx| remap(ctx, Kind::Pv),
    },
    Scenario {
        name: "hostile-store-pv",
        summary: "a PV guest floods XenStore with nonsense, and the daemon still serves another guest",
        profile: &PV1,
        run: |ctx| store(ctx, 3),
    },
    Scenario {
        name: "hostile-flip-pv",
        summary: "a PV guest changes its names, types, lists and page tables while they are read",
        profile: &PV,
        run: |ctx| flip(ctx, Kind::Pv, &["flip"], 1),
    },
    Scenario {
        name: "hostile-arena-pv",
        summary: "a PV guest changes directory and records of the arena while they are read",
        profile: &PV,
        run: |ctx| arena(ctx, Kind::Pv, 1),
    },
    Scenario {
        name: "hostile-own-pvh",
        summary: "a PVH guest that uses the arena's addresses itself is refused, and its data is intact",
        profile: &PVH,
        run: |ctx| own(ctx, Kind::Pvh),
    },
    Scenario {
        name: "hostile-remap-pvh",
        summary: "a PVH guest whose arena is mapped elsewhere is refused by name, and nothing is written",
        profile: &PVH,
        run: |ctx| remap(ctx, Kind::Pvh),
    },
    Scenario {
        name: "hostile-flip-pvh",
        summary: "a PVH guest changes its names, types, lists and page tables while they are read",
        profile: &PVH,
        run: |ctx| flip(ctx, Kind::Pvh, &["flip"], 1),
    },
    Scenario {
        name: "hostile-arena-pvh",
        summary: "a PVH guest changes directory and records of the arena while they are read",
        profile: &PVH,
        run: |ctx| arena(ctx, Kind::Pvh, 1),
    },
];

/// Scenarios that take too long for a usual run.
pub const MATRIX: &[Scenario] = &[
    Scenario {
        name: "hostile-soak-pv",
        summary: "all attacks of a PV guest many times, one at a time and all at once",
        profile: &PV,
        run: |ctx| soak(ctx, Kind::Pv),
    },
    Scenario {
        name: "hostile-soak-pvh",
        summary: "all attacks of a PVH guest many times, one at a time and all at once",
        profile: &PVH,
        run: |ctx| soak(ctx, Kind::Pvh),
    },
];

const NAME: &str = "hostile";
/// The most additional rounds until something is noticed.
const ROUNDS_MORE: u32 = 8;
/// Turns that the guest must have made. Each changes everything that the mode changes, or changes it back.
const TURNS: u64 = 100;
/// The parameters of the module: its mode, and its state.
const MODULE: &str = "/sys/module/locus_hostile/parameters";

/// The hostile guest, and a neighbour that must not be affected.
struct Pair {
    guest: Guest,
    neighbour: Guest,
    /// What [`Pair::beside`] returned first.
    before: String,
    ends: Ends,
    longest: Duration,
}

impl Pair {
    /// A guest with the module. If `fresh`, it was never patched.
    fn new(ctx: &mut Ctx, kind: Kind, fresh: bool) -> Result<Pair, Verdict> {
        if fresh {
            ctx.destroy_guest(NAME)?;
        }
        let guest = ctx.ensure_guest(GuestSpec::new(NAME, kind))?;
        let neighbour = ctx.ensure_guest(GuestSpec::new("neighbour", Kind::Pv))?;
        if guest.sh(&format!("[ -e {MODULE} ]"))?.rc != 0 {
            guest.insmod(&ctx.payloads.join("locus_hostile/locus_hostile.ko"))?;
        }
        // An earlier scenario may have failed in the middle.
        guest.ok(&format!("echo stop >{MODULE}/mode"))?;
        let mut pair = Pair {
            guest,
            neighbour,
            before: String::new(),
            ends: Ends::default(),
            longest: Duration::ZERO,
        };
        pair.before = pair.beside(ctx)?;
        Ok(pair)
    }

    /// What must not change: the neighbour's code and files, the memory that Xen gives it, and the processes
    /// of xen-locus in dom0.
    fn beside(&self, ctx: &Ctx) -> Result<String, Verdict> {
        let inside = self.neighbour.ok("cat /proc/version /proc/cmdline")?;
        let text = tool::text_digest(ctx, "neighbour")?;
        let outside = ctx
            .dom0
            .ok("xl list neighbour | awk 'NR == 2 {print $3, $4}'; \
             ls -l /proc/[0-9]*/exe 2>/dev/null | grep -o 'xen-locus[a-z-]*$'; \
             ls /run/xen-locus/guard 2>/dev/null; true")?;
        Ok(format!("{inside}\n{text}\n{outside}"))
    }

    /// Sets what the guest does.
    fn mode(&mut self, mode: &str) -> Result<(), Verdict> {
        self.guest.ok(&format!("echo {mode} >{MODULE}/mode"))?;
        self.ends.begin_mode();
        Ok(())
    }

    /// The number of turns that the guest made, and whether its own data is intact.
    fn state(&self) -> Result<(u64, bool), Verdict> {
        let text = self.guest.ok(&format!("cat {MODULE}/state"))?;
        let (rounds, data) = text.split_once(' ').unwrap_or_default();
        Ok((rounds.parse().unwrap_or(0), data == "intact"))
    }

    /// Runs a command about the guest. It must end soon, with one of the defined exit codes, and say why if it
    /// failed.
    fn command(&mut self, ctx: &Ctx, command: &str) -> Result<(i32, String), Verdict> {
        let done = tool::bounded(ctx, command)?;
        check!(
            (0..=6).contains(&done.rc) && done.rc != 4,
            "{command} ended with {}: {}",
            done.rc,
            done.said
        );
        check!(
            done.rc == 0 || !done.said.trim().is_empty(),
            "{command} ended with {} and said nothing",
            done.rc
        );
        self.ends.count(done.rc, &done.said);
        self.longest = self.longest.max(done.took);
        Ok((done.rc, done.said))
    }

    /// Runs each command once, without the cache of the guest. Any result is accepted.
    fn all_commands(&mut self, ctx: &Ctx) -> Result<(), Verdict> {
        for command in [
            format!("info {NAME}"),
            format!("status {NAME}"),
            format!("check {NAME} {CMDLINE_FILE}"),
            format!("apply {NAME} {CMDLINE_FILE} --timeout 2s"),
            format!("info {NAME} --stacks"),
            format!("blocking {NAME} {CMDLINE}"),
            format!("revert {NAME} {CMDLINE} --timeout 2s"),
            "list".to_owned(),
        ] {
            self.command(ctx, &format!("--no-cache {command}"))?;
        }
        Ok(())
    }

    /// Reads the guest while it stands still. What is wrong by then stays so: of lists that are wrong now and then, one of
    /// several tries finds them right.
    fn standing(&mut self, ctx: &Ctx) -> Result<(), Verdict> {
        ctx.dom0.ok(&format!("xl pause {NAME}"))?;
        let read = self.command(ctx, &format!("--no-cache info {NAME} --stacks"));
        ctx.dom0.ok(&format!("xl unpause {NAME}"))?;
        read.map(drop)
    }

    /// Runs all commands `rounds` times, then again until one has noticed something and the guest has made many
    /// turns, because scheduling decides how they collide. Returns the number of turns.
    fn rounds(&mut self, ctx: &Ctx, rounds: u32) -> Result<u64, Verdict> {
        for round in 0..rounds.saturating_add(ROUNDS_MORE) {
            let (turns, _) = self.state()?;
            if round >= rounds && self.ends.told() && turns > TURNS {
                return Ok(turns);
            }
            self.all_commands(ctx)?;
            self.standing(ctx)?;
        }
        let (turns, _) = self.state()?;
        check!(
            self.ends.told(),
            "no command noticed anything: {:?}",
            self.ends
        );
        check!(turns > TURNS, "the guest made {turns} turns only");
        Ok(turns)
    }

    /// Runs a command that must end with `rc` and say all of `words`.
    fn refused(
        &mut self,
        ctx: &Ctx,
        command: &str,
        rc: i32,
        words: &[&str],
    ) -> Result<(), Verdict> {
        let (found, said) = self.command(ctx, command)?;
        check_eq!(found, rc, "{command}: {said}");
        for word in words {
            check!(
                said.contains(word),
                "{command} does not say {word:?}: {said}"
            );
        }
        eprintln!("hostile: {command}: {found}: {}", said.trim());
        Ok(())
    }

    /// Whether the patch is in force, by the guest's own file.
    fn is_new(&self) -> Result<bool, Verdict> {
        patches::cmdline_is_live(&self.guest)
    }

    /// Names of the patches that are in force, by `status`.
    fn patches(&self, ctx: &Ctx) -> Result<Vec<String>, Verdict> {
        let status = tool::status(ctx, NAME)?;
        let patches = tool::patches_of(&status)?;
        let applied = patches.iter().filter(|p| p["state"] == "applied");
        Ok(applied
            .map(|p| p["name"].as_str().unwrap_or("?").to_owned())
            .collect())
    }

    /// The guest is no longer hostile: what is reported about it is true, and everything can be reverted.
    fn is_well(&mut self, ctx: &Ctx) -> Result<(), Verdict> {
        let recovered = self.command(ctx, &format!("recover {NAME}"))?;
        check_eq!(recovered.0, 0, "recover: {}", recovered.1);
        let applied = !self.patches(ctx)?.is_empty();
        check_eq!(
            applied,
            self.is_new()?,
            "status says applied, and the guest"
        );
        let undone = self.command(ctx, &format!("revert {NAME} --all"))?;
        check_eq!(undone.0, 0, "revert: {}", undone.1);
        check!(!self.is_new()?, "the guest still shows the patch");
        Ok(())
    }

    /// Checks that nothing else was harmed, and that nothing is left in dom0.
    fn nobody_hurt(&self, ctx: &Ctx, what: &str) -> Result<(), Verdict> {
        // A guardian ends shortly after its run.
        std::thread::sleep(Duration::from_millis(500));
        check_eq!(self.beside(ctx)?, self.before, "beside the hostile guest");
        let state = ctx
            .dom0
            .ok(&format!("xl list {NAME} | awk 'NR == 2 {{print $5}}'"))?;
        check!(!state.contains('p'), "the hostile guest is paused: {state}");
        eprintln!(
            "hostile: {what}: exit codes {:?}, in earlier modes {:?}, longest {:?}",
            self.ends.now, self.ends.before, self.longest
        );
        Ok(())
    }
}

/// The guest already uses what the arena needs when the first patch comes.
fn own(ctx: &mut Ctx, kind: Kind) -> Result<(), Verdict> {
    let mut pair = Pair::new(ctx, kind, true)?;
    let apply = format!("apply {NAME} {CMDLINE_FILE}");
    let uses: &[(&str, &str)] = match kind {
        Kind::Pv => &[
            ("data", "it is not empty"),
            ("free", "PG_reserved"),
            ("own", "no page of the arena"),
        ],
        _ => &[
            ("own", "no page of the arena"),
            ("table", "level1_fixmap_pgt"),
        ],
    };
    for (mode, words) in uses {
        pair.mode(mode)?;
        pair.refused(ctx, &apply, 3, &["arena", words])?;
        pair.all_commands(ctx)?;
        check!(pair.state()?.1, "{mode}: the guest's own data was changed");
        check!(!pair.is_new()?, "{mode}: it was applied");
        pair.mode("stop")?;
    }
    // After that the guest behaves like any other.
    check_eq!(pair.command(ctx, &apply)?.0, 0, "apply afterwards");
    check!(pair.is_new()?, "the patch is not in force");
    pair.is_well(ctx)?;
    pair.nobody_hurt(ctx, "own")
}

/// The guest maps the arena elsewhere while a patch is in force.
fn remap(ctx: &mut Ctx, kind: Kind) -> Result<(), Verdict> {
    let mut pair = Pair::new(ctx, kind, false)?;
    let applied = pair.command(ctx, &format!("apply {NAME} {CMDLINE_FILE}"))?;
    check_eq!(applied.0, 0, "apply: {}", applied.1);
    let mut ways = vec![
        ("clear", 3, "is mapped"),
        ("swap", 3, "no page of the arena"),
        ("code", 6, "no page of the arena"),
    ];
    if kind != Kind::Pv {
        ways.push(("table", 3, "level1_fixmap_pgt"));
    }
    for (mode, rc, words) in ways {
        pair.mode(mode)?;
        for command in [
            format!("status {NAME}"),
            format!("revert {NAME} {CMDLINE}"),
            format!("apply {NAME} {CMDLINE_FILE}"),
        ] {
            pair.refused(ctx, &command, rc, &["arena", words])?;
        }
        check!(pair.is_new()?, "{mode}: something was changed");
        pair.mode("stop")?;
        check_eq!(pair.patches(ctx)?, [CMDLINE], "after {mode}");
    }
    pair.is_well(ctx)?;
    pair.nobody_hurt(ctx, "remap")
}

/// The guest changes what dom0 reads while dom0 reads it.
fn flip(ctx: &mut Ctx, kind: Kind, modes: &[&str], rounds: u32) -> Result<(), Verdict> {
    let mut pair = Pair::new(ctx, kind, false)?;
    for mode in modes {
        pair.mode(mode)?;
        let turns = pair.rounds(ctx, rounds)?;
        pair.mode("stop")?;
        pair.is_well(ctx)?;
        pair.nobody_hurt(ctx, &format!("{mode}, {turns} turns"))?;
    }
    Ok(())
}

/// The guest changes what dom0 wrote while dom0 reads it, and leaves some of it changed.
fn arena(ctx: &mut Ctx, kind: Kind, rounds: u32) -> Result<(), Verdict> {
    for round in 0..rounds {
        let mut pair = Pair::new(ctx, kind, false)?;
        let applied = pair.command(ctx, &format!("apply {NAME} {CMDLINE_FILE}"))?;
        check_eq!(applied.0, 0, "apply: {}", applied.1);
        pair.mode("arena")?;
        let turns = pair.rounds(ctx, 2)?;
        pair.mode("stop")?;
        // By now its records may contain anything. Any result of a command is accepted.
        pair.all_commands(ctx)?;
        pair.command(ctx, &format!("recover {NAME}"))?;
        pair.guest.ok("cat /proc/cmdline /proc/modules")?;
        pair.nobody_hurt(ctx, &format!("arena, round {round}, {turns} turns"))?;
        ctx.destroy_guest(NAME)?;
    }
    // What it said of a guest that is gone is kept.
    ctx.dom0.ok("xen-locus recover")?;
    ctx.dom0.ok("rm -f /var/lib/xen-locus/journal/*")?;
    Ok(())
}

/// A command that prints what the daemon holds: memory in KiB, open files, mapped ranges of guests.
const HOLDS: &str = "p=$(cat /run/daemon.pid); awk '/VmRSS/ {print $2}' /proc/$p/status; \
                     ls /proc/$p/fd | wc -l; grep -c privcmd /proc/$p/maps; true";
/// How much its memory may grow after its first requests, in KiB.
const MORE: u64 = 4096;

fn store(ctx: &mut Ctx, rounds: u32) -> Result<(), Verdict> {
    let mut pair = Pair::new(ctx, Kind::Pv, false)?;
    daemon::start(ctx)?;
    let holds = || -> Result<Vec<u64>, Verdict> {
        let text = ctx.dom0.ok(HOLDS)?;
        Ok(text.lines().filter_map(|l| l.parse().ok()).collect())
    };
    let serve = |round: u32| -> Result<Duration, Verdict> {
        let began = Instant::now();
        for op in ["apply", "revert"] {
            let request = format!("flood-{op}-{round} op={op} domain=neighbour patch={CMDLINE}");
            daemon::ask(ctx, &request, "0", "")?;
        }
        Ok(began.elapsed())
    };
    let quiet = serve(0)?;
    let before = holds()?;
    pair.mode("store")?;
    let mut slowest = Duration::ZERO;
    for round in 1..=rounds {
        slowest = slowest.max(serve(round)?);
    }
    let (writes, _) = pair.state()?;
    pair.mode("stop")?;
    check!(writes > 50, "the guest wrote {writes} times only");
    let after = holds()?;
    eprintln!(
        "hostile: store: {writes} writes; apply and revert took {quiet:?}, then at most {slowest:?}; \
         the daemon held {before:?} and holds {after:?} (KiB, files, mappings)"
    );
    match (&*before, &*after) {
        (&[kib, files, maps], &[kib_now, files_now, maps_now]) => {
            check!(kib_now <= kib + MORE, "it grew from {kib} to {kib_now} KiB");
            check_eq!((files_now, maps_now), (files, maps), "files, mappings");
        }
        _ => {
            return Err(Verdict::failure(format!(
                "the daemon: {before:?} {after:?}"
            )))
        }
    }
    check_eq!(
        ctx.dom0.ok("xenstore-read /tool/xen-locus/state")?,
        "running"
    );
    daemon::stop(ctx)?;
    pair.nobody_hurt(ctx, "store")
}

fn soak(ctx: &mut Ctx, kind: Kind) -> Result<(), Verdict> {
    const MODES: &[&str] = &["names", "btf", "tasks", "pages", "flip"];
    flip(ctx, kind, MODES, 8)?;
    arena(ctx, kind, 8)?;
    if kind == Kind::Pv {
        store(ctx, 40)?;
    }
    Ok(())
}
