//! The kernel's own symbol table, found by its structure in read-only data.
//!
//! Written by `scripts/kallsyms.c`. All symbols' compressed names stand in `kallsyms_names`, each
//! byte an index into 256 tokens. The token table is found first: ten digits that stand for
//! themselves one after the other are its fingerprint, and `kallsyms_token_index` behind it, which
//! lists the offset of every token, proves it. From there the other tables follow in one of two
//! orders:
//!
//! - offsets, relative base, count, names, markers, [sequence of names,] token table, token index;
//! - count, names, markers, token table, token index, offsets, relative base, …: since Linux kernel
//!   commit 404bad70fcf7 ("scripts/kallsyms: change the output order").
//!
//! The sequence of names came with Linux kernel commit 60443c88f3a8 ("kallsyms: Improve the
//! performance of kallsyms_lookup_name()") (in v6.2, and in stable kernels before it).
//!
//! The tables are aligned to eight bytes or, where addresses are relative to their own place, to four
//! (see `packed`).
//!
//! Addresses come in several encodings; each is tried, and only one that agrees with the anchors
//! the caller gives is believed.

mod expand;
mod packed;
#[cfg(test)]
mod tests;

use std::cell::OnceCell;

use serde::{Deserialize, Serialize};

use self::expand::{Pieces, ROOM};
use super::locate::KERNEL_MAP;
use super::names::{self, Index};
use super::Error;
use crate::addr::{Gva, Range};
use crate::guest::budget::Budget;
use crate::guest::fetch;
use crate::guest::space::{Region, Space};

/// Bytes read in one go when searching.
const CHUNK: usize = 1 << 20;
/// Most read-only data looked through, in bytes: Debian's kernels have the tables within 12 MiB.
const DATA_MAX: usize = 48 << 20;
/// Longest token the search believes, in bytes.
const TOKEN_MAX: usize = 128;
/// Most symbols believed; kernels of distributions have up to a quarter of a million.
const SYMBOLS_MAX: u64 = 1 << 20;
/// Fewest symbols believed.
const SYMBOLS_MIN: u64 = 1 << 10;
/// Most bytes of all names together.
const TEXT_MAX: usize = 32 << 20;
/// Farthest the count stands before the token table, in bytes.
const SPAN_MAX: usize = 16 << 20;
/// Names stepped over in the search for one unit of the guest's budget.
const STEPS: usize = 16;
/// Bytes of `kallsyms_token_index`: 256 16-bit words.
const INDEX_LEN: usize = 512;
/// Every so many symbols there is a marker.
const MARKER_EVERY: usize = 256;
/// Longest believed symbol name, in bytes (`KSYM_NAME_LEN` is 128, or 512 since v6.1).
const NAME_MAX: usize = 512;

/// One symbol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Symbol<'a> {
    /// Name without its type character.
    pub name: &'a str,
    /// Type as `nm` prints it.
    pub kind: char,
    /// Address; for per-CPU symbols the offset into a CPU's area.
    pub addr: Gva,
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Entry {
    addr: u64,
    name: u32,
    len: u16,
    kind: u8,
}

/// Where the tables stand, by the names that the kernel has for them.
pub type Places = Vec<(String, Gva)>;

/// All symbols of the kernel image.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Symbols {
    /// Where its tables were found.
    pub places: Places,
    names: String,
    entries: Vec<Entry>,
    #[serde(skip)]
    by_name: OnceCell<Index>,
    #[serde(skip)]
    by_addr: OnceCell<Vec<u32>>,
}

/// What a symbol table must agree with before it is believed.
#[derive(Clone, Copy, Debug)]
pub struct Anchors<'a> {
    /// Address of `_text`, from the page tables.
    pub text_base: Gva,
    /// What it must agree with besides, independent of the first.
    pub second: Second<'a>,
}

/// The second anchor.
#[derive(Clone, Copy)]
pub enum Second<'a> {
    /// An entry point: some text symbol must stand exactly there.
    Entry(Gva),
    /// Where no entry point is known: whether the guest's state agrees with the symbols.
    State(&'a dyn Fn(&Symbols) -> bool),
}

impl std::fmt::Debug for Second<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Second::Entry(at) => write!(f, "Entry({at})"),
            Second::State(_) => f.write_str("State"),
        }
    }
}

