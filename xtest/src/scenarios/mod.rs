//! The scenarios of the suite, a file per subject. `steps` is what they share.

// JSON values are indexed by key: a key that is missing reads as null, and no check takes null.
#![allow(clippy::indexing_slicing)]

mod apply;
mod carried;
mod core;
mod ended;
mod history;
mod hostile;
mod hostile_costs;
mod kills;
mod know;
mod late;
mod liar;
mod life;
mod loader;
mod long_wait;
mod many;
mod mitigations;
mod models;
mod nudge;
mod objects;
mod others;
mod parked;
mod protocol;
mod real_dom0;
mod refuse;
mod safety;
mod sites;
mod stack;
mod stacks;
mod states;
mod steps;
mod store;
mod testbed;
mod truth;
mod twins;
mod two_paused;
mod verify;
mod xenstore_gone;

use crate::scenario::Scenario;

/// What a usual run leaves to the matrix, because it is to take a quarter of an hour on two processors. A usual run
/// shows the same with another type of guest, or part of it by other scenarios or by unit tests.
const LEFT_OUT: &[&str] = &[
    // Shown for PVH.
    "know-bookworm-pv",
    "sites-bookworm-pv",
    // Shown for PV.
    "testbed-pvh",
    "nudge-pvh",
    "hostile-flip-pvh",
    "loader-pvh",
    "verify-pvh",
    "timer-pvh",
    // Shown by `pti-hvm`.
    "testbed-hvm",
    "apply-hvm",
    "refuse-firmware-hvm",
    // Shown by `pti-pvh` and `sites-bookworm-pvh`.
    "apply-pvh",
    "know-bookworm-pvh",
    // Builds all payloads for Debian 13's kernel; `heads-trixie-pv` has most of it.
    "sealed-trixie-pv",
    // Other kernels, each as it is known: the matrix alone.
    "know-bullseye-pv",
    "know-trixie-pv",
    "sites-trixie-pv",
    // Kills and failures of calls: `faults-pv`, `both-die-pv` and `signals-pv` have some of each kind.
    "kills-pv",
    "record-turns-pv",
    "no-pidfd-pv",
    "no-memory-pv",
    "faults-recover-pv",
    "destroy-pv",
    // Hostile guests: `hostile-flip-pv` and `hostile-store-pv`.
    "liar-pv",
    "liar-pvh",
    "hostile-own-pv",
    "hostile-own-pvh",
    "hostile-remap-pv",
    "hostile-remap-pvh",
    "hostile-arena-pv",
    "hostile-arena-pvh",
    // Unit tests have each step of these: patches on patches.
    "stack-pv",
    "stack-pvh",
    // Modules: `loader-pv`. Requests: `xenstore-requests`.
    "objects-pv",
    "objects-pvh",
    "xenstore-late-module",
    "xenstore-updated",
    // `must-fail-*` and `useless-tools` show that the testbed notices.
    "testbed-hung-guest",
    // `loader-pv` has most of it; `make bench` runs the tool that it is about.
    "loader-own-pv",
    "pauses-pv",
];

/// The scenarios of a usual run, in the order in which they run within their profile.
pub fn usual() -> Vec<Scenario> {
    let mut usual = short();
    usual.retain(|s| !LEFT_OUT.contains(&s.name));
    usual
}

fn short() -> Vec<Scenario> {
    [
        truth::SCENARIOS,
        testbed::SCENARIOS,
        core::SCENARIOS,
        apply::SCENARIOS,
        mitigations::SCENARIOS,
        nudge::SCENARIOS,
        stack::SCENARIOS,
        refuse::SCENARIOS,
        store::SCENARIOS,
        liar::SCENARIOS,
        hostile::SCENARIOS,
        objects::SCENARIOS,
        parked::SCENARIOS,
        loader::SCENARIOS,
        know::SCENARIOS,
        sites::SCENARIOS,
        states::SCENARIOS,
        protocol::SCENARIOS,
        &life::scenarios()[..],
        kills::SCENARIOS,
        history::SCENARIOS,
        verify::SCENARIOS,
        late::SCENARIOS,
        // Its last one uses up its machine.
        safety::SCENARIOS,
    ]
    .concat()
}

/// All scenarios: all kernels as all types of guest, cores of all types, and what takes long.
pub fn all() -> Vec<Scenario> {
    [
        know::MATRIX,
        stacks::MATRIX,
        store::MATRIX,
        ended::MATRIX,
        core::MATRIX,
        sites::MATRIX,
        loader::MATRIX,
        states::MATRIX,
        protocol::MATRIX,
        kills::MATRIX,
        hostile::MATRIX,
        hostile_costs::MATRIX,
        many::MATRIX,
        truth::MATRIX,
        twins::MATRIX,
        others::MATRIX,
        two_paused::MATRIX,
        xenstore_gone::MATRIX,
        mitigations::MATRIX,
        models::MATRIX,
        refuse::MATRIX,
        parked::MATRIX,
        carried::MATRIX,
        long_wait::MATRIX,
        nudge::MATRIX,
        real_dom0::MATRIX,
        &life::matrix()[..],
        &short()[..],
    ]
    .concat()
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::results;

    #[test]
    fn names_are_unique_and_lists_of_names_have_no_others() {
        let mut names = HashSet::new();
        for scenario in all() {
            assert!(
                names.insert(scenario.name),
                "two are called {}",
                scenario.name
            );
        }
        for name in LEFT_OUT {
            assert!(names.contains(name), "LEFT_OUT: no scenario {name}");
        }
        let left = usual().len() + LEFT_OUT.len();
        assert_eq!(
            left,
            short().len(),
            "LEFT_OUT names what is in the matrix alone, or twice"
        );
        for (name, _) in results::usual() {
            assert!(names.contains(name), "usual.txt: no scenario {name}");
        }
    }
}
