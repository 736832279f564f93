//! What is done about the guest's stacks before it is paused, so that little is left to do then.
//!
//! [`Prescan::refresh`] lists the tasks and maps their stacks, [`Prescan::catch_up`] adds those that were
//! born meanwhile, and [`Prescan::rehearse`] scans the stacks of those that are off their CPU, all while
//! the guest runs. Inside the pause
//! [`Prescan::look`] maps nothing, and trusts
//!
//! - the list, if no task was born since: the kernel counts births in `total_forks` (kernel/fork.c)
//!   under the lock that links a new task. A task that died since can only alarm; one that is not
//!   counted yet has never run;
//! - what was found of a task, if it was not switched out since: the kernel counts that in `nvcsw`
//!   and `nivcsw` before it takes the task off its CPU (kernel/sched/core.c: `__schedule`), and a task
//!   that was off its CPU and has run since is either still on one, where it is looked at in any
//!   case, or was switched out;
//! - what was found of all tasks, if no CPU switched since (`rq->nr_switches`, counted at the same
//!   place), and of all but a few if these account for all switches ([`super::ledger`]): then not even
//!   the others' counters need to be read, and the pause costs the same for fifty tasks as for ten
//!   thousand.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;

use locus_guest::addr::{Frame, Gva, Range, PAGE_LEN};
use locus_guest::space::{Pin, Space};
use locus_guest::{Vcpu, Window};
use locus_kernel::tasks::{self, Task, TaskLayout};
use locus_kernel::unwind::stack::{self, StackCopy};
use locus_kernel::unwind::{self, Stack, StackKind, Walker};
use locus_kernel::Kernel;

use super::ledger::{self, Ledger, FEW};
use super::look::{Live, Look, Running};
use super::{Verdict, Watch};
use crate::error::{Error, Result};

/// Stacks mapped by one call.
const STACKS: usize = 128;
/// Rehearsals for which a task that ran is thought to run again soon.
const LATELY: u32 = 8;

/// Most stacks walked by one call.
const ACQUITTED_MAX: usize = 1 << 12;

/// Words of a task that change as it runs.
pub(super) struct Words {
    sp: Pin,
    on_cpu: Pin,
    switches: [Pin; 2],
    restart: Pin,
    start_time: Pin,
}

/// A task with its stack mapped.
pub(super) struct Known {
    pub(super) task: Task,
    words: Words,
    stacks: Rc<dyn Window>,
    offset: usize,
    /// What a scan found when it was off its CPU, and its counters then.
    seen: Cell<Option<([u64; 2], Seen)>>,
    /// How often it was switched out when it was last rehearsed.
    pub(super) rehearsed: Cell<u64>,
    /// The rehearsal at which it was found to have run last; 0 for none.
    pub(super) lively: Cell<u32>,
}

/// What was found on the stack of a task that is off its CPU. It stays so until the task runs.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Seen {
    /// Nothing watched.
    Clear,
    /// A word that may be a return address.
    Alarm,
    /// The same, and a walk did not show that nobody is there.
    Inside,
}

impl Known {
    fn is(&self, task: &Task) -> bool {
        let what = |t: &Task| (t.pid, t.start_time, t.stack);
        what(&self.task) == what(task)
    }

    /// How often it was switched out, by its own will and not.
    fn switches(&self) -> Result<[u64; 2]> {
        let [own, other] = &self.words.switches;
        Ok([own.u64()?, other.u64()?])
    }

    /// Whether its memory is not another's meanwhile.
    pub(super) fn is_itself(&self) -> Result<bool> {
        Ok(self.words.start_time.u64()? == self.task.start_time)
    }

    /// How often it was switched out.
    pub(super) fn ran(&self) -> Result<u64> {
        let [own, other] = self.switches()?;
        Ok(own.wrapping_add(other))
    }

    /// What was found, if the task did not run since.
    fn seen(&self) -> Result<Option<Seen>> {
        Ok(match self.seen.get() {
            Some((then, seen)) if then == self.switches()? => Some(seen),
            _ => None,
        })
    }

    /// Whether nothing watched was found, and the task did not run since.
    pub(super) fn is_clear(&self) -> Result<bool> {
        Ok(self.seen()? == Some(Seen::Clear))
    }

    pub(super) fn is_on_cpu(&self) -> Result<bool> {
        Ok(self.words.on_cpu.u32()? != 0)
    }

    /// Its saved stack pointer; right while it is off its CPU.
    pub(super) fn sp(&self) -> Result<Gva> {
        Ok(Gva(self.words.sp.u64()?))
    }

