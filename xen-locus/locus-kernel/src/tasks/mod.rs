//! All tasks of the guest: every thread of every process, and the idle task of every CPU.
//!
//! `init_task.tasks` links the first threads of all processes, `signal->thread_head` the threads of
//! one process (include/linux/sched/signal.h: `for_each_process_thread`). Idle tasks are in neither
//! list: the per-CPU variable `idle_threads` points to them (kernel/smpboot.c).

mod details;
mod percpu;
#[cfg(test)]
mod tests;

use std::collections::HashSet;
use std::time::{Duration, Instant};

use locus_guest::addr::{Gva, Range};
use locus_guest::space::Space;

pub use self::details::{DetailLayout, TaskDetail};
use self::percpu::idle;
pub use self::percpu::{current_symbol, percpu, percpu_bases, queue_lock_symbol, switches_symbol};
use crate::{list, modules, Error, Kernel};

/// Most tasks believed, and most elements of each of their lists.
pub const TASKS_MAX: usize = 1 << 17;
/// Most CPUs believed (`NR_CPUS` of Debian is 8192).
pub const CPUS_MAX: usize = 8192;

/// What the 32 bits at `on_cpu` of a `task_struct` say. The member is 0 or 1, and has four bytes or only the first of them:
/// in Linux 7.2.12 other flags follow it (include/linux/sched.h).
#[must_use]
pub fn is_on_cpu(word: u32) -> bool {
    word & 0xff != 0
}

/// Where the members of `task_struct` are that are read for every task: offsets in bytes.
#[derive(Debug, Clone, Copy)]
pub struct TaskLayout {
    tasks: usize,
    thread_node: usize,
    signal: usize,
    thread_head: usize,
    stack: usize,
    /// Offset of the saved stack pointer (`thread.sp`), 64 bits.
    pub sp: usize,
    pid: usize,
    comm: usize,
    /// Offset of the flag that says that it is on a CPU (`on_cpu`): see [`is_on_cpu`].
    pub on_cpu: usize,
    /// Offsets of the counters of how often it was switched out, by itself and by others (`nvcsw`,
    /// `nivcsw`), 64 bits.
    pub switches: [usize; 2],
    /// Offset of the time at which it began (`start_time`), 64 bits.
    pub start_time: usize,
    /// Size of a kernel stack (`THREAD_SIZE`), in bytes.
    pub stack_size: u64,
}

/// A task, as it was when it was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Task {
    /// Guest virtual address of its `task_struct`.
    pub addr: Gva,
    /// Its thread id in the first namespace; 0 for idle tasks.
    pub pid: u32,
    /// Its name (`comm`), at most 15 bytes. Control characters are replaced, because a task chooses
    /// its name. `ps` shows more for kernel threads: longer names, and what a worker works on
    /// (fs/proc/array.c: `proc_task_name`).
    pub comm: String,
    /// Its kernel stack, in guest virtual addresses; it starts at 0 if the task has none any more.
    pub stack: Range,
    /// Saved stack pointer, a guest virtual address; valid only while the task is on no CPU.
    pub sp: Gva,
    /// Whether it is on a CPU.
    pub on_cpu: bool,
    /// When it began, in nanoseconds since the guest booted. It tells apart tasks that had the same
    /// address one after the other.
    pub start_time: u64,
    /// Whether it is the idle task of a CPU.
    pub idle: bool,
}

