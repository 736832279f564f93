//! The value of a relocation, for every type that x86-64 kernel modules use.
//!
//! As `apply_relocate_add` does it (arch/x86/kernel/module.c): the same types, the same checks for
//! overflow, and the place must hold zeroes before. What it does not do, it refuses, and so does
//! this; the names are those of the x86-64 psABI, table "Relocation Types".

use locus_guest::addr::Gva;

/// Nothing to do.
pub const R_X86_64_NONE: u32 = 0;
/// An address.
pub const R_X86_64_64: u32 = 1;
/// A distance, of a data reference.
pub const R_X86_64_PC32: u32 = 2;
/// A distance, of a call or jump.
pub const R_X86_64_PLT32: u32 = 4;
/// An address in the lowest 4 GiB: per-CPU variables of kernels where those begin at 0.
pub const R_X86_64_32: u32 = 10;
/// An address in the lowest or highest 2 GiB.
pub const R_X86_64_32S: u32 = 11;
/// A distance of 64 bits.
pub const R_X86_64_PC64: u32 = 24;

/// The bytes that a relocation writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Value {
    /// Nothing: `R_X86_64_NONE`.
    Nothing,
    /// A field of 32 bits.
    Half([u8; 4]),
    /// A field of 64 bits.
    Word([u8; 8]),
}

impl Value {
    /// The same as a slice.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        match self {
            Value::Nothing => &[],
            Value::Half(bytes) => bytes,
            Value::Word(bytes) => bytes,
        }
    }

    /// The low half of `value`.
    fn half(value: u64) -> Value {
        let [a, b, c, d, ..] = value.to_le_bytes();
        Value::Half([a, b, c, d])
    }
}

/// The value of a relocation of type `rtype` at `place` for the symbol at `symbol`.
///
/// # Errors
/// A sentence that says why not: a type that kernel modules don't have, or out of reach.
pub fn value(rtype: u32, symbol: Gva, addend: i64, place: Gva) -> Result<Value, String> {
    let value = symbol.0.wrapping_add_signed(addend);
    let distance = value.wrapping_sub(place.0);
    let out_of_reach = |limit: &str| {
        Err(format!(
            "the address {symbol} is out of reach from {place}: {} holds {limit}",
            name(rtype)
        ))
    };
    match rtype {
        R_X86_64_NONE => Ok(Value::Nothing),
        R_X86_64_64 => Ok(Value::Word(value.to_le_bytes())),
        R_X86_64_PC64 => Ok(Value::Word(distance.to_le_bytes())),
        R_X86_64_PC32 | R_X86_64_PLT32 if fits_signed(distance) => Ok(Value::half(distance)),
        R_X86_64_PC32 | R_X86_64_PLT32 => out_of_reach("2 GiB either way"),
        R_X86_64_32S if fits_signed(value) => Ok(Value::half(value)),
        R_X86_64_32S => out_of_reach("the lowest and the highest 2 GiB"),
        R_X86_64_32 if u32::try_from(value).is_ok() => Ok(Value::half(value)),
        R_X86_64_32 => out_of_reach("the lowest 4 GiB"),
        other => Err(format!(
            "relocations of type {} are not supported, nor does the kernel's module loader know \
             them; build the payload with the kernel's own flags (kbuild)",
            name(other)
        )),
    }
}

fn fits_signed(value: u64) -> bool {
    i32::try_from(value.cast_signed()).is_ok()
}

/// Name and number of a type.
fn name(rtype: u32) -> String {
    let known = match rtype {
        0 => "NONE",
        1 => "64",
        2 => "PC32",
        3 => "GOT32",
        4 => "PLT32",
        5 => "COPY",
        6 => "GLOB_DAT",
        7 => "JUMP_SLOT",
        8 => "RELATIVE",
        9 => "GOTPCREL",
        10 => "32",
        11 => "32S",
        12 => "16",
        13 => "PC16",
        14 => "8",
        15 => "PC8",
        16 => "DTPMOD64",
        17 => "DTPOFF64",
        18 => "TPOFF64",
        19 => "TLSGD",
        20 => "TLSLD",
        21 => "DTPOFF32",
        22 => "GOTTPOFF",
        23 => "TPOFF32",
        24 => "PC64",
        25 => "GOTOFF64",
        26 => "GOTPC32",
        32 => "SIZE32",
        33 => "SIZE64",
        41 => "GOTPCRELX",
        42 => "REX_GOTPCRELX",
        _ => return format!("{rtype}"),
    };
    format!("R_X86_64_{known} ({rtype})")
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLACE: Gva = Gva(0xffff_ffff_ff60_1010);

    fn written(rtype: u32, symbol: u64, addend: i64) -> Result<Vec<u8>, String> {
        value(rtype, Gva(symbol), addend, PLACE).map(|value| value.bytes().to_vec())
    }

    #[test]
    fn per_cpu_variables_are_offsets_or_addresses_and_both_are_reached() {
        // Up to Linux 6.14 their symbols are offsets into a CPU's area, absolute and small; later
        // they are addresses like others. `%gs:NAME` has an absolute or a relative relocation.
        for symbol in [0x1_f000u64, 0xffff_ffff_8312_0000] {
            let absolute = written(R_X86_64_32S, symbol, 8).unwrap();
            let at = i64::from(i32::from_le_bytes(absolute.try_into().unwrap()));
            assert_eq!(at.cast_unsigned(), symbol + 8);
            let relative = written(R_X86_64_PC32, symbol, 8 - 4).unwrap();
            let distance = i32::from_le_bytes(relative.try_into().unwrap());
            let next = PLACE.0 + 4;
            assert_eq!(next.wrapping_add_signed(distance.into()), symbol + 8);
        }
        assert_eq!(written(R_X86_64_32, 0x1_f000, 0).unwrap(), [0, 0xf0, 1, 0]);
    }

    #[test]
    fn each_type_reaches_as_far_as_the_kernel_says() {
        let two_gib = 1u64 << 31;
        for (rtype, in_reach, beyond) in [
            (
                R_X86_64_PC32,
                PLACE.0.wrapping_add(two_gib - 1),
                PLACE.0.wrapping_add(two_gib),
            ),
            (R_X86_64_PLT32, PLACE.0 - two_gib, PLACE.0 - two_gib - 1),
            (R_X86_64_32S, two_gib - 1, two_gib),
            (R_X86_64_32S, two_gib.wrapping_neg(), !two_gib),
            (R_X86_64_32, (1 << 32) - 1, 1 << 32),
        ] {
            assert_eq!(written(rtype, in_reach, 0).unwrap().len(), 4, "{rtype}");
            let error = written(rtype, beyond, 0).unwrap_err();
            assert!(error.contains("out of reach"), "{error}");
        }
        assert!(written(R_X86_64_64, 5, 0).unwrap().len() == 8);
        assert_eq!(
            written(R_X86_64_PC64, 5, 0).unwrap(),
            5u64.wrapping_sub(PLACE.0).to_le_bytes()
        );
        assert!(written(R_X86_64_NONE, 5, 0).unwrap().is_empty());
    }

    #[test]
    fn types_that_the_kernel_does_not_load_are_refused_by_name() {
        for (rtype, words) in [
            (9, "R_X86_64_GOTPCREL (9)"),
            (41, "R_X86_64_GOTPCRELX (41)"),
            (42, "R_X86_64_REX_GOTPCRELX (42)"),
            (12, "R_X86_64_16 (12)"),
            (4000, "type 4000"),
        ] {
            let error = written(rtype, 0, 0).unwrap_err();
            assert!(error.contains(words), "{error}");
        }
    }
}
