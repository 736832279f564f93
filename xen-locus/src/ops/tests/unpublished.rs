//! The status of a guest is published. What a run did not publish is published by the next one, or by the daemon.

use super::*;

/// An operation that is refused.
fn refused(host: &Host) {
    let asked = Asked {
        operation: Operation::Apply,
        patch: "refused",
        sha256: String::new(),
    };
    let act = |_: &locus_kernel::Kernel<'_>, _: &Options| Err(Error::not_applicable("refused"));
    host.operator()
        .run(&host.guest, &asked, &options(false), act)
        .unwrap_err();
}

#[test]
fn what_was_not_published_is_published_by_the_next_run_whatever_comes_of_that() {
    let host = Host::new();
    host.trace.fail("write");
    host.apply("one", false).unwrap();
    assert!(host.guest.is_unpublished.get());
    host.trace.fail("");
    refused(&host);
    assert_eq!(host.published(), ["one"]);
    assert!(!host.guest.is_unpublished.get());
    // Where there is nothing of that kind, nothing is published.
    host.store.nodes.borrow_mut().clear();
    refused(&host);
    assert_eq!(host.published(), [""; 0]);
}

#[test]
fn what_was_settled_is_published_although_the_operation_is_refused() {
    let host = Host::interrupted();
    refused(&host);
    assert_eq!(
        host.log.told(),
        ["recover one finished", "apply refused not-applicable"]
    );
    assert!(!host.has_journal());
    assert_eq!(host.published(), ["one"]);
    // Where that fails too, it is not forgotten.
    let host = Host::interrupted();
    host.trace.fail("write");
    refused(&host);
    assert_eq!(host.published(), [""; 0]);
    assert!(host.guest.is_unpublished.get());
    host.trace.fail("");
    look(&host.store, &host.log, &host.guest).unwrap();
    assert_eq!(host.published(), ["one"]);
    assert!(!host.guest.is_unpublished.get());
}

#[test]
fn that_several_patches_are_changed_is_noted_before_the_first_line() {
    let host = Host::new();
    host.apply("one", false).unwrap();
    host.apply("two", false).unwrap();
    host.trace.take();
    revert_all(&host.operator(), &host.guest, &options(false)).unwrap();
    let steps = host.trace.take();
    let place = |step| steps.iter().position(|&s| s == step).unwrap();
    assert!(place("note") < place("append"), "{steps:?}");
    assert!(!host.guest.is_unpublished.get());
}

#[test]
fn what_goes_wrong_with_all_patches_is_recorded() {
    for fails in ["lock", "is due"] {
        let host = Host::new();
        host.trace.fail(fails);
        let dry = || revert_all(&host.operator(), &host.guest, &options(true)).unwrap_err();
        dry();
        assert_eq!(host.log.told(), [""; 0]);
        revert_all(&host.operator(), &host.guest, &options(false)).unwrap_err();
        reclaim(&host.operator(), &host.guest, &[], &options(false)).unwrap_err();
        let told = host.log.told();
        assert_eq!(told, ["revert  failed", "reclaim  failed"], "{fails}");
    }
    let host = Host::new();
    host.guest.shares_uuid.set(true);
    revert_all(&host.operator(), &host.guest, &options(false)).unwrap_err();
    assert_eq!(host.log.told(), ["revert  not-applicable"]);
}

#[test]
fn what_can_not_be_published_is_done_and_recorded_all_the_same() {
    let host = Host::new();
    host.trace.fail("write");
    let report = host.apply("one", false).unwrap();
    assert_eq!(report.result, Outcome::Applied);
    assert_eq!(host.in_guest(), ["one"]);
    assert_eq!(host.published(), [""; 0]);
    assert_eq!(host.log.told(), ["apply one applied"]);
    assert!(!host.has_journal());
    assert!(host.guest.is_unpublished.get());
}

#[test]
fn recover_records_publishes_and_removes_the_journal_in_that_order() {
    let host = Host::interrupted();
    let recover = || recover(&host.operator(), &host.guest, &options(false)).unwrap();
    assert_eq!(recover().result, Finding::Finished);
    let steps = [
        "lock",
        "open log",
        "recover",
        "append",
        "note",
        "remove journal",
        "remove",
        "write",
        "unlock",
    ];
    assert_eq!(host.trace.take(), steps);
    assert_eq!(host.published(), ["one"]);
    // What is recovered is no line.
    assert_eq!(recover().result, Finding::NothingToDo);
    assert_eq!(host.log.told(), ["recover one finished"]);
}
