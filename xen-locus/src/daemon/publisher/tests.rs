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
fn a_guest_that_became_another_is_looked_at_at_once() {
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
        host.look(now, &End::Done)
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
    assert_eq!(host.look(now, &End::Done), [1]);
    assert_eq!(host.published(), ["1"]);
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
    let looks: Vec<usize> = (0..4).map(|_| host.look(now, &End::Done).len()).collect();
    assert_eq!(looks.iter().sum::<usize>(), 3);
    assert_eq!(looks[0], 1);
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
