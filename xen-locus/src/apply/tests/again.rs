//! Payloads that are applied again, and payloads that use others.

use locus_guest::addr::PAGE_SIZE;

use super::*;
use crate::arena::page_address;
use crate::arena::record::Record;
use crate::machine::mock::using;
use crate::verify;

/// Makes all records as an earlier build wrote them, and the directory with them.
fn as_by_an_earlier_build(guest: &Guest) {
    let kernel = guest.kernel();
    let mut arena = Arena::read(&kernel).unwrap();
    let mut slots = arena.directory.slots.clone();
    for resident in arena.residents(&kernel).unwrap() {
        let record = Record {
            record_room: None,
            uses: None,
            ..resident.record
        };
        let json = record.encode().unwrap();
        let slot = &mut slots[resident.index];
        let at = page_address(slot.first.into()).plus(slot.record_offset.into());
        guest.poke(at.0, &vec![0; slot.record_len as usize]);
        guest.poke(at.0, &json);
        slot.record_len = json.len() as u32;
        slot.record_sha256 = Sha256::digest(&json).into();
    }
    arena.commit(guest, &kernel, slots).unwrap();
}

fn resident(guest: &Guest, name: &str) -> Resident {
    let residents = guest.residents().unwrap();
    let mut named = residents.into_iter().filter(|r| r.record.name == name);
    named.next_back().unwrap()
}

#[test]
fn what_ran_keeps_its_variables_when_it_is_applied_again() {
    let guest = Guest::new();
    let one = payload("one", &[A]);
    guest.applied(&one);
    let Record {
        text, rodata_len, ..
    } = resident(&guest, "one").record;
    let variable = text.0 .0 + PAGE_SIZE + rodata_len;
    guest.poke(variable, &[0xa5; 8]);
    guest.revert("one").unwrap();
    // Not even an attempt that is blocked may change them.
    guest.sleep_at(FUNCTIONS[A].1 + 10);
    guest.apply(&one, Mode::Apply).unwrap_err();
    assert_eq!(guest.peek::<8>(variable), [0xa5; 8]);
    guest.sleep_at(0);
    let pages = guest.pages();
    guest.applied(&one);
    assert_eq!(guest.peek::<8>(variable), [0xa5; 8]);
    assert_eq!(guest.pages(), pages);
}

#[test]
fn a_record_goes_to_the_place_that_the_directory_does_not_lead_to() {
    let guest = Guest::new();
    let one = payload("one", &[A]);
    let mut offsets = Vec::new();
    for _ in 0..3 {
        guest.applied(&one);
        offsets.push(resident(&guest, "one").slot.record_offset);
        guest.is_as_recorded();
        guest.revert("one").unwrap();
    }
    assert_ne!(offsets[0], offsets[1]);
    assert_eq!(offsets[0], offsets[2]);
    assert_eq!(guest.residents().unwrap().len(), 1);
}

#[test]
fn a_parked_payload_of_an_earlier_build_stays_as_it_is() {
    let guest = Guest::new();
    let one = payload("one", &[A]);
    guest.applied(&one);
    as_by_an_earlier_build(&guest);
    assert_eq!(verify::verify(&guest.kernel(), None).unwrap().drift, []);
    guest.revert("one").unwrap();
    let before = resident(&guest, "one");
    guest.applied(&one);
    // It has room for one record only, so the payload takes other pages.
    let all = guest.residents().unwrap();
    assert_eq!(all.len(), 2);
    assert_eq!(all[0].record, before.record);
    assert_ne!(all[1].slot.first, before.slot.first);
    guest.is_as_recorded();
    assert_eq!(guest.runs(), ["one", "", ""]);
}

#[test]
fn a_payload_that_another_one_uses_is_reverted_after_that() {
    for earlier in [false, true] {
        let guest = Guest::new();
        guest.applied(&payload("one", &[A]));
        guest.applied(&using("two", &[B], "new_0_a_show"));
        guest.applied(&payload("three", &[B]));
        let module = resident(&guest, "one").record.module;
        assert_eq!(resident(&guest, "two").record.uses, Some(vec![module]));
        assert_eq!(resident(&guest, "three").record.uses, Some(Vec::new()));
        if earlier {
            as_by_an_earlier_build(&guest);
        }
        let error = guest.revert("one").unwrap_err();
        assert_eq!(error.exit_code(), ExitCode::Failed);
        let said = error.to_string();
        let words = "another uses it: two refers to its symbols; revert three, then two first";
        assert!(said.contains(words), "{said}");
        assert_eq!(guest.runs(), ["one", "three", ""]);
        for (_, result) in guest.revert_all(false) {
            assert_eq!(result.unwrap().result, Outcome::Reverted);
        }
        // Who is reverted does not count.
        guest.applied(&payload("one", &[A]));
        guest.revert("one").unwrap();
    }
}

#[test]
fn a_kprobe_in_parked_code_does_not_make_it_another_payload() {
    let guest = Guest::new();
    let one = payload("one", &[A]);
    guest.applied(&one);
    let at = resident(&guest, "one").record.functions[0].new;
    guest.revert("one").unwrap();
    // It is enabled: its breakpoint is there.
    let byte: [u8; 1] = guest.peek(at.0);
    guest.add_kprobe(5, at.0);
    guest.poke(at.0, &[0xcc]);
    let pages = guest.pages();
    let error = guest.apply(&one, Mode::Apply).unwrap_err();
    assert_eq!(error.exit_code(), ExitCode::TryAgain, "{error}");
    let words = format!("a kprobe of the guest's own stands at {at}");
    assert!(error.to_string().contains(&words), "{error}");
    assert_eq!(guest.pages(), pages);
    guest.remove_kprobe(5);
    guest.poke(at.0, &byte);
    guest.applied(&one);
    assert_eq!(guest.pages(), pages);
}

#[test]
fn runs_that_are_ended_before_all_memory_is_there_take_no_more_of_it_than_one_run() {
    let needed = {
        let guest = Guest::new();
        let before = guest.spare.get();
        guest.applied(&payload("one", &[A]));
        before - guest.spare.get()
    };
    let guest = Guest::new();
    let before = guest.spare.get();
    let mut writes = 0;
    while before - guest.spare.get() < needed {
        for _ in 0..2 {
            guest.left.set(writes);
            guest.apply(&payload("one", &[A]), Mode::Apply).unwrap_err();
        }
        writes += 1;
    }
    guest.left.set(u32::MAX);
    guest.applied(&payload("one", &[A]));
    assert_eq!(before - guest.spare.get(), needed);
    guest.is_as_recorded();
}
