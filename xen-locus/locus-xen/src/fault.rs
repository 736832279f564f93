//! Fault points: places at which a test can make a run fail, stop or die.
//!
//! Every call into Xen, every XenStore call, every file operation of a change and every write to a guest
//! passes [`point`] first. In a program built with the feature `faults`, the environment variable [`VARIABLE`] selects
//! one of them, and what happens there. In all other programs [`point`] does nothing.

/// `N:WHAT`, `N:WHAT:FROM` or `N:WHAT:FROM:rows`: at the N-th fault point WHAT happens: `kill`, `stop`, `fail`, or the
/// run gets the signal of that number. If FROM is given, counting begins at the first fault point with that name. With
/// `rows`, fault points of one name in a row count once: the first of them is meant. A search maps memory a thousand times
/// in a row, and changes nothing.
pub const VARIABLE: &str = "XEN_LOCUS_FAULT";
/// If it is set, with any value, the scans of stacks in such a program find no thread inside a function.
#[cfg(feature = "faults")]
const BLIND: &str = "XEN_LOCUS_BLIND";

/// If it is set, with any value, such a program makes no use of handles of processes (pidfd_open(2)), as on a kernel
/// before 5.3.
#[cfg(feature = "faults")]
const NO_PIDFD: &str = "XEN_LOCUS_NO_PIDFD";

/// The fault point `name`.
///
/// # Errors
/// The test selected this fault point to fail.
#[cfg(not(feature = "faults"))]
#[inline]
pub fn point(_name: &str) -> std::io::Result<()> {
    Ok(())
}

/// Whether the scans of stacks are to find no thread. That breaks guests, so a test of the scans must fail then.
#[cfg(not(feature = "faults"))]
#[inline]
#[must_use]
pub fn is_blind() -> bool {
    false
}

/// Whether handles of processes are not to be used.
#[cfg(not(feature = "faults"))]
#[inline]
#[must_use]
pub fn has_no_pidfd() -> bool {
    false
}

#[cfg(feature = "faults")]
pub use chosen::{has_no_pidfd, is_blind, point};

#[cfg(feature = "faults")]
mod chosen {
    use std::io::{self, Write as _};
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
    use std::sync::{Mutex, OnceLock, PoisonError};

    struct Order {
        nth: u64,
        what: String,
        from: Option<String>,
        is_by_row: bool,
    }

    static IS_BLIND: OnceLock<bool> = OnceLock::new();
    static ORDER: OnceLock<Option<Order>> = OnceLock::new();
    static PASSED: AtomicU64 = AtomicU64::new(0);
    static COUNTS: AtomicBool = AtomicBool::new(false);
    /// The name of the last fault point.
    static LAST: Mutex<String> = Mutex::new(String::new());

    fn order() -> Option<Order> {
        let text = std::env::var(super::VARIABLE).ok()?;
        let mut parts = text.split(':');
        Some(Order {
            nth: parts.next()?.parse().ok()?,
            what: parts.next()?.to_owned(),
            from: parts.next().map(str::to_owned),
            is_by_row: parts.next() == Some("rows"),
        })
    }

    /// Whether the scans of stacks are to find no thread.
    #[must_use]
    pub fn is_blind() -> bool {
        *IS_BLIND.get_or_init(|| std::env::var_os(super::BLIND).is_some())
    }

    /// Whether handles of processes are not to be used.
    #[must_use]
    pub fn has_no_pidfd() -> bool {
        std::env::var_os(super::NO_PIDFD).is_some()
    }

    /// Whether the fault point before this one had the same name.
    fn is_like_the_last(name: &str) -> bool {
        let mut last = LAST.lock().unwrap_or_else(PoisonError::into_inner);
        let is_like = *last == name;
        if !is_like {
            name.clone_into(&mut last);
        }
        is_like
    }

    /// The fault point `name`.
    ///
    /// # Errors
    /// The test selected this fault point to fail.
    pub fn point(name: &str) -> io::Result<()> {
        let Some(order) = ORDER.get_or_init(order) else {
            return Ok(());
        };
        if order.from.as_deref().is_none_or(|from| from == name) {
            COUNTS.store(true, Ordering::SeqCst);
        }
        if !COUNTS.load(Ordering::SeqCst) || (order.is_by_row && is_like_the_last(name)) {
            return Ok(());
        }
        if PASSED.fetch_add(1, Ordering::SeqCst) + 1 != order.nth {
            return Ok(());
        }
        let what = order.what.as_str();
        // The reader of stderr may be gone.
        let _ = writeln!(io::stderr(), "xen-locus: fault: {what} at {name}");
        if what == "fail" {
            return Err(io::Error::other(format!("a test made it fail ({name})")));
        }
        let signal = match what {
            "stop" => libc::SIGSTOP,
            "kill" => libc::SIGKILL,
            // A word that is misspelt must not pass for something that was done.
            _ => what.parse().map_err(io::Error::other)?,
        };
        crate::process::signal_self(signal);
        Ok(())
    }
}
