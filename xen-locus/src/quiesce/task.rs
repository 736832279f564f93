//! A task with its stack mapped, and what is known of it.

use std::cell::Cell;
use std::rc::Rc;

use locus_guest::addr::{Gva, Range};
use locus_guest::space::{Pin, Space};
use locus_guest::Window;
use locus_kernel::btf::Btf;
use locus_kernel::tasks::{is_on_cpu, Task, TaskLayout};
use locus_kernel::Kernel;

use crate::error::{Error, Result};

/// The mapped words of a `task_struct` that change as the task runs.
struct TaskWords {
    /// `thread.sp`: the saved stack pointer (arch/x86/entry/entry_64.S: `__switch_to_asm`).
    sp: Pin,
    /// `on_cpu`: set before the task is switched to, cleared after its registers are saved
    /// (kernel/sched/core.c: `prepare_task`, `finish_task`).
    on_cpu: Pin,
    /// `nvcsw` and `nivcsw`: how often the task was switched out, by its own will and not
    /// (kernel/sched/core.c: `__schedule`).
    switches: [Pin; 2],
    /// `restart_block.fn` (include/linux/restart_block.h).
    restart: Pin,
    /// What [`Restart::status`] says where.
    restart_status: Option<(Pin, u32)>,
    /// `start_time`: when the task was born (kernel/fork.c: `copy_process`).
    start_time: Pin,
}

/// A task with its stack mapped.
pub(super) struct MappedTask {
    pub(super) task: Task,
    words: TaskWords,
    /// A window onto its stack and those of other tasks.
    stacks: Rc<dyn Window>,
    /// Where in the window its stack begins, in bytes.
    offset: usize,
    /// Its two counters of switches, and what a scan found when they showed that; `None` before a scan.
    found: Cell<Option<([u64; 2], Finding)>>,
    /// How often it had been switched out at the last scan of all tasks; 0 before one.
    pub(super) switches_at_scan: Cell<u64>,
    /// Number of the last scan of all tasks that found that it had run; 0 for none.
    pub(super) last_ran: Cell<u32>,
}

/// What a scan found on the stack of a task that is off its CPU. It stays true until the task runs.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Finding {
    /// No word that leads into a watched range.
    Clear,
    /// A word that may be a return address into a watched range.
    Suspect,
    /// The same, and unwinding did not show that it is a stale word.
    NotCleared,
}

impl MappedTask {
    /// `task`, whose stack begins at `offset` in the window `stacks`. Maps the words of its
    /// `task_struct`.
    ///
    /// # Errors
    /// They can't be mapped.
    pub(super) fn new(
        task: Task,
        (stacks, offset): (Rc<dyn Window>, usize),
        space: &Space<'_>,
        layout: &TaskLayout,
        restart: &Restart,
    ) -> Result<MappedTask> {
        let pin = |offset: usize| space.pin(task.addr.plus(offset as u64));
        Ok(MappedTask {
            words: TaskWords {
                sp: pin(layout.sp)?,
                on_cpu: pin(layout.on_cpu)?,
                switches: [pin(layout.switches[0])?, pin(layout.switches[1])?],
                restart: pin(restart.function)?,
                restart_status: match restart.status {
                    Some((offset, mask)) => Some((pin(offset)?, mask)),
                    None => None,
                },
                start_time: pin(layout.start_time)?,
            },
            stacks,
            offset,
            found: Cell::new(None),
            switches_at_scan: Cell::new(0),
            last_ran: Cell::new(0),
            task,
        })
    }

    /// Whether it is the same task as `task`, with the same stack.
    pub(super) fn is(&self, task: &Task) -> bool {
        let what = |t: &Task| (t.pid, t.start_time, t.stack);
        what(&self.task) == what(task)
    }

    /// Whether its `task_struct` still belongs to it, and not to a task that was born after it died.
    pub(super) fn is_itself(&self) -> Result<bool> {
        Ok(self.words.start_time.u64()? == self.task.start_time)
    }

    /// How often it was switched out, by its own will and not.
    pub(super) fn both_switches(&self) -> Result<[u64; 2]> {
        let [own, other] = &self.words.switches;
        Ok([own.u64()?, other.u64()?])
    }

    /// How often it was switched out.
    pub(super) fn switches(&self) -> Result<u64> {
        let [own, other] = self.both_switches()?;
        Ok(own.wrapping_add(other))
    }

    /// What a scan found, if the task did not run since.
    pub(super) fn finding(&self) -> Result<Option<Finding>> {
        Ok(match self.found.get() {
            Some((then, finding)) if then == self.both_switches()? => Some(finding),
            _ => None,
        })
    }

    /// What the last scan found, whether the task ran since or not. Reads nothing from the guest.
    pub(super) fn last_finding(&self) -> Option<Finding> {
        self.found.get().map(|(_, finding)| finding)
    }

    /// Notes what a scan found when the counters showed `switches`.
    pub(super) fn note(&self, found: Option<([u64; 2], Finding)>) {
        self.found.set(found);
    }

    /// Replaces what the last scan found, if there was one.
    pub(super) fn correct(&self, finding: Finding) {
        self.found
            .set(self.found.get().map(|(then, _)| (then, finding)));
    }

    /// Whether a scan found nothing, and the task did not run since.
    pub(super) fn is_clear(&self) -> Result<bool> {
        Ok(self.finding()? == Some(Finding::Clear))
    }

