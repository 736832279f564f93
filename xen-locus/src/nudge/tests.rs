use std::cell::RefCell;
use std::rc::Rc;

use locus_guest::addr::Gva;
use locus_payload::testelf::Spec;
use locus_payload::Payload;

use super::mock::{gate, guest, HANDLER, SITE};
use super::*;
use crate::apply::mock::options;
use crate::arena::record::State;
use crate::arena::Resident;
use crate::error::Class;
use crate::machine::mock::{payload, Guest, A, B, C, FUNCTIONS};
use crate::x86::JUMP;

fn refused(guest: &Guest, words: &str) {
    guest.left.set(0);
    let error = Gate::prepare(&guest.kernel(), "one", &[]).err().unwrap();
    assert_eq!(error.class(), Class::NotApplicable, "{error}");
    assert!(error.to_string().contains(words), "{error}");
}

#[test]
fn where_user_threads_can_not_be_told_from_others_no_thread_is_woken() {
    let guest = guest();
    guest.left.set(0);
    let kernel = guest.kernel();
    let (name, at) = FUNCTIONS[A];
    let watch = Watch::of(vec![Watched::new(Range::new(Gva(at), 0x20), name)]);
    // The mock guest's `task_struct` has no `mm`.
    let error = nudge(&guest, &kernel, "one", &watch, &Options::default()).unwrap_err();
    assert_eq!(error.class(), Class::NotApplicable);
    assert!(error.to_string().contains("mm of task_struct"), "{error}");
    assert!(guest.intent.borrow().is_none());
}

#[test]
fn a_kernel_without_the_functions_that_wake_is_refused_before_anything_is_written() {
    // Its BTF describes no function at all.
    refused(&guest(), "find_task_by_pid_ns");
    refused(&Guest::new(), FUNCTION);
}

#[test]
fn a_guest_that_lkrg_guards_is_left_alone() {
    let guest = guest();
    guest.applied(&payload("lkrg", &[A]));
    refused(&guest, "LKRG");
}

#[test]
fn a_guest_that_a_newer_xen_locus_changed_is_left_alone() {
    let guest = guest();
    guest.applied(&payload("fix", &[A]));
    guest.make_newer("fix");
    refused(&guest, "newer xen-locus");
}

#[test]
fn a_handler_that_a_patch_replaces_is_left_alone() {
    let guest = guest();
    let spec = Spec {
        objects: vec![(None, vec![(FUNCTION, 0)])],
        ..Spec::default()
    };
    let mut payload = Payload::parse("own", &spec.bytes()).unwrap();
    payload.name = "own".into();
    guest.applied(&payload);
    refused(&guest, "is replaced by own");
}

#[test]
fn a_handler_whose_first_instructions_can_not_be_moved_is_refused() {
    let guest = guest();
    // jmp +0x10, nops
    guest.poke(HANDLER + 5, &[0xeb, 0x10, 0x90, 0x90, 0x90, 0x90]);
    refused(&guest, "can't be entered");
}

#[test]
fn both_redirects_of_a_nudge_are_refused_where_a_kprobe_stands_and_while_one_comes() {
    let guest = guest();
    let gate = gate(&guest).unwrap();
    let site = SITE;
    let turn = |turn| gate.turn(&guest, &guest.kernel(), turn, &options(false));
    for (which, after) in [
        (Turn::Up, gate.place.bytes[1]),
        (Turn::Down, gate.place.bytes[0]),
    ] {
        let before: [u8; JUMP] = guest.peek(site);
        let refused = |words: &str| {
            let error = turn(which).unwrap_err();
            assert_eq!(error.class(), Class::TryAgain, "{error}");
            assert!(error.to_string().contains(words), "{error}");
            assert_eq!(guest.peek::<JUMP>(site), before);
        };
        // On the way back the rest of the handler keeps its bytes.
        let body = (which == Turn::Up).then_some(site + 6);
        for at in std::iter::once(site).chain(body) {
            guest.add_kprobe(4, at);
            refused("a kprobe of the guest's own stands at");
            guest.remove_kprobe(4);
        }
        guest.meanwhile(move |g| g.add_kprobe(4, site));
        refused("added or removed a kprobe");
        guest.remove_kprobe(4);
        let lock = guest.variable("kprobe_mutex");
        guest.meanwhile(move |g| g.poke(lock, &[8]));
        refused("kprobe_mutex is held");
        guest.poke(lock, &[0]);
        if which == Turn::Down {
            guest.add_kprobe(4, site + 6);
        }
        turn(which).unwrap();
        guest.remove_kprobe(4);
        assert_eq!(guest.peek::<JUMP>(site), after);
    }
    // Up, the handler must not be traced. Down, that is no matter.
    let nop: [u8; 5] = guest.peek(HANDLER);
    guest.meanwhile(|g| g.poke(HANDLER, &[0xe8, 0, 0, 0, 0]));
    let error = turn(Turn::Up).unwrap_err();
    assert!(
        error.to_string().contains("began or stopped to trace"),
        "{error}"
    );
    guest.poke(HANDLER, &nop);
    turn(Turn::Up).unwrap();
    guest.poke(HANDLER, &[0xe8, 0, 0, 0, 0]);
    turn(Turn::Down).unwrap();
}

