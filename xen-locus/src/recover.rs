//! Finds out how a run ended that died, and finishes or undoes what it left.
//!
//! Three sources tell of such a run. The file of its guardian says whether the guest is paused ([`crate::guard`]). Its journal
//! says what it was about to do ([`crate::storage::journal`]). The guest's own memory shows what took place, and decides. The
//! caller holds the guest's lock.

use std::fs::{self, File, TryLockError};
use std::path::Path;
use std::time::{Duration, Instant};

use locus_guest::addr::DomId;
use locus_kernel::Kernel;
use locus_xen::fault;
use locus_xen::{Control, ForeignMemory, PauseStep, SharedPage};
use serde::Serialize;

use crate::apply::Options;
use crate::arena::record::State;
use crate::arena::{Arena, Resident};
use crate::domain::Domain;
use crate::error::{Error, Result};
use crate::guard::take_over::{take_over_later, Counter as _, TakeOver};
use crate::guard::{self, Places, WatchedRun};
use crate::machine::{self, Machine};
use crate::operation::Operation;
use crate::plan::{self, PatchStack};
use crate::storage::journal::{Change, Intent, Journal, Noted};

mod nudged;
mod reclaiming;
mod torn;
mod way_back;

/// Longest wait for the guardian of a run that died.
const GUARDIAN: Duration = Duration::from_secs(5);

/// What is said of a guest that can't have seen the change ([`Change::is_unknown_to`]).
const EARLIER: &str = "the guest rebooted, or was restored from an earlier save";

/// What became of the run's change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Finding {
    /// No run was left in the middle.
    NothingToDo,
    /// The change that it was about is in force.
    Finished,
    /// The guest is as it was before.
    Undone,
    /// The guest that it worked on is another now, or not on this host.
    Gone,
}

impl Finding {
    /// Its name for people.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Finding::NothingToDo => "nothing to do",
            Finding::Finished => "finished",
            Finding::Undone => "undone",
            Finding::Gone => "gone",
        }
    }
}

impl std::fmt::Display for Finding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// What was found in a guest, and done.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// What became of the change.
    pub result: Finding,
    /// The patch that the run was about.
    pub patch: Option<String>,
    /// What the run was doing with the patch.
    pub op: Option<Operation>,
    /// Details in words; may be empty.
    pub detail: String,
    /// SHA-256 of the patch's file, in hex; for the audit log.
    #[serde(skip)]
    pub sha256: String,
    /// SHA-256 of the record that the run placed in the guest, in hex; for the audit log.
    #[serde(skip)]
    pub record: String,
    /// Patches that stay in the guest without being in force; for the audit log.
    #[serde(skip)]
    pub parked: Vec<String>,
}

impl Report {
    /// Whether no run left anything. Beside runs that only look, nothing need be said.
    #[must_use]
    pub fn is_nothing(&self) -> bool {
        self.result == Finding::NothingToDo && self.detail.is_empty()
    }

    fn new(result: Finding, intent: Option<&Intent>, detail: String) -> Report {
        Report {
            result,
            patch: intent.map(|i| i.change.patch.clone()),
            op: intent.map(|i| i.change.op),
            detail,
            sha256: intent.map(|i| i.change.sha256.clone()).unwrap_or_default(),
            record: intent.map(|i| i.change.record.clone()).unwrap_or_default(),
            parked: Vec::new(),
        }
    }
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (&self.op, &self.patch) {
            (Some(op), Some(patch)) => write!(f, "{op} {patch}: {}", self.result)?,
            (None, Some(patch)) => write!(f, "{patch}: {}", self.result)?,
            _ => write!(f, "{}", self.result)?,
        }
        match self.detail.is_empty() {
            true => Ok(()),
            false => write!(f, " ({})", self.detail),
        }
    }
}

/// Whether a journal or a guard's file tells of a run that is not known to have ended. The caller holds the guest's lock.
///
/// # Errors
/// [`Class::Failed`](crate::error::Class::Failed): the folders can't be read.
pub fn is_due(uuid: &str) -> Result<bool> {
    Ok(Journal::new(uuid).exists() || !guard::files(Some(uuid))?.is_empty())
}

