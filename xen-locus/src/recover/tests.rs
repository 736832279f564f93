//! What a run leaves in the mock guest when it is ended at any of its writes, and what `recover` makes of it.

mod rebooted;

use std::path::PathBuf;

use locus_guest::addr::Gva;
use locus_kernel::fixture::TEXT;

use super::*;
use crate::apply;
use crate::apply::mock::options;
use crate::arena::record::MODULE;
use crate::error::{Class, ExitCode};
use crate::link::module::lists;
use crate::link::module::lists::Known;
use crate::machine::mock::{payload, Guest, A, B, C, FUNCTIONS};
use crate::nudge::mock::{self as nudge_mock, SITE};
use crate::plan::Mode;
use crate::write::Write;
use crate::x86;

impl Guest {
    /// Recovers what is left, which must be found to be so, and leaves nothing to do.
    fn recover(&self, expected: Finding) {
        let kernel = self.kernel();
        let intent = self.intent.take();
        let find =
            |intent: Option<&Intent>| of_guest(self, &kernel, intent, &options(false)).unwrap();
        let found = find(intent.as_ref());
        assert_eq!(found.result, expected, "{found}");
        assert_eq!(find(None).result, Finding::NothingToDo);
        self.is_as_recorded();
    }
}

#[test]
fn a_name_that_is_in_force_is_none_of_those_that_are_not() {
    let guest = Guest::new();
    guest.applied(&payload("fix", &[A]));
    guest.applied(&payload("other", &[C]));
    guest.revert("fix").unwrap();
    guest.revert("other").unwrap();
    let mut second = payload("fix", &[A, B]);
    second.sha256 = [2; 32];
    guest.applied(&second);
    let found = of_guest(&guest, &guest.kernel(), None, &options(false)).unwrap();
    assert_eq!(found.parked, ["other"]);
}

/// What `status` shows, and whose version of each function runs.
type Shown = (Vec<&'static str>, [&'static str; 3]);

/// Carries out `action` on a guest with two patches on each other, ended before its first write, before
/// its second, and so on: the guest shows `new` or what it showed before, and the next run goes on
/// from there; or, if the action was ended between its `texts` writes to text or while the payload
/// `enters` the guest's modules, it is called uncertain until it is taken back by its journal.
fn ended_at_any_write(
    action: fn(&Guest) -> Result<apply::Report>,
    new: &Shown,
    (texts, enters): (u32, bool),
) {
    let old: Shown = (vec!["one", "two"], ["two", "two", ""]);
    let (mut olds, mut news, mut uncertain, mut entering) = (0, 0, 0, 0);
    for writes in 0.. {
        let guest = Guest::new();
        guest.applied(&payload("one", &[A]));
        guest.applied(&payload("two", &[A, B]));
        guest.left.set(writes);
        let finished = action(&guest).is_ok();
        // The directory is written last, and what it would say stands in the text.
        let whole = guest.left.replace(u32::MAX) > 0;
        let runs = guest.runs();
        match guest.status() {
            Err(error) if error.class() == Class::Uncertain => {
                let said = error.to_string();
                assert!(said.contains("neither wholly"), "{said}");
                assert!(!finished);
                if said.contains("among the guest's modules") {
                    assert_eq!(runs, old.1);
                    entering += 1;
                } else {
                    assert!(runs != old.1 && runs != new.1, "{writes}: {runs:?}");
                    uncertain += 1;
                }
                guest.recover(Finding::Undone);
                assert_eq!(guest.runs(), old.1);
            }
            found if runs == old.1 => {
                assert_eq!(found.unwrap(), old.0, "after {writes} writes");
                assert!(!finished);
                if guest.intent.borrow().is_some() {
                    guest.recover(Finding::Undone);
                }
                olds += 1;
            }
            found => {
                assert_eq!(found.unwrap(), new.0, "after {writes} writes");
                assert_eq!(runs, new.1, "after {writes} writes");
                assert_eq!(guest.intent.borrow().is_some(), !finished);
                if !finished {
                    guest.recover(Finding::Finished);
                }
                news += 1;
            }
        }
        guest.applied(&payload("more", &[B]));
        assert_eq!(guest.runs()[B], "more");
        for (_, result) in guest.revert_all(false) {
            result.unwrap();
        }
        assert_eq!(guest.runs(), ["", "", ""]);
        if finished && whole {
            break;
        }
    }
    assert_eq!(uncertain, texts - 1);
    // Links in two lists, two trees and two bounds of it, at least.
    assert!(enters == (entering > 8), "{entering}");
    // Before the text, and after it, something is written to the arena.
    assert!(olds > 1 && news > 1, "{olds} {news}");
}

