//! Patches on patches, in the mock guest: what is in its text after each step.

#![allow(clippy::cast_possible_truncation)] // small numbers

use std::collections::HashSet;
use std::time::Duration;

use locus_guest::addr::Gva;
use locus_guest::{Memory as _, MemoryMut as _};
use locus_kernel::modules::{self, ModuleReader};

use super::mock::{kernel_residents, options};
use super::*;
use crate::arena::record::ENTRIES_MAX;
use crate::arena::Resident;
use crate::error::ExitCode;
use crate::machine::mock::{entry_only, payload, Guest, A, B, C, COLD, FUNCTIONS};

mod again;
mod conditions;
mod moving;
mod newer;

#[test]
fn patches_on_one_function_come_and_go_in_order() {
    let guest = Guest::new();
    guest.applied(&payload("one", &[A]));
    guest.applied(&payload("two", &[A, B]));
    assert_eq!(guest.runs(), ["two", "two", ""]);
    assert_eq!(guest.status().unwrap(), ["one", "two"]);
    assert_eq!(guest.revert("two").unwrap().result, Outcome::Reverted);
    assert_eq!(guest.runs(), ["one", "", ""]);
    // It comes back on top, into its own pages.
    let pages = guest.pages();
    guest.applied(&payload("two", &[A, B]));
    assert_eq!(guest.runs(), ["two", "two", ""]);
    guest.revert("two").unwrap();
    guest.revert("one").unwrap();
    assert_eq!(guest.runs(), ["", "", ""]);
    // And below.
    guest.applied(&payload("two", &[A, B]));
    guest.applied(&payload("one", &[A]));
    assert_eq!(guest.status().unwrap(), ["two", "one"]);
    assert_eq!(guest.runs(), ["one", "two", ""]);
    guest.is_as_recorded();
    assert_eq!(guest.pages(), pages);
}

#[test]
fn a_patch_under_another_is_not_reverted_and_those_on_it_are_named_in_order() {
    let guest = Guest::new();
    for (name, functions) in [
        ("one", &[A][..]),
        ("two", &[A, B]),
        ("elsewhere", &[C]),
        ("three", &[B]),
    ] {
        guest.applied(&payload(name, functions));
    }
    let before = guest.runs();
    let error = guest.revert("one").unwrap_err();
    assert_eq!(error.exit_code(), ExitCode::Failed);
    let said = error.to_string();
    for words in [
        "patch one can't be reverted",
        "two replaces a_show too",
        "revert three, then two first",
    ] {
        assert!(said.contains(words), "{said}");
    }
    assert_eq!(guest.runs(), before);
    // What shares no function goes whenever it likes.
    guest.revert("elsewhere").unwrap();
    let all = guest.revert_all(true);
    let order: Vec<&str> = all.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(order, ["three", "two", "one"]);
    assert_eq!(guest.status().unwrap(), ["one", "two", "three"]);
    // Until whoever hears of it has enough.
    let mut heard = Vec::new();
    revert_all(&guest, &guest.kernel(), &options(false), |name, _| {
        heard.push(name.to_owned());
        false
    })
    .unwrap();
    assert_eq!(heard, ["three"]);
    assert_eq!(guest.status().unwrap(), ["one", "two"]);
    for (_, result) in guest.revert_all(false) {
        assert_eq!(result.unwrap().result, Outcome::Reverted);
    }
    assert_eq!(guest.runs(), ["", "", ""]);
}