/// Recovers `domain` from runs that were interrupted: what they left is finished or undone. The caller holds the guest's lock. It
/// logs the report and then retires the journal ([`Journal::retire`]): what that said is done, or void because the guest rebooted.
///
/// # Errors
/// [`Class::Uncertain`](crate::error::Class::Uncertain): the guest can't be brought to a known state.
/// [`Class::NotApplicable`](crate::error::Class::NotApplicable): another domain has the same UUID, and the journal may be
/// about that one; or another version of this tool wrote the journal or changed the guest. Or the guest or the files can't be
/// read.
pub fn recover(domain: &Domain<'_>, options: &Options) -> Result<Report> {
    let begun = fault::point("recover");
    begun.map_err(|e| Error::failed(format!("{}: {e}", domain.label())))?;
    guard::sweep();
    let uuid = &domain.info.uuid;
    let mut said = Vec::new();
    for path in guard::files(Some(uuid))? {
        if let Some(outcome) = of_dead(domain.control(), &path, Some(domain.info.id))? {
            match outcome {
                TakeOver::Running => {}
                TakeOver::Stuck => {
                    return Err(Error::uncertain(format!(
                        "a run on {} died: {outcome}",
                        domain.label()
                    )))
                }
                _ => said.push(outcome.to_string()),
            }
        }
    }
    let journal = Journal::new(uuid);
    let noted = journal.read()?;
    if !is_surely_of(&noted, domain.info.id) {
        domain.check_uuid()?;
    }
    let kernel = machine::kernel_of(domain)?;
    let mut report = of_noted(domain, &kernel, &noted, &journal.aside(), options)?;
    said.push(std::mem::take(&mut report.detail));
    report.detail = joined(&said);
    Ok(report)
}

/// Whether what was read of a journal is about the domain `id`, whatever other domains have its UUID. A journal that names
/// another domain may still be about this one: a guest that is restored or migrated gets another id.
fn is_surely_of(noted: &Noted, id: DomId) -> bool {
    match noted {
        Noted::Nothing => true,
        Noted::Intent(intent) => intent.domid == id.0,
        Noted::Damaged(_) => false,
    }
}

/// Finishes or undoes what the guardian's file at `path` tells of, and removes the file. `None` if the run is alive or ended
/// normally; or if it worked on another domain than `own` that runs and has the same UUID: that one is to be recovered.
///
/// # Errors
/// [`Class::TryAgain`](crate::error::Class::TryAgain): its guardian does not end.
/// [`Class::Failed`](crate::error::Class::Failed): the file can't be read, or memory can't be mapped.
fn of_dead(control: &Control, path: &Path, own: Option<DomId>) -> Result<Option<TakeOver>> {
    let began = Instant::now();
    let odd = |e: std::io::Error| Error::failed(format!("cannot use {}: {e}", path.display()));
    let file = match File::options().read(true).write(true).open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(odd(e)),
    };
    let run = WatchedRun::read(&file)?;
    if own.is_some_and(|own| own != run.domain()) {
        let other = control.domain(run.domain())?;
        if other.is_some_and(|d| d.uuid == run.uuid && !d.dying && !d.shutdown) {
            return Ok(None);
        }
    }
    loop {
        match file.try_lock() {
            Ok(()) => break,
            Err(TryLockError::Error(e)) => return Err(odd(e)),
            // The run is alive: it only looks, which needs no lock of the guest.
            Err(TryLockError::WouldBlock) if run.spots.is_empty() => return Ok(None),
            Err(TryLockError::WouldBlock) if began.elapsed() > GUARDIAN => {
                return Err(Error::try_again(format!(
                    "the guardian of process {}, which died at work on this guest, still holds {}",
                    run.pid,
                    path.display()
                )))
            }
            Err(TryLockError::WouldBlock) => std::thread::sleep(Duration::from_millis(5)),
        }
    }
    if !path.exists() {
        // It ended normally meanwhile.
        return Ok(None);
    }
    let page = SharedPage::open(&file)?;
    let outcome = match page.step() {
        // Without an outcome the guardian had nothing to do.
        Some(PauseStep::Idle) => TakeOver::of(page.outcome()).unwrap_or(TakeOver::Running),
        _ => as_guardian(control, &run, &page)?,
    };
    if outcome == TakeOver::PausedByOthers {
        // Said before the file goes, and whatever fails later: the guest may stay paused.
        run.say(outcome);
    }
    // Of a guest that is still paused the file is needed again.
    if outcome != TakeOver::Stuck {
        fs::remove_file(path).map_err(odd)?;
    }
    Ok(Some(outcome))
}

