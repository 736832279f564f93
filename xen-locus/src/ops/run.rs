//! The order of every operation on a guest:
//!
//! 1. The audit log is opened: what can't be logged does not begin.
//! 2. The guest is locked. If its UUID may be another domain's too, it is not changed.
//! 3. What an interrupted run left is recovered and logged, and its journal is removed. (A journal that can't be believed is
//!    kept under another name, once the guest's own memory accounts for all.)
//! 4. The operation is carried out; it writes its journal before it changes the guest.
//! 5. The guest's status is published, also if the operation was refused and step 3 found something. The guest is changed by
//!    then, so an error here is only said, and noted: the daemon or the next run publishes it.
//! 6. A line is appended to the audit log.
//! 7. The journal is removed. It stays if the line could not be appended: the next run then finds the change in the
//!    guest and logs it.
//! 8. The guest is unlocked.
//!
//! A dry run logs nothing, publishes nothing, and leaves an interrupted run as it is.
//!
//! All of it is generic over the guest, the log and XenStore, and the tests fail every step.

use std::time::Instant;

use locus_kernel::Kernel;

use super::guest::Guest;
use super::{publish, status};
use crate::apply::{Options, Report};
use crate::arena;
use crate::error::{Class, Error, Result};
use crate::machine;
use crate::operation::Operation;
use crate::recover;
use crate::say;
use crate::storage::audit::{Action, Append, Log};
use crate::storage::xenstore::Nodes;

/// The person or program that asks for operations, and where these are published and logged.
#[derive(Debug)]
pub struct Operator<'a> {
    /// Where a guest's status is published.
    pub store: &'a dyn Nodes,
    /// Where operations are logged.
    pub audit: &'a dyn Log,
    /// Name of the operator, for the audit log.
    pub who: String,
    /// Whether the operator repeats the operation by itself after this error. Then there is nothing to log yet.
    pub retries_after: fn(&Error) -> bool,
}

/// An operation that is asked for, as it is logged.
pub(super) struct Asked<'a> {
    pub(super) operation: Operation,
    pub(super) patch: &'a str,
    /// SHA-256 of the patch's file, in hex; empty if only the guest knows it.
    pub(super) sha256: String,
}

