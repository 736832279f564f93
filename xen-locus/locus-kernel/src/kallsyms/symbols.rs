//! The symbol table, read: names and addresses, and questions to it.

use std::cell::{Cell, OnceCell};

use locus_guest::addr::Gva;
use locus_guest::budget::Budget;
use serde::{Deserialize, Serialize};

use super::compressed::CompressedNames;
use super::names::NamesTable;
use super::tokens::TokenTable;
use super::{Anchors, SecondAnchor};
use crate::locate::KERNEL_MAP;
use crate::split_functions::{self, OneFunction};
use crate::Error;

/// A symbol of the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Symbol {
    /// Name without its type character.
    pub name: String,
    /// Type as `nm` prints it: `T` and `t` for text, `D`, `d`, `B`, `b`, `R`, `r` for data, `A` for
    /// absolute values.
    pub kind: char,
    /// Guest virtual address. For per-CPU symbols it is the offset in a CPU's area, see
    /// [`percpu`](crate::tasks::percpu).
    pub addr: Gva,
}

/// Guest virtual addresses of the tables, by the kernel's names for them, such as `kallsyms_names`.
pub type TablePlaces = Vec<(String, Gva)>;

/// All symbols of the kernel image.
///
/// Caches store it by serde: order and types of the fields are a file format.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Symbols {
    /// Where the tables are in the guest.
    pub places: TablePlaces,
    names: CompressedNames,
    /// The address of each.
    #[serde(with = "words")]
    addrs: Vec<u64>,
    #[serde(skip)]
    by_addr: OnceCell<Vec<u32>>,
    #[serde(skip)]
    parts: OnceCell<Vec<u32>>,
    /// How often all addresses were looked at for the sake of one.
    #[serde(skip)]
    passes: Cell<u32>,
    /// What looking for a name costs is paid from it.
    #[serde(skip)]
    budget: Budget,
}

/// Most passes over all addresses before they are sorted. To look at all of them takes less than to sort them, but each
/// function and each part of one needs a pass.
const PASSES_MAX: u32 = 16;

