//! The counters of switches at one moment: from them follows which tasks did not run since.
//!
//! The kernel counts each switch between two tasks twice, one statement after the other
//! (kernel/sched/core.c: `__schedule`): for the CPU (`rq->nr_switches`), and for the task that leaves it
//! (`nvcsw` or `nivcsw`). So the switches of all CPUs since a moment are those of all tasks since then.
//! The tasks that ran recently are asked first. If their switches add up to those of all CPUs, no other
//! task ran, and no other task needs to be asked.
//!
//! For that, the counters of all tasks at one moment must be known. Those of the tasks that ran recently are
//! read at that moment. The others are read before and after: if they are equal, that is what they were. The
//! counters of a task that is born later begin at zero.
//!
//! Between the two statements a switch is counted by half, and its task's own count would later hide one of another task. So
//! nothing is concluded while a CPU may be there: while the lock of any run queue is held. Registers and stacks would say
//! less: code may be called in between (SCHED_PROXY_EXEC, KASAN, KCSAN), and what interrupts it may be on any stack.

use locus_guest::addr::Gva;

use super::list::GuestTasks;
use super::task::MappedTask;
use crate::error::Result;

/// Most tasks that are asked in a pause whether they ran. That takes little time beside the pause itself.
pub(super) const ASKED_MAX: usize = 256;
/// Tries to read all counters at one moment.
const TRIES: u32 = 64;

/// What the counters showed at one moment.
pub(super) struct SwitchCounters {
    /// Switches of all CPUs (the sum of `rq->nr_switches`).
    cpus: u64,
    /// Of each task that ran recently; the one that ran last comes first.
    pub(super) tasks: Vec<TaskCounter>,
}

/// What the counters of one task showed.
#[derive(PartialEq, Eq)]
pub(super) struct TaskCounter {
    /// Address of its `task_struct`.
    pub(super) task: Gva,
    /// Its switches (`nvcsw + nivcsw`).
    switches: u64,
    /// A scan had found its stack clear, and it had not run since.
    clear: bool,
}

impl TaskCounter {
    /// Whether the task's stack is still clear. A task that need not be `asked` did not run.
    pub(super) fn is_clear(&self, known: &MappedTask, asked: bool) -> Result<bool> {
        Ok(self.clear && (!asked || known.switches()? == self.switches))
    }
}

impl SwitchCounters {
    /// The same with tasks that were born since; `None` if they are too many to be asked in a pause.
    pub(super) fn with_newborn(mut self, born: &[Gva]) -> Option<SwitchCounters> {
        let counter = |&task: &Gva| TaskCounter {
            task,
            switches: 0,
            clear: false,
        };
        self.tasks.splice(0..0, born.iter().rev().map(counter));
        (self.tasks.len() <= 2 * ASKED_MAX).then_some(self)
    }

    fn read(tasks: &GuestTasks<'_, '_>, recent: &[Gva]) -> Result<SwitchCounters> {
        let cpus = total(&tasks.cpus.count_switches()?);
        let known = recent.iter().filter_map(|task| tasks.known.get(task));
        let counter = |known: &MappedTask| {
            Ok(TaskCounter {
                task: known.task.addr,
                switches: known.switches()?,
                clear: known.is_clear()?,
            })
        };
        let tasks = known.map(counter).collect::<Result<Vec<_>>>()?;
        Ok(SwitchCounters { cpus, tasks })
    }

    /// Reads the counters of the CPUs and of the tasks that ran recently as they are at one moment,
    /// while the guest runs; `None` if there is no such moment in a few tries.
    pub(super) fn at_one_moment(
        tasks: &GuestTasks<'_, '_>,
        recent: &[Gva],
    ) -> Result<Option<SwitchCounters>> {
        for _ in 0..TRIES {
            let counters = SwitchCounters::read(tasks, recent)?;
            let counting = tasks.cpus.may_be_counting()?;
            let after = SwitchCounters::read(tasks, recent)?;
            // Between the two no task switched, none was about to, and none was born unlisted.
            let same = counters.cpus == after.cpus && counters.tasks == after.tasks;
            if same && !counting && !tasks.changed()? {
                return Ok(Some(counters));
            }
        }
        Ok(None)
    }

    /// Whether the tasks that ran recently explain all switches since, now that the CPUs count
    /// `cpus`. Then no other task ran. The number says how many of [`SwitchCounters::tasks`] had to
    /// be asked for it, from the first on; `None` says that another task may have run.
    pub(super) fn explain(
        &self,
        tasks: &GuestTasks<'_, '_>,
        cpus: &[u64],
    ) -> Result<Option<usize>> {
        if tasks.cpus.may_be_counting()? {
            return Ok(None);
        }
        let mut left = total(cpus).wrapping_sub(self.cpus);
        let mut asked = 0;
        for then in &self.tasks {
            if left == 0 {
                break;
            }
            asked += 1;
            let Some(known) = tasks.known.get(&then.task) else {
                return Ok(None);
            };
            match without(left, known, known.switches()?.wrapping_sub(then.switches))? {
                Some(rest) => left = rest,
                None => return Ok(None),
            }
        }
        Ok((left == 0).then_some(asked))
    }

    /// Whether from these counters to `after`, which are of the same tasks, no other task ran.
    pub(super) fn explain_all(
        &self,
        tasks: &GuestTasks<'_, '_>,
        after: &SwitchCounters,
    ) -> Result<bool> {
        let mut left = after.cpus.wrapping_sub(self.cpus);
        for (then, now) in self.tasks.iter().zip(&after.tasks) {
            let Some(known) = tasks.known.get(&now.task).filter(|_| then.task == now.task) else {
                return Ok(false);
            };
            match without(left, known, now.switches.wrapping_sub(then.switches))? {
                Some(rest) => left = rest,
                None => return Ok(false),
            }
        }
        Ok(left == 0)
    }
}

/// What is left of so many switches of all CPUs without those of a task; `None` if they can't be its
/// own, because there are too many, or its `task_struct` belongs to another task by now.
fn without(switches: u64, known: &MappedTask, of_task: u64) -> Result<Option<u64>> {
    Ok(match switches.checked_sub(of_task) {
        Some(rest) if of_task == 0 || known.is_itself()? => Some(rest),
        _ => None,
    })
}

fn total(switches: &[u64]) -> u64 {
    switches.iter().copied().fold(0, u64::wrapping_add)
}
