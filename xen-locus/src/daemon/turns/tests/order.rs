//! The order in which requests for one guest are carried out.

use super::*;

#[test]
fn requests_for_one_guest_keep_their_order_unless_one_waits_for_a_module() {
    for (end, order) in [
        (died(), ["apply", "revert", "other"]),
        (End::Later, ["apply", "revert", "other"]),
        (End::Waits, ["revert", "other", "apply"]),
    ] {
        let _xenstored = Xenstored::start();
        let host = Host::with(0);
        let now = Instant::now();
        let mut daemon = Daemon::new(&host, now);
        let now = turn(&mut daemon, now, 3);
        *host.ends.borrow_mut() = vec![(request("apply"), end.clone()); 2];
        for id in ["apply", "revert", "other"] {
            host.submit(id, "web");
            daemon.is_submitted(id, now);
        }
        host.submit("another", "db");
        daemon.is_submitted("another", now);
        turn(&mut daemon, now, 60);
        let done = host.order.borrow();
        // Another guest does not wait.
        assert!(done[..2].contains(&"another".into()), "{end:?} {done:?}");
        let own = done.iter().filter(|id| *id != "another");
        assert_eq!(own.collect::<Vec<_>>(), order, "{end:?}");
    }
}

#[test]
fn a_daemon_that_starts_goes_on_with_what_was_begun() {
    let _xenstored = Xenstored::start();
    let host = Host::with(0);
    for id in ["a", "b", "c", "d"] {
        host.submit(id, "web");
    }
    for (id, entry, state) in [("d", "7", "queued"), ("c", "9", "running")] {
        let put = |name, value| {
            let node = format!("{ROOT}/request/{id}/{name}");
            host.store.write(&node, value).unwrap();
        };
        put("entry", entry);
        put("state", state);
    }
    let now = Instant::now();
    let mut daemon = Daemon::new(&host, now);
    turn(&mut daemon, now, 20);
    assert_eq!(*host.order.borrow(), ["d", "c", "a", "b"]);
}

#[test]
fn a_request_that_is_put_off_and_removed_holds_up_no_other_and_a_new_one_comes_last() {
    for is_made_again in [false, true] {
        let _xenstored = Xenstored::start();
        let host = Host::with(0);
        let now = Instant::now();
        let mut daemon = Daemon::new(&host, now);
        let now = turn(&mut daemon, now, 3);
        *host.ends.borrow_mut() = vec![(request("a"), End::Later)];
        for id in ["a", "b"] {
            host.submit(id, "web");
            daemon.is_submitted(id, now);
        }
        let now = turn(&mut daemon, now, 3);
        host.store.remove(&format!("{ROOT}/request/a")).unwrap();
        if is_made_again {
            host.submit("a", "web");
            daemon.is_submitted("a", now);
        }
        turn(&mut daemon, now, 20);
        let order = &["b", "a"][..1 + usize::from(is_made_again)];
        assert_eq!(*host.order.borrow(), order);
    }
}
