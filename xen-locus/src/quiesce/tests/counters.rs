//! Which tasks are asked after the counters were read at one moment.

use locus_kernel::fixture_world::TASKS;

use super::*;

/// A guest in which no thread is in the way, its counters read when `meanwhile` has happened since the
/// scan. Task 43 is on a CPU.
fn counted(meanwhile: impl Fn(&Guest<'_>), test: impl FnOnce(&Guest<'_>, &mut Steps<'_, '_, '_>)) {
    with_guest(|guest, steps| {
        guest.enter(42, false);
        assert_eq!(blocked(steps.scan_off_cpu().unwrap()), NOBODY);
        meanwhile(guest);
        steps.snapshot_counters().unwrap();
        test(guest, steps);
    });
}

#[test]
fn a_task_that_can_not_have_run_is_not_asked() {
    counted(
        |_| (),
        |guest, steps| {
            // A task that ran shows it if it is asked. That it isn't scanned shows that it wasn't asked.
            guest.enter(1, true);
            guest.switched(1, 1);
            guest.cpu_switched(1, 1);
            assert_eq!(guest.look(steps), [1], "no other task ran");
            guest.switched(43, 1);
            assert_eq!(guest.look(steps), NOBODY);
            guest.cpu_switched(0, 2);
            assert_eq!(guest.look(steps), [1], "43 is not all that ran");
            guest.switched(43, 3);
            assert_eq!(guest.look(steps), NOBODY);
            guest.switched(43, 4);
            assert_eq!(
                guest.look(steps),
                [1],
                "43 ran more often than all together"
            );
            guest.switched(43, 3);
            // A CPU that may be counting right now.
            guest.holds(1, true);
            assert_eq!(guest.look(steps), [1]);
            guest.holds(1, false);
            assert_eq!(guest.look(steps), NOBODY);
            // The memory of a task that died.
            let start = guest.task(43).addr.plus(guest.layout.start_time as u64);
            guest.poke(start, &5u64.to_le_bytes());
            assert_eq!(guest.look(steps), [1]);
        },
    );
}

#[test]
fn a_task_that_runs_while_counters_are_read_is_asked() {
    // Before the moment, whether it is counted or not.
    for cpu in [0, 7] {
        let ran = |guest: &Guest<'_>| {
            guest.switched(1, 7);
            guest.cpu_switched(0, cpu);
        };
        counted(ran, |guest, steps| {
            guest.enter(1, true);
            guest.switched(43, 1);
            guest.cpu_switched(0, cpu + 1);
            assert_eq!(guest.look(steps), [1]);
            // The next time it is one of those that are asked first.
            guest.enter(1, false);
            steps.scan_off_cpu().unwrap();
            steps.snapshot_counters().unwrap();
            guest.enter(1, true);
            guest.switched(1, 8);
            guest.cpu_switched(0, cpu + 2);
            assert_eq!(guest.look(steps), [1]);
            guest.enter(1, false);
            assert_eq!(guest.look(steps), NOBODY);
            guest.enter(42, true);
            guest.switched(42, 1);
            assert_eq!(guest.look(steps), NOBODY, "42 is not asked");
        });
    }
    // At the moment.
    with_guest(|guest, steps| {
        guest.enter(42, false);
        steps.scan_off_cpu().unwrap();
        let both = |n: u64| vec![(guest.switches_of_cpu(0), n), (guest.switches_of(43), n)];
        guest.while_counters_are_read((1..100).map(both).collect());
        steps.snapshot_counters().unwrap();
        let switches = u64::from(guest.events.asked.get());
        assert!(switches > 1);
        guest.enter(1, true);
        guest.switched(1, 1);
        guest.switched(43, switches + 1);
        guest.cpu_switched(0, switches + 1);
        assert_eq!(guest.look(steps), [1]);
    });
}

#[test]
fn a_switch_that_is_counted_by_half_hides_no_other_task() {
    // What a CPU does between the two counts is not seen by its registers.
    for half in [true, false] {
        with_guest(|guest, steps| {
            guest.enter(42, false);
            steps.scan_off_cpu().unwrap();
            // The second CPU switches from 43 to another task, and has counted that for itself.
            guest.cpu_switched(1, 1);
            guest.holds(1, half);
            steps.snapshot_counters().unwrap();
            // It counts that for 43. Task 1 ran on the first CPU, and sleeps in the function.
            guest.holds(1, false);
            guest.switched(43, 1);
            guest.cpu_switched(0, 1);
            guest.switched(1, 1);
            guest.enter(1, true);
            // Without the lock nothing speaks against 43.
            assert_eq!(guest.look(steps) == [1], half, "{half}");
        });
    }
}

