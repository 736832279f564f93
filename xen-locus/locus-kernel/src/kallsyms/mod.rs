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

mod compressed;
mod packed;
#[cfg(test)]
mod tests;

use std::cell::OnceCell;

use locus_guest::addr::{Gva, Range};
use locus_guest::budget::Budget;
use locus_guest::fetch;
use locus_guest::space::{Region, Space};
use serde::{Deserialize, Serialize};

use self::compressed::CompressedNames;
use super::locate::KERNEL_MAP;
use super::Error;
use crate::split_functions;

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
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Symbol {
    /// Name without its type character.
    pub name: String,
    /// Type as `nm` prints it.
    pub kind: char,
    /// Address; for per-CPU symbols the offset into a CPU's area.
    pub addr: Gva,
}

/// Where the tables stand, by the names that the kernel has for them.
pub type TablePlaces = Vec<(String, Gva)>;

/// All symbols of the kernel image.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Symbols {
    /// Where its tables were found.
    pub places: TablePlaces,
    names: CompressedNames,
    /// The address of each.
    #[serde(with = "words")]
    addrs: Vec<u64>,
    #[serde(skip)]
    by_addr: OnceCell<Vec<u32>>,
}

/// Words as the bytes that they have in memory: of kernel addresses, whose upper bits are set, postcard would make
/// more, and take its time for each.
mod words {
    use serde::{Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(words: &[u64], to: S) -> Result<S::Ok, S::Error> {
        let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        serde_bytes::serialize(&bytes, to)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<u64>, D::Error> {
        let bytes: &[u8] = serde_bytes::deserialize(from)?;
        let word = |bytes: &[u8]| bytes.try_into().map(u64::from_le_bytes).unwrap_or_default();
        Ok(bytes.chunks_exact(8).map(word).collect())
    }
}

/// What a symbol table must agree with before it is believed.
#[derive(Clone, Copy, Debug)]
pub struct Anchors<'a> {
    /// Address of `_text`, from the page tables.
    pub text_base: Gva,
    /// What it must agree with besides, independent of the first.
    pub second: SecondAnchor<'a>,
}

/// The second anchor.
#[derive(Clone, Copy)]
pub enum SecondAnchor<'a> {
    /// An entry point: some text symbol must stand exactly there.
    Entry(Gva),
    /// Where no entry point is known: whether the guest's state agrees with the symbols.
    State(&'a dyn Fn(&Symbols) -> bool),
}

impl std::fmt::Debug for SecondAnchor<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            SecondAnchor::Entry(at) => write!(f, "Entry({at})"),
            SecondAnchor::State(_) => f.write_str("State"),
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
        let mut data = ReadOnlyData::new(space, region.range, budget);
        let found = search(&mut data, anchors)?;
        budget -= data.have.min(budget);
        data.bytes.truncate(data.have);
        space.recycle(data.bytes);
        if let Some(symbols) = found {
            return Ok(symbols);
        }
    }
    Err(Error::NotLinux(
        "no kallsyms table that agrees with the kernel's text address was found in its read-only \
         data: not a Linux kernel with CONFIG_KALLSYMS, or one of an unknown layout"
            .into(),
    ))
}

/// Read-only data, from its start as far as it has been needed: each byte is read once. Places in
/// it are offsets from its start.
struct ReadOnlyData<'s, 'm> {
    space: &'s Space<'m>,
    start: Gva,
    /// All there is, or all that may be read.
    len: usize,
    /// Room for all of it, zeroed: memory is taken as it is filled.
    bytes: Vec<u8>,
    have: usize,
}

