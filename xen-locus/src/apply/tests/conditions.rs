//! What must be true before the mock guest's text is written, for each that writes it.

use std::time::Duration;

use locus_payload::testelf::{Spec, R_PLT32};

use super::*;
use crate::error::Class;
use crate::machine::Writing;
use crate::write::{About, Lock, Write};

/// Behind the redirect of function `n`.
fn body(n: usize) -> u64 {
    FUNCTIONS[n].1 + 10
}

/// Whatever writes to the guest's text, on a guest with patches `one` (on A and B) and, on C, a torn nudge.
type Action = fn(&Guest) -> Result<()>;

fn applies(guest: &Guest) -> Result<()> {
    guest.apply(&payload("two", &[A]), Mode::Apply).map(|_| ())
}

fn replaces(guest: &Guest) -> Result<()> {
    let other = payload("other", &[B]);
    guest.apply(&other, Mode::Replace).map(|_| ())
}

fn reverts(guest: &Guest) -> Result<()> {
    guest.revert("one").map(|_| ())
}

/// Takes back what a run is about to do to A by its journal.
fn rolls_back(guest: &Guest) -> Result<()> {
    use crate::operation::Operation;
    use crate::recover;
    use crate::storage::journal::Change;
    let at = FUNCTIONS[A].1 + 5;
    let now: [u8; 5] = guest.peek(at);
    let write = Write {
        at: Gva(at),
        expect: vec![0x90; 5],
        new: now.to_vec(),
        about: About::Text,
    };
    let kernel = guest.kernel();
    let change = Change::of(
        &kernel,
        Operation::Nudge,
        "one",
        &[write],
        std::iter::empty(),
    );
    guest.begin(&change)?;
    let intent = guest.intent.borrow().clone();
    let done = recover::of_guest(guest, &kernel, intent.as_ref(), &options(false)).map(|_| ());
    if done.is_ok() {
        guest.poke(at, &now);
    }
    *guest.intent.borrow_mut() = None;
    done
}

const ACTIONS: [(&str, Action); 4] = [
    ("apply", applies),
    ("replace", replaces),
    ("revert", reverts),
    ("roll back", rolls_back),
];

/// A guest with a patch on A and B.
fn patched() -> Guest {
    let guest = Guest::new();
    guest.applied(&payload("one", &[A, B]));
    guest
}

/// The action fails and says `words`, the guest's text is as before, and once the cause is taken `away` it succeeds.
fn fails(what: &str, action: Action, guest: &Guest, words: &[&str], away: impl FnOnce(&Guest)) {
    let before = guest.runs();
    let error = action(guest).expect_err(what);
    assert_eq!(error.class(), Class::TryAgain, "{what}: {error}");
    let said = error.to_string();
    let all = words.iter().all(|w| said.contains(w));
    assert!(all, "{what}: {said}");
    assert_eq!(guest.runs(), before, "{what}");
    away(guest);
    action(guest).unwrap_or_else(|e| panic!("{what}: {e}"));
}

#[test]
fn a_kprobe_that_is_registered_and_disabled_is_in_the_way_of_each_write_to_text() {
    for (what, action) in ACTIONS {
        // On the redirect itself, where the kernel's own code and its copy differ.
        let guest = patched();
        guest.add_kprobe(3, FUNCTIONS[A].1 + 5);
        let words = ["a kprobe of the guest's own stands at"];
        fails(what, action, &guest, &words, |g| g.remove_kprobe(3));
    }
    // In what stops to run, and in what begins to run again.
    for (what, action, n) in [("revert", ACTIONS[2].1, B), ("replace", ACTIONS[1].1, A)] {
        let guest = patched();
        let place = guest.residents().unwrap()[0].record.functions[n].new.0;
        for at in [place + 4, body(n)] {
            guest.add_kprobe(0, at);
            let error = action(&guest).expect_err(what);
            assert!(
                error.to_string().contains("a kprobe of the guest's"),
                "{error}"
            );
            guest.remove_kprobe(0);
        }
        // The nop in front of it is ftrace's, and others are no matter.
        guest.add_kprobe(0, FUNCTIONS[n].1);
        guest.add_kprobe(1, FUNCTIONS[C].1 + 5);
        action(&guest).unwrap();
    }
}

