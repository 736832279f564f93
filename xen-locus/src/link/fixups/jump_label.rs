//! Jump labels: a nop or a jump, as a static key is off or on.
//!
//! The bytes are written for the state that each key has now. They must be registered with the kernel, so that it
//! switches them when the key changes: see [`AppliedFixups`].
//!
//! Sources: kernel/jump_label.c, arch/x86/kernel/jump_label.c, include/linux/jump_label.h. An entry
//! names the code, the target and the key by their distances. The lowest bit of the key says which way
//! the compiler expected the branch to go. The next one is left over from objtool (it says that the nop was
//! a jump), and the kernel uses it to mark code of `module_init`.

use std::collections::BTreeMap;

use locus_guest::addr::Gva;
use locus_guest::fetch;
use locus_kernel::Kernel;

use super::code::{are_empty, relative, FixupTable, LinkedCode};
use super::{AppliedFixups, FixupPlace, KeyCount};
use crate::arena::digests::RecordedLabel;
use crate::error::Result;
use crate::target::rewritten::JUMP_ENTRY;
use crate::x86::{branch, JMP, NOP2, NOP5, NOPS5};

const TABLE: &str = "__jump_table";
/// Length of an entry, and where its parts are, in bytes: [`JUMP_ENTRY`].
const SIZE: usize = 16;
const CODE: usize = 0;
const TARGET: usize = 4;
const KEY: usize = 8;
/// The entry of `ideal_nops` for a nop that is replaced as a whole (`NOP_ATOMIC5`).
const ATOMIC5: u64 = 9;

/// A jump label, resolved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct JumpLabel {
    /// Address of the `struct static_key`, without flags.
    pub key: Gva,
    /// Where the nop or jump stands.
    pub code: Gva,
    /// Where the jump leads.
    pub target: Gva,
    /// Lowest bit of the key: the jump is taken while the key is off.
    pub branch: bool,
    /// The key is a variable of the payload itself.
    pub key_is_own: bool,
    /// Length of the nop or jump: 2 or 5.
    pub size: u8,
}

impl JumpLabel {
    /// This label as the record of code that begins at `start` has it; `None` if it is not in that code.
    #[must_use]
    pub fn recorded(&self, start: Gva) -> Option<RecordedLabel> {
        Some(RecordedLabel {
            at: u32::try_from(self.code.0.checked_sub(start.0)?).ok()?,
            to: u32::try_from(self.target.0.checked_sub(start.0)?).ok()?,
            size: self.size,
        })
    }
}

/// Where a key has its count, and the rest of it names its branches (include/linux/jump_label.h: `struct static_key`): a
/// count is compared where the key is.
const ENABLED: usize = 0;

/// Refuses a kernel whose structures have another form.
fn check_forms(kernel: &Kernel<'_>, code: &LinkedCode) -> Result<()> {
    let btf = kernel.btf()?;
    JUMP_ENTRY.check(btf)?;
    match btf.offset_of_sized("static_key", "enabled", 4)? {
        ENABLED => Ok(()),
        at => Err(code.no(&format!(
            "struct static_key of the guest's kernel has its count at the offset {at}; expected {ENABLED}"
        ))),
    }
}

/// Sets the jump labels in `tables` as their keys are now, and says which they are.
///
/// # Errors
/// [`Class::NotApplicable`](crate::error::Class::NotApplicable): an entry is not as entries are.
pub fn apply(
    kernel: &Kernel<'_>,
    code: &mut LinkedCode,
    tables: &[FixupTable],
    done: &mut AppliedFixups,
) -> Result<()> {
    if are_empty(tables) {
        return Ok(());
    }
    check_forms(kernel, code)?;
    let nop5 = nop5(kernel, code)?;
    let mut keys = BTreeMap::new();
    for table in tables {
        let entries: Vec<_> = table.entries(code, TABLE, SIZE)?.collect();
        for (entry, bytes) in entries {
            let key_at = entry.plus(KEY as u64);
            let (Some(at), Some(target), Some(key)) = (
                relative(entry, bytes, CODE),
                relative(entry, bytes, TARGET),
                fetch::u64(bytes, KEY).map(|distance| key_at.0.wrapping_add(distance)),
            ) else {
                return Err(code.no(&format!("an entry of {TABLE} is cut short")));
            };
            if !code.runs(at, TABLE)? {
                continue;
            }
            let mut site = JumpLabel {
                key: Gva(key & !3),
                code: at,
                target,
                branch: key & 1 == 1,
                key_is_own: code.own.contains(Gva(key & !3)),
                size: 0,
            };
            if !code.runs(target, TABLE)? {
                return Err(code.no(&format!(
                    "the jump label at {at} leads to {target}, which never runs"
                )));
            }
            let count = count(kernel, code, &site)?;
            site.size = set(code, &site, (count != 0) != site.branch, &nop5)?;
            if !site.key_is_own {
                keys.entry(site.key).or_insert(count);
            }
            done.jumps.push(site);
            done.places
                .push(FixupPlace::new(at, site.size.into(), TABLE));
        }
    }
    done.jumps.sort_unstable();
    let keys = keys.into_iter();
    done.keys = keys.map(|(key, count)| KeyCount { key, count }).collect();
    Ok(())
}

