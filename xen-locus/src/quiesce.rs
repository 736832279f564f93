//! Is anybody inside the code that is about to change?
//!
//! Every vCPU's registers and every task's kernel stack are looked at. A stack is not unwound but
//! scanned: each word of its live part that could be a return address into a watched range counts.
//! That gives false alarms (a stale or unrelated word), never misses.
//!
//! The work is split so that the guest is paused only for the last look. While it runs,
//! [`Prescan::refresh`] lists the tasks and maps their stacks; inside the pause [`Prescan::look`]
//! maps nothing. It trusts the list if no task was born since: the kernel counts births in
//! `total_forks` (kernel/fork.c) under the lock that links a new task. A task that died since is
//! scanned all the same, which can only alarm. A task not yet counted has never run.

use std::collections::HashMap;

use serde::Serialize;

use crate::addr::{Gva, Range};
use crate::error::{Error, Result};
use crate::guest::space::{Pin, Space};
use crate::guest::{fetch, Vcpu, Window};
use crate::kernel::tasks::{self, Layout, Task};
use crate::kernel::Kernel;

/// Why someone is in the way, in the kernel's vocabulary (kernel/livepatch/transition.c).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reason {
    /// On a CPU, inside the function.
    Running,
    /// Off the CPU, with the function on its stack.
    SleepingOn,
    /// Its stack can't be judged at this moment.
    UnreliableStack,
}

impl std::fmt::Display for Reason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Reason::Running => "running",
            Reason::SleepingOn => "sleeping-on",
            Reason::UnreliableStack => "unreliable-stack",
        })
    }
}

/// Someone in the way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Blocker {
    /// Thread id; 0 for an idle task or a vCPU whose task isn't known.
    pub pid: u32,
    /// Its name.
    pub comm: String,
    /// Why.
    pub reason: Reason,
    /// The function it is in, where known.
    pub function: String,
    /// Offset of the address found, from the function's start.
    pub offset: u64,
}

/// A range that nobody may be in.
#[derive(Clone, Debug)]
pub struct Watched {
    /// From its first byte to its end.
    pub range: Range,
    /// What a person calls it.
    pub name: String,
}

/// Ranges that nobody may be in, sorted.
#[derive(Clone, Debug, Default)]
pub struct Watch {
    sorted: Vec<Watched>,
    low: u64,
    high: u64,
}

impl Watch {
    /// Watches `ranges` and the trampolines behind which kretprobes and the function-graph tracer
    /// hide return addresses: who is below one of those can't be judged.
    #[must_use]
    pub fn new(kernel: &Kernel<'_>, mut ranges: Vec<Watched>) -> Watch {
        for name in [
            "arch_rethook_trampoline",
            "__kretprobe_trampoline",
            "return_to_handler",
        ] {
            if let Some(at) = kernel.symbols.addr(name) {
                let len = kernel.symbols.room(at).unwrap_or(0);
                ranges.push(trampoline(at, len, name));
            }
        }
        Watch::of(ranges)
    }

    fn of(mut ranges: Vec<Watched>) -> Watch {
        ranges.sort_by_key(|w| w.range.start);
        let low = ranges.first().map_or(u64::MAX, |w| w.range.start.0);
        let high = ranges.iter().map(|w| w.range.end.0).max().unwrap_or(0);
        Watch {
            sorted: ranges,
            low,
            high,
        }
    }

    /// Whether `word` could be a place in a watched range where a thread goes on. The first byte is
    /// no such place: who is there, or has a pointer to there, enters the function by the redirect.
    /// One past the end is: the last instruction may be a call that never returns.
    #[must_use]
    pub fn hit(&self, word: u64) -> Option<(&Watched, u64)> {
        if cfg!(feature = "blind") || word <= self.low || word > self.high {
            return None;
        }
        self.sorted
            .iter()
            .find(|w| word > w.range.start.0 && word <= w.range.end.0)
            .map(|w| (w, word - w.range.start.0))
    }
}

/// A trampoline at `at`: in the place of a return address stands that of its first byte, which is no
/// hit of a function's.
fn trampoline(at: Gva, len: u64, name: &str) -> Watched {
    let start = Gva(at.0.saturating_sub(1));
    Watched {
        range: Range::new(start, len.saturating_add(1)),
        name: name.into(),
    }
}

