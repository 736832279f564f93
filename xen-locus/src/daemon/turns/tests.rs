//! The daemon on a xenstored that speaks the real protocol; workers end at once, or after some turns.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::time::Duration;

use locus_guest::addr::DomId;

use super::*;
use crate::daemon::publisher::tests::domain;
use crate::daemon::publisher::Mark;
use crate::daemon::request::Nodes as RequestNodes;
use crate::storage::fake_xenstored::Xenstored;
use crate::storage::xenstore::Store;

mod order;
mod stubborn;

struct Host {
    store: Store,
    domains: RefCell<Vec<DomainInfo>>,
    /// How often each piece of work was done.
    done: RefCell<HashMap<Work, u32>>,
    /// Workers do not end.
    stays: Cell<bool>,
    /// How many turns more than one the workers for these requests take.
    takes: RefCell<HashMap<String, u32>>,
    /// Workers that publish a guest die.
    die: Cell<bool>,
    /// How the next workers for a request, or for what was interrupted, end.
    ends: RefCell<Vec<(Work, End)>>,
    /// Requests in the order in which they were carried out.
    order: RefCell<Vec<String>>,
    asked_to_end: Cell<u32>,
    /// How many guests were left when what others had was removed.
    swept: Cell<usize>,
    is_stopping: Cell<bool>,
    /// xenstored does not tell of what is written.
    is_deaf: Cell<bool>,
    /// How often requests were watched anew.
    watches: Cell<u32>,
    /// Guests whose status may not be true, until it is published.
    unpublished: RefCell<Vec<String>>,
    said: RefCell<Vec<String>>,
}

impl Host {
    fn with(guests: u16) -> Host {
        let host = Host {
            store: Store::open().unwrap(),
            domains: RefCell::new((1..=guests).map(domain).collect()),
            done: RefCell::default(),
            stays: Cell::new(false),
            takes: RefCell::default(),
            die: Cell::new(false),
            ends: RefCell::default(),
            order: RefCell::default(),
            asked_to_end: Cell::new(0),
            swept: Cell::new(0),
            is_stopping: Cell::new(false),
            is_deaf: Cell::new(false),
            watches: Cell::new(0),
            unpublished: RefCell::default(),
            said: RefCell::default(),
        };
        host.make_domains();
        host
    }

    /// What the toolstack writes.
    fn make_domains(&self) {
        for info in self.domains.borrow().iter() {
            let node = format!("/local/domain/{}/name", info.id);
            self.store.write(&node, "guest").unwrap();
        }
    }

    fn submit(&self, id: &str, guest: &str) {
        for (name, value) in [("op", "apply"), ("domain", guest), ("submit", "1")] {
            let node = format!("{ROOT}/request/{id}/{name}");
            self.store.write(&node, value).unwrap();
        }
    }

    fn requests_done(&self) -> Vec<u32> {
        let done = self.done.borrow();
        let requests = done
            .iter()
            .filter(|(work, _)| matches!(work, Work::Request(_)));
        requests.map(|(_, times)| *times).collect()
    }
}

impl Hands for Host {
    /// Its work, and how many turns it goes on after the next one.
    type Worker = (Work, u32);

    fn store(&self) -> &dyn Nodes {
        &self.store
    }

    fn connections(&self) -> u32 {
        self.store.connections()
    }

    fn domains(&self) -> Result<Vec<DomainInfo>> {
        Ok(self.domains.borrow().clone())
    }

    fn start(&self, work: &Work) -> std::io::Result<(Work, u32)> {
        let takes = match work {
            Work::Request(id) => self.takes.borrow().get(id).copied(),
            _ => None,
        };
        Ok((work.clone(), takes.unwrap_or(0)))
    }

