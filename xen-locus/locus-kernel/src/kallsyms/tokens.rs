//! The 256 tokens of which names are made, found by their structure.

use locus_guest::fetch;

/// Longest token the search believes, in bytes.
pub(super) const TOKEN_MAX: usize = 128;
/// Bytes of `kallsyms_token_index`: 256 16-bit words.
pub(super) const INDEX_LEN: usize = 512;

/// The token table.
pub(super) struct TokenTable {
    /// Place of `kallsyms_token_table`: an offset in the read-only data, in bytes.
    pub at: usize,
    /// One past `kallsyms_token_index`.
    pub end: usize,
    /// All 256.
    pub tokens: Vec<String>,
}

/// The tokens of the ten digits, as they follow each other.
pub(super) const DIGITS: &[u8] = b"0\x001\x002\x003\x004\x005\x006\x007\x008\x009\x00";

/// Where [`DIGITS`] are in `data` behind `from`. They are so long that at least one of the words
/// that are looked at has nothing but digits and zeros by turns, which is quickly seen.
pub(super) fn find_digits(data: &[u8], from: usize) -> Vec<usize> {
    const STRIDE: usize = 16;
    let from = from - from % STRIDE;
    let mut found = Vec::new();
    // Behind the end nothing is found.
    let (blocks, _) = data.get(from..).unwrap_or_default().as_chunks::<STRIDE>();
    for (i, &[a, b, c, d, ..]) in blocks.iter().enumerate() {
        let word = u32::from_le_bytes([a, b, c, d]);
        if word & 0xc0c0_c0c0 != 0 {
            continue; // most words
        }
        let odd = match word {
            w if w & 0xfff0_fff0 == 0x0030_0030 => 0,
            w if w & 0xf0ff_f0ff == 0x3000_3000 => 1,
            _ => continue,
        };
        let digit = ((word >> (8 * odd)) & 0xf) as usize;
        let Some(at) = (from + STRIDE * i + odd).checked_sub(2 * digit) else {
            continue;
        };
        let there = data.get(at..).is_some_and(|d| d.starts_with(DIGITS));
        if there && found.last() != Some(&at) {
            found.push(at);
        }
    }
    found
}

/// Tries `digits`, the place of the token `0`, as the 49th of 256 tokens.
pub(super) fn tokens_around(data: &[u8], digits: usize) -> Option<TokenTable> {
    // 48 strings end before the digit 0. The byte before the first of them is a NUL too: the high
    // byte of the last marker, or padding. Or it is the last byte of `kallsyms_seqs_of_names`,
    // which may be any, if no padding follows. The table is aligned to at least 4 bytes.
    let from = digits.saturating_sub(48 * TOKEN_MAX);
    let mut ends = data.get(from..digits)?.iter().enumerate().rev();
    let at = from + ends.by_ref().filter(|(_, &b)| b == 0).nth(48)?.0 + 1;
    let len = data.get(at..)?.iter().position(|&b| b == 0)?;
    let lowest = (at + len.saturating_sub(TOKEN_MAX)).next_multiple_of(4);
    let aligned = (lowest..=at + len).step_by(4);
    std::iter::once(at)
        .chain(aligned)
        .find_map(|at| tokens_at(data, at))
}

/// The token table that begins at `at`, if the index behind it agrees.
fn tokens_at(data: &[u8], at: usize) -> Option<TokenTable> {
    let mut tokens = Vec::with_capacity(256);
    let mut places = Vec::with_capacity(256);
    let mut pos = 0;
    for part in data.get(at..)?.split(|&b| b == 0).take(256) {
        if part.len() > TOKEN_MAX {
            return None;
        }
        places.push(pos);
        tokens.push(String::from_utf8(part.to_vec()).ok()?);
        pos += part.len() + 1;
    }
    let proven = |index: &usize| {
        let listed = |i: usize| fetch::u16(data, index + 2 * i).map(usize::from);
        places
            .iter()
            .enumerate()
            .all(|(i, &p)| listed(i) == Some(p))
    };
    let end = at + pos;
    let index = [end.next_multiple_of(8), end.next_multiple_of(4)]
        .into_iter()
        .find(proven)?;
    Some(TokenTable {
        at,
        end: index + INDEX_LEN,
        tokens,
    })
}
