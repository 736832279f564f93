//! The ranges of code in which no thread may be, and whether a word is an address in one of them.

use locus_guest::addr::{Gva, Range};
use locus_guest::fetch;
use locus_kernel::{unwind, Kernel};

/// A range of the guest's code in which no thread may be.
#[derive(Clone, Debug)]
pub struct Watched {
    /// From its first byte to its end (guest virtual addresses).
    pub range: Range,
    /// The name that messages use, mostly that of a function.
    pub name: String,
}

/// All ranges in which no thread may be.
#[derive(Clone, Debug, Default)]
pub struct Watch {
    /// Sorted by start. Beside each range is the highest end of all ranges up to it.
    sorted: Vec<(Watched, u64)>,
}

impl Watch {
    /// Watches `ranges` and the trampolines behind which kretprobes and the function-graph tracer
    /// hide return addresses. A thread that will return to a trampoline can't be judged, because its
    /// real return address is not on its stack.
    #[must_use]
    pub fn new(kernel: &Kernel<'_>, mut ranges: Vec<Watched>) -> Watch {
        let space = kernel.space.fresh();
        for Watched { range, .. } in &mut ranges {
            // The byte behind the range begins the next function, and the address of that may well be on a stack.
            if range.len() > 0 && !unwind::ends_call(&space, range.end) {
                range.end = Gva(range.end.0 - 1);
            }
        }
        ranges.extend(
            unwind::hiding(kernel).map(|(name, range)| trampoline(range.start, range.len(), name)),
        );
        Watch::of(ranges)
    }

    /// The ranges, each with its name. Of equal ranges the one that gives a hit its name comes first.
    pub fn ranges(&self) -> impl Iterator<Item = (&Range, &str)> {
        self.sorted.iter().rev().map(|(w, _)| (&w.range, &*w.name))
    }

    /// Watches just `ranges`, in the form in which [`Watch::ranges`] gives them.
    #[must_use]
    pub fn of(mut ranges: Vec<Watched>) -> Watch {
        // `hit` reports the last range that fits. So of ranges with the same start the innermost comes last, and of
        // equal ranges the one that the caller named first.
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

    /// The same ranges and `more`, which are watched as they are.
    #[must_use]
    pub fn with(&self, more: Vec<Watched>) -> Watch {
        let own = self.sorted.iter().rev().map(|(watched, _)| watched.clone());
        Watch::of(own.chain(more).collect())
    }

    /// Whether a thread could go on at `word` in a watched range: the range, and the offset in it in bytes.
    ///
    /// The first byte is no such place: a thread that is there, or has a pointer to there, enters the
    /// function by the redirect. The address behind the last byte is one if the last instruction is a
    /// call (a call that never returns).
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

    /// As [`Watch::hit`], for the address `rip` of the instruction that a CPU is at. There the first byte counts too. The
    /// CPU enters the function by the redirect, unless it waits for a device model with an instruction that it has read
    /// already. Then Xen completes that instruction, and the CPU goes on behind it, within the redirect
    /// (xen/arch/x86/hvm/emulate.c: `struct hvmemul_cache`).
    #[must_use]
    pub fn runs_in(&self, rip: u64) -> Option<(&Watched, u64)> {
        let first = || {
            let (watched, _) = self.hit(rip.checked_add(1)?)?;
            Some((watched, rip.checked_sub(watched.range.start.0)?))
        };
        self.hit(rip).or_else(first)
    }

    /// The hits among the 64-bit words of `stack`.
    pub(super) fn hits<'w>(&'w self, stack: &'w [u8]) -> impl Iterator<Item = (&'w Watched, u64)> {
        // Most words are far from all ranges. Two comparisons show that.
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

/// The range to watch for a trampoline at `at`. A hidden return address is replaced by the address of
/// the trampoline's first byte, which is no hit in a function. So the range begins one byte before.
fn trampoline(at: Gva, len: u64, name: &str) -> Watched {
    let start = Gva(at.0.saturating_sub(1));
    Watched {
        range: Range::new(start, len.saturating_add(1)),
        name: name.into(),
    }
}

#[cfg(test)]
mod tests;