    fn end(&self, (work, left): &mut (Work, u32)) -> Option<End> {
        if self.stays.get() {
            return None;
        }
        if let Some(fewer) = left.checked_sub(1) {
            *left = fewer;
            return None;
        }
        if self.die.get() && matches!(work, Work::Publish(..)) {
            return Some(End::Died("signal 9".into()));
        }
        let mut ends = self.ends.borrow_mut();
        if let Some(at) = ends.iter().position(|(of, _)| of == work) {
            return Some(ends.remove(at).1);
        }
        if let Work::Request(id) = &*work {
            self.order.borrow_mut().push(id.clone());
        }
        let done = match work {
            Work::Recover => Ok(()),
            Work::Publish(id, uuid) => Mark::of(&self.store, *id)
                .set()
                .and_then(|()| self.store.write(&format!("{ROOT}/domain/{id}/uuid"), uuid)),
            Work::Request(id) => RequestNodes {
                store: &self.store,
                id,
            }
            .answer(0, "done"),
        };
        if done.is_err() {
            return Some(End::Later);
        }
        if let Work::Publish(_, uuid) = &*work {
            self.unpublished.borrow_mut().retain(|noted| noted != uuid);
        }
        *self.done.borrow_mut().entry(work.clone()).or_default() += 1;
        Some(End::Done)
    }

    fn ask_to_end(&self, _: &(Work, u32)) {
        self.asked_to_end.set(self.asked_to_end.get() + 1);
    }

    fn is_stopping(&self) -> bool {
        self.is_stopping.get()
    }

    fn say(&self, level: u8, what: String) {
        if level == 0 {
            self.said.borrow_mut().push(what);
        }
    }

    fn sweep(&self, domains: &[DomainInfo]) {
        self.swept.set(domains.len());
    }

    fn unpublished(&self) -> Vec<String> {
        self.unpublished.borrow().clone()
    }

    fn protect(&self) -> Result<()> {
        self.store.set_private(ROOT)
    }
}

/// Turns, `times` or until there is nothing to do; the time after it.
fn turn(daemon: &mut Daemon<'_, Host>, mut now: Instant, times: u32) -> Instant {
    for _ in 0..times {
        daemon.turn(now);
        if daemon.needs_watch() {
            daemon.is_watching(now);
            daemon.hands.watches.set(daemon.hands.watches.get() + 1);
        }
        if !daemon.hands.is_deaf.get() {
            daemon.has_heard();
        }
        now += Duration::from_millis(100);
    }
    now
}

#[test]
fn many_guests_and_requests_and_nodes_of_any_name_are_served_once_each() {
    let xenstored = Xenstored::start();
    let host = Host::with(1500);
    // A daemon before this one published guests that are gone.
    let gone = 20_000..21_500;
    xenstored.put_all(gone.map(|id| format!("{ROOT}/domain/{id}")));
    for n in 0..1000 {
        host.submit(
            &format!("a-long-name-of-a-request-{n}"),
            &format!("guest-{}", n % 40),
        );
    }
    for length in [65, 1024, 2000, 3000] {
        host.submit(&"x".repeat(length), "web");
    }
    let now = Instant::now();
    let mut daemon = Daemon::new(&host, now);
    turn(&mut daemon, now, 1200);
    assert_eq!(host.requests_done(), [1; 1000]);
    let published = host.store.children(&format!("{ROOT}/domain")).unwrap();
    assert_eq!(published.len(), 1500);
    assert!(host.done.borrow().values().all(|times| *times == 1));
    let answer = |id: &str| host.store.read(&format!("{ROOT}/request/{id}/rc")).unwrap();
    assert_eq!(answer("a-long-name-of-a-request-0").as_deref(), Some("0"));
    assert_eq!(answer(&"x".repeat(3000)).as_deref(), Some("64"));
    assert_eq!(xenstored.permissions(ROOT).as_deref(), Some("n0"));
}

#[test]
fn what_a_guest_had_is_removed_when_it_is_gone() {
    let _xenstored = Xenstored::start();
    let host = Host::with(3);
    let now = Instant::now();
    let mut daemon = Daemon::new(&host, now);
    let now = turn(&mut daemon, now, 20);
    assert_eq!(host.swept.get(), 0);
    host.domains.borrow_mut().remove(1);
    turn(&mut daemon, now, 20);
    assert_eq!(host.swept.get(), 2);
    let published = host.store.children(&format!("{ROOT}/domain")).unwrap();
    assert_eq!(published, ["1", "3"]);
}

