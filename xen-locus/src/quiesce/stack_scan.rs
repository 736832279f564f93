//! Scans stacks and registers for addresses in watched ranges.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use locus_guest::addr::{Gva, Range};
use locus_guest::{fetch, Vcpu};
use locus_kernel::tasks::Task;
use locus_kernel::unwind::PADDINGS;

use super::cpus::Cpu;
use super::list::GuestTasks;
use super::task::{part_from, MappedTask};
use super::verdict::{InTheWay, Place, Verdict};
use super::watch::Watched;
use crate::blocker::Reason;
use crate::error::Result;

/// What a system call returns that a signal cut short and that continues in `restart_block.fn`
/// (`-ERESTART_RESTARTBLOCK`, include/linux/errno.h).
const CUT_SHORT: u32 = 516u32.wrapping_neg();
/// The number of `restart_syscall`, by which it continues (arch/x86/entry/syscalls/syscall_64.tbl).
const RESTART_SYSCALL: u32 = 219;
/// Its number for a program with pointers of 32 bits in 64-bit mode (`__X32_SYSCALL_BIT`).
const RESTART_SYSCALL_X32: u32 = RESTART_SYSCALL | 1 << 30;
/// Its number for a program in 32-bit mode (arch/x86/entry/syscalls/syscall_32.tbl). For others that is `read`. The kernel
/// clears registers of such a program, so with one of the paddings it may be found where it is none.
const RESTART_SYSCALL_32: u32 = 0;

/// Most blockers that are named. So a guest whose stacks are full of hits can't keep the tool busy.
const BLOCKERS_MAX: usize = 1 << 14;
/// Most of them for one thread id: each hit is compared with those found before.
const OF_THREAD_MAX: usize = 64;

/// Most hits on one stack, about, that are looked at: many of them may be in the same function.
const HITS_MAX: usize = 1 << 10;
/// Bytes of stacks that are scanned between two questions whether the time is over: a whole number of words.
const CLOCK_EVERY: usize = 4 << 10;

/// The live part of a task's stack, when the task is on a CPU.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Live {
    /// Nothing but the registers of user mode.
    Nothing,
    /// From here up.
    From(Gva),
}

/// The tasks that are on a CPU.
#[derive(Default)]
pub(super) struct Running(HashMap<Gva, Live>);

impl Running {
    /// Adds a task that is on a CPU, with this part of its stack live. Two CPUs may speak of the same
    /// task, because user mode chooses much of what a CPU shows. Then all that either says is live.
    pub(super) fn add(&mut self, task: Gva, live: Live) {
        self.0
            .entry(task)
            .and_modify(|known| {
                *known = match (*known, live) {
                    (Live::From(a), Live::From(b)) => Live::From(a.min(b)),
                    (Live::Nothing, other) | (other, Live::Nothing) => other,
                }
            })
            .or_insert(live);
    }

    pub(super) fn contains(&self, task: Gva) -> bool {
        self.0.contains_key(&task)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (Gva, Live)> + '_ {
        self.0.iter().map(|(&task, &live)| (task, live))
    }
}

/// A scan under way, with what it found so far.
pub(super) struct StackScan<'s, 'k, 'm> {
    tasks: &'s GuestTasks<'k, 'm>,
    /// By thread id.
    found: BTreeMap<u32, Vec<InTheWay>>,
    /// How many there are.
    count: usize,
    /// The words scanned last.
    words: Vec<u8>,
    /// Whether the time is over.
    too_long: &'s dyn Fn() -> bool,
    /// It said so.
    late: bool,
    /// Bytes scanned since it was asked.
    unasked: usize,
}

impl<'s, 'k, 'm> StackScan<'s, 'k, 'm> {
    /// A scan that may take as long as it takes.
    pub(super) fn new(tasks: &'s GuestTasks<'k, 'm>) -> StackScan<'s, 'k, 'm> {
        StackScan::within(tasks, &|| false)
    }

    /// One that ends when `too_long` says so: then what it found is [`Verdict::TooLong`].
    pub(super) fn within(
        tasks: &'s GuestTasks<'k, 'm>,
        too_long: &'s dyn Fn() -> bool,
    ) -> StackScan<'s, 'k, 'm> {
        StackScan {
            tasks,
            found: BTreeMap::new(),
            count: 0,
            words: tasks.buffer.take(),
            too_long,
            late: false,
            unasked: 0,
        }
    }

    /// Asks whether the time is over, unless it was over before.
    pub(super) fn is_late(&mut self) -> bool {
        self.unasked = 0;
        self.late = self.late || (self.too_long)();
        self.late
    }

    /// Whether the time was over when that was asked last.
    pub(super) fn was_late(&self) -> bool {
        self.late
    }

    /// Ends the scan, and gives its buffer back.
    pub(super) fn verdict(self) -> Verdict {
        self.tasks.buffer.replace(self.words);
        if self.late {
            Verdict::TooLong
        } else if self.found.is_empty() {
            Verdict::Quiet
        } else {
            Verdict::Blocked(self.found.into_values().flatten().collect())
        }
    }

