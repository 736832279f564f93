//! The order of an operation, on mocks: every step fails in turn.

use std::cell::RefCell;
use std::path::Path;

use locus_guest::addr::DomId;
use locus_payload::Payload;

use super::guest::Guest;
use super::run::Asked;
use super::*;
use crate::apply::mock::options;
use crate::apply::{Options, Outcome, Report};
use crate::error::{Error, Result};
use crate::machine::mock::{payload, Guest as MockGuest};
use crate::operation::Operation;
use crate::plan::Mode;
use crate::recover::{self, Finding};
use crate::storage::journal::Noted;
use crate::storage::mock::{MockLog, MockStore, Trace};
use crate::storage::xenstore::ROOT;

mod damaged;
mod lost;
mod not_logged;
mod unpublished;

const UUID: &str = "a guest";

/// Says when the guest is unlocked.
pub(crate) struct Lock(Trace);

impl Drop for Lock {
    fn drop(&mut self) {
        let _ = self.0.call("unlock");
    }
}

impl Guest for MockGuest {
    type Lock = Lock;

    fn domid(&self) -> DomId {
        DomId(3)
    }

    fn uuid(&self) -> &str {
        UUID
    }

    fn label(&self) -> String {
        "mock (3)".into()
    }

    fn check_uuid(&self) -> Result<()> {
        match self.shares_uuid.get() {
            true => Err(Error::not_applicable("domains 3 and 5 have the same UUID")),
            false => Ok(()),
        }
    }

    fn lock(&self, _: &Options) -> Result<Lock> {
        self.trace.call("lock")?;
        Ok(Lock(self.trace.clone()))
    }

    fn is_recovery_due(&self) -> Result<bool> {
        self.trace.call("is due")?;
        Ok(self.intent.borrow().is_some() || self.has_damaged_journal.get())
    }

    fn recover(&self, options: &Options) -> Result<recover::Report> {
        self.trace.call("recover")?;
        if self.is_busy.get() {
            return Err(Error::try_again("its guardian does not end"));
        }
        if self.is_strange.get() {
            return Err(Error::not_applicable("not a Linux kernel"));
        }
        let noted = match (self.has_damaged_journal.get(), self.intent.borrow().clone()) {
            (true, _) => Noted::Damaged("it is cut off".into()),
            (false, Some(intent)) => Noted::Intent(Box::new(intent)),
            (false, None) => Noted::Nothing,
        };
        recover::of_noted(self, &self.kernel(), &noted, Path::new("/kept"), options)
    }

    fn remove_journal(&self) -> Result<()> {
        self.trace.call("remove journal")?;
        self.has_damaged_journal.set(false);
        *self.intent.borrow_mut() = None;
        Ok(())
    }

    fn close_journal(&self) {
        let _ = self.trace.call("close journal");
        self.close();
    }

    fn keep_journal(&self, _took_place: bool) {
        self.ended.set(false);
    }

    fn note_unpublished(&self) -> Result<()> {
        self.trace.call("note")?;
        self.is_unpublished.set(true);
        Ok(())
    }

    fn is_unpublished(&self) -> bool {
        self.is_unpublished.get()
    }

    fn was_published(&self) {
        self.is_unpublished.set(false);
    }

    fn is_gone(&self) -> bool {
        self.trace.call("gone").is_err()
    }
}

/// A guest, a log and a store, whose calls are noted in one trace.
struct Host {
    guest: MockGuest,
    log: MockLog,
    store: MockStore,
    trace: Trace,
}

impl Host {
    fn new() -> Host {
        let trace = Trace::default();
        let mut guest = MockGuest::new();
        guest.keeps_journal.set(true);
        guest.trace = trace.clone();
        Host {
            guest,
            log: MockLog {
                trace: trace.clone(),
                lines: RefCell::default(),
            },
            store: MockStore {
                trace: trace.clone(),
                ..MockStore::default()
            },
            trace,
        }
    }

    /// A host where a run was interrupted that had applied the patch `one`.
    fn interrupted() -> Host {
        let host = Host::new();
        host.trace.fail("append");
        host.apply("one", false).unwrap();
        host.trace.fail("");
        host.trace.take();
        // Another process comes next, which does not know how that run ended.
        host.guest.ended.set(false);
        host.store.nodes.borrow_mut().clear();
        host
    }

    fn operator(&self) -> Operator<'_> {
        Operator {
            store: &self.store,
            audit: &self.log,
            who: "a test".into(),
            retries_after: Error::is_not_loaded,
        }
    }

    fn payload(name: &str) -> Payload {
        payload(name, &[usize::from(name != "one")])
    }

    fn apply(&self, name: &str, dry_run: bool) -> Result<Report> {
        let payload = Host::payload(name);
        let options = options(dry_run);
        apply(
            &self.operator(),
            &self.guest,
            &payload,
            Mode::Apply,
            &options,
        )
    }

    fn revert(&self, name: &str) -> Result<Report> {
        revert(&self.operator(), &self.guest, name, None, &options(false))
    }

    /// Patches in force, by the guest's memory.
    fn in_guest(&self) -> Vec<String> {
        let kernel = self.guest.kernel();
        let (patches, ..) = status::patches_by(&kernel, &self.log, None, |_| Ok(())).unwrap();
        patches.into_iter().map(|p| p.name).collect()
    }

    fn published(&self) -> Vec<String> {
        use crate::storage::xenstore::Nodes as _;
        let patches = self.store.children(&format!("{ROOT}/domain/3/patch"));
        patches.unwrap()
    }

    fn has_journal(&self) -> bool {
        self.guest.intent.borrow().is_some()
    }
}

