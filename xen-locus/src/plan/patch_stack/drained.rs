//! The versions of functions in which threads may still be, of all patches that let them go on there.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use locus_guest::addr::Gva;
use locus_kernel::Kernel;

use super::{new_version, old_version, PatchStack};
use crate::arena::record::Function;
use crate::blocker::Blocker;
use crate::error::Result;
use crate::quiesce::{Watch, Watched};

/// Where threads may still be that entered functions of applied patches before these were applied, of all patches together
/// whose payloads say that they may: the guest says how many these are, and one look at its threads is enough.
#[derive(Clone, Debug)]
pub struct Drained {
    versions: Vec<OldVersion>,
    /// All ranges.
    pub watch: Watch,
}

impl Drained {
    /// Finds the ranges; `None` if there are none.
    ///
    /// # Errors
    /// The guest's budget is spent.
    pub fn find(kernel: &Kernel<'_>, stack: &PatchStack<'_>) -> Result<Option<Drained>> {
        let (versions, ranges) = stack.drained();
        if versions.is_empty() {
            return Ok(None);
        }
        let watch = Watch::new(kernel, ranges)?;
        Ok(Some(Drained { versions, watch }))
    }

    /// Those of `blockers`, which were found in these ranges, that are below the patch at this `level` which replaces the
    /// functions at these addresses. Threads whose place can't be told count for each patch.
    #[must_use]
    pub fn below(
        &self,
        level: usize,
        functions: &HashSet<Gva>,
        blockers: &[Blocker],
    ) -> Vec<Blocker> {
        let is_below = |v: &&OldVersion| {
            functions.contains(&v.function) && v.level.is_none_or(|own| own < level)
        };
        let of_patch = |blocker: &Blocker| {
            let Ok(number) = blocker.function.parse::<usize>() else {
                return Some(blocker.clone());
            };
            let version = self.versions.get(number).filter(is_below)?;
            Some(Blocker {
                function: version.name.to_string(),
                ..blocker.clone()
            })
        };
        blockers.iter().filter_map(of_patch).collect()
    }
}

/// A part of a version of a function in which threads may be that entered it before a patch was applied.
#[derive(Clone, Debug)]
struct OldVersion {
    /// The name that messages use.
    name: Arc<str>,
    /// Address of the kernel's own function.
    function: Gva,
    /// The place of its patch among those that are applied, the undermost first; `None` if it is below all of them.
    level: Option<usize>,
}

impl PatchStack<'_> {
    /// The versions below all applied patches whose payloads say that threads may be there, and their ranges. Each range is
    /// called by the number of its version. Each function of a record counts once, however many patches are on it.
    fn drained(&self) -> (Vec<OldVersion>, Vec<Watched>) {
        let (mut versions, mut ranges) = (Vec::new(), Vec::new());
        let mut add = |function: &Function, level, all: &mut dyn Iterator<Item = Watched>| {
            for watched in all {
                let number = versions.len().to_string();
                versions.push(OldVersion {
                    name: Arc::clone(&watched.name),
                    function: function.old,
                    level,
                });
                ranges.push(watched.called(number));
            }
        };
        let applied = || self.applied.iter().enumerate();
        // By the address of the old function: the topmost patch that says so.
        let mut tops: HashMap<Gva, usize> = HashMap::new();
        for (own, patch) in applied().filter(|(_, patch)| patch.record.entry_only) {
            for function in &patch.record.functions {
                if tops.insert(function.old, own).is_none() {
                    add(function, None, &mut old_version(function));
                }
            }
        }
        for (own, patch) in applied() {
            let functions = patch.record.functions.iter();
            for function in functions.filter(|f| tops.get(&f.old).is_some_and(|&top| own < top)) {
                add(function, Some(own), &mut new_version(function));
            }
        }
        let left = self.left.iter().flat_map(|r| &r.record.functions);
        for function in left.filter(|f| tops.contains_key(&f.old)) {
            add(function, None, &mut new_version(function));
        }
        (versions, ranges)
    }
}
