//! Guests with as many threads as are listed, and with one more. Memory of theirs is made when it is read.

use locus_guest::addr::{Frame, PAGE_LEN, PAGE_SIZE};
use locus_guest::budget::Budget;
use locus_guest::mock::ROOT;
use locus_guest::space::{PTE_LARGE, PTE_NX, PTE_PRESENT, PTE_WRITE};
use locus_guest::{Memory, Window};

use super::*;
use crate::NoCache;

/// Threads of a process.
const GROUP: u64 = 1000;
/// Pages of memory that a guest has at least for each thread: its stack takes four, and its `struct task_struct` three.
const PAGES: u64 = 7;
/// Pages of a `struct task_struct`. Each of them is read, and no two threads share one. So no thread of a large process costs more.
const TASK_PAGES: u64 = 3;
/// Where those of all threads stand, one behind the other. Two pages of 1 GiB map them.
const THREADS: Gva = Gva(0xffff_8880_0000_0000);
/// The first of their frames. No other memory has so high a number.
const FIRST: Frame = Frame(1 << 18);
/// The first task. It is the idle one, and its list of processes begins with the first thread.
const INIT: Gva = Gva(TEXT.0 + (32 << 20));
/// The kernel's variables, and its only CPU's.
const VARIABLES: u64 = INIT.0 + TASK_PAGES * PAGE_SIZE;
/// Offset of `idle_threads` in what is a CPU's own.
const IDLE: u64 = 0x100;

// Members of `struct task_struct`, each on one of its three pages.
const CPU: usize = 0x10;
const STATE: usize = 0x18;
const STACK: usize = 0x20;
const ON_CPU: usize = 0x28;
const TASKS: usize = 0x1000;
const TASKS_BACK: usize = TASKS + 8;
const NODE: usize = 0x1010;
const NODE_BACK: usize = NODE + 8;
const SIGNAL: usize = 0x1020;
const EXIT_STATE: usize = 0x1028;
const PID: usize = 0x1030;
const TGID: usize = PID + 4;
const COMM: usize = 0x1038;
const START: usize = 0x1048;
const SWITCHES: usize = 0x1050;
const SP: usize = 0x2000;
/// Behind the one of its first thread stands a process's `struct signal_struct`, on the last of the three pages.
const HEAD: usize = 0x2100;
const HEAD_BACK: usize = HEAD + 8;

fn types() -> Vec<u8> {
    let mut types = Blob::with_integers();
    let thread = types.structure("thread_struct", 8, &[("sp", 4, 0)]);
    types.structure("signal_struct", 16, &[("thread_head", 4, 0)]);
    let members = [
        ("cpu", 3, CPU),
        ("__state", 3, STATE),
        ("stack", 4, STACK),
        ("on_cpu", 3, ON_CPU),
        ("tasks", 4, TASKS),
        ("thread_node", 4, NODE),
        ("signal", 4, SIGNAL),
        ("exit_state", 3, EXIT_STATE),
        ("pid", 3, PID),
        ("tgid", 3, TGID),
        ("comm", 4, COMM),
        ("start_time", 4, START),
        ("nvcsw", 4, SWITCHES),
        ("nivcsw", 4, SWITCHES + 8),
        ("thread", thread, SP),
    ];
    types.structure("task_struct", 3 * PAGE_LEN, &members);
    types.bytes()
}

/// Address of the word at `offset` in the `struct task_struct` of thread number `n`.
fn at(n: u64, offset: usize) -> u64 {
    THREADS.0 + n * TASK_PAGES * PAGE_SIZE + offset as u64
}

/// The same of the first task.
fn at_init(offset: usize) -> u64 {
    INIT.0 + offset as u64
}

/// The first thread of the process of thread number `n`.
fn leader(n: u64) -> u64 {
    n - n % GROUP
}

/// The word at `offset` in the `struct task_struct` of thread number `n` of so many.
fn word(threads: u64, n: u64, offset: usize) -> u64 {
    let first = leader(n);
    let next = first + GROUP;
    let last = threads.min(next) - 1;
    match offset {
        STACK => 0xffff_c900_0000_0000 + (n << 14),
        TASKS if next < threads => at(next, TASKS),
        TASKS => at_init(TASKS),
        TASKS_BACK if first > 0 => at(first - GROUP, TASKS),
        TASKS_BACK => at_init(TASKS),
        NODE if n < last => at(n + 1, NODE),
        NODE_BACK if n > first => at(n - 1, NODE),
        NODE | NODE_BACK | SIGNAL => at(first, HEAD),
        HEAD => at(first, NODE),
        HEAD_BACK => at(last, NODE),
        PID => ((first + 1) << 32) | (n + 1),
        START => n,
        _ => 0,
    }
}

/// The memory of a guest with so many threads.
struct Crowd {
    kernel: MockMemory,
    threads: u64,
}

