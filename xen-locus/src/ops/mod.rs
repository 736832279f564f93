//! Operations on guests, for commands and the daemon: under the guest's lock, recorded and published.

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

pub use actions::{apply, forget, nudge, recover, revert, revert_all};
pub use lock::sweep;
pub use publish::{look, publish};
pub use run::Operator;
pub use status::{patches, GoneReason, Patch, PatchState, Replaced, Status};
