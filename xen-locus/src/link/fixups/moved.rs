//! Instructions for another place than they were linked for.

use iced_x86::{Decoder, DecoderOptions, Instruction, OpKind};
use locus_guest::addr::{Gva, Range};
use locus_guest::fetch;

/// The instructions `code`, linked for `from`, for the place `to`: what they refer to by its distance
/// stays the same, unless it is among them (arch/x86/kernel/alternative.c: `apply_relocation`).
///
/// # Errors
/// Why it can't be done: no instruction, or a distance that does not fit its field.
pub fn moved(code: &[u8], from: Gva, to: Gva) -> Result<Vec<u8>, String> {
    let mut out = code.to_vec();
    let all = Range::new(from, code.len() as u64);
    let mut decoder = Decoder::with_ip(64, code, from.0, DecoderOptions::NONE);
    while decoder.can_decode() {
        let start = decoder.position();
        let i = decoder.decode();
        // The decoder read the instruction from there.
        let bytes = code
            .get(start..start.saturating_add(i.len()))
            .unwrap_or_default();
        if i.is_invalid() {
            return Err(format!(
                "no instruction is known at {}",
                from.plus(start as u64)
            ));
        }
        let Some(target) = referred(&i) else {
            continue;
        };
        if all.contains(target) || target == all.end {
            continue;
        }
        let fields = decoder.get_constant_offsets(&i);
        let (at, len) = if i.is_ip_rel_memory_operand() {
            (fields.displacement_offset(), fields.displacement_size())
        } else {
            (fields.immediate_offset(), fields.immediate_size())
        };
        let shift = from.0.wrapping_sub(to.0).cast_signed();
        let field = match len {
            1 => bytes.get(at).map(|&b| i64::from(b.cast_signed())),
            4 => fetch::u32(bytes, at).map(|w| i64::from(w.cast_signed())),
            _ => None,
        };
        let far = || {
            format!(
                "{target} is out of reach of the instruction at {}",
                to.plus(start as u64)
            )
        };
        let distance = field.and_then(|f| f.checked_add(shift)).ok_or_else(far)?;
        let place = start + at;
        match len {
            1 => {
                let short = i8::try_from(distance).map_err(|_| far())?;
                put(&mut out, place, &short.to_le_bytes());
            }
            _ => {
                let near = i32::try_from(distance).map_err(|_| far())?;
                put(&mut out, place, &near.to_le_bytes());
            }
        }
    }
    Ok(out)
}

/// The address an instruction refers to by its distance from itself.
fn referred(i: &Instruction) -> Option<Gva> {
    if i.is_ip_rel_memory_operand() {
        return Some(Gva(i.ip_rel_memory_address()));
    }
    let branch = (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::NearBranch64);
    branch.then(|| Gva(i.near_branch_target()))
}

/// Overwrites a field of an instruction. The decoder found it there, so it is in `out`.
fn put(out: &mut [u8], at: usize, bytes: &[u8]) {
    if let Some(room) = out.get_mut(at..at.saturating_add(bytes.len())) {
        room.copy_from_slice(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FROM: Gva = Gva(0xffff_ffff_8100_0000);

    #[test]
    fn what_is_outside_keeps_its_address_and_what_is_inside_its_distance() {
        for (code, to, expected) in [
            // call, jmp, jne outside
            (vec![0xe8, 0, 1, 0, 0], 0x10, vec![0xe8, 0xf0, 0, 0, 0]),
            (vec![0xe9, 0, 1, 0, 0], 0x10, vec![0xe9, 0xf0, 0, 0, 0]),
            (
                vec![0x0f, 0x85, 0, 1, 0, 0],
                0x10,
                vec![0x0f, 0x85, 0xf0, 0, 0, 0],
            ),
            // jmp and jne short, outside
            (vec![0xeb, 0x40], 0x10, vec![0xeb, 0x30]),
            (vec![0x75, 0x40], 0x10, vec![0x75, 0x30]),
            // mov 0x100(%rip),%rax; cmpl $1,0x100(%rip)
            (
                vec![0x48, 0x8b, 5, 0, 1, 0, 0],
                0x20,
                vec![0x48, 0x8b, 5, 0xe0, 0, 0, 0],
            ),
            (
                vec![0x83, 0x3d, 0, 1, 0, 0, 1],
                0x20,
                vec![0x83, 0x3d, 0xe0, 0, 0, 0, 1],
            ),
            // jmp over a nop, to the end; and to itself
            (vec![0xeb, 1, 0x90], 0x1000, vec![0xeb, 1, 0x90]),
            (vec![0xeb, 0xfe], 0x1000, vec![0xeb, 0xfe]),
            // nothing relative
            (vec![0x0f, 0xae, 0xe8], 0x1000, vec![0x0f, 0xae, 0xe8]),
        ] {
            assert_eq!(
                moved(&code, FROM, FROM.plus(to)),
                Ok(expected),
                "{code:02x?}"
            );
        }
    }

    #[test]
    fn what_does_not_fit_or_is_no_instruction_is_an_error() {
        let far = moved(&[0xeb, 0x40], FROM, FROM.plus(0x1000)).unwrap_err();
        assert!(far.contains("out of reach"), "{far}");
        let far = moved(&[0xe8, 0, 0, 0, 0x7f], FROM, Gva(FROM.0 - (1 << 30))).unwrap_err();
        assert!(far.contains("out of reach"), "{far}");
        let odd = moved(&[0x90, 0x06], FROM, FROM.plus(2)).unwrap_err();
        assert!(odd.contains("no instruction"), "{odd}");
    }
}