#[test]
fn a_run_that_is_ended_at_any_write_leaves_the_old_or_the_new_or_says_so() {
    let replacing = |guest: &Guest| guest.apply(&payload("all", &[A, C]), Mode::Replace);
    let new = (vec!["all"], ["all", "", "all"]);
    ended_at_any_write(replacing, &new, (3, true));
    let stacking = |guest: &Guest| guest.apply(&payload("three", &[A, C]), Mode::Apply);
    let new = (vec!["one", "two", "three"], ["three", "two", "three"]);
    ended_at_any_write(stacking, &new, (2, true));
    let reverting = |guest: &Guest| guest.revert("two");
    ended_at_any_write(reverting, &(vec!["one"], ["one", "", ""]), (2, false));
}

#[test]
fn a_first_run_that_is_ended_at_any_write_is_in_nobodys_way() {
    let one = payload("one", &[A]);
    for writes in 0.. {
        let guest = Guest::new();
        guest.left.set(writes);
        let finished = guest.apply(&one, Mode::Apply).is_ok();
        let whole = guest.left.replace(u32::MAX) > 0;
        let kernel = guest.kernel();
        let intent = guest.intent.take();
        let found = of_guest(&guest, &kernel, intent.as_ref(), &options(false)).unwrap();
        let applied = guest.runs()[A] == "one";
        assert_eq!(
            guest.status().unwrap().len(),
            usize::from(applied),
            "{found}"
        );
        assert!(applied || !finished);
        guest.apply(&one, Mode::Apply).unwrap();
        assert_eq!(guest.runs(), ["one", "", ""]);
        if finished && whole {
            break;
        }
    }
}

#[test]
fn what_ran_in_part_is_not_written_again_when_it_is_taken_back() {
    let torn = |guest: &Guest| guest.status().is_err_and(|e| e.class() == Class::Uncertain);
    let (mut entered, mut not) = (0, 0);
    for writes in 0.. {
        let guest = Guest::new();
        guest.left.set(writes);
        let finished = guest.apply(&payload("one", &[A, B]), Mode::Apply).is_ok();
        guest.left.set(u32::MAX);
        if finished {
            break;
        }
        if !torn(&guest) {
            not += 1;
            continue;
        }
        // The guest runs meanwhile, and a timer of the payload is started.
        guest.recover(Finding::Undone);
        let [one] = guest.residents().unwrap().try_into().unwrap();
        assert_eq!(one.slot.state, State::Parked);
        let known = lists::known(&guest.kernel(), one.record.module);
        assert_eq!(known.unwrap(), Known::Removed);
        let variable = one.record.module.0 - 0x48;
        guest.poke(variable, b"pending!");
        guest.applied(&payload("one", &[A, B]));
        assert_eq!(&guest.peek::<8>(variable), b"pending!");
        guest.is_as_recorded();
        entered += 1;
    }
    assert!(entered > 8 && not > 1, "{entered} {not}");
}

#[test]
fn a_gate_that_still_stands_is_taken_down_by_the_journal() {
    let guest = Guest::new();
    guest.applied(&payload("one", &[B]));
    let at = FUNCTIONS[A].1 + 5;
    let old: [u8; 5] = guest.peek(at);
    let jump = x86::jump(Gva(at), Gva(FUNCTIONS[C].1)).unwrap();
    let change = Change {
        build_id: guest
            .kernel()
            .build_id
            .as_deref()
            .map(hex::encode)
            .unwrap_or_default(),
        text_base: TEXT.0,
        patch: "one".into(),
        sha256: String::new(),
        record: String::new(),
        op: crate::operation::Operation::Nudge,
        writes: vec![Write {
            at: Gva(at),
            expect: old.to_vec(),
            new: jump.to_vec(),
            about: Default::default(),
        }],
        watched: Vec::new(),
        generation: None,
    };
    // Before it stood, while it stood, and torn.
    for standing in [old, jump, [jump[0], jump[1], jump[2], old[3], old[4]]] {
        guest.poke(at, &standing);
        guest.begin(&change).unwrap();
        guest.recover(Finding::Undone);
        assert_eq!(guest.peek::<5>(at), old);
        assert_eq!(guest.runs(), ["", "one", ""]);
    }
    // Of a kernel that started anew elsewhere nothing stands.
    let moved = Change {
        text_base: TEXT.0 + 0x20_0000,
        ..change.clone()
    };
    guest.begin(&moved).unwrap();
    guest.recover(Finding::Gone);
    // What is somebody else's stays.
    guest.poke(at, &[0xcc; 5]);
    guest.begin(&change).unwrap();
    let intent = guest.intent.take();
    let error = of_guest(&guest, &guest.kernel(), intent.as_ref(), &options(false));
    assert_eq!(error.unwrap_err().exit_code(), ExitCode::Uncertain);
    assert_eq!(guest.peek::<5>(at), [0xcc; 5]);
}

