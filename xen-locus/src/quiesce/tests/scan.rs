//! What a look scans again after a scan.

use super::*;

#[test]
fn a_task_that_did_not_run_since_it_was_found_clear_is_not_scanned_again() {
    with_guest(|guest, steps| {
        guest.enter(42, false);
        assert_eq!(blocked(steps.scan_off_cpu().unwrap()), NOBODY);
        guest.cpu_switched(0, 1);
        // This can't happen without a switch. It shows that the task isn't scanned.
        guest.enter(1, true);
        assert_eq!(guest.look(steps), NOBODY);
        guest.switched(1, 1);
        assert_eq!(guest.look(steps), [1]);
        assert_eq!(blocked(steps.scan_off_cpu().unwrap()), [1]);
        guest.enter(1, false);
        assert_eq!(guest.look(steps), NOBODY);
    });
}

#[test]
fn no_task_is_asked_whether_it_ran_when_no_cpu_switched() {
    with_guest(|guest, steps| {
        guest.enter(42, false);
        steps.scan_off_cpu().unwrap();
        guest.enter(1, true);
        guest.switched(1, 1);
        assert_eq!(guest.look(steps), NOBODY);
        for cpu in [0, 1] {
            guest.cpu_switched(cpu, 5);
            assert_eq!(guest.look(steps), [1]);
            guest.cpu_switched(cpu, 0);
        }
    });
}

#[test]
fn a_task_that_was_in_the_way_or_on_a_cpu_at_the_scan_is_always_scanned_again() {
    with_guest(|guest, steps| {
        assert_eq!(blocked(steps.scan_off_cpu().unwrap()), [42]);
        assert_eq!(guest.look(steps), [42]);
        guest.enter(42, false);
        assert_eq!(guest.look(steps), NOBODY);
        // Of the task in user mode nothing is live; of the idle one what is above its stack pointer.
        guest.enter(43, true);
        assert_eq!(guest.look(steps), NOBODY);
        let idle = guest.tasks.iter().find(|t| t.on_cpu && t.pid == 0).unwrap();
        let word = |offset| Gva(idle.stack.end.0 - offset);
        guest.poke(word(0x108), &INSIDE.to_le_bytes());
        assert_eq!(guest.look(steps), NOBODY);
        guest.poke(word(0x80), &INSIDE.to_le_bytes());
        assert_eq!(guest.look(steps), [0]);
    });
}
