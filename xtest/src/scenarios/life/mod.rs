//! What happens to guests in their lives, with patches in force: they are saved and restored, moved,
//! started anew, destroyed, and get more or less of memory and processors.

mod crash;
mod destroy;
mod migrate;
mod reboot;
mod save;
mod sizes;
mod text;

use crate::scenario::Scenario;

/// See the names.
pub fn scenarios() -> Vec<Scenario> {
    [save::SCENARIOS, destroy::SCENARIOS].concat()
}

/// What takes too long for a usual run.
pub fn matrix() -> Vec<Scenario> {
    [
        save::MATRIX,
        destroy::MATRIX,
        crash::MATRIX,
        reboot::MATRIX,
        sizes::MATRIX,
        migrate::MATRIX,
    ]
    .concat()
}
