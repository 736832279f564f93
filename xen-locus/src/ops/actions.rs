//! The operations themselves. Each is logged and published: [`super::run`].

use std::time::Instant;

use locus_kernel::Kernel;
use locus_payload::Payload;
use locus_xen::Control;

use super::guest::Guest;
use super::lock;
use super::run::{timed, Asked, Operator};
use super::status::{patches_by, PatchState};
use crate::apply::{self, Options, Outcome, Report};
use crate::error::{Error, Result};
use crate::machine;
use crate::nudge::{self, Nudged};
use crate::operation::Operation;
use crate::plan::Mode;
use crate::quiesce::Watch;
use crate::reclaim;
use crate::recover::{self, Finding};

/// Applies a payload, on top of the patches that are there or in their place.
///
/// # Errors
/// As [`apply::apply`]; [`Class::TryAgain`](crate::error::Class::TryAgain) when another run holds the guest's lock.
pub fn apply<G: Guest>(
    operator: &Operator<'_>,
    guest: &G,
    payload: &Payload,
    mode: Mode,
    options: &Options,
) -> Result<Report> {
    let asked = Asked {
        // Not the mode: a payload that was built so replaces in either mode.
        operation: match mode.supersedes(payload) {
            false => Operation::Apply,
            true => Operation::Replace,
        },
        patch: &payload.name,
        sha256: hex::encode(payload.sha256),
    };
    operator.run(guest, &asked, options, |kernel, options| {
        apply::apply(guest, kernel, payload, mode, options)
    })
}

/// An operation on a patch that is in the guest: the guest alone knows its file's SHA-256.
fn of_guests(operation: Operation, patch: &str) -> Asked<'_> {
    Asked {
        operation,
        patch,
        sha256: String::new(),
    }
}

/// Reverts a patch. If a SHA-256 is given, the patch must be of the file with this one.
///
/// # Errors
/// As [`apply::revert`]; [`Class::Failed`](crate::error::Class::Failed) when the patch is of another file;
/// [`Class::TryAgain`](crate::error::Class::TryAgain) when another run holds the guest's lock.
pub fn revert<G: Guest>(
    operator: &Operator<'_>,
    guest: &G,
    patch: &str,
    sha256: Option<&str>,
    options: &Options,
) -> Result<Report> {
    operator.run(guest, &of_guests(Operation::Revert, patch), options, |kernel, options| {
        let (all, ..) = patches_by(kernel, operator.audit, Some(guest.uuid()), |_| Ok(()))?;
        // If it was lost and applied again, the one in the guest is meant.
        let of_name = all.iter().filter(|p| p.name == patch);
        let named = of_name.max_by_key(|p| !p.state.is_lost());
        if let (Some(named), Some(wanted)) = (named, sha256) {
            // The digest of one that a newer xen-locus applied may not be known, and it is not reverted.
            if named.sha256 != wanted && named.state != PatchState::Unknown {
                return Err(Error::failed(format!(
                    "patch {patch} is of a file with SHA-256 {}, and that of {wanted} is to be reverted",
                    named.sha256
                )));
            }
        }
        match named {
            Some(named) if named.state.is_lost() => Ok(lost(patch, options)),
            _ => apply::revert(guest, kernel, patch, options),
        }
    })
}

/// The report on a patch that the guest lost: there is nothing to undo, and by its line in the audit log the patch is not
/// missed any more.
fn lost(patch: &str, options: &Options) -> Report {
    let outcome = match options.dry_run {
        true => Outcome::WouldForget,
        false => Outcome::AlreadyLost,
    };
    apply::nothing_to_do(patch, outcome)
}

/// Gives back the memory of the parked payloads with these names, or of all if there is no name. Returns the result of
/// each.
///
/// # Errors
/// As [`reclaim::reclaim`]; [`Class::TryAgain`](crate::error::Class::TryAgain) when another run holds the guest's lock.
pub fn reclaim<G: Guest>(
    operator: &Operator<'_>,
    guest: &G,
    names: &[String],
    options: &Options,
) -> Result<Vec<(String, Result<Report>)>> {
    let operation = Operation::Reclaim;
    several(
        operator,
        guest,
        operation,
        options,
        |kernel, options, tell| {
            let names = match names {
                [] => reclaim::parked(kernel)?,
                names => names.to_vec(),
            };
            reclaim::reclaim(guest, kernel, &names, options, tell)
        },
    )
}

/// What became of one of several payloads. Returns whether it is logged: if not, nothing else may begin.
type Tell<'a> = dyn FnMut(&str, Result<Report>) -> bool + 'a;