/// What a look showed.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Nobody is in the way.
    Quiet,
    /// These are.
    Blocked(Vec<Blocker>),
    /// The guest's tasks changed since they were listed: list them again.
    Moved,
    /// It would take longer than the pause may last.
    TooLong,
}

impl Verdict {
    /// Somebody sleeps in the way: that holds whether the guest is paused or not.
    #[must_use]
    pub fn is_sleepers(&self) -> bool {
        matches!(self, Verdict::Blocked(all) if all.iter().any(|b| b.reason == Reason::SleepingOn))
    }
}

struct Known {
    task: Task,
    sp: Pin,
    on_cpu: Pin,
    stack: Box<dyn Window>,
}

struct Cpu {
    base: u64,
    current: Option<Pin>,
    irq_stack: Option<(Range, Box<dyn Window>)>,
}

/// The guest's tasks and stacks, listed and mapped while it runs.
pub struct Prescan<'k, 'm> {
    kernel: &'k Kernel<'m>,
    space: Space<'m>,
    layout: Layout,
    forks_at: Pin,
    forks: u64,
    known: HashMap<Gva, Known>,
    cpus: Vec<Cpu>,
}

impl std::fmt::Debug for Prescan<'_, '_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Prescan")
            .field("tasks", &self.known.len())
            .finish_non_exhaustive()
    }
}

impl<'k, 'm> Prescan<'k, 'm> {
    /// Prepares to look at the tasks of `kernel`.
    ///
    /// # Errors
    /// The kernel lacks a symbol or type that is needed.
    pub fn new(kernel: &'k Kernel<'m>) -> Result<Prescan<'k, 'm>> {
        let space = kernel.space.fresh();
        let forks_at = space.pin(kernel.symbols.need("total_forks")?)?;
        Ok(Prescan {
            kernel,
            layout: Layout::of(kernel)?,
            forks: 0,
            forks_at,
            known: HashMap::new(),
            cpus: Vec::new(),
            space,
        })
    }

    /// Lists the tasks anew, while the guest runs, and maps the stacks of those not known yet.
    ///
    /// # Errors
    /// [`Error::TryAgain`] when the list moved too much while it was read; else as reading memory.
    pub fn refresh(&mut self) -> Result<()> {
        const TRIES: u32 = 20;
        // Who waits for a quiet moment lists the tasks again and again, until a deadline.
        self.space.budget().refill();
        let mut last = None;
        for _ in 0..TRIES {
            match self.list() {
                Ok(()) => return Ok(()),
                // A task went away while it was read: its memory may hold anything.
                Err(error) => last = Some(error),
            }
            self.space = self.kernel.space.fresh();
        }
        Err(Error::TryAgain(format!(
            "the guest's task list could not be read in {TRIES} tries: {}",
            last.map_or_else(String::new, |e| e.to_string())
        )))
    }

    fn list(&mut self) -> Result<()> {
        self.forks = self.forks_at.u64()?;
        let tasks = self.layout.all(self.kernel, &self.space)?;
        let mut known = HashMap::with_capacity(tasks.len());
        // Stacks live in vmalloc space, whose page tables change: walk them anew.
        let fresh = self.kernel.space.fresh();
        for task in tasks {
            let same = |k: &Known| {
                (k.task.pid, k.task.start_time, k.task.stack)
                    == (task.pid, task.start_time, task.stack)
            };
            let entry = match self.known.remove(&task.addr).filter(same) {
                Some(known) => known,
                None => {
                    let frames = fresh.frames(task.stack.start, task.stack.len())?;
                    Known {
                        sp: self.space.pin(task.addr.plus(self.layout.sp as u64))?,
                        on_cpu: self.space.pin(task.addr.plus(self.layout.on_cpu as u64))?,
                        stack: self.space.map(&frames)?,
                        task,
                    }
                }
            };
            known.insert(entry.task.addr, entry);
        }
        self.known = known;
        if self.cpus.is_empty() {
            self.cpus = self.list_cpus()?;
        }
        Ok(())
    }

