//! One request, on mocks: what is answered, and that it is carried out once.

use std::cell::{Cell, RefCell};

use super::*;
use crate::apply;
use crate::storage::audit::Action;
use crate::storage::mock::{MockLog, MockStore};
use crate::storage::xenstore::{Nodes as _, ROOT};

const UUID: &str = "a guest";

/// A host with a request. Carrying it out changes the guest, which a line of the log records.
struct Mock {
    store: MockStore,
    log: MockLog,
    is_stopping: bool,
    /// How often the guest was changed.
    changes: Cell<u32>,
    /// What carrying it out gives; nothing to do unless set.
    gives: RefCell<Option<Error>>,
    /// What finding its guest gives; the guest unless set.
    finds: RefCell<Option<Error>>,
    /// What locking gives; the lock unless set.
    locks: RefCell<Option<Error>>,
    /// What recovering gives; it succeeds unless set.
    recovers: RefCell<Option<Error>>,
    /// Called while another worker has the lock.
    before_lock: fn(&Mock),
    /// What a worker that was killed in the change left for `recover`: whether it is in force.
    left: Cell<Option<bool>>,
    /// Called while the request runs.
    meanwhile: fn(&Mock),
}

fn action(who: &str, op: &str, result: &str) -> Action {
    Action {
        who: who.into(),
        op: op.into(),
        patch: "fix".into(),
        uuid: UUID.into(),
        result: result.into(),
        ..Action::default()
    }
}

impl Mock {
    fn new(more: &[(&str, &str)]) -> Mock {
        let store = MockStore::default();
        let request = [
            ("op", "revert"),
            ("domain", "web"),
            ("patch", "fix"),
            ("submit", "1"),
        ];
        for (name, value) in request.iter().chain(more) {
            store.put(&format!("{ROOT}/request/r/{name}"), value);
        }
        Mock {
            store,
            log: MockLog::default(),
            is_stopping: false,
            changes: Cell::new(0),
            gives: RefCell::default(),
            finds: RefCell::default(),
            locks: RefCell::default(),
            recovers: RefCell::default(),
            before_lock: |_| {},
            left: Cell::new(None),
            meanwhile: |_| {},
        }
    }

    fn node(&self, name: &str) -> String {
        let value = self.store.value(&format!("{ROOT}/request/r/{name}"));
        value.unwrap_or_default()
    }

    fn serve(&self) -> Served {
        self.try_serve().unwrap()
    }

    fn try_serve(&self) -> Result<Served> {
        let one = Serving {
            nodes: RequestNodes {
                store: &self.store,
                id: "r",
            },
            log: &self.log,
            hands: self,
            entry: OnceCell::new(),
        };
        one.serve().map(|(served, _)| served)
    }

    /// State and exit code.
    fn answer(&self) -> (String, String) {
        (self.node("state"), self.node("rc"))
    }

    fn record(&self, action: Action) {
        self.log.lines.borrow_mut().push(action);
    }
}

impl Hands for Mock {
    type Guest = String;
    type Lock = ();

    fn is_stopping(&self) -> bool {
        self.is_stopping
    }

    fn find(&self, _: &Request) -> Result<String> {
        self.finds.take().map_or_else(|| Ok(UUID.into()), Err)
    }

    fn uuid(guest: &String) -> &str {
        guest
    }

    fn lock(&self, _: &String) -> Result<()> {
        (self.before_lock)(self);
        self.locks.take().map_or(Ok(()), Err)
    }

    fn recover(&self, _: &String) -> Result<()> {
        if let Some(in_force) = self.left.take() {
            self.record(Action {
                of: "revert".into(),
                ..action(
                    "uid 0",
                    "recover",
                    if in_force { "finished" } else { "undone" },
                )
            });
        }
        self.recovers.take().map_or(Ok(()), Err)
    }

    fn carry_out(&self, _: &String, request: &Request) -> Result<Report> {
        assert_eq!(request.op, Operation::Revert);
        assert_eq!(self.answer(), ("running".into(), String::new()));
        (self.meanwhile)(self);
        if let Some(error) = self.gives.take() {
            return Err(error);
        }
        self.changes.set(self.changes.get() + 1);
        self.record(action("XenStore request r", "revert", "reverted"));
        Ok(apply::nothing_to_do("fix", apply::Outcome::AlreadyApplied))
    }
}

