//! A guest that hibernated while it was patched.

use super::*;
use crate::error::ExitCode;
use crate::storage::audit::Log as _;
use crate::verify::{verify, HostRecords};

#[test]
fn a_guest_that_came_back_without_the_arenas_memory_is_told_as_such() {
    let host = Host::new();
    host.apply("one", false).unwrap();
    host.guest.loses_arena();
    let status = look(&host.store, &host.log, &host.guest).unwrap();
    let [patch] = &status.patches[..] else {
        panic!("{:?}", status.patches)
    };
    assert_eq!(patch.state, PatchState::Gone(GoneReason::MemoryLost));
    // It is not applied again.
    assert!(!patch.state.is_lost());
    assert!(patch.state.to_string().contains("reboot it now"));
    let state = format!("{ROOT}/domain/3/patch/one/state");
    assert_eq!(host.store.value(&state).as_deref(), Some("gone"));
    let kernel = host.guest.kernel();
    let recovered = recover::of_guest(&host.guest, &kernel, None, &options(false));
    for error in [
        host.apply("two", false).unwrap_err(),
        host.revert("one").unwrap_err(),
        recovered.unwrap_err(),
        // Without the log it can't be told which patches it had.
        patches(&kernel, None).unwrap_err(),
    ] {
        assert!(error.is_arena_lost(), "{error}");
        assert_eq!(error.exit_code(), ExitCode::NotApplicable);
    }
    let known = HostRecords {
        log: &[],
        uuid: UUID,
        in_force: host.log.in_force(UUID).unwrap(),
    };
    for (known, patch) in [(Some(&known), "one"), (None, "unknown")] {
        let drift = verify(&kernel, known).unwrap().drift;
        assert_eq!((drift.len(), &*drift[0].patch), (1, patch));
        assert!(drift[0].found.contains("reboot it now"), "{drift:?}");
    }
}

#[test]
fn a_guest_that_ends_while_it_is_looked_at_did_not_hibernate() {
    let host = Host::new();
    host.apply("one", false).unwrap();
    host.guest.loses_arena();
    host.trace.fail("gone");
    let error = look(&host.store, &host.log, &host.guest).unwrap_err();
    assert!(error.to_string().contains("is gone: it ended"), "{error}");
}

#[test]
fn what_was_reclaimed_before_is_not_missed() {
    let host = Host::new();
    host.apply("one", false).unwrap();
    host.revert("one").unwrap();
    host.guest.loses_arena();
    // Its module is still in the guest's lists.
    let error = host.apply("two", false).unwrap_err();
    assert!(error.is_arena_lost(), "{error}");
    let host = Host::new();
    host.apply("one", false).unwrap();
    host.revert("one").unwrap();
    let guest = &host.guest;
    let (kernel, names) = (guest.kernel(), ["one".to_owned()]);
    crate::reclaim::reclaim(guest, &kernel, &names, &options(false), |_, gone| {
        gone.unwrap();
        true
    })
    .unwrap();
    guest.loses_arena();
    assert_eq!(
        look(&host.store, &host.log, guest).unwrap().patches.len(),
        0
    );
    host.apply("two", false).unwrap();
    assert_eq!(guest.status().unwrap(), ["two"]);
}

#[test]
fn all_that_are_reverted_are_those_that_were_lost_too_and_each_has_a_line() {
    let before = Host::new();
    before.apply("one", false).unwrap();
    before.apply("two", false).unwrap();
    // The same log, and a guest that was rebooted. One of the patches is applied again.
    let host = Host {
        log: before.log,
        ..Host::new()
    };
    host.log.trace.take();
    host.apply("two", false).unwrap();
    let all = |dry_run| -> Vec<(String, Outcome)> {
        let all = revert_all(&host.operator(), &host.guest, &options(dry_run)).unwrap();
        let all = all
            .into_iter()
            .map(|(name, result)| (name, result.unwrap().result));
        all.collect()
    };
    let would = [
        ("two".into(), Outcome::WouldRevert),
        ("one".into(), Outcome::WouldForget),
    ];
    assert_eq!(all(true), would);
    let lines = host.log.told().len();
    let done = [
        ("two".into(), Outcome::Reverted),
        ("one".into(), Outcome::AlreadyLost),
    ];
    assert_eq!(all(false), done);
    assert_eq!(
        host.log.told()[lines..],
        ["revert two reverted", "revert one already"]
    );
    assert_eq!(host.log.in_force(UUID).unwrap(), []);
    assert_eq!(host.published(), [""; 0]);
    assert_eq!(all(false), []);
}