    fn report(&mut self, task: Option<&Task>, reason: Reason, place: Place) {
        if locus_xen::fault::is_blind() {
            return;
        }
        let pid = task.map_or(0, |t| t.pid);
        let of_thread = self.found.entry(pid).or_default();
        // One line for a task and function says enough.
        let same = |t: &InTheWay| match (&t.place, &place) {
            (Place::In(known, _), Place::In(name, _)) => known == name,
            (known, place) => known == place,
        };
        let room = self.count < BLOCKERS_MAX && of_thread.len() < OF_THREAD_MAX;
        if room && !of_thread.iter().any(same) {
            self.count += 1;
            of_thread.push(InTheWay {
                pid,
                comm: task.map_or_else(|| "?".into(), |t| t.comm.clone()),
                reason,
                place,
            });
        }
    }

    /// Checks where a vCPU is, and notes in `running` which tasks are on it, with the live part of
    /// their stacks. [`StackScan::task`] scans that.
    pub(super) fn vcpu(&mut self, vcpu: &Vcpu, running: &mut Running) -> Result<()> {
        let tasks = self.tasks;
        let current = tasks.current_of(vcpu);
        if tasks.cpus.of_vcpu(vcpu).is_none() && !tasks.may_nest {
            // The GS base is that of no CPU of this kernel: another one runs, after a crash, or this one starts up a CPU.
            self.unreliable(None, vcpu);
        }
        if vcpu.user {
            if let Some(known) = current {
                // These may be registers of a guest of the guest, which chooses them; then the task is in the kernel.
                running.add(
                    known.task.addr,
                    match tasks.may_nest {
                        false => Live::Nothing,
                        true => Live::From(known.task.stack.start),
                    },
                );
                if is_restart(known, vcpu.rax)? {
                    self.report_restart(&known.task, restart_of(tasks, known)?);
                }
            }
            return Ok(());
        }
        let task = current.map(|k| &k.task);
        if let Some((watched, offset)) = tasks.watch.runs_in(vcpu.rip.0) {
            self.report(task, Reason::Running, within(watched, offset));
        }
        let rsp = vcpu.rsp;
        let on = |(range, _): &(Range, _)| range.contains(rsp);
        let mut cpus = tasks.cpus.all.iter();
        let own_stacks = cpus.find_map(|cpu| Some((cpu, cpu.stacks.iter().position(on)?)));
        // All tasks are searched only when it is neither the current task's stack nor one of these.
        let mut owner = current.filter(|k| k.task.stack.contains(rsp));
        if owner.is_none() && own_stacks.is_none() {
            owner = tasks.owner_of_stack(rsp);
        }
        if let Some(known) = owner {
            match current {
                Some(current) if current.task.addr == known.task.addr && !tasks.may_nest => {
                    running.add(known.task.addr, Live::From(rsp));
                }
                // The GS base is that of no CPU: these registers are not this kernel's, but those of a guest of the guest.
                // Its stack pointer says nothing.
                None => running.add(known.task.addr, Live::From(known.task.stack.start)),
                // In the middle of a switch between two tasks. Or user mode chose the stack pointer, and the kernel did
                // not exchange it yet.
                Some(other) => [known, other].into_iter().for_each(|k| {
                    running.add(k.task.addr, Live::From(k.task.stack.start));
                }),
            }
            return Ok(());
        }
        match (own_stacks, current) {
            (Some((cpu, first)), Some(known)) => {
                let from = self.own_stacks(known, cpu, (first, rsp))?;
                running.add(
                    known.task.addr,
                    match tasks.may_nest {
                        false => Live::From(from),
                        true => Live::From(known.task.stack.start),
                    },
                );
            }
            _ => {
                // In the middle of a switch of stacks.
                self.unreliable(task, vcpu);
            }
        }
        Ok(())
    }

    /// Reports a vCPU whose stack can't be judged at this moment.
    fn unreliable(&mut self, task: Option<&Task>, vcpu: &Vcpu) {
        self.report(task, Reason::UnreliableStack, Place::At(vcpu.rip));
    }

    /// Scans the live part of a CPU's own stacks, beginning at a place on the first, and says where
    /// that of its task's begins. The interrupted stack pointer is stored on the stack that was switched
    /// to. So the lowest address into another stack that is found there is it, or lies below it.
    fn own_stacks(&mut self, known: &MappedTask, cpu: &Cpu, first: (usize, Gva)) -> Result<Gva> {
        let stack = known.task.stack;
        let mut lowest = None;
        let mut met = vec![first.0];
        let mut left = vec![first];
        while let Some((n, from)) = left.pop() {
            let Some((range, window)) = cpu.stacks.get(n) else {
                continue;
            };
            let (offset, len) = part_from(*range, from)?;
            let read = |words: &mut [u8]| Ok(window.read(offset, words)?);
            self.words(Some(&known.task), Reason::Running, len, read)?;
            for (other, (range, _)) in cpu.stacks.iter().enumerate() {
                if let (false, Some(at)) = (met.contains(&other), lowest_into(&self.words, *range))
                {
                    met.push(other);
                    left.push((other, at));
                }
            }
            let at = lowest_into(&self.words, stack);
            lowest = lowest.into_iter().chain(at).min();
        }
        // No address into the task's stack: all of it counts as live.
        Ok(lowest.unwrap_or(stack.start))
    }

