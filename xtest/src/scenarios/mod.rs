//! The scenarios of the suite, a file per subject. `steps` is what they share.

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

/// What a usual run leaves out, because it is to take less than an hour on two processors. It shows the same with
/// another type of guest, or with another kernel.
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

/// The scenarios of a usual run, in the order in which they run within their profile.
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
    // One of these ends the XenStore of its machine, so it must come last.
    all.extend(short());
    all
}