/// The count of a key: 0 is off, all else is on (-1 while it is being switched on).
fn count(kernel: &Kernel<'_>, code: &LinkedCode, site: &JumpLabel) -> Result<i32> {
    let at = site.key.plus(ENABLED as u64);
    if !site.key_is_own {
        if code.all.contains(site.key) {
            return Err(code.no(&format!(
                "the key of the jump label at {} is no variable that is placed",
                site.code
            )));
        }
        return Ok(kernel.space.read_u32(at)?.cast_signed());
    }
    let own = code.get(at, 4).and_then(|bytes| fetch::u32(bytes, 0));
    own.map(u32::cast_signed)
        .ok_or_else(|| code.no(&format!("the key at {} leaves its section", site.key)))
}

/// Writes the jump or the nop, and says how long it is.
fn set(code: &mut LinkedCode, site: &JumpLabel, jump: bool, nop5: &[u8; 5]) -> Result<u8> {
    let at = site.code;
    let odd = |code: &LinkedCode, found: &[u8]| {
        code.no(&format!(
            "the jump label at {at} holds {found:02x?}; expected a nop of 2 or 5 bytes, or a jump to {}",
            site.target
        ))
    };
    let far = |code: &LinkedCode| {
        code.no(&format!(
            "{} is out of reach of the jump at {at}",
            site.target
        ))
    };
    let head = code.live(at, 2, TABLE)?;
    if head == NOP2 || head.first() == Some(&0xeb) {
        let distance = site
            .target
            .0
            .wrapping_sub(at.0.wrapping_add(2))
            .cast_signed();
        let distance = i8::try_from(distance).map_err(|_| far(code))?;
        let new = [0xeb, distance.cast_unsigned()];
        if head != NOP2 && head != new {
            return Err(odd(code, head));
        }
        code.put(at, if jump { &new } else { &NOP2 })?;
        return Ok(2);
    }
    let old = code.live(at, 5, TABLE)?;
    let new = branch(JMP, at, site.target).ok_or_else(|| far(code))?;
    if old != NOP5 && old != nop5 && old != new {
        return Err(odd(code, old));
    }
    code.put(at, if jump { &new } else { nop5 })?;
    Ok(5)
}

