//! Tasks that are born after the list was read.

use locus_kernel::fixture_world::{TASKS, THREAD_NODE};

use super::*;

#[test]
fn after_a_new_list_all_tasks_are_asked() {
    with_guest(|guest, steps| {
        guest.enter(42, false);
        steps.scan_off_cpu().unwrap();
        steps.list().unwrap();
        guest.enter(1, true);
        guest.switched(1, 1);
        assert_eq!(guest.look(steps), [1]);
    });
}

#[test]
fn tasks_born_since_they_were_listed_are_noticed() {
    with_guest(|guest, steps| {
        steps.scan_off_cpu().unwrap();
        let births = guest.kernel.symbols.need("total_forks").unwrap();
        guest.poke(births, &78u64.to_le_bytes());
        let vcpus = &guest.world.vcpus;
        let verdict = steps.look(vcpus, true, &|| false).unwrap();
        assert_eq!(verdict, Verdict::TasksChanged);
        steps.list().unwrap();
        assert_eq!(guest.look(steps), [42]);
    });
}

#[test]
fn catching_up_finds_tasks_born_since_the_list() {
    with_guest(|guest, steps| {
        let births = guest.kernel.symbols.need("total_forks").unwrap();
        let word = |at: Gva| guest.kernel.space.fresh().read_u64(at).unwrap();
        let set = |at: Gva, value: Gva| guest.poke(at, &value.0.to_le_bytes());
        // The process of 42 is the last, and 43 its last thread.
        for (n, (pid, node)) in (78u64..).zip([(42, TASKS), (43, THREAD_NODE), (42, TASKS)]) {
            let node = guest.task(pid).addr.plus(node as u64);
            let (next, before) = (Gva(word(node)), Gva(word(node.plus(8))));
            set(before, next);
            set(next.plus(8), before);
            steps.list().unwrap();
            assert_eq!(guest.look(steps), if pid == 42 { vec![] } else { vec![42] });
            set(before, node);
            set(next.plus(8), node);
            // Without a birth no new task is searched.
            steps.catch_up().unwrap();
            assert_eq!(guest.look(steps), if pid == 42 { vec![] } else { vec![42] });
            guest.poke(births, &n.to_le_bytes());
            steps.catch_up().unwrap();
            assert!(!steps.tasks.changed().unwrap());
            assert_eq!(guest.look(steps), [42]);
            let tasks = format!("tasks: {}", guest.tasks.len());
            assert!(
                format!("{:?}", steps.tasks).contains(&tasks),
                "{:?}",
                steps.tasks
            );
        }
        // A task just leaves the list.
        let head = Gva(word(guest.task(42).addr.plus(TASKS as u64)));
        let last = Gva(word(head.plus(8)));
        let elsewhere = [0xdead_0000_0000_0122, guest.task(1).addr.0 + TASKS as u64];
        for (n, elsewhere) in (90u64..).zip(elsewhere) {
            set(head.plus(8), Gva(elsewhere));
            guest.poke(births, &n.to_le_bytes());
            steps.catch_up().unwrap_err();
            assert!(steps.tasks.changed().unwrap());
            set(head.plus(8), last);
            steps.catch_up().unwrap();
            assert!(!steps.tasks.changed().unwrap());
            assert_eq!(guest.look(steps), [42]);
        }
    });
}