    /// Per CPU: where its running task stands, and its interrupt stack (`hardirq_stack_ptr`, the
    /// address one past its last word but one: arch/x86/kernel/irq_64.c).
    fn list_cpus(&self) -> Result<Vec<Cpu>> {
        let kernel = self.kernel;
        let current = tasks::current_symbol(kernel);
        let irq = kernel.symbols.addr("hardirq_stack_ptr").or_else(|| {
            let offset = kernel
                .btf()
                .ok()?
                .offset_of("pcpu_hot", "hardirq_stack_ptr")
                .ok()?;
            Some(kernel.symbols.addr("pcpu_hot")?.plus(offset as u64))
        });
        let bases = tasks::percpu_bases(kernel, &self.space)?;
        Ok(bases
            .into_iter()
            .map(|base| {
                let current = current.and_then(|at| self.space.pin(tasks::percpu(at, base)).ok());
                let irq_stack = irq.and_then(|at| {
                    let top = self.space.read_u64(tasks::percpu(at, base)).ok()?;
                    let end = top.checked_add(64)? & !0xfff;
                    let start = Gva(end.checked_sub(self.layout.stack_size)?);
                    let range = Range::new(start, self.layout.stack_size);
                    let frames = self.space.frames(range.start, range.len()).ok()?;
                    Some((range, self.space.map(&frames).ok()?))
                });
                Cpu {
                    base,
                    current,
                    irq_stack,
                }
            })
            .collect())
    }

    /// Whether tasks were born since they were listed.
    ///
    /// # Errors
    /// Memory can't be read.
    pub fn moved(&self) -> Result<bool> {
        Ok(self.forks_at.u64()? != self.forks)
    }

    /// Looks at everything, and maps nothing. What it says holds only if the guest is paused and
    /// has not [`Self::moved`].
    ///
    /// # Errors
    /// Memory can't be read.
    pub fn look(
        &self,
        vcpus: &[Vcpu],
        watch: &Watch,
        too_long: &dyn Fn() -> bool,
    ) -> Result<Verdict> {
        let mut look = Look {
            scan: self,
            watch,
            found: Vec::new(),
            words: Vec::new(),
        };
        let mut stacks: HashMap<Gva, Live> = HashMap::new();
        for vcpu in vcpus.iter().filter(|v| v.online) {
            look.vcpu(vcpu, &mut stacks)?;
        }
        for (n, known) in self.known.values().enumerate() {
            if n % 64 == 0 && too_long() {
                return Ok(Verdict::TooLong);
            }
            look.task(known, stacks.get(&known.task.addr).copied())?;
        }
        Ok(if look.found.is_empty() {
            Verdict::Quiet
        } else {
            Verdict::Blocked(look.found)
        })
    }

    fn owner_of_stack(&self, rsp: Gva) -> Option<&Known> {
        self.known.values().find(|k| k.task.stack.contains(rsp))
    }

    fn current_of(&self, vcpu: &Vcpu) -> Option<&Known> {
        // In the kernel's entry code the two GS bases may not be exchanged yet.
        let cpu = self
            .cpus
            .iter()
            .find(|c| c.base == vcpu.gs_base)
            .or_else(|| self.cpus.iter().find(|c| c.base == vcpu.gs_other))?;
        self.known.get(&Gva(cpu.current.as_ref()?.u64().ok()?))
    }
}

/// The live part of a task's stack, when the task is on a CPU.
#[derive(Clone, Copy)]
enum Live {
    /// Nothing but the registers of user mode.
    Nothing,
    /// From here up.
    From(Gva),
}

struct Look<'s, 'k, 'm> {
    scan: &'s Prescan<'k, 'm>,
    watch: &'s Watch,
    found: Vec<Blocker>,
    words: Vec<u8>,
}

