//! Quiescence: is a thread inside the code that is about to change?
//!
//! Each vCPU's registers and each task's kernel stack are checked. A stack is scanned: each word of its
//! live part that could be a return address into a watched range counts. So a stale or unrelated word
//! raises a false alarm, and no thread is missed. A sleeping task is cleared of a false alarm by
//! unwinding its stack ([`locus_kernel::unwind`]) while the guest runs. If the unwinding can't be relied
//! on, the alarm counts.
//!
//! The guest is paused only for the last step. Its cost depends on what changed since the steps
//! before it, and not on how many tasks there are.
//!
//! # The steps
//!
//! | step | guest | what it costs | what is true after it |
//! |---|---|---|---|
//! | [`GuestTasks::list`] | runs | reads each task; maps the stacks of new ones | all tasks are listed that were born before it |
//! | [`GuestTasks::catch_up`] | runs | as `list`, but for new tasks only | the same |
//! | [`Listed::scan_off_cpu`] | runs | the counters of each task; the stack of each that ran since the scan before, or was suspect | of each task that was off its CPU it is known whether its stack is clear |
//! | [`Scanned::clear_by_unwind`] | runs | one unwinding for each suspect stack, slow; only after a long wait | false alarms are known as such. Scan again: this step gives back the list |
//! | [`Scanned::snapshot_counters`] | runs | the counters of each task; the stacks of the few that ran since the scan | all counters of switches are known as they were at one moment |
//! | [`Snapshotted::try_look`] | runs | a look, and births since the list | caches are warm; a pause that would be in vain is seen before |
//! | [`Ready::look`] | **paused** | registers, counters of CPUs, stacks on CPUs; of other tasks only those that may have run | no thread is in the way, or which ones are |
//!
//! Each step returns what the next one needs, so no other order compiles:
//!
//! ```
//! # use locus_guest::Vcpu;
//! # use xen_locus::error::Result;
//! # use xen_locus::quiesce::{GuestTasks, Verdict};
//! fn steps(tasks: &mut GuestTasks<'_, '_>, read: impl Fn() -> Result<Vec<Vcpu>>) -> Result<Verdict> {
//!     let counted = tasks.list()?.scan_off_cpu()?.snapshot_counters()?;
//!     let ready = counted.try_look(&read()?, false)?.ready();
//!     // Here the guest is paused.
//!     ready.look(&read()?, false, &|| false)
//! }
//! ```
//!
//! Without a scan there is no snapshot of the counters:
//!
//! ```compile_fail,E0599
//! # use xen_locus::error::Result;
//! # use xen_locus::quiesce::GuestTasks;
//! fn unscanned(tasks: &mut GuestTasks<'_, '_>) -> Result<()> {
//!     tasks.list()?.snapshot_counters().map(drop)
//! }
//! ```
//!
//! Once all is ready for the pause, nothing more can be listed or mapped:
//!
//! ```compile_fail,E0499
//! # use locus_guest::Vcpu;
//! # use xen_locus::error::Result;
//! # use xen_locus::quiesce::GuestTasks;
//! fn lists_in_the_pause(tasks: &mut GuestTasks<'_, '_>, vcpus: &[Vcpu]) -> Result<()> {
//!     let counted = tasks.list()?.scan_off_cpu()?.snapshot_counters()?;
//!     let ready = counted.try_look(vcpus, false)?.ready();
//!     tasks.catch_up()?;
//!     ready.look(vcpus, false, &|| false).map(drop)
//! }
//! ```
//!
//! # Why little is left to do in the pause
//!
//! The look believes
//!
//! - the list, if no task was born since. The kernel counts births in `total_forks` (kernel/fork.c:
//!   `copy_process`), under the lock under which it adds a new task to the lists. A task that died
//!   since can only raise a false alarm. A task that is not counted yet has never run;
//! - what a scan found of a task, if the task was not switched out since. The kernel counts that in
//!   `nvcsw` and `nivcsw` (kernel/sched/core.c: `__schedule`) before it takes the task off its CPU.
//!   A task that was off its CPU and has run since is either still on one, and is scanned in any case,
//!   or it was switched out;
//! - what a scan found of all tasks, if no CPU switched since (`rq->nr_switches`, counted at the same
//!   place); and of all but a few, if the switches of these few explain all switches
//!   (`counters.rs`). Then the counters of the other tasks need not be read.
//!
//! # The counters
//!
//! | word | counted or set in | what it says here |
//! |---|---|---|
//! | `total_forks` | kernel/fork.c: `copy_process` | tasks were born since the list was read |
//! | `rq->nr_switches` | kernel/sched/core.c: `__schedule` | a CPU switched between tasks |
//! | the lock of a `struct rq` | kernel/sched/core.c: `__schedule`, before that and until the switch is made | a CPU may be between the counts of its own and of the task |
//! | `nvcsw`, `nivcsw` of a task | kernel/sched/core.c: `__schedule`, the next statement but one | the task was switched out, by its own will or not |
//! | `on_cpu` of a task | kernel/sched/core.c: `prepare_task`, `finish_task` | the task is on a CPU, or its registers are not saved yet |
//! | `start_time` of a task | kernel/fork.c: `copy_process` | the memory belongs to this task still |
//!
//! # The files
//!
//! Each uses only those above it: `watch`, `verdict`; `task`, `cpus`, `unwinder`; `list`; `stack_scan`;
//! `counters`; `scan`; `clear`, `snapshot`; `look`.

mod clear;
mod counters;
mod cpus;
mod list;
mod look;
mod scan;
mod snapshot;
mod stack_scan;
mod task;
mod unwinder;
mod verdict;
mod watch;

use locus_guest::Vcpu;
use locus_kernel::Kernel;

use crate::blocker::Blocker;
use crate::error::{Error, Result};
pub use list::{may_nest, GuestTasks, Listed};
pub use look::{Ready, Tried};
pub use scan::Scanned;
pub use snapshot::Snapshotted;
pub use verdict::{InTheWay, Place, Verdict};
pub use watch::{check_trampolines, Watch, Watched};

/// The threads that are in one of the ranges of `watch`, in a guest that does not run (a saved core).
///
/// # Errors
/// Memory can't be read, or the guest runs after all.
pub fn inside(kernel: &Kernel<'_>, vcpus: &[Vcpu], watch: &Watch) -> Result<Vec<Blocker>> {
    let mut tasks = GuestTasks::new(kernel, watch)?;
    let scanned = tasks.list()?.scan_off_cpu()?;
    let scanned = scanned.clear_by_unwind()?.scan_off_cpu()?;
    let verdict = look::look(scanned.tasks, &scanned.baseline, vcpus, true, &|| false)?;
    let ran = "new tasks were born in a guest that should not run, while its stacks were scanned";
    verdict.blockers(kernel).ok_or_else(|| Error::failed(ran))
}

#[cfg(test)]
mod tests;
