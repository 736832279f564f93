//! Tables of the places that the kernel rewrites while it runs: in its own image, and lock prefixes of modules.

use locus_guest::addr::{Gva, Range};
use locus_kernel::modules::{Rewritten, JUMP_LABEL, MODULES_MAX};
use locus_kernel::{self as kernel, Kernel};

use crate::error::Result;

/// What the kernel rewrites when a guest of one CPU gets more.
pub const LOCK_PREFIX: &str = "lock prefix";

/// The lock prefixes of the module at `module`, or of the kernel if that is 0, which the kernel
/// rewrites when a guest of one CPU gets more: `smp_alt_modules` of arch/x86/kernel/alternative.c.
/// `None` if that can't be known.
///
/// # Errors
/// The list can't be read.
pub fn lock_prefixes(kernel: &Kernel<'_>, module: Gva) -> Result<Option<Vec<Rewritten>>> {
    let (Some(head), Ok(btf)) = (kernel.symbols.addr("smp_alt_modules"), kernel.btf()) else {
        return Ok(None);
    };
    let member = |name| btf.offset_of_sized("smp_alt_module", name, 8);
    let (Ok(owner), Ok(locks), Ok(end), Ok(next)) = (
        member("mod"),
        member("locks"),
        member("locks_end"),
        btf.offset_of("smp_alt_module", "next"),
    ) else {
        return Ok(None);
    };
    let space = &kernel.space;
    let mut found = Vec::new();
    for at in kernel::list(space, head, MODULES_MAX)? {
        let word =
            |offset: usize| space.read_u64(Gva(at.0.wrapping_sub(next as u64)).plus(offset as u64));
        if Gva(word(owner)?) == module {
            let start = Gva(word(locks)?);
            found.push(Rewritten {
                what: LOCK_PREFIX,
                table: Range::new(start, word(end)?.saturating_sub(start.0)),
                entry: 4,
            });
        }
    }
    Ok(Some(found))
}

/// The tables of the kernel's image.
#[must_use]
pub fn rewritten(kernel: &Kernel<'_>) -> Vec<Rewritten> {
    // Names of their start and end, size of an entry.
    [
        (
            JUMP_LABEL,
            "__start___jump_table",
            "__stop___jump_table",
            16,
        ),
        (
            "static call",
            "__start_static_call_sites",
            "__stop_static_call_sites",
            8,
        ),
        (LOCK_PREFIX, "__smp_locks", "__smp_locks_end", 4),
    ]
    .into_iter()
    .filter_map(|(what, start, stop, entry)| {
        let start = kernel.symbols.addr(start)?;
        let len = kernel.symbols.addr(stop)?.0.saturating_sub(start.0);
        let table = Range::new(start, len);
        Some(Rewritten { what, table, entry })
    })
    .collect()
}
