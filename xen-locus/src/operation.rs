//! What is done with a patch of a guest: one type for requests, the journal, the audit log and reports.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What is done with a patch of a guest.
///
/// As text (JSON, XenStore, the audit log) it is its lower-case name. The journal stores the number of the variant
/// (postcard), so the order of the variants is part of the journal's format: new ones come last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Operation {
    /// Brings a payload into force. In the journal also one that supersedes other patches.
    Apply,
    /// Takes a patch out of force.
    Revert,
    /// Wakes sleeping threads that block a patch, by a write that is undone.
    Nudge,
    /// Brings a payload into force and takes all others out of force.
    Replace,
    /// Recovers a guest from an interrupted run.
    Recover,
    /// Gives back the memory of a payload that is parked.
    Reclaim,
}

impl Operation {
    const ALL: [Operation; 6] = [
        Operation::Apply,
        Operation::Revert,
        Operation::Nudge,
        Operation::Replace,
        Operation::Recover,
        Operation::Reclaim,
    ];

    /// The word for it in every text format.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Operation::Apply => "apply",
            Operation::Revert => "revert",
            Operation::Nudge => "nudge",
            Operation::Replace => "replace",
            Operation::Recover => "recover",
            Operation::Reclaim => "reclaim",
        }
    }

    /// The operation with this name, if there is one.
    #[must_use]
    pub fn named(name: &str) -> Option<Operation> {
        Operation::ALL.into_iter().find(|op| op.name() == name)
    }

    /// Whether a journal is written before it.
    #[must_use]
    pub fn is_journaled(self) -> bool {
        matches!(
            self,
            Operation::Apply | Operation::Revert | Operation::Nudge | Operation::Reclaim
        )
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_and_numbers_are_those_of_the_stored_formats() {
        for (number, operation) in (0u8..).zip(Operation::ALL) {
            assert_eq!(Operation::named(operation.name()), Some(operation));
            let json = serde_json::to_string(&operation).unwrap();
            assert_eq!(json, format!("\"{operation}\""));
            assert_eq!(postcard::to_stdvec(&operation).unwrap(), [number]);
        }
        let journaled = Operation::ALL.map(Operation::is_journaled);
        assert_eq!(journaled, [true, true, true, false, false, true]);
    }
}
