//! Members of structures: offsets, bit fields, arrays; values of enums.

use locus_guest::fetch;

use super::{Btf, Error, Steps, TypeKind, TypeRecord, CHAIN};

/// Deepest nesting of anonymous members followed.
const DEPTH: u32 = 16;
/// Most members or enumerators looked at for one question.
const STEPS: u32 = 1 << 17;

/// Where a value of some bits is in a structure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bits {
    /// Offset of the byte that has the lowest bit, from the start of the structure, in bytes.
    pub offset: usize,
    /// Number of the lowest bit in that byte.
    pub shift: u32,
    /// How many bits it has.
    pub width: u32,
}

impl Bits {
    /// How many bytes they are in, from that byte on.
    #[must_use]
    pub fn bytes(&self) -> usize {
        (self.shift + self.width).div_ceil(8) as usize
    }

    /// Their value in the structure `bytes`, as an unsigned number. `None` if `bytes` is too short,
    /// or the value has more than 64 bits.
    #[must_use]
    pub fn value(&self, bytes: &[u8]) -> Option<u64> {
        let bits = self.shift.checked_add(self.width).filter(|&n| n <= 128)?;
        let end = self.offset.checked_add(bits.div_ceil(8) as usize)?;
        let word = bytes
            .get(self.offset..end)?
            .iter()
            .rev()
            .fold(0u128, |w, &b| (w << 8) | u128::from(b));
        let mask = 1u128.checked_shl(self.width)?.wrapping_sub(1);
        u64::try_from((word >> self.shift) & mask).ok()
    }
}

/// A member of a structure or union, as BTF has it.
#[derive(Clone, Copy)]
pub(super) struct Member {
    /// Offset of its name in the strings.
    pub name: u32,
    /// Id of its type.
    pub type_id: u32,
    /// Offset from the start of the structure, in bits.
    pub bit: u64,
    /// Width of a bit field; 0 for all others.
    pub width: u32,
}

/// Member `i` of the structure or union `r`.
pub(super) fn member(r: &TypeRecord<'_>, i: usize) -> Option<Member> {
    if !matches!(r.kind, TypeKind::Struct | TypeKind::Union) || i >= r.parts {
        return None;
    }
    let (name, type_id, at) = (r.word(3 * i)?, r.word(3 * i + 1)?, r.word(3 * i + 2)?);
    // With the flag, the upper eight bits hold the width of a bit field.
    let (bit, width) = if r.flag {
        (at & 0x00ff_ffff, at >> 24)
    } else {
        (at, 0)
    };
    Some(Member {
        name,
        type_id,
        bit: bit.into(),
        width,
    })
}

impl Btf {
    /// The structure or union `name`.
    fn composite(&self, name: &str) -> Option<u32> {
        self.find(&[TypeKind::Struct, TypeKind::Union], name)
    }

    /// Size of the structure or union `name`, in bytes.
    ///
    /// # Errors
    /// [`Error::Missing`] if there is no such type.
    pub fn size_of(&self, name: &str) -> Result<usize, Error> {
        self.composite(name)
            .and_then(|id| self.record(id))
            .map(|r| r.value as usize)
            .ok_or_else(|| Error::Missing(format!("type {name} in BTF")))
    }

    /// Offset of the member `path` in the structure or union `name`, in bytes. A path has dots,
    /// such as `thread.sp`. Members of anonymous structures and unions are found too.
    ///
    /// # Errors
    /// [`Error::Missing`] if there is no such type or member, or it is a bit field.
    pub fn offset_of(&self, name: &str, path: &str) -> Result<usize, Error> {
        self.resolve(name, path)
            .filter(|m| m.width == 0 && m.bit % 8 == 0)
            .and_then(|m| usize::try_from(m.bit / 8).ok())
            .ok_or_else(|| missing(name, path))
    }

    /// Offset of the member `path` that has `bytes` bytes, as [`Btf::offset_of`]: for what is read or written as a number of
    /// that width. A kernel may make a member narrower and put others where it was: `on_cpu` of `task_struct` is one byte
    /// in Linux 7.2.12.
    ///
    /// # Errors
    /// [`Error::Missing`] as [`Btf::offset_of`]; [`Error::Odd`] if it has another width.
    pub fn offset_of_sized(&self, name: &str, path: &str, bytes: usize) -> Result<usize, Error> {
        let at = self.offset_of(name, path)?;
        let found = self
            .resolve(name, path)
            .and_then(|m| self.bytes_of(m.type_id))
            .ok_or_else(|| missing(name, path))?;
        if found != bytes as u64 {
            return Err(Error::Odd(format!(
                "member {path} of {name} has {found} bytes in BTF; expected {bytes}"
            )));
        }
        Ok(at)
    }

    /// Whether the structure or union `ty` has the member `path`, which may be a bit field.
    #[must_use]
    pub fn has(&self, ty: &str, path: &str) -> bool {
        self.resolve(ty, path).is_some()
    }