/// Carries out an operation on several payloads of a guest. The result of each is logged when `act` tells it, and what went
/// wrong with all of them in a line without a patch.
fn several<G: Guest>(
    operator: &Operator<'_>,
    guest: &G,
    operation: Operation,
    options: &Options,
    act: impl FnOnce(&Kernel<'_>, &Options, &mut Tell<'_>) -> Result<()>,
) -> Result<Vec<(String, Result<Report>)>> {
    let began = Instant::now();
    let mut log = operator.audit.open(guest.uuid())?;
    let work = |kernel: &Kernel<'_>, options: &Options| {
        // Each line is appended before all is published.
        if !options.dry_run {
            guest.note_unpublished()?;
        }
        let mut results = Vec::new();
        act(kernel, options, &mut |patch, result| {
            let result = result.map(|report| timed(report, began));
            let asked = of_guests(operation, patch);
            let goes_on = options.dry_run || operator.log_result(&mut *log, guest, &asked, &result);
            results.push((patch.to_owned(), result));
            goes_on
        })?;
        Ok(results)
    };
    // Held until this function returns.
    let (_lock, done) = match guest.lock(options) {
        Ok(lock) => (Some(lock), operator.change(guest, options, work)),
        Err(error) => (None, Err(error)),
    };
    done.or_else(|error| {
        let refused = Err(error);
        if !options.dry_run {
            operator.log_result(&mut *log, guest, &of_guests(operation, ""), &refused);
        }
        refused.map(|_| Vec::new())
    })
}

/// Wakes the threads that sleep in the ranges that `watch` gives and thus block `patch`. `None` if it gives none.
///
/// # Errors
/// As [`nudge::nudge`]; [`Class::TryAgain`](crate::error::Class::TryAgain) when another run holds the guest's lock.
pub fn nudge<G: Guest>(
    operator: &Operator<'_>,
    guest: &G,
    patch: &str,
    watch: impl FnOnce(&Kernel<'_>) -> Result<Option<Watch>>,
    options: &Options,
) -> Result<Option<Nudged>> {
    let asked = of_guests(Operation::Nudge, patch);
    let mut nudged = None;
    operator.run(guest, &asked, options, |kernel, options| {
        let Some(watch) = watch(kernel)? else {
            return Ok(apply::nothing_to_do(patch, Outcome::NobodyAsleep));
        };
        let done = nudge::nudge(guest, kernel, patch, &watch, options)?;
        Ok(nudged.insert(done).report.clone())
    })?;
    Ok(nudged)
}

/// Reverts all patches, the topmost first, until one can't be reverted or logged. Then it logs of those that the guest lost,
/// the newest first, that they are not wanted any more. Returns the result of each that was tried.
///
/// # Errors
/// As [`apply::revert_all`]; the guest's patches can't be read;
/// [`Class::TryAgain`](crate::error::Class::TryAgain) when another run holds the guest's lock.
pub fn revert_all<G: Guest>(
    operator: &Operator<'_>,
    guest: &G,
    options: &Options,
) -> Result<Vec<(String, Result<Report>)>> {
    let operation = Operation::Revert;
    several(
        operator,
        guest,
        operation,
        options,
        |kernel, options, tell| {
            // Read first: what is reverted is logged, and then an error here would hide that.
            let (all, ..) = patches_by(kernel, operator.audit, Some(guest.uuid()), |_| Ok(()))?;
            let mut goes_on = true;
            apply::revert_all(guest, kernel, options, |patch, result| {
                let failed = result.is_err();
                goes_on = tell(patch, result) && !failed;
                goes_on
            })?;
            for gone in all.iter().rev().filter(|p| p.state.is_lost()) {
                goes_on = goes_on && tell(&gone.name, Ok(lost(&gone.name, options)));
            }
            Ok(())
        },
    )
}

/// Recovers a guest from an interrupted run.
///
/// # Errors
/// As [`recover::recover`]; [`Class::TryAgain`](crate::error::Class::TryAgain) when another run holds the guest's lock.
pub fn recover<G: Guest>(
    operator: &Operator<'_>,
    guest: &G,
    options: &Options,
) -> Result<recover::Report> {
    let _lock = guest.lock(options)?;
    let report = operator.recover(guest, options)?;
    if report.result != Finding::NothingToDo || guest.is_unpublished() {
        let kernel = machine::kernel_of(guest)?;
        operator.publish(guest, &kernel, "not published");
    }
    Ok(report)
}

/// Settles what guardians' files say of a guest that is not on this host now. Its journal stays.
///
/// # Errors
/// As [`recover::of_absent`]; [`Class::TryAgain`](crate::error::Class::TryAgain) when another run holds that guest's lock.
pub fn recover_absent(control: &Control, uuid: &str, options: &Options) -> Result<recover::Report> {
    let _lock = lock::take(uuid, options)?;
    recover::of_absent(control, uuid)
}