#[test]
fn a_nudge_that_is_ended_at_any_write_is_taken_back_by_the_guests_memory_alone() {
    let (mut whole, mut gates) = (0, 0);
    for writes in 0.. {
        for has_journal in [true, false] {
            let guest = nudge_mock::guest();
            guest.applied(&payload("one", &[A]));
            let old: [u8; 5] = guest.peek(SITE);
            let pages = guest.pages();
            guest.left.set(writes);
            let finished = guest.nudge().is_ok();
            let left = guest.left.replace(u32::MAX);
            let kernel = guest.kernel();
            let there = Arena::read(&kernel).unwrap().gates(&kernel).unwrap().len();
            let leads = guest.peek::<5>(SITE) != old;
            assert!(!leads || there == 1, "after {writes} writes");
            gates += there;
            let intent = guest.intent.take().filter(|_| has_journal);
            let find = |intent: Option<&Intent>| {
                of_guest(&guest, &guest.kernel(), intent, &options(false)).unwrap()
            };
            let found = find(intent.as_ref());
            let expected = match (there, &intent) {
                (0, None) => Finding::NothingToDo,
                _ => {
                    assert_eq!(found.op, Some(Operation::Nudge));
                    assert_eq!(found.patch.as_deref(), Some("one"));
                    Finding::Undone
                }
            };
            assert_eq!(found.result, expected, "after {writes} writes");
            assert_eq!(find(None).result, Finding::NothingToDo);
            assert_eq!(guest.peek::<5>(SITE), old);
            assert_eq!(guest.pages(), pages);
            assert_eq!(guest.runs(), ["one", "", ""]);
            guest.applied(&payload("more", &[B]));
            whole += u32::from(finished && left > 0);
        }
        if whole > 0 {
            break;
        }
    }
    assert_eq!(whole, 2);
    // Before the first turn, between the two, after the second.
    assert!(gates >= 6, "{gates}");
}

#[test]
fn a_gate_whose_bytes_somebody_changed_stays_and_is_uncertain() {
    let guest = nudge_mock::guest();
    guest.meanwhile(|_| ());
    guest.meanwhile(|g| g.left.set(0));
    guest.nudge().unwrap_err();
    guest.left.set(u32::MAX);
    let torn: [u8; 5] = guest.peek(SITE);
    guest.poke(SITE, &[0xcc; 5]);
    let recover = || of_guest(&guest, &guest.kernel(), None, &options(false));
    assert_eq!(recover().unwrap_err().exit_code(), ExitCode::Uncertain);
    assert_eq!(guest.peek::<5>(SITE), [0xcc; 5]);
    guest.poke(SITE, &torn);
    assert_eq!(recover().unwrap().result, Finding::Undone);
}

#[test]
fn a_payload_that_is_applied_again_elsewhere_and_ended_at_any_write_leaves_records_that_fit() {
    for writes in 0.. {
        let guest = Guest::new();
        let one = payload("one", &[A]);
        guest.applied(&one);
        guest.revert("one").unwrap();
        // It lies on another patch now, so its record says something else.
        guest.applied(&payload("two", &[A]));
        guest.left.set(writes);
        let finished = guest.apply(&one, Mode::Apply).is_ok();
        let whole = guest.left.replace(u32::MAX) > 0;
        let all = crate::apply::mock::kernel_residents(&guest.kernel());
        assert_eq!(all.len(), 2, "after {writes} writes");
        let kernel = guest.kernel();
        let intent = guest.intent.take();
        of_guest(&guest, &kernel, intent.as_ref(), &options(false)).unwrap();
        guest.is_as_recorded();
        let runs = guest.runs();
        assert_eq!(runs[A], if finished { "one" } else { &*runs[A] });
        for (_, result) in guest.revert_all(false) {
            result.unwrap();
        }
        assert_eq!(guest.runs(), ["", "", ""]);
        if finished && whole {
            break;
        }
    }
}

