use super::*;
use crate::domain::mock_info;
use crate::storage::mock::MockStore;

/// Domains, and what the publisher is asked to do with them.
struct Host {
    store: MockStore,
    domains: Vec<DomainInfo>,
    publisher: Publisher,
}

pub(crate) fn domain(id: u16) -> DomainInfo {
    mock_info(id, &format!("uuid {id}"))
}

impl Host {
    fn with(domains: &[DomainInfo]) -> Host {
        let host = Host {
            store: MockStore::default(),
            domains: domains.to_vec(),
            publisher: Publisher::new(),
        };
        for info in domains {
            let name = format!("/local/domain/{}/name", info.id);
            host.store.put(&name, "guest");
        }
        host
    }

    /// Looks; workers do what comes into the queue, and end so. Ids of the guests.
    fn look(&mut self, now: Instant, end: &End) -> Vec<u16> {
        let mut queue = Queue::default();
        let domains = self.domains.clone();
        self.publisher
            .look(&self.store, domains, &mut queue, now, &|_| {});
        let mut ids = Vec::new();
        while let Some(job) = queue.next(now) {
            let Work::Publish(id, uuid) = &job.work else {
                panic!("{job:?}")
            };
            // The worker sets it before it looks.
            if matches!(end, End::Done | End::CanNotBeRead) {
                Mark::of(&self.store, *id).set().unwrap();
            }
            if *end == End::Done {
                self.store.put(&format!("{ROOT}/domain/{id}/uuid"), uuid);
            }
            ids.push(id.0);
            queue.ended(&job, end, now);
            self.publisher.ended(*id, uuid, end, now);
        }
        ids
    }

    fn published(&self) -> Vec<String> {
        self.store.children(&format!("{ROOT}/domain")).unwrap()
    }
}

#[test]
fn each_guest_is_published_once_and_removed_when_it_is_gone() {
    let mut host = Host::with(&[domain(1), domain(2)]);
    // A daemon before this one published it.
    host.store.put(&format!("{ROOT}/domain/9/uuid"), "gone");
    let now = Instant::now();
    assert_eq!(host.look(now, &End::Done), [1, 2]);
    assert_eq!(host.look(now + WAIT_MAX, &End::Done), [0; 0]);
    assert_eq!(host.published(), ["1", "2"]);
    host.domains.remove(0);
    host.look(now + WAIT_MAX, &End::Done);
    assert_eq!(host.published(), ["2"]);
    assert_eq!(host.publisher.published.len(), 1);
}

#[test]
fn a_guest_that_can_not_be_read_is_tried_again_later() {
    for end in [End::Later, End::Died("signal 9".into())] {
        let mut host = Host::with(&[domain(1), domain(2)]);
        let now = Instant::now();
        assert_eq!(host.look(now, &end), [1, 2]);
        assert_eq!(host.look(now + TICK, &End::Done), [0; 0]);
        assert_eq!(host.look(now + TICK * 2, &End::Done), [1, 2]);
        assert_eq!(host.published(), ["1", "2"]);
    }
}

#[test]
fn a_guest_that_can_not_be_read_costs_less_and_less() {
    for end in [End::CanNotBeRead, End::Died("exit code 101".into())] {
        let mut host = Host::with(&[domain(1)]);
        let began = Instant::now();
        let (mut looks, mut last) = (0, began);
        for seconds in 0..24 * 3600 {
            let now = began + Duration::from_secs(seconds);
            if !host.look(now, &end).is_empty() {
                looks += 1;
                assert!(now - last <= UNREADABLE_MAX, "{:?}", now - last);
                last = now;
            }
        }
        // Twelve that double, and one an hour.
        assert!((30..40).contains(&looks), "{looks}");
    }
}