    /// The function that goes on with its system call, if a signal cut one short.
    pub(super) fn restart(&self) -> Result<u64> {
        Ok(self.words.restart.u64()?)
    }

    /// Copies words of its stack, from `offset` bytes above its lowest address.
    pub(super) fn read(&self, offset: usize, words: &mut [u8]) -> Result<()> {
        Ok(self.stacks.read(self.offset + offset, words)?)
    }
}

pub(super) struct Cpu {
    base: u64,
    current: Option<Pin>,
    pub(super) switches: Option<Pin>,
    /// For interrupts, and for exceptions that need one of their own.
    pub(super) stacks: Vec<(Range, Box<dyn Window>)>,
}

/// How a system call goes on that a signal cut short.
pub(super) struct Restart {
    /// Where a task has the function in which it does (`restart_block.fn`), in bytes.
    function: usize,
    /// Where the registers of user mode keep what the call returns, and its number, in bytes from the
    /// end of a task's stack (`struct pt_regs`).
    pub(super) result: usize,
    pub(super) call: usize,
}

impl Restart {
    fn of(kernel: &Kernel<'_>) -> Result<Restart> {
        let btf = kernel.btf()?;
        let block = btf.offset_of("task_struct", "restart_block")?;
        let size = btf.size_of("pt_regs")?;
        let before_end =
            |name| Ok::<_, Error>(size.saturating_sub(btf.offset_of("pt_regs", name)?));
        Ok(Restart {
            function: block + btf.offset_of("restart_block", "fn")?,
            result: before_end("ax")?,
            call: before_end("orig_ax")?,
        })
    }
}

/// The guest's tasks and stacks, listed, mapped and looked at while it runs.
pub struct Prescan<'k, 'm> {
    pub(super) kernel: &'k Kernel<'m>,
    pub(super) watch: &'k Watch,
    space: Space<'m>,
    layout: TaskLayout,
    forks_at: Pin,
    forks: u64,
    pub(super) known: HashMap<Gva, Known>,
    /// Where the lists of processes' threads begin.
    groups: Vec<Gva>,
    pub(super) cpus: Vec<Cpu>,
    pub(super) restart: Restart,
    /// What the CPUs' counters of switches showed before the last rehearsal.
    switches: Vec<u64>,
    /// Tasks that the last rehearsal could not clear.
    restless: Vec<Gva>,
    /// How many rehearsals there were.
    pub(super) rehearsals: u32,
    pub(super) ledger: Option<Ledger>,
    pub(super) counting: Option<Range>,
    /// Made when it is wanted for the first time; `None` in it if the kernel's unwind data can't be read.
    walker: Option<Option<Walker<'k, 'm>>>,
    /// The tasks were listed since the walker knew all modules.
    walker_is_old: bool,
    /// Room for the words of a stack: not to be found inside the pause.
    pub(super) room: RefCell<Vec<u8>>,
}

impl std::fmt::Debug for Prescan<'_, '_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Prescan")
            .field("tasks", &self.known.len())
            .finish_non_exhaustive()
    }
}

impl<'k, 'm> Prescan<'k, 'm> {
    /// Prepares to look who among the tasks of `kernel` is in the way.
    ///
    /// # Errors
    /// The kernel lacks a symbol or type that is needed.
    pub fn new(kernel: &'k Kernel<'m>, watch: &'k Watch) -> Result<Prescan<'k, 'm>> {
        let space = kernel.space.fresh_in_blocks();
        let forks_at = space.pin(kernel.symbols.need("total_forks")?)?;
        Ok(Prescan {
            kernel,
            watch,
            layout: TaskLayout::of(kernel)?,
            forks: 0,
            forks_at,
            known: HashMap::new(),
            groups: Vec::new(),
            cpus: Vec::new(),
            restart: Restart::of(kernel)?,
            switches: Vec::new(),
            restless: Vec::new(),
            rehearsals: 0,
            ledger: None,
            counting: ledger::counting(kernel),
            walker: None,
            walker_is_old: false,
            room: RefCell::default(),
            space,
        })
    }

