//! Code of the guest that changes lists in which a payload is, without a lock that it could be seen to hold.

use locus_guest::addr::Range;
use locus_kernel::Kernel;

use crate::error::Result;
use crate::quiesce::Watched;
use crate::target::symbols::Object;

/// The functions that change the list of modules with `BUG` sites, which no lock protects
/// (lib/bug.c). They call nothing, so a thread in them was interrupted there. Behind each: where it is if it was inlined.
const UNLOCKED: [(&str, &[&str]); 2] = [
    ("module_bug_finalize", &["load_module"]),
    ("module_bug_cleanup", &["load_module", "free_module"]),
];

/// The functions that change the guest's lists without a lock, or those that have them inlined.
///
/// # Errors
/// The kernel has neither as symbols.
pub(super) fn code(kernel: &Kernel<'_>) -> Result<Vec<Watched>> {
    let mut all = Vec::new();
    for (name, callers) in UNLOCKED {
        let own = [name];
        let is_there = kernel.symbols.addr(name).is_some();
        for name in if is_there { &own } else { callers } {
            let at = kernel.symbols.need(name)?;
            for at in std::iter::once(at).chain(Object::Kernel.cold_parts(kernel, at)?) {
                let len = kernel.symbols.room(at).unwrap_or(1);
                all.push(Watched::new(Range::new(at, len), *name));
            }
        }
    }
    Ok(all)
}