#[test]
fn only_what_is_written_is_mapped_to_be_written() {
    let guest = patched();
    guest.meanwhile(|g| assert_eq!(g.writable.get(), 2, "the redirects of A and B"));
    reverts(&guest).unwrap();
    assert!(guest.meanwhile.borrow().is_empty());
    assert_eq!(guest.writable.get(), 0);
}

#[test]
fn a_module_that_comes_during_the_wait_is_noticed_because_it_may_guard_the_code() {
    for (what, action) in &ACTIONS[..3] {
        let guest = patched();
        let head = guest.variable("modules");
        let first: [u8; 8] = guest.peek(head);
        guest.meanwhile(move |g| g.poke(head, &head.to_le_bytes()));
        let words = ["the guest loaded or unloaded a module"];
        fails(what, *action, &guest, &words, |g| g.poke(head, &first));
    }
}

#[test]
fn locks_of_the_guest_are_free_and_the_sentence_names_the_one_that_is_not() {
    for (what, action) in ACTIONS {
        let guest = patched();
        let lock = guest.variable(Lock::Kprobes.symbol());
        guest.poke(lock, &8u64.to_le_bytes());
        let words = ["kprobe_mutex is held"];
        fails(what, action, &guest, &words, |g| g.poke(lock, &[0; 8]));
        // It is taken while the tool waits for the pause.
        let guest = patched();
        guest.meanwhile(move |g| g.poke(lock, &8u64.to_le_bytes()));
        fails(what, action, &guest, &words, |g| g.poke(lock, &[0; 8]));
    }
    for (what, action) in [ACTIONS[0], ACTIONS[1], ACTIONS[3]] {
        let guest = patched();
        let lock = guest.variable(Lock::Modules.symbol());
        guest.meanwhile(move |g| g.poke(lock, &8u64.to_le_bytes()));
        let words = ["module_mutex is held"];
        fails(what, action, &guest, &words, |g| g.poke(lock, &[0; 8]));
    }
}

#[test]
fn a_kprobe_that_comes_during_the_wait_is_seen_in_the_pause() {
    for (what, action) in ACTIONS {
        let guest = patched();
        guest.meanwhile(|g| g.add_kprobe(5, FUNCTIONS[A].1 + 5));
        let words = ["added or removed a kprobe"];
        fails(what, action, &guest, &words, |g| g.remove_kprobe(5));
        // One goes and another comes in the same place in memory: the lists are as before.
        let guest = patched();
        guest.add_kprobe(5, FUNCTIONS[C].1 + 5);
        guest.meanwhile(|g| {
            g.remove_kprobe(5);
            g.add_kprobe(5, FUNCTIONS[A].1 + 5);
        });
        fails(what, action, &guest, &words, |g| g.remove_kprobe(5));
        // A page of copied instructions is new.
        let guest = patched();
        let pages = guest.variable("kprobe_insn_slots") + 16;
        let old: [u8; 8] = guest.peek(pages);
        guest.meanwhile(move |g| g.poke(pages, &FUNCTIONS[A].1.to_le_bytes()));
        fails(what, action, &guest, &words, |g| g.poke(pages, &old));
        // It is where one was that is gone: the list begins as before. Its link, or its page, is another.
        let guest = patched();
        let element = guest.variable("some_kprobes") + 256;
        let page = move |g: &Guest, at: u64| {
            g.poke(element, &pages.to_le_bytes());
            g.poke(element + 16, &at.to_le_bytes());
        };
        page(&guest, FUNCTIONS[C].1);
        guest.poke(pages, &element.to_le_bytes());
        guest.meanwhile(move |g| page(g, FUNCTIONS[A].1));
        fails(what, action, &guest, &words, |_| ());
    }
}

