//! Which stacks the registers of vCPUs lead to, and how system calls continue.

use locus_guest::Window;
use locus_kernel::fixture_world::RESTART;
use locus_kernel::unwind::stack::StackCopy;

use super::*;
use crate::blocker::Reason;

/// The idle task, which is on a CPU in the kernel, and a word of its stack that is live.
fn idle_inside<'g>(guest: &'g Guest<'_>) -> &'g Task {
    let mut tasks = guest.tasks.iter();
    let idle = tasks.find(|t| t.on_cpu && t.pid == 0).unwrap();
    guest.poke(Gva(idle.stack.end.0 - 0x80), &INSIDE.to_le_bytes());
    idle
}

#[test]
fn user_mode_can_not_hide_a_task_that_is_in_the_kernel_on_another_cpu() {
    with_guest(|guest, steps| {
        guest.enter(42, false);
        steps.scan_off_cpu().unwrap();
        let idle = idle_inside(guest);
        let mut vcpus = guest.world.vcpus.clone();
        let user = vcpus.iter().position(|v| v.user).unwrap();
        let look = |vcpus: &[Vcpu]| blocked(steps.look(vcpus, true, &|| false).unwrap());
        // It chose the GS base of the other CPU.
        for base in [0, PERCPU[0]] {
            vcpus[user].gs_base = Gva(base);
            assert_eq!(look(&vcpus), [0], "{base:#x}");
        }
        // And a stack pointer above which almost nothing is left to scan. It is in the kernel's first instruction.
        vcpus[user].user = false;
        vcpus[user].rsp = Gva(idle.stack.end.0 - 8);
        assert_eq!(look(&vcpus), [0]);
        vcpus[user].gs_base = Gva(PERCPU[1]);
        assert_eq!(look(&vcpus), [0]);
    });
    with_guest(|guest, steps| {
        // The stack of a task that sleeps in the function.
        steps.scan_off_cpu().unwrap();
        let mut vcpus = guest.world.vcpus.clone();
        let vcpu = vcpus.iter_mut().find(|v| v.user).unwrap();
        (vcpu.user, vcpu.gs_base) = (false, Gva(PERCPU[1]));
        vcpu.rsp = Gva(guest.task(42).stack.end.0 - 8);
        assert_eq!(blocked(steps.look(&vcpus, true, &|| false).unwrap()), [42]);
    });
}

#[test]
fn a_cpu_at_the_first_byte_is_in_the_way_and_a_pointer_to_there_is_not() {
    with_guest(|guest, steps| {
        guest.enter(42, false);
        steps.scan_off_cpu().unwrap();
        // What the idle task passes on: the address of the function.
        let idle = idle_inside(guest);
        guest.poke(Gva(idle.stack.end.0 - 0x80), &PATCHED.0.to_le_bytes());
        let mut vcpus = guest.world.vcpus.clone();
        let look = |vcpus: &[Vcpu]| blocked(steps.look(vcpus, true, &|| false).unwrap());
        assert_eq!(look(&vcpus), NOBODY);
        // Its CPU may wait there for a device model.
        vcpus.iter_mut().find(|v| !v.user).unwrap().rip = PATCHED;
        assert_eq!(look(&vcpus), [0]);
    });
}

#[test]
fn registers_with_the_gs_base_of_no_cpu_hide_no_part_of_a_stack() {
    with_guest(|guest, steps| {
        steps.tasks.may_nest = true;
        // A guest of the guest chose a stack pointer above all that is live on the stack of a task that sleeps inside.
        guest.enter(42, true);
        steps.scan_off_cpu().unwrap();
        let mut vcpus = guest.world.vcpus.clone();
        let vcpu = vcpus.iter_mut().find(|v| v.user).unwrap();
        (vcpu.user, vcpu.gs_base, vcpu.gs_other) = (false, Gva(0xffff_c000_0000_0000), Gva(0));
        vcpu.rsp = Gva(guest.task(42).stack.end.0 - 8);
        assert_eq!(blocked(steps.look(&vcpus, true, &|| false).unwrap()), [42]);
    });
}

