//! Gives back the memory of payloads that are parked.
//!
//! A parked payload is a module of the guest, and something may still lead into it: a thread, a timer, a list. So its
//! pages are given back in steps, and each payload that something is found for stays as it is (`candidates`).
//!
//! 1. While it still is a module: twice, first downwards and then upwards, every CPU is seen outside of the kernel, and
//!    every task outside of a section in which it may use what it found in the guest's lists (`readers`); then all
//!    memory is looked through for a word that leads into it (`search`), except those by which the guest knows it as a
//!    module. Who still uses it needs it whole: its exception table, its `BUG` sites. A word that moves once is missed by one
//!    of the two. One that moves all the time takes a thread, a timer or a work item, each of which stands still for a while.
//! 2. In a pause in which no thread is in its code, it is taken out of the guest's lists ([`lists::remove`]), as a plan
//!    like that of a patch: journalled, guarded, all or nothing. From then on the guest finds no new way into it.
//! 3. All of 1 once more. What is found now came from elsewhere right before the pause; the payload stays, out of the lists.
//! 4. A whole look finds no thread in its code. Then its entry in the directory goes.
//!
//! What can't be seen is a pointer that is stored in another form than as itself. To leave none is the duty of the
//! payload's author, as it is before `rmmod` of a livepatch that was disabled.

mod candidates;
mod code_frames;
mod page_types;
mod readers;
mod search;
mod stacks;
#[cfg(test)]
mod tests;

use std::collections::HashSet;
use std::time::{Duration, Instant};

use locus_guest::addr::{Range, PAGE_SIZE};
use locus_kernel::Kernel;

use self::candidates::Candidates;
use self::search::{Direction, Search, SearchedPayload};
use crate::apply::{self, Done, Options, Outcome, Patience, Report};
use crate::arena::record::State;
use crate::arena::{self, Arena, Resident};
use crate::error::{Class, Error, Result};
use crate::link::module::lists::{self, Known, Users};
use crate::machine::Machine;
use crate::operation::Operation;
use crate::plan::{self, patch_stack, Plan, Proposal};
use crate::quiesce::Watch;
use crate::storage::journal::Change;
use crate::write::Write;

/// The least time for the look at all threads.
const LOOK: Duration = Duration::from_secs(5);

/// Names of the parked payloads, the one that was applied last first. Each is named once.
///
/// # Errors
/// The guest's arena can't be read.
pub fn parked(kernel: &Kernel<'_>) -> Result<Vec<String>> {
    let residents = plan::residents(kernel, &Arena::read(kernel)?)?;
    let parked = residents.iter().filter(|r| r.slot.state == State::Parked);
    let mut names: Vec<String> = Vec::new();
    for resident in parked.rev() {
        if !names.contains(&resident.record.name) {
            names.push(resident.record.name.clone());
        }
    }
    Ok(names)
}

/// Gives back the memory of the parked payloads with these names, and passes the result of each to `tell`. All of them are
/// searched for together. That one is gone is told before the next one goes; if `tell` returns false then, no other goes.
///
/// # Errors
/// The guest can't be read. What goes wrong with a payload is passed to `tell`: [`Class::Failed`] if none of its name is
/// parked, or another module or payload uses it; [`Class::TryAgain`] if something in the guest still leads into it; and as
/// for [`apply::apply`].
pub fn reclaim(
    machine: &dyn Machine,
    kernel: &Kernel<'_>,
    names: &[String],
    options: &Options,
    mut tell: impl FnMut(&str, Result<Report>) -> bool,
) -> Result<()> {
    kernel.check_runs()?;
    let arena = Arena::read(kernel)?;
    plan::check_no_nudge(kernel, &arena)?;
    let residents = plan::residents(kernel, &arena)?;
    // The last one first: an earlier one may be used by it.
    let is_meant = |r: &&Resident| r.slot.state == State::Parked && names.contains(&r.record.name);
    let meant: Vec<&Resident> = residents.iter().rev().filter(is_meant).collect();
    for name in names {
        if !meant.iter().any(|r| r.record.name == *name) {
            tell(name, Err(not_parked(name)));
        }
    }
    let mut candidates = Candidates::new(kernel, &residents, &meant)?;
    let run = Reclaiming {
        machine,
        kernel,
        options,
    };
    let done = run.all(&mut candidates, &mut tell);
    if let Err(error) = &done {
        candidates.all_stay(error);
    }
    for (resident, error) in candidates.into_staying() {
        tell(&resident.record.name, Err(stays(kernel, resident, error)));
    }
    Ok(())
}

fn stays(kernel: &Kernel<'_>, resident: &Resident, error: Error) -> Error {
    let name = &resident.record.name;
    let known = lists::known(kernel, resident.record.module);
    let out = match known {
        Ok(Known::Removed) => {
            " and is no module of the guest any more: the modules that it uses can be unloaded, and what is still to come \
             from it, like a timer, has no fixups; reclaim it again soon"
        }
        _ => "",
    };
    error.context(format!("payload {name} stays parked{out}"))
}

