//! What people want to know of a task: its process, state and CPU.

use locus_guest::addr::Gva;
use locus_guest::space::Space;

use crate::{Error, Kernel};

/// Where the details of a task are in `task_struct`: offsets in bytes.
///
/// They are apart from [`TaskLayout`](super::TaskLayout), so that a scan that must be fast reads no
/// more than it needs.
#[derive(Debug, Clone, Copy)]
pub struct DetailLayout {
    tgid: usize,
    state: usize,
    exit_state: usize,
    cpu: usize,
}

/// The details of one task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TaskDetail {
    /// Id of its process (`tgid`).
    pub tgid: u32,
    /// Its state, as the letter in `/proc/PID/stat`.
    pub state: char,
    /// Number of the CPU that it runs on, or ran on last.
    pub cpu: u32,
    /// Whether it gives up the CPU for the last time (`TASK_DEAD`). Once it is on no CPU it is in
    /// no function, and its stack may be given to another task.
    pub dead: bool,
}

impl DetailLayout {
    /// Reads the offsets from the kernel's BTF.
    ///
    /// `state` is called `__state` and is 32 bits wide since Linux kernel commit 2f064a59a11f
    /// ("sched: Change task_struct::state"); the bits reported are all in the lower half. The CPU
    /// went to `thread_info` with Linux kernel commit bcf9033e5449 ("sched: move CPU field back into
    /// thread_info if THREAD_INFO_IN_TASK=y").
    ///
    /// # Errors
    /// [`Error::Missing`] if a member is.
    pub fn of(kernel: &Kernel<'_>) -> Result<DetailLayout, Error> {
        let btf = kernel.btf()?;
        let half = |path| btf.offset_of_sized("task_struct", path, 4);
        Ok(DetailLayout {
            tgid: half("tgid")?,
            state: match btf.has("task_struct", "__state") {
                true => half("__state")?,
                false => btf.offset_of_sized("task_struct", "state", 8)?,
            },
            exit_state: half("exit_state")?,
            cpu: half("thread_info.cpu").or_else(|_| half("cpu"))?,
        })
    }

    /// Reads the details of the task whose `task_struct` is at the guest virtual address `task`.
    ///
    /// # Errors
    /// [`Error::Memory`].
    pub fn read(&self, space: &Space<'_>, task: Gva) -> Result<TaskDetail, Error> {
        const DEAD: u32 = 0x80;
        let word = |offset: usize| space.read_u32(task.plus(offset as u64));
        let state = word(self.state)?;
        Ok(TaskDetail {
            tgid: word(self.tgid)?,
            state: letter(state, word(self.exit_state)?),
            cpu: word(self.cpu)?,
            dead: state & DEAD != 0,
        })
    }
}

/// The letter that /proc/PID/stat shows for a task (fs/proc/array.c: `task_state_array`;
/// include/linux/sched.h: `__task_state_index`). Bits that a kernel doesn't have are never set.
pub(super) fn letter(state: u32, exit_state: u32) -> char {
    const UNINTERRUPTIBLE: u32 = 0x2;
    const REPORTED: u32 = 0x7f;
    const NOLOAD: u32 = 0x400;
    const RTLOCK_WAIT: u32 = 0x1000;
    const FROZEN: u32 = 0x8000;
    const IDLE: u32 = UNINTERRUPTIBLE | NOLOAD;
    let reported = if state & (RTLOCK_WAIT | FROZEN) != 0 {
        UNINTERRUPTIBLE
    } else if state & IDLE == IDLE {
        REPORTED + 1
    } else {
        (state | exit_state) & REPORTED
    };
    // The highest bit counts.
    match reported.checked_ilog2() {
        None => 'R',
        Some(0) => 'S',
        Some(1) => 'D',
        Some(2) => 'T',
        Some(3) => 't',
        Some(4) => 'X',
        Some(5) => 'Z',
        Some(6) => 'P',
        Some(_) => 'I',
    }
}
