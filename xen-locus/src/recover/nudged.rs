//! How a run ended that woke threads.

use locus_kernel::Kernel;

use super::way_back::roll_back;
use crate::apply::Options;
use crate::arena::{Arena, Resident};
use crate::error::Result;
use crate::machine::Machine;
use crate::nudge::place::Place;
use crate::operation::Operation;
use crate::storage::journal::{Change, Intent};

/// Takes down the gates of nudges that the arena's directory has, and then their entries; also the one that the journal's
/// `intent` is about: an earlier build made no entry. Returns the name of the patch that a nudge was about, if there was one.
pub(super) fn take_back(
    machine: &dyn Machine,
    kernel: &Kernel<'_>,
    intent: Option<&Intent>,
    options: &Options,
) -> Result<Option<String>> {
    let mut arena = Arena::read(kernel)?;
    let gates = arena.gates(kernel)?;
    let of = |gate: &Resident| Place::of(kernel, gate)?.change(kernel);
    let mut changes = gates.iter().map(of).collect::<Result<Vec<Change>>>()?;
    if let Some(intent) = intent.filter(|i| i.change.op == Operation::Nudge) {
        let noted = &intent.change;
        if !changes.iter().any(|c| c.writes == noted.writes) {
            changes.push(noted.clone());
        }
    }
    for change in &changes {
        roll_back(machine, kernel, change, options)?;
    }
    if !gates.is_empty() {
        let mut slots = arena.directory.slots.clone();
        slots.retain(|slot| !gates.iter().any(|gate| gate.slot.first == slot.first));
        arena.commit(machine, kernel, slots)?;
    }
    Ok(changes.pop().map(|change| change.patch))
}
