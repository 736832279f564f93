//! The life cycle of guests with patches in force: they are saved and restored, migrated, rebooted, destroyed, and
//! get more or less memory and processors.

mod crash;
mod destroy;
mod migrate;
mod previous;
mod reboot;
mod save;
mod sizes;
mod text;

use crate::scenario::Scenario;

/// Scenarios that are short enough for a usual run.
pub fn scenarios() -> Vec<Scenario> {
    [save::SCENARIOS, destroy::SCENARIOS].concat()
}

/// Scenarios that take too long for a usual run.
pub fn matrix() -> Vec<Scenario> {
    [
        save::MATRIX,
        destroy::MATRIX,
        crash::MATRIX,
        reboot::MATRIX,
        sizes::MATRIX,
        migrate::MATRIX,
        previous::MATRIX,
    ]
    .concat()
}