    /// Where the bits of the member (or path) `member` are in the structure or union `ty`. The
    /// member may be a bit field, or any other of at most 64 bits.
    ///
    /// # Errors
    /// [`Error::Missing`] if there is no such member, or it has more bits.
    pub fn bits_of(&self, ty: &str, member: &str) -> Result<Bits, Error> {
        let none = || missing(ty, member);
        let m = self.resolve(ty, member).ok_or_else(none)?;
        let whole = match m.width {
            0 => {
                let size = self.bytes_of(m.type_id).ok_or_else(none)?;
                u32::try_from(size.saturating_mul(8)).map_err(|_| none())?
            }
            width => width,
        };
        // In a structure without the flag, the integer itself says which of its bits count.
        let int = self
            .record(self.strip(m.type_id))
            .filter(|r| m.width == 0 && r.kind == TypeKind::Int)
            .and_then(|r| r.word(0))
            .unwrap_or(whole);
        let (skip, width) = ((int >> 16) & 0xff, int & 0xff);
        let (skip, width) = if m.width == 0 {
            (skip, width)
        } else {
            (0, whole)
        };
        if width == 0 || width > 64 {
            return Err(none());
        }
        let bit = m.bit + u64::from(skip);
        Ok(Bits {
            offset: usize::try_from(bit / 8).map_err(|_| none())?,
            shift: (bit % 8) as u32,
            width,
        })
    }

    /// Name of the enumerator of the enum `ty` that has the value `value`; the first of several.
    /// Control characters are replaced.
    #[must_use]
    pub fn enum_name(&self, ty: &str, value: i64) -> Option<String> {
        let r = self.enumeration(ty)?;
        // An enum without the flag counts as unsigned, also where a value was meant to be negative.
        let same = |v: i64| v == value || (v < 0 && v & 0xffff_ffff == value);
        enumerators(r)
            .find(|&(_, v)| same(v))
            .map(|(name, _)| self.name(name))
    }

    /// Value of the enumerator `name` of the enum `ty`.
    #[must_use]
    pub fn enum_value(&self, ty: &str, name: &str) -> Option<i64> {
        let r = self.enumeration(ty)?;
        enumerators(r)
            .find(|&(n, _)| self.string(n) == name.as_bytes())
            .map(|(_, v)| v)
    }

    fn enumeration(&self, ty: &str) -> Option<TypeRecord<'_>> {
        self.record(self.find(&[TypeKind::Enum, TypeKind::Enum64], ty)?)
    }

    /// Number of elements of the array that is the member `path` of the structure or union `ty`.
    ///
    /// # Errors
    /// [`Error::Missing`] if there is no such member, or it is no array.
    pub fn array_len(&self, ty: &str, path: &str) -> Result<usize, Error> {
        self.resolve(ty, path)
            .and_then(|m| self.record(self.strip(m.type_id)))
            .filter(|r| r.kind == TypeKind::Array)
            .and_then(|r| r.word(2))
            .map(|n| n as usize)
            .ok_or_else(|| missing(ty, &format!("{path}[]")))
    }

    /// Size of the type `id` in bytes; `None` for `void`, functions, and types that are only declared.
    pub(super) fn bytes_of(&self, mut id: u32) -> Option<u64> {
        let mut times = 1u64;
        for _ in 0..CHAIN {
            let r = self.record(id)?;
            let size = match r.kind {
                TypeKind::Int
                | TypeKind::Float
                | TypeKind::Struct
                | TypeKind::Union
                | TypeKind::Enum
                | TypeKind::Enum64 => r.value.into(),
                TypeKind::Ptr => 8,
                TypeKind::Array => {
                    times = times.checked_mul(r.word(2)?.into())?;
                    id = r.word(0)?;
                    continue;
                }
                TypeKind::Var => {
                    id = r.value;
                    continue;
                }
                kind if kind.transparent() => {
                    id = r.value;
                    continue;
                }
                _ => return None,
            };
            return times.checked_mul(size);
        }
        None
    }

    fn resolve(&self, name: &str, path: &str) -> Option<Member> {
        let steps = Steps::new(STEPS);
        let mut id = self.composite(name)?;
        let mut bit = 0u64;
        let mut found = None;
        for part in path.split('.') {
            let m = self.lookup(id, part.as_bytes(), DEPTH, &steps)?;
            bit = bit.checked_add(m.bit)?;
            id = self.strip(m.type_id);
            found = Some(Member { bit, ..m });
        }
        found
    }

    fn lookup(&self, id: u32, name: &[u8], depth: u32, steps: &Steps) -> Option<Member> {
        let r = self.record(id)?;
        for i in 0..r.parts {
            steps.take()?;
            let m = member(&r, i)?;
            if m.name != 0 && self.string(m.name) == name {
                return Some(m);
            }
            if depth > 0 && self.string(m.name).is_empty() {
                let inner = self.lookup(self.strip(m.type_id), name, depth - 1, steps);
                if let Some(inner) = inner {
                    let bit = m.bit.checked_add(inner.bit)?;
                    return Some(Member { bit, ..inner });
                }
            }
        }
        None
    }
}

fn missing(name: &str, path: &str) -> Error {
    Error::Missing(format!("member {path} of {name} in BTF"))
}

/// The enumerators of the enum `r`, at most [`STEPS`] of them: name and value.
fn enumerators(r: TypeRecord<'_>) -> impl Iterator<Item = (u32, i64)> + '_ {
    (0..r.parts.min(STEPS as usize)).map_while(move |i| enumerator(&r, i))
}

/// Enumerator `i` of the enum `r`: offset of its name, value.
#[allow(clippy::cast_possible_wrap)] // the words are two's complement
pub(super) fn enumerator(r: &TypeRecord<'_>, i: usize) -> Option<(u32, i64)> {
    if i >= r.parts {
        return None;
    }
    match r.kind {
        TypeKind::Enum => {
            let value = r.word(2 * i + 1)?;
            Some((r.word(2 * i)?, i64::from(value as i32)))
        }
        TypeKind::Enum64 => {
            let value = fetch::u64(r.bytes, r.at + 12 + 12 * i + 4)?;
            Some((r.word(3 * i)?, value as i64))
        }
        _ => None,
    }
}