/// The nop of five bytes that the kernel expects to find when it puts a jump there.
///
/// Up to v5.12 it was chosen by the CPU (`ideal_nops`): Linux kernel commit a89dfde3dc3c ("x86: Remove
/// dynamic NOP selection").
fn nop5(kernel: &Kernel<'_>, code: &LinkedCode) -> Result<[u8; 5]> {
    let Some(at) = kernel.variable_if_any("ideal_nops", 8)? else {
        return Ok(NOP5);
    };
    let table = Gva(kernel.space.read_u64(at)?);
    let nop = Gva(kernel.space.read_u64(table.plus(8 * ATOMIC5))?);
    let mut bytes = [0; 5];
    kernel.space.read(nop, &mut bytes)?;
    if !NOPS5.contains(&bytes) {
        return Err(code.no(&format!(
            "ideal_nops of the guest's kernel has {bytes:02x?} at {nop} for a nop of five bytes; expected one of {NOPS5:02x?}"
        )));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::link::fixups::testing::{code, put32, with, BASE, KEYS};
    use crate::link::fixups::Runs;
    use locus_guest::addr::Range;
    use locus_kernel::btf::blob::Blob;
    use locus_kernel::fixture::{Fixture, RODATA};

    const K8: [u8; 5] = NOPS5[1];

    fn types(narrow: bool) -> Vec<u8> {
        types_with(narrow, 0)
    }

    /// The same with another place of a key's count.
    fn types_with(narrow: bool, enabled: usize) -> Vec<u8> {
        let mut b = Blob::with_integers();
        let place = if narrow { 4 } else { 3 };
        let members = [("code", place, 0), ("target", 3, 4), ("key", 4, 8)];
        b.structure("jump_entry", 16, &members);
        b.structure("static_key", 16, &[("enabled", 3, enabled), ("type", 4, 8)]);
        b.bytes()
    }

    /// Entries: place, target, key and its flags.
    fn applied(
        bytes: &[u8],
        entries: &[(u64, u64, Gva, u64)],
        k8: bool,
    ) -> Result<(Vec<u8>, AppliedFixups)> {
        applied_by(&types(false), k8.then_some(K8), bytes, entries)
    }

    /// The same by a kernel of these types, which chose this nop.
    fn applied_by(
        types: &[u8],
        chosen: Option<[u8; 5]>,
        bytes: &[u8],
        entries: &[(u64, u64, Gva, u64)],
    ) -> Result<(Vec<u8>, AppliedFixups)> {
        let change = |f: &mut Fixture| {
            if let Some(nop) = chosen {
                // The banner stands 64 bytes into read-only data; these stand before it.
                let at = RODATA.0 + 64;
                let mut table = vec![0; 72];
                table.extend((at + 80).to_le_bytes());
                table.extend(nop);
                f.constants.insert(0, ("nops", table));
                f.constants
                    .insert(1, ("ideal_nops", at.to_le_bytes().to_vec()));
            }
        };
        with(types, change, |kernel| {
            let mut code = code(bytes);
            code.own = Range::new(BASE.plus(32), 32);
            code.live = Runs::new(vec![Range::new(BASE, 32)]);
            let at = BASE.plus(0x100);
            let mut table = Vec::new();
            for &(place, target, key, flags) in entries {
                let here = at.plus(table.len() as u64);
                put32(&mut table, here, BASE.plus(place));
                put32(&mut table, here.plus(4), BASE.plus(target));
                let distance = (key.0 | flags).wrapping_sub(here.0 + 8);
                table.extend(distance.to_le_bytes());
            }
            let mut done = AppliedFixups::default();
            apply(
                kernel,
                &mut code,
                &[FixupTable { at, bytes: table }],
                &mut done,
            )?;
            Ok((code.bytes, done))
        })
    }

    /// Nops of five and two bytes, jumps of five and two; own keys, the first off, the second on.
    fn bytes() -> Vec<u8> {
        let mut bytes = vec![0xcc; 64];
        bytes[..5].copy_from_slice(&NOP5);
        bytes[5..7].copy_from_slice(&NOP2);
        bytes[7..12].copy_from_slice(&[0xe9, 8, 0, 0, 0]);
        bytes[12..14].copy_from_slice(&[0xeb, 6]);
        bytes[32..64].fill(0);
        bytes[48] = 1;
        bytes
    }

    #[test]
    fn each_site_follows_its_key_and_its_branch() {
        let jump5 = |at: u64| branch(0xe9, BASE.plus(at), BASE.plus(20)).unwrap();
        let (off, on, half) = (KEYS, KEYS.plus(16), KEYS.plus(32));
        for (key, enabled) in [(off, false), (on, true), (half, true)] {
            for flags in 0..4 {
                let jump = enabled != (flags & 1 == 1);
                let entries: Vec<_> = [0, 5, 7, 12].map(|at| (at, 20, key, flags)).to_vec();
                let (new, done) = applied(&bytes(), &entries, false).unwrap();
                if jump {
                    assert_eq!(new[..5], jump5(0));
                    assert_eq!(new[5..7], [0xeb, 13]);
                    assert_eq!(new[7..12], jump5(7));
                    assert_eq!(new[12..14], [0xeb, 6]);
                } else {
                    assert_eq!(new[..5], NOP5);
                    assert_eq!(new[5..7], NOP2);
                    assert_eq!(new[7..12], NOP5);
                    assert_eq!(new[12..14], NOP2);
                }
                assert_eq!(done.jumps.len(), 4);
                assert_eq!(done.keys.len(), 1);
                assert_eq!(done.keys[0].key, key);
                assert!(done.jumps.iter().all(|j| j.branch == (flags & 1 == 1)));
            }
        }
    }

    #[test]
    fn own_keys_are_as_the_payload_has_them_and_sites_come_sorted() {
        let (off, on) = (BASE.plus(32), BASE.plus(48));
        let entries = [
            (12, 20, on, 2),
            (0, 20, on, 0),
            (5, 20, off, 0),
            (7, 20, KEYS.plus(16), 1),
        ];
        let (new, done) = applied(&bytes(), &entries, false).unwrap();
        assert_eq!(new[12..14], [0xeb, 6]);
        assert_eq!(new[0], 0xe9);
        assert_eq!(new[5..7], NOP2);
        assert_eq!(new[7..12], NOP5);
        let key = KEYS.plus(16);
        assert_eq!(done.keys, [KeyCount { key, count: 2 }]);
        let order: Vec<_> = done.jumps.iter().map(|j| (j.key, j.code, j.size)).collect();
        let expected = [
            (KEYS.plus(16), BASE.plus(7), 5),
            (off, BASE.plus(5), 2),
            (on, BASE, 5),
            (on, BASE.plus(12), 2),
        ];
        assert_eq!(order, expected);
        assert_eq!(done.jumps.iter().filter(|j| j.key_is_own).count(), 3);
    }

    #[test]
    fn a_kernel_that_chooses_its_nops_gets_the_one_it_chose() {
        let entries = [(0, 20, KEYS, 0), (7, 20, KEYS, 0), (12, 20, KEYS, 1)];
        let (new, _) = applied(&bytes(), &entries, true).unwrap();
        assert_eq!(new[..5], K8);
        assert_eq!(new[7..12], K8);
        assert_eq!(new[12..14], [0xeb, 6]);
    }

    #[test]
    fn a_nop_that_is_none_is_not_written() {
        let chosen = Some([0x0f, 0x0b, 0x90, 0x90, 0x90]);
        let error = applied_by(&types(false), chosen, &bytes(), &[(0, 20, KEYS, 0)]);
        let error = error.unwrap_err().to_string();
        assert!(error.contains("ideal_nops"), "{error}");
    }

    #[test]
    fn a_kernel_whose_keys_have_their_count_elsewhere_is_refused() {
        let error = applied_by(&types_with(false, 4), None, &bytes(), &[(0, 20, KEYS, 0)]);
        let error = error.unwrap_err().to_string();
        assert!(
            error.contains("its count at the offset 4; expected 0"),
            "{error}"
        );
    }

    #[test]
    fn what_is_no_jump_label_is_refused() {
        for (entry, why) in [
            ((14, 20, KEYS, 0), "expected a nop of 2 or 5 bytes"),
            ((7, 21, KEYS, 0), "expected a nop of 2 or 5 bytes"),
            ((12, 21, KEYS, 0), "expected a nop of 2 or 5 bytes"),
            ((5, 40, KEYS, 0), "no code of it"),
            ((31, 20, KEYS, 0), "leave its code"),
            ((0, 20, BASE.plus(8), 0), "no variable that is placed"),
            ((0, 20, BASE.plus(60), 0), "holds"),
        ] {
            let done = applied(&bytes(), &[entry], false);
            if why == "holds" {
                // The last four bytes are a key's count still.
                assert!(done.is_ok());
                continue;
            }
            let error = done.unwrap_err().to_string();
            assert!(error.contains(why), "{error} does not say {why}");
        }
        with(
            &types(true),
            |_| {},
            |kernel| {
                let mut code = code(&bytes());
                let table = FixupTable {
                    at: BASE,
                    bytes: vec![0; 16],
                };
                let error = apply(kernel, &mut code, &[table], &mut AppliedFixups::default());
                let error = error.unwrap_err().to_string();
                assert!(error.contains("code of jump_entry has 8 bytes"), "{error}");
                Ok(())
            },
        )
        .unwrap();
    }
}
