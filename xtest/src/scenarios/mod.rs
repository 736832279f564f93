//! The scenarios of the suite, one file per subject.

// JSON values are indexed by key: a key that is missing reads as null, and no check takes null.
#![allow(clippy::indexing_slicing)]

mod apply;
mod bench;
mod core;
mod liar;
mod refuse;
mod safety;
mod store;

use crate::scenario::Scenario;

/// All scenarios, in the order they run within their profile.
pub fn all() -> Vec<Scenario> {
    [
        bench::SCENARIOS,
        core::SCENARIOS,
        apply::SCENARIOS,
        refuse::SCENARIOS,
        store::SCENARIOS,
        liar::SCENARIOS,
        safety::SCENARIOS,
    ]
    .concat()
}
