//! Walks of stacks made by hand, in the small guest.

#![allow(clippy::cast_possible_truncation)] // small stacks

mod hostile;
mod modules;

use locus_guest::addr::Range;
use locus_guest::space::Space;
use locus_guest::{self as guest, GuestType, Vcpu, Window};

use super::stack::StackCopy;
use super::*;
use crate::fixture;
use crate::fixture_world::frames::{
    after, CS, DO_IDLE, EXCEPTION, FORK, FRAMED, HYPERCALLS, INACTIVE, INTERRUPT, KTHREAD,
    ON_IRQ_STACK, REALIGNED, REGS, RETHOOK, RIP, RSP, SCHEDULE, SECONDARY, STARTUP, SYSCALL,
};
use crate::fixture_world::{World, IDLE, PATCHED, STACKS};
use crate::tasks::TaskLayout;
use crate::Kernel;

/// Bytes of each stack of these tests.
const LEN: u64 = 0x10000;
/// Where they are: a task's, and three of a CPU's.
const TASK: u64 = STACKS.0 + (1 << 20);
const IRQ: u64 = STACKS.0 + (2 << 20);
const NMI: u64 = STACKS.0 + (3 << 20);
const ENTRY: u64 = STACKS.0 + (4 << 20);
/// Where registers of user mode are on a task's stack.
const TOP: u64 = TASK + LEN - REGS;

struct Bytes(Vec<u8>);

impl Window for Bytes {
    fn read(&self, offset: usize, buf: &mut [u8]) -> Result<(), guest::Error> {
        let (len, size) = (buf.len(), self.0.len());
        let bytes = self.0.get(offset..offset + len);
        buf.copy_from_slice(bytes.ok_or(guest::Error::Bounds { offset, len, size })?);
        Ok(())
    }
}

/// The stacks of a test.
struct Stacks(Vec<(StackKind, u64, Bytes)>);

impl Stacks {
    fn new() -> Stacks {
        let kinds = [
            (StackKind::Task, TASK),
            (StackKind::Irq, IRQ),
            (StackKind::Exception, NMI),
            (StackKind::Entry, ENTRY),
        ];
        let empty = || Bytes(vec![0; LEN as usize]);
        Stacks(kinds.map(|(kind, at)| (kind, at, empty())).into())
    }

    fn put(&mut self, at: u64, value: u64) {
        let holds = |(_, start, _): &&mut (_, u64, _)| (*start..*start + LEN).contains(&at);
        let (_, start, bytes) = self.0.iter_mut().find(holds).unwrap();
        let at = (at - *start) as usize;
        bytes.0[at..at + 8].copy_from_slice(&value.to_le_bytes());
    }

    fn words(mut self, words: &[(u64, u64)]) -> Stacks {
        words.iter().for_each(|&(at, value)| self.put(at, value));
        self
    }

    /// Registers at `at`.
    fn regs(self, at: u64, ip: u64, cs: u64, sp: u64) -> Stacks {
        self.words(&[(at + RIP, ip), (at + CS, cs), (at + RSP, sp)])
    }

    /// Registers of user mode where they belong.
    fn user(self) -> Stacks {
        self.regs(TOP, 0x40_1000, 0x33, 0x7fff_0000)
    }

    /// A system call that went to sleep in [`PATCHED`]; the stack pointer is [`ASLEEP`].
    fn asleep() -> Stacks {
        Stacks::new().user().words(&[
            (ASLEEP + INACTIVE - 8, after(SCHEDULE)),
            (TOP - 0xd0 - 8, after(PATCHED)),
            (TOP - 8, after(SYSCALL)),
        ])
    }

    fn all(&self) -> Vec<Stack<'_>> {
        self.0
            .iter()
            .map(|(kind, start, memory)| Stack {
                kind: *kind,
                range: Range::new(Gva(*start), LEN),
                memory,
            })
            .collect()
    }

    fn sleeping(&self, sp: u64) -> Walk {
        with_walker(|walker| walker.sleeping(Gva(sp), self.all()[0], false))
    }

    fn running(&self, vcpu: &Vcpu) -> Walk {
        with_walker(|walker| walker.running(vcpu, &self.all(), false))
    }
}

