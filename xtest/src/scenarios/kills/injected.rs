//! The tool is killed or stopped at each of its calls, or each of its calls fails.

use super::actions::Action;
use super::around::Around;
use super::subject::{nothing_left, Tally};
use crate::check;
use crate::guest::Kind;
use crate::scenario::Ctx;
use crate::verdict::Verdict;

/// The fewest places of an action at which something must have been done.
const HITS: u32 = 3;
/// Places inside the pause at which a run is stopped before it is stopped at numbered ones. A run passes few calls while
/// the guest is paused, so steps may miss all of them.
const IN_PAUSE: [&str; 3] = [
    "1:stop:mark writing",
    "2:stop:mark writing",
    "1:stop:mark unpausing",
];

/// What is done at which places, and where.
#[derive(Debug, Clone, Copy)]
pub struct Injection {
    /// `kill`, `stop` or `fail`.
    pub what: &'static str,
    /// From one place to the next.
    pub step: u32,
    /// What stands around the change.
    pub around: Around,
    /// In the environment of the tool: `NAME=VALUE` or nothing.
    pub variable: &'static str,
}

/// Makes each action end at its first place, then further on in steps of `step` places, until the action
/// has no such place and ends by itself. `what` is done at the place: `kill`, `stop` or `fail`. A run is stopped at
/// places inside the pause before that ([`IN_PAUSE`]).
pub fn injected(
    ctx: &mut Ctx,
    kind: Kind,
    what: &'static str,
    step: u32,
    actions: &[Action],
) -> Result<(), Verdict> {
    let injection = Injection {
        what,
        step,
        around: Around::Nothing,
        variable: "",
    };
    injected_with(ctx, kind, injection, actions)
}

/// The same, with more said of it.
pub fn injected_with(
    ctx: &mut Ctx,
    kind: Kind,
    injection: Injection,
    actions: &[Action],
) -> Result<(), Verdict> {
    for &action in actions {
        ctx.destroy_guest(kind.name())?;
        each_place(ctx, kind, injection, action)?;
    }
    Ok(())
}

fn each_place(
    ctx: &mut Ctx,
    kind: Kind,
    injection: Injection,
    action: Action,
) -> Result<(), Verdict> {
    let Injection {
        what,
        step,
        around,
        variable,
    } = injection;
    let (mut ready, mut subject) = around.ready(ctx, kind)?;
    let mut tally = Tally::default();
    let name = subject.guest.name.clone();
    let command = action.command(&name);
    let named: &[&str] = if what == "stop" { &IN_PAUSE } else { &[] };
    let numbered = (1..).step_by(step as usize);
    let numbered = numbered.map(|nth: u32| format!("{nth}:{what}:journal"));
    let places = named.iter().map(|&place| place.to_owned()).chain(numbered);
    let (mut hits, mut place) = (0, String::new());
    for next in places {
        place = next;
        subject.prepare(ctx, ready.action(action, hits))?;
        let cmd = format!("env {variable} \"XEN_LOCUS_FAULT={place}\" xen-locus-faults {command}");
        let stopped = tally.stopped_in_pause;
        let done = subject.kill(ctx, "", &cmd, &mut tally)?;
        let said = done["stderr"].as_str().unwrap_or_default();
        let hit = said.contains("xen-locus: fault: ");
        // The exit code must be true.
        if let Some(rc) = done["rc"].as_i64() {
            let new = subject.is_new()?;
            let expected = (action.name != "revert") == (rc == 0);
            check!(
                new == expected || rc == 6,
                "guest is new: {new}, and {cmd} says {done}"
            );
            check!(hit || rc == 0, "nothing was done to {cmd}: {done}");
            tally.codes.push(rc);
        }
        if (hits as usize) < named.len() {
            check!(
                hit && tally.stopped_in_pause > stopped,
                "{cmd} was not stopped in its pause: {done}"
            );
        }
        if !hit {
            break;
        }
        // The other times the next run recovers by itself.
        if hits % 2 == 1 {
            ready.after_run(ctx, &subject, hits / 2)?;
            subject.recover(ctx, &mut tally)?;
        }
        if hits % 16 == 15 {
            subject.progresses()?;
        }
        hits += 1;
    }
    subject.clear(ctx)?;
    subject.recover(ctx, &mut tally)?;
    ready.end(ctx, &mut subject)?;
    nothing_left(ctx)?;
    let action = action.name;
    eprintln!("{name}: {action}, {around:?}, {what} up to {place}: {tally:?}");
    check!(
        hits >= HITS,
        "{action} has {hits} such places only, up to {place}: it shows nothing"
    );
    Ok(())
}