    /// Scans the live part of a task's stack, which is the whole of it when its stack pointer isn't
    /// known; says whether no word leads into a watched range.
    pub(super) fn task(&mut self, known: &MappedTask, live: Option<Live>) -> Result<bool> {
        let task = &known.task;
        let (reason, from) = match live {
            Some(Live::Nothing) => return Ok(true),
            Some(Live::From(at)) => (Reason::Running, at),
            None if known.is_on_cpu()? => (Reason::Running, task.stack.start),
            None => (Reason::SleepingOn, known.sp()?),
        };
        let (offset, len) = part_from(task.stack, from)?;
        let read = |words: &mut [u8]| known.read(offset, words);
        let clear = self.words(Some(task), reason, len, read)?;
        let restarts = restarts_in(self.tasks, known, &self.words)?;
        self.report_restart(task, restarts);
        Ok(clear && restarts.is_none())
    }

    fn report_restart(&mut self, task: &Task, watched: Option<&Watched>) {
        if let Some(watched) = watched {
            self.report(Some(task), Reason::RestartBlock, within(watched, 0));
        }
    }

    /// Scans `len` bytes of a stack; they stay in `self.words`. Says whether no word leads into a watched range, which is not
    /// so when the time is over.
    fn words(
        &mut self,
        task: Option<&Task>,
        reason: Reason,
        len: usize,
        read: impl Fn(&mut [u8]) -> Result<()>,
    ) -> Result<bool> {
        let tasks = self.tasks;
        let mut words = std::mem::take(&mut self.words);
        words.clear();
        if self.late {
            self.words = words;
            return Ok(false);
        }
        words.resize(len, 0);
        read(&mut words)?;
        let mut hits = 0;
        for part in words.chunks(CLOCK_EVERY) {
            for (watched, offset) in tasks.watch.hits(part) {
                self.report(task, reason, within(watched, offset));
                hits += 1;
            }
            self.unasked += part.len();
            // A stack that is full of hits says no more than one with a few.
            if self.count == BLOCKERS_MAX
                || hits >= HITS_MAX
                || (self.unasked >= CLOCK_EVERY && self.is_late())
            {
                break;
            }
        }
        self.words = words;
        Ok(hits == 0 && !self.late)
    }
}

/// The watched function in which a task will continue its system call, which a signal cut short. The
/// task is stopped meanwhile, or on its way to user mode and back. `words` end where its stack does.
pub(super) fn restarts_in<'s>(
    tasks: &'s GuestTasks<'_, '_>,
    known: &MappedTask,
    words: &[u8],
) -> Result<Option<&'s Watched>> {
    for padding in PADDINGS {
        let word = |before: usize| {
            let end = words.len().checked_sub(usize::try_from(padding).ok()?)?;
            fetch::u64(words, end.checked_sub(before)?)
        };
        let Some((result, call)) = word(tasks.restart.result).zip(word(tasks.restart.call)) else {
            continue;
        };
        if low(result) == CUT_SHORT || is_restart(known, result)? || is_restart(known, call)? {
            return restart_of(tasks, known);
        }
    }
    Ok(None)
}

/// Whether `number` is that of `restart_syscall` for the program that the task runs.
fn is_restart(known: &MappedTask, number: u64) -> Result<bool> {
    Ok(match low(number) {
        RESTART_SYSCALL | RESTART_SYSCALL_X32 => true,
        RESTART_SYSCALL_32 => known.may_restart_32()?,
        _ => false,
    })
}

/// The watched function that is the task's `restart_block.fn`.
fn restart_of<'s>(
    tasks: &'s GuestTasks<'_, '_>,
    known: &MappedTask,
) -> Result<Option<&'s Watched>> {
    let function = known.restart()?;
    Ok(tasks.watch.hit(function.wrapping_add(1)).map(|(w, _)| w))
}

/// The part of a register that the kernel takes for a number of a system call or for its error.
fn low(register: u64) -> u32 {
    #[allow(clippy::cast_possible_truncation)] // the lower half
    let low = register as u32;
    low
}

fn within(watched: &Watched, offset: u64) -> Place {
    Place::In(Arc::clone(&watched.name), offset)
}

fn lowest_into(words: &[u8], range: Range) -> Option<Gva> {
    words
        .chunks_exact(8)
        .filter_map(|w| fetch::u64(w, 0))
        .map(Gva)
        .filter(|&at| range.contains(at))
        .min()
}