/// Saved stack pointer of a task in [`SCHEDULE`] that [`PATCHED`] called.
const ASLEEP: u64 = TOP - 0xd0 - 0x50 - INACTIVE;

fn with_walker<T>(look: impl FnOnce(&Walker<'_, '_>) -> T) -> T {
    let world = World::new(GuestType::Pv);
    let kernel = Kernel::read(&world.memory, world.kind, &world.vcpus).unwrap();
    look(&Walker::new(&kernel).unwrap())
}

fn vcpu(rip: u64, rsp: u64) -> Vcpu {
    Vcpu {
        online: true,
        rip: Gva(rip),
        rsp: Gva(rsp),
        ..Vcpu::default()
    }
}

fn addresses(walk: &Walk) -> Vec<u64> {
    walk.frames.iter().map(|frame| frame.address.0).collect()
}

#[test]
fn every_sleeping_task_of_the_small_guest_is_walked_to_its_end() {
    let world = World::new(GuestType::Pvh);
    let kernel = Kernel::read(&world.memory, world.kind, &world.vcpus).unwrap();
    let walker = Walker::new(&kernel).unwrap();
    let tasks = TaskLayout::of(&kernel).unwrap();
    let mut walked = Vec::new();
    for task in tasks.all(&kernel, &kernel.space).unwrap() {
        let copy = StackCopy::read(&kernel.space, task.stack, task.sp).unwrap();
        let stack = Stack {
            kind: StackKind::Task,
            range: task.stack,
            memory: &copy,
        };
        if !task.on_cpu {
            let walk = walker.sleeping(task.sp, stack, task.idle);
            walked.push((task.comm, walk.end, addresses(&walk)));
        }
    }
    let wanted = [
        ("init", WalkEnd::Kernel, vec![SCHEDULE, KTHREAD, FORK]),
        ("sleeper", WalkEnd::User, vec![SCHEDULE, PATCHED, SYSCALL]),
        (
            "swapper/1",
            WalkEnd::Kernel,
            vec![SCHEDULE, DO_IDLE, STARTUP, SECONDARY],
        ),
    ]
    .map(|(comm, end, functions)| {
        let frames = functions.into_iter().map(after).collect::<Vec<_>>();
        (comm.to_owned(), Ok(end), frames)
    });
    assert_eq!(walked, wanted);
}

#[test]
fn a_cpu_in_the_kernel_is_walked_from_its_registers() {
    let stacks = Stacks::asleep();
    let inner = TOP - 0xd0 - 0x50;
    let walk = stacks.running(&vcpu(SCHEDULE.0 + 3, inner));
    assert_eq!(walk.end, Ok(WalkEnd::User));
    assert_eq!(
        addresses(&walk),
        [SCHEDULE.0 + 3, after(PATCHED), after(SYSCALL)]
    );
    assert!(walk.frames[0].interrupted);
    assert!(!walk.frames[1].interrupted);
}

#[test]
fn a_cpu_in_user_mode_is_in_no_function() {
    let mut user = vcpu(0x40_1000, 0x7fff_0000);
    user.user = true;
    let walk = Stacks::new().running(&user);
    assert_eq!((walk.frames, walk.end), (vec![], Ok(WalkEnd::User)));
}