#[test]
fn a_request_is_running_then_done_and_its_state_is_written_last() {
    let mock = Mock::new(&[]);
    assert_eq!(mock.serve(), Served::Answered);
    assert_eq!(mock.answer(), ("done".into(), "0".into()));
    // It is answered once.
    assert_eq!(mock.serve(), Served::Answered);
    assert_eq!(mock.changes.get(), 1);
}

#[test]
fn a_malformed_request_is_answered_and_not_carried_out() {
    let mock = Mock::new(&[("op", "destroy")]);
    assert_eq!(mock.serve(), Served::Answered);
    assert_eq!(
        mock.answer(),
        ("done".into(), (ExitCode::Usage as u8).to_string())
    );
    assert_eq!(mock.changes.get(), 0);
}

#[test]
fn when_the_deadline_has_passed_the_answer_says_what_was_waited_for() {
    let mock = Mock::new(&[("deadline", "12")]);
    let nodes = RequestNodes {
        store: &mock.store,
        id: "r",
    };
    let error = is_too_late(&nodes, 12);
    assert_eq!(error.exit_code(), ExitCode::TryAgain);
    assert_eq!(error.to_string(), "the deadline 12 has passed");
    *mock.gives.borrow_mut() = Some(Error::not_loaded("ext4 is not loaded"));
    mock.serve();
    let said = is_too_late(&nodes, 12).to_string();
    assert!(
        said.ends_with("waited, because: ext4 is not loaded"),
        "{said}"
    );
}

#[test]
fn a_request_with_a_deadline_waits_for_a_module_and_for_nothing_else() {
    let deadline = [("deadline", "12")];
    for (more, waits) in [(&deadline[..], true), (&[], false)] {
        let mock = Mock::new(more);
        *mock.gives.borrow_mut() = Some(Error::not_loaded("ext4 is not loaded"));
        assert_eq!(mock.serve() == Served::WaitsForModule, waits);
        assert_eq!(mock.node("message"), "ext4 is not loaded");
        assert_eq!(mock.node("state"), if waits { "queued" } else { "done" });
    }
    let mock = Mock::new(&deadline);
    *mock.gives.borrow_mut() = Some(Error::failed("no"));
    assert_eq!(mock.serve(), Served::Answered);
}

#[test]
fn what_changed_nothing_while_the_worker_is_asked_to_stop_is_left_to_the_next_one() {
    for (error, waits) in [
        (Error::failed("interrupted"), true),
        (Error::try_again("blocked"), true),
        (Error::rolled_back("it was changed for a moment"), false),
        (Error::uncertain("it may be changed"), false),
    ] {
        let mut mock = Mock::new(&[]);
        mock.is_stopping = true;
        *mock.gives.borrow_mut() = Some(error);
        assert_eq!(mock.serve() == Served::Waits, waits);
        assert_eq!(mock.node("state"), if waits { "queued" } else { "done" });
        assert_eq!(mock.node("rc").is_empty(), waits);
    }
}

#[test]
fn a_request_that_is_removed_while_it_runs_is_not_made_again() {
    for fails in [false, true] {
        let mut mock = Mock::new(&[]);
        mock.meanwhile = |mock| mock.store.remove(&format!("{ROOT}/request/r")).unwrap();
        *mock.gives.borrow_mut() = fails.then(|| Error::failed("it is gone"));
        mock.serve();
        assert!(mock.store.nodes.borrow().is_empty(), "{fails}");
    }
}

#[test]
fn nothing_stays_of_a_request_that_is_removed_right_before_it_is_begun() {
    for waits in [false, true] {
        let mut mock = Mock::new(&[("deadline", "12")]);
        mock.meanwhile = |mock| {
            for name in ["op", "domain", "patch", "deadline", "submit"] {
                let node = format!("{ROOT}/request/r/{name}");
                mock.store.remove(&node).unwrap();
            }
        };
        *mock.gives.borrow_mut() = waits.then(|| Error::not_loaded("ext4 is not loaded"));
        mock.serve();
        assert!(mock.store.nodes.borrow().is_empty(), "{waits}");
    }
}

#[test]
fn nothing_stays_of_a_request_that_is_removed_while_it_is_put_off() {
    let mock = Mock::new(&[]);
    *mock.locks.borrow_mut() = Some(Error::try_again("another run has it"));
    mock.store.removed_before.set("message");
    mock.serve();
    assert!(mock.store.nodes.borrow().is_empty());
}