#[test]
fn a_payload_supersedes_all_patches_in_one_step() {
    for by_itself in [false, true] {
        let guest = Guest::new();
        guest.applied(&payload("one", &[A]));
        guest.applied(&payload("two", &[A, B]));
        let mut all = payload("all", &[A, C]);
        all.klp.replace = Some(by_itself);
        let mode = if by_itself {
            Mode::Apply
        } else {
            Mode::Replace
        };
        let report = guest.apply(&all, mode).unwrap();
        assert_eq!(report.superseded, ["one", "two"]);
        assert_eq!(guest.runs(), ["all", "", "all"]);
        assert_eq!(guest.status().unwrap(), ["all"]);
        assert_eq!(
            guest.apply(&all, mode).unwrap().result,
            Outcome::AlreadyApplied
        );
        // What it supersedes can come again, and is not brought back by its going.
        guest.applied(&payload("one", &[A]));
        assert_eq!(guest.runs(), ["one", "", "all"]);
        let error = guest.apply(&all, Mode::Replace).unwrap_err();
        assert!(
            error.to_string().contains("can't supersede itself"),
            "{error}"
        );
        guest.revert("one").unwrap();
        guest.revert("all").unwrap();
        assert_eq!(guest.runs(), ["", "", ""]);
    }
}

#[test]
fn a_redirect_that_someone_changed_is_left_alone() {
    let guest = Guest::new();
    guest.applied(&payload("one", &[A]));
    guest.applied(&payload("two", &[A, B]));
    let before = guest.runs();
    let kernel = guest.kernel();
    let at = Gva(FUNCTIONS[A].1 + 5);
    let frames = kernel.space.frames(at, 5).unwrap();
    let window = guest.map_mut(&frames).unwrap();
    let mut jump = [0; 5];
    window.read(at.offset(), &mut jump).unwrap();
    window.write(at.offset(), &[0xe9, 0, 0, 0, 0]).unwrap();
    let refused = [
        guest.revert("two").unwrap_err(),
        guest
            .apply(&payload("three", &[A]), Mode::Apply)
            .unwrap_err(),
        guest
            .apply(&payload("three", &[C]), Mode::Replace)
            .unwrap_err(),
    ];
    for error in refused {
        assert!(
            error.to_string().contains("is not as two wrote it"),
            "{error}"
        );
    }
    window.write(at.offset(), &jump).unwrap();
    assert_eq!(guest.runs(), before);
    assert_eq!(guest.status().unwrap(), ["one", "two"]);
}

#[test]
fn who_is_in_a_part_of_a_function_that_stands_elsewhere_is_in_its_way() {
    let guest = Guest::new();
    guest.sleep_at(COLD.0 + 5);
    let error = guest.apply(&payload("one", &[A]), Mode::Apply).unwrap_err();
    let blockers = &error.blocked().unwrap().blockers;
    assert_eq!(
        (&*blockers[0].function, blockers[0].offset),
        ("a_show.cold", 5)
    );
    // Of another function's he is not.
    guest.applied(&payload("two", &[B]));
    guest.sleep_at(0);
    guest.applied(&payload("one", &[A]));
    guest.revert("one").unwrap();
    // It leads back to the bytes that are overwritten.
    let to = |offset: u64| {
        let distance = (FUNCTIONS[A].1 + offset).wrapping_sub(COLD.0 + 10) as u32;
        guest.poke(COLD.0 + 6, &distance.to_le_bytes());
        guest.apply(&payload("other", &[A]), Mode::Apply)
    };
    for offset in [5, 9] {
        let error = to(offset).unwrap_err();
        assert_eq!(error.exit_code(), ExitCode::NotApplicable, "{error}");
        assert!(
            error.to_string().contains("leads into the bytes"),
            "{error}"
        );
    }
    to(10).unwrap();
}

#[test]
fn who_is_in_the_version_that_runs_is_in_the_way_and_who_is_below_it_is_not() {
    let guest = Guest::new();
    guest.applied(&payload("one", &[A]));
    guest.applied(&payload("two", &[A, B]));
    let [one, two] = guest.residents().unwrap().try_into().unwrap();
    let inside = |r: &Resident, n: usize| r.record.functions[n].new.0 + 4;
    let blocked = |payload: &Payload, mode| {
        let error = guest.apply(payload, mode).unwrap_err();
        assert!(error.blocked().is_some(), "{error}");
        assert_eq!(guest.status().unwrap(), ["one", "two"]);
        assert_eq!(guest.runs(), ["two", "two", ""]);
    };
    let (on_a, on_c) = (payload("three", &[A]), payload("four", &[C]));
    guest.sleep_at(inside(&two, 0));
    blocked(&on_a, Mode::Apply);
    // A function that is given back, and one that lies below.
    guest.sleep_at(inside(&two, 1));
    blocked(&on_c, Mode::Replace);
    guest.sleep_at(inside(&one, 0));
    blocked(&on_c, Mode::Replace);
    // The bytes of a redirect.
    guest.sleep_at(FUNCTIONS[A].1 + 7);
    blocked(&on_a, Mode::Apply);
    // What lies below is in nobody's way while it stays there.
    guest.sleep_at(inside(&one, 0));
    guest.applied(&on_a);
    assert_eq!(guest.runs(), ["three", "two", ""]);
}

