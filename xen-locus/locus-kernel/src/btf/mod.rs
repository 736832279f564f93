//! BPF Type Format: the kernel's own description of its types.
//!
//! The format is in Documentation/bpf/btf.rst. This file indexes a blob and finds types by name.
//! Questions about members, bit fields, enums and arrays are in [`member`], types as C text in
//! [`text`]. All access is bounds-checked, and the work for one question is bounded, whatever the
//! blob says.

#[cfg(any(test, feature = "testing"))]
pub mod blob;
pub mod member;
pub mod prototype;
#[cfg(test)]
mod tests;
pub mod text;

use std::cell::{Cell, OnceCell};
use std::rc::Rc;

use locus_guest::budget::Budget;
use locus_guest::fetch;

pub use self::member::Bits;
use crate::name_index::{self, NameIndex};
use crate::Error;

const MAGIC: u16 = 0xeb9f;
const HEADER: usize = 24;
/// Most typedefs and qualifiers that are followed from one type to what is behind them.
const CHAIN: u32 = 32;
/// Most types believed (`BTF_MAX_TYPE` in `include/uapi/linux/btf.h`).
const TYPES_MAX: usize = 1 << 20;
/// Longest blob believed, in bytes. Those of Debian's kernels have about 5 MiB.
pub const BYTES_MAX: usize = 32 << 20;
/// Longest name believed, in bytes (`KSYM_NAME_LEN` of `include/linux/kallsyms.h`).
const NAME_MAX: usize = 512;

/// Kinds of types, as numbered in `include/uapi/linux/btf.h`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // the names are those of the format
pub enum TypeKind {
    Int = 1,
    Ptr,
    Array,
    Struct,
    Union,
    Enum,
    Fwd,
    Typedef,
    Volatile,
    Const,
    Restrict,
    Func,
    FuncProto,
    Var,
    Datasec,
    Float,
    DeclTag,
    TypeTag,
    Enum64,
}

impl TypeKind {
    /// The kind in the word `info` of a type. It has seven bits. Older kernels use five of them and
    /// leave the others zero.
    fn of(info: u32) -> Option<TypeKind> {
        use TypeKind::*;
        Some(match (info >> 24) & 0x7f {
            1 => Int,
            2 => Ptr,
            3 => Array,
            4 => Struct,
            5 => Union,
            6 => Enum,
            7 => Fwd,
            8 => Typedef,
            9 => Volatile,
            10 => Const,
            11 => Restrict,
            12 => Func,
            13 => FuncProto,
            14 => Var,
            15 => Datasec,
            16 => Float,
            17 => DeclTag,
            18 => TypeTag,
            19 => Enum64,
            _ => return None,
        })
    }

    /// Whether it only refers to another type with the same layout.
    fn transparent(self) -> bool {
        matches!(
            self,
            TypeKind::Typedef
                | TypeKind::Volatile
                | TypeKind::Const
                | TypeKind::Restrict
                | TypeKind::TypeTag
        )
    }
}

/// What follows the 12-byte head of a type, by the number of its kind: bytes of its own, and bytes
/// for each of its parts. The flag says whether it is a structure, union or enumeration.
const TAILS: [Option<(usize, usize, bool)>; 20] = [
    None,
    Some((4, 0, false)), // Int
    Some((0, 0, false)),
    Some((12, 0, false)), // Array
    Some((0, 12, true)),  // Struct
    Some((0, 12, true)),  // Union
    Some((0, 8, true)),   // Enum
    Some((0, 0, false)),
    Some((0, 0, false)),
    Some((0, 0, false)),
    Some((0, 0, false)),
    Some((0, 0, false)),
    Some((0, 0, false)),
    Some((0, 8, false)),  // FuncProto
    Some((4, 0, false)),  // Var
    Some((0, 12, false)), // Datasec
    Some((0, 0, false)),
    Some((4, 0, false)), // DeclTag
    Some((0, 0, false)),
    Some((0, 12, true)), // Enum64
];

/// Steps left for one question, so that no blob makes an answer slow.
#[derive(Debug)]
struct Steps(Cell<u32>);

impl Steps {
    fn new(most: u32) -> Steps {
        Steps(Cell::new(most))
    }

    /// Takes one step; `None` when there are none left.
    fn take(&self) -> Option<()> {
        self.0.set(self.0.get().checked_sub(1)?);
        Some(())
    }
}

/// A type as it is in its blob.
#[derive(Clone, Copy)]
struct TypeRecord<'a> {
    bytes: &'a [u8],
    at: usize,
    kind: TypeKind,
    /// Offset of its name in the strings.
    name: u32,
    /// Size in bytes, or id of the type it refers to.
    value: u32,
    /// Number of members, parameters or enumerators. It has 24 bits. Older kernels use 16 of them
    /// and leave the others zero.
    parts: usize,
    flag: bool,
}

impl TypeRecord<'_> {
    /// Word `n` behind the head.
    fn word(&self, n: usize) -> Option<u32> {
        fetch::u32(self.bytes, self.at + 12 + 4 * n)
    }
}