impl TaskLayout {
    /// Reads the layout from the kernel's BTF, and the size of a stack from its symbols.
    ///
    /// # Errors
    /// [`Error::Missing`] if a member or symbol is; [`Error::Odd`] if the size of a stack is not 8,
    /// 16, 32 or 64 KiB.
    pub fn of(kernel: &Kernel<'_>) -> Result<TaskLayout, Error> {
        let btf = kernel.btf()?;
        let member = |path| btf.offset_of("task_struct", path);
        let word = |path| btf.offset_of_sized("task_struct", path, 8);
        let stack_size = ["__start_init_task", "__start_init_stack"]
            .iter()
            .zip(["__end_init_task", "__end_init_stack"])
            .find_map(|(start, end)| {
                Some(
                    kernel
                        .symbols
                        .addr(end)?
                        .0
                        .wrapping_sub(kernel.symbols.addr(start)?.0),
                )
            })
            .ok_or_else(|| {
                Error::Missing("symbol __start_init_task or __start_init_stack".into())
            })?;
        if !stack_size.is_power_of_two() || !(8 << 10..=64 << 10).contains(&stack_size) {
            return Err(Error::Odd(format!(
                "the first task's stack is {stack_size} bytes; expected 8, 16, 32 or 64 KiB"
            )));
        }
        Ok(TaskLayout {
            tasks: member("tasks")?,
            thread_node: member("thread_node")?,
            signal: word("signal")?,
            thread_head: btf.offset_of("signal_struct", "thread_head")?,
            stack: word("stack")?,
            sp: word("thread.sp")?,
            pid: btf.offset_of_sized("task_struct", "pid", 4)?,
            comm: member("comm")?,
            on_cpu: member("on_cpu")?,
            switches: [word("nvcsw")?, word("nivcsw")?],
            start_time: word("start_time")?,
            stack_size,
        })
    }

    fn task(&self, space: &Space<'_>, addr: Gva) -> Result<Task, Error> {
        let word = |offset: usize| space.read_u64(addr.plus(offset as u64));
        let mut comm = [0u8; 16];
        space.read(addr.plus(self.comm as u64), &mut comm)?;
        Ok(Task {
            addr,
            pid: space.read_u32(addr.plus(self.pid as u64))?,
            comm: modules::text(&comm, comm.len()),
            stack: Range::new(Gva(word(self.stack)?), self.stack_size),
            sp: Gva(word(self.sp)?),
            on_cpu: is_on_cpu(space.read_u32(addr.plus(self.on_cpu as u64))?),
            start_time: word(self.start_time)?,
            idle: false,
        })
    }

    /// Reads every task. If the guest runs meanwhile, the lists change: tasks that begin meanwhile
    /// may be missing.
    ///
    /// # Errors
    /// [`Error::Odd`] if a list does not end or changed where it was read, [`Error::Memory`].
    pub fn all(&self, kernel: &Kernel<'_>, space: &Space<'_>) -> Result<Vec<Task>, Error> {
        self.newer(kernel, space, &mut Vec::new(), |_| false)
    }

    /// Reads the tasks that began since those that are `known` were read. `groups` are the
    /// processes of those: for each the guest virtual address of the head of its list of threads.
    /// New processes are added to it.
    ///
    /// The kernel adds a process to the end of its list, and a thread to the end of its process's
    /// list (kernel/fork.c: `copy_process`). A thread that starts another program takes the place
    /// of its process (fs/exec.c: `de_thread`). So new tasks are those behind the last that is
    /// known, and the lists are read from their ends. If a task dies while it is read, and its
    /// memory is given to another task, that one leads back to the end of the list, and no task is
    /// passed over. What leads elsewhere is noticed: a neighbour that doesn't point back, or a task
    /// of another process.
    ///
    /// # Errors
    /// As [`TaskLayout::all`].
    pub fn newer(
        &self,
        kernel: &Kernel<'_>,
        space: &Space<'_>,
        groups: &mut Vec<Gva>,
        known: impl Fn(&Task) -> bool,
    ) -> Result<Vec<Task>, Error> {
        let mut met: HashSet<Gva> = groups.iter().copied().collect();
        let init = kernel.symbols.need("init_task")?;
        let leaders = self.behind(
            space,
            (init.plus(self.tasks as u64), self.tasks),
            &known,
            |_| Ok(true),
        )?;
        for leader in leaders {
            let group = self.group_of(space, leader.addr)?;
            if met.insert(group) {
                groups.push(group);
            }
        }
        let mut found = Vec::new();
        for &group in groups.iter() {
            let list = (group, self.thread_node);
            let is_its = |task: Gva| Ok(self.group_of(space, task)? == group);
            found.extend(self.behind(space, list, &known, is_its)?);
            if found.len() > TASKS_MAX {
                return Err(too_many());
            }
        }
        for addr in idle(kernel, space)? {
            let task = Task {
                idle: true,
                ..self.task(space, addr)?
            };
            if !known(&task) {
                found.push(task);
            }
        }
        Ok(found)
    }

