//! What `prepare` finds of payloads for the mock guest, and what it plans.

use super::*;
use crate::arena::record::State;
use crate::error::{Class, ExitCode};
use crate::machine::mock::{payload, Guest, A, B, C, FUNCTIONS};

fn prepared(guest: &Guest, payload: &Payload, mode: Mode) -> Result<Readiness> {
    let kernel = guest.kernel();
    prepare(&kernel, &Arena::read(&kernel)?, payload, mode)
}

fn ready(guest: &Guest, payload: &Payload, mode: Mode) -> Box<Prepared> {
    match prepared(guest, payload, mode).unwrap() {
        Readiness::Ready(ready) => ready,
        Readiness::Already(_) => panic!("it is applied already"),
    }
}

#[test]
fn each_precondition_names_what_does_not_fit() {
    let guest = Guest::new();
    let refused = |change: fn(&mut Payload), words: &str| {
        let mut payload = payload("one", &[A]);
        change(&mut payload);
        let error = prepared(&guest, &payload, Mode::Apply).unwrap_err();
        assert_eq!(error.class(), Class::NotApplicable, "{error}");
        assert!(error.to_string().contains(words), "{error}");
    };
    let release = |p: &mut Payload| p.modinfo.vermagic = "6.1.0 SMP".into();
    refused(release, "its vermagic is \"6.1.0 SMP\"");
    let build = |p: &mut Payload| p.modinfo.target_build_id = Some(vec![0xab; 20]);
    refused(build, "was made for the kernel with build-id abab");
    let twice = |p: &mut Payload| {
        let again = p.klp.objects[0].funcs[0].clone();
        p.klp.objects[0].funcs.push(again);
    };
    refused(twice, "it replaces a_show twice");
    refused(|p| p.klp.objects.clear(), "it replaces no function");
    // Of two that do not hold the first in the list is named.
    let both = |p: &mut Payload| {
        p.modinfo.vermagic = "6.1.0 SMP".into();
        p.modinfo.target_build_id = Some(vec![0xab; 20]);
    };
    refused(both, "its vermagic is");
}

#[test]
fn a_guest_whose_code_is_guarded_by_lkrg_is_left_alone_both_ways() {
    for name in ["lkrg", "p_lkrg"] {
        let guest = Guest::new();
        // A module of this name, and a patch in force.
        guest.applied(&payload(name, &[B]));
        let refused = |error: Error| {
            assert_eq!(error.class(), Class::NotApplicable, "{error}");
            let said = error.to_string();
            assert!(
                said.contains(&format!("module {name} (LKRG)")) && said.contains("panics"),
                "{said}"
            );
        };
        for mode in [Mode::Apply, Mode::Replace] {
            refused(prepared(&guest, &payload("one", &[A]), mode).unwrap_err());
        }
        let residents = guest.residents().unwrap();
        let stack = PatchStack::new(&residents);
        refused(undo(&guest.kernel(), &stack, &residents[0]).unwrap_err());
    }
    // Built into the kernel.
    for name in ["p_integrity_timer", "p_check_integrity"] {
        let guest = Guest::with(|f| f.function(FUNCTIONS[A].1 + 0x400, name, &[0xc3]));
        let error = prepared(&guest, &payload("one", &[A]), Mode::Apply).unwrap_err();
        assert_eq!(error.class(), Class::NotApplicable, "{error}");
        let said = error.to_string();
        assert!(
            said.contains("LKRG is built into") && said.contains(name),
            "{said}"
        );
    }
    let guest = Guest::new();
    guest.applied(&payload("lkrg_not", &[B]));
    ready(&guest, &payload("one", &[A]), Mode::Apply);
}

#[test]
fn nothing_is_written_while_a_payload_is_prepared() {
    let guest = Guest::new();
    guest.left.set(0);
    let ready = ready(&guest, &payload("one", &[A, B]), Mode::Apply);
    assert_eq!(ready.parked, None);
    assert!(ready.superseded.is_empty());
    assert_eq!(ready.record.functions.len(), 2);
    assert_eq!(ready.record.encode().unwrap(), ready.record_json);
    let record = &ready.image.bytes[ready.record_place.clone()];
    assert!(record.starts_with(&ready.record_json));
    // The redirects come last, each from the bytes that are there to a jump.
    let redirects = &ready.plan.writes[ready.plan.writes.len() - 2..];
    for (write, function) in redirects.iter().zip(&ready.record.functions) {
        assert_eq!(write.at, function.site);
        assert_eq!(write.expect, guest.peek::<5>(write.at.0));
        assert_eq!(write.new, function.new_bytes);
    }
}