/// All types of the kernel, or of one module on top of the kernel's.
///
/// A type has an id. Ids are dense: `void` is 0, then come those of the kernel, then those of the module.
#[derive(Debug)]
pub struct Btf {
    bytes: Vec<u8>,
    strings: std::ops::Range<usize>,
    /// Byte offset of each type of this blob; without a base, entry 0 is `void`.
    types: Vec<u32>,
    /// Id of `types[0]`.
    first: u32,
    base: Option<Rc<Btf>>,
    /// Names of all types of this blob.
    by_name: OnceCell<NameIndex>,
    /// Structures, unions and enumerations that have a name, by their place in `types`. Most
    /// questions are about them, and they are a tenth of all types.
    shapes: Vec<u32>,
    /// Names of `shapes`.
    shapes_by_name: NameIndex,
    /// What looking for a name costs is paid from it.
    budget: Budget,
}

impl Btf {
    /// Indexes the BTF blob `bytes` of a kernel.
    ///
    /// # Errors
    /// [`Error::Odd`] if it is not well-formed, is longer than [`BYTES_MAX`], has more than 2^20
    /// types, has a kind of type that is unknown, or too many structures, unions and enumerations are named alike.
    pub fn new(bytes: Vec<u8>) -> Result<Btf, Error> {
        Btf::index(bytes, None)
    }

    /// Indexes the blob `bytes` of a module. Its type ids and the offsets of its strings continue
    /// those of `base` (Documentation/bpf/btf.rst; kernel/bpf/btf.c: `btf_parse_module`).
    ///
    /// # Errors
    /// As [`Btf::new`].
    pub fn split(base: Rc<Btf>, bytes: Vec<u8>) -> Result<Btf, Error> {
        Btf::index(bytes, Some(base))
    }

    fn index(bytes: Vec<u8>, base: Option<Rc<Btf>>) -> Result<Btf, Error> {
        let odd = |what: &str| Error::Odd(format!("BTF: {what}"));
        if bytes.len() > BYTES_MAX {
            return Err(Error::Odd(format!(
                "BTF of {} bytes; expected at most {BYTES_MAX}",
                bytes.len()
            )));
        }
        if fetch::u16(&bytes, 0) != Some(MAGIC) {
            return Err(odd("no magic number at its start"));
        }
        let word = |at| {
            fetch::u32(&bytes, at)
                .map(|w| w as usize)
                .ok_or_else(|| odd("cut short"))
        };
        let head = word(4)?;
        let section = |offset: usize, len: usize| {
            let start = head.checked_add(offset)?;
            let end = start.checked_add(len)?;
            (head >= HEADER && end <= bytes.len()).then_some(start..end)
        };
        let leaves = || odd("its sections leave the blob");
        let records = section(word(8)?, word(12)?).ok_or_else(leaves)?;
        let strings = section(word(16)?, word(20)?).ok_or_else(leaves)?;
        let (first, mut types) = match &base {
            None => (0, vec![0]),
            Some(base) => (base.end(), Vec::new()),
        };
        types.reserve(records.len() / 12);
        let mut shapes = Vec::new();
        let mut at = records.start;
        while at < records.end {
            let info = fetch::u32(&bytes, at + 4).ok_or_else(|| odd("cut short"))?;
            let number = ((info >> 24) & 0x7f) as usize;
            let Some(Some((own, part, is_shape))) = TAILS.get(number) else {
                return Err(Error::Odd(format!(
                    "BTF: type {} is of the unknown kind {number}",
                    first as usize + types.len(),
                )));
            };
            if *is_shape && fetch::u32(&bytes, at) != Some(0) {
                shapes.push(u32::try_from(types.len()).map_err(|_| odd("too many types"))?);
            }
            types.push(u32::try_from(at).map_err(|_| odd("too big"))?);
            at += 12 + own + part * (info & 0x00ff_ffff) as usize;
        }
        if first as usize + types.len() > TYPES_MAX {
            return Err(odd("too many types"));
        }
        if at > records.end {
            return Err(odd("its last type leaves the types"));
        }
        let budget = base
            .as_ref()
            .map_or_else(Budget::default, |base| base.budget.clone());
        let mut btf = Btf {
            bytes,
            strings,
            types,
            first,
            base,
            by_name: OnceCell::new(),
            shapes_by_name: NameIndex::with_capacity(0),
            shapes,
            budget,
        };
        btf.shapes_by_name = btf.index_names(btf.shapes.iter().copied(), btf.shapes.len());
        if btf.shapes_by_name.is_overfull() {
            return Err(Error::Odd(format!(
                "BTF: more than {} structures are named alike",
                name_index::GROUP_MAX
            )));
        }
        Ok(btf)
    }

    /// The same, with `budget` for what looking for names costs: a guest may have many names alike. What is found is right even
    /// if the budget is spent by it; then the next that reads the guest ends with that.
    #[must_use]
    pub fn paid_from(self, budget: &Budget) -> Btf {
        Btf {
            budget: budget.clone(),
            ..self
        }
    }

    /// Number of types of this blob, without `void` and without those of the base.
    #[must_use]
    #[allow(clippy::len_without_is_empty)] // a kernel always has types
    pub fn len(&self) -> usize {
        self.types.len() - usize::from(self.base.is_none())
    }

