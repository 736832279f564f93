//! Names in tables that are aligned to four bytes. Kernels have them whose addresses are relative
//! to their own place: Linux kernel commit a081b5789255 ("kallsyms: Get rid of kallsyms relative
//! base"). The names follow the count without a gap, and the token table follows the markers.
//!
//! Nearly any four bytes could be a count, so the markers are read first. Their number leaves 256
//! possible counts, and their place is where the names end.

use locus_guest::budget::Budget;
use locus_guest::fetch;

use super::names::{name_at, NamesTable, MARKER_EVERY, STEPS};
use crate::Error;

/// Fewest markers believed.
const MARKERS_MIN: usize = 4;
/// Most places tried for the count; one in 2^24 passes for it by chance.
const TRIES: usize = 16;

/// The names in `data`, from `lowest` on to its end, where the token table begins; nothing if the
/// tables are laid out in another way.
pub(super) fn names(
    data: &[u8],
    lowest: usize,
    budget: &Budget,
) -> Result<Option<NamesTable>, Error> {
    let Some((markers, last)) = markers(data) else {
        return Ok(None);
    };
    let number = (data.len() - markers) / 4;
    let counts = (number - 1) * MARKER_EVERY + 1..=number * MARKER_EVERY;
    // The last marker is where the last names begin, so the names are at least so long.
    let Some(latest) = markers.checked_sub(last + 4) else {
        return Ok(None);
    };
    let places = (lowest.div_ceil(4)..=latest / 4).rev().map(|i| i * 4);
    let likely = places.filter_map(|at| {
        let count = usize::try_from(fetch::u32(data, at)?).ok()?;
        counts.contains(&count).then_some((at, count))
    });
    for (num_at, count) in likely.take(TRIES) {
        budget.spend((2 * count / STEPS) as u64)?;
        let at = num_at + 4;
        let (Some(names), Some(words)) = (data.get(at..markers), data.get(markers..)) else {
            continue;
        };
        for long in [true, false] {
            if are_names(names, count, long, words) {
                return Ok(Some(NamesTable {
                    num_at,
                    at,
                    count,
                    len: names.len(),
                    long,
                }));
            }
        }
    }
    Ok(None)
}

/// Where the markers at the end of `bytes` begin, and the last one: numbers that grow from 0.
fn markers(bytes: &[u8]) -> Option<(usize, usize)> {
    let mut at = bytes.len().checked_sub(4)?;
    let last = fetch::u32(bytes, at)?;
    let mut next = last;
    while next != 0 {
        at = at.checked_sub(4)?;
        let word = fetch::u32(bytes, at)?;
        if word >= next {
            return None;
        }
        next = word;
    }
    let enough = (bytes.len() - at) / 4 >= MARKERS_MIN;
    Some((at, usize::try_from(last).ok()?)).filter(|_| enough)
}

/// Whether `names` is `count` names and at most three bytes, and the markers agree.
fn are_names(names: &[u8], count: usize, long: bool, markers: &[u8]) -> bool {
    let mut pos = 0;
    for i in 0..count {
        let marker = (i % MARKER_EVERY == 0).then_some(i / MARKER_EVERY * 4);
        if marker.is_some_and(|at| {
            fetch::u32(markers, at).and_then(|m| usize::try_from(m).ok()) != Some(pos)
        }) {
            return false;
        }
        match name_at(names, pos, long) {
            Some((len, start)) if len > 0 => pos = start + len,
            _ => return false,
        }
    }
    pos <= names.len() && names.len() - pos < 4
}