#[test]
fn a_journal_is_surely_of_the_domain_that_it_names() {
    let guest = Guest::new();
    guest.keeps_journal.set(true);
    guest.applied(&payload("fix", &[A]));
    let intent = guest.intent.take();
    assert_eq!(intent.as_ref().map(|i| i.domid), Some(1));
    let read = Noted::Intent(Box::new(intent.unwrap()));
    assert!(is_surely_of(&read, DomId(1)) && !is_surely_of(&read, DomId(5)));
    assert!(is_surely_of(&Noted::Nothing, DomId(5)));
    let damaged = Noted::Damaged("it is cut off".into());
    assert!(!is_surely_of(&damaged, DomId(1)));
}

/// What `recover` makes of a journal that can't be believed.
fn of_damaged(guest: &Guest) -> Result<Report> {
    let noted = Noted::Damaged("the journal can't be believed: it is cut off".into());
    let aside = PathBuf::from("/kept/here");
    of_noted(guest, &guest.kernel(), &noted, &aside, &options(false))
}

#[test]
fn without_a_journal_that_can_be_believed_the_guests_memory_accounts_for_all() {
    let guest = nudge_mock::guest();
    guest.applied(&payload("one", &[A]));
    let found = of_damaged(&guest).unwrap();
    assert_eq!(found.result, Finding::NothingToDo);
    assert!(!found.is_nothing());
    for words in ["it is cut off", "kept as /kept/here"] {
        assert!(found.detail.contains(words), "{found}");
    }
    // A gate is found and taken down.
    guest.meanwhile(|_| ());
    guest.meanwhile(|g| g.left.set(0));
    guest.nudge().unwrap_err();
    guest.left.set(u32::MAX);
    let found = of_damaged(&guest).unwrap();
    assert_eq!(found.result, Finding::Undone);
    assert_eq!(found.op, Some(Operation::Nudge));
    assert!(found.detail.contains("kept as"), "{found}");
    // What is neither old nor new can't be told without it.
    let residents = guest.residents().unwrap();
    let at = residents[0].record.functions[0].site.0;
    guest.revert("one").unwrap();
    guest.meanwhile(|g| g.left.set(0));
    guest
        .apply(&payload("one", &[A]), crate::plan::Mode::Apply)
        .unwrap_err();
    guest.left.set(u32::MAX);
    guest.poke(at, &[0xe9, 0, 0, 0, 0]);
    let error = of_damaged(&guest).unwrap_err();
    assert_eq!(error.exit_code(), ExitCode::Uncertain);
    let said = error.to_string();
    assert!(said.contains("it is cut off: "), "{said}");
    assert!(said.contains("neither wholly"), "{said}");
}

#[test]
fn a_payload_that_is_in_the_guests_lists_in_part_is_found_without_a_journal() {
    for is_parked in [true, false] {
        let guest = Guest::new();
        guest.applied(&payload("one", &[A]));
        guest.applied(&payload("two", &[B]));
        let module = guest.residents().unwrap()[0].record.module.0;
        if is_parked {
            guest.revert("one").unwrap();
        }
        // The first of the two marks: it is being taken out.
        guest.poke(module - MODULE, &2u64.to_le_bytes());
        let recovered = of_guest(&guest, &guest.kernel(), None, &options(false));
        let refused = [
            recovered.unwrap_err(),
            of_damaged(&guest).unwrap_err(),
            guest
                .apply(&payload("three", &[C]), Mode::Apply)
                .unwrap_err(),
            guest.residents().unwrap_err(),
        ];
        for error in refused {
            assert_eq!(error.exit_code(), ExitCode::Uncertain, "{error}");
            let said = error.to_string();
            assert!(said.contains("payload one: "), "{said}");
        }
        // The journal of another change is not taken back because of it.
        guest.poke(module - MODULE, &1u64.to_le_bytes());
        guest.keeps_journal.set(true);
        guest.revert("two").unwrap();
        let intent = guest.intent.take();
        guest.poke(module - MODULE, &2u64.to_le_bytes());
        let error = of_guest(&guest, &guest.kernel(), intent.as_ref(), &options(false));
        assert_eq!(error.unwrap_err().exit_code(), ExitCode::Uncertain);
        assert_eq!(guest.runs()[B], "");
    }
}
