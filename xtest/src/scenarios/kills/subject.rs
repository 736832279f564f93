//! The guest at work on which the tool is killed, and what the kills of a scenario came to.

use std::time::Duration;

use serde_json::Value;

use super::actions::{Action, APPLY, REVERT};
use crate::guest::{Guest, GuestSpec, Kind};
use crate::scenario::Ctx;
use crate::scenarios::steps::patches::{self, words_of, PAIR, TWO, WORDS};
use crate::scenarios::steps::tool;
use crate::verdict::Verdict;
use crate::{check, check_eq};

/// Longest time for which a guest may be paused, the pause of the run that is killed included.
const PAUSE_MAX_US: u64 = 200_000;

/// What the kills of a scenario came to.
#[derive(Debug, Default)]
pub struct Tally {
    /// Runs that were killed.
    pub kills: u32,
    /// Of these, runs that were killed while they held the guest paused.
    pub in_pause: u32,
    /// Runs that stopped themselves while they held the guest paused, and were killed by the guardian.
    pub stopped_in_pause: u32,
    /// Runs that ended before the kill.
    pub not_hit: u32,
    /// Runs after which the guest was old.
    pub old: u32,
    /// Runs after which the guest was new.
    pub new: u32,
    /// Interrupted changes that `recover` finished.
    pub finished: u32,
    /// Interrupted changes that `recover` undid.
    pub undone: u32,
    /// Runs of `recover` that found no interrupted change.
    pub nothing_to_do: u32,
    /// The longest pause, in microseconds.
    pub longest_pause_us: u64,
    /// Exit codes of those that were not killed.
    pub codes: Vec<i64>,
}

/// The guest under test.
pub struct Subject {
    /// The guest.
    pub guest: Guest,
    /// The check script in the guest of the payload [`PAIR`].
    check: String,
    /// The patches that are in force while [`PAIR`] is not, and while it is, the undermost first.
    stacks: [Vec<&'static str>; 2],
    /// Rounds of its workload, at the last look.
    rounds: u64,
}

impl Subject {
    /// A guest under load, with the check script in it.
    pub fn new(ctx: &mut Ctx, kind: Kind) -> Result<Subject, Verdict> {
        let guest = ctx.ensure_guest(GuestSpec::new(kind.name(), kind))?;
        let check = patches::put_check(&guest, PAIR)?;
        guest.start_workload()?;
        let rounds = guest.rounds()?;
        Ok(Subject {
            guest,
            check,
            stacks: [Vec::new(), vec![PAIR]],
            rounds,
        })
    }

    /// Whether [`PAIR`] is in force, by what the guest's files in `/proc` show. A mixture is a failure.
    pub fn is_new(&self) -> Result<bool, Verdict> {
        let check = &self.check;
        let out = self.guest.sh(&format!(
            "w=$({WORDS}); echo \"$w\"; case \"$w\" in *live.) sh {check} after >&2 && exit 10;; \
             *) sh {check} before >&2 && exit 11;; esac; exit 12"
        ))?;
        let [old, new] = self.stacks.each_ref().map(|patches| {
            let words = patches::printed(words_of(patches));
            out.text() == words
        });
        // Another patch below shows a word in a file that the script looks at.
        let other_word = self.stacks[0].contains(&TWO);
        match out.rc {
            10 if new => Ok(true),
            11 if old => Ok(false),
            12 if old && other_word => Ok(false),
            _ => Err(Verdict::failure(format!(
                "the guest is neither old nor new: {} {}",
                out.text(),
                out.err_text()
            ))),
        }
    }

    /// Whether [`PAIR`] is in force, by `status`.
    pub fn status(&self, ctx: &Ctx) -> Result<bool, Verdict> {
        let status = tool::status(ctx, &self.guest.name)?;
        let listed = tool::patches_of(&status)?;
        let names: Vec<&str> = listed.iter().filter_map(|p| p["name"].as_str()).collect();
        let sound = listed.iter().all(|p| p["state"] == "applied");
        let [old, new] = &self.stacks;
        match (sound, names == *old, names == *new) {
            (true, true, _) => Ok(false),
            (true, _, true) => Ok(true),
            _ => Err(Verdict::failure(format!(
                "status says {status}, expected {old:?} or {new:?}"
            ))),
        }
    }

    /// Runs the tool under `locus-kill`, and checks that the guest is old or new and was not paused for
    /// too long. Returns what `locus-kill` prints.
    pub fn kill(
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
        tally.stopped_in_pause += u32::from(killed["stopped_in_pause"] == true);
        let new = self.is_new()?;
        check_eq!(self.status(ctx)?, new, "status after {what}");
        *(if new { &mut tally.new } else { &mut tally.old }) += 1;
        Ok(killed)
    }

    /// Runs `recover`. What it says must be what the guest shows. A second run finds nothing to do.
    pub fn recover(&self, ctx: &Ctx, tally: &mut Tally) -> Result<(), Verdict> {
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

    /// The command for what was not done last: apply or revert.
    pub fn next(&self, ctx: &Ctx) -> Result<String, Verdict> {
        let name = &self.guest.name;
        let action = if self.status(ctx)? { REVERT } else { APPLY };
        Ok(format!("xen-locus {}", action.command(name)))
    }

    /// Makes what stands before the action, and nothing else, be in force.
    pub fn prepare(&mut self, ctx: &Ctx, action: Action) -> Result<(), Verdict> {
        let mut stacks = [action.before.to_vec(), action.after()];
        if action.before.contains(&PAIR) {
            stacks.reverse();
        }
        self.make(ctx, action.before)?;
        self.stacks = stacks;
        Ok(())
    }

    /// Reverts all.
    pub fn clear(&mut self, ctx: &Ctx) -> Result<(), Verdict> {
        self.make(ctx, &[])?;
        self.stacks = [Vec::new(), vec![PAIR]];
        Ok(())
    }

    fn make(&self, ctx: &Ctx, patches: &[&str]) -> Result<(), Verdict> {
        let name = &self.guest.name;
        let there = tool::listed(ctx, name)?;
        if there == patches {
            return Ok(());
        }
        if !there.is_empty() {
            tool::revert_all(ctx, name)?;
        }
        for patch in patches {
            tool::apply(ctx, name, patch)?;
        }
        Ok(())
    }

    /// Checks that the guest's workload has gone on since the last look.
    pub fn progresses(&mut self) -> Result<(), Verdict> {
        self.guest.went_on(self.rounds)?;
        self.rounds = self.guest.rounds()?;
        Ok(())
    }
}

/// Checks that no guardian runs, and that no file of one is left.
pub fn nothing_left(ctx: &Ctx) -> Result<(), Verdict> {
    // Journals of guests that an earlier scenario destroyed in the middle may still be there.
    ctx.dom0.ok("xen-locus recover")?;
    std::thread::sleep(Duration::from_millis(500));
    let left = ctx
        .dom0
        .ok("ls /run/xen-locus/guard /var/lib/xen-locus/journal | grep -v : ; ps | grep xen-locus-guardia[n]; true")?;
    check_eq!(left, "");
    Ok(())
}