#[test]
fn a_system_call_that_has_just_begun_has_nothing_on_the_stack() {
    let stacks = Stacks::new();
    let end = |sp| stacks.running(&vcpu(fixture::ENTRY.0, sp)).end;
    // On the stack of user mode, on that for the way in, among the registers on the task's.
    assert_eq!(end(0x7fff_0000), Ok(WalkEnd::Kernel));
    assert_eq!(end(ENTRY + 0x100), Ok(WalkEnd::Kernel));
    assert_eq!(end(TOP + 0x20), Ok(WalkEnd::Kernel));
    assert_eq!(end(TASK + LEN), Ok(WalkEnd::Kernel));
    // Where no registers are, something else may be above.
    assert_eq!(end(TOP - 0x20), Err(Unreliable::EndElsewhere));
    assert_eq!(end(NMI + 0x100), Err(Unreliable::EndElsewhere));
    assert_eq!(end(TASK - 0x1000), Err(Unreliable::OffStack));
}

#[test]
fn a_task_that_never_ran_is_where_tasks_begin() {
    let sp = TOP - INACTIVE;
    let stacks = Stacks::new().words(&[(sp + INACTIVE - 8, FORK.0)]);
    let walk = stacks.sleeping(sp);
    assert_eq!(
        (addresses(&walk), walk.end),
        (vec![FORK.0], Ok(WalkEnd::Kernel))
    );
    assert!(walk.frames[0].interrupted);
    // The same address not as the first: it isn't behind a call.
    let stacks = Stacks::asleep().words(&[(TOP - 8, FORK.0)]);
    assert_eq!(stacks.sleeping(ASLEEP).end, Err(Unreliable::NoCall));
}

#[test]
fn padding_above_the_registers_is_allowed_as_kernels_with_fred_have_it() {
    let shifted = |by: u64| {
        let stacks = Stacks::new().regs(TOP - by, 0x40_1000, 0x33, 0);
        stacks
            .words(&[(TOP - by - 8, after(SYSCALL))])
            .running(&vcpu(IDLE.0, TOP - by - 8))
            .end
    };
    assert_eq!(shifted(0), Ok(WalkEnd::User));
    assert_eq!(shifted(16), Ok(WalkEnd::User));
    assert_eq!(shifted(8), Err(Unreliable::EndElsewhere));
    assert_eq!(shifted(0x100), Err(Unreliable::EndElsewhere));
}

/// An interrupt that switched to the CPU's stack, in a kernel thread that was interrupted at `ip`.
fn interrupted(ip: u64) -> (Stacks, Vcpu) {
    let (irq, regs, outer) = (IRQ + 0x1000, TOP - 0x800, TOP - 0xd0);
    let stacks = Stacks::new().regs(regs, ip, 0x10, outer).words(&[
        (irq, after(ON_IRQ_STACK)),
        (irq + 8, regs - 8),
        (regs - 8, after(INTERRUPT)),
        (TOP - 8, after(FORK)),
    ]);
    (stacks, vcpu(IDLE.0 + 1, irq))
}

#[test]
fn an_interrupt_is_followed_from_its_stack_to_the_task() {
    let (stacks, vcpu) = interrupted(KTHREAD.0 + 1);
    let walk = stacks.running(&vcpu);
    let frames = [
        (IDLE.0 + 1, true),
        (after(ON_IRQ_STACK), false),
        (after(INTERRUPT), false),
        (KTHREAD.0 + 1, true),
        (after(FORK), false),
    ];
    let found: Vec<_> = walk
        .frames
        .iter()
        .map(|f| (f.address.0, f.interrupted))
        .collect();
    assert_eq!(found, frames);
    assert_eq!(walk.end, Ok(WalkEnd::Kernel));
    // A task that was preempted there sleeps with its registers on its own stack.
    let regs = TOP - 0x800;
    let sp = regs - 0x50 - INACTIVE;
    let stacks = stacks.words(&[(sp + INACTIVE - 8, after(SCHEDULE))]);
    let walk = stacks.sleeping(sp);
    assert_eq!(walk.end, Ok(WalkEnd::Kernel));
    assert_eq!(walk.frames.len(), 4);
}

