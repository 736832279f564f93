use super::*;
use crate::storage::mock::MockStore;
use crate::storage::xenstore::ROOT;

/// Requests, and a queue for them.
struct Host {
    store: MockStore,
    queue: Queue,
    requests: Requests,
    now: Instant,
}

impl Host {
    fn new() -> Host {
        Host {
            store: MockStore::default(),
            queue: Queue::default(),
            requests: Requests::new(),
            now: Instant::now(),
        }
    }

    fn submit(&mut self, id: &str) {
        for (name, value) in [("op", "apply"), ("domain", "web"), ("submit", "1")] {
            self.store
                .put(&format!("{ROOT}/request/{id}/{name}"), value);
        }
        self.look(id);
    }

    fn look(&mut self, id: &str) {
        self.requests
            .look(&self.store, &mut self.queue, id, self.now, &|_| {});
    }

    /// What is begun next; `wait` later.
    fn next(&mut self, wait: Duration) -> Option<String> {
        self.now += wait;
        self.requests
            .look_due(&self.store, &mut self.queue, self.now, &|_| {});
        let say = |_| {};
        loop {
            let job = self.queue.next(self.now)?;
            let (store, queue) = (&self.store, &mut self.queue);
            if self.requests.has_turn(store, queue, &job, self.now, &say) {
                match job.work {
                    Work::Request(id) => return Some(id),
                    other => panic!("{other:?}"),
                }
            }
        }
    }

    fn end(&mut self, id: &str, end: &End) {
        let job = Job {
            work: Work::Request(id.to_owned()),
            guest: "web".into(),
            is_background: false,
        };
        if *end == End::Done {
            self.store
                .put(&format!("{ROOT}/request/{id}/state"), "done");
        }
        self.queue.ended(&job, end, self.now);
        let (store, queue) = (&self.store, &mut self.queue);
        self.requests
            .ended(store, queue, &job, end, self.now, &|_| {});
    }

    fn node(&self, id: &str, name: &str) -> String {
        let node = self.store.value(&format!("{ROOT}/request/{id}/{name}"));
        node.unwrap_or_default()
    }
}

#[test]
fn a_request_is_queued_once() {
    let mut host = Host::new();
    host.submit("a");
    host.submit("a");
    assert_eq!(host.node("a", "state"), "queued");
    assert_eq!(host.next(Duration::ZERO).as_deref(), Some("a"));
    host.submit("a");
    host.end("a", &End::Done);
    host.look("a");
    assert_eq!(host.next(WAIT_MAX), None);
    assert_eq!(host.requests.answered, ["a"]);
}

#[test]
fn a_request_that_waits_comes_again_when_it_is_due_until_it_is_removed() {
    let mut host = Host::new();
    host.submit("a");
    host.next(Duration::ZERO);
    host.end("a", &End::Later);
    assert_eq!(host.next(TICK / 2), None);
    assert_eq!(host.next(TICK).as_deref(), Some("a"));
    host.end("a", &End::Later);
    host.store.remove(&format!("{ROOT}/request/a")).unwrap();
    assert_eq!(host.next(WAIT_MAX), None);
    assert!(host.requests.waiting.due(host.now + WAIT_MAX).is_empty());
    assert!(host.requests.answered.is_empty());
}

#[test]
fn a_new_request_with_the_id_of_one_that_is_just_answered_is_served() {
    let mut host = Host::new();
    host.submit("a");
    host.next(Duration::ZERO);
    host.end("a", &End::Later);
    host.next(WAIT_MAX);
    // The worker has answered. The requester reads that, and submits the next one, before the daemon looks at the worker.
    host.submit("a");
    let job = Job {
        work: Work::Request("a".into()),
        guest: "web".into(),
        is_background: false,
    };
    host.queue.ended(&job, &End::Done, host.now);
    let (store, queue, now) = (&host.store, &mut host.queue, host.now);
    host.requests
        .ended(store, queue, &job, &End::Done, now, &|_| {});
    assert_eq!(host.next(WAIT_MAX).as_deref(), Some("a"));
}

#[test]
fn the_state_of_a_request_that_was_begun_stays_for_the_next_worker() {
    let mut host = Host::new();
    host.store
        .put(&format!("{ROOT}/request/a/state"), "running");
    host.submit("a");
    assert_eq!(host.next(Duration::ZERO).as_deref(), Some("a"));
    assert_eq!(host.node("a", "state"), "running");
}

#[test]
fn a_state_is_written_once_because_a_worker_may_write_it_meanwhile() {
    let mut host = Host::new();
    host.store.put(&format!("{ROOT}/request/a/state"), "queued");
    host.store.trace.fail("write");
    host.submit("a");
    assert_eq!(host.next(Duration::ZERO).as_deref(), Some("a"));
}

#[test]
fn the_waits_of_a_request_double_up_to_the_longest() {
    let mut host = Host::new();
    host.submit("a");
    assert_eq!(host.next(Duration::ZERO).as_deref(), Some("a"));
    for wait in [1, 2, 4, 8, 16, 16] {
        host.end("a", &End::Later);
        let wait = TICK * wait;
        assert!(wait <= WAIT_MAX);
        assert_eq!(host.next(wait - TICK / 2), None, "{wait:?}");
        assert_eq!(host.next(TICK / 2).as_deref(), Some("a"), "{wait:?}");
    }
    // A new one with this ID waits as a new one.
    host.end("a", &End::Done);
    host.store.remove(&format!("{ROOT}/request/a")).unwrap();
    host.submit("a");
    assert_eq!(host.next(Duration::ZERO).as_deref(), Some("a"));
    host.end("a", &End::Later);
    assert_eq!(host.next(TICK).as_deref(), Some("a"));
}

