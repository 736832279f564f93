//! What is looked at again in the pause, in the mock guest.

#![allow(clippy::cast_possible_truncation)] // small stacks

use std::cell::Cell;

use locus_guest::{GuestType, Vcpu, Window};
use locus_kernel::fixture_world::{World, PATCHED, PERCPU, RESTART, TASKS, THREAD_NODE};
use locus_kernel::tasks::{self, Task, TaskLayout};
use locus_kernel::unwind::stack::StackCopy;

use super::*;

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

    fn look(&self, scan: &Prescan<'_, '_>) -> Vec<u32> {
        let vcpus: &[Vcpu] = &self.world.vcpus;
        blocked(scan.look(vcpus, true, &|| false).unwrap())
    }
}

fn blocked(verdict: Verdict) -> Vec<u32> {
    match verdict {
        Verdict::Quiet => Vec::new(),
        Verdict::Blocked(all) => all.iter().map(|b| b.pid).collect(),
        other => panic!("{other:?}"),
    }
}

fn with_guest(test: impl FnOnce(&Guest<'_>, &mut Prescan<'_, '_>)) {
    let world = World::new(GuestType::Pvh);
    let kernel = Kernel::read(&world.memory, world.kind, &world.vcpus).unwrap();
    let layout = TaskLayout::of(&kernel).unwrap();
    let tasks = layout.all(&kernel, &kernel.space.fresh()).unwrap();
    let watch = Watch::of(vec![Watched {
        range: Range::new(PATCHED, 0x10),
        name: "patched".into(),
    }]);
    let guest = Guest {
        world: &world,
        kernel: &kernel,
        layout,
        tasks,
    };
    let mut scan = Prescan::new(&kernel, &watch).unwrap();
    scan.refresh().unwrap();
    test(&guest, &mut scan);
}

#[test]
fn a_task_that_did_not_run_since_it_was_found_clear_is_not_looked_at_again() {
    with_guest(|guest, scan| {
        guest.enter(42, false);
        assert_eq!(blocked(scan.rehearse().unwrap()), NOBODY);
        guest.cpu_switched(0, 1);
        // This can't be without a switch, and shows that it isn't looked at.
        guest.enter(1, true);
        assert_eq!(guest.look(scan), NOBODY);
        guest.switched(1, 1);
        assert_eq!(guest.look(scan), [1]);
        assert_eq!(blocked(scan.rehearse().unwrap()), [1]);
        guest.enter(1, false);
        assert_eq!(guest.look(scan), NOBODY);
    });
}

#[test]
fn no_task_is_asked_whether_it_ran_when_no_cpu_switched() {
    with_guest(|guest, scan| {
        guest.enter(42, false);
        scan.rehearse().unwrap();
        guest.enter(1, true);
        guest.switched(1, 1);
        assert_eq!(guest.look(scan), NOBODY);
        for cpu in [0, 1] {
            guest.cpu_switched(cpu, 5);
            assert_eq!(guest.look(scan), [1]);
            guest.cpu_switched(cpu, 0);
        }
    });
}

#[test]
fn who_was_in_the_way_or_on_a_cpu_at_the_rehearsal_is_always_looked_at() {
    with_guest(|guest, scan| {
        assert_eq!(blocked(scan.rehearse().unwrap()), [42]);
        assert_eq!(guest.look(scan), [42]);
        guest.enter(42, false);
        assert_eq!(guest.look(scan), NOBODY);
        // Of the task in user mode nothing is live; of the idle one what is above its stack pointer.
        guest.enter(43, true);
        assert_eq!(guest.look(scan), NOBODY);
        let idle = guest.tasks.iter().find(|t| t.on_cpu && t.pid == 0).unwrap();
        let word = |offset| Gva(idle.stack.end.0 - offset);
        guest.poke(word(0x108), &INSIDE.to_le_bytes());
        assert_eq!(guest.look(scan), NOBODY);
        guest.poke(word(0x80), &INSIDE.to_le_bytes());
        assert_eq!(guest.look(scan), [0]);
    });
}

/// The idle task, which is on a CPU in the kernel, and a word of its stack that is live.
fn idle_inside<'g>(guest: &'g Guest<'_>) -> &'g Task {
    let mut tasks = guest.tasks.iter();
    let idle = tasks.find(|t| t.on_cpu && t.pid == 0).unwrap();
    guest.poke(Gva(idle.stack.end.0 - 0x80), &INSIDE.to_le_bytes());
    idle
}

#[test]
fn user_mode_can_not_hide_who_is_in_the_kernel_on_another_cpu() {
    with_guest(|guest, scan| {
        guest.enter(42, false);
        scan.rehearse().unwrap();
        let idle = idle_inside(guest);
        let mut vcpus = guest.world.vcpus.clone();
        let user = vcpus.iter().position(|v| v.user).unwrap();
        let look = |vcpus: &[Vcpu]| blocked(scan.look(vcpus, true, &|| false).unwrap());
        // It chose the other CPU's GS base.
        for base in [0, PERCPU[0]] {
            vcpus[user].gs_base = Gva(base);
            assert_eq!(look(&vcpus), [0], "{base:#x}");
        }
        // And a stack pointer, of which nothing is left to look at; it is in the kernel's first instruction.
        vcpus[user].user = false;
        vcpus[user].rsp = Gva(idle.stack.end.0 - 8);
        assert_eq!(look(&vcpus), [0]);
        vcpus[user].gs_base = Gva(PERCPU[1]);
        assert_eq!(look(&vcpus), [0]);
    });
    with_guest(|guest, scan| {
        // The stack of one who sleeps in the function.
        scan.rehearse().unwrap();
        let mut vcpus = guest.world.vcpus.clone();
        let vcpu = vcpus.iter_mut().find(|v| v.user).unwrap();
        (vcpu.user, vcpu.gs_base) = (false, Gva(PERCPU[1]));
        vcpu.rsp = Gva(guest.task(42).stack.end.0 - 8);
        assert_eq!(blocked(scan.look(&vcpus, true, &|| false).unwrap()), [42]);
    });
}

#[test]
fn who_was_on_a_cpu_that_went_down_is_looked_at() {
    with_guest(|guest, scan| {
        guest.enter(42, false);
        let idle = guest.tasks.iter().find(|t| t.on_cpu && t.pid == 0).unwrap();
        let on_cpu = |on: u32| {
            let at = idle.addr.plus(guest.layout.on_cpu as u64);
            guest.poke(at, &on.to_le_bytes());
        };
        // Off its CPU there was nothing in its way; it has gone on since, which counts nothing of it.
        on_cpu(0);
        assert_eq!(blocked(scan.rehearse().unwrap()), NOBODY);
        on_cpu(1);
        idle_inside(guest);
        let mut vcpus = guest.world.vcpus.clone();
        vcpus[0].online = false;
        assert_eq!(blocked(scan.look(&vcpus, true, &|| false).unwrap()), [0]);
    });
}

#[test]
fn a_guest_whose_tasks_were_listed_anew_is_not_calm() {
    with_guest(|guest, scan| {
        guest.enter(42, false);
        scan.rehearse().unwrap();
        scan.refresh().unwrap();
        guest.enter(1, true);
        guest.switched(1, 1);
        assert_eq!(guest.look(scan), [1]);
    });
}

#[test]
fn tasks_born_since_they_were_listed_are_noticed() {
    with_guest(|guest, scan| {
        scan.rehearse().unwrap();
        let births = guest.kernel.symbols.need("total_forks").unwrap();
        guest.poke(births, &78u64.to_le_bytes());
        let vcpus = &guest.world.vcpus;
        let verdict = scan.look(vcpus, true, &|| false).unwrap();
        assert_eq!(verdict, Verdict::Moved);
        scan.refresh().unwrap();
        assert_eq!(guest.look(scan), [42]);
    });
}

#[test]
fn who_was_born_since_the_tasks_were_listed_is_caught_up_with() {
    with_guest(|guest, scan| {
        let births = guest.kernel.symbols.need("total_forks").unwrap();
        let word = |at: Gva| guest.kernel.space.fresh().read_u64(at).unwrap();
        let set = |at: Gva, value: Gva| guest.poke(at, &value.0.to_le_bytes());
        // The process of 42 is the last, and 43 its last thread.
        for (n, (pid, node)) in (78u64..).zip([(42, TASKS), (43, THREAD_NODE), (42, TASKS)]) {
            let node = guest.task(pid).addr.plus(node as u64);
            let (next, before) = (Gva(word(node)), Gva(word(node.plus(8))));
            set(before, next);
            set(next.plus(8), before);
            scan.refresh().unwrap();
            assert_eq!(guest.look(scan), if pid == 42 { vec![] } else { vec![42] });
            set(before, node);
            set(next.plus(8), node);
            // Without a birth nobody is looked for.
            scan.catch_up().unwrap();
            assert_eq!(guest.look(scan), if pid == 42 { vec![] } else { vec![42] });
            guest.poke(births, &n.to_le_bytes());
            scan.catch_up().unwrap();
            assert!(!scan.moved().unwrap());
            assert_eq!(guest.look(scan), [42]);
            let tasks = format!("tasks: {}", guest.tasks.len());
            assert!(format!("{scan:?}").contains(&tasks), "{scan:?}");
        }
        // A task just leaves the list.
        let head = Gva(word(guest.task(42).addr.plus(TASKS as u64)));
        let last = Gva(word(head.plus(8)));
        let elsewhere = [0xdead_0000_0000_0122, guest.task(1).addr.0 + TASKS as u64];
        for (n, elsewhere) in (90u64..).zip(elsewhere) {
            set(head.plus(8), Gva(elsewhere));
            guest.poke(births, &n.to_le_bytes());
            scan.catch_up().unwrap_err();
            assert!(scan.moved().unwrap());
            set(head.plus(8), last);
            scan.catch_up().unwrap();
            assert!(!scan.moved().unwrap());
            assert_eq!(guest.look(scan), [42]);
        }
    });
}

/// A guest in which nobody is in the way, its switches reckoned when `meanwhile` has happened since the
/// rehearsal. Task 43 is on a CPU.
fn reckoned(meanwhile: impl Fn(&Guest<'_>), test: impl FnOnce(&Guest<'_>, &mut Prescan<'_, '_>)) {
    with_guest(|guest, scan| {
        guest.enter(42, false);
        assert_eq!(blocked(scan.rehearse().unwrap()), NOBODY);
        meanwhile(guest);
        scan.reckon(|| Ok(guest.world.vcpus.clone())).unwrap();
        test(guest, scan);
    });
}

#[test]
fn who_can_not_have_run_is_not_asked() {
    reckoned(
        |_| (),
        |guest, scan| {
            // One that ran shows it; that it isn't looked at shows that it wasn't asked.
            guest.enter(1, true);
            guest.switched(1, 1);
            guest.cpu_switched(1, 1);
            assert_eq!(guest.look(scan), [1], "nobody else ran");
            guest.switched(43, 1);
            assert_eq!(guest.look(scan), NOBODY);
            guest.cpu_switched(0, 2);
            assert_eq!(guest.look(scan), [1], "43 is not all that ran");
            guest.switched(43, 3);
            assert_eq!(guest.look(scan), NOBODY);
            guest.switched(43, 4);
            assert_eq!(guest.look(scan), [1], "43 ran more often than all together");
            guest.switched(43, 3);
            // A CPU that may be counting right now, or was interrupted in it by an NMI.
            let mut vcpus = guest.world.vcpus.clone();
            let vcpu = vcpus.iter_mut().find(|v| !v.user).unwrap();
            let schedule = guest.kernel.symbols.need("__schedule").unwrap();
            vcpu.rip = schedule.plus(5);
            assert_eq!(blocked(scan.look(&vcpus, true, &|| false).unwrap()), [1]);
            // The memory of one that died.
            let start = guest.task(43).addr.plus(guest.layout.start_time as u64);
            guest.poke(start, &5u64.to_le_bytes());
            assert_eq!(guest.look(scan), [1]);
        },
    );
}

#[test]
fn who_runs_while_switches_are_reckoned_is_asked() {
    // Before the moment, whether it is counted or not.
    for cpu in [0, 7] {
        let ran = |guest: &Guest<'_>| {
            guest.switched(1, 7);
            guest.cpu_switched(0, cpu);
        };
        reckoned(ran, |guest, scan| {
            guest.enter(1, true);
            guest.switched(43, 1);
            guest.cpu_switched(0, cpu + 1);
            assert_eq!(guest.look(scan), [1]);
            // The next time it is one of those who are asked first.
            guest.enter(1, false);
            scan.rehearse().unwrap();
            scan.reckon(|| Ok(guest.world.vcpus.clone())).unwrap();
            guest.enter(1, true);
            guest.switched(1, 8);
            guest.cpu_switched(0, cpu + 2);
            assert_eq!(guest.look(scan), [1]);
            guest.enter(1, false);
            assert_eq!(guest.look(scan), NOBODY);
            guest.enter(42, true);
            guest.switched(42, 1);
            assert_eq!(guest.look(scan), NOBODY, "42 is not asked");
        });
    }
    // At the moment.
    with_guest(|guest, scan| {
        guest.enter(42, false);
        scan.rehearse().unwrap();
        let switches = Cell::new(0);
        scan.reckon(|| {
            switches.set(switches.get() + 1);
            guest.cpu_switched(0, switches.get());
            guest.switched(43, switches.get());
            Ok(guest.world.vcpus.clone())
        })
        .unwrap();
        guest.enter(1, true);
        guest.switched(1, 1);
        guest.switched(43, switches.get() + 1);
        guest.cpu_switched(0, switches.get() + 1);
        assert_eq!(guest.look(scan), [1]);
    });
}