#[test]
fn another_payload_of_an_applied_name_is_refused_with_both_digests() {
    let guest = Guest::new();
    guest.applied(&payload("one", &[A]));
    let mut other = payload("one", &[A]);
    other.sha256 = [0xee; 32];
    for mode in [Mode::Apply, Mode::Replace] {
        let said = prepared(&guest, &other, mode).unwrap_err().to_string();
        assert!(
            said.contains(&"ee".repeat(32)) && said.contains(&"6f".repeat(32)),
            "{said}"
        );
    }
}

#[test]
fn a_payload_that_is_applied_is_found_so_and_can_not_supersede_itself() {
    let guest = Guest::new();
    let one = payload("one", &[A]);
    guest.applied(&one);
    for mode in [Mode::Apply, Mode::Replace] {
        let found = prepared(&guest, &one, mode).unwrap();
        assert!(matches!(found, Readiness::Already(r) if r.record.name == "one"));
    }
    guest.applied(&payload("two", &[B]));
    let error = prepared(&guest, &one, Mode::Replace).unwrap_err();
    assert_eq!(error.exit_code(), ExitCode::Failed);
    assert!(
        error.to_string().contains("can't supersede itself"),
        "{error}"
    );
}

#[test]
fn parked_code_is_taken_over_with_its_pages_whatever_it_lies_on() {
    let guest = Guest::new();
    let one = payload("one", &[A]);
    let before = ready(&guest, &one, Mode::Apply);
    guest.applied(&one);
    guest.revert("one").unwrap();
    // What lies below now has another redirect at the site, and more digits in the record.
    guest.applied(&payload("two", &[A, C]));
    let again = ready(&guest, &one, Mode::Apply);
    assert_eq!((again.parked, again.first), (Some(0), before.first));
    assert_eq!(again.layout.record, before.layout.record);
    let [first, second] = before.layout.record.places();
    assert_eq!(
        (&before.record_place, &again.record_place),
        (&first, &second)
    );
    assert_eq!(again.fresh, [second], "nothing but the record");
    let found = again.record.functions[0].found;
    assert_eq!(found, guest.peek::<5>(FUNCTIONS[A].1 + 5));
    assert_ne!(found, before.record.functions[0].found);
    // Another file of the same name has pages of its own.
    let mut other = one;
    other.sha256 = [1; 32];
    assert_eq!(ready(&guest, &other, Mode::Apply).parked, None);
}

#[test]
fn the_way_back_is_refused_under_another_patch_and_puts_back_what_was_found() {
    let guest = Guest::new();
    guest.applied(&payload("one", &[A]));
    guest.applied(&payload("two", &[A, B]));
    let kernel = guest.kernel();
    let residents = guest.residents().unwrap();
    let stack = PatchStack::new(&residents);
    let error = undo(&kernel, &stack, &residents[0]).unwrap_err();
    assert!(error.to_string().contains("revert two first"), "{error}");
    let plan = undo(&kernel, &stack, &residents[1]).unwrap();
    let functions = &residents[1].record.functions;
    let changes: Vec<&Write> = plan.writes.iter().filter(|w| w.changes()).collect();
    assert_eq!(changes.len(), functions.len());
    for (write, function) in changes.into_iter().zip(functions) {
        assert_eq!(write.expect, function.new_bytes);
        assert_eq!(write.new, function.found);
    }
}

#[test]
fn the_directory_takes_the_states_that_follow_from_the_text() {
    let guest = Guest::new();
    guest.applied(&payload("one", &[A]));
    let kernel = guest.kernel();
    let mut arena = Arena::read(&kernel).unwrap();
    arena.directory.slots[0].state = State::Reverting;
    resolve_interrupted(&kernel, &mut arena).unwrap();
    assert_eq!(arena.directory.slots[0].state, State::Applied);
}
