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
    /// Its own stacks, for interrupts and for exceptions that need one, each with a window onto it.
    pub(super) stacks: Vec<(Range, Box<dyn Window>)>,
}

impl Cpu {
    /// The address of the `task_struct` that it runs, or in which it went down.
    pub(super) fn current(&self) -> Option<Gva> {
        Some(Gva(self.current.as_ref()?.u64().ok()?))
    }
}

/// All CPUs that the guest's kernel can have ([`tasks::percpu_bases`]).
pub(super) struct Cpus {
    pub(super) all: Vec<Cpu>,
    /// The code of `__schedule`; `None` if the kernel has no such symbol.
    schedule: Option<Range>,
}

impl Cpus {
    /// No CPU yet: [`Cpus::list`] finds them.
    pub(super) fn new(kernel: &Kernel<'_>) -> Cpus {
        let schedule = || {
            let at = kernel.symbols.addr("__schedule")?;
            Some(Range::new(at, kernel.symbols.room(at)?))
        };
        Cpus {
            all: Vec::new(),
            schedule: schedule(),
        }
    }

    /// Finds all CPUs, and maps their words and stacks.
    ///
    /// # Errors
    /// The kernel's tables can't be read.
    pub(super) fn list(&mut self, kernel: &Kernel<'_>, space: &Space<'_>) -> Result<()> {
        let own_stacks = CpuStacks::new(kernel)?;
        let current = tasks::current_symbol(kernel);
        let switches = tasks::switches_symbol(kernel);
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

    /// Whether a vCPU may be between the two statements of `__schedule` that count a switch.
    pub(super) fn may_be_counting(&self, vcpus: &[Vcpu]) -> bool {
        let Some(schedule) = self.schedule else {
            return true;
        };
        // Interrupts are off in `__schedule`. What can interrupt it all the same has a stack of its own.
        let is_own = |at: Gva| {
            let mut stacks = self.all.iter().flat_map(|cpu| &cpu.stacks);
            stacks.any(|(range, _)| range.contains(at))
        };
        let mut inside = vcpus.iter().filter(|v| v.online && !v.user);
        inside.any(|v| schedule.contains(v.rip) || is_own(v.rsp))
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