#[test]
fn who_ran_before_the_reckoning_only_is_looked_at_all_the_same() {
    reckoned(
        |_| (),
        |guest, scan| {
            let ran = |count| {
                guest.switched(1, count);
                guest.cpu_switched(0, count);
            };
            for count in [7, 8] {
                ran(count);
                assert_eq!(blocked(scan.rehearse().unwrap()), NOBODY);
            }
            ran(9);
            guest.enter(1, true);
            scan.reckon(|| Ok(guest.world.vcpus.clone())).unwrap();
            guest.switched(43, 1);
            guest.cpu_switched(0, 10);
            // One that ran shows it: that it isn't found shows that it wasn't asked.
            guest.enter(42, true);
            guest.switched(42, 1);
            assert_eq!(guest.look(scan), [1]);
        },
    );
}

#[test]
fn who_ran_until_the_reckoning_is_scanned_before_the_pause() {
    // Task 1 is one of the ledger, 42 is not. `runs` enters the function while they are reckoned for the second time.
    let reckoned = |runs: Option<u32>, test: &dyn Fn(&Guest<'_>, &Prescan<'_, '_>)| {
        with_guest(|guest, scan| {
            guest.enter(42, false);
            for count in [7, 8] {
                guest.switched(1, count);
                guest.cpu_switched(0, count);
                assert_eq!(blocked(scan.rehearse().unwrap()), NOBODY);
            }
            guest.switched(1, 9);
            guest.cpu_switched(0, 9);
            let asked = Cell::new(0);
            scan.reckon(|| {
                asked.set(asked.get() + 1);
                if let Some(pid) = runs.filter(|_| asked.get() == 2) {
                    guest.enter(pid, true);
                    guest.switched(pid, 10);
                    guest.cpu_switched(0, if pid == 1 { 10 } else { 19 });
                }
                Ok(guest.world.vcpus.clone())
            })
            .unwrap();
            assert!(asked.get() >= 2);
            test(guest, scan);
        });
    };
    reckoned(None, &|guest, scan| {
        // That it is not found shows that it wasn't looked at.
        guest.enter(1, true);
        guest.switched(43, 1);
        guest.cpu_switched(0, 10);
        assert_eq!(guest.look(scan), NOBODY);
    });
    reckoned(Some(1), &|guest, scan| assert_eq!(guest.look(scan), [1]));
    reckoned(Some(42), &|guest, scan| {
        assert_eq!(guest.look(scan), [42]);
        // Nor are all that ran since taken for those that ran at the second reckoning.
        guest.switched(1, 10);
        guest.cpu_switched(0, 20);
        assert_eq!(guest.look(scan), [42]);
    });
}