/// Does what the guardian would have done, if it died with its run.
fn as_guardian(control: &Control, run: &WatchedRun, page: &SharedPage) -> Result<TakeOver> {
    let counter = (control, run.domain());
    let Some(found) = counter.pause_state()? else {
        return Ok(TakeOver::Gone);
    };
    let info = control.domain(run.domain())?;
    if info.is_none_or(|i| i.uuid != run.uuid) {
        return Ok(TakeOver::Gone);
    }
    let foreign = ForeignMemory::open(run.domain())?;
    let places = Places::unmapped(&foreign, &run.spots);
    take_over_later(page, &counter, found.uuid, places)
}

/// Those of the details that are not empty, as one.
fn joined(details: &[String]) -> String {
    let said: Vec<&str> = details
        .iter()
        .map(|s| &**s)
        .filter(|s| !s.is_empty())
        .collect();
    said.join("; ")
}

/// As [`of_guest`], for what a journal says. Without a journal that can be believed the guest's memory must account for all that a
/// run can have left. If it does, the journal is of no more use; it is kept at `aside` all the same.
pub(crate) fn of_noted(
    machine: &dyn Machine,
    kernel: &Kernel<'_>,
    noted: &Noted,
    aside: &Path,
    options: &Options,
) -> Result<Report> {
    let intent = match noted {
        Noted::Nothing => None,
        Noted::Intent(intent) => Some(&**intent),
        Noted::Damaged(why) => {
            let report = of_guest(machine, kernel, None, options)
                .map_err(|error| error.context(why.clone()))?;
            let kept = format!(
                "{why}; by the guest's own memory nothing else is left of that run; the journal is kept as {}",
                aside.display()
            );
            let detail = joined(&[kept, report.detail]);
            return Ok(Report { detail, ..report });
        }
    };
    of_guest(machine, kernel, intent, options)
}

/// Finds out from the guest's memory what became of `intent`, and writes that to the arena's directory.
pub(crate) fn of_guest(
    machine: &dyn Machine,
    kernel: &Kernel<'_>,
    intent: Option<&Intent>,
    options: &Options,
) -> Result<Report> {
    let build_id = kernel
        .build_id
        .as_deref()
        .map(hex::encode)
        .unwrap_or_default();
    let same = |c: &Change| c.build_id == build_id && c.text_base == kernel.text_base.0;
    if let Some(intent) = intent.filter(|i| !same(&i.change)) {
        return Ok(of_earlier(
            intent,
            "the guest has another kernel now, or at another place: it rebooted",
        ));
    }
    let nudged = nudged::take_back(machine, kernel, intent, options)?;
    let intent = intent.filter(|i| i.change.op != Operation::Nudge);
    let report = of_payloads(machine, kernel, intent, options)?;
    let Some(patch) = nudged else {
        return Ok(report);
    };
    if report.result == Finding::NothingToDo {
        return Ok(Report {
            result: Finding::Undone,
            patch: Some(patch),
            op: Some(Operation::Nudge),
            ..report
        });
    }
    let also = format!("a nudge of {patch} is undone too");
    let detail = joined(&[report.detail, also]);
    Ok(Report { detail, ..report })
}

