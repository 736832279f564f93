//! Guests that keep their workers for long, beside guests that do not.

use super::*;

/// Guests that keep no worker for long.
const CALM: u32 = 40;
/// Requests for each guest.
const REQUESTS: u32 = 5;
/// Turns of a little more than a second: after them a guest that keeps its worker for so long is known for that.
const SECOND: u32 = 11;

/// Submits the requests for one guest, whose workers take so many turns more than one.
fn submit(daemon: &mut Daemon<'_, Host>, guest: &str, takes: u32, now: Instant) {
    let host = daemon.hands;
    for n in 0..REQUESTS {
        let id = format!("{guest}-{n}");
        host.takes.borrow_mut().insert(id.clone(), takes);
        host.submit(&id, guest);
        daemon.is_submitted(&id, now);
    }
}

/// The median of the turns in which the requests for the calm guests are answered, beside so many stubborn ones. They are
/// submitted all at once, a second after those for the stubborn ones.
fn median(stubborn: u32) -> u32 {
    let _xenstored = Xenstored::start();
    let host = Host::with(u16::try_from(CALM + stubborn).unwrap());
    let now = Instant::now();
    let mut daemon = Daemon::new(&host, now);
    let now = turn(&mut daemon, now, 5);
    for guest in 0..stubborn {
        let takes = 40 + 20 * guest;
        submit(&mut daemon, &format!("stubborn-{guest}"), takes, now);
    }
    let mut now = turn(&mut daemon, now, SECOND);
    for guest in 0..CALM {
        submit(&mut daemon, &format!("calm-{guest}"), guest % 3, now);
    }
    let all = ((CALM + stubborn) * REQUESTS) as usize;
    let mut waits = Vec::new();
    for turns in 1..=1000 {
        let before = host.order.borrow().len();
        now = turn(&mut daemon, now, 1);
        let answered = host.order.borrow();
        let new = answered[before..].iter();
        waits.extend(new.filter(|id| id.starts_with("calm")).map(|_| turns));
        if answered.len() == all {
            break;
        }
    }
    let order = host.order.borrow();
    assert_eq!(host.requests_done(), vec![1; all]);
    for id in order.iter() {
        let rc = host.store.read(&format!("{ROOT}/request/{id}/rc")).unwrap();
        assert_eq!(rc.as_deref(), Some("0"), "{id}");
    }
    // They were stubborn until the last of the others was answered.
    let last = order.last().is_some_and(|id| id.starts_with("stubborn"));
    assert_eq!(last, stubborn > 0);
    waits[waits.len() / 2]
}

#[test]
fn calm_guests_are_answered_as_soon_beside_stubborn_ones_as_without_them() {
    let alone = median(0);
    for stubborn in [1, 3] {
        let beside = median(stubborn);
        assert!(alone.abs_diff(beside) <= 1, "{alone} {beside}");
    }
}
