//! Bytes of x86 code that several rooms write or compare: nops in the forms of arch/x86/include/asm/nops.h, and
//! branches with a 32-bit offset.

use iced_x86::{Decoder, DecoderOptions};
use locus_guest::addr::Gva;

/// Length of `jmp rel32` and of `call rel32`, in bytes.
pub const JUMP: usize = 5;
/// Opcode of `jmp rel32`.
pub const JMP: u8 = 0xe9;
/// Opcode of `call rel32`.
pub const CALL: u8 = 0xe8;
/// A breakpoint.
pub const INT3: u8 = 0xcc;
/// The nop of one byte.
pub const NOP1: u8 = 0x90;
/// The nop of two bytes.
pub const NOP2: [u8; 2] = [0x66, 0x90];
/// The nop of five bytes that the kernel uses today (`BYTES_NOP5`).
pub const NOP5: [u8; JUMP] = [0x0f, 0x1f, 0x44, 0x00, 0x00];
/// Five-byte nops the kernel uses or used: today's, and the one for K8 on older kernels.
pub const NOPS5: [[u8; JUMP]; 2] = [NOP5, [0x66, 0x66, 0x66, 0x66, 0x90]];

/// What stands before ftrace's nop in a kernel that is built for IBT: `endbr64`, or what the kernel makes of it
/// where nobody takes the function's address ("sealing"). It seals at boot, and when it loads a module, whether
/// the CPU has IBT or not (arch/x86/include/asm/ibt.h: `is_endbr`, `gen_endbr_poison`).
pub const ENDBRS: [[u8; 4]; 4] = [
    [0xf3, 0x0f, 0x1e, 0xfa],
    // nopw (%rax). Linux kernel commit ed53a0d97192 ("x86/alternative: Use .ibt_endbr_seal to seal indirect calls") (in v5.18).
    [0x66, 0x0f, 0x1f, 0x00],
    // nopl -42(%rax). Linux kernel commit 85a2d4a890dc ("x86,ibt: Use UDB instead of 0xEA") (in v6.18).
    [0x0f, 0x1f, 0x40, 0xd6],
    // cmc; nopl (%rax), of functions with one argument under FineIBT. Linux kernel commit dfebe7362f6f ("x86/ibt:
    // Optimize the fineibt-bhi arity 1 case") (in v6.15), until the one above.
    [0xf5, 0x0f, 0x1f, 0x00],
];

/// By length: nops of one to eight bytes.
const NOPS: [&[u8]; 8] = [
    &[NOP1],
    &NOP2,
    &[0x0f, 0x1f, 0x00],
    &[0x0f, 0x1f, 0x40, 0x00],
    &NOP5,
    &[0x66, 0x0f, 0x1f, 0x44, 0x00, 0x00],
    &[0x0f, 0x1f, 0x80, 0x00, 0x00, 0x00, 0x00],
    &[0x0f, 0x1f, 0x84, 0x00, 0x00, 0x00, 0x00, 0x00],
];

/// Fills `room` with as few nops as these lengths allow.
pub fn fill(room: &mut [u8]) {
    for part in room.chunks_mut(NOPS.len()) {
        if let Some(nop) = NOPS.get(part.len().wrapping_sub(1)) {
            part.copy_from_slice(nop);
        }
    }
}

/// Turns runs of one-byte nops among the instructions of `code` into longer ones
/// (`optimize_nops`, arch/x86/kernel/alternative.c). It stops at what is no instruction.
pub fn join(code: &mut [u8]) {
    let (mut at, mut run) = (0, 0);
    let lengths: Vec<(usize, bool)> = Decoder::new(64, code, DecoderOptions::NONE)
        .iter()
        .take_while(|i| !i.is_invalid())
        .map(|i| (i.len(), i.len() == 1 && i.code() == iced_x86::Code::Nopd))
        .collect();
    for (len, nop) in lengths {
        if !nop {
            // As below.
            fill(code.get_mut(run..at).unwrap_or_default());
            run = at + len;
        }
        at += len;
    }
    // The instructions are those of `code`, so their end is in it.
    fill(code.get_mut(run..at).unwrap_or_default());
}

/// The bytes of `opcode` with a 32-bit offset (call or jump), at `at`, to `target`; `None` when it is
/// out of reach.
#[must_use]
pub fn branch(opcode: u8, at: Gva, target: Gva) -> Option<[u8; JUMP]> {
    let distance = target
        .0
        .wrapping_sub(at.0.wrapping_add(JUMP as u64))
        .cast_signed();
    let [a, b, c, d] = i32::try_from(distance).ok()?.to_le_bytes();
    Some([opcode, a, b, c, d])
}

/// The bytes of a jump at `at` to `target`; `None` when it is out of reach.
#[must_use]
pub fn jump(at: Gva, target: Gva) -> Option<[u8; JUMP]> {
    branch(JMP, at, target)
}

/// Where `bytes` at `at` lead, an opcode with a 32-bit offset: the way back from [`branch`].
#[must_use]
pub fn branch_target(at: Gva, bytes: [u8; JUMP]) -> Gva {
    let [_, a, b, c, d] = bytes;
    let distance = i64::from(i32::from_le_bytes([a, b, c, d]));
    let next = at.0.wrapping_add(JUMP as u64);
    Gva(next.wrapping_add_signed(distance))
}

/// Where the jump `bytes` at `at` leads; `None` if they are none.
#[must_use]
pub fn jump_target(at: Gva, bytes: [u8; JUMP]) -> Option<Gva> {
    bytes.starts_with(&[JMP]).then(|| branch_target(at, bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_nop_is_one_instruction_of_its_length_that_does_nothing() {
        for len in 1..=8 {
            let mut code = vec![0xcc; len];
            fill(&mut code);
            let all: Vec<_> = Decoder::new(64, &code, DecoderOptions::NONE)
                .iter()
                .collect();
            assert_eq!(all.len(), 1, "{code:02x?}");
            assert_eq!(all[0].len(), len);
            assert_eq!(all[0].mnemonic(), iced_x86::Mnemonic::Nop);
        }
    }

    #[test]
    fn runs_of_nops_become_long_ones_and_other_bytes_0x90_stay() {
        // nop; nop; mov $0x9090,%ax; nop; ret; nop; nop; nop
        let mut code = [
            0x90, 0x90, 0x66, 0xb8, 0x90, 0x90, 0x90, 0xc3, 0x90, 0x90, 0x90,
        ];
        join(&mut code);
        let expected = [
            0x66, 0x90, 0x66, 0xb8, 0x90, 0x90, 0x90, 0xc3, 0x0f, 0x1f, 0x00,
        ];
        assert_eq!(code, expected);
        let mut long = [0x90; 19];
        join(&mut long);
        assert_eq!(long[..8], *NOPS[7]);
        assert_eq!(long[16..], *NOPS[2]);
        // Behind what is no instruction, nothing is touched.
        let mut code = [0x06, 0x90, 0x90];
        join(&mut code);
        assert_eq!(code, [0x06, 0x90, 0x90]);
    }

    #[test]
    fn a_jump_reaches_two_gigabytes_either_way_and_no_more() {
        let site = Gva(0xffff_ffff_8100_0000);
        assert_eq!(jump(site, site.plus(5)), Some([0xe9, 0, 0, 0, 0]));
        assert_eq!(jump(site, site), Some([0xe9, 0xfb, 0xff, 0xff, 0xff]));
        assert!(jump(site, site.plus(5 + 0x7fff_ffff)).is_some());
        assert!(jump(site, site.plus(5 + 0x8000_0000)).is_none());
    }
}
