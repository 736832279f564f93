//! The library's error, and the one place where an error becomes an exit code.
//!
//! An error has a class, which gives the exit code; a cause, typed where code decides by it; and context, which is
//! added on the way up and never dropped: `error.context("ext4: function f")`.

use std::fmt;

use crate::blocker::Blocker;
use crate::say;

/// Result of this library.
pub type Result<T> = std::result::Result<T, Error>;

/// Exit codes of the command line.
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

/// How an error counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Failed; the guest is unchanged.
    Failed,
    /// Busy, blocked or not ready; the guest is unchanged.
    TryAgain,
    /// Does not fit this guest.
    NotApplicable,
    /// Failed midway; the old state is back and verified.
    RolledBack,
    /// Failed midway; the state could not be verified.
    Uncertain,
    /// Wrong usage that the parser could not see.
    Usage,
}

/// What went wrong.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Cause {
    /// A sentence. It says what was expected, what was found, where, and what to do.
    #[error("{0}")]
    Said(String),
    /// No quiescent moment was found.
    #[error(transparent)]
    Blocked(Box<Blocked>),
    /// The guest is in the middle of a change of its own, or made one since the plan was made. Nothing was changed, and
    /// a plan that is made anew may hold. The sentence says what it was.
    #[error("{0}")]
    Passing(String),
    /// A module that the payload changes is not loaded. The sentence says which.
    #[error("{0}")]
    NotLoaded(String),
    /// A newer xen-locus wrote what is in the guest, in a format that this one does not know. Nothing was changed. The
    /// sentence says what it is.
    #[error("{0}")]
    NewerFormat(String),
    /// A change of a payload took place in part.
    #[error(transparent)]
    Torn(Torn),
    /// The guest's page tables lead to the arena, and its memory is gone. Nothing was changed. The sentence says more.
    #[error("{0}")]
    ArenaLost(String),
    /// The payload file.
    #[error(transparent)]
    Payload(locus_payload::PayloadError),
    /// The guest's kernel could not be read or understood.
    #[error(transparent)]
    Kernel(locus_kernel::Error),
    /// Guest memory.
    #[error(transparent)]
    Memory(locus_guest::Error),
    /// A call into Xen.
    #[error(transparent)]
    Xen(locus_xen::Error),
}

/// A change that took place in part: neither its old nor its new state is in the guest.
#[derive(Debug, thiserror::Error)]
#[error("{why}")]
pub struct Torn {
    /// Name of the payload that it is about.
    pub patch: String,
    /// SHA-256 of the payload's file, in hex.
    pub sha256: String,
    /// A sentence that says what was found.
    pub why: String,
}

/// No quiescent moment was found; no function of the guest was changed.
#[derive(Debug, thiserror::Error)]
#[error(
    "{what}: blocked after {} in {waited_ms} ms; no function was changed. Try again, or wait longer with --timeout",
    say::count(self.attempts, "attempt", "attempts")
)]
pub struct Blocked {
    /// What was tried.
    pub what: String,
    /// Number of pauses tried.
    pub attempts: u32,
    /// Time spent, in milliseconds.
    pub waited_ms: u64,
    /// The threads that were in the way at the last attempt.
    pub blockers: Vec<Blocker>,
}

/// What went wrong, how that counts, and what it was about.
#[derive(Debug)]
pub struct Error {
    class: Class,
    cause: Box<Cause>,
    /// The innermost first.
    context: Vec<String>,
    /// What else is so now, in a sentence; empty if nothing is.
    note: String,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for about in self.context.iter().rev() {
            write!(f, "{about}: ")?;
        }
        self.cause.fmt(f)?;
        match self.note.is_empty() {
            true => Ok(()),
            false => write!(f, ". {}", self.note),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.cause.source()
    }
}

impl Error {
    fn new(class: Class, cause: Cause) -> Error {
        Error {
            class,
            cause: Box::new(cause),
            context: Vec::new(),
            note: String::new(),
        }
    }

    /// Of this class.
    #[must_use]
    pub fn said(class: Class, what: impl Into<String>) -> Error {
        Error::new(class, Cause::Said(what.into()))
    }

    /// Of class [`Class::Failed`].
    #[must_use]
    pub fn failed(what: impl Into<String>) -> Error {
        Error::said(Class::Failed, what)
    }

    /// Of class [`Class::TryAgain`].
    #[must_use]
    pub fn try_again(what: impl Into<String>) -> Error {
        Error::said(Class::TryAgain, what)
    }

