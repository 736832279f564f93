//! A mock guest with a timer interrupt's handler, and a gate in it that has woken all threads before it is looked at.

use locus_guest::addr::{Gva, Range};
use locus_kernel::fixture::TEXT;

use super::gate::{GateState, FUNCTION};
use super::place::{self, Place, INT3, INTO};
use super::{Gate, Result};
use crate::apply::{self, mock::options};
use crate::arena::{self, Arena};
use crate::machine::mock::Guest;
use crate::machine::Machine as _;
use crate::plan::{self, conditions::Entry};
use crate::x86::{self, JUMP};

/// Where the timer interrupt's handler is in the mock guest: between two other functions.
pub(crate) const HANDLER: u64 = TEXT.0 + 0x1220;
/// Where its redirect goes.
pub(crate) const SITE: u64 = HANDLER + 5;

/// The mock guest with such a handler.
pub(crate) fn guest() -> Guest {
    // The nop of ftrace; push r15; push r14; push r13; ret
    let code = [
        0x0f, 0x1f, 0x44, 0, 0, 0x41, 0x57, 0x41, 0x56, 0x41, 0x55, 0xc3,
    ];
    Guest::with(|fixture| fixture.function(HANDLER, FUNCTION, &code))
}

/// A gate whose code is nowhere yet, to wake threads in the way of the patch `one`.
pub(super) fn gate(guest: &Guest) -> Result<Gate> {
    let kernel = guest.kernel();
    let mut arena = Arena::read(&kernel)?;
    plan::resolve_interrupted(&kernel, &mut arena)?;
    let first = arena.find_room(kernel.kind, place::PAGES)?;
    let text = arena::page_address(first);
    let at = text.plus(INTO as u64);
    let handler = Entry {
        at: Gva(HANDLER),
        site: Gva(SITE),
        name: FUNCTION.into(),
    };
    let room = Range::new(Gva(HANDLER), 0x20);
    let old: [u8; JUMP] = guest.peek(SITE);
    let mut code = vec![INT3; INTO];
    code.extend(old);
    code.extend(x86::jump(at.plus(JUMP as u64), Gva(SITE + JUMP as u64)).unwrap());
    let place = Place {
        patch: "one".into(),
        text: Range::new(text, code.len() as u64),
        site: Gva(SITE),
        bytes: [old, x86::jump(Gva(SITE), at).unwrap()],
    };
    let (page, slot) = place.entry(&code, &handler, room)?;
    Ok(Gate {
        arena,
        slot,
        page,
        data: [GateState::Done as u32, 0, 0, 0]
            .map(u32::to_le_bytes)
            .concat(),
        place,
        handler,
        room,
    })
}

impl Guest {
    /// Carries out a nudge.
    pub(crate) fn nudge(&self) -> Result<u32> {
        let kernel = self.kernel();
        let gate = gate(self)?;
        apply::begin(self, &gate.place.change(&kernel)?)?;
        let passed = gate.pass(self, &kernel, &options(false));
        if passed.is_ok() {
            self.ended();
        }
        passed.map(|(woken, _)| woken)
    }
}
