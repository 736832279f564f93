//! One look at stacks and registers.

use std::collections::{BTreeMap, HashMap};

use locus_guest::addr::{Gva, Range};
use locus_guest::{fetch, Vcpu};
use locus_kernel::tasks::Task;
use locus_kernel::unwind::PADDINGS;

use super::prescan::{Cpu, Known, Prescan};
use super::{Verdict, Watched};
use crate::blocker::{Blocker, Reason};
use crate::error::Result;

/// What a system call returns that a signal cut short and that goes on in `restart_block.fn`
/// (`-ERESTART_RESTARTBLOCK`, include/linux/errno.h), and the number of the one by which it does
/// (arch/x86/entry/syscalls/syscall_64.tbl).
const CUT_SHORT: u64 = 516u64.wrapping_neg();
const RESTART_SYSCALL: u64 = 219;

/// Most that are named: a guest whose stacks are full of hits is not to keep us busy with it.
const BLOCKERS_MAX: usize = 1 << 14;

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
    /// A task is on a CPU, with this part of its stack live. Where two CPUs say so, for user mode chooses much of what a CPU
    /// shows, all that either says is live.
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

/// A look under way, with what it found so far.
pub(super) struct Look<'s, 'k, 'm> {
    scan: &'s Prescan<'k, 'm>,
    /// By thread.
    found: BTreeMap<u32, Vec<Blocker>>,
    /// How many there are.
    count: usize,
    words: Vec<u8>,
}

