//! Patches that a guest lost: it was started anew since they were applied, or restored from before.
//!
//! What is in force stands in the guest's own memory, and with that it goes. That it was there is told by
//! the audit log, under the guest's UUID, which a reboot leaves as it is. A patch that was taken back stays
//! in the guest's arena; so one that was in force by the log, and of which the arena has no trace, went with
//! a kernel.

use crate::audit::Line;

/// A patch that is in force, by the log.
#[derive(Clone, Debug, PartialEq, Eq)]
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

/// Those of [`in_force`] of whose file, by its SHA-256, `has` the guest's arena no trace.
#[must_use]
pub fn lost(log: &[Line], uuid: &str, has: impl Fn(&str) -> bool) -> Vec<InForce> {
    let mut lost = in_force(log, uuid);
    lost.retain(|p| !has(&p.sha256));
    lost
}

/// The patches that are in force in the guest `uuid` by the log, in the order they were applied.
#[must_use]
pub fn in_force(log: &[Line], uuid: &str) -> Vec<InForce> {
    let mut in_force: Vec<InForce> = Vec::new();
    for line in log.iter().filter(|l| l.action.uuid == uuid) {
        let action = &line.action;
        // What a run that was interrupted had done, `recover` says.
        let (op, done) = match action.op.as_str() {
            "recover" => (
                action.of.as_str(),
                action.result == "finished" && !action.of.is_empty(),
            ),
            op => (op, matches!(&*action.result, "applied" | "reverted")),
        };
        // To take back what is not there says that it is not wanted.
        let unwanted = op == "revert" && (done || action.result == "already");
        if !done && !unwanted {
            continue;
        }
        in_force.retain(|p| {
            let ended = p.name == action.patch || action.superseded.contains(&p.name);
            !ended && op != "replace"
        });
        if !unwanted {
            in_force.push(InForce {
                name: action.patch.clone(),
                sha256: action.sha256.clone(),
                applied_at: action.time,
                record: action.record.clone(),
            });
        }
    }
    in_force
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::audit::Action;

    /// Lines of a guest, from (op, patch, result, what it superseded).
    fn log(lines: &[(&str, &str, &str, &[&str])]) -> Vec<Line> {
        let line =
            |(at, (op, patch, result, superseded)): (usize, &(&str, &str, &str, &[&str]))| {
                let (op, of) = op.split_once('-').unwrap_or((op, ""));
                Line {
                    schema: 1,
                    seq: at as u64,
                    action: Action {
                        time: at as u64,
                        op: op.into(),
                        of: of.into(),
                        uuid: "u".into(),
                        patch: (*patch).into(),
                        sha256: format!("sha of {patch}"),
                        result: (*result).into(),
                        superseded: superseded.iter().map(|&s| s.into()).collect(),
                        ..Action::default()
                    },
                    prev: String::new(),
                }
            };
        lines.iter().enumerate().map(line).collect()
    }

    fn names(lines: &[(&str, &str, &str, &[&str])], there: &[&str]) -> Vec<String> {
        let has = |sha256: &str| there.iter().any(|t| sha256 == format!("sha of {t}"));
        let lost = lost(&log(lines), "u", has);
        lost.into_iter().map(|l| l.name).collect()
    }

    #[test]
    fn what_was_applied_and_left_no_trace_is_lost() {
        let lines: &[(&str, &str, &str, &[&str])] = &[
            ("apply", "a", "applied", &[]),
            ("apply", "b", "blocked", &[]),
            ("apply", "c", "applied", &[]),
        ];
        assert_eq!(names(lines, &[]), ["a", "c"]);
        // One of them was applied again; or taken back, and stays parked.
        assert_eq!(names(lines, &["a"]), ["c"]);
        assert_eq!(lost(&log(lines), "another", |_| false), []);
        assert_eq!(lost(&log(lines), "u", |_| false)[1].applied_at, 2);
    }

    #[test]
    fn what_was_taken_back_or_superseded_is_not_lost() {
        let applied = [
            ("apply", "a", "applied", &[][..]),
            ("apply", "b", "applied", &[]),
            ("apply", "c", "applied", &[]),
        ];
        let and = |more: (
            &'static str,
            &'static str,
            &'static str,
            &'static [&'static str],
        )| {
            let mut lines = applied.to_vec();
            lines.push(more);
            names(&lines, &[])
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
    fn what_recover_settled_counts() {
        let ends = |of: &'static str, result: &'static str, superseded: &'static [&'static str]| {
            names(
                &[
                    ("apply", "a", "applied", &[]),
                    (of, "b", result, superseded),
                ],
                &[],
            )
        };
        assert_eq!(ends("recover-apply", "finished", &[]), ["a", "b"]);
        assert_eq!(ends("recover-apply", "finished", &["a"]), ["b"]);
        assert_eq!(ends("recover-apply", "undone", &[]), ["a"]);
        assert_eq!(ends("recover-", "finished", &[]), ["a"]);
        let back = [
            ("apply", "a", "applied", &[][..]),
            ("recover-revert", "a", "finished", &[]),
        ];
        assert_eq!(names(&back, &[]), Vec::<String>::new());
    }
}
