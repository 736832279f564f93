//! The scenarios of the suite, one file per subject.

// JSON values are indexed by key: a key that is missing reads as null, and no check takes null.
#![allow(clippy::indexing_slicing)]

mod apply;
mod core;
mod history;
mod hostile;
mod kills;
mod know;
mod liar;
mod life;
mod loader;
mod many;
mod nudge;
mod objects;
mod protocol;
mod refuse;
mod safety;
mod sites;
mod stack;
mod stacks;
mod states;
mod steps;
mod store;
mod testbed;
mod verify;

use crate::scenario::Scenario;

/// What a usual run leaves out, for it is to take less than an hour on two processors: shown in it for another type of
/// guest, or for another kernel.
const LEFT_OUT: &[&str] = &[
    "nudge-pvh",
    "liar-pvh",
    "hostile-remap-pvh",
    "hostile-flip-pvh",
    "objects-pvh",
    "loader-own-pv",
    "loader-pvh",
    "know-bullseye-pv",
    "sites-trixie-pv",
];

/// The scenarios of a usual run, in the order they run within their profile.
pub fn usual() -> Vec<Scenario> {
    let mut usual = short();
    usual.retain(|s| !LEFT_OUT.contains(&s.name));
    usual
}

fn short() -> Vec<Scenario> {
    [
        testbed::SCENARIOS,
        core::SCENARIOS,
        apply::SCENARIOS,
        nudge::SCENARIOS,
        stack::SCENARIOS,
        refuse::SCENARIOS,
        store::SCENARIOS,
        liar::SCENARIOS,
        hostile::SCENARIOS,
        objects::SCENARIOS,
        loader::SCENARIOS,
        know::SCENARIOS,
        sites::SCENARIOS,
        states::SCENARIOS,
        protocol::SCENARIOS,
        &life::scenarios()[..],
        kills::SCENARIOS,
        history::SCENARIOS,
        verify::SCENARIOS,
        safety::SCENARIOS,
    ]
    .concat()
}

/// All scenarios: all kernels as all types of guest, cores of all types, and what takes long.
pub fn all() -> Vec<Scenario> {
    let mut all = [
        know::MATRIX,
        stacks::MATRIX,
        core::MATRIX,
        sites::MATRIX,
        loader::MATRIX,
        states::MATRIX,
        protocol::MATRIX,
        kills::MATRIX,
        hostile::MATRIX,
        many::MATRIX,
        nudge::MATRIX,
        &life::matrix()[..],
    ]
    .concat();
    // One of these ends its machine's XenStore, and comes last.
    all.extend(short());
    all
}
