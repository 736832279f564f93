//! BPF Type Format: the kernel's own description of its types.
//!
//! Format: Documentation/bpf/btf.rst. Only what a reader of structures needs is decoded: names,
//! sizes, members and their offsets. All of it is bounds-checked; recursion through anonymous
//! members is bounded.

use super::Error;
use crate::guest::fetch;

const MAGIC: u16 = 0xeb9f;
const HEADER: usize = 24;
/// Deepest nesting of anonymous members followed.
const DEPTH: u32 = 16;
/// Most types believed; kernels of distributions have up to 200,000.
const TYPES_MAX: usize = 1 << 20;
/// Most members looked at for one member of a path; `struct task_struct` has 300.
const MEMBERS_MAX: u32 = 1 << 16;

/// Kinds of types, as numbered in `include/uapi/linux/btf.h`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Kind {
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

/// A member's place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Field {
    /// Offset from the start of the outermost structure, in bytes.
    pub offset: usize,
    /// Id of its type.
    pub type_id: u32,
}

/// All types of the kernel.
#[derive(Debug)]
pub struct Btf {
    bytes: Vec<u8>,
    strings: usize,
    /// Byte offset of each type; entry 0 is `void`.
    types: Vec<u32>,
}

fn kind_of(info: u32) -> u32 {
    (info >> 24) & 0x1f
}

fn vlen_of(info: u32) -> usize {
    (info & 0xffff) as usize
}

/// Bytes that follow the 12-byte head of a type.
fn tail_of(info: u32) -> Option<usize> {
    let n = vlen_of(info);
    Some(match kind_of(info) {
        1 | 14 | 17 => 4,          // Int, Var, DeclTag
        2 | 7..=12 | 16 | 18 => 0, // Ptr, Fwd … Func, Float, TypeTag
        3 => 12,                   // Array
        4 | 5 | 15 | 19 => n * 12, // Struct, Union, Datasec, Enum64
        6 | 13 => n * 8,           // Enum, FuncProto
        _ => return None,
    })
}

impl Btf {
    /// Indexes the BTF blob `bytes`.
    ///
    /// # Errors
    /// [`Error::Odd`] when it is not well-formed.
    pub fn new(bytes: Vec<u8>) -> Result<Btf, Error> {
        let odd = |what: &str| Error::Odd(format!("BTF: {what}"));
        if fetch::u16(&bytes, 0) != Some(MAGIC) {
            return Err(odd("no magic number at its start"));
        }
        let word = |at| {
            fetch::u32(&bytes, at)
                .map(|w| w as usize)
                .ok_or_else(|| odd("cut short"))
        };
        let head = word(4)?;
        let (type_off, type_len, str_off, str_len) = (word(8)?, word(12)?, word(16)?, word(20)?);
        let start = head
            .checked_add(type_off)
            .ok_or_else(|| odd("offsets overflow"))?;
        let end = start
            .checked_add(type_len)
            .ok_or_else(|| odd("offsets overflow"))?;
        let strings = head
            .checked_add(str_off)
            .ok_or_else(|| odd("offsets overflow"))?;
        let strings_end = strings
            .checked_add(str_len)
            .ok_or_else(|| odd("offsets overflow"))?;
        if head < HEADER || end > bytes.len() || strings_end > bytes.len() {
            return Err(odd("its sections leave the blob"));
        }
        let mut types = vec![0];
        let mut at = start;
        while at < end {
            let info = fetch::u32(&bytes, at + 4).ok_or_else(|| odd("cut short"))?;
            let tail = tail_of(info).ok_or_else(|| odd("unknown kind of type"))?;
            types.push(u32::try_from(at).map_err(|_| odd("too big"))?);
            if types.len() > TYPES_MAX {
                return Err(odd("too many types"));
            }
            at += 12 + tail;
        }
        Ok(Btf {
            bytes,
            strings,
            types,
        })
    }

    /// The blob.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Number of types, `void` not counted.
    #[must_use]
    #[allow(clippy::len_without_is_empty)] // a kernel's types are never none
    pub fn len(&self) -> usize {
        self.types.len() - 1
    }

    fn at(&self, id: u32) -> Option<usize> {
        if id == 0 {
            return None;
        }
        self.types.get(id as usize).map(|&o| o as usize)
    }

    fn word(&self, id: u32, n: usize) -> Option<u32> {
        fetch::u32(&self.bytes, self.at(id)? + 4 * n)
    }

    /// Whether the string at `offset` is `wanted`. No longer part of it is looked at: a guest may
    /// leave out the NUL.
    fn is_string(&self, offset: u32, wanted: &[u8]) -> bool {
        let rest = self.bytes.get(self.strings + offset as usize..);
        rest.and_then(|rest| rest.strip_prefix(wanted))
            .is_some_and(|rest| rest.first() == Some(&0))
    }

    /// The first type of one of `kinds` called `name`.
    #[must_use]
    pub fn find(&self, kinds: &[Kind], name: &str) -> Option<u32> {
        let wanted = |&id: &u32| {
            let Some(info) = self.word(id, 1) else {
                return false;
            };
            kinds.iter().any(|&k| k as u32 == kind_of(info))
                && self
                    .word(id, 0)
                    .is_some_and(|n| self.is_string(n, name.as_bytes()))
        };
        (1..u32::try_from(self.types.len()).ok()?).find(wanted)
    }

    /// The structure or union `name`.
    fn composite(&self, name: &str) -> Option<u32> {
        self.find(&[Kind::Struct, Kind::Union], name)
    }

    /// Size of the structure or union `name`, in bytes.
    ///
    /// # Errors
    /// [`Error::Missing`] when there is none of that name.
    pub fn size_of(&self, name: &str) -> Result<usize, Error> {
        self.composite(name)
            .and_then(|id| self.word(id, 2))
            .map(|s| s as usize)
            .ok_or_else(|| Error::Missing(format!("type {name} in BTF")))
    }

