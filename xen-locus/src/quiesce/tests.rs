//! The mock guest in which the steps are tested, and the steps one by one.
//!
//! Outside of tests the types allow one order only. Here the steps can be taken in any order, so that a
//! look can be tested after each of them.

#![allow(clippy::cast_possible_truncation)] // small stacks

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;

use locus_guest::addr::{Frame, Gva, Range, PAGE_LEN};
use locus_guest::mock::MockMemory;
use locus_guest::{self as guest, GuestType, Memory, MemoryMut as _, Window, WindowMut};
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

/// A word, by its window and its offset in that, and what it becomes.
type Event = (Box<dyn WindowMut>, usize, u64);

/// What happens in the guest when one of its words is read.
#[derive(Default)]
struct Events {
    /// The word of 4 bytes that is read, by its frame and its offset in that.
    trigger: Cell<Option<(Frame, usize)>>,
    /// How often it was read.
    asked: Cell<u32>,
    /// What happens at each of the next readings.
    left: RefCell<VecDeque<Vec<Event>>>,
}

/// The guest's memory, in which that happens.
struct EventfulMemory<'w> {
    memory: &'w MockMemory,
    events: Rc<Events>,
}

struct EventfulWindow {
    window: Box<dyn Window>,
    frames: Vec<Frame>,
    events: Rc<Events>,
}

impl Memory for EventfulMemory<'_> {
    fn map(&self, frames: &[Frame]) -> std::result::Result<Box<dyn Window>, guest::Error> {
        Ok(Box::new(EventfulWindow {
            window: self.memory.map(frames)?,
            frames: frames.to_vec(),
            events: Rc::clone(&self.events),
        }))
    }
}

impl Window for EventfulWindow {
    fn read(&self, offset: usize, buf: &mut [u8]) -> std::result::Result<(), guest::Error> {
        let events = &self.events;
        let read = (self.frames[offset / PAGE_LEN], offset % PAGE_LEN);
        if events.trigger.get() == Some(read) && buf.len() == 4 {
            events.asked.set(events.asked.get() + 1);
            let due = events.left.borrow_mut().pop_front();
            for (window, offset, word) in due.unwrap_or_default() {
                window.write(offset, &word.to_le_bytes())?;
            }
        }
        self.window.read(offset, buf)
    }
}

struct Guest<'w> {
    world: &'w World,
    events: Rc<Events>,
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

    /// The word on a task's stack by which it is in the function.
    fn frame_of(&self, pid: u32) -> Gva {
        Gva(self.task(pid).stack.end.0 - 0x180)
    }

    /// How often a task was switched out.
    fn switches_of(&self, pid: u32) -> Gva {
        self.task(pid).addr.plus(self.layout.switches[0] as u64)
    }

    /// How often a CPU switched between tasks.
    fn switches_of_cpu(&self, cpu: usize) -> Gva {
        tasks::percpu(tasks::switches_symbol(self.kernel).unwrap(), PERCPU[cpu])
    }

    /// The lock of a CPU's run queue.
    fn queue_lock(&self, cpu: usize) -> Gva {
        tasks::percpu(tasks::queue_lock_symbol(self.kernel).unwrap(), PERCPU[cpu])
    }

    /// Puts the task with its whole stack at rest in the function, or out of it.
    fn enter(&self, pid: u32, inside: bool) {
        let word = if inside { INSIDE } else { 0 };
        self.poke(self.frame_of(pid), &word.to_le_bytes());
    }

    /// The task was switched out so many times.
    fn switched(&self, pid: u32, times: u64) {
        self.poke(self.switches_of(pid), &times.to_le_bytes());
    }

    /// The CPU switched between tasks so many times.
    fn cpu_switched(&self, cpu: usize, times: u64) {
        self.poke(self.switches_of_cpu(cpu), &times.to_le_bytes());
    }

    /// Somebody holds the lock of the CPU's run queue, or nobody does.
    fn holds(&self, cpu: usize, held: bool) {
        self.poke(self.queue_lock(cpu), &u32::from(held).to_le_bytes());
    }

    /// When the counters are read, these words are written right between the two readings: the n-th list at the n-th
    /// reading.
    fn while_counters_are_read(&self, words: Vec<Vec<(Gva, u64)>>) {
        let place = |at: Gva| (self.kernel.space.walk(at).unwrap().frame, at.offset());
        let event = |(at, word)| {
            let (frame, offset) = place(at);
            (self.world.memory.map_mut(&[frame]).unwrap(), offset, word)
        };
        let words = words.into_iter();
        let left = words.map(|at_once| at_once.into_iter().map(event).collect());
        *self.events.left.borrow_mut() = left.collect();
        self.events.asked.set(0);
        self.events.trigger.set(Some(place(self.queue_lock(0))));
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

    fn snapshot_counters(&mut self) -> Result<()> {
        self.baseline = self.scanned().snapshot_counters()?.baseline;
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
    let memory = EventfulMemory {
        memory: &world.memory,
        events: Rc::default(),
    };
    let kernel = Kernel::read(&memory, world.kind, &world.vcpus).unwrap();
    let layout = TaskLayout::of(&kernel).unwrap();
    let tasks = layout.all(&kernel, &kernel.space.fresh()).unwrap();
    let watch = watch();
    let guest = Guest {
        world: &world,
        events: Rc::clone(&memory.events),
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
