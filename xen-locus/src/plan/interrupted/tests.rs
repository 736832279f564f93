use State::{Applied, Applying, Parked, Reverting};

use super::*;
use crate::arena::record::Function;
use crate::error::Class;
use crate::machine::mock::{payload, Guest, A, B, FUNCTIONS};

/// A guest in which `two` is applied on `one`.
fn guest() -> Guest {
    let guest = Guest::new();
    guest.applied(&payload("one", &[A]));
    guest.applied(&payload("two", &[A, B]));
    guest
}

/// What follows where the directory shows these states.
fn resolved(guest: &Guest, states: [State; 2]) -> Result<[State; 2]> {
    let kernel = guest.kernel();
    let arena = crate::arena::Arena::read(&kernel)?;
    let mut residents = arena.residents(&kernel)?;
    for (resident, state) in residents.iter_mut().zip(states) {
        resident.slot.state = state;
    }
    resolve(&kernel, &mut residents)?;
    Ok([0, 1].map(|n| residents[n].slot.state))
}

/// Puts the old bytes or the new ones of function `n` of `two` in place.
fn put(guest: &Guest, n: usize, bytes: fn(&Function) -> [u8; 5]) {
    let two = &guest.residents().unwrap()[1].record;
    guest.poke(two.functions[n].site.0, &bytes(&two.functions[n]));
}

#[test]
fn a_change_of_which_all_bytes_are_new_took_place() {
    let guest = guest();
    let found = resolved(&guest, [Applied, Applying]).unwrap();
    assert_eq!(found, [Applied, Applied]);
    // A revert of it has not begun.
    let found = resolved(&guest, [Applied, Reverting]).unwrap();
    assert_eq!(found, [Applied, Applied]);
}

#[test]
fn a_change_of_which_all_bytes_are_old_did_not_take_place() {
    let guest = guest();
    for n in [0, 1] {
        put(&guest, n, |f| f.found);
    }
    let found = resolved(&guest, [Applied, Applying]).unwrap();
    assert_eq!(found, [Applied, Parked]);
    let found = resolved(&guest, [Applied, Reverting]).unwrap();
    assert_eq!(found, [Applied, Parked]);
}

#[test]
fn a_change_of_which_some_bytes_are_old_and_some_new_is_uncertain() {
    for n in [0, 1] {
        let guest = guest();
        put(&guest, n, |f| f.found);
        for states in [[Applied, Applying], [Applied, Reverting]] {
            let error = resolved(&guest, states).unwrap_err();
            assert_eq!(error.class(), Class::Uncertain);
            assert!(error.to_string().contains("neither wholly"), "{error}");
        }
    }
}

#[test]
fn bytes_that_are_neither_old_nor_new_are_uncertain() {
    let guest = guest();
    guest.poke(FUNCTIONS[B].1 + 5, &[0xcc; 5]);
    let error = resolved(&guest, [Applied, Applying]).unwrap_err();
    assert_eq!(error.class(), Class::Uncertain);
}

#[test]
fn patches_that_are_superseded_go_when_the_new_one_comes() {
    let guest = Guest::new();
    guest.applied(&payload("one", &[B]));
    let found = |guest: &Guest| resolved(guest, [Reverting, Applying]);
    guest
        .apply(&payload("two", &[A]), crate::plan::Mode::Replace)
        .unwrap();
    assert_eq!(found(&guest).unwrap(), [Parked, Applied]);
    put(&guest, 0, |f| f.found);
    // The function that is given back is, and the own one is not replaced.
    assert_eq!(found(&guest).unwrap_err().class(), Class::Uncertain);
    let one = &crate::apply::mock::kernel_residents(&guest.kernel())[0]
        .record
        .functions[0];
    guest.poke(one.site.0, &one.new_bytes);
    assert_eq!(found(&guest).unwrap(), [Applied, Parked]);
}

#[test]
fn without_a_change_under_way_all_stays_and_two_at_once_are_uncertain() {
    let guest = guest();
    for states in [[Applied, Applied], [Parked, Applied], [Parked, Parked]] {
        assert_eq!(resolved(&guest, states).unwrap(), states);
    }
    let error = resolved(&guest, [Applying, Applying]).unwrap_err();
    assert_eq!(error.class(), Class::Uncertain);
}
