//! Indirect branches through a thunk, `call __x86_indirect_thunk_REG`: as `call *%REG` in place where
//! the guest needs no thunk.
//!
//! The thunk is right everywhere, as the kernel's alternatives have made it what this CPU needs. So
//! what it has become tells what the kernel chose for itself, whatever the feature bits are called:
//! `jmp *%REG` (no retpolines), `lfence; jmp *%REG`, or else. Where the CPU wants indirect branches in
//! the upper half of a cache line (ITS), the kernel goes through other thunks, and so do we.
//!
//! Source: `apply_retpolines`, `patch_retpoline` (arch/x86/kernel/alternative.c).

use iced_x86::{Decoder, DecoderOptions, Mnemonic, OpKind};
use locus_guest::addr::{Gva, Range};
use locus_kernel::Kernel;

use super::code::{relative, target, Code, Table};
use super::{returns, Place};
use crate::error::Result;
use crate::x86::{self, branch};

const TABLE: &str = ".retpoline_sites";
/// Names of registers by number.
const REGISTERS: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13",
    "r14", "r15",
];
const LFENCE: [u8; 3] = [0x0f, 0xae, 0xe8];
const CALL: u8 = 0xe8;
const JMP: u8 = 0xe9;

/// What the guest's kernel made of a thunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Thunk {
    /// `jmp *%REG`.
    Plain,
    /// `lfence; jmp *%REG`.
    Lfence,
    /// A retpoline, or what we don't know.
    Other,
}

/// The thunks of the guest.
struct Thunks {
    /// By number of the register: where it is, and what.
    all: Vec<(usize, Gva, Thunk)>,
    /// Those whose branch stands in the upper half of a cache line, where they are wanted.
    upper: Option<Vec<(usize, Gva)>>,
}

impl Thunks {
    fn of(kernel: &Kernel<'_>) -> Result<Thunks> {
        let named = |prefix: &str| {
            let address = |(n, reg): (usize, &&str)| {
                Some((n, kernel.symbols.addr(&format!("{prefix}{reg}"))?))
            };
            REGISTERS
                .iter()
                .enumerate()
                .filter_map(address)
                .collect::<Vec<_>>()
        };
        let mut all = Vec::new();
        for (reg, at) in named("__x86_indirect_thunk_") {
            all.push((reg, at, look(&kernel.space.read_vec(at, 16)?)));
        }
        // Both mitigations of ITS go together (arch/x86/kernel/cpu/bugs.c: its_select_mitigation).
        let its = returns::chosen(kernel)?
            .filter(|&to| kernel.symbols.addr("its_return_thunk") == Some(to));
        Ok(Thunks {
            all,
            upper: its.map(|_| named("__x86_indirect_its_thunk_")),
        })
    }
}

/// Tells what the code of a thunk does first.
fn look(code: &[u8]) -> Thunk {
    let mut fenced = false;
    for i in Decoder::new(64, code, DecoderOptions::NONE).iter() {
        match i.mnemonic() {
            Mnemonic::Endbr64 | Mnemonic::Nop => {}
            Mnemonic::Lfence => fenced = true,
            Mnemonic::Jmp if i.op0_kind() == OpKind::Register && fenced => return Thunk::Lfence,
            Mnemonic::Jmp if i.op0_kind() == OpKind::Register => return Thunk::Plain,
            _ => break,
        }
    }
    Thunk::Other
}

/// Rewrites the sites in `tables` that need no thunk in this guest.
///
/// # Errors
/// [`Class::NotApplicable`](crate::error::Class::NotApplicable)(crate::error::Error::not_applicable): an entry names what is no call or jump to a
/// thunk.
pub fn apply(
    kernel: &Kernel<'_>,
    code: &mut Code,
    tables: &[Table],
    places: &mut Vec<Place>,
) -> Result<()> {
    if tables.iter().all(|t| t.bytes.is_empty()) {
        return Ok(());
    }
    let thunks = Thunks::of(kernel)?;
    for table in tables {
        let entries: Vec<_> = table.entries(code, TABLE, 4)?.collect();
        for (entry, bytes) in entries {
            let at = relative(entry, bytes, 0).unwrap_or(entry);
            if code.runs(at, TABLE)? {
                let len = one(code, &thunks, at)?;
                places.push(Place {
                    range: Range::new(at, len as u64),
                    table: TABLE,
                });
            }
        }
    }
    Ok(())
}

