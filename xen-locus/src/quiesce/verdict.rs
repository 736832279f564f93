//! What a scan or a look found.

use crate::blocker::{Blocker, Reason};

/// What a scan or a look found.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    /// No thread is in the way.
    Quiet,
    /// These threads are in the way.
    Blocked(Vec<Blocker>),
    /// Tasks were born since the list was read: list them again, or catch up.
    TasksChanged,
    /// More tasks ran since the scan than the switch counters explain. To find out which ones takes longer than another
    /// attempt.
    TooManyRan,
    /// The look would take longer than the pause may last.
    TooLong,
}

impl Verdict {
    /// The threads in the way, sorted by thread id and function; `None` if the verdict does not know
    /// them.
    #[must_use]
    pub fn blockers(self) -> Option<Vec<Blocker>> {
        match self {
            Verdict::Quiet => Some(Vec::new()),
            Verdict::Blocked(mut all) => {
                all.sort_by(|a, b| (a.pid, &a.function).cmp(&(b.pid, &b.function)));
                Some(all)
            }
            Verdict::TasksChanged | Verdict::TooManyRan | Verdict::TooLong => None,
        }
    }

    /// Whether a sleeping thread is in the way. That is true whether the guest is paused or not.
    #[must_use]
    pub fn is_sleepers(&self) -> bool {
        let sleeps = |b: &Blocker| matches!(b.reason, Reason::SleepingOn | Reason::RestartBlock);
        matches!(self, Verdict::Blocked(all) if all.iter().any(sleeps))
    }
}