#[test]
fn who_is_about_to_begin_a_patchs_version_is_in_the_way() {
    let guest = Guest::new();
    guest.applied(&payload("one", &[A, B]));
    let [one] = guest.residents().unwrap().try_into().unwrap();
    for function in &one.record.functions {
        // An interrupt met the thread right behind the redirect, and its task was switched off there.
        guest.sleep_at(function.new.0);
        let stacked = guest.apply(&payload("two", &[A, B]), Mode::Apply);
        let error = stacked.unwrap_err();
        let blockers = &error.blocked().unwrap().blockers;
        assert_eq!(
            (&*blockers[0].function, blockers[0].offset),
            (&*function.name, 0)
        );
        assert!(guest.revert("one").unwrap_err().blocked().is_some());
        let all = guest.apply(&payload("all", &[C]), Mode::Replace);
        assert!(all.unwrap_err().blocked().is_some());
    }
    guest.sleep_at(0);
    guest.revert("one").unwrap();
}

#[test]
fn a_full_directory_is_refused_before_anything_is_written() {
    let guest = Guest::new();
    for n in 0..ENTRIES_MAX {
        let mut one = payload("x", &[A]);
        one.name = format!("p{n}");
        one.sha256 = [n as u8; 32];
        guest.applied(&one);
        guest.revert(&one.name).unwrap();
    }
    guest.left.set(0);
    let error = guest.apply(&payload("one", &[A]), Mode::Apply).unwrap_err();
    assert_eq!(error.exit_code(), ExitCode::NotApplicable);
    assert!(
        error.to_string().contains("directory is full: 31"),
        "{error}"
    );
}

#[test]
fn an_applied_patch_is_a_module_of_the_guest_and_stays_one() {
    let guest = Guest::new();
    guest.applied(&payload("one", &[A]));
    guest.applied(&payload("two", &[B]));
    guest.revert("one").unwrap();
    let kernel = guest.kernel();
    let mut reader = ModuleReader::new(&kernel).unwrap();
    let modules = reader.all().unwrap();
    let names: Vec<&str> = modules.iter().map(|m| m.name.as_str()).collect();
    assert_eq!(names, ["two", "one"], "the newest comes first");
    for module in &modules {
        assert_eq!(module.state, modules::ModuleState::Live);
        assert_eq!(module.refcount, Some(1));
        assert_eq!(module.used_by.join(" "), module.name, "so it can't go");
        let [core] = &module.parts[..] else {
            panic!("{:?}", module.parts);
        };
        assert!(core.range.contains(module.addr), "{core:?}");
    }
    let record = &kernel_residents(&kernel)[0].record;
    let at = record.functions[0].new;
    let of = modules.iter().find(|m| m.name == record.name).unwrap();
    let symbols = reader.symbols(of).unwrap();
    assert!(symbols.iter().any(|s| s.addr == at), "{symbols:?}");
    drop(reader);

    // Applied again it is the same module.
    guest.applied(&payload("one", &[A]));
    let again = ModuleReader::new(&guest.kernel()).unwrap().all().unwrap();
    assert_eq!(again, modules);
}

