//! A guest as an operation needs it: with a lock, a journal, and what an interrupted run may have left.

use std::fs::File;

use locus_guest::addr::DomId;
use locus_xen::DomainInfo;

use super::{lock, unpublished};
use crate::apply::Options;
use crate::domain::Domain;
use crate::error::Result;
use crate::machine::Machine;
use crate::recover;
use crate::storage::journal::Journal;

/// A guest that operations work on.
pub trait Guest: Machine {
    /// The guest is locked while this value lives.
    type Lock;
    /// Its domain id.
    fn domid(&self) -> DomId;
    /// Its UUID.
    fn uuid(&self) -> &str;
    /// Its name and id, for messages.
    fn label(&self) -> String;
    /// Checks that what is noted by its UUID can't be another guest's.
    ///
    /// # Errors
    /// It may be. Such a guest is not changed, and what the audit log says of its UUID is not said of it.
    fn check_uuid(&self) -> Result<()>;
    /// Takes its lock.
    ///
    /// # Errors
    /// [`Class::TryAgain`](crate::error::Class::TryAgain) when another run holds it.
    fn lock(&self, options: &Options) -> Result<Self::Lock>;
    /// Whether a run was interrupted, or may have been. The caller has the lock.
    ///
    /// # Errors
    /// It can't be told.
    fn is_recovery_due(&self) -> Result<bool>;
    /// Recovers it from an interrupted run. The caller has the lock, and removes the journal once the result is
    /// logged.
    ///
    /// # Errors
    /// As [`recover::recover`].
    fn recover(&self, options: &Options) -> Result<recover::Report>;
    /// Removes the journal of the run that was recovered. One that can't be believed is kept under another name.
    ///
    /// # Errors
    /// It can't be removed or moved.
    fn remove_journal(&self) -> Result<()>;
    /// Removes the journal of this run, if it is known how the run ended. If the file can't be removed, the next run
    /// recovers; that is said.
    fn close_journal(&self);
    /// What this run did could not be logged: its journal stays for the next run, and [`Guest::close_journal`] leaves it
    /// alone until another change is begun. `took_place`: the change is in force as a whole.
    fn keep_journal(&self, took_place: bool);
    /// Notes that its status in XenStore may not be true, until [`Guest::was_published`]. The daemon then publishes it. The
    /// caller has the lock.
    ///
    /// # Errors
    /// It can't be noted.
    fn note_unpublished(&self) -> Result<()>;
    /// Whether that is noted, by this run or an earlier one.
    fn is_unpublished(&self) -> bool;
    /// Its status is published. The caller has the lock.
    fn was_published(&self);
    /// Whether it was destroyed, or is being destroyed.
    fn is_gone(&self) -> bool;
}

impl Guest for Domain<'_> {
    type Lock = File;

    fn domid(&self) -> DomId {
        self.info.id
    }

    fn uuid(&self) -> &str {
        &self.info.uuid
    }

    fn label(&self) -> String {
        Domain::label(self)
    }

    fn check_uuid(&self) -> Result<()> {
        Domain::check_uuid(self)
    }

    fn lock(&self, options: &Options) -> Result<File> {
        lock::take(&self.info.uuid, options)
    }

    fn is_recovery_due(&self) -> Result<bool> {
        recover::is_due(&self.info.uuid)
    }

    fn recover(&self, options: &Options) -> Result<recover::Report> {
        recover::recover(self, options)
    }

    fn remove_journal(&self) -> Result<()> {
        Journal::new(&self.info.uuid).retire()
    }

    fn close_journal(&self) {
        self.close();
    }

    fn keep_journal(&self, took_place: bool) {
        Domain::keep_journal(self, took_place);
    }

    fn note_unpublished(&self) -> Result<()> {
        unpublished::note(&self.info.uuid)
    }

    fn is_unpublished(&self) -> bool {
        unpublished::is_noted(&self.info.uuid)
    }

    fn was_published(&self) {
        unpublished::clear(&self.info.uuid);
    }

    fn is_gone(&self) -> bool {
        let same = |now: &DomainInfo| now.uuid == self.info.uuid && !now.dying;
        let now = self.control().domain(self.info.id);
        now.is_ok_and(|now| !now.as_ref().is_some_and(same))
    }
}
