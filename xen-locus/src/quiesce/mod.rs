//! Is anybody inside the code that is about to change?
//!
//! Every vCPU's registers and every task's kernel stack are looked at. A stack is scanned: each word of
//! its live part that could be a return address into a watched range counts. That gives false alarms
//! (a stale or unrelated word), never misses. A task that sleeps is cleared of a false alarm by
//! unwinding its stack ([`locus_kernel::unwind`]) while the guest runs; where that can't be relied on, the alarm
//! stands.
//!
//! The work is split so that the guest is paused only for the last look, and that costs what changed
//! since the one before it, not what there is ([`prescan`]).

mod ledger;
mod look;
mod prescan;

pub use prescan::Prescan;

use locus_guest::addr::{Gva, Range};
use locus_guest::{fetch, Vcpu};
use locus_kernel::{unwind, Kernel};

use crate::blocker::{Blocker, Reason};
use crate::error::Result;

/// A range that nobody may be in.
#[derive(Clone, Debug)]
pub struct Watched {
    /// From its first byte to its end.
    pub range: Range,
    /// What a person calls it.
    pub name: String,
}

/// Ranges that nobody may be in.
#[derive(Clone, Debug, Default)]
pub struct Watch {
    /// By where they begin; each with the highest end of those up to it.
    sorted: Vec<(Watched, u64)>,
}

impl Watch {
    /// Watches `ranges` and the trampolines behind which kretprobes and the function-graph tracer
    /// hide return addresses: who is below one of those can't be judged.
    #[must_use]
    pub fn new(kernel: &Kernel<'_>, mut ranges: Vec<Watched>) -> Watch {
        let space = kernel.space.fresh();
        for Watched { range, .. } in &mut ranges {
            // What stands there begins the next function, whose address may well be on a stack.
            if range.len() > 0 && !unwind::ends_call(&space, range.end) {
                range.end = Gva(range.end.0 - 1);
            }
        }
        ranges.extend(
            unwind::hiding(kernel).map(|(name, range)| trampoline(range.start, range.len(), name)),
        );
        Watch::of(ranges)
    }

    /// The ranges, each with what a person calls it.
    pub fn ranges(&self) -> impl Iterator<Item = (&Range, &str)> {
        self.sorted.iter().map(|(w, _)| (&w.range, &*w.name))
    }

    /// Watches just `ranges`, as [`Watch::ranges`] gave them.
    #[must_use]
    pub fn of(mut ranges: Vec<Watched>) -> Watch {
        // The last that fits is reported: of those that begin together the innermost, of equal ones the
        // one that was named first.
        ranges.reverse();
        ranges.sort_by_key(|w| (w.range.start, std::cmp::Reverse(w.range.end)));
        let mut highest = 0;
        let with_highest = |watched: Watched| {
            highest = watched.range.end.0.max(highest);
            (watched, highest)
        };
        Watch {
            sorted: ranges.into_iter().map(with_highest).collect(),
        }
    }

    /// Whether `word` could be a place in a watched range where a thread goes on. The first byte is
    /// no such place: who is there, or has a pointer to there, enters the function by the redirect.
    /// One past the end is, if the last instruction is a call: one that never returns.
    #[must_use]
    pub fn hit(&self, word: u64) -> Option<(&Watched, u64)> {
        if locus_xen::fault::is_blind() {
            return None;
        }
        let below = self.sorted.partition_point(|(w, _)| w.range.start.0 < word);
        self.sorted
            .get(..below)?
            .iter()
            .rev()
            .take_while(|(_, highest)| word <= *highest)
            .find(|(w, _)| word <= w.range.end.0)
            .map(|(w, _)| (w, word - w.range.start.0))
    }

    /// The hits among the 64-bit words of `stack`.
    fn hits<'w>(&'w self, stack: &'w [u8]) -> impl Iterator<Item = (&'w Watched, u64)> {
        // Most words are far from all ranges, which two comparisons show.
        let first = self
            .sorted
            .first()
            .map_or(u64::MAX, |(w, _)| w.range.start.0);
        let last = self.sorted.last().map_or(0, |&(_, highest)| highest);
        let words = stack.chunks_exact(8).filter_map(|w| fetch::u64(w, 0));
        words
            .filter(move |&word| first < word && word <= last)
            .filter_map(|word| self.hit(word))
    }
}

/// A trampoline at `at`: in the place of a return address stands that of its first byte, which is no
/// hit of a function's.
fn trampoline(at: Gva, len: u64, name: &str) -> Watched {
    let start = Gva(at.0.saturating_sub(1));
    Watched {
        range: Range::new(start, len.saturating_add(1)),
        name: name.into(),
    }
}

/// What a look showed.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Nobody is in the way.
    Quiet,
    /// These are.
    Blocked(Vec<Blocker>),
    /// The guest's tasks changed since they were listed: list them again.
    Moved,
    /// Tasks ran since the rehearsal, and to find out which takes longer than to try again.
    Stirred,
    /// It would take longer than the pause may last.
    TooLong,
}

impl Verdict {
    /// Who is in the way, by thread id and function; `None` when that isn't known.
    #[must_use]
    pub fn blockers(self) -> Option<Vec<Blocker>> {
        match self {
            Verdict::Quiet => Some(Vec::new()),
            Verdict::Blocked(mut all) => {
                all.sort_by(|a, b| (a.pid, &a.function).cmp(&(b.pid, &b.function)));
                Some(all)
            }
            Verdict::Moved | Verdict::Stirred | Verdict::TooLong => None,
        }
    }

    /// Somebody sleeps in the way: that holds whether the guest is paused or not.
    #[must_use]
    pub fn is_sleepers(&self) -> bool {
        let sleeps = |b: &Blocker| matches!(b.reason, Reason::SleepingOn | Reason::RestartBlock);
        matches!(self, Verdict::Blocked(all) if all.iter().any(sleeps))
    }
}

/// Who is inside one of the ranges of `watch`, in a guest that does not run.
///
/// # Errors
/// Memory can't be read.
pub fn inside(kernel: &Kernel<'_>, vcpus: &[Vcpu], watch: &Watch) -> Result<Vec<Blocker>> {
    let mut scan = Prescan::new(kernel, watch)?;
    scan.refresh()?;
    scan.rehearse()?;
    scan.acquit()?;
    // What was acquitted counts from the next scan on.
    scan.rehearse()?;
    let verdict = scan.look(vcpus, true, &|| false)?;
    Ok(verdict.blockers().unwrap_or_default())
}

#[cfg(test)]
mod tests;
