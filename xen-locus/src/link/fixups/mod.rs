//! Chooses the code bytes that the kernel's own loader chooses when it loads a module.
//!
//! The compiler and objtool leave tables of places in the code. `module_finalize`
//! (arch/x86/kernel/module.c) goes through them, and then jump labels and static calls follow. Here
//! the same is done from outside, on relocated bytes. The order gives the same result on all kernels: what
//! an alternative may overwrite comes before the alternatives.
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
//! | `.ibt_endbr_seal` | left: an `endbr64` that is not needed does no harm |
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

use locus_guest::addr::{Gva, Range};
use locus_kernel::cpu::Cpu;
use locus_kernel::Kernel;

use crate::error::Result;
use crate::target::redirect::Returns;
use crate::target::rewritten::STATIC_CALL_SITE;
pub use code::{relative, target, FixupTable, LinkedCode, Runs};
pub use jump_label::JumpLabel;

/// The tables of a payload, relocated. There may be several of each kind.
#[derive(Clone, Debug, Default)]
pub struct FixupTables {
    /// `.altinstructions`.
    pub alternatives: Vec<FixupTable>,
    /// `.parainstructions`.
    pub paravirt: Vec<FixupTable>,
    /// `.retpoline_sites`.
    pub retpolines: Vec<FixupTable>,
    /// Places of jumps to the return thunk: those of `.return_sites`, or found by relocations.
    pub returns: Vec<Gva>,
    /// `.call_sites`.
    pub calls: Vec<FixupTable>,
    /// `.static_call_sites`.
    pub static_calls: Vec<FixupTable>,
    /// `__jump_table`.
    pub jumps: Vec<FixupTable>,
}

/// A place in the code that a table names, changed or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FixupPlace {
    /// The addresses of its bytes.
    pub range: Range,
    /// Name of the table's section.
    pub table: &'static str,
}

impl FixupPlace {
    /// The `len` bytes at `at`.
    fn new(at: Gva, len: u64, table: &'static str) -> FixupPlace {
        FixupPlace {
            range: Range::new(at, len),
            table,
        }
    }
}

/// A static key of the kernel or of a module.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct KeyCount {
    /// Address of the `struct static_key`.
    pub key: Gva,
    /// Its count when the jump labels were set: 0 is off, all else is on.
    pub count: i32,
}

/// What was done to the code, and what it depends on from now on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AppliedFixups {
    /// Jump labels, sorted by key and then by place, as the kernel sorts them.
    pub jumps: Vec<JumpLabel>,
    /// Static keys of the kernel and its modules that the jump labels follow, sorted by address.
    pub keys: Vec<KeyCount>,
    /// All places, in no order.
    pub places: Vec<FixupPlace>,
}

/// Changes `code` as its `tables` say for the guest of `kernel`, one function of which returns as
/// `returns` says.
///
/// # Errors
/// [`Class::NotApplicable`](crate::error::Class::NotApplicable): a table isn't as this kernel's are, or
/// asks for what is not supported. Or the guest can't be read.
pub fn apply_fixups(
    kernel: &Kernel<'_>,
    code: &mut LinkedCode,
    tables: &FixupTables,
    returns: Option<Returns>,
) -> Result<AppliedFixups> {
    let mut done = AppliedFixups::default();
    let places = &mut done.places;
    returns::check_calls(kernel, code, &tables.calls)?;
    paravirt::apply(kernel, code, &tables.paravirt, places)?;
    retpoline::apply(kernel, code, &tables.retpolines, places)?;
    returns::apply(kernel, code, &tables.returns, returns, places)?;
    if tables.alternatives.iter().any(|t| !t.bytes.is_empty()) {
        let layout = alternatives::AltInstrLayout::of(kernel)?;
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
    if tables.static_calls.iter().any(|t| !t.bytes.is_empty()) {
        STATIC_CALL_SITE.check(kernel.btf()?)?;
    }
    static_call::check(code, &tables.static_calls)?;
    jump_label::apply(kernel, code, &tables.jumps, &mut done)?;
    Ok(done)
}

/// The kernel's name for an address, as `SYMBOL+0xOFFSET`; the address itself where it has none.
fn name_of(kernel: &Kernel<'_>, at: Gva) -> String {
    kernel.symbols.covering(at).map_or_else(
        || at.to_string(),
        |(name, offset)| format!("{name}+{offset:#x}"),
    )
}