    /// The tasks behind the last that is `known`, in the list whose head is at `head` and whose
    /// links are `node` bytes from the start of each task. `belongs` says whether a task can be in
    /// it.
    fn behind(
        &self,
        space: &Space<'_>,
        (head, node): (Gva, usize),
        known: &impl Fn(&Task) -> bool,
        belongs: impl Fn(Gva) -> Result<bool, Error>,
    ) -> Result<Vec<Task>, Error> {
        let before = |at: Gva| {
            let before = Gva(space.read_u64(at.plus(8))?);
            if space.read_u64(before)? != at.0 {
                return Err(moved(at));
            }
            Ok(before)
        };
        let mut found = Vec::new();
        let mut at = before(head)?;
        while at != head {
            let addr = Gva(at.0.wrapping_sub(node as u64));
            let task = self.task(space, addr)?;
            if !belongs(addr)? {
                return Err(moved(at));
            }
            if known(&task) {
                break;
            }
            if found.len() >= TASKS_MAX {
                return Err(too_many());
            }
            found.push(task);
            at = before(at)?;
        }
        found.reverse();
        Ok(found)
    }

    /// The head of the list of threads of the process of `task`.
    fn group_of(&self, space: &Space<'_>, task: Gva) -> Result<Gva, Error> {
        let signal = Gva(space.read_u64(task.plus(self.signal as u64))?);
        Ok(signal.plus(self.thread_head as u64))
    }

    /// How many tasks are in the lists, which is all but the idle ones.
    fn count(&self, kernel: &Kernel<'_>, space: &Space<'_>) -> Result<usize, Error> {
        let mut found = 0;
        let init = kernel.symbols.need("init_task")?;
        for leader in list(space, init.plus(self.tasks as u64), TASKS_MAX)? {
            let group = self.group_of(space, Gva(leader.0.wrapping_sub(self.tasks as u64)))?;
            found += list(space, group, TASKS_MAX)?.len();
            if found > TASKS_MAX {
                return Err(too_many());
            }
        }
        Ok(found)
    }
}

fn moved(at: Gva) -> Error {
    Error::Odd(format!("the list of tasks changed at {at} as it was read"))
}

fn too_many() -> Error {
    Error::Odd(format!("more than {TASKS_MAX} tasks"))
}

/// Lists all tasks of a running guest, and gives what `read` makes of them. The lists change while
/// they are read. So there are up to 20 tries, each in a fresh [`Space`], but only 3 once they have
/// taken a second.
///
/// # Errors
/// As [`TaskLayout::of`]; as [`TaskLayout::all`] and `read` at the last try.
pub fn snapshot<T>(
    kernel: &Kernel<'_>,
    read: impl Fn(&Space<'_>, Vec<Task>) -> Result<T, Error>,
) -> Result<T, Error> {
    let layout = TaskLayout::of(kernel)?;
    tries(|| {
        let space = kernel.space.fresh();
        let tasks = layout.all(kernel, &space)?;
        read(&space, tasks)
    })
}

fn tries<T>(read: impl Fn() -> Result<T, Error>) -> Result<T, Error> {
    const TRIES: u32 = 20;
    const FEW: u32 = 3;
    const LONG: Duration = Duration::from_secs(1);
    let began = Instant::now();
    let mut tries = 1;
    loop {
        let found = read();
        match found {
            Err(_) if tries < FEW || (tries < TRIES && began.elapsed() < LONG) => tries += 1,
            _ => return found,
        }
    }
}

/// How many tasks there are, with the idle ones. It reads the lists alone, a third of what
/// [`snapshot`] reads.
///
/// # Errors
/// As [`snapshot`].
pub fn count(kernel: &Kernel<'_>) -> Result<usize, Error> {
    let layout = TaskLayout::of(kernel)?;
    tries(|| {
        let space = kernel.space.fresh_in_blocks();
        Ok(layout.count(kernel, &space)? + idle(kernel, &space)?.len())
    })
}
