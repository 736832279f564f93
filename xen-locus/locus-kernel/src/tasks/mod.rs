//! All tasks of the guest: every thread of every process, and the idle task of every CPU.
//!
//! `init_task.tasks` links the thread-group leaders, `signal->thread_head` the threads of a group
//! (include/linux/sched/signal.h: `for_each_process_thread`); idle tasks hang in neither and come
//! from the per-CPU pointer `idle_threads` (kernel/smpboot.c).

use std::collections::HashSet;
use std::time::{Duration, Instant};

use locus_guest::addr::{Gva, Range};
use locus_guest::fetch;
use locus_guest::space::Space;

use super::{list, Error, Kernel};

/// Most tasks believed.
pub const TASKS_MAX: usize = 1 << 17;
/// Most CPUs believed (`NR_CPUS` of Debian is 8192).
pub const CPUS_MAX: usize = 8192;

/// Where the members of `task_struct` stand that are looked at; offsets in bytes.
#[derive(Debug, Clone, Copy)]
pub struct TaskLayout {
    tasks: usize,
    thread_node: usize,
    signal: usize,
    thread_head: usize,
    stack: usize,
    /// Offset of the saved stack pointer.
    pub sp: usize,
    pid: usize,
    comm: usize,
    /// Offset of the flag that says it is on a CPU.
    pub on_cpu: usize,
    /// Offsets of the counters of how often it was switched out, by its own will and not.
    pub switches: [usize; 2],
    /// Offset of when it began.
    pub start_time: usize,
    /// Size of a kernel stack (`THREAD_SIZE`), in bytes.
    pub stack_size: u64,
}

/// One task.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Task {
    /// Its `task_struct`.
    pub addr: Gva,
    /// Its thread id; 0 for idle tasks.
    pub pid: u32,
    /// Its name (`comm`), at most 15 bytes. /proc and `ps` show more for kernel threads with longer
    /// names and append to a worker's what it works on (fs/proc/array.c: `proc_task_name`). A task
    /// chooses it: control characters are replaced.
    pub comm: String,
    /// Its kernel stack.
    pub stack: Range,
    /// Saved stack pointer; right while it isn't running.
    pub sp: Gva,
    /// It is on a CPU.
    pub on_cpu: bool,
    /// When it began; tells apart two tasks that had the same address one after the other.
    pub start_time: u64,
    /// It is the idle task of a CPU.
    pub idle: bool,
}

impl TaskLayout {
    /// Reads the layout from the kernel's BTF.
    ///
    /// # Errors
    /// A member is missing, or the stack size is unbelievable.
    pub fn of(kernel: &Kernel<'_>) -> Result<TaskLayout, Error> {
        let btf = kernel.btf()?;
        let member = |path| btf.offset_of("task_struct", path);
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
            signal: member("signal")?,
            thread_head: btf.offset_of("signal_struct", "thread_head")?,
            stack: member("stack")?,
            sp: member("thread.sp")?,
            pid: member("pid")?,
            comm: member("comm")?,
            on_cpu: member("on_cpu")?,
            switches: [member("nvcsw")?, member("nivcsw")?],
            start_time: member("start_time")?,
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
            comm: super::modules::text(&comm, comm.len()),
            stack: Range::new(Gva(word(self.stack)?), self.stack_size),
            sp: Gva(word(self.sp)?),
            on_cpu: space.read_u32(addr.plus(self.on_cpu as u64))? != 0,
            start_time: word(self.start_time)?,
            idle: false,
        })
    }

    /// Reads every task. While the guest runs the lists move under the reader: those born meanwhile may be missing.
    ///
    /// # Errors
    /// A list that does not end or that changed where it was read, or memory that can't be read.
    pub fn all(&self, kernel: &Kernel<'_>, space: &Space<'_>) -> Result<Vec<Task>, Error> {
        self.newer(kernel, space, &mut Vec::new(), |_| false)
    }

    /// Reads the tasks that were born since those that are `known` were read, whose processes (where the list of
    /// their threads begins) are `groups`; new ones are added to that.
    ///
    /// The kernel adds a process to the end of its list, and a thread to the end of its process'
    /// (kernel/fork.c: `copy_process`); a thread that starts another program takes its process' place
    /// (fs/exec.c: `de_thread`). So the new ones are those behind the last that is known, and the lists are read from
    /// their ends: a task that dies under the reader, and whose memory is another's then, leads back to the
    /// end, from where nobody is passed over. What leads elsewhere is noticed: a neighbour that doesn't point back,
    /// or one of another process.
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

    /// The tasks behind the last that is `known`, in a list that begins somewhere and goes through the tasks
    /// so many bytes from their starts, and whose elements all are what `belongs` says.
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

    /// Where the list of the threads begins that belong to a task's process.
    fn group_of(&self, space: &Space<'_>, task: Gva) -> Result<Gva, Error> {
        let signal = Gva(space.read_u64(task.plus(self.signal as u64))?);
        Ok(signal.plus(self.thread_head as u64))
    }

    /// How many tasks are in the lists: all but the idle ones.
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

