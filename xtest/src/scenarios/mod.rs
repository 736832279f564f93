//! The scenarios of the suite, one file per subject.

// JSON values are indexed by key: a key that is missing reads as null, and no check takes null.
#![allow(clippy::indexing_slicing)]

mod apply;
mod bench;
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
mod store;
mod verify;

use crate::scenario::Scenario;

/// The scenarios of a usual run, in the order they run within their profile.
pub fn usual() -> Vec<Scenario> {
    [
        bench::SCENARIOS,
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

/// All kernels as all types of guest, and cores of all types: what takes too long for a usual run.
pub fn matrix() -> Vec<Scenario> {
    [
        know::SCENARIOS,
        know::MATRIX,
        stacks::MATRIX,
        core::MATRIX,
        sites::SCENARIOS,
        sites::MATRIX,
        loader::SCENARIOS,
        loader::MATRIX,
        states::SCENARIOS,
        states::MATRIX,
        protocol::MATRIX,
        kills::MATRIX,
        hostile::MATRIX,
        many::MATRIX,
        nudge::MATRIX,
        &life::scenarios()[..],
        &life::matrix()[..],
    ]
    .concat()
}

/// All scenarios.
pub fn all() -> Vec<Scenario> {
    let mut all = usual();
    all.extend_from_slice(know::MATRIX);
    all.extend_from_slice(stacks::MATRIX);
    all.extend_from_slice(core::MATRIX);
    all.extend_from_slice(sites::MATRIX);
    all.extend_from_slice(loader::MATRIX);
    all.extend_from_slice(states::MATRIX);
    all.extend_from_slice(protocol::MATRIX);
    all.extend_from_slice(kills::MATRIX);
    all.extend_from_slice(hostile::MATRIX);
    all.extend_from_slice(many::MATRIX);
    all.extend_from_slice(nudge::MATRIX);
    all.extend_from_slice(&life::matrix());
    all
}