#[test]
fn registers_of_another_kernel_make_a_look_unreliable() {
    with_guest(|guest, steps| {
        guest.enter(42, false);
        steps.scan_off_cpu().unwrap();
        let vcpus = guest.world.vcpus.clone();
        let look = |steps: &Steps<'_, '_, '_>, vcpus: &[Vcpu]| {
            blocked(steps.look(vcpus, true, &|| false).unwrap())
        };
        assert_eq!(look(steps, &vcpus), NOBODY);
        // The guest crashed into another kernel, whose memory is elsewhere: the old one's stands still.
        for user in [true, false] {
            let mut foreign = vcpus.clone();
            let vcpu = foreign.iter_mut().find(|v| v.user).unwrap();
            (vcpu.user, vcpu.gs_base, vcpu.gs_other) = (user, Gva(0xffff_c000_0000_0000), Gva(0));
            assert_eq!(look(steps, &foreign), [0], "user {user}");
            steps.tasks.may_nest = true;
            assert_eq!(look(steps, &foreign).is_empty(), user);
            steps.tasks.may_nest = false;
        }
    });
}

#[test]
fn where_a_guest_can_run_guests_registers_hide_no_part_of_a_stack() {
    with_guest(|guest, steps| {
        guest.enter(42, false);
        steps.scan_off_cpu().unwrap();
        let running = guest.tasks.iter().find(|t| t.on_cpu && t.pid != 0).unwrap();
        guest.poke(Gva(running.stack.end.0 - 0x180), &INSIDE.to_le_bytes());
        let mut vcpus = guest.world.vcpus.clone();
        let look = |steps: &Steps<'_, '_, '_>, vcpus: &[Vcpu]| {
            blocked(steps.look(vcpus, true, &|| false).unwrap())
        };
        // In user mode nothing of its stack is live.
        assert_eq!(look(steps, &vcpus), NOBODY);
        steps.tasks.may_nest = true;
        assert_eq!(look(steps, &vcpus), [running.pid]);
        // In kernel mode, with a stack pointer that leaves out what is live.
        let vcpu = vcpus.iter_mut().find(|v| v.user).unwrap();
        (vcpu.user, vcpu.rsp) = (false, Gva(running.stack.end.0 - 8));
        (vcpu.gs_base, vcpu.gs_other) = (Gva(PERCPU[1]), Gva(0));
        assert_eq!(look(steps, &vcpus), [running.pid]);
        steps.tasks.may_nest = false;
        assert_eq!(look(steps, &vcpus), NOBODY);
    });
}

#[test]
fn a_guest_can_run_guests_unless_its_kernel_says_that_it_can_not() {
    let asked = |kind, features: u32, without: &str| {
        let world = World::with(kind, |f| f.constants.retain(|(name, _)| *name != without));
        let kernel = Kernel::read(&world.memory, world.kind, &world.vcpus).unwrap();
        let words = kernel.symbols.need("boot_cpu_data").unwrap().plus(8);
        let frame = kernel.space.walk(words).unwrap().frame;
        world
            .memory
            .fill(frame, words.offset(), &features.to_le_bytes());
        may_nest(&kernel)
    };
    assert!(!asked(GuestType::Pvh, 0, ""));
    assert!(!asked(GuestType::Pvh, !(1 << 5 | 1 << 2), ""));
    assert!(asked(GuestType::Pvh, 1 << 5, ""));
    assert!(asked(GuestType::Hvm, 1 << 2, ""));
    // It does not say so.
    assert!(asked(GuestType::Pvh, 0, "x86_cap_flags"));
    assert!(asked(GuestType::Pvh, 0, "__start_BTF"));
    assert!(!asked(GuestType::Pv, 1 << 5, ""));
}

