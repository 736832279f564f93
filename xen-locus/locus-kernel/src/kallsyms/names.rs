//! Where the compressed names are, and how many.

use locus_guest::budget::Budget;
use locus_guest::fetch;

use super::packed;
use crate::{to_usize, Error};

/// Most symbols believed; kernels of distributions have up to a quarter of a million.
const SYMBOLS_MAX: u64 = 1 << 20;
/// Fewest symbols believed.
pub(super) const SYMBOLS_MIN: u64 = 1 << 10;
/// Farthest the count stands before the token table, in bytes.
const SPAN_MAX: usize = 16 << 20;
/// Names stepped over in the search for one unit of the guest's budget.
pub(super) const STEPS: usize = 16;
/// Every so many symbols there is a marker.
pub(super) const MARKER_EVERY: usize = 256;

/// The compressed names, and how many there are.
pub(super) struct NamesTable {
    /// Place of `kallsyms_num_syms`, as are all places an offset in the read-only data, in bytes.
    pub num_at: usize,
    /// Place of `kallsyms_names`.
    pub at: usize,
    /// How many names.
    pub count: usize,
    /// Bytes of all of them.
    pub len: usize,
    /// Whether a length byte above 127 begins a two-byte length: Linux kernel commit
    /// 73bbb94466fd ("kallsyms: support \"big\" kernel symbols") (in v6.1).
    pub long: bool,
}

impl NamesTable {
    /// The names in `data`, in which they were found.
    pub fn bytes<'a>(&self, data: &'a [u8]) -> Option<&'a [u8]> {
        data.get(self.at..self.at.checked_add(self.len)?)
    }
}

/// Length of the compressed name at `pos`, in tokens, and where its first token is.
pub(super) fn name_at(bytes: &[u8], pos: usize, long: bool) -> Option<(usize, usize)> {
    let first = usize::from(*bytes.get(pos)?);
    if long && first & 0x80 != 0 {
        let second = usize::from(*bytes.get(pos + 1)?);
        return Some(((first & 0x7f) | (second << 7), pos + 2));
    }
    Some((first, pos + 1))
}

/// Finds the count in front of the names: the only number for which so many names agree with every
/// marker in the table behind them.
pub(super) fn find_names(
    data: &[u8],
    tokens_at: usize,
    budget: &Budget,
) -> Result<Option<NamesTable>, Error> {
    let Some(data) = data.get(..tokens_at) else {
        return Ok(None);
    };
    let lowest = tokens_at.saturating_sub(SPAN_MAX);
    budget.scan((tokens_at - lowest) / 4)?;
    if let Some(names) = packed::names(data, lowest, budget)? {
        return Ok(Some(names));
    }
    let start = lowest.next_multiple_of(8);
    // There is nothing to search if the tokens come first.
    let (words, _) = data.get(start..).unwrap_or_default().as_chunks::<8>();
    for (i, word) in words.iter().enumerate().rev() {
        let count = u64::from_le_bytes(*word);
        if !(SYMBOLS_MIN..SYMBOLS_MAX).contains(&count) {
            continue; // most words
        }
        let num_at = start + 8 * i;
        let count = to_usize(count)?;
        // The last word has no names behind it.
        let names = data.get(num_at + 8..).unwrap_or_default();
        for long in [true, false] {
            let (steps, fit) = names_fit(names, count, long);
            // One that fails at its first names costs something too: there may be millions.
            budget.spend((steps / STEPS).max(1) as u64)?;
            if let Some(len) = fit {
                return Ok(Some(NamesTable {
                    num_at,
                    at: num_at + 8,
                    count,
                    len,
                    long,
                }));
            }
        }
    }
    Ok(None)
}

/// How many names were stepped over, and the length of `count` names at the start of `bytes` if the
/// markers behind them agree.
fn names_fit(bytes: &[u8], count: usize, long: bool) -> (usize, Option<usize>) {
    let mut pos = 0;
    let mut markers = Vec::new();
    for i in 0..count {
        if i % MARKER_EVERY == 0 {
            markers.push(pos);
        }
        match name_at(bytes, pos, long) {
            Some((len, start)) if len > 0 => pos = start + len,
            _ => return (i, None),
        }
    }
    // If there is nothing behind the names, no marker agrees.
    let table = bytes.get(pos.next_multiple_of(8)..).unwrap_or_default();
    let agree = markers
        .iter()
        .enumerate()
        .all(|(i, &m)| fetch::u32(table, 4 * i).is_some_and(|word| usize::try_from(word) == Ok(m)));
    (count, agree.then_some(pos))
}
