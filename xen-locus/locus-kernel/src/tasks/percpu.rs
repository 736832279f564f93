//! Per-CPU variables: where each CPU has its own, and some that tell of tasks.

use locus_guest::addr::Gva;
use locus_guest::space::{if_mapped, Space};

use super::CPUS_MAX;
use crate::{Error, Kernel};

/// Bases of the per-CPU areas of all CPUs that can ever have run, by the guest's CPU number
/// (`__per_cpu_offset`). A base is what is added to a per-CPU variable's symbol to get its guest
/// virtual address on that CPU: [`percpu`].
///
/// A guest may count more CPUs as possible than Xen has vCPUs for it ([`Kernel::cpus_max`]). Only the first
/// are those that are up or ever were. A PV kernel numbers its CPUs as Xen does
/// (arch/x86/xen/smp_pv.c). Any other gives the next number to the next local APIC that it meets, which is
/// one for each vCPU, and numbers those after them that may come
/// (arch/x86/kernel/apic/apic.c: `allocate_logical_cpuid`, or arch/x86/kernel/cpu/topology.c). A possible CPU that never was up has
/// an idle task that never ran, and no other. A CPU that is down keeps its number, and Xen its vCPU.
///
/// # Errors
/// [`Error::Odd`] if `nr_cpu_ids` is not 1 to 8192, [`Error::Missing`], [`Error::Memory`].
pub fn percpu_bases(kernel: &Kernel<'_>, space: &Space<'_>) -> Result<Vec<u64>, Error> {
    let table = kernel.symbols.need("__per_cpu_offset")?;
    let count = space.read_u32(kernel.variable("nr_cpu_ids", 4)?)? as usize;
    if count == 0 || count > CPUS_MAX {
        return Err(Error::Odd(format!(
            "nr_cpu_ids is {count}; expected 1 to {CPUS_MAX}"
        )));
    }
    let bytes = space.read_vec(table, count.min(kernel.cpus_max) * 8)?;
    let (words, _) = bytes.as_chunks::<8>();
    Ok(words.iter().map(|word| u64::from_le_bytes(*word)).collect())
}

/// The guest virtual address of the per-CPU variable `symbol` on the CPU whose area has the base `base`.
#[must_use]
pub fn percpu(symbol: Gva, base: u64) -> Gva {
    Gva(symbol.0.wrapping_add(base))
}

/// The idle task of each CPU that has one (`idle_threads`, kernel/smpboot.c).
pub(super) fn idle(kernel: &Kernel<'_>, space: &Space<'_>) -> Result<Vec<Gva>, Error> {
    let pointer = kernel.symbols.need("idle_threads")?;
    let mut found = Vec::new();
    for base in percpu_bases(kernel, space)? {
        // A possible CPU that was never brought up has no area, or no idle task.
        match if_mapped(space.read_u64(percpu(pointer, base)))? {
            None | Some(0) => {}
            Some(task) => found.push(Gva(task)),
        }
    }
    Ok(found)
}

/// The per-CPU variable that points to the running task of a CPU; an address for [`percpu`]. `None`
/// if the kernel has none that is known.
///
/// `current_task`, or a member of `pcpu_hot` since Linux kernel commit e57ef2ed97c1 ("x86: Put hot
/// per CPU variables into a struct") (in v6.2), until it was a variable again in v6.15.
#[must_use]
pub fn current_symbol(kernel: &Kernel<'_>) -> Option<Gva> {
    if let Some(at) = kernel.symbols.addr("current_task") {
        return Some(at);
    }
    let hot = kernel.symbols.addr("pcpu_hot")?;
    let offset = kernel
        .btf()
        .ok()?
        .offset_of_sized("pcpu_hot", "current_task", 8)
        .ok()?;
    Some(hot.plus(offset as u64))
}

/// The per-CPU variable that counts how often a CPU switched between tasks (`nr_switches` of `struct rq`,
/// kernel/sched/sched.h); an address for [`percpu`]. `None` if the kernel has no such member.
#[must_use]
pub fn switches_symbol(kernel: &Kernel<'_>) -> Option<Gva> {
    let offset = kernel
        .btf()
        .ok()?
        .offset_of_sized("rq", "nr_switches", 8)
        .ok()?;
    Some(kernel.symbols.addr("runqueues")?.plus(offset as u64))
}

/// The per-CPU word that is zero while nobody holds the lock of the CPU's run queue (`struct rq`); an address for
/// [`percpu`]. `None` if the kernel has none that is known, or needs no locks (one without SMP).
///
/// The member was `lock` until Linux kernel commit 5cb9eaa3d274 ("sched: Wrap rq::lock access") (in v5.14). With core
/// scheduling a CPU may take the lock of another one instead (`rq_lockp`).
#[must_use]
pub fn queue_lock_symbol(kernel: &Kernel<'_>) -> Option<Gva> {
    let btf = kernel.btf().ok()?;
    let member = |path| btf.offset_of_sized("rq", path, 4).ok();
    let offset = member("__lock.raw_lock").or_else(|| member("lock.raw_lock"))?;
    Some(kernel.symbols.addr("runqueues")?.plus(offset as u64))
}