/// Settles one site, and says how long it is.
fn one(code: &mut Code, thunks: &Thunks, at: Gva) -> Result<usize> {
    // A prefix may make room for a longer instruction.
    let prefix = usize::from(code.live(at, 1, TABLE)?.first() == Some(&0x2e));
    let opcode = code
        .live(at.plus(prefix as u64), 1, TABLE)?
        .first()
        .copied()
        .unwrap_or(0);
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
    let Some(&(reg, _, thunk)) = thunks.all.iter().find(|t| Some(t.1) == to) else {
        // Thunks that count calls, and others that are no plain ones, stay.
        return Ok(len);
    };
    if let (Some(upper), Thunk::Plain | Thunk::Lfence) = (&thunks.upper, thunk) {
        let other = upper.iter().find(|t| t.0 == reg).map(|t| t.1);
        let place = at.plus(prefix as u64);
        if let Some(new) = other.and_then(|to| branch(opcode, place, to)) {
            code.put(place, &new)?;
        }
        return Ok(len);
    }
    let mut new = match thunk {
        Thunk::Plain => Vec::new(),
        Thunk::Lfence => LFENCE.to_vec(),
        Thunk::Other => return Ok(len),
    };
    new.extend(indirect(opcode, reg));
    if new.len() > len {
        return Ok(len);
    }
    if opcode == JMP && new.len() < len {
        new.push(0xcc);
    }
    new.resize(len, 0x90);
    x86::join(&mut new);
    code.put(at, &new)?;
    Ok(len)
}

/// `call *%REG` or `jmp *%REG`.
fn indirect(opcode: u8, reg: usize) -> Vec<u8> {
    let low = u8::try_from(reg % 8).unwrap_or(0);
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

    fn settled(thunk: &[u8], site: &[u8], its: bool) -> Result<Vec<u8>> {
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
            apply(kernel, &mut code, &[Table { at, bytes }], places)?;
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
            settled(&PLAIN, &old, false).unwrap(),
            [0xff, 0xd0, 0x0f, 0x1f, 0]
        );
        assert_eq!(
            settled(&FENCED, &old, false).unwrap(),
            [0x0f, 0xae, 0xe8, 0xff, 0xd0]
        );
        assert_eq!(settled(&RETPOLINE, &old, false).unwrap(), old);
        let old = site(JMP, AX, false);
        let new = settled(&PLAIN, &old, false).unwrap();
        assert_eq!(new, [0xff, 0xe0, 0xcc, 0x66, 0x90]);
        // Higher registers take a byte more, which only a prefix makes room for.
        let old = site(CALL, R11, false);
        assert_eq!(
            settled(&PLAIN, &old, false).unwrap(),
            [0x41, 0xff, 0xd3, 0x66, 0x90]
        );
        assert_eq!(settled(&FENCED, &old, false).unwrap(), old);
        let old = site(CALL, R11, true);
        let new = settled(&FENCED, &old, false).unwrap();
        assert_eq!(new, [0x0f, 0xae, 0xe8, 0x41, 0xff, 0xd3]);
    }

    #[test]
    fn where_branches_belong_into_upper_halves_the_thunks_there_are_taken() {
        let new = settled(&PLAIN, &site(CALL, AX, true), true).unwrap();
        assert_eq!(new, site(CALL, UPPER, true));
        // Retpolines stay what they are.
        let old = site(JMP, AX, false);
        assert_eq!(settled(&RETPOLINE, &old, true).unwrap(), old);
    }

    #[test]
    fn other_branches_stay_and_what_is_none_is_refused() {
        let other = site(CALL, UPPER, false);
        assert_eq!(settled(&PLAIN, &other, false).unwrap(), other);
        let error = settled(&PLAIN, &[0x31, 0xc0], false)
            .unwrap_err()
            .to_string();
        assert!(error.contains("0x31 is no call or jump"), "{error}");
    }
}