#[test]
fn a_guest_that_became_another_is_looked_at_in_a_moment() {
    let again = |change: &dyn Fn(&mut Host)| {
        let mut host = Host::with(&[domain(1), domain(2)]);
        host.store.put("/local/domain/1/name", "guest 1");
        let mut now = Instant::now();
        for _ in 0..12 {
            assert_eq!(host.look(now, &End::CanNotBeRead)[0], 1);
            now += UNREADABLE_MAX;
        }
        now -= UNREADABLE_MAX / 2;
        assert_eq!(host.look(now, &End::Done), [0; 0]);
        change(&mut host);
        let mut ids = host.look(now, &End::Done);
        ids.extend(host.look(now + TICK * 2, &End::Done));
        ids
    };
    assert_eq!(again(&|_| ()), [0; 0]);
    let mark = "/local/domain/1/xen-locus";
    // Its kernel started another one; it rebooted; a request about it was served; xenstored was started again.
    assert_eq!(
        again(&|host| drop(host.store.nodes.borrow_mut().remove(mark))),
        [1]
    );
    assert_eq!(again(&|host| host.domains[0] = domain(7)), [7]);
    for whom in ["uuid 1", "1", "guest 1"] {
        let served = |host: &mut Host| host.publisher.was_served(&host.store, whom);
        assert_eq!(again(&served), [1]);
    }
    assert_eq!(again(&|host| host.publisher.forget()), [1, 2]);
}

#[test]
fn when_one_of_two_guests_with_one_uuid_ends_the_other_is_looked_at_at_once() {
    for is_published in [false, true] {
        let mut host = Host::with(&[domain(1), domain(2)]);
        host.domains[1].uuid = host.domains[0].uuid.clone();
        let mut now = Instant::now();
        if is_published {
            // Before the other one was there.
            let other = host.domains.remove(0);
            host.look(now, &End::Done);
            host.domains.insert(0, other);
        }
        for _ in 0..12 {
            host.look(now, &End::CanNotBeRead);
            now += UNREADABLE_MAX;
        }
        now -= UNREADABLE_MAX - TICK;
        assert_eq!(host.look(now, &End::Done), [0; 0]);
        host.domains.remove(1);
        assert_eq!(host.look(now, &End::Done), [1]);
    }
}

#[test]
fn each_of_two_guests_with_one_uuid_is_looked_at() {
    let mut host = Host::with(&[domain(1), domain(2)]);
    host.domains[1].uuid = host.domains[0].uuid.clone();
    let now = Instant::now();
    assert_eq!(host.look(now, &End::Later), [1, 2]);
    assert_eq!(host.look(now + TICK * 2, &End::Done), [1, 2]);
}

#[test]
fn a_guest_that_does_not_run_is_left_alone_until_it_does() {
    let mut host = Host::with(&[domain(1)]);
    let now = Instant::now();
    host.domains[0].dying = true;
    assert_eq!(host.look(now, &End::Done), [0; 0]);
    (host.domains[0].dying, host.domains[0].shutdown) = (false, true);
    assert_eq!(host.look(now, &End::Done), [0; 0]);
    (host.domains[0].shutdown, host.domains[0].paused) = (false, true);
    assert_eq!(host.look(now, &End::Done), [0; 0]);
    host.domains[0].paused = false;
    // The pause put it off.
    assert_eq!(host.look(now + TICK, &End::Done), [0; 0]);
    assert_eq!(host.look(now + TICK * 2, &End::Done), [1]);
}

#[test]
fn a_guest_whose_directory_was_made_again_is_published_again() {
    let mut host = Host::with(&[domain(1)]);
    let now = Instant::now();
    host.look(now, &End::Done);
    let mark = "/local/domain/1/xen-locus";
    host.store.nodes.borrow_mut().remove(mark);
    // What is true of the old kernel is removed at once.
    assert_eq!(host.look(now, &End::Done), [0; 0]);
    assert_eq!(host.published(), [""; 0]);
    assert_eq!(host.look(now + TICK * 2, &End::Done), [1]);
    assert_eq!(host.published(), ["1"]);
}

#[test]
fn no_cause_makes_a_guest_be_published_all_the_time() {
    let mut host = Host::with(&[domain(1)]);
    let began = Instant::now();
    let mut times = 0;
    for n in 0..40 {
        let mark = "/local/domain/1/xen-locus";
        host.store.nodes.borrow_mut().remove(mark);
        times += host.look(began + TICK * n, &End::Done).len();
    }
    assert!((5..=20).contains(&times), "{times}");
    // Where the directory itself is gone, nothing follows from that.
    host.look(began + TICK * 50, &End::Done);
    host.store.remove("/local/domain/1").unwrap();
    times = (51..100)
        .map(|n| host.look(began + TICK * n, &End::Done).len())
        .sum();
    assert_eq!(times, 0);
}