    /// Byte offset of the member `path` (dotted, as `thread.sp`) in structure `name`. Anonymous
    /// members are looked into.
    ///
    /// # Errors
    /// [`Error::Missing`] when there is no such type or member, or it is a bit field.
    pub fn offset_of(&self, name: &str, path: &str) -> Result<usize, Error> {
        let missing = || Error::Missing(format!("member {path} of {name} in BTF"));
        let mut id = self.composite(name).ok_or_else(missing)?;
        let mut offset = 0;
        for part in path.split('.') {
            let mut left = MEMBERS_MAX;
            let field = self
                .member(id, part.as_bytes(), DEPTH, &mut left)
                .ok_or_else(missing)?;
            offset += field.offset;
            id = self.strip(field.type_id);
        }
        Ok(offset)
    }

    /// At most `left` members are looked at: anonymous ones of anonymous ones multiply.
    fn member(&self, id: u32, name: &[u8], depth: u32, left: &mut u32) -> Option<Field> {
        let info = self.word(id, 1)?;
        if depth == 0 || !(4..=5).contains(&kind_of(info)) {
            return None;
        }
        let bitfields = info >> 31 == 1;
        for i in 0..vlen_of(info) {
            *left = left.checked_sub(1)?;
            let at = self.at(id)? + 12 + 12 * i;
            let type_id = fetch::u32(&self.bytes, at + 4)?;
            let mut bits = fetch::u32(&self.bytes, at + 8)?;
            if bitfields {
                if bits >> 24 != 0 {
                    continue;
                }
                bits &= 0x00ff_ffff;
            }
            let offset = bits as usize / 8;
            let member = fetch::u32(&self.bytes, at)?;
            if self.is_string(member, name) {
                return Some(Field { offset, type_id });
            }
            if self.is_string(member, b"") {
                if let Some(inner) = self.member(self.strip(type_id), name, depth - 1, left) {
                    return Some(Field {
                        offset: offset + inner.offset,
                        ..inner
                    });
                }
            }
        }
        None
    }

    /// Looks through typedefs and qualifiers, at most [`DEPTH`] of them.
    fn strip(&self, mut id: u32) -> u32 {
        for _ in 0..DEPTH {
            match self.word(id, 1).map(kind_of) {
                Some(8..=11 | 18) => id = self.word(id, 2).unwrap_or(0),
                _ => break,
            }
        }
        id
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A blob with `struct outer { int a; union { long b; struct inner c; }; }`.
    fn sample() -> Vec<u8> {
        let strings = b"\0int\0outer\0a\0b\0inner\0c\0x\0";
        let name = |s: &str| {
            let at = strings
                .windows(s.len() + 1)
                .position(|w| w.starts_with(s.as_bytes()) && w.last() == Some(&0));
            u32::try_from(at.unwrap()).unwrap()
        };
        let mut t: Vec<u32> = vec![name("int"), 1 << 24, 4, 32]; // 1
        t.extend([name("inner"), (4 << 24) | 1, 8, name("x"), 1, 32]); // 2
        t.extend([0, (5 << 24) | 2, 8, name("b"), 1, 0, name("c"), 2, 0]); // 3
        t.extend([name("outer"), (4 << 24) | 2, 16, name("a"), 1, 0, 0, 3, 64]); // 4
        let mut out = Vec::new();
        out.extend(MAGIC.to_le_bytes());
        out.extend([1, 0]);
        let types = u32::try_from(t.len() * 4).unwrap();
        for w in [24, 0, types, types, u32::try_from(strings.len()).unwrap()] {
            out.extend(w.to_le_bytes());
        }
        out.extend(t.iter().flat_map(|w| w.to_le_bytes()));
        out.extend(strings);
        out
    }

    #[test]
    fn members_are_found_through_anonymous_unions_and_dots() {
        let btf = Btf::new(sample()).unwrap();
        assert_eq!(btf.len(), 4);
        assert_eq!(btf.size_of("outer").unwrap(), 16);
        assert_eq!(btf.offset_of("outer", "a").unwrap(), 0);
        assert_eq!(btf.offset_of("outer", "b").unwrap(), 8);
        assert_eq!(btf.offset_of("outer", "c.x").unwrap(), 12);
        assert!(btf.offset_of("outer", "nope").is_err());
    }

    #[test]
    fn structures_that_hold_each_other_by_the_thousand_are_given_up_soon() {
        // struct s { struct s; struct s; … }, with no name to end the search.
        let mut t: Vec<u32> = vec![1, (4 << 24) | 0xffff, 8];
        for _ in 0..0xffff {
            t.extend([0, 1, 0]);
        }
        let strings = b"\0s\0";
        let types = u32::try_from(t.len() * 4).unwrap();
        let mut out = vec![0x9f, 0xeb, 1, 0];
        for w in [24, 0, types, types, u32::try_from(strings.len()).unwrap()] {
            out.extend(w.to_le_bytes());
        }
        out.extend(t.iter().flat_map(|w| w.to_le_bytes()));
        out.extend(strings);
        let btf = Btf::new(out).unwrap();
        assert!(btf.offset_of("s", "x").is_err());
    }

    #[test]
    fn any_mutation_of_a_blob_is_refused_or_harmless() {
        let good = sample();
        for at in 0..good.len() {
            for value in [0, 1, 0x7f, 0xff] {
                let mut bad = good.clone();
                bad[at] = value;
                if let Ok(btf) = Btf::new(bad) {
                    let _ = btf.offset_of("outer", "c.x");
                }
            }
            let _ = Btf::new(good[..at].to_vec());
        }
    }
}
