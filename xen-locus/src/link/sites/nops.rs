//! Instructions that do nothing, in the forms of arch/x86/include/asm/nops.h.

use iced_x86::{Decoder, DecoderOptions};

/// By length: nops of one to eight bytes.
const NOPS: [&[u8]; 8] = [
    &[0x90],
    &[0x66, 0x90],
    &[0x0f, 0x1f, 0x00],
    &[0x0f, 0x1f, 0x40, 0x00],
    &[0x0f, 0x1f, 0x44, 0x00, 0x00],
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
            fill(code.get_mut(run..at).unwrap_or_default());
            run = at + len;
        }
        at += len;
    }
    fill(code.get_mut(run..at).unwrap_or_default());
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
}