/// Stores words as eight bytes each. Kernel addresses have their upper bits set, so postcard's
/// variable length would take more bytes, and time for each.
mod words {
    use serde::{Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(words: &[u64], to: S) -> Result<S::Ok, S::Error> {
        let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        serde_bytes::serialize(&bytes, to)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<u64>, D::Error> {
        let bytes: &[u8] = serde_bytes::deserialize(from)?;
        let (words, _) = bytes.as_chunks::<8>();
        Ok(words.iter().map(|word| u64::from_le_bytes(*word)).collect())
    }
}

impl Symbols {
    /// Symbols of these names, without addresses yet; `None` if the names are not well-formed.
    pub(super) fn of(data: &[u8], names: &NamesTable, tokens: &TokenTable) -> Option<Symbols> {
        let bytes = names.bytes(data)?.to_vec();
        Some(Symbols {
            places: TablePlaces::new(),
            names: CompressedNames::new(tokens.tokens.clone(), bytes, names.count, names.long)?,
            addrs: Vec::with_capacity(names.count),
            by_addr: OnceCell::new(),
            parts: OnceCell::new(),
            passes: Cell::new(0),
            budget: Budget::default(),
        })
    }

    /// Sets all addresses; false if one is missing.
    pub(super) fn set_addresses(&mut self, address: impl Fn(usize) -> Option<u64>) -> bool {
        let count = self.addrs.capacity();
        self.addrs.clear();
        self.addrs.extend((0..count).map_while(address));
        self.by_addr.take();
        self.addrs.len() == count
    }

    /// The same, with `budget` for what looking for names costs: a guest may have many names alike. What is found is right even
    /// if the budget is spent by it; then the next that reads the guest ends with that.
    pub(crate) fn paid_from(self, budget: &Budget) -> Symbols {
        Symbols {
            budget: budget.clone(),
            ..self
        }
    }

    /// Number of symbols.
    #[must_use]
    #[allow(clippy::len_without_is_empty)] // a table without symbols is not believed
    pub fn len(&self) -> usize {
        self.addrs.len()
    }

    /// All symbols, in the table's order. Each name is decoded: [`Symbols::all`] and
    /// [`Symbols::addr`] are faster.
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

    /// All symbols called `name`, in the table's order. It is the order in which livepatch counts (`sympos`).
    pub fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = Symbol> + 'a {
        let all = self.names.all(name, &self.budget);
        all.filter_map(|i| self.nth(i))
    }

    /// Guest virtual addresses of all symbols called `name`, in the table's order.
    pub fn addrs<'a>(&'a self, name: &'a str) -> impl Iterator<Item = Gva> + 'a {
        let all = self.names.all(name, &self.budget);
        all.filter_map(|i| self.at(i))
    }

    /// All symbols whose names end in `end`, in the table's order.
    pub fn ending<'a>(&'a self, end: &'a str) -> impl Iterator<Item = Symbol> + 'a {
        self.names.ending(end).filter_map(|i| self.nth(i))
    }

    /// Guest virtual addresses of the parts that the compiler split off the function at `entry`, by
    /// any of the function's names ([`split_functions`]), rising. Each part that a guest's table has
    /// is looked at once.
    ///
    /// # Errors
    /// [`Error::Odd`] if there are more names or parts than a function can have.
    pub fn cold_parts(&self, entry: Gva) -> Result<Vec<Gva>, Error> {
        let names = (0..).zip(&self.addrs).filter(|(_, &at)| at == entry.0);
        let mut of_entry = OneFunction::new(entry);
        for (i, _) in names {
            of_entry.named(&self.names.name(i))?;
        }
        for &i in self.parts() {
            if let Some(at) = self.at(i) {
                of_entry.part(&self.names.name(i), at)?;
            }
        }
        Ok(of_entry.parts.into_iter().collect())
    }

    /// What [`Symbols::cold_parts`] costs for one function, in units of a guest's budget.
    #[must_use]
    pub fn cold_parts_cost(&self) -> u64 {
        (self.parts().len() + self.addrs.len() / 64) as u64
    }

    /// The numbers of all symbols that name parts of functions, in the table's order.
    fn parts(&self) -> &[u32] {
        self.parts.get_or_init(|| {
            let parts: Vec<u32> = self.names.ending(split_functions::SUFFIX).collect();
            // A compiler numbers all parts or none.
            if !parts.is_empty() {
                return parts;
            }
            let numbers = (0..).zip(&self.addrs).map(|(i, _)| i);
            let is_part = |&i: &u32| split_functions::whole(&self.names.name(i)).is_some();
            numbers.filter(is_part).collect()
        })
    }

    /// Guest virtual address of the only or first symbol called `name`.
    #[must_use]
    pub fn addr(&self, name: &str) -> Option<Gva> {
        self.addrs(name).next()
    }

    /// As [`Symbols::addr`], for a symbol that is needed.
    ///
    /// # Errors
    /// [`Error::Missing`] if the kernel has no such symbol.
    pub fn need(&self, name: &str) -> Result<Gva, Error> {
        self.addr(name)
            .ok_or_else(|| Error::Missing(format!("symbol {name}")))
    }

    /// Bytes from the guest virtual address `at` to the next symbol with a higher address, which is
    /// the most that a function there can have. `None` behind the last symbol.
    #[must_use]
    pub fn room(&self, at: Gva) -> Option<u64> {
        let behind = if self.by_addr.get().is_none() && self.passes.get() < PASSES_MAX {
            self.passes.set(self.passes.get() + 1);
            *self.addrs.iter().filter(|&&addr| addr > at.0).min()?
        } else {
            let order = self.by_addr();
            let next = order.partition_point(|&i| self.at(i) <= Some(at));
            self.at(*order.get(next)?)?.0
        };
        Some(behind - at.0)
    }

    /// The symbol that covers the guest virtual address `at`, and the offset in it in bytes: the
    /// last symbol at or below `at`. It may be data, and `at` may be far behind its end. `None`
    /// below all symbols.
    #[must_use]
    pub fn covering(&self, at: Gva) -> Option<(String, u64)> {
        let order = self.by_addr();
        let next = order.partition_point(|&i| self.at(i) <= Some(at));
        let last = self.at(*order.get(next.checked_sub(1)?)?)?;
        // Of several symbols at one address, the first in the table has the usual name.
        let first = order.partition_point(|&i| self.at(i) < Some(last));
        Some((self.names.name(*order.get(first)?), at.0 - last.0))
    }

    /// Moves all addresses within the kernel's mapping by `offset` bytes, wrapping, because the
    /// kernel was loaded elsewhere (KASLR). Per-CPU offsets and other absolute values stay.
    pub(crate) fn slide(&mut self, offset: u64) {
        let moving = |addr: &&mut u64| **addr >= KERNEL_MAP.0;
        for addr in self.addrs.iter_mut().filter(moving) {
            *addr = addr.wrapping_add(offset);
        }
        for (_, place) in &mut self.places {
            *place = place.plus(offset);
        }
        self.by_addr.take();
    }

    /// Whether the symbols agree with what is known of the kernel otherwise.
    pub(crate) fn agrees(&self, anchors: Anchors<'_>) -> bool {
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
