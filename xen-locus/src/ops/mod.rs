//! Operations on guests, for commands and the daemon: under the guest's lock, logged and published.
//!
//! - `run`: the order of every operation (log, lock, recover, act, publish, line, journal);
//! - `actions`: apply, revert, nudge, reclaim, recover, each by that order;
//! - `lock`, `publish`, `unpublished`, `status`: the steps that have a subject of their own;
//! - [`recover_all`]: interrupted runs of all guests;
//! - [`host`], [`operator`]: the host that they work on, and the person behind a command.

mod actions;
pub mod guest;
pub mod host;
mod lock;
pub mod operator;
mod publish;
pub mod recover_all;
mod run;
mod status;
#[cfg(test)]
mod tests;
mod unpublished;

pub use actions::{apply, nudge, reclaim, recover, recover_absent, revert, revert_all};
pub use lock::{sweep, take_for_requests};
pub use publish::{look, publish};
pub use run::Operator;
pub use status::{
    is_known_to_log, patches, patches_and_drained, warn_of_nudge, GoneReason, Patch, PatchState,
    Replaced, Status,
};
pub use unpublished::unpublished;