    /// Of class [`Class::TryAgain`], because of what the guest does or just did: it is tried again by itself, as long as
    /// there is time.
    #[must_use]
    pub fn passing(what: impl Into<String>) -> Error {
        let said = format!("{}; nothing was changed", what.into());
        Error::new(Class::TryAgain, Cause::Passing(said))
    }

    /// Of class [`Class::NotApplicable`].
    #[must_use]
    pub fn not_applicable(what: impl Into<String>) -> Error {
        Error::said(Class::NotApplicable, what)
    }

    /// Of class [`Class::NotApplicable`], because a module is not loaded: that may change.
    #[must_use]
    pub fn not_loaded(what: impl Into<String>) -> Error {
        Error::new(Class::NotApplicable, Cause::NotLoaded(what.into()))
    }

    /// Of class [`Class::NotApplicable`]: `what` was written by a newer xen-locus.
    #[must_use]
    pub fn newer_format(what: impl fmt::Display) -> Error {
        let said = format!(
            "{what}: applied by a newer xen-locus; nothing was changed. Use that version for this guest"
        );
        Error::new(Class::NotApplicable, Cause::NewerFormat(said))
    }

    /// Of class [`Class::NotApplicable`]: the arena's entries at `base` are there, and the memory in `frame` is gone.
    #[must_use]
    pub fn arena_lost(base: impl fmt::Display, frame: impl fmt::Display) -> Error {
        let said = format!(
            "the memory of the arena at {base} is gone: its page-table entry leads to {frame}, which has no memory. The \
             guest hibernated while payloads were in it, and came back without them; nothing was changed. Its text, its \
             list of modules or its timers may still lead there: reboot it now"
        );
        Error::new(Class::NotApplicable, Cause::ArenaLost(said))
    }

    /// Of class [`Class::RolledBack`].
    #[must_use]
    pub fn rolled_back(what: impl Into<String>) -> Error {
        Error::said(Class::RolledBack, what)
    }

    /// Of class [`Class::Uncertain`].
    #[must_use]
    pub fn uncertain(what: impl Into<String>) -> Error {
        Error::said(Class::Uncertain, what)
    }

    /// Of class [`Class::Usage`].
    #[must_use]
    pub fn usage(what: impl Into<String>) -> Error {
        Error::said(Class::Usage, what)
    }

    /// The same error, whose message begins with what it is about.
    #[must_use]
    pub fn context(mut self, about: impl Into<String>) -> Error {
        self.context.push(about.into());
        self
    }

    /// The same error, whose message ends with a sentence about what else is so now.
    #[must_use]
    pub fn note(mut self, also: impl Into<String>) -> Error {
        self.note = also.into();
        self
    }

    /// How it counts.
    #[must_use]
    pub fn class(&self) -> Class {
        self.class
    }

    /// What went wrong.
    #[must_use]
    pub fn cause(&self) -> &Cause {
        &self.cause
    }

    /// The threads that are in the way, if that is the cause.
    #[must_use]
    pub fn blocked(&self) -> Option<&Blocked> {
        match self.cause() {
            Cause::Blocked(blocked) => Some(blocked),
            _ => None,
        }
    }

    /// Whether it is not known how the guest was left.
    #[must_use]
    pub fn is_uncertain(&self) -> bool {
        self.class == Class::Uncertain
    }

    /// Whether the cause may pass by itself.
    #[must_use]
    pub fn is_passing(&self) -> bool {
        matches!(self.cause(), Cause::Passing(_))
    }

    /// Whether the cause is that the guest's kernel does not run yet.
    #[must_use]
    pub fn is_not_ready(&self) -> bool {
        matches!(
            self.cause(),
            Cause::Kernel(locus_kernel::Error::NotReady(_))
        )
    }

    /// Whether the cause is that a module is not loaded.
    #[must_use]
    pub fn is_not_loaded(&self) -> bool {
        matches!(self.cause(), Cause::NotLoaded(_))
    }

    /// Whether the cause is that a newer xen-locus wrote what is in the guest.
    #[must_use]
    pub fn is_newer_format(&self) -> bool {
        matches!(self.cause(), Cause::NewerFormat(_))
    }

    /// Whether the cause is that the arena's memory is gone.
    #[must_use]
    pub fn is_arena_lost(&self) -> bool {
        matches!(self.cause(), Cause::ArenaLost(_))
    }

    /// The change that took place in part, if that is the cause.
    #[must_use]
    pub fn torn(&self) -> Option<&Torn> {
        match self.cause() {
            Cause::Torn(torn) => Some(torn),
            _ => None,
        }
    }

