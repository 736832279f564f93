use locus_kernel::fixture::TEXT;
use locus_payload::testelf::Spec;
use locus_payload::Payload;

use super::*;
use crate::machine::mock::{Guest, A, FUNCTIONS};

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
    let watch = Watch::of(vec![Watched {
        range: Range::new(Gva(at), 0x20),
        name: name.into(),
    }]);
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