/// Finds and decodes the symbol table within `regions`.
///
/// # Errors
/// [`Error::NotLinux`] when no table is found or none agrees with the anchors.
pub fn read(space: &Space<'_>, regions: &[Region], anchors: Anchors<'_>) -> Result<Symbols, Error> {
    let mut budget = DATA_MAX;
    for region in regions.iter().filter(|r| !r.writable && !r.executable) {
        let mut data = Data::new(space, region.range, budget);
        if let Some(symbols) = search(&mut data, anchors)? {
            return Ok(symbols);
        }
        budget -= data.have.min(budget);
    }
    Err(Error::NotLinux(
        "no kallsyms table that agrees with the kernel's text address was found in its read-only \
         data: not a Linux kernel with CONFIG_KALLSYMS, or one of an unknown layout"
            .into(),
    ))
}

/// Read-only data, from its start as far as it has been needed: each byte is read once. Places in
/// it are offsets from its start.
struct Data<'s, 'm> {
    space: &'s Space<'m>,
    start: Gva,
    /// All there is, or all that may be read.
    len: usize,
    /// Room for all of it, zeroed: memory is taken as it is filled.
    bytes: Vec<u8>,
    have: usize,
}

impl<'s, 'm> Data<'s, 'm> {
    fn new(space: &'s Space<'m>, range: Range, most: usize) -> Data<'s, 'm> {
        Data {
            space,
            start: range.start,
            len: usize::try_from(range.len()).unwrap_or(most).min(most),
            bytes: vec![0; usize::try_from(range.len()).unwrap_or(most).min(most)],
            have: 0,
        }
    }

    /// What has been read.
    fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.have).unwrap_or_default()
    }

    /// Addresses of the tables.
    fn places(&self, names: &Names, tokens: &Tokens, more: &[(&str, usize)]) -> Places {
        let known = [
            ("kallsyms_num_syms", names.num_at),
            ("kallsyms_names", names.at),
            ("kallsyms_token_table", tokens.at),
            ("kallsyms_token_index", tokens.end - INDEX_LEN),
        ];
        let all = known.iter().chain(more);
        all.map(|&(name, at)| (name.to_owned(), self.start.plus(at as u64)))
            .collect()
    }

    /// Reads on until `end` bytes are there; false when there are not so many.
    fn reach(&mut self, end: usize) -> Result<bool, Error> {
        let have = self.have;
        if end > self.len {
            return Ok(false);
        }
        if end > have {
            let want = end.next_multiple_of(CHUNK).min(self.len);
            let fresh = self.bytes.get_mut(have..want).unwrap_or_default();
            self.space.read(self.start.plus(have as u64), fresh)?;
            self.have = want;
        }
        Ok(true)
    }
}

/// The token table.
struct Tokens {
    at: usize,
    /// One past `kallsyms_token_index`.
    end: usize,
    tokens: Vec<Vec<u8>>,
}

const DIGITS: &[u8] = b"0\x001\x002\x003\x004\x005\x006\x007\x008\x009\x00";

fn search(data: &mut Data<'_, '_>, anchors: Anchors<'_>) -> Result<Option<Symbols>, Error> {
    let budget = data.space.budget();
    let mut from = 0;
    while data.reach((from + CHUNK).min(data.len))? {
        let searched = data.have;
        budget.scan(searched - from)?;
        for hit in find_digits(data.bytes(), from) {
            budget.scan(304 * TOKEN_MAX)?;
            data.reach((hit + 256 * TOKEN_MAX + 1024).min(data.len))?;
            let Some(tokens) = tokens_around(data.bytes(), hit) else {
                continue;
            };
            if let Some(symbols) = decode(data, &tokens, anchors)? {
                return Ok(Some(symbols));
            }
        }
        if searched == data.len {
            break;
        }
        from = searched - DIGITS.len();
    }
    Ok(None)
}