    /// What became of an action, in one word.
    #[must_use]
    pub fn result(&self) -> &'static str {
        if self.blocked().is_some() {
            return "blocked";
        }
        match self.class {
            Class::Failed | Class::Usage => "failed",
            Class::TryAgain => "try-again",
            Class::NotApplicable => "not-applicable",
            Class::RolledBack => "rolled-back",
            Class::Uncertain => "uncertain",
        }
    }

    /// The exit code that tells a script what happened.
    #[must_use]
    pub fn exit_code(&self) -> ExitCode {
        match self.class {
            Class::Failed => ExitCode::Failed,
            Class::TryAgain => ExitCode::TryAgain,
            Class::NotApplicable => ExitCode::NotApplicable,
            Class::RolledBack => ExitCode::RolledBack,
            Class::Uncertain => ExitCode::Uncertain,
            Class::Usage => ExitCode::Usage,
        }
    }
}

impl From<Blocked> for Error {
    fn from(blocked: Blocked) -> Error {
        Error::new(Class::TryAgain, Cause::Blocked(Box::new(blocked)))
    }
}

impl From<Torn> for Error {
    fn from(torn: Torn) -> Error {
        Error::new(Class::Uncertain, Cause::Torn(torn))
    }
}

impl From<locus_payload::PayloadError> for Error {
    fn from(error: locus_payload::PayloadError) -> Error {
        let class = match error.kind.is_damage() {
            true => Class::Failed,
            false => Class::NotApplicable,
        };
        Error::new(class, Cause::Payload(error))
    }
}

/// A guest that lies is as little supported as another system.
fn of_memory(error: &locus_guest::Error) -> Class {
    match error {
        locus_guest::Error::Unsupported(_) | locus_guest::Error::Exhausted => Class::NotApplicable,
        _ => Class::Failed,
    }
}

impl From<locus_guest::Error> for Error {
    fn from(error: locus_guest::Error) -> Error {
        Error::new(of_memory(&error), Cause::Memory(error))
    }
}

impl From<locus_kernel::Error> for Error {
    fn from(error: locus_kernel::Error) -> Error {
        let class = match &error {
            locus_kernel::Error::NotReady(_) => Class::TryAgain,
            locus_kernel::Error::Memory(error) => of_memory(error),
            _ => Class::NotApplicable,
        };
        Error::new(class, Cause::Kernel(error))
    }
}

impl From<locus_xen::Error> for Error {
    fn from(error: locus_xen::Error) -> Error {
        let class = match &error {
            locus_xen::Error::Unsupported(_) => Class::NotApplicable,
            _ => Class::Failed,
        };
        Error::new(class, Cause::Xen(error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn context_is_never_dropped_and_the_outermost_comes_first() {
        for error in [
            Error::failed("why"),
            Error::uncertain("why"),
            Error::not_loaded("why"),
            locus_kernel::Error::Odd("why".into()).into(),
            locus_guest::Error::Odd("why".into()).into(),
        ] {
            let (class, said) = (error.class(), error.to_string());
            let told = error.context("inner").context("outer");
            assert_eq!(told.to_string(), format!("outer: inner: {said}"));
            assert_eq!(told.class(), class);
            let noted = told.note("So it is");
            assert_eq!(noted.to_string(), format!("outer: inner: {said}. So it is"));
            assert_eq!(noted.class(), class);
        }
    }

    #[test]
    fn the_class_of_what_a_lower_room_found_is_that_of_its_cause() {
        let exhausted = || locus_guest::Error::Exhausted;
        let odd = || locus_guest::Error::Odd(String::new());
        let code = |error: Error| error.exit_code();
        assert_eq!(code(exhausted().into()), ExitCode::NotApplicable);
        assert_eq!(code(odd().into()), ExitCode::Failed);
        let of_kernel = |error| code(locus_kernel::Error::Memory(error).into());
        assert_eq!(of_kernel(exhausted()), ExitCode::NotApplicable);
        assert_eq!(of_kernel(odd()), ExitCode::Failed);
        let not_ready = locus_kernel::Error::NotReady(String::new());
        assert_eq!(code(not_ready.into()), ExitCode::TryAgain);
        let unsupported = locus_xen::Error::Unsupported(String::new());
        assert_eq!(code(unsupported.clone().into()), ExitCode::NotApplicable);
        let memory: locus_guest::Error = unsupported.into();
        assert_eq!(code(memory.into()), ExitCode::NotApplicable);
    }
}
