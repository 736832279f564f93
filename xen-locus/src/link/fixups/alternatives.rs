//! Alternatives: instructions that another form replaces where the CPU has a feature, or lacks it.
//!
//! Sources: arch/x86/kernel/alternative.c (`apply_alternatives`, `alt_replace_call`),
//! arch/x86/include/asm/alternative.h. The layout of `struct alt_instr` changed several times: v5.10
//! has a `padlen` at its end. Linux kernel commit 5d1dd961e743 ("x86/alternatives: Add
//! alt_instr.flags") (in v6.3) put flags beside the feature, of which bit 15 meant "not" before. So
//! the layout comes from the guest's own types.

use locus_guest::addr::Gva;
use locus_kernel::btf::Bits;
use locus_kernel::Kernel;

use super::code::{relative, FixupTable, LinkedCode};
use super::{moved, name_of, FixupPlace};
use crate::error::{Error, Result};
use crate::x86::{self, branch, CALL, NOP1};

const TABLE: &str = ".altinstructions";
/// Without flags, this bit of the feature says that it must be absent (`ALTINSTR_FLAG_INV`).
const OLD_NOT: u64 = 1 << 15;
/// The feature must be absent (`ALT_FLAG_NOT`).
const NOT: u64 = 1;
/// Sizes of the structure without flags, in bytes: without and with `padlen`.
const SIZES_WITHOUT_FLAGS: [usize; 2] = [12, 13];
/// The replacement calls what a pointer holds (`ALT_FLAG_DIRECT_CALL`).
const DIRECT_CALL: u64 = 2;
/// `call *disp32(%rip)`, without its displacement.
const CALL_POINTER: [u8; 2] = [0xff, 0x15];

/// Where the parts of a `struct alt_instr` are.
#[derive(Clone, Copy, Debug)]
pub struct AltInstrLayout {
    size: usize,
    instr: usize,
    replacement: usize,
    feature: Bits,
    flags: Option<Bits>,
    instr_len: Bits,
    replacement_len: Bits,
}

/// One entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Alternative {
    at: Gva,
    len: usize,
    replacement: Gva,
    replacement_len: usize,
    feature: usize,
    absent: bool,
    direct_call: bool,
}

impl AltInstrLayout {
    /// Learns it from the guest's types.
    ///
    /// # Errors
    /// A member is missing, or there are no flags in a structure that is not that without flags.
    pub fn of(kernel: &Kernel<'_>) -> Result<AltInstrLayout> {
        let btf = kernel.btf()?;
        let ty = "alt_instr";
        let size = btf.size_of(ty)?;
        let flags = match btf.has(ty, "flags") {
            true => Some(btf.bits_of(ty, "flags")?),
            false if SIZES_WITHOUT_FLAGS.contains(&size) => None,
            false => {
                return Err(Error::not_applicable(format!(
                    "struct alt_instr of the guest's kernel has no flags and {size} bytes; expected flags, or one of \
                     {SIZES_WITHOUT_FLAGS:?} bytes. So it can't be known when an alternative is chosen"
                )))
            }
        };
        Ok(AltInstrLayout {
            size,
            instr: btf.offset_of_sized(ty, "instr_offset", 4)?,
            replacement: btf.offset_of_sized(ty, "repl_offset", 4)?,
            feature: btf.bits_of(ty, "cpuid")?,
            flags,
            instr_len: btf.bits_of(ty, "instrlen")?,
            replacement_len: btf.bits_of(ty, "replacementlen")?,
        })
    }

    fn entry(&self, at: Gva, bytes: &[u8]) -> Option<Alternative> {
        let mut feature = self.feature.value(bytes)?;
        let flags = match self.flags {
            Some(flags) => flags.value(bytes)?,
            None if feature & OLD_NOT != 0 => NOT,
            None => 0,
        };
        if self.flags.is_none() {
            feature &= !OLD_NOT;
        }
        let len = |bits: Bits| usize::try_from(bits.value(bytes)?).ok();
        (flags & !(NOT | DIRECT_CALL) == 0).then_some(())?;
        Some(Alternative {
            at: relative(at, bytes, self.instr)?,
            len: len(self.instr_len)?,
            replacement: relative(at, bytes, self.replacement)?,
            replacement_len: len(self.replacement_len)?,
            feature: usize::try_from(feature).ok()?,
            absent: flags & NOT != 0,
            direct_call: flags & DIRECT_CALL != 0,
        })
    }
}