#[test]
fn a_xenstored_that_is_started_again_is_served_again() {
    let mut xenstored = Xenstored::start();
    let host = Host::with(3);
    let now = Instant::now();
    let mut daemon = Daemon::new(&host, now);
    let now = turn(&mut daemon, now, 20);
    xenstored.end();
    let now = turn(&mut daemon, now, 600);
    let away = "nothing is done until xenstored answers";
    let said = |words: &str| {
        host.said
            .borrow()
            .iter()
            .filter(|said| said.contains(words))
            .count()
    };
    assert_eq!(said(away), 1);
    xenstored.begin();
    host.make_domains();
    host.submit("a", "web");
    turn(&mut daemon, now, 60);
    assert_eq!(said("xenstored answers again"), 1);
    assert_eq!(host.requests_done(), [1]);
    let published = host.store.children(&format!("{ROOT}/domain")).unwrap();
    assert_eq!(published, ["1", "2", "3"]);
    let state = host.store.read(&format!("{ROOT}/state")).unwrap();
    assert_eq!(state.as_deref(), Some("running"));
}

#[test]
fn a_xenstored_that_is_stopped_is_waited_for() {
    let xenstored = Xenstored::start();
    let host = Host::with(3);
    let now = Instant::now();
    let mut daemon = Daemon::new(&host, now);
    let now = turn(&mut daemon, now, 20);
    xenstored.stop(true);
    let began = Instant::now();
    let now = turn(&mut daemon, now, 600);
    assert!(began.elapsed() < Duration::from_secs(10));
    xenstored.stop(false);
    while host.store.read("/").is_err() {}
    host.submit("a", "web");
    daemon.is_submitted("a", now);
    turn(&mut daemon, now, 20);
    assert_eq!(host.requests_done(), [1]);
    // Nothing was published or listed anew.
    assert!(host.done.borrow().values().all(|times| *times == 1));
}

#[test]
fn a_daemon_that_is_asked_to_stop_begins_nothing_and_waits_for_its_workers() {
    let _xenstored = Xenstored::start();
    let host = Host::with(1);
    host.stays.set(true);
    let now = Instant::now();
    let mut daemon = Daemon::new(&host, now);
    let now = turn(&mut daemon, now, 10);
    assert!(daemon.has_workers());
    host.is_stopping.set(true);
    host.submit("a", "web");
    daemon.is_submitted("a", now);
    let now = turn(&mut daemon, now, 10);
    assert_eq!(host.asked_to_end.get(), 2);
    assert!(!daemon.has_ended());
    host.stays.set(false);
    turn(&mut daemon, now, 2);
    assert!(daemon.has_ended());
    assert!(host.requests_done().is_empty());
}

#[test]
fn a_request_of_which_xenstored_did_not_tell_is_served_all_the_same() {
    let _xenstored = Xenstored::start();
    let host = Host::with(0);
    let now = Instant::now();
    let mut daemon = Daemon::new(&host, now);
    let now = turn(&mut daemon, now, 20);
    host.submit("a", "web");
    let now = turn(&mut daemon, now, 20);
    assert!(host.requests_done().is_empty());
    turn(&mut daemon, now + LIST, 20);
    assert_eq!(host.requests_done(), [1]);
}

#[test]
fn when_a_worker_dies_that_published_a_guest_what_it_left_is_recovered() {
    let _xenstored = Xenstored::start();
    let host = Host::with(1);
    host.die.set(true);
    let now = Instant::now();
    let mut daemon = Daemon::new(&host, now);
    let now = turn(&mut daemon, now, 6);
    host.die.set(false);
    turn(&mut daemon, now, 20);
    assert_eq!(host.done.borrow()[&Work::Recover], 2);
}

fn request(id: &str) -> Work {
    Work::Request(id.to_owned())
}

fn died() -> End {
    End::Died("signal 9".into())
}

