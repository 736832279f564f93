//! The tool is killed or stopped at each of its calls, or each of its calls fails.

use super::actions::Action;
use super::subject::{nothing_left, Subject, Tally};
use crate::check;
use crate::guest::Kind;
use crate::scenario::Ctx;
use crate::verdict::Verdict;

/// The fewest places of an action at which something must have been done.
const HITS: u32 = 3;

/// Makes each action end at its first place, then further on in steps of `step` places, until the action
/// has no such place and ends by itself. `what` is done at the place: `kill`, `stop` or `fail`.
pub fn injected(
    ctx: &mut Ctx,
    kind: Kind,
    what: &str,
    step: u32,
    actions: &[Action],
) -> Result<(), Verdict> {
    injected_with(ctx, kind, "", what, step, actions)
}

/// The same with this variable in the environment of the tool, `NAME=VALUE` or nothing.
pub fn injected_with(
    ctx: &mut Ctx,
    kind: Kind,
    variable: &str,
    what: &str,
    step: u32,
    actions: &[Action],
) -> Result<(), Verdict> {
    for action in actions {
        ctx.destroy_guest(kind.name())?;
        let mut subject = Subject::new(ctx, kind)?;
        let mut tally = Tally::default();
        let name = subject.guest.name.clone();
        let command = action.command(&name);
        let (mut nth, mut hits) = (1, 0);
        loop {
            subject.prepare(ctx, action.before)?;
            let cmd = format!(
                "env {variable} XEN_LOCUS_FAULT={nth}:{what}:journal xen-locus-faults {command}"
            );
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
                tally.codes.push(rc);
            }
            if !hit {
                break;
            }
            hits += 1;
            // The other times the next run recovers by itself.
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
        let action = action.name;
        eprintln!("{name}: {action}, {what} at place 1 to {nth}: {tally:?}");
        check!(
            hits >= HITS,
            "{action} has {hits} such places only, up to {nth}: it shows nothing"
        );
    }
    Ok(())
}