#[test]
fn who_was_born_after_the_reckoning_is_asked_too() {
    with_guest(|guest, scan| {
        let births = guest.kernel.symbols.need("total_forks").unwrap();
        let word = |at: Gva| guest.kernel.space.fresh().read_u64(at).unwrap();
        let set = |at: Gva, value: Gva| guest.poke(at, &value.0.to_le_bytes());
        let node = guest.task(42).addr.plus(TASKS as u64);
        let (next, before) = (Gva(word(node)), Gva(word(node.plus(8))));
        set(before, next);
        set(next.plus(8), before);
        scan.refresh().unwrap();
        assert_eq!(blocked(scan.rehearse().unwrap()), NOBODY);
        scan.reckon(|| Ok(guest.world.vcpus.clone())).unwrap();
        set(before, node);
        set(next.plus(8), node);
        guest.poke(births, &78u64.to_le_bytes());
        scan.catch_up().unwrap();
        guest.switched(42, 3);
        guest.cpu_switched(1, 3);
        guest.enter(1, true);
        guest.switched(1, 1);
        assert_eq!(guest.look(scan), [42]);
    });
}

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
    let words: Vec<u64> = (0xff0..0x2030).chain([0, u64::MAX]).collect();
    let stack: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
    let offsets = |found: &mut dyn Iterator<Item = (&Watched, u64)>| {
        found
            .map(|(w, offset)| (w.name.clone(), offset))
            .collect::<Vec<_>>()
    };
    let one_by_one = offsets(&mut words.iter().filter_map(|&w| watch.hit(w)));
    assert_eq!(offsets(&mut watch.hits(&stack)), one_by_one);
    assert_eq!(one_by_one.len(), 32);
    assert_eq!(Watch::default().hits(&stack).count(), 0);
    assert!(Watch::default().hit(5).is_none());
    // One within another.
    let watch = Watch::of(vec![
        watched(0x1010, 0x10, "b"),
        watched(0x1010, 0x10, "twin"),
        watched(0x1010, 0x20, "c"),
        watched(0x1000, 0x100, "a"),
    ]);
    let name = |word| watch.hit(word).map(|(w, offset)| (w.name.clone(), offset));
    assert_eq!(name(0x1018), Some(("b".into(), 8)));
    assert_eq!(name(0x1028), Some(("c".into(), 0x18)));
    assert_eq!(name(0x1080), Some(("a".into(), 0x80)));
    assert_eq!(name(0x1101), None);
}