impl<'s, 'k, 'm> Look<'s, 'k, 'm> {
    pub(super) fn new(scan: &'s Prescan<'k, 'm>) -> Look<'s, 'k, 'm> {
        Look {
            scan,
            found: BTreeMap::new(),
            count: 0,
            words: scan.room.take(),
        }
    }

    pub(super) fn verdict(self) -> Verdict {
        self.scan.room.replace(self.words);
        if self.found.is_empty() {
            Verdict::Quiet
        } else {
            Verdict::Blocked(self.found.into_values().flatten().collect())
        }
    }

    fn report(&mut self, task: Option<&Task>, reason: Reason, name: &str, offset: u64) {
        if locus_xen::fault::is_blind() {
            return;
        }
        let pid = task.map_or(0, |t| t.pid);
        let of_thread = self.found.entry(pid).or_default();
        // One line a task and function says enough.
        if self.count < BLOCKERS_MAX && !of_thread.iter().any(|b| b.function == name) {
            self.count += 1;
            of_thread.push(Blocker {
                pid,
                comm: task.map_or_else(|| "?".into(), |t| t.comm.clone()),
                reason,
                function: name.into(),
                offset,
            });
        }
    }

    /// Looks where a vCPU is, and notes in `running` which tasks are on it, with the live part of
    /// their stacks, which is left to [`Look::task`].
    pub(super) fn vcpu(&mut self, vcpu: &Vcpu, running: &mut Running) -> Result<()> {
        let scan = self.scan;
        let current = scan.current_of(vcpu);
        if vcpu.user {
            if let Some(known) = current {
                running.add(known.task.addr, Live::Nothing);
                if vcpu.rax == RESTART_SYSCALL {
                    let hit = scan.watch.hit(known.restart()?.wrapping_add(1));
                    self.report_restart(&known.task, hit.map(|(w, _)| w));
                }
            }
            return Ok(());
        }
        let task = current.map(|k| &k.task);
        if let Some((watched, offset)) = scan.watch.hit(vcpu.rip.0) {
            self.report(task, Reason::Running, &watched.name, offset);
        }
        let rsp = vcpu.rsp;
        let on = |(range, _): &(Range, _)| range.contains(rsp);
        let mut cpus = scan.cpus.iter();
        let own_stacks = cpus.find_map(|cpu| Some((cpu, cpu.stacks.iter().position(on)?)));
        // All tasks are asked only when it is neither the current task's stack nor one of these.
        let mut owner = current.filter(|k| k.task.stack.contains(rsp));
        if owner.is_none() && own_stacks.is_none() {
            owner = scan.owner_of_stack(rsp);
        }
        if let Some(known) = owner {
            match current.filter(|k| k.task.addr != known.task.addr) {
                None => running.add(known.task.addr, Live::From(rsp)),
                // In the middle of a switch between two tasks; or user mode chose the stack pointer, and the kernel did
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
                running.add(known.task.addr, Live::From(from));
            }
            _ => {
                // In the middle of a switch of stacks.
                let (name, offset) = scan
                    .kernel
                    .symbols
                    .covering(vcpu.rip)
                    .unwrap_or_else(|| ("?".into(), 0));
                self.report(task, Reason::UnreliableStack, &name, offset);
            }
        }
        Ok(())
    }

    /// Scans the live part of a CPU's own stacks, beginning at a place on the first, and says where
    /// that of its task's begins. The interrupted stack pointer stands on the stack that was switched
    /// to: the lowest address into another that is found there is it, or lies below it.
    fn own_stacks(&mut self, known: &Known, cpu: &Cpu, first: (usize, Gva)) -> Result<Gva> {
        let stack = known.task.stack;
        let mut lowest = None;
        let mut met = vec![first.0];
        let mut left = vec![first];
        while let Some((n, from)) = left.pop() {
            let Some((range, window)) = cpu.stacks.get(n) else {
                continue;
            };
            let from = Gva(from.0 & !7);
            let offset = usize::try_from(from.0 - range.start.0).unwrap_or(0);
            let read = |words: &mut [u8]| Ok(window.read(offset, words)?);
            self.words(
                Some(&known.task),
                Reason::Running,
                range.end.0 - from.0,
                read,
            )?;
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
        Ok(lowest.unwrap_or(stack.start))
    }

    /// Scans the live part of a task's stack, which is the whole of it when its stack pointer isn't
    /// known; says whether nothing watched is there.
    pub(super) fn task(&mut self, known: &Known, live: Option<Live>) -> Result<bool> {
        let task = &known.task;
        let (reason, from) = match live {
            Some(Live::Nothing) => return Ok(true),
            Some(Live::From(at)) => (Reason::Running, at),
            None if known.is_on_cpu()? => (Reason::Running, task.stack.start),
            None => (Reason::SleepingOn, known.sp()?),
        };
        let from = if task.stack.contains(from) {
            Gva(from.0 & !7)
        } else {
            task.stack.start
        };
        let offset = usize::try_from(from.0 - task.stack.start.0).unwrap_or(0);
        let read = |words: &mut [u8]| known.read(offset, words);
        let clear = self.words(Some(task), reason, task.stack.end.0 - from.0, read)?;
        let restarts = Self::restarts(self.scan, known, &self.words)?;
        self.report_restart(task, restarts);
        Ok(clear && restarts.is_none())
    }

    /// The watched function that a task will go on in with its system call, which a signal cut short:
    /// it is stopped meanwhile, or on its way to user mode and back. `words` end where its stack does.
    pub(super) fn restarts(
        scan: &'s Prescan<'k, 'm>,
        known: &Known,
        words: &[u8],
    ) -> Result<Option<&'s Watched>> {
        let due = |padding: u64| {
            let end = words.len().checked_sub(usize::try_from(padding).ok()?)?;
            let word = |before: usize| fetch::u64(words, end.checked_sub(before)?);
            let (result, call) = (word(scan.restart.result)?, word(scan.restart.call)?);
            Some(result == CUT_SHORT || result == RESTART_SYSCALL || call == RESTART_SYSCALL)
        };
        if !PADDINGS
            .into_iter()
            .any(|padding| due(padding) == Some(true))
        {
            return Ok(None);
        }
        let function = known.restart()?;
        Ok(scan.watch.hit(function.wrapping_add(1)).map(|(w, _)| w))
    }

    fn report_restart(&mut self, task: &Task, watched: Option<&Watched>) {
        if let Some(watched) = watched {
            self.report(Some(task), Reason::RestartBlock, &watched.name, 0);
        }
    }

    /// Scans `len` bytes of a stack; they stay in `self.words`.
    fn words(
        &mut self,
        task: Option<&Task>,
        reason: Reason,
        len: u64,
        read: impl Fn(&mut [u8]) -> Result<()>,
    ) -> Result<bool> {
        let scan = self.scan;
        let mut words = std::mem::take(&mut self.words);
        words.resize(usize::try_from(len).unwrap_or(0), 0);
        read(&mut words)?;
        let mut clear = true;
        for (watched, offset) in scan.watch.hits(&words) {
            self.report(task, reason, &watched.name, offset);
            clear = false;
            if self.count == BLOCKERS_MAX {
                break;
            }
        }
        self.words = words;
        Ok(clear)
    }
}

fn lowest_into(words: &[u8], range: Range) -> Option<Gva> {
    words
        .chunks_exact(8)
        .filter_map(|w| fetch::u64(w, 0))
        .map(Gva)
        .filter(|&at| range.contains(at))
        .min()
}