#[test]
fn what_changes_during_the_wait_is_looked_at_anew_as_long_as_there_is_time() {
    let patient = Options {
        timeout: Duration::from_secs(20),
        ..options(false)
    };
    let applied = |guest: &Guest, patch: &Payload| {
        super::super::apply(guest, &guest.kernel(), patch, Mode::Apply, &patient)
    };
    let two = payload("two", &[C]);
    // A kprobe elsewhere, and the tree of modules: neither is in the way for long.
    let guest = patched();
    guest.meanwhile(|g| g.add_kprobe(5, FUNCTIONS[A].1));
    let tree = guest.variable("mod_tree");
    let [seq]: [u8; 1] = guest.peek(tree);
    guest.meanwhile(move |g| g.poke(tree, &[seq + 2]));
    let report = applied(&guest, &two).unwrap();
    assert_eq!((report.result, report.attempts), (Outcome::Applied, 3));
    assert_eq!(guest.runs(), ["one", "one", "two"]);
    assert_eq!(guest.peek(tree), [seq + 4]);
    guest.is_as_recorded();
    // The reason that holds in the end is the one that is given.
    let guest = patched();
    guest.meanwhile(|g| g.add_kprobe(5, FUNCTIONS[C].1 + 5));
    let error = applied(&guest, &two).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("a kprobe of the guest's own stands at"),
        "{error}"
    );
    assert_eq!(guest.status().unwrap(), ["one"]);
    // The same for the way back.
    let guest = patched();
    guest.meanwhile(|g| g.add_kprobe(5, FUNCTIONS[C].1));
    let done = super::super::revert(&guest, &guest.kernel(), "one", &patient);
    assert_eq!(done.unwrap().result, Outcome::Reverted);
}

#[test]
fn who_begins_to_trace_during_the_wait_is_named() {
    let call = [0xe8, 0, 0, 0, 0];
    let guest = Guest::new();
    let at = FUNCTIONS[A].1;
    let nop: [u8; 5] = guest.peek(at);
    guest.meanwhile(move |g| g.poke(at, &call));
    let error = applies(&guest).unwrap_err();
    let words = "began or stopped to trace or to livepatch a_show";
    assert!(
        error.is_passing() && error.to_string().contains(words),
        "{error}"
    );
    // The plan that is made anew says what is there.
    let error = applies(&guest).unwrap_err();
    assert!(
        error.to_string().contains("traced by the guest itself"),
        "{error}"
    );
    guest.poke(at, &nop);
    applies(&guest).unwrap();
    // The way back leaves the nop as it is.
    guest.poke(at, &call);
    guest.revert("two").unwrap();
    assert_eq!(guest.peek::<5>(at), call);
}

/// A payload that calls a function of payload `one`, which is a module of the guest.
fn user() -> Payload {
    let spec = Spec {
        objects: vec![(None, vec![(FUNCTIONS[C].0, 0)])],
        ..Spec::default()
    };
    let (mut elf, places) = spec.elf();
    let used = elf.undefined("new_0_a_show");
    let call = elf.append(places.text, 16, 16);
    elf.data(places.text)[usize::try_from(call).unwrap()] = 0xe8;
    elf.reloc(places.text, call + 1, R_PLT32, used, -4);
    let mut payload = Payload::parse("user", &elf.build()).unwrap();
    payload.name = "user".into();
    payload
}

#[test]
fn a_module_that_is_only_referred_to_must_stay_live_too() {
    let guest = patched();
    let module = guest.residents().unwrap()[0].record.module.0;
    let state = |state: u32| move |g: &Guest| g.poke(module, &state.to_le_bytes());
    let uses: Action = |guest| guest.apply(&user(), Mode::Apply).map(|_| ());
    // MODULE_STATE_GOING: its exit function runs, and no lock is held.
    guest.meanwhile(state(2));
    fails("apply", uses, &guest, &["module one changed"], state(0));
    // The second time its code is parked, and known to the guest.
    guest.revert("user").unwrap();
    guest.meanwhile(state(2));
    fails("again", uses, &guest, &["module one changed"], state(0));
    guest.revert("user").unwrap();
    guest.poke(module, &2u32.to_le_bytes());
    fails(
        "at first",
        uses,
        &guest,
        &["module one is unloading"],
        state(0),
    );
}

