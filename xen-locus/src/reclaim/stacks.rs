//! The kernel stacks of a guest, and what is live of them.

use std::collections::HashSet;

use locus_guest::addr::{Frame, Gva, Range};
use locus_guest::space::{if_mapped, Space};
use locus_guest::Vcpu;
use locus_kernel::tasks::{self, TaskLayout};
use locus_kernel::unwind::stack::CpuStacks;
use locus_kernel::Kernel;

use super::readers::all_tasks;
use crate::error::Result;
use crate::machine::Machine;
use crate::quiesce;

/// Most stacks of threads that ended that a CPU keeps (kernel/fork.c: `NR_CACHED_STACKS` is 2).
const CACHED_MAX: u64 = 16;

/// All stacks at one moment of a running guest.
pub(super) struct Stacks {
    /// The frames that they are in.
    pub(super) frames: HashSet<Frame>,
    /// The live part of each, and the name of its thread.
    pub(super) live: Vec<(Range, String)>,
}

impl Stacks {
    /// # Errors
    /// The tasks can't be listed.
    pub(super) fn find(machine: &dyn Machine, kernel: &Kernel<'_>) -> Result<Stacks> {
        let space = kernel.space.fresh();
        let layout = TaskLayout::of(kernel)?;
        let vcpus = machine.vcpus()?;
        let mut all = Vec::new();
        let mut live = Vec::new();
        let in_kernel = |v: &&Vcpu| v.online && !v.user;
        let kernel_sp: Vec<Gva> = vcpus.iter().filter(in_kernel).map(|v| v.rsp).collect();
        let own_stacks = CpuStacks::new(kernel)?;
        let caches = Caches::of(kernel);
        for base in tasks::percpu_bases(kernel, &space)? {
            for (_, range) in own_stacks.of_cpu(&space, base)? {
                all.push(range);
                let on = kernel_sp.iter().find(|sp| range.contains(**sp));
                live.extend(on.map(|sp| (live_part(range, *sp), "an interrupt".to_owned())));
            }
            for start in caches.iter().flat_map(|caches| caches.of_cpu(&space, base)) {
                all.push(Range::new(start?, layout.stack_size));
            }
        }
        let tasks = all_tasks(kernel)?;
        let now = machine.vcpus()?;
        let is_on = |range: Range| kernel_sp.iter().find(|sp| range.contains(**sp));
        let same = |v: &Vcpu| now.iter().any(|w| w.id == v.id && w.user == v.user);
        let on_tasks = kernel_sp
            .iter()
            .filter(|sp| tasks.iter().any(|t| t.stack.contains(**sp)));
        // A CPU that is on none of their stacks is in an interrupt or on its way, and one that came or went meanwhile may
        // be anywhere: then all of the stack of a task that runs may be live. One in user mode has none that is.
        // With guests of the guest, registers may be those of one, which chooses them.
        let may_nest = quiesce::may_nest(kernel);
        let is_known = !may_nest && kernel_sp.len() == on_tasks.count() && vcpus.iter().all(same);
        for task in tasks {
            let range = task.stack;
            if range.start == Gva(0) {
                continue;
            }
            all.push(range);
            let sp = match is_on(range) {
                Some(_) if may_nest => range.start,
                Some(sp) => *sp,
                None if !task.on_cpu => task.sp,
                None if !is_known => range.start,
                None => continue,
            };
            live.push((live_part(range, sp), task.comm));
        }
        let mut frames = HashSet::new();
        for range in all {
            // One whose thread ended may be gone.
            let mapped = if_mapped(space.frames(range.start, range.len()))?;
            frames.extend(mapped.unwrap_or_default());
        }
        Ok(Stacks { frames, live })
    }
}

/// What is live of a stack whose pointer is `sp`; all of it if that is elsewhere.
fn live_part(range: Range, sp: Gva) -> Range {
    let start = match range.contains(sp) {
        true => Gva(sp.0 & !7),
        false => range.start,
    };
    Range {
        start,
        end: range.end,
    }
}

/// Where CPUs keep the stacks of threads that ended, for others (kernel/fork.c: `cached_stacks`).
struct Caches {
    /// The per-CPU array of pointers to areas.
    pointers: Gva,
    /// How many there are.
    count: u64,
    /// Offset in an area of the address at which it begins, in bytes.
    start: u64,
}

impl Caches {
    fn of(kernel: &Kernel<'_>) -> Option<Caches> {
        let pointers = kernel.symbols.addr("cached_stacks")?;
        let start = kernel
            .btf()
            .ok()?
            .offset_of_sized("vm_struct", "addr", 8)
            .ok()?;
        Some(Caches {
            pointers,
            count: (kernel.symbols.room(pointers)? / 8).min(CACHED_MAX),
            start: start as u64,
        })
    }

    /// Where the stacks begin that the CPU keeps whose per-CPU area has this base.
    fn of_cpu<'s>(
        &'s self,
        space: &'s Space<'_>,
        base: u64,
    ) -> impl Iterator<Item = Result<Gva>> + 's {
        let read = move |n| {
            let at = tasks::percpu(self.pointers, base).plus(8 * n);
            let area = if_mapped(space.read_u64(at))?;
            let start = area.map(|area| space.read_u64(Gva(area).plus(self.start)));
            let start = if_mapped(start.transpose())?.flatten();
            Ok(start.filter(|&start| start != 0).map(Gva))
        };
        (0..self.count).filter_map(move |n| read(n).transpose())
    }
}
