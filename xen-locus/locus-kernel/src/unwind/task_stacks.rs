//! The stacks of all tasks of a guest, whether it runs or not.
//!
//! A task that is on no CPU does not change its stack. So the stack is read, and read again if the
//! task ran meanwhile. Its counters of context switches show that.

use std::collections::HashMap;

use locus_guest::addr::Gva;
use locus_guest::space::{if_mapped, Space};
use locus_guest::Vcpu;

use super::stack::{CpuStacks, Stack, StackCopy, StackKind};
use super::{Unreliable, Walk, WalkEnd, Walker};
use crate::tasks::{self, is_on_cpu, DetailLayout, Task, TaskDetail, TaskLayout};
use crate::{Error, Kernel};

/// How often a task's stack is read before the task counts as one that always runs.
const TRIES: u32 = 4;

/// A task, and what its stack showed.
#[derive(Clone, Debug)]
pub struct TaskStack {
    /// The task, as the list of tasks had it.
    pub task: Task,
    /// Its process, state and CPU.
    pub detail: TaskDetail,
    /// The frames of its stack.
    pub walk: Walk,
}

/// Walks the stacks of the tasks whose thread id is `wanted`. `vcpus` are registers of the same
/// moment as memory, as a core has them. They are empty for a running guest: its tasks on a CPU
/// then end in [`Unreliable::Runs`].
///
/// # Errors
/// [`Error::Missing`] if the kernel lacks a symbol or type, [`Error::Odd`] if a list of tasks has
/// no end, [`Error::Memory`]. A stack that can't be walked is no error, but a [`Walk`] that is not
/// reliable.
pub fn walk(
    kernel: &Kernel<'_>,
    vcpus: &[Vcpu],
    wanted: impl Fn(u32) -> bool,
) -> Result<Vec<TaskStack>, Error> {
    let look = TaskStackReader {
        walker: Walker::new(kernel)?,
        layout: TaskLayout::of(kernel)?,
        details: DetailLayout::of(kernel)?,
        cpu_stacks: CpuStacks::new(kernel)?,
        running: running(kernel, vcpus)?,
    };
    tasks::snapshot(kernel, |space, tasks| {
        let tasks = tasks.into_iter().filter(|task| wanted(task.pid));
        tasks.map(|task| look.task(space, task)).collect()
    })
}

/// For the address of a task that is on a CPU: the registers of that CPU, and the base of its per-CPU area.
type Running<'l> = HashMap<Gva, (&'l Vcpu, u64)>;

/// The tasks that CPUs say they run. Neither a task nor a CPU is looked at more than once, because a guest may have many of both.
fn running<'l>(kernel: &Kernel<'_>, vcpus: &'l [Vcpu]) -> Result<Running<'l>, Error> {
    let mut found = Running::new();
    let current = tasks::current_symbol(kernel).filter(|_| !vcpus.is_empty());
    let Some(current) = current else {
        return Ok(found);
    };
    let mut by_base: HashMap<u64, &Vcpu> = HashMap::new();
    let online = || vcpus.iter().filter(|v| v.online);
    // In the kernel's entry code the two GS bases may not have been swapped yet.
    let bases = online().map(|v| (v.gs_base.0, v));
    for (base, vcpu) in bases.chain(online().map(|v| (v.gs_other.0, v))) {
        by_base.entry(base).or_insert(vcpu);
    }
    let space = kernel.space.fresh();
    for base in tasks::percpu_bases(kernel, &space)? {
        let task = if_mapped(space.read_u64(tasks::percpu(current, base)))?;
        if let (Some(task), Some(vcpu)) = (task, by_base.get(&base)) {
            found.entry(Gva(task)).or_insert((vcpu, base));
        }
    }
    Ok(found)
}

/// What it takes to walk the stack of any task.
struct TaskStackReader<'l, 'k, 'm> {
    walker: Walker<'k, 'm>,
    layout: TaskLayout,
    details: DetailLayout,
    cpu_stacks: CpuStacks,
    running: Running<'l>,
}

/// What changes in a task when it runs.
#[derive(PartialEq, Eq)]
struct RunState {
    on_cpu: bool,
    sp: Gva,
    switches: [u64; 2],
}

impl TaskStackReader<'_, '_, '_> {
    fn task(&self, space: &Space<'_>, task: Task) -> Result<TaskStack, Error> {
        let walk = self.walk(space, &task)?;
        // A guest may have many tasks with many frames each, all in the same memory.
        let units = self.walker.code.frame_units() * walk.frames.len() as u64;
        space.budget().spend(units)?;
        Ok(TaskStack {
            detail: self.details.read(space, task.addr)?,
            walk,
            task,
        })
    }

    fn moment(&self, space: &Space<'_>, task: &Task) -> Result<RunState, Error> {
        let word = |offset: usize| space.read_u64(task.addr.plus(offset as u64));
        let [voluntary, preempted] = self.layout.switches;
        Ok(RunState {
            on_cpu: is_on_cpu(space.read_u32(task.addr.plus(self.layout.on_cpu as u64))?),
            sp: Gva(word(self.layout.sp)?),
            switches: [word(voluntary)?, word(preempted)?],
        })
    }

    fn walk(&self, space: &Space<'_>, task: &Task) -> Result<Walk, Error> {
        let gone = || Walk {
            frames: Vec::new(),
            end: Ok(WalkEnd::Gone),
        };
        if task.stack.start == Gva(0) {
            return Ok(gone());
        }
        for _ in 0..TRIES {
            let before = self.moment(space, task)?;
            if before.on_cpu {
                return self.running(space, task);
            }
            if self.details.read(space, task.addr)?.dead {
                if self.moment(space, task)? == before {
                    return Ok(gone());
                }
                continue;
            }
            // The stack of a task that dies now is unmapped.
            let Ok(memory) = StackCopy::read(space, task.stack, before.sp) else {
                continue;
            };
            if self.moment(space, task)? == before {
                let stack = Stack {
                    kind: StackKind::Task,
                    range: task.stack,
                    memory: &memory,
                };
                return Ok(self.walker.sleeping(before.sp, stack, task.idle));
            }
        }
        Ok(Walk::failed(Unreliable::RanMeanwhile))
    }

    /// Walks from the registers of the CPU that `task` is on, if they are known.
    fn running(&self, space: &Space<'_>, task: &Task) -> Result<Walk, Error> {
        let Some(&(vcpu, base)) = self.running.get(&task.addr) else {
            return Ok(Walk::failed(Unreliable::Runs));
        };
        let mut all = vec![(StackKind::Task, task.stack)];
        all.extend(self.cpu_stacks.of_cpu(space, base)?);
        let copied: Vec<_> = all
            .into_iter()
            .filter_map(|(kind, range)| {
                let memory = StackCopy::read(space, range, range.start).ok()?;
                Some((kind, range, memory))
            })
            .collect();
        let stacks: Vec<Stack<'_>> = copied
            .iter()
            .map(|(kind, range, memory)| Stack {
                kind: *kind,
                range: *range,
                memory,
            })
            .collect();
        Ok(self.walker.running(vcpu, &stacks, task.idle))
    }
}