/// Finds out from the guest's memory what became of `intent`, which is about a payload, or of the change that the directory
/// shows as under way.
fn of_payloads(
    machine: &dyn Machine,
    kernel: &Kernel<'_>,
    intent: Option<&Intent>,
    options: &Options,
) -> Result<Report> {
    if let Some(intent) = intent.filter(|i| i.change.op == Operation::Reclaim) {
        let report = reclaiming::recover(machine, kernel, intent, options)?;
        // Whatever else is left is no part of that run.
        plan::residents(kernel, &Arena::read(kernel)?)?;
        return Ok(report);
    }
    let mut arena = Arena::read(kernel)?;
    let is_known = |i: &&Intent| !i.change.is_unknown_to(arena.directory.generation);
    let known = intent.filter(is_known);
    let detail = torn::take_back(machine, kernel, &arena, known, options)?;
    let before: Vec<State> = arena.directory.slots.iter().map(|s| s.state).collect();
    let residents = plan::resolve_interrupted(kernel, &mut arena)?;
    let left = under_way(&before, &residents);
    if left.is_some() {
        let slots = arena.directory.slots.clone();
        arena.commit(machine, kernel, slots)?;
    }
    let stack = PatchStack::new(&residents);
    let report = match (intent, left) {
        (Some(intent), _) if known.is_none() => of_earlier(intent, EARLIER),
        (Some(intent), _) => {
            let change = &intent.change;
            let same =
                |r: &&&Resident| r.record.name == change.patch && r.record.sha256 == change.sha256;
            let applied = stack.applied().iter().find(same).is_some();
            let result = match applied == (change.op == Operation::Apply) {
                true => Finding::Finished,
                false => Finding::Undone,
            };
            Report::new(result, Some(intent), detail)
        }
        (None, Some((resident, op, done))) => Report {
            patch: Some(resident.record.name.clone()),
            op: Some(op),
            sha256: resident.record.sha256.clone(),
            ..Report::new(
                if done {
                    Finding::Finished
                } else {
                    Finding::Undone
                },
                None,
                detail,
            )
        },
        (None, None) => Report::new(Finding::NothingToDo, None, detail),
    };
    let parked = parked(&residents, &stack);
    Ok(Report { parked, ..report })
}

/// What became of the change of a guest that is another now. If it is known that it took place, it is logged like any other:
/// so `status` knows what the guest lost.
fn of_earlier(intent: &Intent, why: &str) -> Report {
    match intent.is_done {
        true => {
            let why = format!("it was not logged then; since then {why}");
            Report::new(Finding::Finished, Some(intent), why)
        }
        false => Report::new(Finding::Gone, Some(intent), why.to_owned()),
    }
}

/// Names of the patches that stay in the guest without being in force.
fn parked(residents: &[Resident], stack: &PatchStack<'_>) -> Vec<String> {
    // An earlier version of a patch that is in force may be parked.
    let in_force = |name: &str| stack.applied().iter().any(|r| r.record.name == name);
    let parked = residents.iter().filter(|r| r.slot.state == State::Parked);
    let names = parked.map(|r| r.record.name.clone());
    names.filter(|name| !in_force(name)).collect()
}

/// The change that the directory showed as under way in the states `before`: of which patch, what, and whether it took place.
fn under_way<'r>(
    before: &[State],
    residents: &'r [Resident],
) -> Option<(&'r Resident, Operation, bool)> {
    let find = |state| {
        let mut all = residents.iter();
        all.find(|r| before.get(r.index) == Some(&state))
    };
    let (resident, op) = match find(State::Applying) {
        Some(resident) => (resident, Operation::Apply),
        None => (find(State::Reverting)?, Operation::Revert),
    };
    let applied = resident.slot.state == State::Applied;
    let done = applied == (op == Operation::Apply);
    Some((resident, op, done))
}

/// Settles what guardians' files say of the guest `uuid`, which is not on this host now. Its journal stays: the guest may be
/// saved, and what was written to it is in the file from which it is restored.
///
/// # Errors
/// [`Class::Failed`](crate::error::Class::Failed): the files can't be read or removed.
pub fn of_absent(control: &Control, uuid: &str) -> Result<Report> {
    for path in guard::files(Some(uuid))? {
        of_dead(control, &path, None)?;
    }
    of_absent_by(&Journal::new(uuid))
}

fn of_absent_by(journal: &Journal) -> Result<Report> {
    let noted = journal.read()?;
    let why = "the guest is not on this host now".to_owned();
    let kept = format!(
        "{why}; its journal {} is kept until it is back: remove that file if it never comes back",
        journal.path().display()
    );
    Ok(match noted {
        Noted::Nothing => Report::new(Finding::Gone, None, why),
        Noted::Intent(intent) => Report::new(Finding::Gone, Some(&intent), kept),
        Noted::Damaged(odd) => Report::new(Finding::Gone, None, joined(&[odd, kept])),
    })
}

#[cfg(test)]
mod tests;
