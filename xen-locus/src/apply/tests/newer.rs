//! What a newer xen-locus left in the guest is refused, and stays as it is.

use locus_guest::addr::PAGE_LEN;

use super::*;
use crate::arena::record::tests::newer::{of_next_version, of_unknown_state};
use crate::arena::record::COPY;
use crate::arena::BASE;
use crate::machine::mock::code;

/// The arena's directory with both of its copies.
fn page(guest: &Guest) -> [u8; PAGE_LEN] {
    guest.peek(BASE.0)
}

#[test]
fn a_newer_directory_is_refused_and_stays_as_it_is() {
    for make_newer in [of_next_version, of_unknown_state] {
        let guest = Guest::new();
        guest.applied(&payload("one", &[A]));
        let mut newer = page(&guest);
        // The copy that counts was written last.
        let half = match Arena::read(&guest.kernel()).unwrap().directory.generation % 2 {
            0 => 0,
            _ => COPY,
        };
        make_newer(&mut newer[half..half + COPY]);
        guest.poke(BASE.0, &newer);
        let kernel = guest.kernel();
        let recovered = crate::recover::of_guest(&guest, &kernel, None, &options(false));
        for error in [
            guest.apply(&payload("two", &[B]), Mode::Apply).unwrap_err(),
            guest.revert("one").unwrap_err(),
            recovered.unwrap_err(),
        ] {
            assert_eq!(error.exit_code(), ExitCode::NotApplicable, "{error}");
            assert!(error.is_newer_format(), "{error}");
        }
        assert_eq!(page(&guest), newer);
        assert!(guest.intent.borrow().is_none());
        assert_ne!(guest.peek::<11>(FUNCTIONS[A].1), code(A as u8));
        assert_eq!(guest.peek::<11>(FUNCTIONS[B].1), code(B as u8));
    }
}

/// `one` is applied, and its journal was kept; `two` is parked.
fn with_kept_journal() -> Guest {
    let guest = Guest::new();
    guest.applied(&payload("two", &[B]));
    guest.revert("two").unwrap();
    guest.keeps_journal.set(true);
    guest.applied(&payload("one", &[A]));
    assert!(guest.intent.borrow().is_some());
    guest
}

/// All of the text that patches may change, and the directory.
fn all(guest: &Guest) -> (Vec<[u8; 11]>, [u8; PAGE_LEN]) {
    let text = FUNCTIONS.map(|(_, at)| guest.peek(at));
    (text.to_vec(), page(guest))
}

fn recover(guest: &Guest) -> Error {
    let intent = guest.intent.borrow().clone();
    let found = crate::recover::of_guest(guest, &guest.kernel(), intent.as_ref(), &options(false));
    found.unwrap_err()
}

#[test]
fn a_newer_record_keeps_everything_as_it_is_and_is_listed() {
    let guest = with_kept_journal();
    guest.make_newer("two");
    let before = all(&guest);
    let kernel = guest.kernel();
    let none = |_: &str, _| true;
    let names = ["two".to_owned()];
    let others = [
        recover(&guest),
        guest.revert("two").unwrap_err(),
        revert_all(&guest, &kernel, &options(false), none).unwrap_err(),
        crate::reclaim::reclaim(&guest, &kernel, &names, &options(false), none).unwrap_err(),
    ];
    let refused = guest.refused(&payload("three", &[C]), "one");
    for error in refused.into_iter().chain(others) {
        assert_eq!(error.exit_code(), ExitCode::NotApplicable, "{error}");
        assert!(error.to_string().contains("payload two"), "{error}");
        assert!(error.to_string().contains("newer xen-locus"), "{error}");
    }
    assert_eq!(all(&guest), before);
    assert!(guest.intent.borrow().is_some());
    let shown = crate::ops::patches(&kernel, None).unwrap();
    let shown: Vec<(&str, &str, usize)> = shown
        .iter()
        .map(|p| (&*p.name, p.state.name(), p.functions.len()))
        .collect();
    assert_eq!(shown, [("one", "applied", 1), ("two", "unknown", 0)]);
    let outcome = crate::verify::verify(&kernel, None).unwrap();
    assert_eq!((outcome.patches, outcome.drift), (1, Vec::new()));
    assert_eq!(outcome.unknown, ["two"]);
}

#[test]
fn a_damaged_record_of_another_payload_undoes_nothing() {
    let guest = with_kept_journal();
    let residents = guest.residents().unwrap();
    let two = residents.iter().find(|r| r.record.name == "two").unwrap();
    let at = crate::arena::page_address(two.slot.first.into());
    let at = at.plus(two.slot.record_offset.into()).0 + 9;
    guest.poke(at, &[guest.peek::<1>(at)[0] ^ 1]);
    let before = all(&guest);
    let error = recover(&guest);
    assert_eq!(error.exit_code(), ExitCode::Uncertain, "{error}");
    assert!(error.to_string().contains("another digest"), "{error}");
    assert_eq!(all(&guest), before);
}

#[test]
fn a_torn_change_is_undone_by_no_other_ones_journal() {
    let guest = with_kept_journal();
    let kept = guest.intent.borrow().clone();
    let site = FUNCTIONS[C].1 + 5;
    let kernel_bytes: [u8; 5] = guest.peek(site);
    guest.applied(&payload("three", &[C]));
    let mut arena = Arena::read(&guest.kernel()).unwrap();
    let mut slots = arena.directory.slots.clone();
    slots.last_mut().unwrap().state = State::Applying;
    arena.commit(&guest, &guest.kernel(), slots).unwrap();
    // Two bytes of its redirect are in the guest.
    guest.poke(site + 2, &kernel_bytes[2..]);
    *guest.intent.borrow_mut() = kept;
    let before = all(&guest);
    let error = recover(&guest);
    assert!(error.torn().is_some_and(|t| t.patch == "three"), "{error}");
    assert_eq!(error.exit_code(), ExitCode::Uncertain);
    assert_eq!(all(&guest), before);
}

#[test]
fn what_a_newer_payload_covers_has_not_drifted() {
    let guest = Guest::new();
    guest.applied(&payload("one", &[A]));
    guest.applied(&payload("two", &[A]));
    guest.make_newer("two");
    let shown = crate::ops::patches(&guest.kernel(), None).unwrap();
    assert_eq!(shown[0].state.name(), "applied");
    assert_eq!(shown[0].functions[0].covered_by.as_deref(), Some("two"));
    let outcome = crate::verify::verify(&guest.kernel(), None).unwrap();
    assert_eq!(outcome.drift, []);
    // It is changing: of the others nothing can be told.
    let kernel = guest.kernel();
    let mut arena = Arena::read(&kernel).unwrap();
    let mut slots = arena.directory.slots.clone();
    slots[1].state = State::Reverting;
    arena.commit(&guest, &kernel, slots).unwrap();
    let error = crate::ops::patches(&kernel, None).unwrap_err();
    assert!(error.is_newer_format(), "{error}");
}
