//! ORC: the kernel's own table of how to step from a function's stack frame to its caller's.
//!
//! The table has two parts. `__start_orc_unwind_ip` has the addresses at which each row begins to
//! apply, sorted, each 32 bits wide and relative to its own place. `__start_orc_unwind` has the
//! rows, of type `struct orc_entry`. How rows are used is in arch/x86/kernel/unwind_orc.c. Their
//! format has changed three times:
//!
//! - [`OrcFormat::End`]: `type` is two bits wide (call, registers, interrupt frame); "undefined" and
//!   "end of stack" are rows whose stack pointer has no base, told apart by the bit `end`.
//! - [`OrcFormat::SignalEnd`]: the bit `signal` came with Linux kernel commit ffb1b4a41016
//!   ("x86/unwind/orc: Add 'signal' field to ORC metadata"). Before it the frame above registers or
//!   an interrupt frame was taken as interrupted, and no other.
//! - [`OrcFormat::Typed`]: Linux kernel commit fb799447ae29 ("x86,objtool: Split UNWIND_HINT_EMPTY in
//!   two") made `type` three bits wide, with "undefined" and "end of stack" among the types, and
//!   took `end` away.
//! - [`OrcFormat::Reordered`]: the same, but Linux kernel commit 1735858caa4b ("objtool/x86: Reorder
//!   ORC register numbering") gave the registers other numbers and added RAX.
//!
//! The first three differ in the members of `orc_entry` in BTF. The last two look the same there,
//! but Linux kernel commit b9f174c811e3 ("x86/unwind/orc: Add ELF section with ORC version
//! identifier") stored in `.orc_header` the SHA-1 of the format's definitions in
//! arch/x86/include/asm/orc_types.h (scripts/orc_hash.sh). The three known hashes were confirmed by
//! hashing those definitions. In a kernel without a header the rows decide: most of them are plain
//! frames based on the stack pointer, under one of the two numberings.

mod layout;
mod row;
mod rows;
#[cfg(any(test, feature = "testing"))]
pub mod sample;
mod table;
#[cfg(test)]
mod tests;

pub use self::row::{CallerBp, CallerSp, FrameKind, OrcRow, SpBase};
pub use self::rows::OrcRows;
pub use self::table::OrcTable;

/// Most rows believed. Debian's kernels have 0.3 to 0.5 million.
const ROWS_MAX: usize = 1 << 22;
/// Bytes of `.orc_header`.
const HASH_LEN: usize = 20;

/// A format of `struct orc_entry`; the head of this module has their history.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OrcFormat {
    /// Two-bit types, and a bit for the end of a stack.
    End,
    /// As [`OrcFormat::End`], and a bit for interrupted frames.
    SignalEnd,
    /// Three-bit types, of which one is the end of a stack, and a bit for interrupted frames.
    Typed,
    /// As [`OrcFormat::Typed`], with other numbers for the registers.
    Reordered,
}

impl std::fmt::Display for OrcFormat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            OrcFormat::End => "end",
            OrcFormat::SignalEnd => "signal-end",
            OrcFormat::Typed => "typed",
            OrcFormat::Reordered => "typed-reordered",
        })
    }
}

/// The SHA-1 that `.orc_header` has for each format, as scripts/orc_hash.sh makes it. The oldest
/// format has none.
pub const FORMAT_HASHES: [(OrcFormat, [u8; HASH_LEN]); 3] = [
    (
        OrcFormat::SignalEnd,
        [
            0xdb, 0x84, 0xae, 0xd4, 0x10, 0x3b, 0x31, 0xdd, 0x51, 0xe0, 0x17, 0xf8, 0xf7, 0x97,
            0x83, 0xca, 0x98, 0x5c, 0x2c, 0x51,
        ],
    ),
    (
        OrcFormat::Typed,
        [
            0xfe, 0x5d, 0x32, 0xbf, 0x58, 0x1b, 0xd6, 0x3b, 0x2c, 0xa9, 0xa5, 0xc6, 0x5b, 0xa5,
            0xa6, 0x25, 0xea, 0xb3, 0xfe, 0x24,
        ],
    ),
    (
        OrcFormat::Reordered,
        [
            0x13, 0x7c, 0x36, 0xad, 0x76, 0x27, 0xc4, 0xdd, 0x55, 0x93, 0x21, 0x76, 0xbb, 0x0e,
            0xcd, 0xbd, 0x50, 0x41, 0xfc, 0x82,
        ],
    ),
];