    /// Lists the tasks anew, while the guest runs, and maps the stacks of those not known yet.
    ///
    /// # Errors
    /// [`Class::TryAgain`](crate::error::Class::TryAgain) when the list moved too much while it was read; else as reading memory.
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
            self.space = self.kernel.space.fresh_in_blocks();
        }
        Err(Error::try_again(format!(
            "the guest's task list could not be read in {TRIES} tries: {}",
            last.map_or_else(String::new, |e| e.to_string())
        )))
    }

    fn list(&mut self) -> Result<()> {
        self.walker_is_old = true;
        // Who is met now was not rehearsed.
        self.ledger = None;
        self.switches.clear();
        let forks = self.forks_at.u64()?;
        let mut groups = Vec::new();
        let tasks = self
            .layout
            .newer(self.kernel, &self.space, &mut groups, |_| false)?;
        let mut known = HashMap::with_capacity(tasks.len());
        let mut fresh = Vec::new();
        for task in tasks {
            match self.known.remove(&task.addr).filter(|k| k.is(&task)) {
                Some(entry) => {
                    known.insert(task.addr, entry);
                }
                None => fresh.push(task),
            }
        }
        for entry in self.meet(fresh)? {
            known.insert(entry.task.addr, entry);
        }
        self.known = known;
        self.groups = groups;
        self.forks = forks;
        if self.cpus.is_empty() {
            self.cpus = self.list_cpus()?;
        }
        Ok(())
    }

    /// Adds the tasks that were born since they were listed, which is quick however many there are. Those that
    /// died stay, until they are listed anew.
    ///
    /// # Errors
    /// As [`Prescan::refresh`].
    pub fn catch_up(&mut self) -> Result<()> {
        self.walker_is_old = true;
        if !self.moved()? {
            return Ok(());
        }
        // A list that moves is read anew from its start.
        self.newcomers().or_else(|_| self.refresh())
    }

    fn newcomers(&mut self) -> Result<()> {
        self.space.budget().refill();
        let forks = self.forks_at.u64()?;
        let mut groups = self.groups.clone();
        let known = |task: &Task| self.known.get(&task.addr).is_some_and(|k| k.is(task));
        let newer = self
            .layout
            .newer(self.kernel, &self.space, &mut groups, known)?;
        self.groups = groups;
        for entry in self.meet(newer)? {
            let addr = entry.task.addr;
            entry.lively.set(self.rehearsals);
            self.restless.push(addr);
            // What another had counted there is not known any more.
            let is_first = self.known.insert(addr, entry).is_none();
            self.ledger = self.ledger.take().filter(|_| is_first);
            if let Some(ledger) = &mut self.ledger {
                ledger.add(addr);
            }
        }
        self.forks = forks;
        Ok(())
    }

    /// Maps the stacks of tasks, and the pages with their words.
    fn meet(&self, mut tasks: Vec<Task>) -> Result<Vec<Known>> {
        // The dead have no stack any more (kernel/fork.c: `release_task_stack`), nor run again.
        tasks.retain(|task| task.stack.start != Gva(0));
        // Stacks live in vmalloc space, whose page tables change: walk them anew.
        let fresh = self.kernel.space.fresh();
        let mut met = Vec::with_capacity(tasks.len());
        while !tasks.is_empty() {
            let rest = tasks.split_off(tasks.len().min(STACKS));
            let mut frames: Vec<Frame> = Vec::new();
            let mut offsets = Vec::with_capacity(tasks.len());
            for task in &tasks {
                let first = task.stack.start;
                offsets.push(frames.len() * PAGE_LEN + first.offset());
                frames.extend(fresh.frames(first, task.stack.len())?);
            }
            let stacks: Rc<dyn Window> = Rc::from(self.space.map(&frames)?);
            for (task, offset) in tasks.into_iter().zip(offsets) {
                let pin = |offset: usize| self.space.pin(task.addr.plus(offset as u64));
                let layout = &self.layout;
                met.push(Known {
                    words: Words {
                        sp: pin(layout.sp)?,
                        on_cpu: pin(layout.on_cpu)?,
                        switches: [pin(layout.switches[0])?, pin(layout.switches[1])?],
                        restart: pin(self.restart.function)?,
                        start_time: pin(layout.start_time)?,
                    },
                    stacks: Rc::clone(&stacks),
                    offset,
                    seen: Cell::new(None),
                    rehearsed: Cell::new(0),
                    lively: Cell::new(0),
                    task,
                });
            }
            tasks = rest;
        }
        Ok(met)
    }

    /// Per CPU: where its running task stands, its counter of switches, and its own stacks.
    fn list_cpus(&self) -> Result<Vec<Cpu>> {
        let kernel = self.kernel;
        let current = tasks::current_symbol(kernel);
        let switches = tasks::switches_symbol(kernel);
        let bases = tasks::percpu_bases(kernel, &self.space)?;
        let mut cpus = Vec::with_capacity(bases.len());
        for base in bases {
            let pin = |at: Option<Gva>| self.space.pin(tasks::percpu(at?, base)).ok();
            let stacks = stack::of_cpu(kernel, &self.space, base)?.into_iter();
            let map = |(_, range): (_, Range)| {
                let frames = self.space.frames(range.start, range.len()).ok()?;
                Some((range, self.space.map(&frames).ok()?))
            };
            cpus.push(Cpu {
                base,
                current: pin(current),
                switches: pin(switches),
                stacks: stacks.filter_map(map).collect(),
            });
        }
        Ok(cpus)
    }

    /// Whether tasks were born since they were listed.
    ///
    /// # Errors
    /// Memory can't be read.
    pub fn moved(&self) -> Result<bool> {
        Ok(self.forks_at.u64()? != self.forks)
    }

    /// How often each CPU switched between tasks; none where a kernel doesn't tell. A CPU without
    /// memory of its own never ran.
    pub(super) fn count_switches(&self) -> Result<Vec<u64>> {
        let pins = self.cpus.iter().filter_map(|cpu| cpu.switches.as_ref());
        Ok(pins.map(Pin::u64).collect::<std::result::Result<_, _>>()?)
    }

    /// Walks the stacks of those whose scan alarmed, while the guest runs: a false alarm is taken back
    /// until that task runs. It takes longer than a scan, and most who are in the way are so for a
    /// moment.
    ///
    /// # Errors
    /// Memory can't be read.
    pub fn acquit(&mut self) -> Result<()> {
        let mut alarming = Vec::new();
        for known in self.known.values() {
            if known.seen()? == Some(Seen::Alarm) {
                alarming.push(known.task.addr);
                // The others have their turn next time.
                if alarming.len() == ACQUITTED_MAX {
                    break;
                }
            }
        }
        for task in alarming {
            let acquitted = self.acquits(task)?;
            if let Some(seen) = self.known.get(&task).map(|known| &known.seen) {
                let what = if acquitted { Seen::Clear } else { Seen::Inside };
                seen.set(seen.get().map(|(then, _)| (then, what)));
            }
        }
        Ok(())
    }

    /// Whether a walk shows that the scan of a sleeping task's stack was a false alarm. Where that can't
    /// be told, nobody is acquitted.
    fn acquits(&mut self, task: Gva) -> Result<bool> {
        let Some(known) = self.known.get(&task) else {
            return Ok(false);
        };
        let range = known.task.stack;
        let memory = StackCopy::of(range, |words| known.read(0, words))?;
        if Look::restarts(self, known, memory.bytes())?.is_some() {
            return Ok(false);
        }
        let kernel = self.kernel;
        let walker = self.walker.get_or_insert_with(|| Walker::new(kernel).ok());
        if std::mem::take(&mut self.walker_is_old) {
            if let Some(Err(_)) = walker.as_mut().map(Walker::refresh) {
                *walker = None;
            }
        }
        let Some(walker) = walker else {
            return Ok(false);
        };
        let stack = Stack {
            kind: StackKind::Task,
            range,
            memory: &memory,
        };
        let walk = walker.sleeping(known.sp()?, stack, known.task.idle);
        let inside = |frame: &unwind::StackFrame| self.watch.hit(frame.address.0).is_some();
        Ok(walk.is_reliable() && !walk.frames.iter().any(inside))
    }

    /// Scans, while the guest runs, the stacks of those tasks that are off their CPU and were not
    /// found out of the way before, or ran since.
    ///
    /// # Errors
    /// Memory can't be read.
    pub fn rehearse(&mut self) -> Result<Verdict> {
        self.ledger = None;
        self.switches = self.count_switches()?;
        self.rehearsals = self.rehearsals.wrapping_add(1);
        let mut look = Look::new(self);
        let mut restless = Vec::new();
        for known in self.known.values() {
            // Before what was found is trusted: it is asked whether it ran since then.
            let ran = known.ran()?;
            if !matches!(known.rehearsed.replace(ran), before if before == 0 || before == ran) {
                known.lively.set(self.rehearsals);
            }
            if !self.scan(known, &mut look)? {
                restless.push(known.task.addr);
            }
        }
        let verdict = look.verdict();
        self.restless = restless;
        Ok(verdict)
    }

    /// Scans the stack of a task that is off its CPU, if nothing is known of it or it ran since; says whether
    /// it is known that nothing watched is there.
    pub(super) fn scan(&self, known: &Known, look: &mut Look<'_, 'k, 'm>) -> Result<bool> {
        let seen = known.seen()?;
        if seen == Some(Seen::Clear) {
            return Ok(true);
        }
        let before = known.switches()?;
        known.seen.set(None);
        // The order counts: a task that begins to run after this shows it below.
        let scanned = if known.is_on_cpu()? {
            None
        } else if look.task(known, None)? {
            Some(Seen::Clear)
        } else {
            Some(seen.unwrap_or(Seen::Alarm))
        };
        let scanned = scanned.map(|seen| (before, seen));
        if scanned.is_some() && !known.is_on_cpu()? && known.switches()? == before {
            known.seen.set(scanned);
        }
        Ok(known.seen.get() == Some((before, Seen::Clear)))
    }

    /// Looks at everything that may have changed since the last rehearsal, and maps nothing: what it
    /// says holds if the guest is paused. Unless it is to be `thorough`, it gives up when it would
    /// have to ask many tasks whether they ran.
    ///
    /// # Errors
    /// Memory can't be read.
    pub fn look(
        &self,
        vcpus: &[Vcpu],
        thorough: bool,
        too_long: &dyn Fn() -> bool,
    ) -> Result<Verdict> {
        if self.moved()? {
            return Ok(Verdict::Moved);
        }
        let switches = self.count_switches()?;
        let calm = !switches.is_empty() && switches == self.switches;
        let told = match calm {
            true => None,
            false => self.accounts(vcpus, &switches)?,
        };
        if !calm && told.is_none() && !thorough && self.known.len() > FEW {
            return Ok(Verdict::Stirred);
        }
        let mut look = Look::new(self);
        let mut running = Running::default();
        for vcpu in vcpus.iter().filter(|v| v.online) {
            look.vcpu(vcpu, &mut running)?;
        }
        for (addr, live) in running.iter() {
            if let Some(known) = self.known.get(&addr) {
                look.task(known, Some(live))?;
            }
        }
        // A CPU that is down keeps the task in which it went, of which nothing counts that it was switched to; those that
        // never were up have one in common.
        for known in self.cpus.iter().filter_map(|cpu| self.current(cpu)) {
            if !running.contains(known.task.addr) {
                look.task(known, None)?;
                running.add(known.task.addr, Live::Nothing);
            }
        }
        let mut scanned = 0_u32;
        // Whether it could be scanned within the time.
        let mut scan = |known: &Known| {
            if (calm || !known.is_clear()?) && !running.contains(known.task.addr) {
                look.task(known, None)?;
            }
            scanned += 1;
            Ok::<bool, Error>(!scanned.is_multiple_of(64) || !too_long())
        };
        if calm {
            for known in self.restless.iter().filter_map(|a| self.known.get(a)) {
                if !scan(known)? {
                    return Ok(Verdict::TooLong);
                }
            }
        } else if let (Some(asked), Some(ledger)) = (told, &self.ledger) {
            for (n, account) in ledger.accounts.iter().enumerate() {
                let Some(known) = self.known.get(&account.task) else {
                    continue;
                };
                if !account.is_clear(known, n < asked)? && !scan(known)? {
                    return Ok(Verdict::TooLong);
                }
            }
        } else {
            for known in self.known.values() {
                if !scan(known)? {
                    return Ok(Verdict::TooLong);
                }
            }
        }
        Ok(look.verdict())
    }

    /// Tasks that the last rehearsal could not clear, that were born since, or that ran lately; those first that did
    /// last.
    pub(super) fn lively(&self) -> Vec<Gva> {
        let is_lively = |known: &&Known| {
            known.seen.get().map(|(_, seen)| seen) != Some(Seen::Clear)
                || (known.lively.get() != 0 && known.lively.get() + LATELY > self.rehearsals)
        };
        let mut found: Vec<&Known> = self.known.values().filter(is_lively).collect();
        found.sort_by_key(|known| std::cmp::Reverse(known.lively.get()));
        found.into_iter().map(|known| known.task.addr).collect()
    }

    pub(super) fn owner_of_stack(&self, rsp: Gva) -> Option<&Known> {
        self.known.values().find(|k| k.task.stack.contains(rsp))
    }

    pub(super) fn current_of(&self, vcpu: &Vcpu) -> Option<&Known> {
        let find = |base: Gva| self.cpus.iter().find(|c| c.base == base.0);
        let cpu = match vcpu.user {
            // User mode may choose the one that is in use, another CPU's among them.
            true => find(vcpu.gs_other),
            // In the kernel's entry code the two may not be exchanged yet.
            false => find(vcpu.gs_base).or_else(|| find(vcpu.gs_other)),
        };
        self.current(cpu?)
    }

    /// The task that a CPU runs.
    fn current(&self, cpu: &Cpu) -> Option<&Known> {
        self.known.get(&Gva(cpu.current.as_ref()?.u64().ok()?))
    }
}
