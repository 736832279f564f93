//! What becomes of a gate whose run ended before it was taken down.

use super::*;
use crate::write::Write;

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
        op: Op::Nudge,
        writes: vec![Write {
            at: Gva(at),
            expect: old.to_vec(),
            new: jump.to_vec(),
        }],
        watched: Vec::new(),
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
    let error = recover::of_guest(&guest, &guest.kernel(), intent.as_ref(), &options(false));
    assert_eq!(error.unwrap_err().exit_code(), ExitCode::Uncertain);
    assert_eq!(guest.peek::<5>(at), [0xcc; 5]);
}