#[test]
fn a_return_address_that_is_a_trampoline_s_first_byte_is_a_hit() {
    let watch = Watch::of(vec![trampoline(Gva(0x1000), 0x20, "return_to_handler")]);
    assert!(watch.hit(0xfff).is_none());
    assert!(watch.hit(0x1000).is_some());
    assert!(watch.hit(0x1020).is_some());
    assert!(watch.hit(0x1021).is_none());
}

#[test]
fn one_past_the_end_is_a_hit_only_behind_a_call() {
    let world = World::new(GuestType::Pvh);
    let kernel = Kernel::read(&world.memory, world.kind, &world.vcpus).unwrap();
    let range = Range::new(PATCHED, 0x10);
    let frame = kernel.space.walk(PATCHED).unwrap().frame;
    let watch = || {
        Watch::new(
            &kernel,
            vec![Watched {
                range,
                name: "patched".into(),
            }],
        )
    };
    assert!(watch().hit(range.end.0 - 1).is_some());
    assert!(watch().hit(range.end.0).is_none());
    let call = [0xe8, 1, 2, 3, 4];
    world
        .memory
        .fill(frame, PATCHED.offset() + 0x10 - call.len(), &call);
    assert!(watch().hit(range.end.0).is_some());
    assert!(watch().hit(range.end.0 + 1).is_none());
}

