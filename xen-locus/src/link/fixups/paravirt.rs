//! Paravirt call sites: calls through a pointer of `pv_ops`, which the kernel turns into calls of
//! what the pointer holds, or into nothing where that does nothing.
//!
//! Unpatched they would be right as well. But they are indirect calls without a retpoline, and the kernel never
//! runs them unpatched. A call of an operation that the guest does not have becomes one of `paravirt_BUG`, as in
//! the kernel's own code: a PV guest has such calls in code that only runs on bare metal. Jumps (`iret`,
//! `sysret` of Linux 5.10) stay, and no operation is put in line.
//!
//! Sources: `apply_paravirt` (arch/x86/kernel/alternative.c), `paravirt_patch` (in v5.10:
//! `paravirt_patch_default`; arch/x86/kernel/paravirt.c). Kernels from v6.8 on have alternatives in
//! their place: Linux kernel commit 60bc276b129e ("x86/paravirt: Switch mixed paravirt/alternative
//! calls to alternatives").

use iced_x86::{Decoder, DecoderOptions, Mnemonic, OpKind, Register};
use locus_guest::addr::Gva;
use locus_guest::fetch;
use locus_kernel::btf::Bits;
use locus_kernel::Kernel;

use super::code::{are_empty, relative, FixupTable, LinkedCode};
use super::{name_of, FixupPlace};
use crate::error::{Error, Result};
use crate::x86::{self, branch, CALL, NOP1};

const TABLE: &str = ".parainstructions";
/// An instruction that stops the thread that runs it.
const UD2: [u8; 2] = [0x0f, 0x0b];
/// Largest believed entry, in bytes: it has 8 or 16.
const SIZE_MAX: usize = 64;

/// Where the parts of a `struct paravirt_patch_site` are.
struct PatchSiteLayout {
    size: usize,
    instr: Instr,
    kind: Bits,
    len: Bits,
    /// Bytes of an entry that mean something.
    used: usize,
}

/// The field that names a site, by its offset in an entry.
enum Instr {
    /// It holds the site's address.
    Address(usize),
    /// It holds the site's distance from the field.
    Distance(usize),
}

impl PatchSiteLayout {
    fn of(kernel: &Kernel<'_>) -> Result<PatchSiteLayout> {
        let btf = kernel.btf()?;
        let ty = "paravirt_patch_site";
        let len = btf.bits_of(ty, "len")?;
        let size = btf.size_of(ty)?;
        let used = len.offset.saturating_add(len.bytes());
        if !(used..=SIZE_MAX).contains(&size) {
            return Err(Error::not_applicable(format!(
                "struct {ty} has {size} bytes in the guest's types and its last member ends at byte \
                 {used}; expected at most {SIZE_MAX} bytes, all members among them"
            )));
        }
        Ok(PatchSiteLayout {
            size,
            used,
            instr: match btf.offset_of_sized(ty, "instr_offset", 4) {
                Ok(offset) => Instr::Distance(offset),
                Err(_) => Instr::Address(btf.offset_of_sized(ty, "instr", 8)?),
            },
            kind: btf.bits_of(ty, "type")?,
            len,
        })
    }
}

/// Patches the sites in `tables`.
///
/// # Errors
/// [`Class::NotApplicable`](crate::error::Class::NotApplicable): an entry is not as entries are. Or the
/// guest can't be read.
pub fn apply(
    kernel: &Kernel<'_>,
    code: &mut LinkedCode,
    tables: &[FixupTable],
    places: &mut Vec<FixupPlace>,
) -> Result<()> {
    if are_empty(tables) {
        return Ok(());
    }
    let layout = PatchSiteLayout::of(kernel)?;
    let ops = kernel.symbols.need("pv_ops")?;
    for table in tables {
        let mut table = table.clone();
        // On older kernels entries are aligned at their start only: the last one has no padding. The size
        // of an entry is not 0.
        let last = table.bytes.len().checked_rem(layout.size).unwrap_or(0);
        if last >= layout.used {
            table
                .bytes
                .resize(table.bytes.len() - last + layout.size, 0);
        }
        let entries: Vec<_> = table.entries(code, TABLE, layout.size)?.collect();
        for (entry, bytes) in entries {
            let at = match layout.instr {
                Instr::Distance(field) => relative(entry, bytes, field),
                Instr::Address(field) => fetch::u64(bytes, field).map(Gva),
            };
            let (Some(at), Some(kind), Some(len)) =
                (at, layout.kind.value(bytes), layout.len.value(bytes))
            else {
                return Err(code.no(&format!("an entry of {TABLE} is cut short")));
            };
            if code.runs(at, TABLE)? {
                let size = usize::try_from(len)
                    .map_err(|_| code.no(&format!("a paravirt site of {len} bytes")))?;
                one(kernel, code, ops.plus(8 * kind), at, size)?;
                places.push(FixupPlace::new(at, len, TABLE));
            }
        }
    }
    Ok(())
}