#[test]
fn where_both_versions_may_run_only_the_bytes_of_the_redirect_must_be_free() {
    let guest = Guest::new();
    let once = |entry_only| Options {
        entry_only,
        ..options(false)
    };
    let apply = |payload: &Payload, options: &Options| {
        super::apply(&guest, &guest.kernel(), payload, Mode::Apply, options)
    };
    let code = |result: Result<Report>| result.unwrap_err().exit_code();
    let one = entry_only("one", &[A]);
    // Only who asks for it gets it, and only for a payload that says so.
    guest.sleep_at(FUNCTIONS[A].1 + 10);
    assert_eq!(code(apply(&one, &once(false))), ExitCode::TryAgain);
    let strict = payload("two", &[A]);
    assert_eq!(code(apply(&strict, &once(true))), ExitCode::NotApplicable);
    guest.sleep_at(FUNCTIONS[A].1 + 7);
    assert_eq!(code(apply(&one, &once(true))), ExitCode::TryAgain);
    guest.sleep_at(FUNCTIONS[A].1 + 10);
    assert_eq!(apply(&one, &once(true)).unwrap().result, Outcome::Applied);
    assert_eq!(guest.runs(), ["one", "", ""]);

    // Who is in the old version yet is told, and is in the way of others on top.
    let kernel = guest.kernel();
    let drains = || {
        let residents = guest.residents().unwrap();
        let stack = PatchStack::new(&residents);
        let watch = plan::old_versions(&kernel, &stack, stack.applied()[0]);
        let watch = watch.unwrap().unwrap();
        let inside = |watch| crate::quiesce::inside(&kernel, &guest.world.vcpus, watch).unwrap();
        let blockers = inside(&watch);
        // One look for all patches finds the same.
        let drained = plan::Drained::find(&kernel, &stack).unwrap().unwrap();
        let old = |r: &Resident| r.record.functions.iter().map(|f| f.old).collect();
        let of_one = old(stack.applied()[0]);
        let found = inside(&drained.watch);
        assert_eq!(drained.below(0, &of_one, &found), blockers);
        assert_eq!(drained.below(0, &HashSet::default(), &found), []);
        blockers.len()
    };
    assert_eq!(drains(), 1);
    assert_eq!(code(apply(&strict, &once(false))), ExitCode::TryAgain);
    guest.sleep_at(0);
    assert_eq!(drains(), 0);

    // The way back.
    let place = || {
        let residents = guest.residents().unwrap();
        let one = residents.iter().find(|r| r.record.name == "one").unwrap();
        one.record.functions[0].new.0
    };
    let new = place();
    guest.sleep_at(new + 4);
    assert_eq!(code(guest.revert("one")), ExitCode::TryAgain);
    let back = super::revert(&guest, &guest.kernel(), "one", &once(true));
    assert_eq!(back.unwrap().result, Outcome::Reverted);
    assert_eq!(guest.runs(), ["", "", ""]);
    // He is in the way of what comes there, until he leaves.
    assert_eq!(code(apply(&strict, &once(false))), ExitCode::TryAgain);
    guest.sleep_at(0);
    apply(&strict, &once(false)).unwrap();
    guest.revert("two").unwrap();
    guest.sleep_at(new + 4);
    // And again, into the pages that the thread is in yet.
    assert_eq!(apply(&one, &once(true)).unwrap().result, Outcome::Applied);
    assert_eq!(place(), new);
}

#[test]
fn a_pause_that_took_too_long_before_the_look_is_given_up() {
    let guest = Guest::new();
    let payload = payload("one", &[A]);
    let limits = Options {
        max_pause: Duration::from_millis(10),
        ..options(false)
    };
    guest
        .pause_takes
        .set(limits.max_pause + Duration::from_micros(1));
    let apply = || apply(&guest, &guest.kernel(), &payload, Mode::Apply, &limits);
    let error = apply().unwrap_err();
    assert_eq!(error.exit_code(), ExitCode::TryAgain);
    let said = error.to_string();
    assert!(said.contains("--max-pause"), "{said}");
    assert_eq!(guest.runs(), ["", "", ""]);
    // Not all is as before.
    assert!(
        said.contains("stays parked") && said.contains("reclaim GUEST one"),
        "{said}"
    );
    let residents = guest.residents().unwrap();
    let states: Vec<State> = residents.iter().map(|r| r.slot.state).collect();
    assert_eq!(states, [State::Parked]);
    // What ends before that leaves nothing there, and says nothing of it.
    let other = Guest::new();
    other.trace.fail("begin");
    let early = super::apply(&other, &other.kernel(), &payload, Mode::Apply, &limits);
    let early = early.unwrap_err().to_string();
    assert!(!early.contains("parked"), "{early}");
    guest.pause_takes.set(limits.max_pause);
    apply().unwrap();
}

