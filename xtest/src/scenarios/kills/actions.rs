//! Actions that are made to end early.

use crate::scenarios::steps::patches::{self, CMDLINE, PAIR};

/// An action of xen-locus on a guest: it makes [`PAIR`] be in force, or no longer.
#[derive(Debug, Clone, Copy)]
pub struct Action {
    /// The subcommand.
    pub name: &'static str,
    /// The only patch that is in force before.
    pub before: Option<&'static str>,
}

impl Action {
    /// The arguments of xen-locus.
    pub fn command(self, guest: &str) -> String {
        let name = self.name;
        let what = if name == "revert" {
            PAIR.to_owned()
        } else {
            patches::file(PAIR)
        };
        format!("{name} {guest} {what}")
    }
}

/// In a guest that was just started the first apply of a payload has the most steps.
pub const APPLY: Action = Action {
    name: "apply",
    before: None,
};
/// Of what was applied before.
pub const REVERT: Action = Action {
    name: "revert",
    before: Some(PAIR),
};
/// Of another patch.
pub const REPLACE: Action = Action {
    name: "replace",
    before: Some(CMDLINE),
};
/// All of them.
pub const ACTIONS: [Action; 3] = [APPLY, REVERT, REPLACE];