#[test]
fn the_steps_come_in_the_order_that_is_promised() {
    let host = Host::new();
    host.apply("one", false).unwrap();
    let steps = [
        "open log",
        "lock",
        "is due",
        "begin",
        "remove",
        "write",
        "append",
        "close journal",
        "unlock",
    ];
    assert_eq!(host.trace.take(), steps);
    assert_eq!(host.log.told(), ["apply one applied"]);
    assert_eq!(host.published(), ["one"]);
    assert!(!host.has_journal());
}

#[test]
fn where_the_log_can_not_be_opened_nothing_begins() {
    let host = Host::new();
    host.trace.fail("open log");
    host.apply("one", false).unwrap_err();
    assert_eq!(host.trace.take(), ["open log"]);
    assert_eq!(host.in_guest(), [""; 0]);
    host.revert("one").unwrap_err();
    revert_all(&host.operator(), &host.guest, &options(false)).unwrap_err();
    assert_eq!(host.trace.take(), ["open log"]);
}

#[test]
fn where_the_lock_is_taken_nothing_begins_and_that_is_logged() {
    let host = Host::new();
    host.trace.fail("lock");
    host.apply("one", false).unwrap_err();
    let steps = ["open log", "lock", "append", "close journal"];
    assert_eq!(host.trace.take(), steps);
    assert_eq!(host.log.told(), ["apply one failed"]);
    assert_eq!(host.in_guest(), [""; 0]);
    host.trace.take();
    recover(&host.operator(), &host.guest, &options(false)).unwrap_err();
    look(&host.store, &host.log, &host.guest).unwrap_err();
    assert_eq!(host.trace.take(), ["lock"]);
}

#[test]
fn where_the_journal_can_not_be_written_nothing_is_changed_and_that_is_logged() {
    let host = Host::new();
    host.trace.fail("begin");
    host.apply("one", false).unwrap_err();
    assert_eq!(host.in_guest(), [""; 0]);
    assert_eq!(host.published(), [""; 0]);
    assert_eq!(host.log.told(), ["apply one failed"]);
    assert!(!host.has_journal());
}

#[test]
fn a_line_that_can_not_be_appended_keeps_the_journal_and_the_next_run_records_the_change() {
    let host = Host::new();
    host.trace.fail("append");
    host.apply("one", false).unwrap();
    assert_eq!(host.in_guest(), ["one"]);
    assert_eq!(host.trace.take().last(), Some(&"unlock"));
    assert!(host.has_journal());
    // As long as that lasts, nothing else begins.
    host.apply("two", false).unwrap_err();
    let steps = [
        "open log", "lock", "is due", "open log", "recover", "append", "gone", "append", "unlock",
    ];
    assert_eq!(host.trace.take(), steps);
    assert_eq!(host.in_guest(), ["one"]);
    assert!(host.has_journal());
    host.trace.fail("");
    host.apply("two", false).unwrap();
    assert_eq!(
        host.log.told(),
        ["recover one finished", "apply two applied"]
    );
    assert_eq!(host.log.lines.borrow()[0].of, "apply");
    assert_eq!(host.in_guest(), ["one", "two"]);
    assert!(!host.has_journal());
}

#[test]
fn a_journal_that_is_kept_outlives_a_later_operation_that_does_not_begin() {
    for fails in ["lock", "is due"] {
        let host = Host::new();
        host.trace.fail("append");
        host.apply("one", false).unwrap();
        host.trace.fail(fails);
        host.apply("two", false).unwrap_err();
        assert!(host.has_journal(), "{fails}");
        host.trace.fail("");
        host.apply("two", false).unwrap();
        let told = host.log.told();
        assert!(
            told.contains(&"recover one finished".into()),
            "{fails}: {told:?}"
        );
    }
}

#[test]
fn an_interrupted_run_that_can_not_be_recovered_lets_nothing_begin() {
    for fails in ["is due", "recover", "remove journal"] {
        let host = Host::interrupted();
        host.trace.fail(fails);
        host.apply("two", false).unwrap_err();
        assert!(!host.trace.take().contains(&"begin"), "{fails}");
        assert_eq!(host.in_guest(), ["one"], "{fails}");
        assert!(host.has_journal(), "{fails}");
        let last = host.log.told().pop();
        assert_eq!(last.as_deref(), Some("apply two failed"), "{fails}");
    }
}

