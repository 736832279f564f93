//! The ranges of code in which no thread may be, and whether a word is an address in one of them.
//!
//! Where the ranges are comes from the guest's own memory. So a look-up costs the same however they lie over each other,
//! and what each of them costs is taken from the guest's budget.

use std::sync::Arc;

use locus_guest::addr::{Gva, Range};
use locus_guest::fetch;
use locus_kernel::{unwind, Kernel};

use crate::error::{Error, Result};

/// A range of the guest's code in which no thread may be.
#[derive(Clone, Debug)]
pub struct Watched {
    /// From its first byte to its end (guest virtual addresses).
    pub range: Range,
    /// The name that messages use, mostly that of a function. The parts of one function share it.
    pub name: Arc<str>,
    /// How many bytes of the range are in front of the code, so that the first byte of that is a hit.
    front: u64,
}

impl Watched {
    /// A range whose first byte is no hit: a thread that is there, or has a pointer to there, enters the function by the
    /// redirect. So it is with the kernel's own version of a function, and with the bytes of a redirect.
    #[must_use]
    pub fn new(range: Range, name: impl Into<Arc<str>>) -> Watched {
        Watched {
            range,
            name: name.into(),
            front: 0,
        }
    }

    /// A range whose first byte is a hit like all others: no redirect is in it. A thread that has the address of a payload's
    /// function was on its way into it, and goes on there.
    #[must_use]
    pub fn whole(range: Range, name: impl Into<Arc<str>>) -> Watched {
        let front = range.start.0.min(1);
        let start = Gva(range.start.0 - front);
        Watched {
            range: Range { start, ..range },
            name: name.into(),
            front,
        }
    }

    /// The same under another name.
    #[must_use]
    pub fn called(self, name: impl Into<Arc<str>>) -> Watched {
        Watched {
            name: name.into(),
            ..self
        }
    }

    /// How far `word` is behind the start of the code.
    fn offset_of(&self, word: u64) -> Option<u64> {
        word.checked_sub(self.range.start.0)?
            .checked_sub(self.front)
    }
}

/// All ranges in which no thread may be.
#[derive(Clone, Debug, Default)]
pub struct Watch {
    /// Sorted by start. Of ranges with the same start the innermost is the last.
    sorted: Vec<Watched>,
    /// The words that are hits, sorted. No word is in two of them.
    spans: Vec<Span>,
}

/// Words that are hits in the same range.
#[derive(Clone, Copy, Debug)]
struct Span {
    first: u64,
    last: u64,
    /// The number of the range in [`Watch::sorted`].
    range: usize,
}

/// Units of the guest's budget for one range: it is kept, sorted and copied a few times.
const UNITS: u64 = 4;

/// Checks that each trampoline is known behind which the guest's kernel may hide return addresses. What is begun in a guest
/// asks for that; what is in force there can be taken out.
///
/// # Errors
/// [`Class::NotApplicable`](crate::error::Class::NotApplicable): it can hide some, and has no trampoline of a known name.
pub fn check_trampolines(kernel: &Kernel<'_>) -> Result<()> {
    let Some((function, at, names)) = unwind::unknown_hider(kernel) else {
        return Ok(());
    };
    Err(Error::not_applicable(format!(
        "the guest's kernel can exchange return addresses ({function} at {at}), and has no trampoline for that of a known \
         name; expected the symbol {}. So it can't be seen in which functions threads are; boot the guest with a kernel that \
         has it; nothing was changed",
        names.join(" or ")
    )))
}

impl Watch {
    /// Watches `ranges` and the trampolines behind which kretprobes and the function-graph tracer
    /// hide return addresses. A thread that will return to a trampoline can't be judged, because its
    /// real return address is not on its stack.
    ///
    /// # Errors
    /// The code behind a range can't be read, or the guest's budget is spent.
    pub fn new(kernel: &Kernel<'_>, mut ranges: Vec<Watched>) -> Result<Watch> {
        let space = kernel.space.fresh();
        space.budget().spend(UNITS * ranges.len() as u64)?;
        for Watched { range, .. } in &mut ranges {
            // The byte behind the range begins the next function, and the address of that may well be on a stack.
            if range.len() > 0 && !unwind::ends_call(&space, range.end)? {
                range.end = Gva(range.end.0 - 1);
            }
        }
        // A hidden return address is replaced by the address of the trampoline's first byte.
        ranges.extend(unwind::hiding(kernel).map(|(name, range)| Watched::whole(range, name)));
        Ok(Watch::of(ranges))
    }

