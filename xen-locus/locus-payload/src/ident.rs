//! The first bytes of the file (`e_ident`, `e_type`, `e_machine`): which kind of file it is.

use super::error::{PayloadErrorKind, Result};

/// Size of the ELF header (`Elf64_Ehdr`), in bytes.
const EHDR_LEN: usize = 64;

/// Checks magic, class, byte order, machine and type, so that the error is the one that says most.
pub(super) fn check(bytes: &[u8]) -> Result<()> {
    let magic = b"\x7fELF";
    if !bytes.starts_with(magic) {
        if !bytes.is_empty() && magic.starts_with(bytes) {
            return Err(truncated(bytes));
        }
        let (like, advice) = guess(bytes);
        let first: Vec<String> = bytes.iter().take(4).map(|b| format!("{b:02x}")).collect();
        let found = match first.is_empty() {
            true => "an empty file".to_owned(),
            false => format!("{}{like}", first.join(" ")),
        };
        return Err(PayloadErrorKind::NotElf { found, advice });
    }
    let byte = |at: usize| bytes.get(at).copied().ok_or_else(|| truncated(bytes));
    let half = |at: usize| Ok(u16::from_le_bytes([byte(at)?, byte(at.saturating_add(1))?]));
    match (byte(4)?, byte(5)?) {
        (2, 1) => {}
        (1, _) => {
            return Err(PayloadErrorKind::WrongClass {
                found: "32-bit (such as x86-32)",
            })
        }
        (2, 2) => {
            return Err(PayloadErrorKind::WrongClass {
                found: "64-bit big-endian",
            })
        }
        _ => {
            return Err(PayloadErrorKind::WrongClass {
                found: "values that ELF doesn't define",
            })
        }
    }
    let machine: u16 = half(18)?;
    if machine != 62 {
        return Err(PayloadErrorKind::WrongMachine {
            found: machine,
            name: machine_name(machine),
        });
    }
    let kind: u16 = half(16)?;
    if kind != 1 {
        let name = match kind {
            2 => "executable",
            3 => "shared object",
            4 => "core dump",
            _ => "unknown",
        };
        return Err(PayloadErrorKind::NotRelocatable { found: kind, name });
    }
    if bytes.len() < EHDR_LEN {
        return Err(truncated(bytes));
    }
    Ok(())
}

fn truncated(bytes: &[u8]) -> PayloadErrorKind {
    PayloadErrorKind::Truncated {
        what: "the ELF header".into(),
        need: EHDR_LEN as u64,
        have: bytes.len() as u64,
    }
}

/// Usual name of an `e_machine`.
fn machine_name(machine: u16) -> &'static str {
    match machine {
        3 => "x86-32",
        21 => "ppc64",
        22 => "s390",
        40 => "arm",
        183 => "arm64",
        243 => "RISC-V",
        258 => "LoongArch",
        _ => "another",
    }
}

/// What a file looks like that is not ELF, and what to do about it.
fn guess(bytes: &[u8]) -> (&'static str, &'static str) {
    let unpack = "unpack it first";
    let give = "give the path of a livepatch module (.ko)";
    if bytes.starts_with(b"\xfd7zXZ\0") {
        (", an xz archive", unpack)
    } else if bytes.starts_with(b"\x1f\x8b") {
        (", a gzip archive", unpack)
    } else if bytes.starts_with(b"\x28\xb5\x2f\xfd") {
        (", a zstd archive", unpack)
    } else if bytes.starts_with(b"--- ") || bytes.starts_with(b"diff ") {
        (", a source patch", "build a livepatch module from it")
    } else {
        ("", give)
    }
}