/// Lists all tasks of a running guest, as `read` wants them. The list moves while it is read, so
/// there are several tries, each with nothing remembered of the one before, and fewer when they take
/// long.
///
/// # Errors
/// As [`TaskLayout::all`] and `read`, at the last try.
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

/// How many tasks there are, idle ones included. Reads the lists alone, which is a third of what
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

/// What people want to know of a task, and a pause doesn't: kept apart, so that the look before a
/// pause reads no more than it needs.
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
    /// Id of its process.
    pub tgid: u32,
    /// Its state, as the letter in /proc/PID/stat.
    pub state: char,
    /// The CPU it runs on, or ran on last.
    pub cpu: u32,
    /// It gives up the CPU for the last time (`TASK_DEAD`). Once it is on none it is in no function,
    /// and its stack may be another's.
    pub dead: bool,
}

impl DetailLayout {
    /// Reads from BTF where they stand.
    ///
    /// `state` is called `__state` and is 32 bits wide since Linux kernel commit 2f064a59a11f
    /// ("sched: Change task_struct::state"); the bits reported are all in the lower half. The CPU
    /// went to `thread_info` with Linux kernel commit bcf9033e5449 ("sched: move CPU field back into
    /// thread_info if THREAD_INFO_IN_TASK=y").
    ///
    /// # Errors
    /// A member is missing.
    pub fn of(kernel: &Kernel<'_>) -> Result<DetailLayout, Error> {
        let btf = kernel.btf()?;
        let either = |a, b| {
            btf.offset_of("task_struct", a)
                .or_else(|_| btf.offset_of("task_struct", b))
        };
        Ok(DetailLayout {
            tgid: btf.offset_of("task_struct", "tgid")?,
            state: either("__state", "state")?,
            exit_state: btf.offset_of("task_struct", "exit_state")?,
            cpu: either("thread_info.cpu", "cpu")?,
        })
    }

    /// Reads the details of the task at `task`.
    ///
    /// # Errors
    /// Memory that can't be read.
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
fn letter(state: u32, exit_state: u32) -> char {
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

/// Bases of the per-CPU areas of all possible CPUs, by the guest's CPU number.
///
/// # Errors
/// The kernel's tables can't be read.
pub fn percpu_bases(kernel: &Kernel<'_>, space: &Space<'_>) -> Result<Vec<u64>, Error> {
    let table = kernel.symbols.need("__per_cpu_offset")?;
    let count = space.read_u32(kernel.symbols.need("nr_cpu_ids")?)? as usize;
    if count == 0 || count > CPUS_MAX {
        return Err(Error::Odd(format!(
            "nr_cpu_ids is {count}; expected 1 to {CPUS_MAX}"
        )));
    }
    let bytes = space.read_vec(table, count * 8)?;
    Ok((0..count)
        .filter_map(|cpu| fetch::u64(&bytes, cpu * 8))
        .collect())
}

/// A per-CPU variable's address on the CPU whose area is at `base`.
#[must_use]
pub fn percpu(symbol: Gva, base: u64) -> Gva {
    Gva(symbol.0.wrapping_add(base))
}

fn idle(kernel: &Kernel<'_>, space: &Space<'_>) -> Result<Vec<Gva>, Error> {
    let pointer = kernel.symbols.need("idle_threads")?;
    let mut found = Vec::new();
    for base in percpu_bases(kernel, space)? {
        // A possible CPU that was never brought up has no area or no idle task.
        if let Ok(task) = space.read_u64(percpu(pointer, base)) {
            if task != 0 {
                found.push(Gva(task));
            }
        }
    }
    Ok(found)
}

/// Where the kernel keeps the running task of a CPU, as a per-CPU address.
///
/// `current_task`, or a member of `pcpu_hot` since Linux kernel commit e57ef2ed97c1 ("x86: Put hot
/// per CPU variables into a struct") (in v6.2), until it was a variable again in v6.15.
#[must_use]
pub fn current_symbol(kernel: &Kernel<'_>) -> Option<Gva> {
    if let Some(at) = kernel.symbols.addr("current_task") {
        return Some(at);
    }
    let hot = kernel.symbols.addr("pcpu_hot")?;
    let offset = kernel
        .btf()
        .ok()?
        .offset_of("pcpu_hot", "current_task")
        .ok()?;
    Some(hot.plus(offset as u64))
}

/// Where the kernel counts how often a CPU switched between tasks, as a per-CPU address
/// (kernel/sched/sched.h: `struct rq`).
#[must_use]
pub fn switches_symbol(kernel: &Kernel<'_>) -> Option<Gva> {
    let offset = kernel.btf().ok()?.offset_of("rq", "nr_switches").ok()?;
    Some(kernel.symbols.addr("runqueues")?.plus(offset as u64))
}

#[cfg(test)]
mod tests;
