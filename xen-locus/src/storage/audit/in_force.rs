//! Patches that are in force in a guest, by the audit log. Each line lists them: those of the guest's line before it,
//! changed by the action of this line.
//!
//! The patches themselves are in the guest's memory, and are lost with it in a reboot. The log knows a guest by its
//! UUID, which a reboot does not change. A reverted patch stays in the guest's arena. So a patch that is in force by
//! the log and is not in the arena was lost: the guest was rebooted since, or restored from an older state.

use serde::{Deserialize, Serialize};

use super::Action;
use crate::arena::{Newer, Resident};
use crate::operation::Operation;

/// Most patches in a line of the log: several times what a guest has room for. It limits the length of a line.
const IN_FORCE_MAX: usize = 100;

/// A patch that is in force, by the log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InForce {
    /// Its name.
    pub name: String,
    /// SHA-256 of its file, in hex.
    pub sha256: String,
    /// When it was applied, in seconds since 1970.
    pub applied_at: u64,
    /// SHA-256 of the record that was placed in the guest, in hex; empty where the log doesn't say.
    pub record: String,
}

impl InForce {
    /// Whether an arena with these payloads has it, be it in force there or not.
    #[must_use]
    pub fn is_among(&self, residents: &[Resident], newer: &[Newer]) -> bool {
        residents.iter().any(|r| r.record.sha256 == self.sha256)
            || newer.iter().any(|n| n.is(&self.record, &self.name))
    }
}

/// What is in force in a guest after `action`, if `before` was in force before it. In the order of application.
#[must_use]
pub fn after(before: Vec<InForce>, action: &Action) -> Vec<InForce> {
    let mut in_force = before;
    // `recover` says how an interrupted operation ended.
    let (operation, done) = match Operation::named(&action.op) {
        Some(Operation::Recover) => {
            let interrupted = Operation::named(&action.of);
            if interrupted == Some(Operation::Reclaim) {
                return in_force;
            }
            (
                interrupted,
                action.result == "finished" && interrupted.is_some(),
            )
        }
        // It is about a patch that is not in force.
        Some(Operation::Reclaim) => return in_force,
        operation => (operation, matches!(&*action.result, "applied" | "reverted")),
    };
    // To revert a patch that was lost means that it is not wanted any more.
    let unwanted = operation == Some(Operation::Revert) && (done || action.result == "already");
    if !done && !unwanted {
        return in_force;
    }
    in_force.retain(|p| {
        let ended = p.name == action.patch || action.superseded.contains(&p.name);
        !ended && operation != Some(Operation::Replace)
    });
    if !unwanted {
        in_force.push(InForce {
            name: action.patch.clone(),
            sha256: action.sha256.clone(),
            applied_at: action.time,
            record: action.record.clone(),
        });
    }
    let many = in_force.len().saturating_sub(IN_FORCE_MAX);
    in_force.drain(..many);
    in_force
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An action: what was done to a patch, what came of it, what it superseded.
    type Done = (
        &'static str,
        &'static str,
        &'static str,
        &'static [&'static str],
    );

    /// What is in force after these.
    fn log(lines: &[Done]) -> Vec<InForce> {
        let mut in_force = Vec::new();
        for (at, (op, patch, result, superseded)) in (0..).zip(lines) {
            let (op, of) = op.split_once('-').unwrap_or((op, ""));
            let action = Action {
                time: at,
                op: op.into(),
                of: of.into(),
                patch: (*patch).into(),
                sha256: format!("sha of {patch}"),
                result: (*result).into(),
                superseded: superseded.iter().map(|&s| s.into()).collect(),
                ..Action::default()
            };
            in_force = after(in_force, &action);
        }
        in_force
    }

    fn names(lines: &[Done]) -> Vec<String> {
        log(lines).into_iter().map(|p| p.name).collect()
    }

    #[test]
    fn what_was_applied_is_in_force() {
        let lines: &[Done] = &[
            ("apply", "a", "applied", &[]),
            ("apply", "b", "blocked", &[]),
            ("nudge", "a", "woken", &[]),
            ("reclaim", "b", "reclaimed", &[]),
            ("recover-reclaim", "b", "finished", &[]),
            ("apply", "c", "applied", &[]),
        ];
        assert_eq!(names(lines), ["a", "c"]);
        let last = log(lines).pop().unwrap();
        assert_eq!((last.applied_at, &*last.sha256), (5, "sha of c"));
    }

    #[test]
    fn however_many_a_guest_lost_what_came_last_is_told() {
        let mut in_force = Vec::new();
        for number in 0..2 * IN_FORCE_MAX {
            let action = Action {
                op: "apply".into(),
                result: "applied".into(),
                patch: number.to_string(),
                ..Action::default()
            };
            in_force = after(in_force, &action);
        }
        assert_eq!(in_force.len(), IN_FORCE_MAX);
        assert_eq!(
            in_force.last().unwrap().name,
            (2 * IN_FORCE_MAX - 1).to_string()
        );
    }

    #[test]
    fn what_was_taken_back_or_superseded_is_not_in_force() {
        let applied = [
            ("apply", "a", "applied", &[][..]),
            ("apply", "b", "applied", &[]),
            ("apply", "c", "applied", &[]),
        ];
        let and = |more: Done| {
            let mut lines = applied.to_vec();
            lines.push(more);
            names(&lines)
        };
        assert_eq!(and(("revert", "c", "reverted", &[])), ["a", "b"]);
        assert_eq!(and(("revert", "a", "already", &[])), ["b", "c"]);
        assert_eq!(and(("revert", "c", "failed", &[])), ["a", "b", "c"]);
        assert_eq!(and(("replace", "d", "applied", &["b", "c"])), ["d"]);
        assert_eq!(and(("replace", "d", "refused", &[])), ["a", "b", "c"]);
        assert_eq!(and(("apply", "d", "applied", &["b", "c"])), ["a", "d"]);
        assert_eq!(and(("apply", "a", "applied", &[])), ["b", "c", "a"]);
    }

    #[test]
    fn what_recover_found_counts() {
        let ends = |of: &'static str, result: &'static str, superseded: &'static [&'static str]| {
            names(&[
                ("apply", "a", "applied", &[]),
                (of, "b", result, superseded),
            ])
        };
        assert_eq!(ends("recover-apply", "finished", &[]), ["a", "b"]);
        assert_eq!(ends("recover-apply", "finished", &["a"]), ["b"]);
        assert_eq!(ends("recover-apply", "undone", &[]), ["a"]);
        assert_eq!(ends("recover-", "finished", &[]), ["a"]);
        let back = [
            ("apply", "a", "applied", &[][..]),
            ("recover-revert", "a", "finished", &[]),
        ];
        assert_eq!(names(&back), Vec::<String>::new());
    }
}
