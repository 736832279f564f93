//! Patches on patches, in the mock guest: what stands in its text after each step, and after a run
//! that is ended at any of its writes.

#![allow(clippy::cast_possible_truncation)] // small numbers

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use locus_guest::addr::Frame;
use locus_guest::addr::{Gfn, Gva};
use locus_guest::{GuestType, Memory, MemoryMut};
use locus_kernel::fixture::{Fixture, TEXT};
use locus_kernel::fixture_world::{World, STACKS, STACK_LEN};
use locus_kernel::modules::{self, ModuleReader};
use locus_payload::testelf::Spec;

use super::*;
use crate::arena::record::ENTRIES_MAX;
use crate::arena::Resident;
use crate::error::{Class, ExitCode};
use crate::recover::{self, Finding};
use crate::storage::journal::Intent;
use crate::x86;

mod drift;
mod gate;
mod mock;
mod moving;

use mock::Guest;

/// Where the functions stand that are replaced, and their redirects.
const FUNCTIONS: [(&str, u64); 3] = [
    ("a_show", TEXT.0 + 0x1200),
    ("b_show", TEXT.0 + 0x1240),
    ("c_show", TEXT.0 + 0x1280),
];
/// A part of the first of them that stands elsewhere: a call, and back to its main part.
const COLD: (u64, [u8; 10]) = (
    TEXT.0 + 0x12c0,
    [0xe8, 0, 0, 0, 0, 0xe9, 0x40, 0xff, 0xff, 0xff],
);
/// A function's code: the nop of ftrace, `mov $n, %eax`, `ret`.
fn code(n: u8) -> [u8; 11] {
    [0x0f, 0x1f, 0x44, 0, 0, 0xb8, n, 0, 0, 0, 0xc3]
}

impl Guest {
    fn new() -> Guest {
        const E820: Gva = Gva(TEXT.0 + (12 << 20));
        let world = World::with(GuestType::Pvh, |fixture: &mut Fixture| {
            for (n, (name, at)) in FUNCTIONS.into_iter().enumerate() {
                fixture.function(at, name, &code(n as u8));
            }
            fixture.function(COLD.0, "a_show.cold", &COLD.1);
            let at = E820.0;
            fixture.symbols.push((at, 'D', "e820_table".to_owned()));
        });
        // A pointer to an empty map.
        let words = [E820.0 + 8, 0].map(u64::to_le_bytes).concat();
        world.memory.map_bytes(E820, &words, true, false);
        Guest {
            world,
            left: Rc::new(Cell::new(u32::MAX)),
            intent: RefCell::default(),
        }
    }

    fn kernel(&self) -> Kernel<'_> {
        let world = &self.world;
        Kernel::read(&world.memory, world.kind, &world.vcpus).unwrap()
    }

    fn apply(&self, payload: &Payload, mode: Mode) -> Result<Report> {
        apply(self, &self.kernel(), payload, mode, &options(false))
    }

    fn applied(&self, payload: &Payload) -> Report {
        let report = self.apply(payload, Mode::Apply).unwrap();
        assert_eq!(report.result, Outcome::Applied);
        report
    }

    fn revert(&self, name: &str) -> Result<Report> {
        revert(self, &self.kernel(), name, &options(false))
    }

    fn revert_all(&self, dry_run: bool) -> Vec<(String, Result<Report>)> {
        let mut all = Vec::new();
        revert_all(self, &self.kernel(), &options(dry_run), |name, result| {
            all.push((name.to_owned(), result));
            true
        })
        .unwrap();
        all
    }

    fn residents(&self) -> Result<Vec<Resident>> {
        let kernel = self.kernel();
        plan::residents(&kernel, &Arena::read(&kernel)?)
    }

    /// Names of the applied patches, the undermost first.
    fn status(&self) -> Result<Vec<String>> {
        let residents = self.residents()?;
        let stack = Stack::new(&residents);
        let applied = stack.applied().iter();
        Ok(applied.map(|r| r.record.name.clone()).collect())
    }

    /// Which patch's version of each function the guest runs; empty for the kernel's own.
    fn runs(&self) -> [String; 3] {
        let kernel = self.kernel();
        let residents = kernel_residents(&kernel);
        FUNCTIONS.map(|(name, at)| {
            let mut found = [0; 11];
            kernel.space.read(Gva(at), &mut found).unwrap();
            let n = FUNCTIONS.iter().position(|f| f.0 == name).unwrap();
            if found == code(n as u8) {
                return String::new();
            }
            let owner = residents.iter().find(|r| {
                let functions = &r.record.functions;
                functions.iter().any(|f| {
                    let jump = x86::jump(f.site, f.new).unwrap();
                    f.old.0 == at && found[5..10] == jump
                })
            });
            owner.map_or("?".into(), |r| r.record.name.clone())
        })
    }

    /// Settles what is left, which must be found to be so, and leaves nothing to do.
    fn recover(&self, expected: Finding) {
        let kernel = self.kernel();
        let intent = self.intent.take();
        let find = |intent: Option<&Intent>| {
            recover::of_guest(self, &kernel, intent, &options(false)).unwrap()
        };
        let found = find(intent.as_ref());
        assert_eq!(found.result, expected, "{found}");
        assert_eq!(find(None).result, Finding::NothingToDo);
        self.is_as_recorded();
    }

    fn pages(&self) -> usize {
        Arena::read(&self.kernel()).unwrap().room(GuestType::Pvh).1
    }
}

