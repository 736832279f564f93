//! The library's error, and the one place where an error becomes an exit code.

use locus_guest as guest;
use locus_kernel as kernel;
use locus_payload as patch;
use locus_xen as xen;

use crate::blocker::Blocker;

/// Result of this library.
pub type Result<T> = std::result::Result<T, Error>;

/// Exit codes of the command line (DESIGN.md section 6).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum ExitCode {
    /// Done, or nothing to do.
    Done = 0,
    /// Failed, the guest is unchanged.
    Failed = 1,
    /// Blocked, busy or timed out: try again.
    TryAgain = 2,
    /// Not applicable: another kernel, or something not supported.
    NotApplicable = 3,
    /// Refused by signature or policy.
    Refused = 4,
    /// Failed midway, rolled back and verified.
    RolledBack = 5,
    /// The guest's state is uncertain: run `recover`.
    Uncertain = 6,
    /// Wrong usage.
    Usage = 64,
}

/// What can go wrong. Every message says what was expected, what was found, where, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Failed; the guest is unchanged.
    #[error("{0}")]
    Failed(String),
    /// Busy or not ready; the guest is unchanged.
    #[error("{0}")]
    TryAgain(String),
    /// No quiescent moment was found; the guest is unchanged.
    #[error(
        "{what}: blocked after {attempts} attempts in {waited_ms} ms; nothing was changed. \
             Try again, or wait longer with --timeout"
    )]
    Blocked {
        /// What was tried.
        what: String,
        /// Number of pauses tried.
        attempts: u32,
        /// Time spent, in milliseconds.
        waited_ms: u64,
        /// Who was in the way at the last attempt.
        blockers: Vec<Blocker>,
    },
    /// Does not fit this guest.
    #[error("{0}")]
    NotApplicable(String),
    /// A module that the payload changes is not loaded: does not fit this guest now.
    #[error("{0}")]
    NotLoaded(String),
    /// Failed midway; the old state is back and verified.
    #[error("{0}")]
    RolledBack(String),
    /// Failed midway; the state could not be verified.
    #[error("{0}")]
    Uncertain(String),
    /// Wrong usage that the parser could not see.
    #[error("{0}")]
    Usage(String),
    /// The payload file.
    #[error(transparent)]
    Payload(#[from] patch::PayloadError),
    /// The guest's kernel could not be read or understood.
    #[error(transparent)]
    Kernel(#[from] kernel::Error),
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] guest::Error),
    /// A call into Xen.
    #[error(transparent)]
    Xen(#[from] xen::Error),
}

impl Error {
    /// The same error, its message with `what` before it: for those that name no subject.
    #[must_use]
    pub fn within(self, what: &str) -> Error {
        match self {
            Error::NotApplicable(why) => Error::NotApplicable(format!("{what}: {why}")),
            Error::NotLoaded(why) => Error::NotLoaded(format!("{what}: {why}")),
            Error::TryAgain(why) => Error::TryAgain(format!("{what}: {why}")),
            other => other,
        }
    }

    /// What became of an action, in one word.
    #[must_use]
    pub fn result(&self) -> &'static str {
        match (self, self.exit_code()) {
            (Error::Blocked { .. }, _) => "blocked",
            (_, ExitCode::TryAgain) => "try-again",
            (_, ExitCode::NotApplicable) => "not-applicable",
            (_, ExitCode::Refused) => "refused",
            (_, ExitCode::RolledBack) => "rolled-back",
            (_, ExitCode::Uncertain) => "uncertain",
            _ => "failed",
        }
    }

    /// The exit code that tells a script what happened.
    #[must_use]
    pub fn exit_code(&self) -> ExitCode {
        match self {
            Error::Xen(xen::Error::Unsupported(_))
            | Error::Memory(guest::Error::Unsupported(_)) => ExitCode::NotApplicable,
            // A guest that lies is as little supported as another system.
            Error::Memory(guest::Error::Exhausted)
            | Error::Kernel(kernel::Error::Memory(guest::Error::Exhausted)) => {
                ExitCode::NotApplicable
            }
            Error::Failed(_) | Error::Memory(_) | Error::Xen(_) => ExitCode::Failed,
            Error::TryAgain(_) | Error::Blocked { .. } => ExitCode::TryAgain,
            Error::Kernel(kernel::Error::NotReady(_)) => ExitCode::TryAgain,
            Error::Kernel(kernel::Error::Memory(_)) => ExitCode::Failed,
            Error::Payload(e) if e.kind.is_damage() => ExitCode::Failed,
            Error::NotApplicable(_)
            | Error::NotLoaded(_)
            | Error::Kernel(_)
            | Error::Payload(_) => ExitCode::NotApplicable,
            Error::RolledBack(_) => ExitCode::RolledBack,
            Error::Uncertain(_) => ExitCode::Uncertain,
            Error::Usage(_) => ExitCode::Usage,
        }
    }
}
