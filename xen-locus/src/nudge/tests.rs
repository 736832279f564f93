use locus_kernel::fixture::TEXT;
use locus_payload::testelf::Spec;
use locus_payload::Payload;

use super::*;
use crate::machine::mock::{payload, Guest, A, FUNCTIONS};

/// Where the timer interrupt's handler is in the mock guest: between two other functions.
const HANDLER: u64 = TEXT.0 + 0x1220;

fn guest() -> Guest {
    // The nop of ftrace; push r15; push r14; push r13; ret
    let code = [
        0x0f, 0x1f, 0x44, 0, 0, 0x41, 0x57, 0x41, 0x56, 0x41, 0x55, 0xc3,
    ];
    Guest::with(|fixture| fixture.function(HANDLER, FUNCTION, &code))
}

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

/// A gate whose code is nowhere yet.
fn gate(guest: &Guest) -> Gate {
    let site = Gva(HANDLER + 5);
    let old: [u8; JUMP] = guest.peek(site.0);
    let jump = x86::jump(site, Gva(FUNCTIONS[A].1)).unwrap();
    Gate {
        first: 8,
        code: vec![INT3; INTO],
        data: Vec::new(),
        patch: "one".into(),
        handler: Entry {
            at: Gva(HANDLER),
            site,
            name: FUNCTION.into(),
        },
        room: Range::new(Gva(HANDLER), 0x20),
        bytes: [old, jump],
    }
}

#[test]
fn both_redirects_of_a_nudge_are_refused_where_a_kprobe_stands_and_while_one_comes() {
    let guest = guest();
    let gate = gate(&guest);
    let site = gate.handler.site.0;
    let turn = |turn| {
        let options = crate::apply::mock::options(false);
        gate.turn(&guest, &guest.kernel(), turn, &options)
    };
    for (which, after) in [(Turn::Up, gate.bytes[1]), (Turn::Down, gate.bytes[0])] {
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