/// As [`Options::check_interrupted`], where something may be changed.
fn check_interrupted(options: &Options) -> Result<()> {
    let interrupted = |_| Error::failed("interrupted");
    options.check_interrupted().map_err(interrupted)
}

fn leads_into(by: &str) -> Error {
    Error::try_again(format!(
        "{by} leads into it: something in the guest may still use it, like a timer, a list or a work item; try again when \
         that is done"
    ))
}

fn report(resident: &Resident, outcome: Outcome, done: Done) -> Report {
    let record = &resident.record;
    Report {
        sha256: record.sha256.clone(),
        ..apply::report(&record.name, outcome, record.functions.len(), done)
    }
}

fn not_parked(name: &str) -> Error {
    Error::failed(format!(
        "no payload {name:?} is parked in this guest; `xen-locus status` shows what is in force, and that is reverted \
         before it is reclaimed"
    ))
}

/// All pages of a payload.
fn pages_of(resident: &Resident) -> Range {
    let pages = u64::from(resident.slot.pages);
    Range::new(
        arena::page_address(resident.slot.first.into()),
        pages * PAGE_SIZE,
    )
}

/// A run that gives back memory.
struct Reclaiming<'a, 'm> {
    machine: &'a dyn Machine,
    kernel: &'a Kernel<'m>,
    options: &'a Options,
}

impl Reclaiming<'_, '_> {
    /// All steps. Which payloads are gone is passed to `tell`. An error is about all others.
    fn all(
        &self,
        candidates: &mut Candidates<'_>,
        tell: &mut impl FnMut(&str, Result<Report>) -> bool,
    ) -> Result<()> {
        if self.machine.has_pages_on_demand()? {
            return Err(Error::try_again(
                "some memory of the guest is populated on demand, because its balloon has not reached its target yet: to \
                 look through all memory would populate it, and Xen ends a guest for which it has no page left",
            ));
        }
        self.search(candidates)?;
        if self.options.dry_run {
            return self.would(candidates, tell);
        }
        self.take_out(candidates)?;
        self.search(candidates)?;
        self.look_at_threads(candidates)?;
        while let Some((n, resident, paused)) = candidates.next(&HashSet::new()) {
            let done = self.drop(resident);
            let is_gone = done.is_ok();
            candidates.is_gone(n, done)?;
            let gone = || report(resident, Outcome::Reclaimed, paused);
            if is_gone && !tell(&resident.record.name, Ok(gone())) {
                return Err(Error::try_again(
                    "it was not tried, because what became of another one could not be logged",
                ));
            }
        }
        Ok(())
    }

    /// Looks through all memory, both ways. What something leads into stays.
    fn search(&self, candidates: &mut Candidates<'_>) -> Result<()> {
        let (machine, kernel) = (self.machine, self.kernel);
        for direction in [Direction::Down, Direction::Up] {
            if candidates.going().is_empty() {
                return Ok(());
            }
            let limit = Instant::now() + self.options.timeout;
            readers::wait(machine, kernel, limit, self.options)?;
            let mut payloads = Vec::new();
            let patience = Patience::new(self.options);
            for (n, resident) in candidates.going() {
                let payload = apply::keep_trying(machine, kernel, &patience, |k| {
                    SearchedPayload::new(k, resident)
                });
                match payload {
                    Ok(payload) => payloads.push((n, payload)),
                    Err(error) => candidates.stays(n, error),
                }
            }
            payloads.retain(|(n, _)| candidates.going().iter().any(|(going, _)| going == n));
            let (numbers, payloads): (Vec<usize>, Vec<SearchedPayload>) =
                payloads.into_iter().unzip();
            if payloads.is_empty() {
                return Ok(());
            }
            let arena = Arena::read(kernel)?;
            let search = Search::new(machine, kernel, self.options, &arena, payloads)?;
            for (n, by) in numbers.into_iter().zip(search.run(direction)?) {
                if let Some(by) = by {
                    candidates.stays(n, leads_into(&by));
                }
            }
        }
        Ok(())
    }

    /// A dry run: what could be worked out of the next steps.
    fn would(
        &self,
        candidates: &mut Candidates<'_>,
        tell: &mut impl FnMut(&str, Result<Report>) -> bool,
    ) -> Result<()> {
        while let Some((n, resident, _)) = candidates.next(&HashSet::new()) {
            let module = resident.record.module;
            let would = match lists::known(self.kernel, module)? {
                Known::Listed => self.plan(self.kernel, resident, Users::Go).map(|_| ()),
                Known::Never | Known::Removed => Ok(()),
            };
            let would = would.and_then(|()| apply::check_host(self.machine));
            let would_go = would.is_ok();
            candidates.is_gone(n, would)?;
            if would_go {
                let report = report(resident, Outcome::WouldReclaim, Done::default());
                tell(&resident.record.name, Ok(report));
            }
        }
        Ok(())
    }

