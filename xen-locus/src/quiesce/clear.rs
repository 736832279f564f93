//! Clears tasks of false alarms by unwinding their stacks, while the guest runs.

use locus_guest::addr::Gva;
use locus_kernel::unwind::stack::StackCopy;
use locus_kernel::unwind::{Stack, StackFrame, StackKind};

use super::list::{GuestTasks, Listed};
use super::scan::Scanned;
use super::stack_scan::restarts_in;
use super::task::Finding;
use crate::error::Result;

/// Most stacks unwound by one call.
const UNWOUND_MAX: usize = 1 << 12;

impl<'t, 'k, 'm> Scanned<'t, 'k, 'm> {
    /// Unwinds the stacks in which the scan found a suspect word. If the unwinding is reliable and leads
    /// through no watched range, the word is stale, and the task counts as clear until it runs. The
    /// next scan says so, and has to come next.
    ///
    /// This takes longer than a scan, and most threads in the way leave by themselves after a moment.
    ///
    /// # Errors
    /// Memory can't be read.
    pub fn clear_by_unwind(self) -> Result<Listed<'t, 'k, 'm>> {
        let tasks = self.tasks;
        let mut suspects = Vec::new();
        for known in tasks.known.values() {
            if known.finding()? == Some(Finding::Suspect) {
                suspects.push(known.task.addr);
                // The others have their turn next time.
                if suspects.len() == UNWOUND_MAX {
                    break;
                }
            }
        }
        for task in suspects {
            let is_clear = unwinds_clear(tasks, task)?;
            if let Some(known) = tasks.known.get(&task) {
                known.correct(match is_clear {
                    true => Finding::Clear,
                    false => Finding::NotCleared,
                });
            }
        }
        Ok(Listed { tasks })
    }
}

/// Whether unwinding shows that what a scan found on a sleeping task's stack was a false alarm. If
/// that can't be told, it was none.
fn unwinds_clear(tasks: &mut GuestTasks<'_, '_>, task: Gva) -> Result<bool> {
    let Some(known) = tasks.known.get(&task) else {
        return Ok(false);
    };
    let range = known.task.stack;
    let memory = StackCopy::of(range, |words| known.read(0, words))?;
    if restarts_in(tasks, known, memory.bytes())?.is_some() {
        return Ok(false);
    }
    let Some(walker) = tasks.unwinder.get(tasks.kernel) else {
        return Ok(false);
    };
    let stack = Stack {
        kind: StackKind::Task,
        range,
        memory: &memory,
    };
    let walk = walker.sleeping(known.sp()?, stack, known.task.idle);
    let inside = |frame: &StackFrame| tasks.watch.hit(frame.address.0).is_some();
    Ok(walk.is_reliable() && !walk.frames.iter().any(inside))
}