impl Memory for Crowd {
    fn map(&self, frames: &[Frame]) -> Result<Box<dyn Window>, locus_guest::Error> {
        if frames.iter().any(|&frame| frame < FIRST) {
            return self.kernel.map(frames);
        }
        Ok(Box::new(ThreadsWindow {
            threads: self.threads,
            frames: frames.to_vec(),
        }))
    }
}

/// A window onto pages of the threads.
struct ThreadsWindow {
    threads: u64,
    frames: Vec<Frame>,
}

impl Window for ThreadsWindow {
    fn read(&self, offset: usize, buf: &mut [u8]) -> Result<(), locus_guest::Error> {
        for (byte, place) in buf.iter_mut().zip(offset..) {
            let page = self.frames[place / PAGE_LEN].0 - FIRST.0;
            let before = usize::try_from(page % TASK_PAGES).unwrap() * PAGE_LEN;
            let offset = before + place % PAGE_LEN;
            let word = word(self.threads, page / TASK_PAGES, offset & !7);
            *byte = word.to_le_bytes()[offset & 7];
        }
        Ok(())
    }
}

/// What `look` makes of a guest with so many threads, by the budget of one that has just the memory that these need.
fn with_threads<T>(threads: u64, look: impl FnOnce(&Kernel<'_>) -> T) -> T {
    let mut fixture = Fixture::new();
    fixture.constants.push(("__start_BTF", types()));
    fixture.constants.push(("__stop_BTF", Vec::new()));
    for (name, at) in [
        ("init_task", INIT.0),
        ("nr_cpu_ids", VARIABLES),
        ("__per_cpu_offset", VARIABLES + 8),
        ("__start_init_task", VARIABLES + 0x1000),
        ("__end_init_task", VARIABLES + 0x5000),
    ] {
        fixture.symbols.push((at, 'D', name.to_owned()));
    }
    fixture.symbols.push((IDLE, 'A', "idle_threads".to_owned()));
    let kernel = fixture.build();
    let mut data = vec![0; 4 * PAGE_LEN];
    for (place, word) in [
        (at_init(TASKS), at(0, TASKS)),
        (at_init(TASKS_BACK), at(leader(threads - 1), TASKS)),
        (VARIABLES, 1),
        (VARIABLES + 8, VARIABLES),
        (VARIABLES + IDLE, INIT.0),
    ] {
        let place = usize::try_from(place - INIT.0).unwrap();
        data[place..place + 8].copy_from_slice(&word.to_le_bytes());
    }
    kernel.map_bytes(INIT, &data, true, false);
    let table = kernel.frame();
    let entry = |frame: Frame| (frame.0 << 12) | PTE_PRESENT | PTE_WRITE;
    let slot = (THREADS.0 >> 39) as usize & 511;
    kernel.set_entry(ROOT, slot, entry(table));
    for (slot, frame) in [FIRST, Frame(2 * FIRST.0)].into_iter().enumerate() {
        kernel.set_entry(table, slot, entry(frame) | PTE_LARGE | PTE_NX);
    }
    let memory = Crowd { kernel, threads };
    let budget = Budget::for_pages(PAGES * threads);
    let kernel = Kernel::read_with(&memory, KIND, &vcpus(), &NoCache, &budget).unwrap();
    look(&kernel)
}

#[test]
fn a_hundred_thousand_threads_are_listed_in_a_guest_whose_memory_just_holds_them() {
    const MANY: u32 = 100_000;
    with_threads(MANY.into(), |kernel| {
        // All that `info --tasks` reads.
        let details = DetailLayout::of(kernel).unwrap();
        let found = snapshot(kernel, |space, tasks| {
            let with = |task: Task| Ok((details.read(space, task.addr)?, task));
            tasks.into_iter().map(with).collect::<Result<Vec<_>, _>>()
        })
        .unwrap();
        // The idle one comes last.
        let pids = found.iter().map(|(_, task)| task.pid);
        assert!(pids.eq((1..=MANY).chain([0])));
        assert_eq!(found[54_321].0.tgid, 54_001);
        kernel.space.budget().refill().unwrap();
        assert_eq!(count(kernel).unwrap(), found.len());
    });
}

#[test]
fn one_thread_more_than_are_listed_is_refused_and_threads_are_named_as_the_reason() {
    let listed = |threads| {
        with_threads(threads, |kernel| {
            snapshot(kernel, |_, tasks| Ok(tasks.len()))
        })
    };
    let most = TASKS_MAX as u64;
    assert_eq!(listed(most).unwrap(), TASKS_MAX + 1, "with the idle one");
    let said = listed(most + 1).unwrap_err().to_string();
    assert!(
        said.contains("it has too many threads") && said.contains("more than 131,072"),
        "{said}"
    );
}
