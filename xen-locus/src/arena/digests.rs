//! Digests of a payload's code and constants. They are made when the payload is linked, and stored in its record,
//! so that a later change of these bytes is noticed.
//!
//! The guest's kernel itself rewrites one thing in a payload's code, its jump labels, between two forms
//! that are known. Both count as the same.

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::x86::{INT3, NOP2, NOPS5};

/// Bytes of code that one digest in [`CodeDigests::blocks`] covers.
pub const BLOCK: usize = 256;
/// Hex digits that are stored of a block's digest: they tell where a change is, not whether there is one.
const DIGITS: usize = 8;

/// The digests of a payload's code.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CodeDigests {
    /// SHA-256 of the code, in hex.
    pub sha256: String,
    /// The first digits of the SHA-256 of each [`BLOCK`] of the code.
    pub blocks: String,
    /// The jump labels in the code.
    pub labels: Vec<RecordedLabel>,
}

/// A place in the code that the guest's kernel switches between a nop and a jump.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecordedLabel {
    /// Byte offset in the code.
    pub at: u32,
    /// Byte offset of where the jump leads.
    pub to: u32,
    /// Length of the nop and of the jump: 2 or 5.
    pub size: u8,
}

impl RecordedLabel {
    /// Overwrites the label in `code`: with one value if it has either of its two forms, with another one if not.
    fn blank(self, code: &mut [u8]) {
        let at = self.at as usize;
        let end = at.saturating_add(self.size.into());
        let Some(bytes) = code.get_mut(at..end) else {
            return;
        };
        let distance = i64::from(self.to) - i64::from(self.at) - i64::from(self.size);
        let known = match (&*bytes, i8::try_from(distance), i32::try_from(distance)) {
            (nop, ..) if *nop == NOP2 || NOPS5.iter().any(|n| nop == n) => true,
            ([0xeb, d], Ok(short), _) => *d == short.cast_unsigned(),
            ([0xe9, d @ ..], _, Ok(near)) => d == near.to_le_bytes(),
            _ => false,
        };
        bytes.fill(if known { 0 } else { u8::MAX });
    }
}

impl CodeDigests {
    /// The digests of `code`, which has these `labels`.
    #[must_use]
    pub fn of(mut code: Vec<u8>, labels: Vec<RecordedLabel>) -> CodeDigests {
        labels.iter().for_each(|label| label.blank(&mut code));
        let blocks = code.chunks(BLOCK).map(|block| {
            let mut digits = digest(block);
            digits.truncate(DIGITS);
            digits
        });
        CodeDigests {
            sha256: digest(&code),
            blocks: blocks.collect(),
            labels,
        }
    }

    /// A value whose JSON is at least as long as that of any code of `len` bytes with at most `labels` labels.
    #[must_use]
    pub fn longest(len: u64, labels: u64) -> CodeDigests {
        let most = RecordedLabel {
            at: u32::MAX,
            to: u32::MAX,
            size: u8::MAX,
        };
        // Both are numbers of bytes and of rows in memory, so they fit.
        let blocks = usize::try_from(len).unwrap_or(0).div_ceil(BLOCK);
        CodeDigests {
            sha256: digest(&[]),
            blocks: "0".repeat(blocks * DIGITS),
            labels: vec![most; usize::try_from(labels).unwrap_or(0)],
        }
    }

    /// Byte offset of each block of `found` that differs from this code; empty if nothing was changed. `found` is
    /// what is at the code's address now.
    #[must_use]
    pub fn changed(&self, found: Vec<u8>) -> Vec<usize> {
        let len = found.len();
        let found = CodeDigests::of(found, self.labels.clone());
        if found.sha256 == self.sha256 {
            return Vec::new();
        }
        let digits = |code: &'_ CodeDigests, block: usize| {
            let digits = code.blocks.get(block * DIGITS..(block + 1) * DIGITS);
            digits.map(str::to_owned)
        };
        let blocks = 0..len.div_ceil(BLOCK);
        let mut changed: Vec<usize> = blocks
            .filter(|&b| digits(&found, b) != digits(self, b))
            .map(|b| b * BLOCK)
            .collect();
        if changed.is_empty() {
            changed.push(0);
        }
        changed
    }
}