#[test]
fn an_answer_that_the_daemon_gave_meanwhile_stays() {
    for waits in [false, true] {
        let mut mock = Mock::new(&[("deadline", "12")]);
        mock.meanwhile = |mock| {
            for (name, value) in [("rc", "6"), ("state", "done")] {
                let node = format!("{ROOT}/request/r/{name}");
                mock.store.put(&node, value);
            }
        };
        *mock.gives.borrow_mut() = waits.then(|| Error::not_loaded("ext4 is not loaded"));
        assert_eq!(mock.serve(), Served::Answered);
        assert_eq!(mock.answer(), ("done".into(), "6".into()), "{waits}");
    }
}

#[test]
fn a_worker_does_not_answer_a_later_request_with_the_same_id() {
    for waits in [false, true] {
        let mut mock = Mock::new(&[("deadline", "12")]);
        mock.meanwhile = |mock| {
            mock.store.remove(&format!("{ROOT}/request/r")).unwrap();
            mock.store.nodes.swap(&Mock::new(&[]).store.nodes);
        };
        *mock.gives.borrow_mut() = waits.then(|| Error::not_loaded("ext4 is not loaded"));
        assert_eq!(mock.serve(), Served::None);
        assert_eq!(mock.answer(), Default::default(), "{waits}");
        assert_eq!(mock.node("message"), "");
    }
}

#[test]
fn what_is_not_submitted_is_no_request() {
    let mock = Mock::new(&[("submit", "0")]);
    assert_eq!(mock.serve(), Served::None);
    mock.store.remove(&format!("{ROOT}/request/r")).unwrap();
    assert_eq!(mock.serve(), Served::None);
    assert_eq!(mock.changes.get(), 0);
}

/// The worker is killed at each of its writes to XenStore, and another one serves the request.
#[test]
fn a_request_is_carried_out_once_whenever_its_worker_is_killed() {
    for killed_at in 0.. {
        let mock = Mock::new(&[]);
        mock.store.fail_write(killed_at);
        let died = mock.try_serve().is_err();
        mock.store.fail_write(usize::MAX);
        assert_eq!(mock.serve(), Served::Answered);
        assert_eq!(mock.answer(), ("done".into(), "0".into()), "{killed_at}");
        assert_eq!(mock.changes.get(), 1, "{killed_at}");
        if !died {
            assert_eq!(killed_at, 5);
            return;
        }
    }
}

#[test]
fn a_request_whose_worker_was_killed_in_the_change_is_answered_by_what_recover_found() {
    for in_force in [true, false] {
        let mock = Mock::new(&[("state", "running"), ("entry", "0")]);
        mock.left.set(Some(in_force));
        assert_eq!(mock.serve(), Served::Answered);
        assert_eq!(mock.answer(), ("done".into(), "0".into()));
        assert_eq!(mock.changes.get(), u32::from(!in_force));
    }
}

const BEGUN: [(&str, &str); 2] = [("state", "running"), ("entry", "0")];

#[test]
fn a_request_that_was_begun_waits_until_that_is_recovered() {
    let busy = || Some(Error::try_again("another run works on it"));
    let broken = || Some(Error::failed("it can't be read"));
    type Fail = fn(&Mock, Option<Error>);
    let steps: [Fail; 3] = [
        |mock, error| *mock.finds.borrow_mut() = error,
        |mock, error| *mock.locks.borrow_mut() = error,
        |mock, error| *mock.recovers.borrow_mut() = error,
    ];
    for step in steps {
        for error in [busy(), broken()] {
            let mock = Mock::new(&BEGUN);
            step(&mock, error);
            assert_eq!(mock.serve(), Served::Waits);
            assert_eq!(mock.answer(), ("running".into(), String::new()));
            assert!(!mock.node("message").is_empty());
            assert_eq!(mock.changes.get(), 0);
            assert_eq!(mock.serve(), Served::Answered);
            assert_eq!(mock.changes.get(), 1);
        }
    }
}

#[test]
fn a_request_that_was_begun_waits_for_a_log_that_can_not_be_read() {
    let mock = Mock::new(&BEGUN);
    mock.left.set(Some(true));
    mock.log.trace.fail("since");
    assert_eq!(mock.serve(), Served::Waits);
    assert_eq!(mock.answer(), ("running".into(), String::new()));
    mock.log.trace.fail("");
    assert_eq!(mock.serve(), Served::Answered);
    assert_eq!(mock.answer(), ("done".into(), "0".into()));
    assert_eq!(mock.changes.get(), 0);
}