    /// The blob as it is in the guest, without that of the base.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// One past the highest id. It fits: [`TYPES_MAX`] was checked.
    fn end(&self) -> u32 {
        self.first + u32::try_from(self.types.len()).unwrap_or(0)
    }

    fn record(&self, id: u32) -> Option<TypeRecord<'_>> {
        let Some(index) = id.checked_sub(self.first) else {
            return self.base.as_ref()?.record(id);
        };
        if id == 0 {
            return None;
        }
        let at = *self.types.get(index as usize)? as usize;
        let info = fetch::u32(&self.bytes, at + 4)?;
        Some(TypeRecord {
            bytes: &self.bytes,
            at,
            kind: TypeKind::of(info)?,
            name: fetch::u32(&self.bytes, at)?,
            value: fetch::u32(&self.bytes, at + 8)?,
            parts: (info & 0x00ff_ffff) as usize,
            flag: info >> 31 == 1,
        })
    }

    /// The string at `offset`, at most [`NAME_MAX`] bytes of it. It is empty if there is none.
    fn string(&self, offset: u32) -> &[u8] {
        let mut offset = offset as usize;
        if let Some(base) = &self.base {
            match offset.checked_sub(base.strings.len()) {
                Some(own) => offset = own,
                None => return base.own_string(offset),
            }
        }
        self.own_string(offset)
    }

    fn own_string(&self, offset: usize) -> &[u8] {
        let rest = self
            .bytes
            .get(self.strings.clone())
            .and_then(|all| all.get(offset..))
            .unwrap_or_default();
        let rest = rest.get(..NAME_MAX).unwrap_or(rest);
        let end = rest.iter().position(|&b| b == 0);
        rest.get(..end.unwrap_or(rest.len())).unwrap_or_default()
    }

    /// The string at `offset` as it may be shown: control characters are replaced, because a
    /// terminal could take them for a command.
    fn name(&self, offset: u32) -> String {
        String::from_utf8_lossy(self.string(offset))
            .chars()
            .map(|c| if c.is_control() { '?' } else { c })
            .collect()
    }

    /// Indexes `count` types of this blob by name; `numbers` are their places in `types`.
    fn index_names(&self, numbers: impl Iterator<Item = u32>, count: usize) -> NameIndex {
        // Strings and types are within the blob, as was checked when it was indexed. What is not
        // there has no name.
        let own = self.bytes.get(self.strings.clone()).unwrap_or_default();
        let shared = self.base.as_ref().map_or(0, |base| base.strings.len());
        let mut index = NameIndex::with_capacity(count);
        for number in numbers {
            let at = self.types.get(number as usize).map_or(0, |&at| at as usize);
            let name = fetch::u32(&self.bytes, at).unwrap_or(0);
            index.push(match (name as usize).checked_sub(shared) {
                // Half of the types have no name. They are spread over all groups.
                _ if name == 0 => number.wrapping_mul(0x9e37_79b9),
                Some(at) => name_index::hash_string(own.get(at..).unwrap_or_default(), NAME_MAX),
                None => name_index::hash(self.string(name)),
            });
        }
        index
    }

    fn is_called(&self, id: u32, name: &str) -> bool {
        self.record(id)
            .is_some_and(|r| self.string(r.name) == name.as_bytes())
    }

    /// Ids of all types called `name`, rising; those of the base come first.
    fn named<'a>(&'a self, name: &'a str) -> Box<dyn Iterator<Item = u32> + 'a> {
        let all = || self.index_names((0..).take(self.types.len()), self.types.len());
        let index = self.by_name.get_or_init(all);
        let candidates = index.candidates(name_index::hash(name.as_bytes()), &self.budget);
        let ids = candidates.into_iter().map(|number| self.first + number);
        let own = ids.filter(move |&id| self.is_called(id, name));
        match &self.base {
            Some(base) => Box::new(base.named(name).chain(own)),
            None => Box::new(own),
        }
    }

    /// The id of the first structure, union or enumeration called `name` whose kind is one of
    /// `kinds`. Types of the base come first. Types of other kinds are never found.
    #[must_use]
    pub fn find(&self, kinds: &[TypeKind], name: &str) -> Option<u32> {
        if let Some(found) = self.base.as_ref().and_then(|base| base.find(kinds, name)) {
            return Some(found);
        }
        let hash = name_index::hash(name.as_bytes());
        let candidates = self.shapes_by_name.candidates(hash, &self.budget);
        candidates
            .into_iter()
            .filter_map(|i| Some(self.first + *self.shapes.get(i as usize)?))
            .filter(|&id| self.is_called(id, name))
            .find(|&id| self.record(id).is_some_and(|r| kinds.contains(&r.kind)))
    }

    /// Looks through typedefs and qualifiers, at most [`CHAIN`] of them.
    fn strip(&self, mut id: u32) -> u32 {
        for _ in 0..CHAIN {
            match self.record(id) {
                Some(r) if r.kind.transparent() => id = r.value,
                _ => break,
            }
        }
        id
    }
}
