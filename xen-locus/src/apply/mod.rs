//! Carries out a plan: pause the guest, look where its threads are, write, verify, unpause.
//!
//! What can be done before the pause is done before it: the new code is in the arena, and every page to be written and every
//! stack is mapped. Pages to be written are mapped for an attempt, and not during the wait before the next one. In the
//! pause: registers, the last look, the writes.

use std::cell::Cell;

use locus_kernel::Kernel;
use locus_payload::Payload;
use sha2::{Digest, Sha256};

use crate::arena::record::{Slot, State};
use crate::arena::{self, Arena};
use crate::error::{Error, Result};
use crate::machine::{self, Machine};
use crate::operation::Operation;
use crate::plan::{self, Mode, PatchStack, Plan, Prepared, Readiness};
use crate::storage::journal::Change;

mod moment;
mod options;
mod patience;
mod report;
mod write;

pub use moment::blocking;
pub(crate) use moment::execute;
use moment::watch_of;
pub use options::Options;
pub(crate) use patience::Patience;
use report::Concerned;
pub use report::{nothing_to_do, Outcome, Report};
pub(crate) use report::{report, Done};

/// Applies a payload on top of the patches that are there, or in their place.
///
/// # Errors
/// See [`Error`]: the guest is then unchanged, or the message says otherwise.
pub fn apply(
    machine: &dyn Machine,
    kernel: &Kernel<'_>,
    payload: &Payload,
    mode: Mode,
    options: &Options,
) -> Result<Report> {
    kernel.check_runs()?;
    let patience = Patience::new(options);
    let placed = Cell::new(false);
    let done = keep_trying(machine, kernel, &patience, |kernel| {
        apply_once(machine, kernel, payload, mode, &patience, &placed)
    });
    done.map_err(|error| match placed.get() && is_parked(kernel, &payload.name) {
        true => error.note(format!(
            "Its code stays parked in the guest: apply the file again, or give the memory back by `xen-locus reclaim GUEST {}`",
            payload.name
        )),
        false => error,
    })
}

/// Whether the guest has a payload called `name` that is not in force.
fn is_parked(kernel: &Kernel<'_>, name: &str) -> bool {
    let residents = Arena::read(kernel).and_then(|arena| plan::residents(kernel, &arena));
    residents.is_ok_and(|all| {
        let parked = |r: &arena::Resident| r.record.name == name && r.slot.state == State::Parked;
        all.iter().any(parked)
    })
}