#[test]
fn what_can_never_be_recovered_is_answered_and_that_is_called_uncertain() {
    for error in [
        Error::not_applicable("domains 3 and 5 have the same UUID"),
        Error::uncertain("its guardian is stuck"),
    ] {
        let mock = Mock::new(&BEGUN);
        *mock.recovers.borrow_mut() = Some(error);
        assert_eq!(mock.serve(), Served::Answered);
        assert_eq!(mock.answer(), ("done".into(), "6".into()));
        assert_eq!(mock.changes.get(), 0);
    }
}

#[test]
fn what_the_log_knows_is_the_answer_though_the_guest_is_gone_or_can_not_be_recovered() {
    for is_gone in [true, false] {
        let mock = Mock::new(&BEGUN);
        mock.record(action("XenStore request r", "revert", "reverted"));
        let error = Some(Error::not_applicable("no"));
        match is_gone {
            true => *mock.finds.borrow_mut() = error,
            false => *mock.recovers.borrow_mut() = error,
        }
        assert_eq!(mock.serve(), Served::Answered);
        assert_eq!(mock.answer(), ("done".into(), "0".into()));
        assert_eq!(mock.changes.get(), 0);
    }
}

#[test]
fn a_request_whose_guest_is_not_found_is_answered_before_it_is_begun() {
    let mock = Mock::new(&[]);
    *mock.finds.borrow_mut() = Some(Error::failed("there is no domain"));
    assert_eq!(mock.serve(), Served::Answered);
    assert_eq!(mock.answer(), ("done".into(), "1".into()));
    assert_eq!(mock.node("entry"), "");
}

/// Two daemons' workers: the one that has the lock was started first.
#[test]
fn a_request_that_another_worker_serves_meanwhile_is_served_once() {
    let mut mock = Mock::new(&[]);
    mock.before_lock = |mock| {
        let other = Mock::new(&[]);
        assert_eq!(other.serve(), Served::Answered);
        mock.store.nodes.swap(&other.store.nodes);
        mock.log.lines.swap(&other.log.lines);
    };
    assert_eq!(mock.serve(), Served::Answered);
    assert_eq!(mock.changes.get(), 0);
    // That one is killed after the change.
    mock = Mock::new(&[]);
    mock.before_lock = |mock| {
        for (name, value) in BEGUN {
            let node = format!("{ROOT}/request/r/{name}");
            mock.store.put(&node, value);
        }
        mock.left.set(Some(true));
    };
    assert_eq!(mock.serve(), Served::Answered);
    assert_eq!(mock.answer(), ("done".into(), "0".into()));
    assert_eq!(mock.changes.get(), 0);
}

#[test]
fn a_request_that_is_removed_or_made_anew_meanwhile_is_not_carried_out() {
    let mut mock = Mock::new(&[]);
    mock.before_lock = |mock| mock.store.remove(&format!("{ROOT}/request/r")).unwrap();
    assert_eq!(mock.serve(), Served::None);
    assert!(mock.store.nodes.borrow().is_empty());
    mock = Mock::new(&[]);
    mock.before_lock = |mock| mock.store.put(&format!("{ROOT}/request/r/domain"), "db");
    assert_eq!(mock.serve(), Served::Waits);
    assert_eq!(mock.node("state"), "");
    assert_eq!(mock.changes.get(), 0);
}

#[test]
fn an_earlier_request_with_the_same_id_is_another_one() {
    let mock = Mock::new(&[]);
    mock.record(action("XenStore request r", "revert", "reverted"));
    mock.store
        .put(&format!("{ROOT}/request/r/state"), "running");
    mock.store.put(&format!("{ROOT}/request/r/entry"), "1");
    assert_eq!(mock.serve(), Served::Answered);
    assert_eq!(mock.changes.get(), 1);
}

#[test]
fn what_can_not_be_told_is_called_uncertain() {
    for more in [
        &[("state", "running")][..],
        &[("state", "running"), ("entry", "7")],
    ] {
        let mock = Mock::new(more);
        assert_eq!(mock.serve(), Served::Answered);
        assert_eq!(mock.answer(), ("done".into(), "6".into()));
        assert_eq!(mock.changes.get(), 0);
    }
}
