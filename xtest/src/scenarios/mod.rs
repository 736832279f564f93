//! The scenarios of the suite, one file per subject.

mod apply;
mod bench;
mod refuse;
mod safety;
mod store;

use crate::scenario::Scenario;

/// All scenarios, in the order they run within their profile.
pub fn all() -> Vec<Scenario> {
    [bench::SCENARIOS, apply::SCENARIOS, refuse::SCENARIOS, store::SCENARIOS, safety::SCENARIOS].concat()
}
