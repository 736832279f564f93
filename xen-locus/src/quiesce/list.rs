//! The list of the guest's tasks, with their stacks mapped. All of this happens while the guest runs.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;

use locus_guest::addr::{Frame, Gva, PAGE_LEN};
use locus_guest::space::{Pin, Space};
use locus_guest::{GuestType, Vcpu, Window};
use locus_kernel::cpu::Cpu as Processor;
use locus_kernel::tasks::{Task, TaskLayout};
use locus_kernel::Kernel;

use super::cpus::{Cpu, Cpus};
use super::task::{MappedTask, Restart};
use super::unwinder::Unwinder;
use super::watch::Watch;
use crate::error::{Error, Result};

/// Stacks mapped by one call.
const STACKS: usize = 128;

/// The guest's tasks and CPUs, with all mapped that is read in the pause.
///
/// It is kept from one attempt to the next, so that only new tasks have to be mapped. A step begins
/// with [`GuestTasks::list`] or [`GuestTasks::catch_up`].
pub struct GuestTasks<'k, 'm> {
    pub(super) kernel: &'k Kernel<'m>,
    pub(super) watch: &'k Watch,
    space: Space<'m>,
    layout: TaskLayout,
    pub(super) restart: Restart,
    births: Births,
    /// By the address of their `task_struct`. Some may have died since.
    pub(super) known: HashMap<Gva, MappedTask>,
    /// For each process, where the list of its threads begins.
    groups: Vec<Gva>,
    pub(super) cpus: Cpus,
    /// The guest may run guests of its own. While it does, the registers of a vCPU are those of such a guest
    /// (xen/arch/x86/hvm/svm/nestedsvm.c, vmx/vvmx.c).
    pub(super) may_nest: bool,
    /// How often all tasks were scanned.
    pub(super) scans: u32,
    pub(super) unwinder: Unwinder<'k, 'm>,
    /// Room for the words of a stack, so that the pause does not have to allocate it.
    pub(super) buffer: RefCell<Vec<u8>>,
}

/// The kernel's count of births, and what it showed before the list was read.
///
/// `total_forks` is counted in kernel/fork.c: `copy_process`, under the lock under which the new task
/// is linked into the lists. A task that is not counted yet has never run.
struct Births {
    at: Pin,
    listed: u64,
}

/// Proof that the tasks are listed: all that were born before it was made.
pub struct Listed<'t, 'k, 'm> {
    pub(super) tasks: &'t mut GuestTasks<'k, 'm>,
}

/// What [`GuestTasks::add_births`] did to the list.
pub(super) enum Added {
    /// These tasks were added; `true` if no other was known at that address before.
    Tasks(Vec<(Gva, bool)>),
    /// The whole list was read again. All that was known from scans of all tasks is void.
    All,
}

/// Whether the processor that the guest sees has VMX or SVM, or may have: Xen offers these only to a guest that may run guests
/// of its own. True if the kernel's tables of features can't be read, or don't name them.
pub fn may_nest(kernel: &Kernel<'_>) -> bool {
    if kernel.kind == GuestType::Pv {
        return false;
    }
    let Ok(cpu) = Processor::read(kernel) else {
        return true;
    };
    let lacks = |name| cpu.named(name) == Some(false);
    !lacks("vmx") || !lacks("svm")
}

impl std::fmt::Debug for GuestTasks<'_, '_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GuestTasks")
            .field("tasks", &self.known.len())
            .finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Listed<'_, '_, '_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Listed").field(&self.tasks).finish()
    }
}

impl<'k, 'm> GuestTasks<'k, 'm> {
    /// Prepares to find the tasks of `kernel` that are in a range of `watch`. Lists none yet.
    ///
    /// # Errors
    /// The kernel lacks a symbol or type that is needed.
    pub fn new(kernel: &'k Kernel<'m>, watch: &'k Watch) -> Result<GuestTasks<'k, 'm>> {
        let space = kernel.space.fresh_in_blocks();
        let births = Births {
            at: space.pin(kernel.variable("total_forks", 8)?)?,
            listed: 0,
        };
        Ok(GuestTasks {
            kernel,
            watch,
            layout: TaskLayout::of(kernel)?,
            restart: Restart::of(kernel)?,
            births,
            known: HashMap::new(),
            groups: Vec::new(),
            cpus: Cpus::default(),
            may_nest: may_nest(kernel),
            scans: 0,
            unwinder: Unwinder::default(),
            buffer: RefCell::default(),
            space,
        })
    }