#[test]
fn what_a_worker_left_is_settled_although_its_request_was_removed() {
    let _xenstored = Xenstored::start();
    let host = Host::with(0);
    host.submit("a", "web");
    *host.ends.borrow_mut() = vec![(request("a"), died())];
    let now = Instant::now();
    let mut daemon = Daemon::new(&host, now);
    host.stays.set(true);
    let now = turn(&mut daemon, now, 6);
    assert!(daemon.has_workers());
    host.store.remove(&format!("{ROOT}/request/a")).unwrap();
    host.stays.set(false);
    turn(&mut daemon, now, 20);
    assert!(host.ends.borrow().is_empty() && host.order.borrow().is_empty());
    assert_eq!(host.done.borrow()[&Work::Recover], 2);
}

#[test]
fn what_could_not_be_settled_is_tried_again_with_longer_and_longer_waits() {
    let _xenstored = Xenstored::start();
    let host = Host::with(0);
    let many = std::iter::repeat_n((Work::Recover, End::Later), 30);
    *host.ends.borrow_mut() = many.collect();
    let now = Instant::now();
    let mut daemon = Daemon::new(&host, now);
    // An hour.
    let mut now = turn(&mut daemon, now, 3);
    for _ in 0..3600 {
        now = turn(&mut daemon, now, 1) + Duration::from_millis(900);
    }
    let tries = 30 - host.ends.borrow().len();
    assert!((12..20).contains(&tries), "{tries}");
    // A new death is a new reason.
    *host.ends.borrow_mut() = vec![(request("a"), died())];
    host.submit("a", "web");
    daemon.is_submitted("a", now);
    turn(&mut daemon, now, 8);
    assert_eq!(host.done.borrow()[&Work::Recover], 1);
}

#[test]
fn a_guest_whose_status_may_not_be_true_is_published_again() {
    let _xenstored = Xenstored::start();
    let host = Host::with(2);
    let now = Instant::now();
    let mut daemon = Daemon::new(&host, now);
    let now = turn(&mut daemon, now, 20);
    let uuid = host.domains.borrow()[0].uuid.clone();
    host.unpublished.borrow_mut().push(uuid.clone());
    // A run may be publishing it right now.
    let now = turn(&mut daemon, now, 8);
    let published = |id| host.done.borrow()[&Work::Publish(DomId(id), format!("uuid {id}"))];
    assert_eq!((published(1), published(2)), (1, 1));
    turn(&mut daemon, now, 60);
    assert_eq!((published(1), published(2)), (2, 1));
}

#[test]
fn guests_whose_nodes_xenstored_lost_are_published_once() {
    let mut xenstored = Xenstored::start();
    let host = Host::with(3);
    let now = Instant::now();
    let mut daemon = Daemon::new(&host, now);
    let now = turn(&mut daemon, now, 20);
    xenstored.end();
    let now = turn(&mut daemon, now, 20);
    // Nobody makes the directories of the domains again.
    xenstored.begin();
    turn(&mut daemon, now, 200);
    let done = host.done.borrow();
    assert!(done.values().all(|times| *times <= 2), "{done:?}");
    let published = host.store.children(&format!("{ROOT}/domain")).unwrap();
    assert_eq!(published, ["1", "2", "3"]);
}

#[test]
fn a_watch_of_which_nothing_is_heard_is_set_again() {
    let _xenstored = Xenstored::start();
    let host = Host::with(0);
    let now = Instant::now();
    let mut daemon = Daemon::new(&host, now);
    let now = turn(&mut daemon, now, 20);
    let now = turn(&mut daemon, now + LIST, 20);
    let now = turn(&mut daemon, now + LIST, 20);
    assert_eq!(host.watches.get(), 1);
    host.is_deaf.set(true);
    let now = turn(&mut daemon, now + LIST, 20);
    let now = turn(&mut daemon, now + LIST, 1);
    assert_eq!(host.watches.get(), 2);
    host.is_deaf.set(false);
    let now = turn(&mut daemon, now, 20);
    turn(&mut daemon, now + LIST, 20);
    assert_eq!(host.watches.get(), 2);
}