#[test]
fn a_dry_run_logs_publishes_and_recovers_nothing() {
    let host = Host::interrupted();
    let report = host.apply("two", true).unwrap();
    assert_eq!(report.result, Outcome::WouldApply);
    assert_eq!(host.trace.take(), ["lock", "is due", "unlock"]);
    assert_eq!(host.log.told(), [""; 0]);
    assert_eq!(host.published(), [""; 0]);
    assert_eq!(host.in_guest(), ["one"]);
    assert!(host.has_journal());
}

#[test]
fn an_error_of_a_guest_that_is_gone_says_so() {
    let host = Host::new();
    host.trace.fail("gone");
    let act = |_: &locus_kernel::Kernel<'_>, _: &Options| -> Result<Report> {
        Err(Error::failed("its memory can't be read"))
    };
    let asked = Asked {
        operation: Operation::Revert,
        patch: "one",
        sha256: String::new(),
    };
    let error = host
        .operator()
        .run(&host.guest, &asked, &options(false), act);
    let said = error.unwrap_err().to_string();
    assert!(said.contains("is gone: it ended while"), "{said}");
    assert!(said.contains("can't be read"), "{said}");
}

#[test]
fn all_are_reverted_until_one_can_not_be_recorded() {
    let host = Host::new();
    host.apply("one", false).unwrap();
    host.apply("two", false).unwrap();
    let revert_all = || revert_all(&host.operator(), &host.guest, &options(false)).unwrap();
    host.trace.fail("append");
    let names: Vec<String> = revert_all().into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, ["two"]);
    assert_eq!(host.in_guest(), ["one"]);
    assert!(host.has_journal());
    host.trace.fail("");
    let names: Vec<String> = revert_all().into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, ["one"]);
    let told = host.log.told();
    assert_eq!(told[2..], ["recover two finished", "revert one reverted"]);
    assert_eq!(host.published(), [""; 0]);
}

#[test]
fn a_patch_that_was_lost_in_a_reboot_is_shown_until_it_is_reverted() {
    let before = Host::new();
    before.apply("one", false).unwrap();
    // The same log, and a guest that was rebooted.
    let host = Host {
        log: before.log,
        ..Host::new()
    };
    let states = || -> Vec<(String, PatchState)> {
        let status = look(&host.store, &host.log, &host.guest).unwrap();
        let all = status.patches.into_iter().map(|p| (p.name, p.state));
        all.collect()
    };
    let lost = PatchState::Gone(GoneReason::GuestRebooted);
    assert_eq!(states(), [("one".into(), lost)]);
    let places = |host: &Host| -> Vec<Option<usize>> {
        let status = look(&host.store, &host.log, &host.guest).unwrap();
        status.patches.iter().map(|p| p.place).collect()
    };
    assert_eq!(places(&host), [Some(0)]);
    let state = host
        .store
        .value(&format!("{ROOT}/domain/3/patch/one/state"));
    assert_eq!(state.as_deref(), Some("gone"));
    let wrong = revert(
        &host.operator(),
        &host.guest,
        "one",
        Some("00"),
        &options(false),
    );
    assert!(wrong.unwrap_err().to_string().contains("SHA-256"));
    let dry = revert(&host.operator(), &host.guest, "one", None, &options(true)).unwrap();
    assert_eq!(dry.result.name(), "already");
    assert!(dry.to_string().contains("would not be listed"), "{dry}");
    assert_eq!(states(), [("one".into(), lost)]);
    assert_eq!(host.revert("one").unwrap().result, Outcome::AlreadyLost);
    assert_eq!(states(), []);
}

#[test]
fn a_guest_whose_uuid_another_domain_has_is_not_changed_and_nothing_of_the_log_is_said_of_it() {
    let host = Host::interrupted();
    host.apply("two", false).unwrap();
    // Its twin has none of these patches.
    let twin = Host {
        log: host.log,
        ..Host::new()
    };
    let look = |twin: &Host| look(&twin.store, &twin.log, &twin.guest);
    look(&twin).unwrap();
    assert_eq!(twin.published(), ["one", "two"]);
    twin.guest.shares_uuid.set(true);
    // It is looked at again, because the other one may go.
    look(&twin).unwrap_err();
    assert_eq!(twin.published(), [""; 0]);
    let refused = [
        twin.apply("one", false).unwrap_err(),
        twin.apply("one", true).unwrap_err(),
        twin.revert("one").unwrap_err(),
        revert_all(&twin.operator(), &twin.guest, &options(false)).unwrap_err(),
    ];
    for error in refused {
        assert!(error.to_string().contains("domains 3 and 5"), "{error}");
    }
    assert_eq!(twin.in_guest(), [""; 0]);
    // Nor is a journal believed that may be the other's.
    let other = Host::interrupted();
    other.guest.shares_uuid.set(true);
    other.apply("two", false).unwrap_err();
    assert!(!other.trace.take().contains(&"recover"));
    assert!(other.has_journal());
}
