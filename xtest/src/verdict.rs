//! How a scenario ends, in the states of Xen's own test framework (XTF).

use std::fmt;

/// Any result except success.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// The scenario did not run, and why.
    Skip(String),
    /// The testbed broke. This says nothing about xen-locus.
    Error(String),
    /// xen-locus does not do what the scenario expects.
    Failure(String),
    /// A guest, dom0 or the hypervisor died.
    Crash(String),
}

impl Verdict {
    /// A [`Self::Failure`].
    pub fn failure(why: impl Into<String>) -> Self {
        Self::Failure(why.into())
    }

    /// A [`Self::Crash`].
    pub fn crash(why: impl Into<String>) -> Self {
        Self::Crash(why.into())
    }

    /// A [`Self::Skip`].
    pub fn skip(why: impl Into<String>) -> Self {
        Self::Skip(why.into())
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Skip(why) => write!(f, "SKIP: {why}"),
            Self::Error(why) => write!(f, "ERROR: {why}"),
            Self::Failure(why) => write!(f, "FAILURE: {why}"),
            Self::Crash(why) => write!(f, "CRASH: {why}"),
        }
    }
}

impl From<anyhow::Error> for Verdict {
    fn from(e: anyhow::Error) -> Self {
        Self::Error(format!("{e:#}"))
    }
}

impl From<std::io::Error> for Verdict {
    fn from(e: std::io::Error) -> Self {
        Self::Error(e.to_string())
    }
}

/// Ends the scenario with [`Verdict::Failure`] unless the condition holds. The message is formatted as by
/// `format!`. Without a message the condition itself is shown.
#[macro_export]
macro_rules! check {
    ($cond:expr $(,)?) => {
        $crate::check!($cond, "expected: {}", stringify!($cond))
    };
    ($cond:expr, $($arg:tt)+) => {
        if !$cond {
            return Err($crate::verdict::Verdict::Failure(format!($($arg)+)));
        }
    };
}

/// Ends the scenario with [`Verdict::Failure`] unless both sides are equal; shows both.
#[macro_export]
macro_rules! check_eq {
    ($left:expr, $right:expr $(,)?) => {
        $crate::check_eq!($left, $right, "{} is not {}", stringify!($left), stringify!($right))
    };
    ($left:expr, $right:expr, $($arg:tt)+) => {{
        let (left, right) = (&$left, &$right);
        if left != right {
            let what = format!($($arg)+);
            return Err($crate::verdict::Verdict::Failure(format!(
                "{what}: got {left:?}, expected {right:?}"
            )));
        }
    }};
}