    /// Takes all out of the guest's lists that are in them. One may be in the way of another, so those that are refused are
    /// tried again as long as others succeed.
    fn take_out(&self, candidates: &mut Candidates<'_>) -> Result<()> {
        let mut out = HashSet::new();
        loop {
            let mut refused = Vec::new();
            let before = out.len();
            let mut tried = out.clone();
            while let Some((n, resident, _)) = candidates.next(&tried) {
                tried.insert(n);
                match self.take_out_one(resident) {
                    Err(error) if error.class() == Class::Failed => refused.push((n, error)),
                    done => {
                        out.insert(n);
                        candidates.taken_out(n, done)?;
                    }
                }
            }
            if refused.is_empty() || out.len() == before {
                for (n, error) in refused {
                    candidates.stays(n, error);
                }
                return Ok(());
            }
        }
    }

    fn take_out_one(&self, resident: &Resident) -> Result<Done> {
        if lists::known(self.kernel, resident.record.module)? != Known::Listed {
            return Ok(Done::default());
        }
        let patience = Patience::new(self.options);
        apply::keep_trying(self.machine, self.kernel, &patience, |kernel| {
            let plan = self.plan(kernel, resident, Users::None)?;
            let ranges = plan.watch.ranges().map(|(range, name)| (*range, name));
            self.noted(resident, &plan.writes, ranges, || {
                apply::execute(self.machine, kernel, &plan, &patience)
            })
        })
    }

    /// The plan that takes `resident` out of the guest's lists.
    fn plan(&self, kernel: &Kernel<'_>, resident: &Resident, users: Users) -> Result<Plan> {
        let record = &resident.record;
        let removal = lists::remove(kernel, record.module, pages_of(resident), users)?;
        let mut watched = removal.watched;
        watched.push(patch_stack::all_code_of(record));
        let proposal = Proposal {
            patch: &record.name,
            unprobed: patch_stack::code_of(record),
            data: removal.writes,
            watched,
            ..Proposal::default()
        };
        Plan::to_begin(kernel, proposal)
    }

    /// Does `what` between the two notes in the journal.
    fn noted<'w, T>(
        &self,
        resident: &Resident,
        writes: &[Write],
        watched: impl Iterator<Item = (Range, &'w str)>,
        what: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        let record = &resident.record;
        let (op, name) = (Operation::Reclaim, &record.name);
        let change = Change {
            sha256: record.sha256.clone(),
            record: hex::encode(resident.slot.record_sha256),
            generation: Some(Arena::read(self.kernel)?.directory.generation),
            ..Change::of(self.kernel, op, name, writes, watched)
        };
        apply::begin(self.machine, &change)?;
        let done = what();
        if !done.as_ref().is_err_and(Error::is_uncertain) {
            self.machine.ended();
        }
        done
    }

    /// What has a thread in its code stays.
    fn look_at_threads(&self, candidates: &mut Candidates<'_>) -> Result<()> {
        let going = candidates.going();
        if going.is_empty() {
            return Ok(());
        }
        let watched = going.iter();
        let watched =
            watched.map(|(n, r)| patch_stack::all_code_of(&r.record).called(n.to_string()));
        let watch = Watch::new(self.kernel, watched.collect())?;
        let limits = Options {
            timeout: self.options.timeout.max(LOOK),
            ..self.options.clone()
        };
        let found = apply::blocking(self.machine, self.kernel, &watch, &limits);
        // Its own words for that are about a guest in which nothing is changed.
        check_interrupted(self.options)?;
        for thread in found? {
            let inside = |n: &usize| n.to_string() == thread.function;
            let is_known = going.iter().any(|(n, _)| inside(n));
            // It may not be told in which one it is.
            for (n, _) in going.iter().filter(|(n, _)| !is_known || inside(n)) {
                candidates.stays(
                    *n,
                    Error::try_again(format!(
                        "a thread is in it: {} (pid {}), {}; try again when it has left",
                        thread.comm, thread.pid, thread.reason
                    )),
                );
            }
        }
        Ok(())
    }

    /// The last step: the entry in the directory goes. Its pages stay as they are until another payload gets them.
    fn drop(&self, resident: &Resident) -> Result<()> {
        let mut arena = Arena::read(self.kernel)?;
        let mut slots = arena.directory.slots.clone();
        slots.retain(|slot| slot.first != resident.slot.first);
        if slots.len() + 1 != arena.directory.slots.len() {
            return Err(Error::try_again(
                "the arena's directory changed meanwhile: another run is at work on this guest",
            ));
        }
        self.noted(resident, &[], std::iter::empty(), || {
            arena.commit(self.machine, self.kernel, slots)
        })
    }
}