/// Where [`DIGITS`] stand in `data` behind `from`. They are so long that one aligned word at least
/// holds nothing but digits and zeros by turns, which is quickly seen.
fn find_digits(data: &[u8], from: usize) -> Vec<usize> {
    let from = from & !7;
    let mut found = Vec::new();
    let words = data.get(from..).unwrap_or_default().chunks_exact(8);
    for (i, word) in words.enumerate() {
        let word = u64::from_le_bytes(word.try_into().unwrap_or_default());
        if word & 0xc0c0_c0c0_c0c0_c0c0 != 0 {
            continue; // most words
        }
        let odd = match word {
            w if w & 0xfff0_fff0_fff0_fff0 == 0x0030_0030_0030_0030 => 0,
            w if w & 0xf0ff_f0ff_f0ff_f0ff == 0x3000_3000_3000_3000 => 1,
            _ => continue,
        };
        let digit = ((word >> (8 * odd)) & 0xf) as usize;
        let Some(at) = (from + 8 * i + odd).checked_sub(2 * digit) else {
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
fn tokens_around(data: &[u8], digits: usize) -> Option<Tokens> {
    // 48 strings end before the digit 0; the byte before the first of them is a NUL as well, the
    // high byte of the last marker or padding.
    let from = digits.saturating_sub(48 * TOKEN_MAX);
    let mut ends = data.get(from..digits)?.iter().enumerate().rev();
    let at = from + ends.by_ref().filter(|(_, &b)| b == 0).nth(48)?.0 + 1;
    let mut tokens = Vec::with_capacity(256);
    let mut places = Vec::with_capacity(256);
    let mut pos = 0;
    for part in data.get(at..)?.split(|&b| b == 0).take(256) {
        if part.len() > TOKEN_MAX {
            return None;
        }
        places.push(pos);
        tokens.push(part.to_vec());
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
    Some(Tokens {
        at,
        end: index + INDEX_LEN,
        tokens,
    })
}

/// The compressed names, and how many there are.
struct Names {
    /// Place of `kallsyms_num_syms`.
    num_at: usize,
    /// Place of `kallsyms_names`.
    at: usize,
    count: usize,
    len: usize,
    /// Whether a length byte above 127 begins a two-byte length: Linux kernel commit
    /// 73bbb94466fd ("kallsyms: support \"big\" kernel symbols") (in v6.1).
    long: bool,
}

impl Names {
    fn bytes<'a>(&self, data: &'a [u8]) -> &'a [u8] {
        data.get(self.at..self.at + self.len).unwrap_or_default()
    }
}

/// Length of the compressed name at `pos` and where it starts.
fn name_at(bytes: &[u8], pos: usize, long: bool) -> Option<(usize, usize)> {
    let first = usize::from(*bytes.get(pos)?);
    if long && first & 0x80 != 0 {
        let second = usize::from(*bytes.get(pos + 1)?);
        return Some(((first & 0x7f) | (second << 7), pos + 2));
    }
    Some((first, pos + 1))
}

fn decode(
    data: &mut Data<'_, '_>,
    tokens: &Tokens,
    anchors: Anchors<'_>,
) -> Result<Option<Symbols>, Error> {
    let budget = data.space.budget();
    let Some(names) = find_names(data.bytes(), tokens.at, budget)? else {
        return Ok(None);
    };
    let table = names.count * 4;
    let before = names.num_at.checked_sub(8 + table.next_multiple_of(8));
    let behind = Some(tokens.end);
    for (at, base_at) in [
        (before, names.num_at.wrapping_sub(8)),
        (behind, (tokens.end + table).next_multiple_of(8)),
    ] {
        let Some(at) = at else { continue };
        if !data.reach(base_at + 8)? {
            continue;
        }
        let base = fetch::u64(data.bytes(), base_at).unwrap_or(0);
        for encoding in [
            Encoding::PercpuAbsolute,
            Encoding::BaseRelative,
            Encoding::PlaceRelative,
        ] {
            let address = |i: usize| {
                let place = at + 4 * i;
                let word = fetch::u32(data.bytes(), place)?;
                Some(encoding.address(word, base, data.start.plus(place as u64)))
            };
            if !text_is_there(&names, address, anchors) {
                continue;
            }
            budget.spend(names.count as u64)?;
            let symbols = build(data.bytes(), &names, tokens, address);
            if let Some(mut symbols) = symbols.filter(|s| s.agrees(anchors)) {
                let mut places = vec![("kallsyms_offsets", at)];
                if !matches!(encoding, Encoding::PlaceRelative) {
                    places.push(("kallsyms_relative_base", base_at));
                }
                symbols.places = data.places(&names, tokens, &places);
                return Ok(Some(symbols));
            }
        }
    }
    // Before v4.6 and where base-relative tables were not chosen: plain 64-bit addresses.
    for at in [names.num_at.checked_sub(names.count * 8), behind] {
        let Some(at) = at else { continue };
        if !data.reach(at + names.count * 8)? {
            continue;
        }
        let address = |i: usize| fetch::u64(data.bytes(), at + 8 * i);
        budget.spend(names.count as u64)?;
        let symbols = build(data.bytes(), &names, tokens, address);
        if let Some(mut symbols) = symbols.filter(|s| s.agrees(anchors)) {
            symbols.places = data.places(&names, tokens, &[("kallsyms_addresses", at)]);
            return Ok(Some(symbols));
        }
    }
    Ok(None)
}

/// A glance that spares decoding all names for a wrong encoding.
fn text_is_there(
    names: &Names,
    address: impl Fn(usize) -> Option<u64>,
    anchors: Anchors<'_>,
) -> bool {
    (0..names.count).any(|i| address(i) == Some(anchors.text_base.0))
}

#[derive(Clone, Copy)]
enum Encoding {
    /// Positive words are absolute (per-CPU offsets), negative ones count down from the base.
    PercpuAbsolute,
    /// Words are added to the base.
    BaseRelative,
    /// Words are relative to where they stand.
    PlaceRelative,
}

impl Encoding {
    fn address(self, word: u32, base: u64, place: Gva) -> u64 {
        let signed = i64::from(word.cast_signed());
        match self {
            Encoding::PercpuAbsolute if signed >= 0 => u64::from(word),
            Encoding::PercpuAbsolute => base.wrapping_sub(1).wrapping_add_signed(-signed),
            Encoding::BaseRelative => base.wrapping_add(u64::from(word)),
            Encoding::PlaceRelative => place.0.wrapping_add_signed(signed),
        }
    }
}

/// Finds the count in front of the names: the only number that makes so many names pass every
/// marker in the table behind them.
fn find_names(data: &[u8], tokens_at: usize, budget: &Budget) -> Result<Option<Names>, Error> {
    let Some(data) = data.get(..tokens_at) else {
        return Ok(None);
    };
    let lowest = tokens_at.saturating_sub(SPAN_MAX);
    budget.scan((tokens_at - lowest) / 4)?;
    if let Some(names) = packed::names(data, lowest, budget)? {
        return Ok(Some(names));
    }
    let mut num_at = tokens_at & !7;
    while num_at >= lowest + 8 {
        num_at -= 8;
        let count = fetch::u64(data, num_at).unwrap_or(0);
        if !(SYMBOLS_MIN..SYMBOLS_MAX).contains(&count) {
            continue;
        }
        let count = usize::try_from(count).unwrap_or(0);
        let names = data.get(num_at + 8..).unwrap_or_default();
        for long in [true, false] {
            let (steps, fit) = names_fit(names, count, long);
            budget.spend((steps / STEPS) as u64)?;
            if let Some(len) = fit {
                return Ok(Some(Names {
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
    let table = bytes.get(pos.next_multiple_of(8)..).unwrap_or_default();
    let agree = markers
        .iter()
        .enumerate()
        .all(|(i, &m)| fetch::u32(table, 4 * i).is_some_and(|word| usize::try_from(word) == Ok(m)));
    (count, agree.then_some(pos))
}

fn build(
    data: &[u8],
    names: &Names,
    tokens: &Tokens,
    address: impl Fn(usize) -> Option<u64>,
) -> Option<Symbols> {
    let bytes = names.bytes(data);
    let pieces = Pieces::of(&tokens.tokens);
    let mut text = vec![0; (names.count * 24).min(TEXT_MAX) + ROOM];
    let mut end = 0;
    let mut entries = Vec::with_capacity(names.count);
    let mut pos = 0;
    for i in 0..names.count {
        let (len, start) = name_at(bytes, pos, names.long)?;
        let begin = end;
        if text.len() < begin + ROOM {
            text.resize((begin + ROOM + CHUNK).min(TEXT_MAX + ROOM), 0);
        }
        let compressed = bytes.get(start..start + len)?;
        end += pieces.expand(compressed, text.get_mut(begin..)?)?;
        pos = start + len;
        let kind = *text.get(begin)?;
        let len = u16::try_from((end - begin).checked_sub(1)?).ok()?;
        let name = u32::try_from(begin + 1).ok()?;
        entries.push(Entry {
            addr: address(i)?,
            name,
            len,
            kind,
        });
    }
    text.truncate(end);
    let names = String::from_utf8(text).ok()?;
    Some(Symbols {
        places: Places::new(),
        names,
        entries,
        by_name: OnceCell::new(),
        by_addr: OnceCell::new(),
    })
}

impl Symbols {
    /// How many there are.
    #[must_use]
    #[allow(clippy::len_without_is_empty)] // a table without symbols is not believed
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// All symbols, in the table's order.
    pub fn iter(&self) -> impl Iterator<Item = Symbol<'_>> {
        self.entries.iter().map(|e| self.symbol(e))
    }

    fn symbol(&self, e: &Entry) -> Symbol<'_> {
        Symbol {
            name: self.name_of(e),
            kind: char::from(e.kind),
            addr: Gva(e.addr),
        }
    }

    fn name_of(&self, e: &Entry) -> &str {
        let start = e.name as usize;
        self.names
            .get(start..start + usize::from(e.len))
            .unwrap_or("")
    }

    fn nth(&self, index: u32) -> Option<&Entry> {
        self.entries.get(index as usize)
    }

    fn by_name(&self) -> &Index {
        self.by_name.get_or_init(|| {
            let names = self.entries.iter().map(|e| self.name_of(e).as_bytes());
            Index::of(&names.map(names::hash).collect::<Vec<u32>>())
        })
    }

    fn by_addr(&self) -> &[u32] {
        self.by_addr.get_or_init(|| {
            let mut order: Vec<u32> = (0..).take(self.entries.len()).collect();
            order.sort_by_key(|&i| self.nth(i).map_or(0, |e| e.addr));
            order
        })
    }

    /// All symbols called `name`, in the table's order (`sympos` counts in it).
    pub fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = Symbol<'a>> + 'a {
        let candidates = self.by_name().candidates(name.as_bytes());
        candidates
            .iter()
            .filter_map(|&i| self.nth(i))
            .filter(move |e| self.name_of(e) == name)
            .map(|e| self.symbol(e))
    }

    /// The address of the only, or first, symbol called `name`.
    #[must_use]
    pub fn addr(&self, name: &str) -> Option<Gva> {
        self.all(name).next().map(|s| s.addr)
    }

    /// The address of `name`.
    ///
    /// # Errors
    /// [`Error::Missing`] when the kernel has no such symbol.
    pub fn need(&self, name: &str) -> Result<Gva, Error> {
        self.addr(name)
            .ok_or_else(|| Error::Missing(format!("symbol {name}")))
    }

    /// Bytes from `at` to the next symbol with a higher address: the room a function has.
    #[must_use]
    pub fn room(&self, at: Gva) -> Option<u64> {
        let order = self.by_addr();
        let next = order.partition_point(|&i| self.nth(i).is_some_and(|e| e.addr <= at.0));
        order
            .get(next)
            .and_then(|&i| self.nth(i))
            .map(|e| e.addr - at.0)
    }

    /// The text symbol that covers `at`, as name and offset.
    #[must_use]
    pub fn covering(&self, at: Gva) -> Option<(&str, u64)> {
        let order = self.by_addr();
        let next = order.partition_point(|&i| self.nth(i).is_some_and(|e| e.addr <= at.0));
        let last = self.nth(*order.get(next.checked_sub(1)?)?)?.addr;
        // Of several symbols at one address the first in the table is the name people know.
        let first = order.partition_point(|&i| self.nth(i).is_some_and(|e| e.addr < last));
        let e = self.nth(*order.get(first)?)?;
        Some((self.name_of(e), at.0 - e.addr))
    }

    /// Moves the addresses within the kernel's mapping by `offset` bytes, wrapping: the kernel was
    /// loaded elsewhere (KASLR). Per-CPU offsets and other absolute values stay.
    pub(super) fn slide(&mut self, offset: u64) {
        let moving = |e: &&mut Entry| e.addr >= KERNEL_MAP.0;
        for entry in self.entries.iter_mut().filter(moving) {
            entry.addr = entry.addr.wrapping_add(offset);
        }
        for (_, place) in &mut self.places {
            *place = place.plus(offset);
        }
        self.by_addr.take();
    }

    /// Whether they fit what else is known of the kernel.
    pub(super) fn agrees(&self, anchors: Anchors<'_>) -> bool {
        // Without the index by name, which takes longer than all before.
        let text = self.entries.iter().find(|e| self.name_of(e) == "_text");
        let is_text = |kind| matches!(kind, b't' | b'T' | b'W' | b'w');
        text.is_some_and(|e| e.addr == anchors.text_base.0)
            && match anchors.second {
                Second::Entry(at) => self
                    .entries
                    .iter()
                    .any(|e| e.addr == at.0 && is_text(e.kind)),
                Second::State(agrees) => agrees(self),
            }
    }
}
