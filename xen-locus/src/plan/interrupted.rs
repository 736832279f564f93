//! What became of a change that an earlier run left under way.
//!
//! The arena's directory shows such a change as applying or reverting. Whether it took place is decided by the bytes in the
//! guest's text alone: all old, or all new. Anything else is uncertain.

use locus_kernel::Kernel;

use super::patch_stack::{bytes_at, PatchStack};
use crate::arena::record::State;
use crate::arena::Resident;
use crate::error::{Class, Error, Result, Torn};
use crate::link::module::lists;
use crate::write::Write;

/// The payload that the change is about, and the writes that the change consists of.
struct Interrupted<'r> {
    patch: &'r Resident,
    writes: Vec<Write>,
}

impl<'r> Interrupted<'r> {
    /// The change that the states of `residents` show as under way, if there is one.
    fn find(residents: &'r [Resident]) -> Result<Option<Interrupted<'r>>> {
        let in_state = |state| residents.iter().filter(move |r| r.slot.state == state);
        let reverting = PatchStack::of(in_state(State::Reverting));
        let mut applying = in_state(State::Applying);
        let (patch, functions) = match (applying.next(), applying.next()) {
            (Some(_), Some(_)) => {
                return Err(Error::uncertain(
                    "the arena's directory says that two payloads are being applied at once: the guest or another tool \
                     changed it",
                ))
            }
            // Those that are reverting are superseded by it.
            (Some(patch), None) => (patch, &patch.record.functions[..]),
            (None, _) => match reverting.applied().first() {
                Some(patch) => (*patch, &[][..]),
                None => return Ok(None),
            },
        };
        let writes = reverting.writes(functions, true);
        Ok(Some(Interrupted { patch, writes }))
    }

    /// Whether it took place.
    fn took_place(&self, kernel: &Kernel<'_>) -> Result<bool> {
        marks_of(kernel, self.patch)?;
        let (mut all_old, mut all_new) = (true, true);
        for write in &self.writes {
            let found = bytes_at(kernel, write.at)?;
            all_old &= write.expect == found;
            all_new &= write.new == found;
        }
        match (all_old, all_new) {
            (true, false) => Ok(false),
            (false, true) => Ok(true),
            _ => {
                let name = &self.patch.record.name;
                let why = format!(
                    "payload {name} is neither wholly applied nor wholly undone: an earlier run was ended in between"
                );
                Err(torn(self.patch, why))
            }
        }
    }
}

/// Whether the guest knows the payload as a module. A change writes that, so it may be torn with it.
fn marks_of(kernel: &Kernel<'_>, resident: &Resident) -> Result<lists::Known> {
    lists::known(kernel, resident.record.module).map_err(|error| match error.class() {
        Class::Uncertain => torn(resident, error.to_string()),
        _ => error,
    })
}

fn torn(resident: &Resident, why: String) -> Error {
    let record = &resident.record;
    Error::from(Torn {
        patch: record.name.clone(),
        sha256: record.sha256.clone(),
        why,
    })
}

/// Decides whether the change that an earlier run left under way took place, and gives each of `residents` the state that
/// follows. Each of them must be among the guest's modules wholly, or not at all.
///
/// # Errors
/// [`Cause::Torn`](crate::error::Cause::Torn): the change took place in part, or a payload was put among the guest's modules or
/// taken out of them in part, whatever its state. [`Class::Uncertain`]: two payloads are being applied at once. Or memory
/// can't be read.
pub fn resolve(kernel: &Kernel<'_>, residents: &mut [Resident]) -> Result<()> {
    resolve_change(kernel, residents)?;
    for resident in residents {
        let known = marks_of(kernel, resident);
        known.map_err(|e| e.context(format!("payload {}", resident.record.name)))?;
    }
    Ok(())
}

/// The same, of the change alone. Without such a change nothing is read and all states stay.
///
/// # Errors
/// [`Class::Uncertain`]: it took place in part. Or memory can't be read.
pub fn resolve_change(kernel: &Kernel<'_>, residents: &mut [Resident]) -> Result<()> {
    let Some(interrupted) = Interrupted::find(residents)? else {
        return Ok(());
    };
    let done = interrupted.took_place(kernel)?;
    for resident in residents {
        resident.slot.state = resident.slot.state.after_change(done);
    }
    Ok(())
}

#[cfg(test)]
mod tests;