impl Operator<'_> {
    /// Carries out an operation, in the order at the head of this file.
    ///
    /// # Errors
    /// Those of `act`; what went wrong in the steps before it.
    pub(super) fn run<G: Guest>(
        &self,
        guest: &G,
        asked: &Asked<'_>,
        options: &Options,
        act: impl FnOnce(&Kernel<'_>, &Options) -> Result<Report>,
    ) -> Result<Report> {
        let began = Instant::now();
        let log = (!options.dry_run)
            .then(|| self.audit.open(guest.uuid()))
            .transpose()?;
        // Held until this function returns.
        let (_lock, done) = match guest.lock(options) {
            Ok(lock) => (Some(lock), self.change(guest, &rest(options, began), act)),
            Err(error) => (None, Err(error)),
        };
        let done = done.map(|report| timed(report, began));
        if let Some(mut log) = log {
            self.log_result(&mut *log, guest, asked, &done);
        }
        done
    }

    /// Steps 3 to 5, for a guest with a UUID of its own. The caller has the guest's lock.
    pub(super) fn change<G: Guest, R>(
        &self,
        guest: &G,
        options: &Options,
        act: impl FnOnce(&Kernel<'_>, &Options) -> Result<R>,
    ) -> Result<R> {
        let change = || {
            guest.check_uuid()?;
            self.recover_interrupted(guest, options)?;
            let kernel = machine::kernel_of(guest)?;
            let done = act(&kernel, options);
            if !options.dry_run && (done.is_ok() || guest.is_unpublished()) {
                self.publish(guest, &kernel, "done, but not published");
            }
            done
        };
        change().map_err(|error: Error| match guest.is_gone() {
            true => Error::failed(format!(
                "domain {} is gone: it ended while it was worked on ({error})",
                guest.label()
            )),
            false => error,
        })
    }

    /// Step 3.
    fn recover_interrupted<G: Guest>(&self, guest: &G, options: &Options) -> Result<()> {
        if !guest.is_recovery_due()? {
            return Ok(());
        }
        if options.dry_run {
            say::warn(format_args!(
                "{}: an earlier run did not end as it should: run `xen-locus recover`",
                guest.label()
            ));
            return Ok(());
        }
        let found = self.recover(guest, options)?;
        // Otherwise there was only the file of a run that looks at the guest right now.
        if !found.is_nothing() {
            say::warn(format_args!(
                "{}: what an earlier run left: {found}",
                guest.label()
            ));
        }
        Ok(())
    }

    /// Publishes the guest's status; an error is said, after `what`, and noted. The caller has the guest's lock.
    pub(super) fn publish<G: Guest>(&self, guest: &G, kernel: &Kernel<'_>, what: &str) {
        let published = status::read(guest, kernel, self.audit)
            .and_then(|status| publish::publish(self.store, &status));
        let Err(error) = published else {
            return guest.was_published();
        };
        say::warn(format_args!("{}: {what}: {error}", guest.label()));
        if let Err(error) = guest.note_unpublished() {
            say::warn(format_args!("{}: {error}", guest.label()));
        }
    }

    /// Steps 6 and 7: logs the result of an operation, and then removes its journal. False if it could not be logged: the
    /// journal stays.
    pub(super) fn log_result<G: Guest>(
        &self,
        log: &mut dyn Append,
        guest: &G,
        asked: &Asked<'_>,
        done: &Result<Report>,
    ) -> bool {
        if done.as_ref().is_err_and(self.retries_after) {
            guest.close_journal();
            return true;
        }
        let mut action = Action {
            sha256: asked.sha256.clone(),
            ..self.action(guest, asked.operation, asked.patch)
        };
        match done {
            Ok(report) => {
                action.result = report.result.name().into();
                action.sha256.clone_from(&report.sha256);
                action.record.clone_from(&report.record);
                action.pause_us = report.pause_us;
                action.superseded.clone_from(&report.superseded);
                [action.text_before, action.text_after] = report.text.clone();
            }
            Err(error) => failed(&mut action, error),
        }
        let what = format!("{} {}", action.op, action.patch);
        match log.append(action) {
            Ok(()) => {
                guest.close_journal();
                true
            }
            Err(error) => {
                guest.keep_journal(done.is_ok());
                say::warn(format_args!(
                    "{}: {what}: not logged; the next run logs it: {error}",
                    guest.label()
                ));
                false
            }
        }
    }

    /// Recovers the guest from an interrupted run and logs that, if there was anything. If it can't be logged, the
    /// journal stays, and nothing else may begin. That it is to be tried again is not logged: this may come again every few
    /// seconds. Nor is it logged that a guest can't be read of which nothing is noted. The caller has the guest's lock.
    ///
    /// # Errors
    /// As [`recover::recover`]; the log can't be opened or written; the journal can't be removed.
    pub(super) fn recover<G: Guest>(
        &self,
        guest: &G,
        options: &Options,
    ) -> Result<recover::Report> {
        let mut log = self.audit.open(guest.uuid())?;
        let done = guest.recover(options);
        let mut action = self.action(guest, Operation::Recover, "");
        match &done {
            Ok(report) if report.is_nothing() => {}
            Ok(report) => {
                action.patch = report.patch.clone().unwrap_or_default();
                action.of = report.op.map(|op| op.to_string()).unwrap_or_default();
                action.sha256.clone_from(&report.sha256);
                action.record.clone_from(&report.record);
                action.superseded.clone_from(&report.parked);
                // As in its JSON.
                action.result = report.result.name().replace(' ', "-");
                action.message = report.to_string();
            }
            Err(error) if error.class() == Class::TryAgain => {}
            // Another system, and no run was at work on it.
            Err(error)
                if error.class() == Class::NotApplicable
                    && !guest.is_recovery_due().unwrap_or(true) => {}
            Err(error) => failed(&mut action, error),
        }
        let logged = match action.result.is_empty() {
            true => Ok(()),
            false => log.append(action),
        };
        let report = done?;
        logged?;
        if !report.is_nothing() {
            guest.note_unpublished()?;
        }
        guest.remove_journal()?;
        Ok(report)
    }

    fn action<G: Guest>(&self, guest: &G, operation: Operation, patch: &str) -> Action {
        Action {
            time: arena::now(),
            who: self.who.clone(),
            op: operation.to_string(),
            domid: guest.domid().0,
            domain: self.store.domain_name(guest.domid()).unwrap_or_default(),
            uuid: guest.uuid().to_owned(),
            patch: patch.into(),
            ..Action::default()
        }
    }
}

fn failed(action: &mut Action, error: &Error) {
    action.result = error.result().into();
    action.exit = error.exit_code() as u8;
    action.message = error.to_string();
}

/// The report of an operation that began at `began`, with the time that it took.
pub(super) fn timed(report: Report, began: Instant) -> Report {
    Report {
        total_ms: u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX),
        ..report
    }
}

/// The options with what is left of the time, which began at `began`.
fn rest(options: &Options, began: Instant) -> Options {
    Options {
        timeout: options.timeout.saturating_sub(began.elapsed()),
        ..options.clone()
    }
}