#[test]
fn a_stale_word_is_no_alarm_where_the_walk_of_the_stack_can_be_relied_on() {
    with_guest(|guest, scan| {
        guest.enter(42, false);
        // Between two frames of a task whose stack a walk understands.
        let task = guest.task(1);
        let word = |offset| Gva(task.stack.end.0 - offset);
        let space = guest.kernel.space.fresh();
        let is_free = |&offset: &u64| space.read_u64(word(offset)).unwrap() == 0;
        let free = (0xb0..0x1f0u64).step_by(8).filter(is_free);
        let stale = free.filter(|&offset| word(offset) > task.sp).min().unwrap();
        guest.poke(word(stale), &INSIDE.to_le_bytes());
        assert_eq!(blocked(scan.rehearse().unwrap()), [1]);
        assert_eq!(guest.look(scan), [1]);
        scan.acquit().unwrap();
        assert_eq!(blocked(scan.rehearse().unwrap()), NOBODY);
        assert_eq!(guest.look(scan), NOBODY);
        // It ran: in the pause nobody is acquitted.
        guest.switched(1, 1);
        guest.cpu_switched(0, 1);
        assert_eq!(guest.look(scan), [1]);
    });
}

#[test]
fn in_a_saved_guest_too_a_stale_word_is_no_alarm() {
    with_guest(|guest, _| {
        guest.enter(42, false);
        let task = guest.task(1);
        let word = |offset| Gva(task.stack.end.0 - offset);
        let space = guest.kernel.space.fresh();
        let is_free = |&offset: &u64| space.read_u64(word(offset)).unwrap() == 0;
        let free = (0xb0..0x1f0u64).step_by(8).filter(is_free);
        let stale = free.filter(|&offset| word(offset) > task.sp).min().unwrap();
        guest.poke(word(stale), &INSIDE.to_le_bytes());
        let watch = Watch::of(vec![Watched {
            range: Range::new(PATCHED, 0x10),
            name: "patched".into(),
        }]);
        let found = inside(guest.kernel, &guest.world.vcpus, &watch).unwrap();
        assert_eq!(found, []);
    });
}

