//! Actions that are made to end early.

use crate::scenarios::steps::patches::{self, CMDLINE, PAIR, THREE, TWO};

/// An action of xen-locus on a guest: it makes [`PAIR`] be in force, or no longer.
#[derive(Debug, Clone, Copy)]
pub struct Action {
    /// The subcommand.
    pub name: &'static str,
    /// The patches that are in force before, the undermost first.
    pub before: &'static [&'static str],
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

    /// The patches that are in force afterwards.
    pub fn after(self) -> Vec<&'static str> {
        let others = self.before.iter().copied().filter(|&patch| patch != PAIR);
        match self.name {
            "revert" => others.collect(),
            "replace" => vec![PAIR],
            _ => others.chain([PAIR]).collect(),
        }
    }

    /// The same on another layer: [`TWO`] replaces one of the functions too and lies below, and [`THREE`], which replaces
    /// neither, came later.
    pub fn layered(self) -> Self {
        let before: &[&str] = match self.name {
            "revert" => &[TWO, PAIR, THREE],
            _ => &[TWO, THREE],
        };
        Self { before, ..self }
    }
}

/// In a guest that was just started the first apply of a payload has the most steps.
pub const APPLY: Action = Action {
    name: "apply",
    before: &[],
};
/// Of what was applied before.
pub const REVERT: Action = Action {
    name: "revert",
    before: &[PAIR],
};
/// Of another patch.
pub const REPLACE: Action = Action {
    name: "replace",
    before: &[CMDLINE],
};
/// All of them.
pub const ACTIONS: [Action; 3] = [APPLY, REVERT, REPLACE];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_action_changes_its_own_patch_and_replace_takes_all_others() {
        for action in ACTIONS {
            let (before, after) = (action.before, action.after());
            assert_ne!(before.contains(&PAIR), after.contains(&PAIR), "{action:?}");
        }
        assert_eq!(APPLY.layered().after(), [TWO, THREE, PAIR]);
        assert_eq!(REVERT.layered().after(), [TWO, THREE]);
        assert_eq!(REPLACE.layered().after(), [PAIR]);
    }
}
