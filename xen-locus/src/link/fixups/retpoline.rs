//! Indirect branches through a thunk, `call __x86_indirect_thunk_REG`: as `call *%REG` in place where
//! the guest needs no thunk.
//!
//! The thunk is right everywhere, because the kernel's alternatives have made it what this CPU needs. So the
//! thunk's code shows what the kernel chose for itself, whatever the feature bits are called: `jmp *%REG` (no
//! retpolines), `lfence; jmp *%REG`, or something else. Where the CPU needs indirect branches in the upper
//! half of a cache line (ITS), the kernel goes through other thunks, and so does the payload.
//!
//! Source: `apply_retpolines`, `patch_retpoline` (arch/x86/kernel/alternative.c).

use iced_x86::{Decoder, DecoderOptions, Mnemonic, OpKind};
use locus_guest::addr::Gva;
use locus_kernel::Kernel;

use super::code::{are_empty, relative, target, FixupTable, LinkedCode};
use super::{returns, FixupPlace};
use crate::error::{Error, Result};
use crate::x86::{self, branch, CALL, INT3, JMP, NOP1};

const TABLE: &str = ".retpoline_sites";
/// Names of registers by number.
const REGISTERS: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13",
    "r14", "r15",
];
const LFENCE: [u8; 3] = [0x0f, 0xae, 0xe8];
/// The segment prefix that makes room for a longer instruction.
const PREFIX: u8 = 0x2e;

/// What the guest's kernel made of a thunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ThunkCode {
    /// `jmp *%REG`.
    Plain,
    /// `lfence; jmp *%REG`.
    Lfence,
    /// A retpoline, or code that is not known.
    Other,
}

/// A thunk of the guest.
struct Thunk {
    /// Number of its register.
    register: usize,
    /// Its address.
    at: Gva,
    code: ThunkCode,
}

/// The thunks of the guest.
struct Thunks {
    all: Vec<Thunk>,
    /// Those whose branch is in the upper half of a cache line, where the guest uses them.
    upper: Option<Vec<Thunk>>,
}

impl Thunks {
    fn of(kernel: &Kernel<'_>) -> Result<Thunks> {
        let named = |prefix: &str| -> Result<Vec<Thunk>> {
            let mut found = Vec::new();
            for (register, name) in REGISTERS.iter().enumerate() {
                if let Some(at) = kernel.symbols.addr(&format!("{prefix}{name}")) {
                    let code = first_branch(&kernel.space.read_vec(at, 16)?);
                    found.push(Thunk { register, at, code });
                }
            }
            Ok(found)
        };
        // Both mitigations of ITS go together (arch/x86/kernel/cpu/bugs.c: its_select_mitigation).
        let its = returns::chosen(kernel)?
            .filter(|&to| kernel.symbols.addr("its_return_thunk") == Some(to));
        Ok(Thunks {
            all: named("__x86_indirect_thunk_")?,
            upper: match its {
                Some(_) => Some(named("__x86_indirect_its_thunk_")?),
                None => None,
            },
        })
    }
}

/// Tells what the code of a thunk does first.
fn first_branch(code: &[u8]) -> ThunkCode {
    let mut fenced = false;
    for i in Decoder::new(64, code, DecoderOptions::NONE).iter() {
        match i.mnemonic() {
            Mnemonic::Endbr64 | Mnemonic::Nop => {}
            Mnemonic::Lfence => fenced = true,
            Mnemonic::Jmp if i.op0_kind() == OpKind::Register && fenced => {
                return ThunkCode::Lfence
            }
            Mnemonic::Jmp if i.op0_kind() == OpKind::Register => return ThunkCode::Plain,
            _ => break,
        }
    }
    ThunkCode::Other
}

/// Rewrites the sites in `tables` that need no thunk in this guest.
///
/// # Errors
/// [`Class::NotApplicable`](crate::error::Class::NotApplicable): an entry names what is no call or jump to a
/// thunk.
pub fn apply(
    kernel: &Kernel<'_>,
    code: &mut LinkedCode,
    tables: &[FixupTable],
    places: &mut Vec<FixupPlace>,
) -> Result<()> {
    if are_empty(tables) {
        return Ok(());
    }
    let thunks = Thunks::of(kernel)?;
    for table in tables {
        let entries: Vec<_> = table.entries(code, TABLE, 4)?.collect();
        for (entry, bytes) in entries {
            let Some(at) = relative(entry, bytes, 0) else {
                return Err(code.no(&format!("an entry of {TABLE} is cut short")));
            };
            if code.runs(at, TABLE)? {
                let len = one(code, &thunks, at)?;
                places.push(FixupPlace::new(at, len as u64, TABLE));
            }
        }
    }
    Ok(())
}

/// Patches one site, and returns its length in bytes.
fn one(code: &mut LinkedCode, thunks: &Thunks, at: Gva) -> Result<usize> {
    let byte =
        |code: &LinkedCode, at: Gva| Ok::<_, Error>(code.live(at, 1, TABLE)?.first().copied());
    let prefix = usize::from(byte(code, at)? == Some(PREFIX));
    // One live byte was asked for, so there is one.
    let opcode = byte(code, at.plus(prefix as u64))?.unwrap_or_default();
    let len = match opcode {
        CALL | JMP => prefix + 5,
        // A conditional jump, of Clang: it goes on through the thunk.
        0x0f => return Ok(6),
        _ => {
            let no =
                format!("an entry of {TABLE} names {at}, where {opcode:#04x} is no call or jump");
            return Err(code.no(&no));
        }
    };
    let to = target(at, code.live(at, len, TABLE)?);
    let Some(thunk) = thunks.all.iter().find(|t| Some(t.at) == to) else {
        // Thunks that count calls, and others that are no plain ones, stay.
        return Ok(len);
    };
    if let (Some(upper), ThunkCode::Plain | ThunkCode::Lfence) = (&thunks.upper, thunk.code) {
        let other = upper.iter().find(|t| t.register == thunk.register);
        let other = other.map(|t| t.at);
        let place = at.plus(prefix as u64);
        if let Some(new) = other.and_then(|to| branch(opcode, place, to)) {
            code.put(place, &new)?;
        }
        return Ok(len);
    }
    let mut new = match thunk.code {
        ThunkCode::Plain => Vec::new(),
        ThunkCode::Lfence => LFENCE.to_vec(),
        ThunkCode::Other => return Ok(len),
    };
    new.extend(indirect(opcode, thunk.register));
    if new.len() > len {
        return Ok(len);
    }
    if opcode == JMP && new.len() < len {
        new.push(INT3);
    }
    new.resize(len, NOP1);
    x86::join(&mut new);
    code.put(at, &new)?;
    Ok(len)
}