impl<'s, 'm> ReadOnlyData<'s, 'm> {
    fn new(space: &'s Space<'m>, range: Range, most: usize) -> ReadOnlyData<'s, 'm> {
        ReadOnlyData {
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
    fn places(
        &self,
        names: &NamesTable,
        tokens: &TokenTable,
        more: &[(&str, usize)],
    ) -> TablePlaces {
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
struct TokenTable {
    at: usize,
    /// One past `kallsyms_token_index`.
    end: usize,
    tokens: Vec<String>,
}

const DIGITS: &[u8] = b"0\x001\x002\x003\x004\x005\x006\x007\x008\x009\x00";

fn search(data: &mut ReadOnlyData<'_, '_>, anchors: Anchors<'_>) -> Result<Option<Symbols>, Error> {
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

/// Where [`DIGITS`] stand in `data` behind `from`. They are so long that one at least of the words
/// looked at holds nothing but digits and zeros by turns, which is quickly seen.
fn find_digits(data: &[u8], from: usize) -> Vec<usize> {
    const STRIDE: usize = 16;
    let from = from - from % STRIDE;
    let mut found = Vec::new();
    let blocks = data.get(from..).unwrap_or_default().chunks_exact(STRIDE);
    for (i, block) in blocks.enumerate() {
        let word = fetch::u32(block, 0).unwrap_or(u32::MAX);
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
fn tokens_around(data: &[u8], digits: usize) -> Option<TokenTable> {
    // 48 strings end before the digit 0. The byte before the first of them is a NUL as well, the
    // high byte of the last marker or padding; or it is the last of `kallsyms_seqs_of_names`, which
    // may be any, if no padding follows. The table is aligned to 4 bytes at least.
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

/// The compressed names, and how many there are.
struct NamesTable {
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

impl NamesTable {
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
    data: &mut ReadOnlyData<'_, '_>,
    tokens: &TokenTable,
    anchors: Anchors<'_>,
) -> Result<Option<Symbols>, Error> {
    let budget = data.space.budget();
    let Some(names) = find_names(data.bytes(), tokens.at, budget)? else {
        return Ok(None);
    };
    budget.spend(names.count as u64)?;
    let Some(mut symbols) = Symbols::of(data.bytes(), &names, tokens) else {
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
        let bytes = data.bytes();
        let base = fetch::u64(bytes, base_at).unwrap_or(0);
        for encoding in [
            AddressEncoding::PercpuAbsolute,
            AddressEncoding::BaseRelative,
            AddressEncoding::PlaceRelative,
        ] {
            let address = |i: usize| {
                let place = at + 4 * i;
                let word = fetch::u32(bytes, place)?;
                Some(encoding.address(word, base, data.start.plus(place as u64)))
            };
            if !text_is_there(&names, address, anchors) {
                continue;
            }
            budget.spend(names.count as u64)?;
            if symbols.stand_at(address) && symbols.agrees(anchors) {
                let mut places = vec![("kallsyms_offsets", at)];
                if !matches!(encoding, AddressEncoding::PlaceRelative) {
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
        if symbols.stand_at(address) && symbols.agrees(anchors) {
            symbols.places = data.places(&names, tokens, &[("kallsyms_addresses", at)]);
            return Ok(Some(symbols));
        }
    }
    Ok(None)
}

/// A glance that spares decoding all names for a wrong encoding.
fn text_is_there(
    names: &NamesTable,
    address: impl Fn(usize) -> Option<u64>,
    anchors: Anchors<'_>,
) -> bool {
    (0..names.count).any(|i| address(i) == Some(anchors.text_base.0))
}

#[derive(Clone, Copy)]
enum AddressEncoding {
    /// Positive words are absolute (per-CPU offsets), negative ones count down from the base.
    PercpuAbsolute,
    /// Words are added to the base.
    BaseRelative,
    /// Words are relative to where they stand.
    PlaceRelative,
}

impl AddressEncoding {
    fn address(self, word: u32, base: u64, place: Gva) -> u64 {
        let signed = i64::from(word.cast_signed());
        match self {
            AddressEncoding::PercpuAbsolute if signed >= 0 => u64::from(word),
            AddressEncoding::PercpuAbsolute => base.wrapping_sub(1).wrapping_add_signed(-signed),
            AddressEncoding::BaseRelative => base.wrapping_add(u64::from(word)),
            AddressEncoding::PlaceRelative => place.0.wrapping_add_signed(signed),
        }
    }
}

/// Finds the count in front of the names: the only number that makes so many names pass every
/// marker in the table behind them.
fn find_names(data: &[u8], tokens_at: usize, budget: &Budget) -> Result<Option<NamesTable>, Error> {
    let Some(data) = data.get(..tokens_at) else {
        return Ok(None);
    };
    let lowest = tokens_at.saturating_sub(SPAN_MAX);
    budget.scan((tokens_at - lowest) / 4)?;
    if let Some(names) = packed::names(data, lowest, budget)? {
        return Ok(Some(names));
    }
    let start = lowest.next_multiple_of(8);
    let words = data.get(start..).unwrap_or_default().chunks_exact(8);
    for (i, word) in words.enumerate().rev() {
        let count = fetch::u64(word, 0).unwrap_or(0);
        if !(SYMBOLS_MIN..SYMBOLS_MAX).contains(&count) {
            continue; // most words
        }
        let num_at = start + 8 * i;
        let count = usize::try_from(count).unwrap_or(0);
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
    let table = bytes.get(pos.next_multiple_of(8)..).unwrap_or_default();
    let agree = markers
        .iter()
        .enumerate()
        .all(|(i, &m)| fetch::u32(table, 4 * i).is_some_and(|word| usize::try_from(word) == Ok(m)));
    (count, agree.then_some(pos))
}

impl Symbols {
    /// Symbols of these names, without addresses yet.
    fn of(data: &[u8], names: &NamesTable, tokens: &TokenTable) -> Option<Symbols> {
        let bytes = names.bytes(data).to_vec();
        Some(Symbols {
            places: TablePlaces::new(),
            names: CompressedNames::new(tokens.tokens.clone(), bytes, names.count, names.long)?,
            addrs: Vec::with_capacity(names.count),
            by_addr: OnceCell::new(),
        })
    }

    /// Sets all addresses; false when one is missing.
    fn stand_at(&mut self, address: impl Fn(usize) -> Option<u64>) -> bool {
        let count = self.addrs.capacity();
        self.addrs.clear();
        self.addrs.extend((0..count).map_while(address));
        self.by_addr.take();
        self.addrs.len() == count
    }

    /// How many there are.
    #[must_use]
    #[allow(clippy::len_without_is_empty)] // a table without symbols is not believed
    pub fn len(&self) -> usize {
        self.addrs.len()
    }

    /// All symbols, in the table's order.
    pub fn iter(&self) -> impl Iterator<Item = Symbol> + '_ {
        (0..).zip(&self.addrs).map(|(i, &addr)| Symbol {
            name: self.names.name(i),
            kind: self.names.kind(i),
            addr: Gva(addr),
        })
    }

    fn nth(&self, i: u32) -> Option<Symbol> {
        Some(Symbol {
            name: self.names.name(i),
            kind: self.names.kind(i),
            addr: self.at(i)?,
        })
    }

    fn at(&self, i: u32) -> Option<Gva> {
        self.addrs.get(i as usize).copied().map(Gva)
    }

    fn by_addr(&self) -> &[u32] {
        self.by_addr.get_or_init(|| {
            let mut order: Vec<u32> = (0..).take(self.addrs.len()).collect();
            order.sort_by_key(|&i| self.at(i));
            order
        })
    }

    /// All symbols called `name`, in the table's order (`sympos` counts in it).
    pub fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = Symbol> + 'a {
        self.names.all(name).filter_map(|i| self.nth(i))
    }

    /// All symbols whose names end in `end`, in the table's order.
    pub fn ending<'a>(&'a self, end: &'a str) -> impl Iterator<Item = Symbol> + 'a {
        self.names.ending(end).filter_map(|i| self.nth(i))
    }

    /// Where the parts of the function at `entry` stand that seldom run, by any of its names: see [`cold`].
    #[must_use]
    pub fn cold(&self, entry: Gva) -> Vec<Gva> {
        let names = (0..).zip(&self.addrs).filter(|(_, &at)| at == entry.0);
        let names: Vec<String> = names.map(|(i, _)| self.names.name(i)).collect();
        let mut parts = Vec::new();
        for name in &names {
            let name = format!("{name}{}", split_functions::SUFFIX);
            parts.extend(self.all(&name).map(|s| s.addr));
        }
        // A compiler numbers them all or none.
        if parts.is_empty() && self.ending(split_functions::SUFFIX).next().is_none() {
            let is_part = |s: &Symbol| {
                names
                    .iter()
                    .any(|name| split_functions::is_part(&s.name, name))
            };
            parts.extend(self.iter().filter(is_part).map(|s| s.addr));
        }
        parts
    }

    /// The address of the only, or first, symbol called `name`.
    #[must_use]
    pub fn addr(&self, name: &str) -> Option<Gva> {
        self.names.all(name).next().and_then(|i| self.at(i))
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
        let behind = match self.by_addr.get() {
            Some(order) => {
                let next = order.partition_point(|&i| self.at(i) <= Some(at));
                self.at(*order.get(next)?)?.0
            }
            // A look at all of them takes less than sorting them.
            None => *self.addrs.iter().filter(|&&addr| addr > at.0).min()?,
        };
        Some(behind - at.0)
    }

    /// The text symbol that covers `at`, as name and offset.
    #[must_use]
    pub fn covering(&self, at: Gva) -> Option<(String, u64)> {
        let order = self.by_addr();
        let next = order.partition_point(|&i| self.at(i) <= Some(at));
        let last = self.at(*order.get(next.checked_sub(1)?)?)?;
        // Of several symbols at one address the first in the table is the name people know.
        let first = order.partition_point(|&i| self.at(i) < Some(last));
        Some((self.names.name(*order.get(first)?), at.0 - last.0))
    }

    /// Moves the addresses within the kernel's mapping by `offset` bytes, wrapping: the kernel was
    /// loaded elsewhere (KASLR). Per-CPU offsets and other absolute values stay.
    pub(super) fn slide(&mut self, offset: u64) {
        let moving = |addr: &&mut u64| **addr >= KERNEL_MAP.0;
        for addr in self.addrs.iter_mut().filter(moving) {
            *addr = addr.wrapping_add(offset);
        }
        for (_, place) in &mut self.places {
            *place = place.plus(offset);
        }
        self.by_addr.take();
    }

    /// Whether they fit what else is known of the kernel.
    pub(super) fn agrees(&self, anchors: Anchors<'_>) -> bool {
        let is_text = |i| matches!(self.names.kind(i), 't' | 'T' | 'W' | 'w');
        self.addr("_text") == Some(anchors.text_base)
            && match anchors.second {
                SecondAnchor::Entry(at) => (0..)
                    .zip(&self.addrs)
                    .any(|(i, &addr)| addr == at.0 && is_text(i)),
                SecondAnchor::State(agrees) => agrees(self),
            }
    }
}