#[test]
fn a_task_whose_cpu_went_down_is_scanned() {
    with_guest(|guest, steps| {
        guest.enter(42, false);
        let idle = guest.tasks.iter().find(|t| t.on_cpu && t.pid == 0).unwrap();
        let on_cpu = |on: u32| {
            let at = idle.addr.plus(guest.layout.on_cpu as u64);
            guest.poke(at, &on.to_le_bytes());
        };
        // Off its CPU its stack was clear. It has run since, and no counter says so.
        on_cpu(0);
        assert_eq!(blocked(steps.scan_off_cpu().unwrap()), NOBODY);
        on_cpu(1);
        idle_inside(guest);
        let mut vcpus = guest.world.vcpus.clone();
        vcpus[0].online = false;
        assert_eq!(blocked(steps.look(&vcpus, true, &|| false).unwrap()), [0]);
    });
}

#[test]
fn a_cpu_s_own_stacks_are_followed_to_its_task_s() {
    const NMI: u64 = 0xffff_fe00_0000_1000;
    const IRQ: u64 = 0xffff_c900_0000_4000;
    with_guest(|guest, steps| {
        guest.enter(42, false);
        let idle = guest.tasks.iter().find(|t| t.on_cpu && t.pid == 0).unwrap();
        let word = |offset| Gva(idle.stack.end.0 - offset);
        let at = |start: u64, offset: u64, value: u64| (start + offset, value);
        // An NMI met an interrupt, which had met the idle task: its stack pointers, and words that are
        // not live.
        let look = |steps: &mut Steps<'_, '_, '_>, words: &[(u64, u64)]| {
            let stack = |start: u64| {
                let mut bytes = vec![0; 0x1000];
                for &(at, value) in words {
                    if let Some(at) = at.checked_sub(start).filter(|&at| at < 0x1000) {
                        bytes[at as usize..][..8].copy_from_slice(&value.to_le_bytes());
                    }
                }
                let range = Range::new(Gva(start), 0x1000);
                let whole = StackCopy::of(range, |copy| {
                    copy.copy_from_slice(&bytes);
                    Ok::<(), ()>(())
                });
                (range, Box::new(whole.unwrap()) as Box<dyn Window>)
            };
            let mut vcpus = guest.world.vcpus.clone();
            let vcpu = vcpus.iter_mut().find(|v| !v.user).unwrap();
            vcpu.rsp = Gva(NMI + 0x800);
            for cpu in &mut steps.tasks.cpus.all {
                cpu.stacks = vec![stack(IRQ), stack(NMI)];
            }
            blocked(steps.look(&vcpus, true, &|| false).unwrap())
        };
        let met = [at(NMI, 0xf00, IRQ + 0xc00), at(IRQ, 0xf00, word(0x100).0)];
        let with = |more: &[(u64, u64)]| [&met[..], more].concat();
        assert_eq!(look(steps, &met), NOBODY);
        for (live, (start, offset)) in [
            (true, (NMI, 0x900)),
            (false, (NMI, 0x7f8)),
            (true, (IRQ, 0xc08)),
            (false, (IRQ, 0xb00)),
        ] {
            let found = look(steps, &with(&[at(start, offset, INSIDE)]));
            assert_eq!(found == [0], live, "{start:#x}+{offset:#x}: {found:?}");
        }
        guest.poke(word(0x108), &INSIDE.to_le_bytes());
        assert_eq!(look(steps, &met), NOBODY);
        guest.poke(word(0x80), &INSIDE.to_le_bytes());
        assert_eq!(look(steps, &met), [0]);
    });
}