#[test]
fn nothing_is_called_applied_that_does_not_hold() {
    let guest = patched();
    let (one, at) = (payload("one", &[A, B]), FUNCTIONS[B].1 + 5);
    let jump: [u8; 5] = guest.peek(at);
    let drifted = || guest.apply(&one, Mode::Apply).unwrap_err();
    guest.poke(at, &[0xcc]);
    let error = drifted();
    assert_eq!(error.class(), Class::Failed, "{error}");
    let said = error.to_string();
    let expected = hex::encode(jump);
    let found = format!("cc{}", &expected[2..]);
    for words in ["has drifted", "b_show", &expected, &found, "verify"] {
        assert!(said.contains(words), "no {words}: {said}");
    }
    guest.add_kprobe(2, at);
    let error = drifted();
    assert_eq!(error.class(), Class::TryAgain, "{error}");
    assert!(
        error.to_string().contains("kprobe of the guest's own"),
        "{error}"
    );
    guest.remove_kprobe(2);
    guest.poke(at, &jump);
    let report = guest.apply(&one, Mode::Apply).unwrap();
    assert_eq!(report.result, Outcome::AlreadyApplied);
}

#[test]
fn a_thread_in_a_copied_instruction_of_a_kprobe_is_in_the_way() {
    let guest = Guest::new();
    let page = FUNCTIONS[C].1 & !0xfff | 0x8000;
    let (element, pages) = (
        guest.variable("some_kprobes"),
        guest.variable("kprobe_optinsn_slots") + 16,
    );
    let words = [pages, pages, page].map(u64::to_le_bytes).concat();
    guest.poke(element, &words);
    guest.poke(pages, &element.to_le_bytes());
    for at in [page, page + 0x123] {
        guest.sleep_at(at);
        let error = applies(&guest).unwrap_err();
        let blockers = &error.blocked().expect("it is applied").blockers;
        assert!(
            blockers[0].function.contains("kprobe_optinsn_slots"),
            "{error}"
        );
    }
    guest.sleep_at(page - 1);
    applies(&guest).unwrap();
}

#[test]
fn a_thread_that_is_about_to_register_a_kprobe_is_in_the_way() {
    let register = FUNCTIONS[A].1 + 0x400;
    let code = [0x90; 16];
    let guest = Guest::with(|f| f.function(register, "register_kprobe", &code));
    for (at, is_in) in [(register + 3, true), (FUNCTIONS[C].1 + 8, false)] {
        guest.sleep_at(at);
        let done = applies(&guest);
        let blockers = done.as_ref().err().and_then(|e| e.blocked());
        let named = blockers.is_some_and(|b| b.blockers[0].function.contains("register_kprobe"));
        assert_eq!((named, done.is_ok()), (is_in, !is_in), "{done:?}");
    }
}

#[test]
fn a_kernel_that_hides_callers_behind_a_trampoline_of_no_known_name_is_refused() {
    let (begins, trampoline) = (FUNCTIONS[A].1 + 0x400, FUNCTIONS[A].1 + 0x440);
    for (function, name) in [
        ("register_ftrace_graph", "return_to_handler"),
        ("register_kretprobe", "kretprobe_trampoline"),
        ("register_kretprobe", "__kretprobe_trampoline"),
        ("rethook_hook", "arch_rethook_trampoline"),
    ] {
        for is_named in [false, true] {
            let guest = Guest::with(|f| {
                f.symbols.retain(|(_, _, n)| n != "arch_rethook_trampoline");
                f.function(begins, function, &[0xc3]);
                let name = if is_named { name } else { "renamed.llvm.1" };
                f.function(trampoline, name, &[0xc3]);
            });
            let done = applies(&guest);
            assert_eq!(done.is_ok(), is_named, "{function}: {done:?}");
            if let Err(error) = done {
                assert_eq!(error.class(), Class::NotApplicable, "{error}");
                assert!(error.to_string().contains(name), "{error}");
            }
        }
    }
}

