//! The scenarios of the suite, one file per subject.

mod apply;
mod bench;

use crate::scenario::Scenario;

/// All scenarios, in the order they run within their profile.
pub fn all() -> Vec<Scenario> {
    [bench::SCENARIOS, apply::SCENARIOS].concat()
}
