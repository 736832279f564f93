//! LKRG (Linux Kernel Runtime Guard, <https://lkrg.org>): a guest that has it panics when its code is changed from outside.

use locus_kernel::modules::ModuleReader;
use locus_kernel::Kernel;

use crate::error::{Error, Result};

/// Names of its module, today's and a former one.
const MODULES: [&str; 2] = ["lkrg", "p_lkrg"];
/// Functions that it has had in all versions (src/modules/integrity_timer/p_integrity_timer.h). If the kernel's image has one,
/// LKRG is built in.
const FUNCTIONS: [&str; 2] = ["p_integrity_timer", "p_check_integrity"];

/// Refuses a guest in which a change of the kernel's code from outside ends in a panic: it has LKRG, which hashes the code
/// of the kernel and of all modules, every 15 seconds and at random moments, and by default panics where a hash differs. It
/// follows the changes that the kernel makes, and no others. To revert is such a change too, if LKRG was loaded while a
/// patch was in force.
///
/// LKRG can take its module out of the guest's list (its parameter `hide`, off by default). Then it is not seen.
///
/// # Errors
/// [`Class::NotApplicable`](crate::error::Class::NotApplicable): its module is loaded, or it is built into the kernel. Or
/// the guest's modules can't be read.
pub fn check_absent(kernel: &Kernel<'_>) -> Result<()> {
    let built_in = |name: &&&str| kernel.symbols.addr(name).is_some();
    if let Some(name) = FUNCTIONS.iter().find(built_in) {
        return Err(Error::not_applicable(format!(
            "LKRG is built into the guest's kernel, which has the function {name}: it hashes the kernel's code and by default \
             panics within seconds after it was changed from outside; expected a kernel without it. Boot the guest with \
             such a one; nothing was changed"
        )));
    }
    if kernel.symbols.addr("modules").is_none() {
        // This kernel can't have modules.
        return Ok(());
    }
    let all = ModuleReader::new(kernel)?.all()?;
    let Some(found) = all.iter().find(|m| MODULES.contains(&&*m.name)) else {
        return Ok(());
    };
    Err(Error::not_applicable(format!(
        "the guest has the module {} (LKRG), which hashes the kernel's code and by default panics within seconds after \
         it was changed from outside; expected no such module. Unload it in the guest first (rmmod {}); nothing was \
         changed",
        found.name, found.name
    )))
}
