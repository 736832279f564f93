//! Settles code bytes that the kernel's own loader chooses as it loads a module.
//!
//! The compiler and objtool leave tables of places in the code; `module_finalize`
//! (arch/x86/kernel/module.c) goes through them, and then jump labels and static calls follow. Here
//! the same is done from outside, on relocated bytes, in an order that gives the same result on all
//! kernels: what may be overwritten by an alternative comes before the alternatives.
//!
//! | table | what is done |
//! |---|---|
//! | `.parainstructions` | calls through `pv_ops` become direct calls, or nothing ([`paravirt`]) |
//! | `.retpoline_sites` | as the guest's own thunks are ([`retpoline`]) |
//! | `.return_sites` | as the guest's own functions return ([`returns`]) |
//! | `.altinstructions` | by the feature bits of the guest's boot CPU ([`alternatives`]) |
//! | `.static_call_sites` | left: each calls the trampoline, which follows the key ([`static_call`]) |
//! | `__jump_table` | as each key is now ([`jump_label`]) |
//! | `.smp_locks` | left: with the prefix the code is right on any number of CPUs |
//! | `.ibt_endbr_seal` | left: an `endbr64` that nobody needs does no harm |
//! | `.call_sites` | left; refused where call depth is tracked ([`returns`]) |

pub mod alternatives;
pub mod code;
pub mod jump_label;
pub mod moved;
pub mod paravirt;
pub mod retpoline;
pub mod returns;
pub mod static_call;
#[cfg(test)]
mod testing;

use crate::error::Result;
use crate::target::redirect::Returns;
pub use code::{Code, Table};
pub use jump_label::JumpSite;
use locus_guest::addr::{Gva, Range};
use locus_kernel::cpu::Cpu;
use locus_kernel::Kernel;

/// The tables of a payload, relocated. There may be several of each kind.
#[derive(Clone, Debug, Default)]
pub struct Tables {
    /// `.altinstructions`.
    pub alternatives: Vec<Table>,
    /// `.parainstructions`.
    pub paravirt: Vec<Table>,
    /// `.retpoline_sites`.
    pub retpolines: Vec<Table>,
    /// Places of jumps to the return thunk: those of `.return_sites`, or found by relocations.
    pub returns: Vec<Gva>,
    /// `.call_sites`.
    pub calls: Vec<Table>,
    /// `.static_call_sites`.
    pub static_calls: Vec<Table>,
    /// `__jump_table`.
    pub jumps: Vec<Table>,
}

/// A place that was looked at, changed or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Its bytes.
    pub range: Range,
    /// Which table named it.
    pub table: &'static str,
}

/// What the code depends on from now on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settled {
    /// Jump labels, sorted by key and then by place, as the kernel sorts them.
    pub jumps: Vec<JumpSite>,
    /// Static keys of the kernel and its modules, and the count that each had.
    pub keys: Vec<(Gva, i32)>,
    /// All places, in no order.
    pub places: Vec<Place>,
}

/// Settles `code` by its `tables` for the guest of `kernel`, one function of which returns as
/// `returns` says.
///
/// # Errors
/// [`Class::NotApplicable`](crate::error::Class::NotApplicable)(crate::error::Error::not_applicable): a table isn't as this kernel's are, or
/// asks for what is not supported. Or the guest can't be read.
pub fn settle(
    kernel: &Kernel<'_>,
    code: &mut Code,
    tables: &Tables,
    returns: Option<Returns>,
) -> Result<Settled> {
    let mut settled = Settled::default();
    let places = &mut settled.places;
    returns::check_calls(kernel, code, &tables.calls)?;
    paravirt::apply(kernel, code, &tables.paravirt, places)?;
    retpoline::apply(kernel, code, &tables.retpolines, places)?;
    returns::apply(kernel, code, &tables.returns, returns, places)?;
    if tables.alternatives.iter().any(|t| !t.bytes.is_empty()) {
        let layout = alternatives::Layout::of(kernel)?;
        let cpu = Cpu::read(kernel)?;
        let feature = |bit: usize| (bit < 32 * cpu.words().len()).then(|| cpu.has(bit));
        alternatives::apply(
            kernel,
            code,
            &layout,
            &tables.alternatives,
            &feature,
            places,
        )?;
    }
    static_call::check(code, &tables.static_calls)?;
    jump_label::apply(kernel, code, &tables.jumps, &mut settled)?;
    Ok(settled)
}