impl CodeDigests {
    /// The label that the guest's kernel is switching in `found`, which is what is at the code's address now. It first
    /// writes a breakpoint over the first byte of a label, and its new first byte last (`smp_text_poke_batch_finish`,
    /// formerly `text_poke_bp_batch`, arch/x86/kernel/alternative.c). No kprobe can stand at a label.
    #[must_use]
    pub fn being_switched(&self, found: &[u8]) -> Option<RecordedLabel> {
        let mut labels = self.labels.iter();
        labels
            .find(|label| found.get(label.at as usize) == Some(&INT3))
            .copied()
    }
}

/// SHA-256 in hex.
#[must_use]
pub fn digest(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 600 bytes of code with a long label at 10 that leads to 300, and a short one at 20 to 40.
    fn code(long: &[u8], short: &[u8]) -> Vec<u8> {
        let mut code = vec![0x90; 600];
        code[10..15].copy_from_slice(long);
        code[20..22].copy_from_slice(short);
        code
    }

    fn labels() -> Vec<RecordedLabel> {
        let label = |at, to, size| RecordedLabel { at, to, size };
        vec![label(10, 300, 5), label(20, 40, 2)]
    }

    #[test]
    fn a_label_may_have_either_form_and_no_other() {
        let nop = [0x0f, 0x1f, 0x44, 0, 0];
        let jump = [0xe9, 29, 1, 0, 0]; // 300 - 15 = 285
        let placed = CodeDigests::of(code(&nop, &NOP2), labels());
        for long in [&nop, &jump, &[0x66, 0x66, 0x66, 0x66, 0x90]] {
            for short in [&NOP2, &[0xeb, 18]] {
                assert_eq!(placed.changed(code(long, short)), [0; 0]);
            }
        }
        for (long, short) in [
            ([0xe9, 30, 1, 0, 0], NOP2),
            ([0xcc, 0x1f, 0x44, 0, 0], NOP2),
            (nop, [0xeb, 19]),
            (nop, [0, 0]),
            ([0; 5], NOP2),
        ] {
            assert_eq!(placed.changed(code(&long, &short)), [0]);
        }
    }

    #[test]
    fn only_a_breakpoint_at_a_label_is_a_switch() {
        let nop = [0x0f, 0x1f, 0x44, 0, 0];
        let placed = CodeDigests::of(code(&nop, &NOP2), labels());
        let label = |found: &[u8]| placed.being_switched(found).map(|label| label.at);
        assert_eq!(label(&code(&nop, &NOP2)), None);
        // The rest of a label is the old form or the new one.
        for rest in [[0x1f, 0x44, 0, 0], [29, 1, 0, 0]] {
            let [a, b, c, d] = rest;
            assert_eq!(label(&code(&[0xcc, a, b, c, d], &NOP2)), Some(10));
        }
        assert_eq!(label(&code(&nop, &[0xcc, 18])), Some(20));
        assert_eq!(label(&code(&[0x0f, 0xcc, 0x44, 0, 0], &NOP2)), None);
        assert_eq!(label(&[0xcc; 5]), None);
    }

    #[test]
    fn every_changed_byte_is_placed() {
        let placed = CodeDigests::of(vec![0x90; 600], Vec::new());
        for at in 0..600 {
            let mut found = vec![0x90; 600];
            found[at] ^= 1;
            assert_eq!(placed.changed(found), [at / BLOCK * BLOCK]);
        }
        assert_eq!(placed.changed(vec![0x90; 599]), [512]);
    }

    #[test]
    fn nothing_is_longer_than_the_longest() {
        let len = |code: &CodeDigests| serde_json::to_string(code).unwrap().len();
        let most = len(&CodeDigests::longest(600, 2));
        assert!(len(&CodeDigests::of(code(&[0; 5], &NOP2), labels())) <= most);
        assert!(len(&CodeDigests::of(vec![0; 600], Vec::new())) <= most);
    }
}