#[test]
fn an_exception_with_a_stack_of_its_own_shows_only_the_processors_frame() {
    // The interrupt frame comes 8 bytes up; registers would begin 128 bytes below it.
    let sp = NMI + 0x1000;
    let stacks = Stacks::asleep().regs(sp + 8 - RIP, PATCHED.0 + 5, 0x10, TOP - 0xd0);
    let walk = stacks.running(&vcpu(EXCEPTION.0, sp));
    assert_eq!(walk.end, Ok(WalkEnd::User));
    assert_eq!(
        addresses(&walk),
        [EXCEPTION.0, PATCHED.0 + 5, after(SYSCALL)]
    );
    // From user mode nothing is on the task's stack; the frame is at the top then.
    let at_top = NMI + LEN - 48;
    let stacks = Stacks::new().regs(at_top + 8 - RIP, 0x40_1000, 0x33, 0);
    assert_eq!(
        stacks.running(&vcpu(EXCEPTION.0, at_top)).end,
        Ok(WalkEnd::User)
    );
}

#[test]
fn registers_count_while_they_are_known() {
    let mut known = vcpu(REALIGNED.0 + 1, TOP - 0x200);
    known.r10 = TOP;
    let stacks = Stacks::new().user().words(&[(TOP - 8, after(SYSCALL))]);
    assert_eq!(stacks.running(&known).end, Ok(WalkEnd::User));
    // As a return address they are not.
    let stacks = stacks.words(&[(TOP - 0x108, after(REALIGNED))]);
    known = vcpu(IDLE.0, TOP - 0x108);
    known.r10 = TOP;
    assert_eq!(stacks.running(&known).end, Err(Unreliable::NoRegister));
}

#[test]
fn a_frame_pointer_is_found_and_passed_on() {
    let mut vcpu = vcpu(FRAMED.0 + 1, TOP - 0x300);
    vcpu.rbp = TOP - 0x210;
    let stacks = Stacks::new().user().words(&[
        // Of the first frame: its caller, and that one's frame pointer.
        (TOP - 0x208, after(FRAMED)),
        (TOP - 0x210, TOP - 0x10),
        (TOP - 8, after(SYSCALL)),
    ]);
    let walk = stacks.running(&vcpu);
    assert_eq!(walk.end, Ok(WalkEnd::User));
    assert_eq!(walk.frames.len(), 3);
    vcpu.rbp = 0x1234_5678;
    assert_eq!(stacks.running(&vcpu).end, Err(Unreliable::OffStack));
}

#[test]
fn what_a_hypercall_pushes_is_counted() {
    for (offset, pushed) in [(0, 0), (1, 8), (3, 16), (8, 16), (10, 16), (12, 8), (13, 0)] {
        let stacks = Stacks::new().user().words(&[(TOP - 8, after(SYSCALL))]);
        let walk = stacks.running(&vcpu(HYPERCALLS.0 + offset, TOP - 8 - pushed));
        assert_eq!(walk.end, Ok(WalkEnd::User), "{offset}");
    }
    // In the middle of an instruction nobody is.
    let walk = Stacks::new().running(&vcpu(HYPERCALLS.0 + 2, TOP - 8));
    assert_eq!(walk.end, Err(Unreliable::Undefined));
}

#[test]
fn a_copy_has_only_the_live_part() {
    let world = World::new(GuestType::Pv);
    let space = Space::new(&world.memory, locus_guest::mock::ROOT, 4);
    let range = Range::new(STACKS, 0x2000);
    let copy = StackCopy::read(&space, range, STACKS.plus(0x1e00)).unwrap();
    let mut word = [0; 8];
    copy.read(0x1e30, &mut word).unwrap();
    assert_eq!(u64::from_le_bytes(word), after(SCHEDULE));
    assert!(copy.read(0x1df8, &mut word).is_err());
    assert!(copy.read(0x1ff9, &mut word).is_err());
    assert!(copy.read(usize::MAX, &mut word).is_err());
    let whole = StackCopy::read(&space, range, Gva(0)).unwrap();
    assert!(whole.read(0, &mut word).is_ok());
}