/// Applies the alternatives in `tables` in order, a later one over an earlier one. `feature` says
/// whether the guest's CPU has a feature, `None` if the kernel has no such feature.
///
/// # Errors
/// [`Class::NotApplicable`](crate::error::Class::NotApplicable): an entry is not as entries are.
pub fn apply(
    kernel: &Kernel<'_>,
    code: &mut LinkedCode,
    layout: &AltInstrLayout,
    tables: &[FixupTable],
    feature: &dyn Fn(usize) -> Option<bool>,
    places: &mut Vec<FixupPlace>,
) -> Result<()> {
    for table in tables {
        let mut entries = Vec::new();
        for (at, bytes) in table.entries(code, TABLE, layout.size)? {
            entries.push(layout.entry(at, bytes).ok_or_else(|| {
                code.no(&format!(
                    "an entry of {TABLE} has flags that are not known: {bytes:02x?}"
                ))
            })?);
        }
        if layout.flags.is_some() {
            share_padding(&mut entries);
        }
        for entry in &entries {
            if code.runs(entry.at, TABLE)? {
                one(kernel, code, entry, feature)?;
                places.push(FixupPlace::new(entry.at, entry.len as u64, TABLE));
            }
        }
    }
    Ok(())
}

/// Entries for the same place that follow each other may be padded differently where one is nested in
/// another: all get the longest, as in `apply_alternatives`.
fn share_padding(entries: &mut [Alternative]) {
    for same in entries.chunk_by_mut(|a, b| a.at == b.at) {
        // There is one at least.
        let longest = same.iter().map(|e| e.len).max().unwrap_or_default();
        same.iter_mut().for_each(|e| e.len = longest);
    }
}

fn one(
    kernel: &Kernel<'_>,
    code: &mut LinkedCode,
    entry: &Alternative,
    feature: &dyn Fn(usize) -> Option<bool>,
) -> Result<()> {
    let at = entry.at;
    let no = |code: &LinkedCode, why: &str| code.no(&format!("the alternative at {at}: {why}"));
    let Some(has) = feature(entry.feature) else {
        let why = format!("the guest's kernel has no CPU feature {}", entry.feature);
        return Err(no(code, &why));
    };
    let old = code.live(at, entry.len, TABLE)?;
    let mut new = old.to_vec();
    if has != entry.absent {
        if entry.replacement_len > entry.len {
            return Err(no(code, "its replacement is longer than its place"));
        }
        let replacement = code
            .get(entry.replacement, entry.replacement_len)
            .ok_or_else(|| no(code, "its replacement is no part of the payload"))?;
        new = if entry.direct_call {
            direct_call(kernel, at, old, replacement, entry.replacement)
        } else {
            moved::moved(replacement, entry.replacement, at)
        }
        .map_err(|why| no(code, &why))?;
        new.resize(entry.len, NOP1);
    }
    x86::join(&mut new);
    code.put(at, &new)
}

