//! Static calls: `call __SCT__NAME`, which the kernel's inline static calls would turn into a call of
//! the function itself.
//!
//! They are left to call the trampoline `__SCT__NAME`. That is right for good, also when the key
//! changes later: `__static_call_update` (kernel/static_call_inline.c) rewrites the trampoline of each
//! key before any site, for a function (`jmp`), for none (`ret`, or a jump to the return thunk) and
//! for `__static_call_return0` (a jump to it), on all kernels since v5.10
//! (arch/x86/kernel/static_call.c: `arch_static_call_transform`). A tail call is a jump to the
//! trampoline, and as right. So nothing has to be registered, and a payload's code costs one jump more
//! than the kernel's own.

use super::code::{relative, FixupTable, LinkedCode};
use crate::error::Result;

const TABLE: &str = ".static_call_sites";
/// A site: its place and its key, each as a distance from itself.
const SIZE: usize = 8;

/// Checks that each site still is a call or jump of its trampoline.
///
/// # Errors
/// [`Class::NotApplicable`](crate::error::Class::NotApplicable) when one is something else.
pub fn check(code: &LinkedCode, tables: &[FixupTable]) -> Result<()> {
    for table in tables {
        for (entry, bytes) in table.entries(code, TABLE, SIZE)? {
            let Some(at) = relative(entry, bytes, 0) else {
                return Err(code.no(&format!("an entry of {TABLE} is cut short")));
            };
            if !code.runs(at, TABLE)? {
                continue;
            }
            let branches = matches!(
                code.live(at, 5, TABLE)?,
                [0xe8 | 0xe9, ..] | [0x0f, 0x80..=0x8f, ..]
            );
            if !branches {
                return Err(code.no(&format!(
                    "the static call at {at} is no call or jump of its trampoline"
                )));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::link::fixups::testing::{code, put32, BASE};

    #[test]
    fn calls_and_jumps_of_trampolines_stay_and_others_are_refused() {
        for (bytes, good) in [
            ([0xe8, 0, 0, 0, 0, 0], true),
            ([0xe9, 0, 0, 0, 0, 0], true),
            ([0x0f, 0x84, 0, 0, 0, 0], true),
            ([0x0f, 0x1f, 0x44, 0, 0, 0], false),
            ([0xc3, 0xcc, 0xcc, 0xcc, 0xcc, 0], false),
        ] {
            let code = code(&bytes);
            let at = BASE.plus(0x100);
            let mut entry = Vec::new();
            put32(&mut entry, at, BASE);
            put32(&mut entry, at.plus(4), BASE.plus(0x200));
            let checked = check(&code, &[FixupTable { at, bytes: entry }]);
            assert_eq!(checked.is_ok(), good, "{bytes:02x?}");
            assert_eq!(code.bytes, bytes);
        }
    }
}