fn one(
    kernel: &Kernel<'_>,
    code: &mut LinkedCode,
    pointer: Gva,
    at: Gva,
    len: usize,
) -> Result<()> {
    let old = code.live(at, len, TABLE)?;
    let i = Decoder::with_ip(64, old, at.0, DecoderOptions::NONE).decode();
    let absolute = i.memory_base() == Register::None && i.memory_index() == Register::None;
    let called = (i.mnemonic() == Mnemonic::Call || i.mnemonic() == Mnemonic::Jmp)
        && i.op0_kind() == OpKind::Memory
        && (absolute || i.is_ip_rel_memory_operand())
        && i.memory_displacement64() == pointer.0;
    if !called {
        let what = name_of(kernel, pointer);
        return Err(code.no(&format!(
            "the paravirt site at {at} holds {old:02x?}; expected a call through {what}"
        )));
    }
    if i.mnemonic() == Mnemonic::Jmp {
        return Ok(());
    }
    let held = Gva(kernel.space.read_u64(pointer)?);
    let target = match held {
        Gva(0) => kernel.symbols.addr("paravirt_BUG"),
        held => Some(held),
    };
    let call = match target {
        None => UD2.to_vec(),
        _ if target == kernel.symbols.addr("_paravirt_nop") => Vec::new(),
        Some(target) => {
            let far = || {
                code.no(&format!(
                    "{target} is out of reach of the paravirt site at {at}"
                ))
            };
            branch(CALL, at, target).ok_or_else(far)?.to_vec()
        }
    };
    let mut new = vec![NOP1; len];
    match new.get_mut(..call.len()) {
        Some(room) => room.copy_from_slice(&call),
        None => return Err(code.no(&format!("the paravirt site at {at} has only {len} bytes"))),
    }
    x86::join(&mut new);
    code.put(at, &new)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::link::fixups::testing::{code, kernel, put32, BASE, HELD, POINTERS};
    use locus_kernel::btf::blob::Blob;

    fn types(new: bool) -> Vec<u8> {
        types_of(new, if new { 8 } else { 16 })
    }

    fn types_of(new: bool, size: usize) -> Vec<u8> {
        let mut b = Blob::with_integers();
        let (first, at) = if new {
            (("instr_offset", 3, 0), 4)
        } else {
            (("instr", 4, 0), 8)
        };
        b.structure(
            "paravirt_patch_site",
            size,
            &[first, ("type", 1, at), ("len", 1, at + 1)],
        );
        b.bytes()
    }

    /// A site that calls through pointer number `kind`, as `opcode` does it.
    fn patched(new: bool, opcode: &[u8], kind: u8) -> Result<Vec<u8>> {
        let pointer = POINTERS.0 + 8 * u64::from(kind);
        let len = opcode.len() + 4;
        let word = |address: u64| address.to_le_bytes()[..4].to_vec();
        let field = match opcode {
            // The address itself, which the kernel's half of addresses allows in 32 bits.
            [0xff, 0x14, 0x25] => word(pointer),
            _ => word(pointer.wrapping_sub(BASE.0 + len as u64)),
        };
        let mut bytes = opcode.to_vec();
        bytes.extend(field);
        bytes.resize(16, 0xcc);
        let at = BASE.plus(0x100);
        let mut entry = Vec::new();
        if new {
            put32(&mut entry, at, BASE);
        } else {
            entry.extend(BASE.0.to_le_bytes());
        }
        entry.extend([kind, u8::try_from(len).unwrap()]);
        // The last entry of an old table: aligned at its start only.
        entry.resize(if new { 8 } else { 12 }, 0);
        kernel(&types(new), |kernel| {
            let mut code = code(&bytes);
            let table = FixupTable {
                at,
                bytes: entry.clone(),
            };
            let places = &mut Vec::new();
            apply(kernel, &mut code, &[table], places)?;
            assert_eq!(places.len(), 1);
            Ok(code.bytes[..len].to_vec())
        })
    }

    #[test]
    fn a_call_becomes_direct_and_a_nop_nothing_in_both_forms() {
        let call = branch(0xe8, BASE, HELD).unwrap();
        for new in [false, true] {
            let site = patched(new, &[0xff, 0x15], 0).unwrap();
            assert_eq!(site, [&call[..], &[0x90]].concat());
            let site = patched(new, &[0xff, 0x14, 0x25], 0).unwrap();
            assert_eq!(site, [&call[..], &[0x66, 0x90]].concat());
            let site = patched(new, &[0xff, 0x15], 3).unwrap();
            assert_eq!(site, [0x66, 0x0f, 0x1f, 0x44, 0, 0]);
        }
        // jmp stays
        assert_eq!(patched(true, &[0xff, 0x25], 0).unwrap()[..2], [0xff, 0x25]);
    }

    #[test]
    fn a_call_of_what_the_guest_does_not_have_dies_and_what_is_no_call_is_refused() {
        let dies = patched(false, &[0xff, 0x15], 2).unwrap();
        assert_eq!(dies, [0x0f, 0x0b, 0x0f, 0x1f, 0x40, 0]);
        let error = patched(false, &[0x8b, 0x05], 0).unwrap_err().to_string();
        assert!(
            error.contains("expected a call through pv_ops+0x0"),
            "{error}"
        );
    }

    #[test]
    fn an_absurd_size_of_an_entry_is_refused_before_room_is_made_for_it() {
        for size in [9, 65, 0xffff_fff0] {
            let refused = kernel(&types_of(false, size), |kernel| {
                let mut code = code(&[0x90; 16]);
                let table = FixupTable {
                    at: BASE.plus(0x100),
                    bytes: vec![0; 12],
                };
                apply(kernel, &mut code, &[table], &mut Vec::new())
            });
            let error = refused.unwrap_err().to_string();
            let words = format!("has {size} bytes in the guest's types");
            assert!(error.contains(&words), "{error}");
        }
    }
}