/// The gates that the arena's directory has, and the names of the payloads.
fn listed(guest: &Guest) -> (Vec<Resident>, Vec<String>) {
    let kernel = guest.kernel();
    let arena = Arena::read(&kernel).unwrap();
    let payloads = plan::residents(&kernel, &arena).unwrap();
    let names = payloads.into_iter().map(|r| r.record.name);
    (arena.gates(&kernel).unwrap(), names.collect())
}

#[test]
fn a_gate_is_in_the_directory_before_anything_leads_to_it_and_is_no_payload() {
    let guest = guest();
    guest.applied(&payload("one", &[A]));
    let old: [u8; JUMP] = guest.peek(SITE);
    let seen = Rc::new(RefCell::new(Vec::new()));
    for _ in 0..2 {
        let seen = Rc::clone(&seen);
        guest.meanwhile(move |g| {
            let (gates, payloads) = listed(g);
            assert_eq!((gates.len(), &payloads[..]), (1, &["one".to_owned()][..]));
            seen.borrow_mut().push(g.peek::<JUMP>(SITE) == old);
        });
    }
    assert_eq!(guest.nudge().unwrap(), 0);
    assert_eq!(*seen.borrow(), [true, false]);
    let (gates, payloads) = listed(&guest);
    assert!(gates.is_empty());
    assert_eq!(payloads, ["one"]);
    assert_eq!(guest.peek::<JUMP>(SITE), old);
    // What a blocked nudge put into the directory goes again.
    guest.meanwhile(|g| g.add_kprobe(4, SITE));
    assert_eq!(guest.nudge().unwrap_err().class(), Class::TryAgain);
    assert!(listed(&guest).0.is_empty());
}

#[test]
fn an_entry_that_may_not_have_been_written_is_taken_out_again() {
    let mut failed = 0;
    for writes in 0.. {
        let guest = guest();
        guest.applied(&payload("one", &[A]));
        guest.passed_on.set(writes);
        let done = guest.nudge();
        guest.passed_on.set(u32::MAX);
        let Err(error) = done else { break };
        failed += 1;
        if error.class() != Class::Uncertain {
            // The journal goes.
            *guest.intent.borrow_mut() = None;
            assert!(listed(&guest).0.is_empty(), "write {writes}: {error}");
            guest.applied(&payload("two", &[B]));
        }
    }
    assert!(failed > 3, "{failed}");
}

/// A guest that was suspended between the two turns of a nudge, and restored where no journal is.
fn suspended() -> (Guest, Resident) {
    let guest = guest();
    guest.applied(&payload("one", &[A]));
    guest.applied(&payload("two", &[B]));
    guest.revert("two").unwrap();
    guest.meanwhile(|_| ());
    guest.meanwhile(|g| g.left.set(0));
    let error = guest.nudge().unwrap_err();
    assert_eq!(error.class(), Class::Uncertain, "{error}");
    guest.left.set(u32::MAX);
    *guest.intent.borrow_mut() = None;
    let gate = listed(&guest).0.pop().unwrap();
    (guest, gate)
}

