//! What a scan or a look found.

use std::sync::Arc;

use locus_guest::addr::Gva;
use locus_kernel::Kernel;

use crate::blocker::{Blocker, Reason};

/// What a scan or a look found.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    /// No thread is in the way.
    Quiet,
    /// These threads are in the way.
    Blocked(Vec<InTheWay>),
    /// Tasks were born since the list was read: list them again, or catch up.
    TasksChanged,
    /// More tasks ran since the scan than the switch counters explain. To find out which ones takes longer than another
    /// attempt.
    TooManyRan,
    /// The look would take longer than the pause may last.
    TooLong,
}

/// A thread in the way, as a look in the pause notes it: nothing is looked up for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InTheWay {
    /// Thread id; 0 for an idle task or a vCPU whose task isn't known.
    pub pid: u32,
    /// Name of the thread.
    pub comm: String,
    /// Why it is in the way.
    pub reason: Reason,
    /// Where.
    pub place: Place,
}

/// Where a thread is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// In the watched range of this name, so many bytes behind its start.
    In(Arc<str>, u64),
    /// At this guest virtual address.
    At(Gva),
}

impl InTheWay {
    fn named(self, kernel: &Kernel<'_>) -> Blocker {
        let (function, offset) = match self.place {
            Place::In(name, offset) => (name.as_ref().to_owned(), offset),
            Place::At(at) => {
                let covering = kernel.symbols.covering(at);
                covering.unwrap_or_else(|| ("?".into(), 0))
            }
        };
        Blocker {
            pid: self.pid,
            comm: self.comm,
            reason: self.reason,
            function,
            offset,
        }
    }
}

impl Verdict {
    /// The threads in the way, sorted by thread id and function; `None` if the verdict does not know
    /// them. It looks up names in `kernel`, which takes long in a pause.
    #[must_use]
    pub fn blockers(self, kernel: &Kernel<'_>) -> Option<Vec<Blocker>> {
        match self {
            Verdict::Quiet => Some(Vec::new()),
            Verdict::Blocked(all) => {
                let mut all: Vec<Blocker> = all.into_iter().map(|t| t.named(kernel)).collect();
                all.sort_by(|a, b| (a.pid, &a.function).cmp(&(b.pid, &b.function)));
                Some(all)
            }
            Verdict::TasksChanged | Verdict::TooManyRan | Verdict::TooLong => None,
        }
    }

    /// Whether a sleeping thread is in the way. That is true whether the guest is paused or not.
    #[must_use]
    pub fn is_sleepers(&self) -> bool {
        let sleeps = |t: &InTheWay| matches!(t.reason, Reason::SleepingOn | Reason::RestartBlock);
        matches!(self, Verdict::Blocked(all) if all.iter().any(sleeps))
    }
}
