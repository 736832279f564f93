//! How a run ended that gave back the memory of a parked payload.

use locus_kernel::Kernel;

use super::way_back::roll_back;
use super::{Finding, Report, EARLIER};
use crate::apply::Options;
use crate::arena::record::State;
use crate::arena::{Arena, Resident};
use crate::error::{Error, Result};
use crate::link::module::lists::{self, Known};
use crate::machine::Machine;
use crate::storage::journal::Intent;

/// Finds out what became of a run that gave back the memory of a parked payload. What it had taken out of the guest's
/// lists in part is put back; what it had taken out stays so.
pub(super) fn recover(
    machine: &dyn Machine,
    kernel: &Kernel<'_>,
    intent: &Intent,
    options: &Options,
) -> Result<Report> {
    let change = &intent.change;
    let arena = Arena::read(kernel)?;
    if change.is_unknown_to(arena.directory.generation) {
        return Ok(Report::new(Finding::Gone, Some(intent), EARLIER.to_owned()));
    }
    let all = arena.residents(kernel)?;
    let is_meant = |r: &&Resident| {
        hex::encode(r.slot.record_sha256) == change.record && r.slot.state == State::Parked
    };
    let mut parked = all.iter().filter(is_meant);
    let known = parked.try_fold(Vec::new(), |mut known, r| {
        known.push(lists::known(kernel, r.record.module)?);
        Ok::<_, Error>(known)
    });
    let report = |result, detail: &str| Report::new(result, Some(intent), detail.to_owned());
    match known {
        Ok(known) if known.is_empty() => Ok(report(Finding::Finished, "")),
        Ok(known) if known.contains(&Known::Removed) => Ok(report(
            Finding::Undone,
            "it is out of the guest's lists, and its memory is not given back yet: reclaim it again",
        )),
        Ok(_) => Ok(report(Finding::Undone, "")),
        Err(error) if error.is_uncertain() => {
            roll_back(machine, kernel, change, options)?;
            Ok(report(Finding::Undone, ""))
        }
        Err(error) => Err(error),
    }
}