/// The replacement, linked for `from`, of a call through a pointer: a call of what it holds now, or nothing where that
/// does nothing. What follows the call in the replacement stays.
fn direct_call(
    kernel: &Kernel<'_>,
    at: Gva,
    old: &[u8],
    replacement: &[u8],
    from: Gva,
) -> std::result::Result<Vec<u8>, String> {
    let rest = replacement
        .get(5..)
        .filter(|_| replacement.first() == Some(&CALL));
    let (Some(rest), true) = (rest, old.starts_with(&CALL_POINTER)) else {
        return Err("it is to be a direct call, and is no call through a pointer".into());
    };
    let pointer = relative(at, old, 2).ok_or("it is cut short")?.plus(4);
    let target = kernel
        .space
        .read_u64(pointer)
        .map(Gva)
        .map_err(|e| e.to_string())?;
    // The replacement itself calls what says that there is nothing.
    if target.0 == 0 {
        return moved::moved(replacement, from, at);
    }
    let mut new = if Some(target) == kernel.symbols.addr("nop_func") {
        Vec::new()
    } else {
        let far = || {
            let held_by = name_of(kernel, pointer);
            format!("{target}, held by {held_by}, is out of reach")
        };
        branch(CALL, at, target).ok_or_else(far)?.to_vec()
    };
    let end = at.plus(new.len() as u64);
    new.extend(moved::moved(rest, from.plus(5), end)?);
    Ok(new)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::link::fixups::testing::{code, kernel, put32, BASE};
    use locus_kernel::btf::blob::Blob;
    use locus_kernel::btf::TypeKind;

    /// Types of the entry, by generation.
    fn types(generation: usize) -> Vec<u8> {
        types_with("flags", generation)
    }

    /// The same with another name of the flags, where there are any.
    fn types_with(flags: &str, generation: usize) -> Vec<u8> {
        let mut b = Blob::with_integers();
        let (byte, half, word) = (1, 2, 3);
        let mut members = vec![("instr_offset", word, 0, 0), ("repl_offset", word, 32, 0)];
        let size = match generation {
            0 | 1 => {
                members.push(("cpuid", half, 64, 0));
                members.push(("instrlen", byte, 80, 0));
                members.push(("replacementlen", byte, 88, 0));
                if generation == 0 {
                    members.push(("padlen", byte, 96, 0));
                }
                if generation == 0 {
                    13
                } else {
                    12
                }
            }
            _ => {
                let parts = [("cpuid", word, 0, 16), (flags, word, 16, 16)];
                let inner = b.fields(TypeKind::Struct, "", 4, &parts);
                let both = [("", inner, 0, 0), ("ft_flags", word, 0, 0)];
                let union = b.fields(TypeKind::Union, "", 4, &both);
                members.push(("", union, 64, 0));
                members.push(("instrlen", byte, 96, 0));
                members.push(("replacementlen", byte, 104, 0));
                14
            }
        };
        b.fields(TypeKind::Struct, "alt_instr", size, &members);
        b.bytes()
    }

    #[test]
    fn an_entry_whose_flags_are_not_found_is_not_taken_for_one_without() {
        for generation in 0..3 {
            kernel(&types(generation), |kernel| {
                AltInstrLayout::of(kernel).map(|_| ())
            })
            .unwrap();
        }
        let error = kernel(&types_with("how", 2), |kernel| {
            AltInstrLayout::of(kernel).map(|_| ())
        });
        let error = error.unwrap_err().to_string();
        assert!(error.contains("has no flags and 14 bytes"), "{error}");
    }

    /// Where the table stands, behind 64 bytes of code.
    const AT: Gva = Gva(BASE.0 + 0x100);

    struct E {
        at: u64,
        len: u8,
        repl: u64,
        repl_len: u8,
        feature: u16,
        flags: u16,
    }

    /// An entry for `len` bytes at `at`, replaced by `repl_len` bytes at `repl`.
    fn entry(at: u64, len: u8, repl: u64, repl_len: u8, feature: u16, flags: u16) -> E {
        E {
            at,
            len,
            repl,
            repl_len,
            feature,
            flags,
        }
    }

    fn table(generation: usize, entries: &[E]) -> FixupTable {
        let mut bytes = Vec::new();
        for e in entries {
            let place = AT.plus(bytes.len() as u64);
            put32(&mut bytes, place, BASE.plus(e.at));
            put32(&mut bytes, place.plus(4), BASE.plus(e.repl));
            match generation {
                0 | 1 => {
                    let not = if e.flags & 1 == 0 { 0 } else { 0x8000 };
                    bytes.extend((e.feature | not).to_le_bytes());
                }
                _ => {
                    bytes.extend(e.feature.to_le_bytes());
                    bytes.extend(e.flags.to_le_bytes());
                }
            }
            bytes.extend([e.len, e.repl_len]);
            bytes.extend(vec![0; usize::from(generation == 0)]);
        }
        FixupTable { at: AT, bytes }
    }

    /// Applies entries to code of 64 bytes; there are features 0 (absent) and 1 (there).
    fn applied(generation: usize, bytes: &[u8], entries: &[E]) -> Result<Vec<u8>> {
        let table = table(generation, entries);
        kernel(&types(generation), |kernel| {
            let mut code = code(bytes);
            let layout = AltInstrLayout::of(kernel)?;
            let feature = |bit| (bit < 2).then_some(bit == 1);
            let places = &mut Vec::new();
            apply(
                kernel,
                &mut code,
                &layout,
                std::slice::from_ref(&table),
                &feature,
                places,
            )?;
            assert_eq!(places.len(), entries.len());
            Ok(code.bytes)
        })
    }

    fn bytes() -> [u8; 64] {
        let mut bytes = [0xcc; 64];
        bytes[..8].copy_from_slice(&[0x31, 0xc0, 0x90, 0x90, 0x90, 0x90, 0x90, 0xc3]);
        // lfence; and a jump to byte 60
        bytes[32..35].copy_from_slice(&[0x0f, 0xae, 0xe8]);
        bytes[40..45].copy_from_slice(&[0xe9, 15, 0, 0, 0]);
        bytes
    }

    #[test]
    fn every_layout_is_taken_or_not_by_its_feature_and_padded() {
        for generation in 0..3 {
            for (feature, flags, taken) in
                [(0, 0, false), (1, 0, true), (0, 1, true), (1, 1, false)]
            {
                let e = entry(0, 7, 32, 3, feature, flags);
                let new = applied(generation, &bytes(), &[e]).unwrap();
                if taken {
                    assert_eq!(new[..7], [0x0f, 0xae, 0xe8, 0x0f, 0x1f, 0x40, 0]);
                } else {
                    assert_eq!(new[..2], [0x31, 0xc0]);
                    assert_eq!(new[2..7], x86::NOP5);
                }
                assert_eq!(new[7..], bytes()[7..]);
            }
        }
    }

    #[test]
    fn a_later_entry_wins_and_relative_code_keeps_its_target() {
        let two = [entry(0, 7, 32, 3, 1, 0), entry(0, 7, 40, 5, 1, 0)];
        let new = applied(2, &bytes(), &two).unwrap();
        assert_eq!(new[..7], [0xe9, 55, 0, 0, 0, 0x66, 0x90]);
        let two = [entry(0, 7, 40, 5, 1, 0), entry(0, 7, 32, 3, 0, 0)];
        let new = applied(2, &bytes(), &two).unwrap();
        assert_eq!(new[..5], [0xe9, 55, 0, 0, 0]);
        // Nested ones are padded alike.
        let two = [entry(0, 7, 32, 3, 0, 0), entry(0, 3, 0, 0, 1, 0)];
        let new = applied(2, &bytes(), &two).unwrap();
        assert_eq!(new[..7], [0x0f, 0x1f, 0x80, 0, 0, 0, 0]);
    }

    #[test]
    fn an_entry_that_is_not_as_it_must_be_is_refused() {
        for (generation, e, why) in [
            (2, entry(0, 7, 32, 3, 2, 0), "no CPU feature 2"),
            (2, entry(0, 2, 32, 3, 1, 0), "longer than its place"),
            (2, entry(0, 7, 32, 3, 1, 4), "flags that are not known"),
            (2, entry(62, 7, 32, 3, 1, 0), "leave its code"),
            (2, entry(70, 7, 32, 3, 1, 0), "no code of it"),
            (2, entry(0, 7, 70, 3, 1, 0), "no part of the payload"),
            (2, entry(0, 7, 40, 5, 1, 2), "no call through a pointer"),
        ] {
            let error = applied(generation, &bytes(), &[e]).unwrap_err().to_string();
            assert!(error.contains(why), "{error} does not say {why}");
        }
        // A table of the length of another generation's.
        let mut other = table(2, &[entry(0, 7, 32, 3, 1, 0)]);
        other.bytes.pop();
        kernel(&types(2), |kernel| {
            let layout = AltInstrLayout::of(kernel)?;
            let mut code = code(&bytes());
            let feature = |_: usize| Some(true);
            let places = &mut Vec::new();
            let error = apply(
                kernel,
                &mut code,
                &layout,
                std::slice::from_ref(&other),
                &feature,
                places,
            );
            assert!(error.unwrap_err().to_string().contains("multiple of 14"));
            Ok(())
        })
        .unwrap();
    }

    #[test]
    fn a_call_through_a_pointer_becomes_what_the_pointer_holds() {
        use crate::link::fixups::testing::{HELD, NOP, POINTERS};
        let called = |pointer: u64| {
            let mut bytes = [0xcc; 64];
            bytes[..2].copy_from_slice(&CALL_POINTER);
            let distance = (POINTERS.0 + pointer)
                .wrapping_sub(BASE.0 + 6)
                .cast_signed();
            bytes[2..6].copy_from_slice(&i32::try_from(distance).unwrap().to_le_bytes());
            bytes[32..39].copy_from_slice(&[0xe8, 1, 2, 3, 4, 0x31, 0xc0]);
            let plain = applied(2, &bytes, &[entry(0, 6, 32, 5, 1, 2)])?;
            let more = applied(2, &bytes, &[entry(0, 9, 32, 7, 1, 2)])?;
            Ok::<_, crate::error::Error>((plain[..6].to_vec(), more[..9].to_vec()))
        };
        let (plain, more) = called(0).unwrap();
        let call = branch(0xe8, BASE, HELD).unwrap();
        assert_eq!(plain, [&call[..], &[0x90]].concat());
        assert_eq!(more, [&call[..], &[0x31, 0xc0, 0x66, 0x90]].concat());
        let (plain, more) = called(8).unwrap();
        assert_eq!(plain, [0x66, 0x0f, 0x1f, 0x44, 0, 0]);
        assert_eq!(more, [0x31, 0xc0, 0x0f, 0x1f, 0x80, 0, 0, 0, 0]);
        assert_ne!(HELD, NOP);
        // Nothing: the call in the replacement, for its new place.
        let bug = BASE.plus(32 + 5).plus(0x0403_0201);
        let call = branch(0xe8, BASE, bug).unwrap();
        assert_eq!(called(16).unwrap().0, [&call[..], &[0x90]].concat());
    }
}