/// What is in the arena, whatever the state of it.
fn kernel_residents(kernel: &Kernel<'_>) -> Vec<Resident> {
    Arena::read(kernel).unwrap().residents(kernel).unwrap()
}

fn options(dry_run: bool) -> Options {
    Options {
        timeout: Duration::ZERO,
        dry_run,
        ..Options::default()
    }
}

/// A payload called `name` that replaces `functions`.
fn payload(name: &str, functions: &[usize]) -> Payload {
    let spec = Spec {
        objects: vec![(
            None,
            functions.iter().map(|&n| (FUNCTIONS[n].0, 0)).collect(),
        )],
        ..Spec::default()
    };
    let mut payload = Payload::parse(name, &spec.bytes()).unwrap();
    payload.name = name.into();
    payload.sha256 = [name.as_bytes()[0]; 32];
    payload
}

const A: usize = 0;
const B: usize = 1;
const C: usize = 2;

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
fn a_name_that_is_in_force_is_none_of_those_that_are_not() {
    let guest = Guest::new();
    guest.applied(&payload("fix", &[A]));
    guest.applied(&payload("other", &[C]));
    guest.revert("fix").unwrap();
    guest.revert("other").unwrap();
    let mut second = payload("fix", &[A, B]);
    second.sha256 = [2; 32];
    guest.applied(&second);
    let found = recover::of_guest(&guest, &guest.kernel(), None, &options(false)).unwrap();
    assert_eq!(found.parked, ["other"]);
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
        assert_eq!(guest.apply(&all, mode).unwrap().result, Outcome::Already);
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
fn another_payload_of_an_applied_name_is_refused_with_both_digests() {
    let guest = Guest::new();
    guest.applied(&payload("one", &[A]));
    let mut other = payload("one", &[A]);
    other.sha256 = [0xee; 32];
    for mode in [Mode::Apply, Mode::Replace] {
        let said = guest.apply(&other, mode).unwrap_err().to_string();
        assert!(
            said.contains(&"ee".repeat(32)) && said.contains(&"6f".repeat(32)),
            "{said}"
        );
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

/// Lets the sleeping task of the mock guest hold a return address.
fn sleep_at(guest: &Guest, word: u64) {
    let at = STACKS.plus(3 * 4 * STACK_LEN as u64 + 0x1e80);
    let frames = guest.kernel().space.frames(at, 8).unwrap();
    let window = guest.map_mut(&frames).unwrap();
    window.write(at.offset(), &word.to_le_bytes()).unwrap();
}

#[test]
fn who_is_in_a_part_of_a_function_that_stands_elsewhere_is_in_its_way() {
    let guest = Guest::new();
    sleep_at(&guest, COLD.0 + 5);
    let error = guest.apply(&payload("one", &[A]), Mode::Apply).unwrap_err();
    let blockers = &error.blocked().unwrap().blockers;
    assert_eq!(
        (&*blockers[0].function, blockers[0].offset),
        ("a_show.cold", 5)
    );
    // Of another function's he is not.
    guest.applied(&payload("two", &[B]));
    sleep_at(&guest, 0);
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
    sleep_at(&guest, inside(&two, 0));
    blocked(&on_a, Mode::Apply);
    // A function that is given back, and one that lies below.
    sleep_at(&guest, inside(&two, 1));
    blocked(&on_c, Mode::Replace);
    sleep_at(&guest, inside(&one, 0));
    blocked(&on_c, Mode::Replace);
    // The bytes of a redirect.
    sleep_at(&guest, FUNCTIONS[A].1 + 7);
    blocked(&on_a, Mode::Apply);
    // What lies below is in nobody's way while it stays there.
    sleep_at(&guest, inside(&one, 0));
    guest.applied(&on_a);
    assert_eq!(guest.runs(), ["three", "two", ""]);
}

/// What `status` shows, and whose version of each function runs.
type Shown = (Vec<&'static str>, [&'static str; 3]);

/// Carries out `action` on a guest with two patches on each other, ended before its first write, before
/// its second, and so on: the guest shows `new` or what it showed before, and the next run goes on
/// from there; or, if the action was ended between its `texts` writes to text or while the payload
/// `enters` the guest's modules, it is called uncertain until it is taken back by its journal.
fn ended_at_any_write(
    action: fn(&Guest) -> Result<Report>,
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
        let found = recover::of_guest(&guest, &kernel, intent.as_ref(), &options(false)).unwrap();
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

/// A payload that lets threads go on in what it replaces.
fn entry_only(name: &str, functions: &[usize]) -> Payload {
    let mut payload = payload(name, functions);
    payload.modinfo.entry_only = true;
    payload
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
    sleep_at(&guest, FUNCTIONS[A].1 + 10);
    assert_eq!(code(apply(&one, &once(false))), ExitCode::TryAgain);
    let strict = payload("two", &[A]);
    assert_eq!(code(apply(&strict, &once(true))), ExitCode::NotApplicable);
    sleep_at(&guest, FUNCTIONS[A].1 + 7);
    assert_eq!(code(apply(&one, &once(true))), ExitCode::TryAgain);
    sleep_at(&guest, FUNCTIONS[A].1 + 10);
    assert_eq!(apply(&one, &once(true)).unwrap().result, Outcome::Applied);
    assert_eq!(guest.runs(), ["one", "", ""]);

    // Who is in the old version yet is told, and is in the way of others on top.
    let kernel = guest.kernel();
    let drains = || {
        let residents = guest.residents().unwrap();
        let stack = Stack::new(&residents);
        let watch = plan::old_versions(&kernel, &stack, stack.applied()[0]).unwrap();
        let blockers = crate::quiesce::inside(&kernel, &guest.world.vcpus, &watch).unwrap();
        blockers.len()
    };
    assert_eq!(drains(), 1);
    assert_eq!(code(apply(&strict, &once(false))), ExitCode::TryAgain);
    sleep_at(&guest, 0);
    assert_eq!(drains(), 0);

    // The way back.
    let place = || {
        let residents = guest.residents().unwrap();
        let one = residents.iter().find(|r| r.record.name == "one").unwrap();
        one.record.functions[0].new.0
    };
    let new = place();
    sleep_at(&guest, new + 4);
    assert_eq!(code(guest.revert("one")), ExitCode::TryAgain);
    let back = super::revert(&guest, &guest.kernel(), "one", &once(true));
    assert_eq!(back.unwrap().result, Outcome::Reverted);
    assert_eq!(guest.runs(), ["", "", ""]);
    // He is in the way of what comes there, until he leaves.
    assert_eq!(code(apply(&strict, &once(false))), ExitCode::TryAgain);
    sleep_at(&guest, 0);
    apply(&strict, &once(false)).unwrap();
    guest.revert("two").unwrap();
    sleep_at(&guest, new + 4);
    // And again, into the pages that the thread is in yet.
    assert_eq!(apply(&one, &once(true)).unwrap().result, Outcome::Applied);
    assert_eq!(place(), new);
}