#[test]
fn a_static_key_that_is_switched_during_the_wait_is_seen_in_the_pause() {
    use crate::link::fixups::KeyCount;
    use crate::plan::{Plan, Proposal};
    let at = FUNCTIONS[A].1 + 5;
    for (now, is_as_linked) in [(0, false), (2, false), (1, true)] {
        let guest = Guest::new();
        let key = guest.variable("some_kprobes");
        guest.poke(key, &1i32.to_le_bytes());
        let keys = [KeyCount {
            key: Gva(key),
            count: 1,
        }];
        let redirect = Write {
            at: Gva(at),
            expect: guest.peek::<5>(at).to_vec(),
            new: vec![0x90; 5],
            about: About::Text,
        };
        let kernel = guest.kernel();
        let proposal = Proposal {
            patch: "one",
            keys: &keys,
            redirects: vec![redirect.clone()],
            ..Proposal::default()
        };
        let plan = Plan::new(&kernel, proposal).unwrap();
        guest.meanwhile(move |g| g.poke(key, &i32::to_le_bytes(now)));
        let options = options(false);
        let done = execute(&guest, &kernel, &plan, &Patience::new(&options));
        let is_written = guest.peek::<5>(at) == *redirect.new;
        assert_eq!((done.is_ok(), is_written), (is_as_linked, is_as_linked));
        if let Err(error) = done {
            assert!(
                error.is_passing() && error.to_string().contains("static key"),
                "{error}"
            );
        }
    }
}

#[test]
fn a_dry_run_asks_the_host_too() {
    type Change = fn(&Guest);
    let cases: [(Change, ExitCode); 2] = [
        (|g| g.has_strange_host.set(true), ExitCode::NotApplicable),
        (|g| g.log_dirty.set(true), ExitCode::TryAgain),
    ];
    for (change, code) in cases {
        let guest = patched();
        change(&guest);
        let (kernel, options) = (guest.kernel(), options(true));
        let two = payload("two", &[A]);
        let refused = [
            apply(&guest, &kernel, &two, Mode::Apply, &options).unwrap_err(),
            revert(&guest, &kernel, "one", &options).unwrap_err(),
            guest.revert_all(true).remove(0).1.unwrap_err(),
        ];
        for error in refused {
            assert_eq!(error.exit_code(), code, "{error}");
        }
    }
}

#[test]
fn what_xen_would_not_see_is_not_written() {
    let words = ["moved to another host as it runs"];
    for (what, action) in ACTIONS {
        // It begins before the change, or while the tool waits.
        if what != "roll back" {
            let guest = patched();
            guest.log_dirty.set(true);
            let left = guest.left.replace(0);
            let error = action(&guest).expect_err(what);
            assert!(error.to_string().contains(words[0]), "{error}");
            assert!(guest.intent.borrow().is_none(), "it is not even noted");
            guest.log_dirty.set(false);
            guest.left.set(left);
        }
        let guest = patched();
        guest.writing.set(Writing::IsLogDirty);
        fails(what, action, &guest, &words, |g| {
            g.writing.set(Writing::Begins)
        });
        let guest = patched();
        guest.writing.set(Writing::IsShutDown);
        let words = ["is suspended"];
        fails(what, action, &guest, &words, |g| {
            g.writing.set(Writing::Begins)
        });
        let guest = patched();
        guest.writing.set(Writing::WasLetRun);
        let words = ["somebody else let the guest run"];
        fails(what, action, &guest, &words, |g| {
            g.writing.set(Writing::Begins)
        });
    }
}