/// A guest with a thread that runs in function A, so that each attempt pauses it in vain.
fn busy_guest() -> Guest {
    let mut guest = Guest::new();
    let vcpus = &mut guest.world.vcpus;
    vcpus.iter_mut().find(|v| !v.user).unwrap().rip = Gva(FUNCTIONS[A].1 + 5);
    guest
}

#[test]
fn no_page_stays_mapped_to_be_written_during_a_wait() {
    let guest = busy_guest();
    let patient = Options {
        timeout: Duration::from_millis(200),
        ..options(false)
    };
    let payload = payload("one", &[A]);
    let error = apply(&guest, &guest.kernel(), &payload, Mode::Apply, &patient).unwrap_err();
    let attempts = error.blocked().expect("it is blocked").attempts;
    // The last attempt has no wait after it.
    let kept = guest.kept.borrow();
    assert!(kept.len() > 1, "{kept:?}");
    assert_eq!(*kept, vec![0; attempts as usize - 1]);
}

#[test]
fn before_each_attempt_it_is_asked_whether_the_guest_s_memory_is_still_its_own() {
    let patient = Options {
        timeout: Duration::from_secs(30),
        ..options(false)
    };
    for attempts in [0, 2] {
        let guest = busy_guest();
        guest.attempts_left.set(attempts);
        let payload = payload("one", &[A]);
        let error = apply(&guest, &guest.kernel(), &payload, Mode::Apply, &patient).unwrap_err();
        assert_eq!(error.exit_code(), ExitCode::NotApplicable, "{error}");
        assert!(error.to_string().contains("shares 7 pages"), "{error}");
        assert_eq!(guest.runs(), ["", "", ""]);
        let kernel = guest.kernel();
        guest.attempts_left.set(0);
        let watch = crate::quiesce::Watch::of(Vec::new());
        let error = super::blocking(&guest, &kernel, &watch, &patient).unwrap_err();
        assert_eq!(error.exit_code(), ExitCode::NotApplicable, "{error}");
    }
}

#[test]
fn a_look_at_threads_is_tried_once_even_without_time() {
    let guest = busy_guest();
    let kernel = guest.kernel();
    let (name, at) = FUNCTIONS[A];
    let range = locus_guest::addr::Range::new(Gva(at), 0x20);
    let watched = crate::quiesce::Watched::new(range, name);
    let watch = crate::quiesce::Watch::of(vec![watched]);
    let found = super::blocking(&guest, &kernel, &watch, &options(false)).unwrap();
    assert_eq!(found.len(), 1, "{found:?}");
    // A look that takes too long is not repeated then.
    guest.pause_takes.set(Duration::from_secs(1));
    let error = super::blocking(&guest, &kernel, &watch, &options(false)).unwrap_err();
    assert_eq!(error.exit_code(), ExitCode::TryAgain, "{error}");
}

#[test]
fn frames_that_the_page_tables_no_longer_lead_to_are_not_held() {
    let guest = busy_guest();
    guest.attempts_left.set(10);
    guest.meanwhile(|g| {
        let memory = &g.world.memory;
        let other = memory.frame();
        memory.map_page(Gva(FUNCTIONS[A].1 & !0xfff), other, false, true);
    });
    let patient = Options {
        timeout: Duration::from_millis(200),
        ..options(false)
    };
    let payload = payload("one", &[A]);
    apply(&guest, &guest.kernel(), &payload, Mode::Apply, &patient).unwrap_err();
    assert_eq!(guest.attempts_left.get(), 9);
}
