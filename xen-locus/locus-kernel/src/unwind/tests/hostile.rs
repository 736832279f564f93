//! Stacks that must not be walked to an end: damaged, exchanged, endless.

use locus_guest::Vcpu;

use super::*;
use crate::Kernel;

#[test]
fn an_exchanged_return_address_is_named() {
    let stacks = Stacks::asleep().words(&[(TOP - 8, RETHOOK.0)]);
    let walk = stacks.sleeping(ASLEEP);
    assert_eq!(walk.end, Err(Unreliable::Hidden("arch_rethook_trampoline")));
    assert_eq!(
        walk.end.unwrap_err().to_string(),
        "caller hidden by arch_rethook_trampoline"
    );
    assert_eq!(addresses(&walk)[2], RETHOOK.0);
}

#[test]
fn what_is_no_stack_is_refused() {
    let good = Stacks::asleep;
    assert_eq!(good().sleeping(ASLEEP).end, Ok(WalkEnd::User));
    let end = |at: u64, value: u64| good().words(&[(at, value)]).sleeping(ASLEEP).end;
    let last = TOP - 8;
    // Code without a row, code that is none, no code.
    assert_eq!(end(last, PATCHED.0 + 0x10_0000), Err(Unreliable::NoRow));
    assert_eq!(end(last, 0), Err(Unreliable::NoRow));
    assert_eq!(end(last, TASK), Err(Unreliable::NoRow));
    // A place that no call returns to, and one that the kernel doesn't know.
    assert_eq!(end(last, after(SYSCALL) - 1), Err(Unreliable::NoCall));
    assert_eq!(end(last, FRAMED.0 + 0x180), Err(Unreliable::NoCall));
    assert_eq!(
        good().running(&vcpu(FRAMED.0 + 0x180, last)).end,
        Err(Unreliable::Undefined)
    );
    // An end in the middle of a stack.
    assert_eq!(end(TOP - 0xd8, after(FORK)), Err(Unreliable::EndElsewhere));
    // Kernel registers at the top, whose stack pointer is anywhere.
    for (sp, why) in [
        (0, Unreliable::OffStack),
        (u64::MAX, Unreliable::OffStack),
        (TASK, Unreliable::Backwards),
        (TOP, Unreliable::Backwards),
        (TASK - 8, Unreliable::OffStack),
    ] {
        let stacks = good().regs(TOP, PATCHED.0 + 1, 0x10, sp);
        assert_eq!(stacks.sleeping(ASLEEP).end, Err(why), "{sp:#x}");
    }
    // Saved stack pointers.
    for sp in [
        0,
        8,
        ASLEEP + 4,
        u64::MAX,
        u64::MAX - 0x38,
        TASK - 0x1000,
        TASK + LEN - 0x30,
    ] {
        assert_eq!(
            good().sleeping(sp).end,
            Err(Unreliable::OffStack),
            "{sp:#x}"
        );
    }
}

#[test]
fn a_stack_that_was_left_is_not_entered_again() {
    let (stacks, vcpu) = interrupted(KTHREAD.0 + 1);
    let stacks = stacks.regs(TOP - 0x800, KTHREAD.0 + 1, 0x10, IRQ + 0x1100);
    assert_eq!(stacks.running(&vcpu).end, Err(Unreliable::Backwards));
    // Nor by a plain frame.
    let sp = IRQ + LEN - 0x10;
    let stacks = Stacks::new().words(&[(sp, after(SCHEDULE))]);
    let walk = stacks.running(&Vcpu {
        rip: IDLE,
        rsp: Gva(sp),
        ..vcpu
    });
    assert_eq!(walk.end, Err(Unreliable::OffStack));
}

#[test]
fn a_walk_is_bounded() {
    // Interrupt frame upon interrupt frame, each 48 bytes up.
    let mut stacks = Stacks::new();
    let count = LEN / 48 - 2;
    for n in 0..count {
        let sp = TASK + 48 * n;
        stacks = stacks.regs(sp + 8 - RIP, EXCEPTION.0, 0x10, sp + 48);
    }
    let walk = stacks.running(&vcpu(EXCEPTION.0, TASK));
    assert_eq!(walk.end, Err(Unreliable::TooLong));
    assert_eq!(walk.frames.len(), FRAMES_MAX);
}

#[test]
fn garbage_on_the_stacks_is_walked_without_harm() {
    let places = [
        SCHEDULE,
        SYSCALL,
        FORK,
        KTHREAD,
        ON_IRQ_STACK,
        INTERRUPT,
        EXCEPTION,
        REALIGNED,
        FRAMED,
        PATCHED,
        RETHOOK,
        HYPERCALLS,
    ];
    let mut state = 7u64;
    let mut next = move || {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
        state >> 33
    };
    let world = World::new(GuestType::Pv);
    let kernel = Kernel::read(&world.memory, world.kind, &world.vcpus).unwrap();
    let walker = Walker::new(&kernel).unwrap();
    let mut reliable = 0;
    for _ in 0..300 {
        let mut stacks = Stacks::new();
        for base in [TASK, IRQ, NMI, ENTRY] {
            for at in (base..base + LEN).step_by(8).skip(7800) {
                let place = places[next() as usize % places.len()];
                let value = match next() % 8 {
                    0..=3 => after(place),
                    4 => place.0 + next() % 8,
                    5 => [TASK, IRQ, NMI, ENTRY][next() as usize % 4] + LEN - next() % 0x400,
                    6 => 0x33,
                    _ => 0x10,
                };
                stacks.put(at, value);
            }
        }
        for sp in (TASK + LEN - 0x400..TASK + LEN).step_by(8) {
            let mut vcpu = vcpu(places[next() as usize % places.len()].0, sp);
            (vcpu.rbp, vcpu.r10) = (sp + 16, sp + 64);
            for walk in [
                walker.sleeping(Gva(sp), stacks.all()[0], next() % 2 == 0),
                walker.running(&vcpu, &stacks.all(), next() % 2 == 0),
            ] {
                assert!(walk.frames.len() <= FRAMES_MAX);
                reliable += usize::from(walk.is_reliable());
            }
        }
    }
    // Some do end well by chance: the garbage gets far enough.
    assert!(reliable > 0);
}