#[test]
fn a_task_that_ran_before_the_snapshot_only_is_scanned_all_the_same() {
    counted(
        |_| (),
        |guest, steps| {
            let ran = |count| {
                guest.switched(1, count);
                guest.cpu_switched(0, count);
            };
            for count in [7, 8] {
                ran(count);
                assert_eq!(blocked(steps.scan_off_cpu().unwrap()), NOBODY);
            }
            ran(9);
            guest.enter(1, true);
            steps.snapshot_counters().unwrap();
            guest.switched(43, 1);
            guest.cpu_switched(0, 10);
            // A task that ran shows it if it is asked. That it isn't found shows that it wasn't asked.
            guest.enter(42, true);
            guest.switched(42, 1);
            assert_eq!(guest.look(steps), [1]);
        },
    );
}

#[test]
fn a_task_that_ran_until_the_snapshot_is_scanned_before_the_pause() {
    // Task 1 ran recently, 42 did not. The task `runs` enters the function while the counters are read for the second
    // time.
    let counted = |runs: Option<u32>, test: &dyn Fn(&Guest<'_>, &Steps<'_, '_, '_>)| {
        with_guest(|guest, steps| {
            guest.enter(42, false);
            for count in [7, 8] {
                guest.switched(1, count);
                guest.cpu_switched(0, count);
                assert_eq!(blocked(steps.scan_off_cpu().unwrap()), NOBODY);
            }
            guest.switched(1, 9);
            guest.cpu_switched(0, 9);
            let enters = |pid| {
                let cpu = if pid == 1 { 10 } else { 19 };
                vec![
                    (guest.frame_of(pid), INSIDE),
                    (guest.switches_of(pid), 10),
                    (guest.switches_of_cpu(0), cpu),
                ]
            };
            let at_second = runs.map(enters).unwrap_or_default();
            guest.while_counters_are_read(vec![Vec::new(), at_second]);
            steps.snapshot_counters().unwrap();
            assert!(guest.events.asked.get() >= 2);
            test(guest, steps);
        });
    };
    counted(None, &|guest, steps| {
        // That it is not found shows that it wasn't scanned.
        guest.enter(1, true);
        guest.switched(43, 1);
        guest.cpu_switched(0, 10);
        assert_eq!(guest.look(steps), NOBODY);
    });
    counted(Some(1), &|guest, steps| assert_eq!(guest.look(steps), [1]));
    counted(Some(42), &|guest, steps| {
        assert_eq!(guest.look(steps), [42]);
        // Nor are all switches since then taken for those from before the second reading.
        guest.switched(1, 10);
        guest.cpu_switched(0, 20);
        assert_eq!(guest.look(steps), [42]);
    });
}

#[test]
fn a_task_born_after_the_snapshot_is_asked_too() {
    with_guest(|guest, steps| {
        let births = guest.kernel.symbols.need("total_forks").unwrap();
        let word = |at: Gva| guest.kernel.space.fresh().read_u64(at).unwrap();
        let set = |at: Gva, value: Gva| guest.poke(at, &value.0.to_le_bytes());
        let node = guest.task(42).addr.plus(TASKS as u64);
        let (next, before) = (Gva(word(node)), Gva(word(node.plus(8))));
        set(before, next);
        set(next.plus(8), before);
        steps.list().unwrap();
        assert_eq!(blocked(steps.scan_off_cpu().unwrap()), NOBODY);
        steps.snapshot_counters().unwrap();
        set(before, node);
        set(next.plus(8), node);
        guest.poke(births, &78u64.to_le_bytes());
        steps.catch_up().unwrap();
        guest.switched(42, 3);
        guest.cpu_switched(1, 3);
        guest.enter(1, true);
        guest.switched(1, 1);
        assert_eq!(guest.look(steps), [42]);
    });
}

#[test]
fn what_ran_on_a_cpu_without_a_counter_is_asked() {
    with_guest(|guest, steps| {
        guest.enter(42, false);
        guest.world.unmap(Gva(PERCPU[1]).plus(0x1000));
        let space = guest.kernel.space.fresh();
        steps.tasks.cpus.list(guest.kernel, &space).unwrap();
        assert_eq!(blocked(steps.scan_off_cpu().unwrap()), NOBODY);
        // It ran there, and no other CPU switched.
        guest.enter(1, true);
        guest.switched(1, 1);
        assert_eq!(guest.look(steps), [1]);
    });
}

#[test]
fn a_cpu_whose_memory_can_not_be_mapped_is_no_cpu_without_memory() {
    with_guest(|guest, steps| {
        let area = Gva(PERCPU[1]).plus(0x1000);
        let frame = guest.kernel.space.walk(area).unwrap().frame;
        guest.world.memory.take(frame);
        let space = guest.kernel.space.fresh();
        let error = steps.tasks.cpus.list(guest.kernel, &space).unwrap_err();
        assert!(error.to_string().contains("cannot be mapped"), "{error}");
        // Nor has it no idle task.
        let layout = TaskLayout::of(guest.kernel).unwrap();
        layout.all(guest.kernel, &space).unwrap_err();
    });
}
