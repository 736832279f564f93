//! The object that a function belongs to: the kernel, or one of its modules.

use locus_guest::addr::Gva;
use locus_kernel::modules::{Module, ModuleSymbol, Rewritten};
use locus_kernel::split_functions::OneFunction;
use locus_kernel::Kernel;

use super::{not_applicable, PER_UNIT};
use crate::error::Result;
use crate::target::rewritten::{check_forms, lock_prefixes, rewritten, LOCK_PREFIX};

/// The object that a function belongs to.
#[derive(Clone, Copy, Debug)]
pub enum Object<'a> {
    /// The kernel's image.
    Kernel,
    /// A module, and its symbols.
    Module(&'a Module, &'a [ModuleSymbol]),
}

impl Object<'_> {
    /// Bytes from `at` to the next symbol of the same object, or to the end of its memory.
    #[must_use]
    pub fn room(&self, kernel: &Kernel<'_>, at: Gva) -> u64 {
        match self {
            // No symbol is at `at`, or none follows: no bytes are known to belong to it.
            Object::Kernel => kernel.symbols.room(at).unwrap_or(0),
            Object::Module(module, symbols) => {
                let part = module.parts.iter().find(|p| p.range.contains(at));
                let end = part.map_or(at, |p| p.range.end);
                let next = symbols.iter().map(|s| s.addr).filter(|&a| a > at).min();
                next.map_or(end, |next| next.min(end)).0 - at.0
            }
        }
    }

    /// Addresses of the parts of the function at `entry` that the compiler put elsewhere, by any of its names: see
    /// [`split_functions`](locus_kernel::split_functions). Parts of another function of the same name may be among them.
    ///
    /// # Errors
    /// [`Class::NotApplicable`](crate::error::Class::NotApplicable): there are more names or parts than a function can have.
    /// Or the guest's budget is spent.
    pub fn cold_parts(&self, kernel: &Kernel<'_>, entry: Gva) -> Result<Vec<Gva>> {
        let cost = match self {
            Object::Kernel => kernel.symbols.cold_parts_cost(),
            Object::Module(_, symbols) => symbols.len() as u64 / PER_UNIT,
        };
        kernel.space.budget().spend(cost)?;
        match self {
            Object::Kernel => kernel.symbols.cold_parts(entry).map_err(not_applicable),
            Object::Module(_, symbols) => {
                let mut function = OneFunction::new(entry);
                for symbol in symbols.iter().filter(|s| s.addr == entry) {
                    function.named(&symbol.name).map_err(not_applicable)?;
                }
                for symbol in *symbols {
                    let found = function.part(&symbol.name, symbol.addr);
                    found.map_err(not_applicable)?;
                }
                // Whoever asks for the parts asks for the room of each, and that is another pass.
                let parts = function.parts.len() as u64;
                kernel.space.budget().spend(cost.saturating_mul(parts))?;
                Ok(function.parts.into_iter().collect())
            }
        }
    }

    /// Whether the guest may execute the page at `at`, which must belong to this object.
    ///
    /// # Errors
    /// The page tables can't be read.
    pub fn executable(&self, kernel: &Kernel<'_>, at: Gva) -> Result<bool> {
        match self {
            Object::Kernel => Ok(kernel
                .regions
                .iter()
                .any(|r| r.executable && !r.writable && r.range.contains(at))),
            // Modules come and go, so does what maps them.
            Object::Module(module, _) => Ok(module.parts.iter().any(|p| p.range.contains(at))
                && kernel.space.fresh().walk(at)?.executable),
        }
    }

    /// The tables of places in it that the kernel rewrites while it runs.
    ///
    /// # Errors
    /// The list of modules with lock prefixes can't be read, or the tables are not as they are known: see
    /// [`check_forms`].
    pub fn rewritten(&self, kernel: &Kernel<'_>) -> Result<Vec<Rewritten>> {
        let all = match self {
            Object::Kernel => {
                let mut all = rewritten(kernel)?;
                if let Some(locks) = lock_prefixes(kernel, Gva(0))? {
                    // The table itself may be freed memory.
                    all.retain(|r| r.what != LOCK_PREFIX);
                    all.extend(locks);
                }
                all
            }
            Object::Module(module, _) => {
                let mut all = module.rewritten.clone();
                // Without the list there are none: the kernel has no SMP alternatives.
                all.extend(lock_prefixes(kernel, module.addr)?.unwrap_or_default());
                all
            }
        };
        check_forms(kernel, &all)?;
        Ok(all)
    }
}
