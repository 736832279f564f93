//! A guest that is another one since the run, or that is not on this host.

use super::*;

#[test]
fn a_guest_that_started_anew_at_the_same_place_has_not_finished_anything() {
    let guest = Guest::new();
    guest.applied(&payload("one", &[A]));
    let change = |op, generation| Change {
        generation,
        ..Change::of(&guest.kernel(), op, "one", &[], std::iter::empty())
    };
    let of = |guest: &Guest, change: &Change| {
        guest.begin(change).unwrap();
        let intent = guest.intent.take();
        let found = of_guest(guest, &guest.kernel(), intent.as_ref(), &options(false));
        found.unwrap().result
    };
    let anew = Guest::new();
    for op in [Operation::Reclaim, Operation::Revert, Operation::Apply] {
        assert_eq!(of(&anew, &change(op, Some(2))), Finding::Gone);
        // The same guest: it is not there, as it should be.
        let finding = match op {
            Operation::Apply => Finding::Undone,
            _ => Finding::Finished,
        };
        assert_eq!(of(&guest, &change(op, Some(1))), finding);
        // From a save before the change.
        assert_eq!(of(&guest, &change(op, Some(9))), Finding::Gone);
    }
    // A build before this one did not note it.
    for op in [Operation::Reclaim, Operation::Revert] {
        assert_eq!(of(&anew, &change(op, None)), Finding::Gone);
    }
    assert_eq!(of(&anew, &change(Operation::Apply, None)), Finding::Undone);
}

#[test]
fn a_change_that_took_place_and_was_not_logged_is_logged_though_the_guest_rebooted() {
    let guest = Guest::new();
    let anew = |generation, build_id: Option<&str>| {
        let mut change = Change {
            generation,
            ..Change::of(
                &guest.kernel(),
                Operation::Apply,
                "one",
                &[],
                std::iter::empty(),
            )
        };
        if let Some(build_id) = build_id {
            change.build_id = build_id.to_owned();
        }
        guest.begin(&change).unwrap();
        guest.intent.take().unwrap()
    };
    for mut intent in [anew(Some(9), None), anew(None, Some("00"))] {
        let of = |intent: &Intent| {
            of_guest(&guest, &guest.kernel(), Some(intent), &options(false)).unwrap()
        };
        assert_eq!(of(&intent).result, Finding::Gone);
        intent.is_done = true;
        let found = of(&intent);
        assert_eq!(found.result, Finding::Finished, "{found}");
        assert_eq!(found.patch.as_deref(), Some("one"));
    }
}

#[test]
fn the_journal_of_a_guest_that_is_not_here_is_kept() {
    let dir = std::env::temp_dir().join(format!("xen-locus-absent-{}", std::process::id()));
    let _ = fs::remove_dir_all(&dir);
    let journal = Journal::within(&dir, "01234567-89ab-cdef-0123-456789abcdef");
    let of = || of_absent_by(&journal).unwrap();
    assert_eq!(of().detail, "the guest is not on this host now");
    let guest = Guest::new();
    let change = Change::of(
        &guest.kernel(),
        Operation::Apply,
        "one",
        &[],
        std::iter::empty(),
    );
    guest.begin(&change).unwrap();
    let mut intent = guest.intent.take().unwrap();
    intent.uuid = "01234567-89ab-cdef-0123-456789abcdef".to_owned();
    journal.begin(&intent).unwrap();
    let found = of();
    assert_eq!(
        (found.result, found.patch.as_deref()),
        (Finding::Gone, Some("one"))
    );
    assert!(found.detail.contains("is kept until it is back"), "{found}");
    assert!(journal.exists());
    // What can't be believed is kept too.
    fs::write(journal.path(), "cut").unwrap();
    assert!(of().detail.contains("cut off"));
    assert!(journal.exists());
    fs::remove_dir_all(&dir).unwrap();
}