#[test]
fn who_can_not_be_acquitted_stays_in_the_way() {
    with_guest(|_, scan| {
        for _ in 0..3 {
            assert_eq!(blocked(scan.rehearse().unwrap()), [42]);
            scan.acquit().unwrap();
        }
    });
}

#[test]
fn a_cpu_s_own_stacks_are_followed_to_its_task_s() {
    const NMI: u64 = 0xffff_fe00_0000_1000;
    const IRQ: u64 = 0xffff_c900_0000_4000;
    with_guest(|guest, scan| {
        guest.enter(42, false);
        let idle = guest.tasks.iter().find(|t| t.on_cpu && t.pid == 0).unwrap();
        let word = |offset| Gva(idle.stack.end.0 - offset);
        let at = |start: u64, offset: u64, value: u64| (start + offset, value);
        // An NMI met an interrupt, which had met the idle task: its stack pointers, and words that are
        // not live.
        let look = |scan: &mut Prescan<'_, '_>, words: &[(u64, u64)]| {
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
            for cpu in &mut scan.cpus {
                cpu.stacks = vec![stack(IRQ), stack(NMI)];
            }
            blocked(scan.look(&vcpus, true, &|| false).unwrap())
        };
        let met = [at(NMI, 0xf00, IRQ + 0xc00), at(IRQ, 0xf00, word(0x100).0)];
        let with = |more: &[(u64, u64)]| [&met[..], more].concat();
        assert_eq!(look(scan, &met), NOBODY);
        for (live, (start, offset)) in [
            (true, (NMI, 0x900)),
            (false, (NMI, 0x7f8)),
            (true, (IRQ, 0xc08)),
            (false, (IRQ, 0xb00)),
        ] {
            let found = look(scan, &with(&[at(start, offset, INSIDE)]));
            assert_eq!(found == [0], live, "{start:#x}+{offset:#x}: {found:?}");
        }
        guest.poke(word(0x108), &INSIDE.to_le_bytes());
        assert_eq!(look(scan, &met), NOBODY);
        guest.poke(word(0x80), &INSIDE.to_le_bytes());
        assert_eq!(look(scan, &met), [0]);
    });
}

#[test]
fn who_is_to_go_on_in_a_function_with_a_system_call_is_in_the_way() {
    with_guest(|guest, scan| {
        guest.enter(42, false);
        let task = guest.task(42);
        // Stopped by a signal: the function, and what the call has returned.
        guest.poke(task.addr.plus(RESTART as u64), &PATCHED.0.to_le_bytes());
        assert_eq!(blocked(scan.rehearse().unwrap()), NOBODY);
        let result = task.stack.end.0 - scan.restart.result as u64;
        guest.poke(Gva(result), &(-516i64).to_le_bytes());
        guest.switched(42, 1);
        let Verdict::Blocked(found) = scan.rehearse().unwrap() else {
            panic!("nobody is in the way");
        };
        assert_eq!((found[0].pid, found[0].reason), (42, Reason::RestartBlock));
        assert!(Verdict::Blocked(found).is_sleepers());
        scan.acquit().unwrap();
        assert_eq!(blocked(scan.rehearse().unwrap()), [42]);
        // Of another function, or with nothing to go on with.
        guest.poke(
            task.addr.plus(RESTART as u64),
            &(PATCHED.0 + 0x10).to_le_bytes(),
        );
        assert_eq!(blocked(scan.rehearse().unwrap()), NOBODY);
        guest.poke(task.addr.plus(RESTART as u64), &PATCHED.0.to_le_bytes());
        guest.poke(Gva(result), &(-4i64).to_le_bytes());
        guest.switched(42, 2);
        assert_eq!(blocked(scan.rehearse().unwrap()), NOBODY);
        // On its way back from user mode.
        let mut vcpus = guest.world.vcpus.clone();
        let vcpu = vcpus.iter_mut().find(|v| v.user).unwrap();
        let running = guest.tasks.iter().find(|t| t.on_cpu && t.pid != 0).unwrap();
        guest.poke(running.addr.plus(RESTART as u64), &PATCHED.0.to_le_bytes());
        assert_eq!(guest.look(scan), NOBODY);
        vcpu.rax = 219;
        let found = scan.look(&vcpus, true, &|| false).unwrap();
        assert_eq!(blocked(found), [running.pid]);
    });
}
