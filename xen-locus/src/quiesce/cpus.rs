//! The guest's CPUs: the task that each one runs, how often it switched, and its own stacks.

use locus_guest::addr::{Gva, Range};
use locus_guest::space::{if_mapped, Pin, Space};
use locus_guest::{Vcpu, Window};
use locus_kernel::tasks;
use locus_kernel::unwind::stack::CpuStacks;
use locus_kernel::Kernel;

use crate::error::Result;

/// One CPU, with the words mapped that are read in the pause.
pub(super) struct Cpu {
    /// Base of its per-CPU area: what its GS base is while it is in the kernel.
    base: u64,
    /// Its pointer to the running task; `None` if the kernel has none that is known, or maps none for this CPU.
    current: Option<Pin>,
    /// `rq->nr_switches`: how often it switched between tasks (kernel/sched/core.c: `__schedule`).
    switches: Option<Pin>,
    /// The lock of its run queue, zero while nobody holds it. `None` if the kernel has none that is known.
    queue_lock: Option<Pin>,
    /// Its own stacks, for interrupts and for exceptions that need one, each with a window onto it.
    pub(super) stacks: Vec<(Range, Box<dyn Window>)>,
}

impl Cpu {
    /// The address of the `task_struct` that it runs, or in which it went down.
    pub(super) fn current(&self) -> Option<Gva> {
        Some(Gva(self.current.as_ref()?.u64().ok()?))
    }
}

/// All CPUs that the guest's kernel can have ([`tasks::percpu_bases`]). None until [`Cpus::list`] finds them.
#[derive(Default)]
pub(super) struct Cpus {
    pub(super) all: Vec<Cpu>,
}

impl Cpus {
    /// Finds all CPUs, and maps their words and stacks.
    ///
    /// # Errors
    /// The kernel's tables can't be read.
    pub(super) fn list(&mut self, kernel: &Kernel<'_>, space: &Space<'_>) -> Result<()> {
        let own_stacks = CpuStacks::new(kernel)?;
        let current = tasks::current_symbol(kernel);
        let switches = tasks::switches_symbol(kernel);
        let queue_lock = tasks::queue_lock_symbol(kernel);
        let bases = tasks::percpu_bases(kernel, space)?;
        let mut all = Vec::with_capacity(bases.len());
        for base in bases {
            let pin = |at: Option<Gva>| match at {
                Some(at) => if_mapped(space.pin(tasks::percpu(at, base))),
                None => Ok(None),
            };
            let mut stacks = Vec::new();
            for (_, range) in own_stacks.of_cpu(space, base)? {
                let frames = space.frames(range.start, range.len());
                let window = if_mapped(frames.and_then(|frames| space.map(&frames)))?;
                stacks.extend(window.map(|window| (range, window)));
            }
            all.push(Cpu {
                base,
                current: pin(current)?,
                switches: pin(switches)?,
                queue_lock: pin(queue_lock)?,
                stacks,
            });
        }
        self.all = all;
        Ok(())
    }

    /// How often each CPU switched between tasks; empty if the kernel does not say. A CPU without
    /// a counter is left out: [`Cpus::all_count_switches`].
    pub(super) fn count_switches(&self) -> Result<Vec<u64>> {
        let pins = self.all.iter().filter_map(|cpu| cpu.switches.as_ref());
        Ok(pins.map(Pin::u64).collect::<std::result::Result<_, _>>()?)
    }

    /// Whether each CPU has a counter of switches.
    pub(super) fn all_count_switches(&self) -> bool {
        self.all.iter().all(|cpu| cpu.switches.is_some())
    }

    /// Whether a CPU may be between the two statements of `__schedule` that count a switch. It holds the lock of its run
    /// queue then, whatever interrupts it or is called in between. True if the locks can't be read.
    pub(super) fn may_be_counting(&self) -> Result<bool> {
        for cpu in &self.all {
            match &cpu.queue_lock {
                Some(lock) if lock.u32()? == 0 => {}
                _ => return Ok(true),
            }
        }
        Ok(false)
    }

    /// The CPU that a vCPU is, by its GS base.
    pub(super) fn of_vcpu(&self, vcpu: &Vcpu) -> Option<&Cpu> {
        let find = |base: Gva| self.all.iter().find(|c| c.base == base.0);
        match vcpu.user {
            // User mode chooses the base that is in use, and may choose that of another CPU.
            true => find(vcpu.gs_other),
            // The kernel's entry code may not have exchanged the two yet.
            false => find(vcpu.gs_base).or_else(|| find(vcpu.gs_other)),
        }
    }
}
