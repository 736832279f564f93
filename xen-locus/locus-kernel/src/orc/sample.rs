//! Small ORC tables, for tests.

#![allow(clippy::cast_possible_truncation)] // small tables

use super::OrcFormat;
use crate::btf::blob::Blob;
use crate::btf::TypeKind;

/// A row as `struct orc_entry` in the given format. `sp` and `bp` are number and offset of a register.
#[must_use]
pub fn pack(format: OrcFormat, sp: (u16, i16), bp: (u16, i16), kind: u16, flags: u16) -> Vec<u8> {
    let bits = sp.0 | bp.0 << 4 | kind << 8;
    let flags = match format {
        OrcFormat::End | OrcFormat::SignalEnd => flags << 10,
        OrcFormat::Typed | OrcFormat::Reordered => flags << 11,
    };
    let mut row = Vec::new();
    row.extend(sp.1.to_le_bytes());
    row.extend(bp.1.to_le_bytes());
    row.extend((bits | flags).to_le_bytes());
    row
}

/// All formats.
pub const ALL: [OrcFormat; 4] = [
    OrcFormat::End,
    OrcFormat::SignalEnd,
    OrcFormat::Typed,
    OrcFormat::Reordered,
];

/// The numbers that the format has for: stack pointer, frame pointer, the caller's stack pointer,
/// RDI, stack pointer indirect, frame pointer indirect.
#[must_use]
pub fn numbers(format: OrcFormat) -> [u16; 6] {
    match format {
        OrcFormat::Reordered => [3, 4, 8, 5, 9, 10],
        _ => [5, 4, 1, 3, 9, 8],
    }
}

/// The numbers that the format has for the types: call, registers, interrupt frame.
#[must_use]
pub fn kinds(format: OrcFormat) -> [u16; 3] {
    match format {
        OrcFormat::End | OrcFormat::SignalEnd => [0, 1, 2],
        _ => [2, 3, 4],
    }
}

/// A row of a plain frame of `size` bytes, with the return address.
#[must_use]
pub fn frame(format: OrcFormat, size: i16) -> Vec<u8> {
    pack(
        format,
        (numbers(format)[0], size),
        (0, 0),
        kinds(format)[0],
        0,
    )
}

/// BTF that has `struct orc_entry` in the given format.
#[must_use]
pub fn btf(format: OrcFormat) -> Vec<u8> {
    let mut types = Blob::with_integers();
    let mut members = vec![
        ("sp_offset", 2, 0, 0),
        ("bp_offset", 2, 16, 0),
        ("sp_reg", 3, 32, 4),
        ("bp_reg", 3, 36, 4),
    ];
    members.extend(match format {
        OrcFormat::End => vec![("type", 3, 40, 2), ("end", 3, 42, 1)],
        OrcFormat::SignalEnd => vec![("type", 3, 40, 2), ("signal", 3, 42, 1), ("end", 3, 43, 1)],
        _ => vec![("type", 3, 40, 3), ("signal", 3, 43, 1)],
    });
    types.fields(TypeKind::Struct, "orc_entry", 6, &members);
    types.bytes()
}