#[test]
fn a_guest_that_ends_while_it_is_put_off_or_worked_on_does_not_stay_published() {
    let mut host = Host::with(&[domain(1), domain(2)]);
    let now = Instant::now();
    let node = |id: u16| format!("{ROOT}/domain/{id}/uuid");
    // Each was published before something was found that is to be done later.
    host.look(now, &End::Later);
    host.store.put(&node(1), "uuid 1");
    host.store.put(&node(2), "uuid 2");
    assert!(!host.publisher.are_gone(&host.domains));
    host.domains.remove(0);
    assert!(host.publisher.are_gone(&host.domains));
    host.look(now, &End::Later);
    assert_eq!(host.published(), ["2"]);
    // A worker finds it there, and publishes it when the daemon knows that it is gone.
    let mut queue = Queue::default();
    let later = now + WAIT_MAX / 2;
    let mut look = |host: &mut Host| {
        let domains = host.domains.clone();
        host.publisher
            .look(&host.store, domains, &mut queue, later, &|_| {});
    };
    look(&mut host);
    host.domains.clear();
    look(&mut host);
    assert_eq!(host.published(), [""; 0]);
    host.store.remove("/local/domain/2").unwrap();
    host.store.put("/local/domain/2/xen-locus", "published");
    host.store.put(&node(2), "uuid 2");
    host.publisher.ended(DomId(2), "uuid 2", &End::Later, later);
    look(&mut host);
    assert_eq!(host.published(), [""; 0]);
    assert_eq!(host.store.children("/local/domain/2").unwrap(), [""; 0]);
    // A command did.
    host.store.put(&node(2), "uuid 2");
    host.look(later + LIST, &End::Done);
    assert_eq!(host.published(), [""; 0]);
}

#[test]
fn a_guest_whose_status_may_not_be_true_is_published_again() {
    let mut host = Host::with(&[domain(1), domain(2)]);
    let now = Instant::now();
    host.look(now, &End::Done);
    let noted = ["uuid 2".to_owned(), "another".to_owned()];
    host.publisher.are_unpublished(&noted, now);
    assert_eq!(host.look(now + TICK, &End::Done), [0; 0]);
    // What is published stays until then.
    assert_eq!(host.published(), ["1", "2"]);
    assert_eq!(host.look(now + TICK * 2, &End::Done), [2]);
}

#[test]
fn a_domain_without_a_directory_is_published_once() {
    let mut host = Host::with(&[]);
    host.domains.push(domain(1));
    let now = Instant::now();
    assert_eq!(host.look(now, &End::Done), [1]);
    assert_eq!(host.look(now + TICK, &End::Done), [0; 0]);
}

#[test]
fn another_guest_with_the_same_id_is_published_too() {
    let mut host = Host::with(&[domain(1)]);
    let now = Instant::now();
    host.look(now, &End::Done);
    host.domains[0].uuid = "another".into();
    assert_eq!(host.look(now, &End::Done), [1]);
    let uuid = host.store.value(&format!("{ROOT}/domain/1/uuid"));
    assert_eq!(uuid.as_deref(), Some("another"));
}

#[test]
fn all_marks_are_read_in_some_looks_and_no_look_reads_many() {
    let all: Vec<DomainInfo> = (1..=300).map(domain).collect();
    let mut host = Host::with(&all);
    let now = Instant::now();
    assert_eq!(host.look(now, &End::Done).len(), 300);
    for id in [1, 150, 300] {
        let mark = format!("/local/domain/{id}/xen-locus");
        host.store.nodes.borrow_mut().remove(&mark);
    }
    host.look(now, &End::Done);
    let waits = |host: &Host| host.publisher.waiting.due(now + WAIT_MAX).len();
    assert_eq!(waits(&host), 1);
    (0..3).for_each(|_| drop(host.look(now, &End::Done)));
    assert_eq!(waits(&host), 3);
}

#[test]
fn a_node_that_can_not_be_removed_keeps_no_guest_from_being_published() {
    let mut host = Host::with(&[domain(1)]);
    host.store.put(&format!("{ROOT}/domain/9/uuid"), "gone");
    host.store.trace.fail("remove");
    let now = Instant::now();
    assert_eq!(host.look(now, &End::Done), [1]);
    host.store.trace.fail("");
    host.look(now, &End::Done);
    assert_eq!(host.published(), ["1"]);
}
