//! Entries of the log since a moment: what became of a run that could not say so itself.

use super::history::Wanted;
use super::{Action, Audit};
use crate::error::{Error, Result};
use crate::operation::Operation;

/// The entries of a log, by number.
pub trait Entries {
    /// The number of the last entry; 0 if there is none.
    ///
    /// # Errors
    /// It can't be told.
    fn last_entry(&self) -> Result<u64>;

    /// The actions after the entry with this number that are `wanted`; `None` if the log does not go back that far.
    ///
    /// # Errors
    /// The log can't be read.
    fn since(&self, entry: u64, wanted: Wanted<'_>) -> Result<Option<Vec<Action>>>;
}

impl Entries for Audit {
    fn last_entry(&self) -> Result<u64> {
        Audit::last_entry(self)
    }

    fn since(&self, entry: u64, wanted: Wanted<'_>) -> Result<Option<Vec<Action>>> {
        let lines = self.lines_since(entry, wanted)?;
        Ok(lines.map(|all| all.into_iter().map(|line| line.action).collect()))
    }
}

/// Whether [`outcome`] asks about this action.
#[must_use]
pub fn concerns(action: &Action, who: &str, patch: &str) -> bool {
    action.patch == patch && (is_recovery(action) || action.who == who)
}

fn is_recovery(action: &Action) -> bool {
    action.op == Operation::Recover.name()
}

/// What became of the operation `op` on `patch` that `who` asked for, by the actions after it was begun that
/// concern it ([`concerns`]): exit code and sentence. `None` if nothing came of it: it was not begun, or undone. `uuid` is the
/// guest's, if that is known.
///
/// # Errors
/// [`Class::Uncertain`](crate::error::Class::Uncertain): it was left half done.
pub fn outcome(
    actions: &[Action],
    who: &str,
    op: &str,
    patch: &str,
    uuid: Option<&str>,
) -> Result<Option<(u8, String)>> {
    const LATE: &str = "the audit log says so: who did it ended before it could answer";
    // Another request may have had this one's ID before.
    let is_own = |a: &&Action| a.who == who && a.op == op && a.patch == patch;
    let own = actions.iter().rfind(is_own);
    if let Some(own) = own {
        let said = match own.message.is_empty() {
            true => format!("{patch}: {} ({LATE})", own.result),
            false => format!("{} ({LATE})", own.message),
        };
        return Ok(Some((own.exit, said)));
    }
    // So it is in the journal.
    let journaled = match op == Operation::Replace.name() {
        true => Operation::Apply.name(),
        false => op,
    };
    let mut recovered = actions.iter().filter(|a| {
        is_recovery(a) && a.of == journaled && a.patch == patch && uuid == Some(&*a.uuid)
    });
    if recovered.clone().any(|a| a.result == "finished") {
        let said = format!("{patch}: {op} is done ({LATE}, and recover found the change in force)");
        return Ok(Some((0, said)));
    }
    match recovered.find(|a| a.result != "undone" && a.result != "gone") {
        Some(a) => Err(Error::uncertain(format!(
            "{patch}: {op} was interrupted, and what it left could not be recovered: {}; see `xen-locus status`",
            a.message
        ))),
        None => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Beside;
    use super::*;
    use crate::error::ExitCode;

    const WHO: &str = "XenStore request fix";

    fn line(who: &str, op: &str, of: &str, result: &str) -> Action {
        Action {
            who: who.into(),
            op: op.into(),
            of: of.into(),
            patch: "one".into(),
            uuid: "a guest".into(),
            result: result.into(),
            ..Action::default()
        }
    }

    fn of(actions: &[Action], op: &str) -> Result<Option<u8>> {
        // Those that do not concern it change nothing.
        let mut concerning = actions.to_vec();
        concerning.retain(|a| concerns(a, WHO, "one"));
        let found = outcome(&concerning, WHO, op, "one", Some("a guest"));
        let all = outcome(actions, WHO, op, "one", Some("a guest"));
        assert_eq!(found.as_ref().ok(), all.as_ref().ok());
        let found = outcome(actions, WHO, op, "one", Some("a guest"))?;
        Ok(found.map(|(code, _)| code))
    }

    #[test]
    fn what_a_log_says_since_an_entry_is_whole_or_is_not_told() {
        let folder = std::env::temp_dir().join(format!("locus-entries-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&folder);
        let beside = Beside {
            head: folder.join("head.json"),
            kept: folder.join("in-force"),
            lock: folder.join("run/audit.lock"),
        };
        let audit = Audit::new(&folder.join("audit.jsonl"), Some(beside));
        assert_eq!(audit.last_entry().unwrap(), 0);
        assert_eq!(audit.since(0, &|_| true).unwrap(), Some(Vec::new()));
        for who in ["a", "b", "c"] {
            audit
                .open("")
                .unwrap()
                .append(line(who, "apply", "", ""))
                .unwrap();
        }
        assert_eq!(audit.last_entry().unwrap(), 3);
        let since = |entry| {
            let actions = audit.since(entry, &|_| true).unwrap();
            actions.map(|all| all.into_iter().map(|a| a.who).collect::<String>())
        };
        assert_eq!(since(0).as_deref(), Some("abc"));
        assert_eq!(since(2).as_deref(), Some("c"));
        assert_eq!(since(3).as_deref(), Some(""));
        let concern = |a: &Action| concerns(a, "b", "one");
        let of_b = audit.since(0, &concern).unwrap().unwrap();
        assert_eq!(of_b.len(), 1);
        // Put away.
        std::fs::remove_file(&audit.log).unwrap();
        assert_eq!(since(3).as_deref(), Some(""));
        assert_eq!(since(2), None);
        audit
            .open("")
            .unwrap()
            .append(line("d", "apply", "", ""))
            .unwrap();
        assert_eq!(since(3).as_deref(), Some("d"));
        assert_eq!(since(1), None);
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn a_run_that_ended_is_known_by_its_own_line_or_by_that_of_recover() {
        let own = line(WHO, "apply", "", "applied");
        let other = line("uid 0", "revert", "", "reverted");
        let recovered = |result| line("uid 0", "recover", "apply", result);
        assert_eq!(of(&[], "apply").unwrap(), None);
        assert_eq!(of(std::slice::from_ref(&other), "apply").unwrap(), None);
        // Whatever came after it.
        assert_eq!(of(&[own.clone(), other.clone()], "apply").unwrap(), Some(0));
        let failed = Action { exit: 2, ..own };
        assert_eq!(of(&[failed], "apply").unwrap(), Some(2));
        assert_eq!(
            of(&[recovered("finished"), other], "apply").unwrap(),
            Some(0)
        );
        assert_eq!(of(&[recovered("finished")], "replace").unwrap(), Some(0));
        assert_eq!(of(&[recovered("finished")], "revert").unwrap(), None);
        assert_eq!(of(&[recovered("undone")], "apply").unwrap(), None);
        let said = of(&[recovered("uncertain")], "apply").unwrap_err();
        assert_eq!(said.exit_code(), ExitCode::Uncertain);
        let elsewhere = Action {
            uuid: "another".into(),
            ..recovered("finished")
        };
        assert_eq!(of(&[elsewhere], "apply").unwrap(), None);
        // Whatever another run left before or after it.
        for results in [["undone", "finished"], ["finished", "undone"]] {
            assert_eq!(of(&results.map(recovered), "apply").unwrap(), Some(0));
        }
        // Of a guest that is gone, only its own line is known.
        let unknown = outcome(&[recovered("finished")], WHO, "apply", "one", None);
        assert_eq!(unknown.unwrap(), None);
        // What the request itself recovered is not what it asks for.
        let by_us = line(WHO, "recover", "revert", "finished");
        assert_eq!(of(&[by_us], "apply").unwrap(), None);
        // Nor is what an earlier request with its ID asked for.
        let patch = "two".into();
        let earlier = [
            line(WHO, "revert", "", ""),
            Action {
                patch,
                ..line(WHO, "apply", "", "")
            },
        ];
        assert_eq!(of(&earlier, "apply").unwrap(), None);
    }
}