/// `call *%REG` or `jmp *%REG`.
fn indirect(opcode: u8, reg: usize) -> Vec<u8> {
    // A number below 8 is a byte.
    let low = u8::try_from(reg % 8).unwrap_or_default();
    let form = if opcode == CALL { 0xd0 } else { 0xe0 };
    let mut out = Vec::new();
    if reg >= 8 {
        out.push(0x41);
    }
    out.extend([0xff, form | low]);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::link::fixups::testing::{code, put32, with, BASE, FUNCTIONS};
    use locus_guest::addr::Range;

    /// Thunks of %rax and %r11, of this code, and those for ITS.
    const AX: Gva = Gva(FUNCTIONS.0 + 0x100);
    const R11: Gva = Gva(FUNCTIONS.0 + 0x140);
    const UPPER: Gva = Gva(FUNCTIONS.0 + 0x180);

    fn site(opcode: u8, to: Gva, prefix: bool) -> Vec<u8> {
        let mut out = vec![0x2e; usize::from(prefix)];
        let at = BASE.plus(out.len() as u64);
        out.extend(branch(opcode, at, to).unwrap());
        out
    }

    fn patched(thunk: &[u8], site: &[u8], its: bool) -> Result<Vec<u8>> {
        let change = |f: &mut locus_kernel::fixture::Fixture| {
            for (at, reg) in [(AX, "rax"), (R11, "r11")] {
                f.function(at.0, &format!("__x86_indirect_thunk_{reg}"), thunk);
            }
            f.function(UPPER.0, "__x86_indirect_its_thunk_rax", &[0xff, 0xe0, 0xcc]);
            if its {
                f.function(UPPER.0 + 0x20, "its_return_thunk", &[0xc3, 0xcc]);
            }
        };
        with(&[], change, |kernel| {
            let mut code = code(&[site, &[0xcc; 8]].concat());
            let at = BASE.plus(0x100);
            let mut bytes = Vec::new();
            put32(&mut bytes, at, BASE);
            let places = &mut Vec::new();
            apply(kernel, &mut code, &[FixupTable { at, bytes }], places)?;
            assert_eq!(places[0].range, Range::new(BASE, site.len() as u64));
            assert_eq!(code.bytes[site.len()..], [0xcc; 8]);
            Ok(code.bytes[..site.len()].to_vec())
        })
    }

    const PLAIN: [u8; 6] = [0xff, 0xe0, 0x90, 0x90, 0x90, 0x90];
    const FENCED: [u8; 6] = [0x0f, 0xae, 0xe8, 0xff, 0xe0, 0xcc];
    const RETPOLINE: [u8; 5] = [0xe8, 7, 0, 0, 0];

    #[test]
    fn sites_follow_what_the_guest_made_of_its_thunks() {
        let old = site(CALL, AX, false);
        assert_eq!(
            patched(&PLAIN, &old, false).unwrap(),
            [0xff, 0xd0, 0x0f, 0x1f, 0]
        );
        assert_eq!(
            patched(&FENCED, &old, false).unwrap(),
            [0x0f, 0xae, 0xe8, 0xff, 0xd0]
        );
        assert_eq!(patched(&RETPOLINE, &old, false).unwrap(), old);
        let old = site(JMP, AX, false);
        let new = patched(&PLAIN, &old, false).unwrap();
        assert_eq!(new, [0xff, 0xe0, 0xcc, 0x66, 0x90]);
        // Higher registers take a byte more, which only a prefix makes room for.
        let old = site(CALL, R11, false);
        assert_eq!(
            patched(&PLAIN, &old, false).unwrap(),
            [0x41, 0xff, 0xd3, 0x66, 0x90]
        );
        assert_eq!(patched(&FENCED, &old, false).unwrap(), old);
        let old = site(CALL, R11, true);
        let new = patched(&FENCED, &old, false).unwrap();
        assert_eq!(new, [0x0f, 0xae, 0xe8, 0x41, 0xff, 0xd3]);
    }

    #[test]
    fn where_branches_belong_into_upper_halves_the_thunks_there_are_taken() {
        let new = patched(&PLAIN, &site(CALL, AX, true), true).unwrap();
        assert_eq!(new, site(CALL, UPPER, true));
        // Retpolines stay what they are.
        let old = site(JMP, AX, false);
        assert_eq!(patched(&RETPOLINE, &old, true).unwrap(), old);
    }

    #[test]
    fn other_branches_stay_and_what_is_none_is_refused() {
        let other = site(CALL, UPPER, false);
        assert_eq!(patched(&PLAIN, &other, false).unwrap(), other);
        let error = patched(&PLAIN, &[0x31, 0xc0], false)
            .unwrap_err()
            .to_string();
        assert!(error.contains("0x31 is no call or jump"), "{error}");
    }
}
