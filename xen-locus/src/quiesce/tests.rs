//! The mock guest in which the steps are tested, and the steps one by one.
//!
//! Outside of tests the types allow one order only. Here the steps can be taken in any order, so that a
//! look can be tested after each of them.

#![allow(clippy::cast_possible_truncation)] // small stacks

use locus_guest::addr::{Gva, Range};
use locus_guest::GuestType;
use locus_kernel::fixture_world::{World, PATCHED, PERCPU};
use locus_kernel::tasks::{self, Task, TaskLayout};

use super::scan::Baseline;
use super::*;

mod bounds;
mod clear;
mod counters;
mod list;
mod registers;
mod scan;

/// An address in the function that is watched.
const INSIDE: u64 = PATCHED.0 + 10;

const NOBODY: [u32; 0] = [];

struct Guest<'w> {
    world: &'w World,
    kernel: &'w Kernel<'w>,
    layout: TaskLayout,
    tasks: Vec<Task>,
}

impl Guest<'_> {
    fn poke(&self, at: Gva, bytes: &[u8]) {
        let frame = self.kernel.space.walk(at).unwrap().frame;
        self.world.memory.fill(frame, at.offset(), bytes);
    }

    fn task(&self, pid: u32) -> &Task {
        self.tasks.iter().find(|t| t.pid == pid).unwrap()
    }

    /// Puts the task with its whole stack at rest in the function, or out of it.
    fn enter(&self, pid: u32, inside: bool) {
        let word = if inside { INSIDE } else { 0 };
        let at = Gva(self.task(pid).stack.end.0 - 0x180);
        self.poke(at, &word.to_le_bytes());
    }

    /// The task was switched out so many times.
    fn switched(&self, pid: u32, times: u64) {
        let at = self.task(pid).addr.plus(self.layout.switches[0] as u64);
        self.poke(at, &times.to_le_bytes());
    }

    /// The CPU switched between tasks so many times.
    fn cpu_switched(&self, cpu: usize, times: u64) {
        let at = tasks::switches_symbol(self.kernel).unwrap();
        self.poke(tasks::percpu(at, PERCPU[cpu]), &times.to_le_bytes());
    }

    fn look(&self, steps: &Steps<'_, '_, '_>) -> Vec<u32> {
        let vcpus: &[Vcpu] = &self.world.vcpus;
        blocked(steps.look(vcpus, true, &|| false).unwrap())
    }
}

/// The steps, with what each leaves to the next.
struct Steps<'a, 'k, 'm> {
    tasks: &'a mut GuestTasks<'k, 'm>,
    baseline: Baseline,
}

impl<'k, 'm> Steps<'_, 'k, 'm> {
    fn list(&mut self) -> Result<()> {
        self.baseline = Baseline::default();
        self.tasks.list().map(drop)
    }

    fn catch_up(&mut self) -> Result<()> {
        self.baseline.catch_up(self.tasks)
    }

    fn scan_off_cpu(&mut self) -> Result<Verdict> {
        let tasks = &mut *self.tasks;
        let scanned = Listed { tasks }.scan_off_cpu()?;
        self.baseline = scanned.baseline;
        Ok(scanned.verdict)
    }

    fn scanned(&mut self) -> Scanned<'_, 'k, 'm> {
        Scanned {
            tasks: self.tasks,
            baseline: std::mem::take(&mut self.baseline),
            verdict: Verdict::Quiet,
        }
    }

    fn clear_by_unwind(&mut self) -> Result<()> {
        self.scanned().clear_by_unwind().map(drop)
    }

    fn snapshot_counters(&mut self, vcpus: impl Fn() -> Result<Vec<Vcpu>>) -> Result<()> {
        self.baseline = self.scanned().snapshot_counters(vcpus)?.baseline;
        Ok(())
    }

    fn look(&self, vcpus: &[Vcpu], thorough: bool, too_long: &dyn Fn() -> bool) -> Result<Verdict> {
        super::look::look(self.tasks, &self.baseline, vcpus, thorough, too_long)
    }
}

fn blocked(verdict: Verdict) -> Vec<u32> {
    match verdict {
        Verdict::Quiet => Vec::new(),
        Verdict::Blocked(all) => all.iter().map(|b| b.pid).collect(),
        other => panic!("{other:?}"),
    }
}

/// One function.
fn watch() -> Watch {
    Watch::of(vec![Watched::new(Range::new(PATCHED, 0x10), "patched")])
}

fn with_guest(test: impl FnOnce(&Guest<'_>, &mut Steps<'_, '_, '_>)) {
    let world = World::new(GuestType::Pvh);
    let kernel = Kernel::read(&world.memory, world.kind, &world.vcpus).unwrap();
    let layout = TaskLayout::of(&kernel).unwrap();
    let tasks = layout.all(&kernel, &kernel.space.fresh()).unwrap();
    let watch = watch();
    let guest = Guest {
        world: &world,
        kernel: &kernel,
        layout,
        tasks,
    };
    let mut steps = Steps {
        tasks: &mut GuestTasks::new(&kernel, &watch).unwrap(),
        baseline: Baseline::default(),
    };
    steps.list().unwrap();
    test(&guest, &mut steps);
}