    /// Whether it is on a CPU.
    pub(super) fn is_on_cpu(&self) -> Result<bool> {
        Ok(is_on_cpu(self.words.on_cpu.u32()?))
    }

    /// Its saved stack pointer; valid while it is off its CPU.
    pub(super) fn sp(&self) -> Result<Gva> {
        Ok(Gva(self.words.sp.u64()?))
    }

    /// The function in which it continues a system call that a signal cut short
    /// (`restart_block.fn`). The word is stale unless such a call is due.
    pub(super) fn restart(&self) -> Result<u64> {
        Ok(self.words.restart.u64()?)
    }

    /// Whether that system call may be one of 32-bit mode, which has another number for `restart_syscall`. True if the kernel
    /// does not say.
    pub(super) fn may_restart_32(&self) -> Result<bool> {
        Ok(match &self.words.restart_status {
            Some((status, mask)) => status.u32()? & mask != 0,
            None => true,
        })
    }

    /// Copies words of its stack, beginning `offset` bytes above its lowest address.
    pub(super) fn read(&self, offset: usize, words: &mut [u8]) -> Result<()> {
        Ok(self.stacks.read(self.offset + offset, words)?)
    }
}

/// The part of a stack from `from` up, in whole words: its offset from the stack's lowest address and
/// its length, both in bytes. It is the whole stack if `from` is elsewhere.
pub(super) fn part_from(stack: Range, from: Gva) -> Result<(usize, usize)> {
    let aligned = Gva(from.0 & !7);
    // The guest may say that a stack begins in the middle of a word.
    let from = match stack.contains(from) && aligned > stack.start {
        true => aligned,
        false => stack.start,
    };
    let bytes = |len: u64| {
        let too_big = |_| Error::failed(format!("a kernel stack of {len} bytes is too big"));
        usize::try_from(len).map_err(too_big)
    };
    let offset = from.0 - stack.start.0;
    Ok((bytes(offset)?, bytes(stack.len() - offset)?))
}

/// Where a task keeps how it continues a system call that a signal cut short.
pub(super) struct Restart {
    /// Offset of `restart_block.fn` in `task_struct`, in bytes.
    function: usize,
    /// Where it keeps whether the call is one of 32-bit mode: offset in `task_struct`, in bytes, and the bits of that word. `None`
    /// if the kernel has no such member.
    status: Option<(usize, u32)>,
    /// Where the registers of user mode (`struct pt_regs`) keep what the call returns, in bytes down from the end of a
    /// task's stack.
    pub(super) result: usize,
    /// Where they keep the call's number, in the same way.
    pub(super) call: usize,
}

impl Restart {
    pub(super) fn of(kernel: &Kernel<'_>) -> Result<Restart> {
        let btf = kernel.btf()?;
        let block = btf.offset_of("task_struct", "restart_block")?;
        let size = btf.size_of("pt_regs")?;
        let before_end =
            |name| Ok::<_, Error>(size.saturating_sub(btf.offset_of_sized("pt_regs", name, 8)?));
        Ok(Restart {
            status: status(btf, block)?,
            function: block + btf.offset_of_sized("restart_block", "fn", 8)?,
            result: before_end("ax")?,
            call: before_end("orig_ax")?,
        })
    }
}

/// [`Restart::status`] of a kernel whose `task_struct` has the `restart_block` at the offset `block`.
///
/// The kernel keeps `thread_info.status` in the `restart_block`, as it was when the call was cut short, since Linux kernel
/// commit b2e9df850c58 ("x86: Introduce restart_block->arch_data to remove TS_COMPAT_RESTART") (in v5.12). Before, a bit of
/// `thread_info.status` itself said it, or that the task is in a system call of 32-bit mode.
fn status(btf: &Btf, block: usize) -> Result<Option<(usize, u32)>> {
    // arch/x86/include/asm/thread_info.h
    const COMPAT: u32 = 2;
    const I386_REGS_POKED: u32 = 4;
    const COMPAT_RESTART: u32 = 8;
    const STATUS: &str = "thread_info.status";
    if btf.has("restart_block", "arch_data") {
        let offset = btf.offset_of_sized("restart_block", "arch_data", 8)?;
        return Ok(Some((block + offset, COMPAT)));
    }
    if btf.has("task_struct", STATUS) {
        let offset = btf.offset_of_sized("task_struct", STATUS, 4)?;
        return Ok(Some((offset, COMPAT | I386_REGS_POKED | COMPAT_RESTART)));
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use locus_kernel::btf::blob::Blob;

    use super::*;

    #[test]
    fn the_mode_of_a_call_that_was_cut_short_is_found_in_each_kernel() {
        let found = |in_block: bool, in_thread: bool| {
            let mut b = Blob::with_integers();
            let kept = if in_block { "arch_data" } else { "other" };
            b.structure("restart_block", 16, &[(kept, 4, 0), ("fn", 4, 8)]);
            let state = if in_thread { "status" } else { "other" };
            let thread = b.structure("thread_info", 16, &[("flags", 4, 0), (state, 3, 8)]);
            b.structure("task_struct", 64, &[("thread_info", thread, 0)]);
            status(&Btf::new(b.bytes()).unwrap(), 32).unwrap()
        };
        assert_eq!(found(true, true), Some((32, 2)));
        // Linux 5.10.
        assert_eq!(found(false, true), Some((8, 14)));
        assert_eq!(found(false, false), None);
    }
}
