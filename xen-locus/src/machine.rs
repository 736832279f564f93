//! A live guest as a change needs it: memory, pages, notes of what is done, and a guarded pause.

use std::time::Duration;

use locus_guest::{Error, Live, PagesMut, Vcpu};
use locus_kernel::{Kernel, KernelCache};

use crate::error::Result;
use crate::guard::Spot;
use crate::storage::journal::Change;

/// A guest that runs and can be changed. Every call into Xen that changes anything passes here.
pub trait Machine: Live + PagesMut {
    /// Where what is read of its kernel is stored between runs.
    fn cache(&self) -> &dyn KernelCache;
    /// Checks that guests can be changed on this host. It is asked before a change and in a dry run.
    ///
    /// # Errors
    /// [`Class::NotApplicable`](crate::error::Class::NotApplicable): they can't.
    fn check_changes(&self) -> Result<()>;
    /// Notes, durably, what is about to be done.
    ///
    /// # Errors
    /// It can't be noted: the change must not begin.
    fn begin(&self, change: &Change) -> Result<()>;
    /// Notes that it is known how that ended.
    fn ended(&self);
    /// Whether what is written to the guest from outside may be lost, because it is moved to another host as it runs and Xen
    /// logs only the pages that the guest itself makes dirty (log-dirty mode).
    ///
    /// # Errors
    /// Xen does not say.
    fn is_log_dirty(&self) -> Result<bool>;
    /// Prepares for pauses, in which nothing but `spots` will be changed: should this process die in one,
    /// the guest runs again, with all of them changed or none.
    ///
    /// # Errors
    /// The guardian can't be started.
    fn guard(&self, spots: &[Spot]) -> Result<Box<dyn Guard + '_>>;
}

/// Finds and reads the kernel of a live guest, with what its cache has of it.
///
/// # Errors
/// See [`locus_kernel::Error`].
pub fn kernel_of(machine: &dyn Machine) -> std::result::Result<Kernel<'_>, locus_kernel::Error> {
    Kernel::of(machine, machine.cache())
}

/// The way to pause a guest, guarded while this value lives.
pub trait Guard {
    /// Comes before what is done in preparation of a pause: waits until whatever watches over this process will not
    /// do so within the next moments.
    fn wait_for_guardian_tick(&self) {}
    /// Comes before each attempt to pause the guest, because it may have changed since the last one: checks that what is
    /// mapped of its memory is what its vCPUs see. What [`Guard::let_go`] unmapped is mapped again.
    ///
    /// # Errors
    /// [`Error::Unsupported`]: it may not be. Or it can't be mapped.
    fn hold(&self) -> std::result::Result<(), Error>;
    /// The guest will not be paused before a wait is over: whatever watches over this process lets go of its pages.
    fn let_go(&self) {}
    /// Registers of all virtual CPUs, read as in a pause but while the guest runs: what is done there is done
    /// here before.
    fn vcpus(&self) -> std::result::Result<Vec<Vcpu>, Error>;
    /// Pauses it; the guest runs again when the value is dropped.
    fn pause(&self) -> std::result::Result<Box<dyn Paused + '_>, Error>;
}

/// Whether a paused guest's memory may be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Writing {
    /// It may.
    Begins,
    /// The guest has shut down: whoever saves it or moves it copies it now.
    IsShutDown,
    /// See [`Machine::is_log_dirty`].
    IsLogDirty,
    /// Somebody else let the guest run in the pause.
    WasLetRun,
}

/// A paused guest; unpauses when dropped.
pub trait Paused {
    /// Registers of all virtual CPUs.
    fn vcpus(&self) -> std::result::Result<Vec<Vcpu>, Error>;
    /// Says that from now on the guest's memory is changed, which held until now what was to be replaced; or why it may not
    /// be.
    fn writing(&self) -> std::result::Result<Writing, Error>;
    /// Time since the pause was asked for.
    fn elapsed(&self) -> Duration;
    /// Unpauses, and says how long the guest was paused. Whoever moves the guest as it runs knows then what was
    /// written in the pause.
    fn end(self: Box<Self>) -> std::result::Result<Duration, Error>;
}

#[cfg(test)]
pub(crate) mod mock;