    /// Lists all tasks, while the guest runs, and maps the stacks of those not known yet. Forgets
    /// those that died.
    ///
    /// # Errors
    /// [`Class::TryAgain`](crate::error::Class::TryAgain) when the list changed too often while it was
    /// read; else memory can't be read.
    pub fn list(&mut self) -> Result<Listed<'_, 'k, 'm>> {
        self.read_all()?;
        Ok(Listed { tasks: self })
    }

    /// Adds the tasks that were born since they were listed, while the guest runs. That is quick
    /// however many tasks there are. Those that died stay until [`GuestTasks::list`].
    ///
    /// # Errors
    /// As [`GuestTasks::list`].
    pub fn catch_up(&mut self) -> Result<Listed<'_, 'k, 'm>> {
        self.add_births()?;
        Ok(Listed { tasks: self })
    }

    fn read_all(&mut self) -> Result<()> {
        const TRIES: u32 = 20;
        // A run that waits for a quiet moment lists the tasks again and again, until a deadline.
        self.space.budget().refill()?;
        let mut tries = 1;
        loop {
            let Err(error) = self.try_read_all() else {
                return Ok(());
            };
            // A task went away while it was read: its memory may hold anything.
            self.space = self.kernel.space.fresh_in_blocks();
            if tries == TRIES {
                // A list that changes all the time may have cost so much.
                self.space.budget().renew();
                return Err(Error::try_again(format!(
                    "the guest's task list could not be read in {TRIES} tries: {error}"
                )));
            }
            tries += 1;
        }
    }

    fn try_read_all(&mut self) -> Result<()> {
        self.unwinder.outdate();
        // Births after this are counted as births since.
        let births = self.births.at.u64()?;
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
        for entry in self.map(fresh)? {
            known.insert(entry.task.addr, entry);
        }
        self.known = known;
        self.groups = groups;
        self.births.listed = births;
        if !self.is_listed() {
            self.cpus.list(self.kernel, &self.space)?;
        }
        Ok(())
    }

    /// Whether all tasks were listed once. The CPUs are listed last, and there is at least one.
    fn is_listed(&self) -> bool {
        !self.cpus.all.is_empty()
    }

    /// Adds the tasks that were born since they were listed.
    pub(super) fn add_births(&mut self) -> Result<Added> {
        self.unwinder.outdate();
        if self.is_listed() {
            if !self.changed()? {
                return Ok(Added::Tasks(Vec::new()));
            }
            if let Ok(added) = self.read_births() {
                return Ok(Added::Tasks(added));
            }
        }
        // The list changed where it was read: start again.
        self.read_all()?;
        Ok(Added::All)
    }

    fn read_births(&mut self) -> Result<Vec<(Gva, bool)>> {
        self.space.budget().refill()?;
        let births = self.births.at.u64()?;
        let mut groups = self.groups.clone();
        let known = |task: &Task| self.known.get(&task.addr).is_some_and(|k| k.is(task));
        let newer = self
            .layout
            .newer(self.kernel, &self.space, &mut groups, known)?;
        self.groups = groups;
        let mut added = Vec::new();
        for entry in self.map(newer)? {
            let addr = entry.task.addr;
            entry.last_ran.set(self.scans);
            let is_first = self.known.insert(addr, entry).is_none();
            added.push((addr, is_first));
        }
        self.births.listed = births;
        Ok(added)
    }

    /// Maps the stacks of tasks, and the words of their `task_struct`.
    fn map(&self, mut tasks: Vec<Task>) -> Result<Vec<MappedTask>> {
        // A dead task has no stack any more (kernel/fork.c: `release_task_stack`), and never runs again.
        tasks.retain(|task| task.stack.start != Gva(0));
        // Stacks live in vmalloc space, whose page tables change. So nothing remembered of those is used.
        let fresh = self.kernel.space.fresh();
        let mut mapped = Vec::with_capacity(tasks.len());
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
                let stack = (Rc::clone(&stacks), offset);
                mapped.push(MappedTask::new(
                    task,
                    stack,
                    &self.space,
                    &self.layout,
                    &self.restart,
                )?);
            }
            tasks = rest;
        }
        Ok(mapped)
    }

    /// Whether tasks were born since they were listed. A task that died since can only raise a false
    /// alarm.
    pub(super) fn changed(&self) -> Result<bool> {
        Ok(self.births.at.u64()? != self.births.listed)
    }

    /// The task on whose stack `rsp` is.
    pub(super) fn owner_of_stack(&self, rsp: Gva) -> Option<&MappedTask> {
        self.known.values().find(|k| k.task.stack.contains(rsp))
    }

    /// The task that a vCPU runs.
    pub(super) fn current_of(&self, vcpu: &Vcpu) -> Option<&MappedTask> {
        self.current(self.cpus.of_vcpu(vcpu)?)
    }

    /// The task that a CPU runs, or in which it went down.
    pub(super) fn current(&self, cpu: &Cpu) -> Option<&MappedTask> {
        self.known.get(&cpu.current()?)
    }
}