/// Calls `attempt` with the guest's kernel as it was read; again with the kernel read anew, because what the guest changed
/// may have been its page tables.
///
/// # Errors
/// As [`Patience::keep_trying`].
pub(crate) fn keep_trying<T>(
    machine: &dyn Machine,
    kernel: &Kernel<'_>,
    patience: &Patience<'_>,
    attempt: impl Fn(&Kernel<'_>) -> Result<T>,
) -> Result<T> {
    patience.keep_trying(|first| match first {
        true => attempt(kernel),
        false => attempt(&machine::kernel_of(machine)?),
    })
}

/// Makes the plan, and carries it out. `placed` is set when the payload is put into the arena.
fn apply_once(
    machine: &dyn Machine,
    kernel: &Kernel<'_>,
    payload: &Payload,
    mode: Mode,
    patience: &Patience<'_>,
    placed: &Cell<bool>,
) -> Result<Report> {
    let options = patience.options;
    let mut arena = Arena::read(kernel)?;
    plan::resolve_interrupted(kernel, &mut arena)?;
    let ready = plan::prepare(kernel, &arena, payload, mode)?;
    let dry = Report::dry(payload, &ready);
    if let Readiness::Ready(ready) = &ready {
        watch_of(&ready.plan, options)?;
        let pages = (ready.first, ready.layout.rights.len());
        arena.check_memory(machine, kernel.kind, pages)?;
        check_host(machine)?;
    }
    let ready = match ready {
        Readiness::Ready(ready) if !options.dry_run => ready,
        _ => return Ok(dry),
    };
    let superseded = ready.superseded.iter().map(|r| &r.record);
    let concerned = Concerned::of(superseded.chain([&ready.record]));
    let before = concerned.digest(kernel)?;
    let record = hex::encode(Sha256::digest(&ready.record_json));
    let change = Change {
        record: record.clone(),
        generation: Some(arena.directory.generation),
        ..Change::new(kernel, Operation::Apply, &ready.record, &ready.plan)
    };
    begin(machine, &change)?;
    placed.set(true);
    let done = place(machine, kernel, &mut arena, &ready)
        .and_then(|()| carry_out(machine, kernel, &mut arena, &ready.plan, patience));
    let done = ended(machine, kernel, done)?;
    let report = report(&payload.name, Outcome::Applied, dry.functions, done);
    Ok(Report {
        superseded: dry.superseded,
        sha256: dry.sha256,
        record,
        text: concerned.change(kernel, before),
        ..report
    })
}

/// Undoes the payload called `name`.
///
/// # Errors
/// As [`apply`]; [`Class::Failed`](crate::error::Class::Failed) when another patch lies on it.
pub fn revert(
    machine: &dyn Machine,
    kernel: &Kernel<'_>,
    name: &str,
    options: &Options,
) -> Result<Report> {
    let patience = Patience::new(options);
    keep_trying(machine, kernel, &patience, |kernel| {
        revert_once(machine, kernel, name, &patience)
    })
}

/// Makes the plan, and carries it out.
fn revert_once(
    machine: &dyn Machine,
    kernel: &Kernel<'_>,
    name: &str,
    patience: &Patience<'_>,
) -> Result<Report> {
    let options = patience.options;
    let mut arena = Arena::read(kernel)?;
    let residents = plan::resolve_interrupted(kernel, &mut arena)?;
    let stack = PatchStack::new(&residents);
    let Some(resident) = stack.named(&residents, name)? else {
        return Ok(nothing_to_do(name, Outcome::AlreadyReverted));
    };
    let functions = resident.record.functions.len();
    let plan = plan::undo(kernel, &stack, resident)?;
    watch_of(&plan, options)?;
    check_host(machine)?;
    if options.dry_run {
        return Ok(report(
            name,
            Outcome::WouldRevert,
            functions,
            Done::default(),
        ));
    }
    let concerned = Concerned::of(std::iter::once(&resident.record));
    let before = concerned.digest(kernel)?;
    let mut slots = arena.directory.slots.clone();
    if let Some(slot) = slots.get_mut(resident.index) {
        slot.state = State::Reverting;
    }
    let change = Change {
        generation: Some(arena.directory.generation),
        ..Change::new(kernel, Operation::Revert, &resident.record, &plan)
    };
    begin(machine, &change)?;
    let done = arena
        .commit(machine, kernel, slots)
        .and_then(|()| carry_out(machine, kernel, &mut arena, &plan, patience));
    let done = ended(machine, kernel, done)?;
    Ok(Report {
        sha256: resident.record.sha256.clone(),
        text: concerned.change(kernel, before),
        ..report(name, Outcome::Reverted, functions, done)
    })
}

/// Notes, durably, what is about to be done.
///
/// # Errors
/// As [`check_host`]; or it can't be noted.
pub(crate) fn begin(machine: &dyn Machine, change: &Change) -> Result<()> {
    check_host(machine)?;
    machine.begin(change)
}

/// Checks that the guest can be changed now, as far as its host tells. It only reads, so a dry run asks it too.
///
/// # Errors
/// As [`Machine::check_changes`]; [`Class::TryAgain`](crate::error::Class::TryAgain): what is written to the guest now may be
/// lost.
pub(crate) fn check_host(machine: &dyn Machine) -> Result<()> {
    machine.check_changes()?;
    match machine.is_log_dirty()? {
        true => Err(write::is_log_dirty()),
        false => Ok(()),
    }
}

/// Closes the journal, unless the guest's directory still shows a change as under way.
fn ended(machine: &dyn Machine, kernel: &Kernel<'_>, done: Result<Done>) -> Result<Done> {
    let is_decided = || {
        let arena = Arena::read(kernel)?;
        let under_way = |s: &Slot| matches!(s.state, State::Applying | State::Reverting);
        Ok::<_, Error>(!arena.directory.slots.iter().any(under_way))
    };
    // A directory that can't be read may show one.
    if done.is_ok() || is_decided().unwrap_or(false) {
        machine.ended();
    }
    done
}

/// Reverts all patches, the topmost first, until one can't be reverted or `tell` returns false. `tell` gets the result of each.
/// A dry run says of each what would happen once those on top are gone.
///
/// # Errors
/// The guest's arena can't be read. What goes wrong with a patch is passed to `tell`.
pub fn revert_all(
    machine: &dyn Machine,
    kernel: &Kernel<'_>,
    options: &Options,
    mut tell: impl FnMut(&str, Result<Report>) -> bool,
) -> Result<()> {
    let residents = plan::residents(kernel, &Arena::read(kernel)?)?;
    let stack = PatchStack::new(&residents);
    for resident in stack.applied().iter().rev() {
        let name = &resident.record.name;
        let result = if options.dry_run {
            let functions = resident.record.functions.len();
            plan::undo_once_on_top(kernel, &stack, resident)
                .and_then(|plan| watch_of(&plan, options).map(|_| ()))
                .and_then(|()| check_host(machine))
                .map(|()| report(name, Outcome::WouldRevert, functions, Done::default()))
        } else {
            revert(machine, kernel, name, options)
        };
        let failed = result.is_err();
        if !tell(name, result) || failed {
            break;
        }
    }
    Ok(())
}

/// Carries out a plan whose patches the directory shows as under way, and writes to the directory what became of them.
fn carry_out(
    machine: &dyn Machine,
    kernel: &Kernel<'_>,
    arena: &mut Arena,
    plan: &Plan,
    patience: &Patience<'_>,
) -> Result<Done> {
    match execute(machine, kernel, plan, patience) {
        Ok(done) => {
            let mut slots = arena.directory.slots.clone();
            for slot in &mut slots {
                if slot.state == State::Applying {
                    slot.applied_at = arena::now();
                }
                slot.state = slot.state.after_change(true);
            }
            // If the directory can't be written: the redirects in the text say the same, and they decide.
            let _ = arena.commit(machine, kernel, slots);
            Ok(done)
        }
        Err(error) => {
            // Whatever went wrong, the guest's text tells whether the change took place. If it does not, the directory still
            // shows the change as under way.
            if plan::resolve_interrupted(kernel, arena).is_ok() {
                // Nothing refers to code that is not in force. It stays for the next attempt.
                let slots = arena.directory.slots.clone();
                arena.commit(machine, kernel, slots)?;
            }
            Err(error)
        }
    }
}

/// Writes a payload's code to the arena, and an entry for it to the end of the directory: as being applied. The payloads that
/// it supersedes are shown as being reverted. Nothing that the directory leads to is overwritten.
fn place(
    machine: &dyn Machine,
    kernel: &Kernel<'_>,
    arena: &mut Arena,
    ready: &Prepared,
) -> Result<()> {
    let mut slots = arena.directory.slots.clone();
    for superseded in &ready.superseded {
        if let Some(slot) = slots.get_mut(superseded.index) {
            slot.state = State::Reverting;
        }
    }
    if let Some(index) = ready.parked.filter(|&index| index < slots.len()) {
        slots.remove(index);
        if !ready.listed {
            // All of it is written anew. The guest does not know it, so its pages are nobody's without the entry.
            let mut others = arena.directory.slots.clone();
            others.remove(index);
            arena.commit(machine, kernel, others)?;
        }
    }
    arena.add(machine, kernel, ready.first, &ready.layout.rights)?;
    for part in &ready.fresh {
        let bytes = ready.image.bytes.get(part.clone()).ok_or_else(|| {
            Error::failed(format!(
                "bytes {part:?} are not in the payload's image: this is a defect of xen-locus"
            ))
        })?;
        let at = arena::page_address(ready.first).plus(part.start as u64);
        arena.write(machine, at, bytes)?;
    }
    let too_big = |_| Error::failed("the payload's place does not fit the directory");
    let slot = Slot {
        state: State::Applying,
        first: u16::try_from(ready.first).map_err(too_big)?,
        pages: u16::try_from(ready.layout.rights.len()).map_err(too_big)?,
        applied_at: arena::now(),
        record_offset: u32::try_from(ready.record_place.start).map_err(too_big)?,
        record_len: u32::try_from(ready.record_json.len()).map_err(too_big)?,
        record_sha256: Sha256::digest(&ready.record_json).into(),
    };
    slots.push(slot);
    arena.commit(machine, kernel, slots)
}

#[cfg(test)]
pub(crate) mod mock;
#[cfg(test)]
mod tests;