#[test]
fn a_task_that_will_continue_a_system_call_in_a_function_is_in_the_way() {
    with_guest(|guest, steps| {
        guest.enter(42, false);
        let task = guest.task(42);
        // Stopped by a signal: the function, and what the call has returned.
        guest.poke(task.addr.plus(RESTART as u64), &PATCHED.0.to_le_bytes());
        assert_eq!(blocked(steps.scan_off_cpu().unwrap()), NOBODY);
        let result = task.stack.end.0 - steps.tasks.restart.result as u64;
        guest.poke(Gva(result), &(-516i64).to_le_bytes());
        guest.switched(42, 1);
        let Verdict::Blocked(found) = steps.scan_off_cpu().unwrap() else {
            panic!("no thread is in the way");
        };
        assert_eq!((found[0].pid, found[0].reason), (42, Reason::RestartBlock));
        assert!(Verdict::Blocked(found).is_sleepers());
        steps.clear_by_unwind().unwrap();
        assert_eq!(blocked(steps.scan_off_cpu().unwrap()), [42]);
        // Of another function, or with nothing to go on with.
        guest.poke(
            task.addr.plus(RESTART as u64),
            &(PATCHED.0 + 0x10).to_le_bytes(),
        );
        assert_eq!(blocked(steps.scan_off_cpu().unwrap()), NOBODY);
        guest.poke(task.addr.plus(RESTART as u64), &PATCHED.0.to_le_bytes());
        guest.poke(Gva(result), &(-4i64).to_le_bytes());
        guest.switched(42, 2);
        assert_eq!(blocked(steps.scan_off_cpu().unwrap()), NOBODY);
        // On its way back from user mode.
        let mut vcpus = guest.world.vcpus.clone();
        let vcpu = vcpus.iter_mut().find(|v| v.user).unwrap();
        let running = guest.tasks.iter().find(|t| t.on_cpu && t.pid != 0).unwrap();
        guest.poke(running.addr.plus(RESTART as u64), &PATCHED.0.to_le_bytes());
        assert_eq!(guest.look(steps), NOBODY);
        vcpu.rax = 219;
        let found = steps.look(&vcpus, true, &|| false).unwrap();
        assert_eq!(blocked(found), [running.pid]);
    });
}

#[test]
fn a_task_of_any_mode_that_was_about_to_continue_a_system_call_is_in_the_way() {
    const COMPAT: u64 = 2;
    with_guest(|guest, steps| {
        guest.enter(42, false);
        let task = guest.task(42);
        let function = task.addr.plus(RESTART as u64);
        guest.poke(function, &PATCHED.0.to_le_bytes());
        let (result, call) = (steps.tasks.restart.result, steps.tasks.restart.call);
        let word = |before: usize| Gva(task.stack.end.0 - before as u64);
        let x32 = 219 | 1 << 30;
        let mut times = 0;
        // The status when the call was cut short, what it returned, its number, and whether it continues.
        for (status, returned, number, due) in [
            (0, 219, 7, true),
            (0, x32, 7, true),
            (COMPAT, 0, 7, true),
            (COMPAT, 7, 0, true),
            (COMPAT, 0xffff_fdfc, 7, true),
            // The program in 64-bit mode reads.
            (0, 0, 7, false),
            (0, 7, 0, false),
        ] {
            guest.poke(Gva(function.0 - 8), &u64::to_le_bytes(status));
            guest.poke(word(result), &u64::to_le_bytes(returned));
            guest.poke(word(call), &u64::to_le_bytes(number));
            times += 1;
            guest.switched(42, times);
            let found = blocked(steps.scan_off_cpu().unwrap());
            assert_eq!(found == [42], due, "{status} {returned:#x} {number:#x}");
        }
        // On its way back from user mode.
        let mut vcpus = guest.world.vcpus.clone();
        let vcpu = vcpus.iter_mut().position(|v| v.user).unwrap();
        let running = guest.tasks.iter().find(|t| t.on_cpu && t.pid != 0).unwrap();
        let function = running.addr.plus(RESTART as u64);
        guest.poke(function, &PATCHED.0.to_le_bytes());
        for (status, rax, due) in [(COMPAT, 0, true), (0, 0, false), (0, x32, true)] {
            guest.poke(Gva(function.0 - 8), &u64::to_le_bytes(status));
            vcpus[vcpu].rax = rax;
            let found = blocked(steps.look(&vcpus, true, &|| false).unwrap());
            assert_eq!(found == [running.pid], due, "{status} {rax:#x}");
        }
    });
}
