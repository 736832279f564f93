//! What unwinding clears of a false alarm.

use super::*;

/// Puts a stale word between two frames of task 1, whose stack can be unwound.
fn put_stale_word(guest: &Guest<'_>) {
    let task = guest.task(1);
    let word = |offset| Gva(task.stack.end.0 - offset);
    let space = guest.kernel.space.fresh();
    let is_free = |&offset: &u64| space.read_u64(word(offset)).unwrap() == 0;
    let free = (0xb0..0x1f0u64).step_by(8).filter(is_free);
    let stale = free.filter(|&offset| word(offset) > task.sp).min().unwrap();
    guest.poke(word(stale), &INSIDE.to_le_bytes());
}

#[test]
fn a_stale_word_is_no_alarm_if_the_unwinding_is_reliable() {
    with_guest(|guest, steps| {
        guest.enter(42, false);
        put_stale_word(guest);
        assert_eq!(blocked(steps.scan_off_cpu().unwrap()), [1]);
        assert_eq!(guest.look(steps), [1]);
        steps.clear_by_unwind().unwrap();
        assert_eq!(blocked(steps.scan_off_cpu().unwrap()), NOBODY);
        assert_eq!(guest.look(steps), NOBODY);
        // It ran: in the pause no stack is unwound.
        guest.switched(1, 1);
        guest.cpu_switched(0, 1);
        assert_eq!(guest.look(steps), [1]);
    });
}

#[test]
fn in_a_saved_guest_too_a_stale_word_is_no_alarm() {
    with_guest(|guest, _| {
        guest.enter(42, false);
        put_stale_word(guest);
        let found = inside(guest.kernel, &guest.world.vcpus, &watch()).unwrap();
        assert_eq!(found, []);
    });
}

#[test]
fn a_task_that_unwinding_does_not_clear_stays_in_the_way() {
    with_guest(|_, steps| {
        for _ in 0..3 {
            assert_eq!(blocked(steps.scan_off_cpu().unwrap()), [42]);
            steps.clear_by_unwind().unwrap();
        }
    });
}