#[test]
fn where_a_gate_stands_nothing_is_changed_and_the_gate_is_named() {
    let (guest, gate) = suspended();
    assert_ne!(guest.peek::<JUMP>(SITE), [0x41, 0x57, 0x41, 0x56, 0x41]);
    let at = arena::page_address(gate.slot.first.into()).0;
    let page: [u8; PAGE_LEN] = guest.peek(at);
    let kernel = guest.kernel();
    let mut errors = guest.refused(&payload("three", &[C]), "one");
    errors.push(guest.nudge().unwrap_err());
    errors.extend(
        guest
            .revert_all(false)
            .into_iter()
            .map(|(_, r)| r.unwrap_err()),
    );
    let two = ["two".to_owned()];
    let reclaimed = crate::reclaim::reclaim(&guest, &kernel, &two, &options(false), |_, _| true);
    errors.push(reclaimed.unwrap_err());
    assert_eq!(errors.len(), 6);
    for error in errors {
        assert_eq!(error.class(), Class::Uncertain, "{error}");
        let said = error.to_string();
        assert!(said.contains("a nudge of one by xen-locus"), "{said}");
        assert!(said.contains("`xen-locus recover`"), "{said}");
    }
    assert_eq!(guest.peek::<PAGE_LEN>(at), page);
    assert!(guest.intent.borrow().is_none());
    // Who only reads sees the payloads as they are.
    assert_eq!(guest.status().unwrap(), ["one"]);
    let report = crate::verify::compare_once(&kernel, None).unwrap();
    assert_eq!((report.patches, report.parked), (1, 1));
    // No payload gets its pages, whatever the directory's order.
    let arena = Arena::read(&kernel).unwrap();
    let first = usize::from(gate.slot.first);
    for count in [1, 2, 5, 100] {
        let found = arena.find_room(kernel.kind, count).unwrap();
        assert!(found + count <= first || found >= first + place::PAGES);
    }
}

#[test]
fn an_earlier_build_takes_a_gate_for_a_patch_that_it_can_revert() {
    let (guest, gate) = suspended();
    let old = gate.record.functions[0].old_bytes;
    // It does not know the mark.
    let mut as_patch = vec![gate];
    as_patch[0].record.nudge = None;
    let kernel = guest.kernel();
    plan::interrupted::resolve(&kernel, &mut as_patch).unwrap();
    assert_eq!(as_patch[0].slot.state, State::Applied);
    let stack = PatchStack::new(&as_patch);
    let undo = plan::undo(&kernel, &stack, &as_patch[0]).unwrap();
    let redirect = undo.writes.iter().find(|w| w.at.0 == SITE).unwrap();
    assert_eq!(redirect.new, old);
    // Once it is reverted it counts as parked, and as what the guest never knew.
    guest.poke(SITE, &old);
    as_patch[0].slot.state = State::Reverting;
    let kernel = guest.kernel();
    plan::interrupted::resolve(&kernel, &mut as_patch).unwrap();
    assert_eq!(as_patch[0].slot.state, State::Parked);
}

#[test]
fn an_entry_that_no_nudge_can_have_made_is_not_believed() {
    let (guest, gate) = suspended();
    let kernel = guest.kernel();
    Place::of(&kernel, &gate).unwrap();
    type Change = fn(&mut Resident);
    let cases: [(Change, &str); 6] = [
        (|r| r.record.functions.clear(), "expected one function"),
        (|r| r.record.functions[0].old.0 += 16, "leads to it, found"),
        (
            |r| r.record.functions[0].new_bytes[1] ^= 1,
            "expected a jump to it",
        ),
        (
            |r| r.record.functions[0].new = Gva(SITE),
            "expected its code there",
        ),
        (
            |r| r.record.text.1 = u64::MAX >> 1,
            "expected its code there",
        ),
        (|r| r.slot.first += 1, "expected its code there"),
    ];
    for (change, words) in cases {
        let mut changed = gate.clone();
        change(&mut changed);
        let error = Place::of(&kernel, &changed).unwrap_err();
        assert_eq!(error.class(), Class::Uncertain);
        assert!(error.to_string().contains(words), "{error}");
    }
}