impl Look<'_, '_, '_> {
    fn report(&mut self, task: Option<&Task>, reason: Reason, name: &str, offset: u64) {
        if cfg!(feature = "blind") {
            return;
        }
        let blocker = Blocker {
            pid: task.map_or(0, |t| t.pid),
            comm: task.map_or_else(|| "?".into(), |t| t.comm.clone()),
            reason,
            function: name.into(),
            offset,
        };
        // One line a task and function says enough.
        let same = |b: &Blocker| b.pid == blocker.pid && b.function == blocker.function;
        if !self.found.iter().any(same) {
            self.found.push(blocker);
        }
    }

    fn vcpu(&mut self, vcpu: &Vcpu, stacks: &mut HashMap<Gva, Live>) -> Result<()> {
        let scan = self.scan;
        let current = scan.current_of(vcpu);
        if vcpu.user {
            if let Some(known) = current {
                stacks.insert(known.task.addr, Live::Nothing);
            }
            return Ok(());
        }
        let task = current.map(|k| &k.task);
        if let Some((watched, offset)) = self.watch.hit(vcpu.rip) {
            self.report(task, Reason::Running, &watched.name, offset);
        }
        let rsp = Gva(vcpu.rsp);
        if let Some(known) = scan.owner_of_stack(rsp) {
            stacks.insert(known.task.addr, Live::From(rsp));
            return Ok(());
        }
        let on_irq_stack = scan
            .cpus
            .iter()
            .filter_map(|cpu| cpu.irq_stack.as_ref())
            .find(|(range, _)| range.contains(rsp));
        match (on_irq_stack, current) {
            (Some((range, window)), Some(known)) => {
                let lowest = self.stack(task, Reason::Running, *range, &**window, rsp)?;
                // The interrupted stack pointer stands on this stack: the lowest address into the
                // task's stack that is found there is it, or lies below it.
                let from = lowest_into(&self.words, known.task.stack).unwrap_or(lowest);
                stacks.insert(known.task.addr, Live::From(from));
            }
            _ => {
                // On an exception or entry stack, or in the middle of a switch of stacks.
                let (name, offset) = scan
                    .kernel
                    .symbols
                    .covering(Gva(vcpu.rip))
                    .unwrap_or_else(|| ("?".into(), 0));
                self.report(task, Reason::UnreliableStack, &name, offset);
            }
        }
        Ok(())
    }

    fn task(&mut self, known: &Known, live: Option<Live>) -> Result<()> {
        let task = &known.task;
        let running = known.on_cpu.u32()? != 0;
        let from = match live {
            Some(Live::Nothing) => return Ok(()),
            Some(Live::From(at)) => at,
            None if running => task.stack.start,
            None => Gva(known.sp.u64()?),
        };
        let reason = if running {
            Reason::Running
        } else {
            Reason::SleepingOn
        };
        self.stack(Some(task), reason, task.stack, &*known.stack, from)
            .map(|_| ())
    }

    /// Scans `range` from `from` up, the whole of it if `from` lies elsewhere; returns where it
    /// began. The words stay in `self.words`.
    fn stack(
        &mut self,
        task: Option<&Task>,
        reason: Reason,
        range: Range,
        window: &dyn Window,
        from: Gva,
    ) -> Result<Gva> {
        let from = if range.contains(from) {
            Gva(from.0 & !7)
        } else {
            range.start
        };
        let len = usize::try_from(range.end.0 - from.0).unwrap_or(0);
        let offset = usize::try_from(from.0 - range.start.0).unwrap_or(0);
        let mut words = std::mem::take(&mut self.words);
        words.resize(len, 0);
        window.read(offset, &mut words)?;
        for word in words.chunks_exact(8) {
            let word = fetch::u64(word, 0).unwrap_or(0);
            if let Some((watched, offset)) = self.watch.hit(word) {
                self.report(task, reason, &watched.name, offset);
            }
        }
        self.words = words;
        Ok(from)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_watched_range_is_hit_behind_its_first_byte_and_up_to_its_end() {
        let watched = |start, len, name: &str| Watched {
            range: Range::new(Gva(start), len),
            name: name.into(),
        };
        let watch = Watch::of(vec![watched(0x2000, 0x10, "b"), watched(0x1000, 0x10, "a")]);
        let name = |word| watch.hit(word).map(|(w, offset)| (w.name.clone(), offset));
        assert_eq!(name(0x1000), None);
        assert_eq!(name(0x1001), Some(("a".into(), 1)));
        assert_eq!(name(0x1010), Some(("a".into(), 0x10)));
        assert_eq!(name(0x1011), None);
        assert_eq!(name(0x2008), Some(("b".into(), 8)));
        assert_eq!(name(0x3000), None);
        assert!(Watch::default().hit(5).is_none());
    }

    #[test]
    fn a_return_address_that_is_a_trampoline_s_first_byte_is_a_hit() {
        let watch = Watch::of(vec![trampoline(Gva(0x1000), 0x20, "return_to_handler")]);
        assert!(watch.hit(0xfff).is_none());
        assert!(watch.hit(0x1000).is_some());
        assert!(watch.hit(0x1020).is_some());
        assert!(watch.hit(0x1021).is_none());
    }
}