const DIED: fn() -> End = || End::Died("signal 9".into());

#[test]
fn a_request_that_ends_its_workers_is_answered_in_the_end() {
    let mut host = Host::new();
    host.submit("a");
    host.store
        .put(&format!("{ROOT}/request/a/state"), "running");
    for _ in 0..DEATHS_MAX {
        assert_eq!(host.node("a", "rc"), "");
        // Workers in between that only wait don't make this another request.
        assert_eq!(host.next(WAIT_MAX).as_deref(), Some("a"));
        host.end("a", &End::Later);
        assert_eq!(host.next(WAIT_MAX).as_deref(), Some("a"));
        host.end("a", &DIED());
    }
    assert_eq!(host.next(WAIT_MAX), None);
    assert_eq!(host.node("a", "rc"), "6");
    assert!(host.node("a", "message").contains("signal 9"));
    assert_eq!(host.node("a", "state"), "done");
    assert!(host.requests.troubles.is_empty());
}

#[test]
fn an_answer_that_can_not_be_written_is_written_later_and_no_worker_is_begun() {
    let mut host = Host::new();
    host.submit("a");
    for _ in 0..DEATHS_MAX {
        host.next(WAIT_MAX);
        host.end("a", &DIED());
    }
    host.store.trace.fail("write");
    for _ in 0..3 {
        assert_eq!(host.next(WAIT_MAX), None);
        assert_eq!(host.node("a", "rc"), "");
    }
    host.store.trace.fail("");
    assert_eq!(host.next(WAIT_MAX), None);
    assert_eq!(host.node("a", "rc"), "6");
    assert_eq!(host.requests.answered, ["a"]);
}

#[test]
fn a_request_of_which_it_is_never_known_what_came_of_it_is_answered_in_the_end() {
    let mut host = Host::new();
    host.submit("a");
    let put = |host: &Host, name: &str, value: &str| {
        host.store.put(&format!("{ROOT}/request/a/{name}"), value);
    };
    // As long as it is not begun it may wait.
    for state in ["queued", "running"] {
        put(&host, "state", state);
        put(&host, "message", "it can't be read");
        for _ in 0..LEFT_RUNNING_MAX {
            assert_eq!(host.next(WAIT_MAX).as_deref(), Some("a"), "{state}");
            host.end("a", &End::Later);
        }
    }
    assert_eq!(host.next(WAIT_MAX), None);
    assert_eq!(host.node("a", "rc"), "6");
    assert!(host.node("a", "message").contains("it can't be read"));
}

#[test]
fn of_a_request_that_is_removed_nothing_is_known_any_more() {
    let mut host = Host::new();
    host.submit("a");
    host.next(Duration::ZERO);
    host.end("a", &DIED());
    host.store.remove(&format!("{ROOT}/request/a")).unwrap();
    assert_eq!(host.next(WAIT_MAX), None);
    assert!(host.requests.troubles.is_empty());
}

#[test]
fn an_id_of_any_length_is_answered_or_left_alone() {
    let mut host = Host::new();
    for id in [
        "x".repeat(65),
        "x".repeat(1024),
        "x".repeat(3000),
        "a b".into(),
    ] {
        host.submit(&id);
        assert_eq!(host.node(&id, "rc"), "64", "{}", id.len());
        assert!(host.node(&id, "message").len() < 400);
    }
    host.store.trace.fail("write");
    host.submit(&"y".repeat(2000));
    host.store.trace.fail("");
    // It is not tried again.
    assert!(host.requests.waiting.due(host.now + WAIT_MAX).is_empty());
    assert_eq!(host.next(WAIT_MAX), None);
    host.submit("good");
    assert_eq!(host.next(WAIT_MAX).as_deref(), Some("good"));
}

#[test]
fn a_request_whose_nodes_can_not_be_written_is_looked_at_again() {
    let mut host = Host::new();
    host.store.trace.fail("write");
    host.submit("a");
    assert_eq!(host.next(Duration::ZERO), None);
    host.store.trace.fail("");
    assert_eq!(host.next(TICK).as_deref(), Some("a"));
}

#[test]
fn of_many_answered_requests_the_oldest_is_removed_unless_it_was_submitted_again() {
    let mut host = Host::new();
    let put = |host: &Host, id: &str, name: &str, value: &str| {
        host.store
            .put(&format!("{ROOT}/request/{id}/{name}"), value);
    };
    for id in 0..ANSWERED_MAX + 2 {
        let id = id.to_string();
        put(&host, &id, "submit", "1");
        put(&host, &id, "state", "done");
        if id == "1" {
            // Its requester made it anew, and it is queued.
            host.look(&id);
            put(&host, &id, "state", "queued");
        } else {
            host.look(&id);
        }
    }
    assert_eq!(host.requests.answered.len(), ANSWERED_MAX);
    assert_eq!(host.node("0", "submit"), "");
    assert_eq!(host.node("1", "submit"), "1");
    assert_eq!(host.node("2", "submit"), "1");
}

#[test]
fn nothing_stays_of_a_request_that_is_removed_while_it_is_queued() {
    let mut host = Host::new();
    host.store.removed_before.set("state");
    host.submit("a");
    assert!(host.store.nodes.borrow().is_empty());
    assert_eq!(host.next(Duration::ZERO), None);
}