    /// The ranges, each with its name. Of equal ranges the one that gives a hit its name comes first.
    pub fn ranges(&self) -> impl Iterator<Item = (&Range, &str)> {
        self.sorted.iter().rev().map(|w| (&w.range, &*w.name))
    }

    /// Watches just `ranges`, in the form in which [`Watch::ranges`] gives them.
    #[must_use]
    pub fn of(mut ranges: Vec<Watched>) -> Watch {
        // The last range that fits counts. So of ranges with the same start the innermost comes last, and of equal ranges the
        // one that the caller named first.
        ranges.reverse();
        ranges.sort_by_key(|w| (w.range.start, std::cmp::Reverse(w.range.end)));
        Watch {
            spans: spans(&ranges),
            sorted: ranges,
        }
    }

    /// The same ranges and `more`, which are watched as they are.
    #[must_use]
    pub fn with(&self, more: Vec<Watched>) -> Watch {
        let own = self.sorted.iter().rev().cloned();
        Watch::of(own.chain(more).collect())
    }

    /// Whether a thread could go on at `word` in a watched range: the range, and the offset in it in bytes.
    ///
    /// Whether the first byte is such a place the range says ([`Watched::new`], [`Watched::whole`]). The address behind
    /// the last byte is one if the last instruction is a call (a call that never returns).
    #[must_use]
    pub fn hit(&self, word: u64) -> Option<(&Watched, u64)> {
        if locus_xen::fault::is_blind() {
            return None;
        }
        let at = self.spans.partition_point(|span| span.last < word);
        let span = self.spans.get(at).filter(|span| span.first <= word)?;
        let watched = self.sorted.get(span.range)?;
        Some((watched, watched.offset_of(word)?))
    }

    /// As [`Watch::hit`], for the address `rip` of the instruction that a CPU is at. There the first byte counts too. The
    /// CPU enters the function by the redirect, unless it waits for a device model with an instruction that it has read
    /// already. Then Xen completes that instruction, and the CPU goes on behind it, within the redirect
    /// (xen/arch/x86/hvm/emulate.c: `struct hvmemul_cache`).
    #[must_use]
    pub fn runs_in(&self, rip: u64) -> Option<(&Watched, u64)> {
        let first = || {
            let (watched, _) = self.hit(rip.checked_add(1)?)?;
            Some((watched, watched.offset_of(rip)?))
        };
        self.hit(rip).or_else(first)
    }

    /// The hits among the 64-bit words of `stack`.
    pub(super) fn hits<'w>(&'w self, stack: &'w [u8]) -> impl Iterator<Item = (&'w Watched, u64)> {
        // Most words are far from all ranges. Two comparisons show that.
        let first = self.spans.first().map_or(u64::MAX, |span| span.first);
        let last = self.spans.last().map_or(0, |span| span.last);
        let words = stack.chunks_exact(8).filter_map(|w| fetch::u64(w, 0));
        words
            .filter(move |&word| first <= word && word <= last)
            .filter_map(|word| self.hit(word))
    }
}

/// The words that are hits in `ranges`, which are in the order of [`Watch::sorted`]. Each range is opened and closed once.
fn spans(ranges: &[Watched]) -> Vec<Span> {
    let mut found: Vec<Span> = Vec::with_capacity(ranges.len());
    // Ranges that began and may not have ended yet, the one that counts last.
    let mut open: Vec<usize> = Vec::new();
    // All words before this one are done; none are left after the highest.
    let mut next = Some(0);
    let mut close = |open: &mut Vec<usize>, next: &mut Option<u64>, last: u64| {
        while let (Some(&range), Some(first)) = (open.last(), *next) {
            let end = ranges.get(range).map_or(0, |w| w.range.end.0);
            if end >= first {
                let last = end.min(last);
                if last < first {
                    return;
                }
                found.push(Span { first, last, range });
                *next = last.checked_add(1);
            }
            if end > last {
                return;
            }
            open.pop();
        }
    };
    for (i, Watched { range, .. }) in ranges.iter().enumerate() {
        // The first byte is no hit.
        let Some(first) = range.start.0.checked_add(1).filter(|_| range.len() > 0) else {
            continue;
        };
        close(&mut open, &mut next, range.start.0);
        next = next.map(|next| next.max(first));
        open.push(i);
    }
    close(&mut open, &mut next, u64::MAX);
    found
}

#[cfg(test)]
mod tests;
