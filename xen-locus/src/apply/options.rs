//! How patient a change is, and what ends it early.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::Duration;

use crate::error::{Error, Result};

/// How patient to be.
#[derive(Clone, Debug)]
pub struct Options {
    /// No new attempt begins after this time. At least one is made.
    pub timeout: Duration,
    /// Longest time in a pause until the last look is over; a look that takes longer is given up. Writing comes on top.
    pub max_pause: Duration,
    /// Threads may go on in the versions that are replaced, if the payload says that they may. Then only threads at the bytes
    /// that are written are waited for.
    pub entry_only: bool,
    /// Check and link, but write nothing.
    pub dry_run: bool,
    /// Set from outside to give up between two attempts.
    pub interrupted: Arc<AtomicBool>,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            timeout: Duration::from_secs(30),
            max_pause: Duration::from_millis(10),
            entry_only: false,
            dry_run: false,
            interrupted: Arc::default(),
        }
    }
}

impl Options {
    /// Ends an action that was asked to stop, while nothing is changed.
    ///
    /// # Errors
    /// [`Class::Failed`](crate::error::Class::Failed): it was.
    pub fn check_interrupted(&self) -> Result<()> {
        match self.interrupted.load(Ordering::SeqCst) {
            true => Err(Error::failed("interrupted; nothing was changed")),
            false => Ok(()),
        }
    }
}
