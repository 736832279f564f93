//! A domain on the Xen this process runs on: found by name, id or UUID, read and changed through the crate `locus-xen`.

mod by_name;
mod own_uuid;
mod pause;

use std::cell::{Cell, OnceCell};

use locus_guest::addr::{DomId, Frame, Gfn, Mfn};
use locus_guest::budget::Budget;
use locus_guest::{
    self as guest, GuestType, Live, Memory, MemoryMut, PagesMut, Vcpu, Window, WindowMut,
};
use locus_kernel::KernelCache;
use locus_xen::{Control, DomainInfo, ForeignMemory, Hypercalls, PauseCalls};

use crate::arena;
use crate::error::{Error, Result};
use crate::guard::worker::Guarded;
use crate::guard::{self, Spot, WatchedRun};
use crate::machine::{Guard, Machine};
use crate::say;
use crate::storage::journal::{Change, Intent, Journal};
use crate::storage::kernel_cache::Cache;
use crate::storage::xenstore::Store;

/// A live domain.
#[derive(Debug)]
pub struct Domain<'c> {
    control: &'c Control,
    store: &'c Store,
    foreign: ForeignMemory,
    /// What Xen said of it when it was looked up.
    pub info: DomainInfo,
    /// Its name as text, from XenStore; empty if it has none.
    pub name: String,
    /// Where what is read of its kernel may be kept; nowhere unless set.
    pub cache: Cache,
    journal: Journal,
    ended: Cell<bool>,
    /// Some of its memory is populated on demand.
    on_demand: OnceCell<bool>,
}

impl<'c> Domain<'c> {
    /// Finds a domain by what a person typed: all digits is an id, anything else a name (as `xl`) or a UUID.
    ///
    /// # Errors
    /// No such domain, or several that may be meant; dom0; a domain that is dying or has shut down.
    pub fn find(control: &'c Control, store: &'c Store, wanted: &str) -> Result<Domain<'c>> {
        let domain = if wanted.bytes().all(|b| b.is_ascii_digit()) && !wanted.is_empty() {
            let id = wanted
                .parse()
                .map(DomId)
                .map_err(|_| by_name::no_such(wanted))?;
            let info = control
                .domain(id)?
                .ok_or_else(|| by_name::no_such(wanted))?;
            Domain::of(control, store, info)?
        } else {
            let mut all = Vec::new();
            for info in control.domains(DomId(0))? {
                // Without an answer it can't be said that there is none.
                all.push((store.try_domain_name(info.id)?, info));
            }
            Domain::of(control, store, by_name::the_one(wanted, all)?)?
        };
        if domain.info.id == DomId(0) {
            return Err(control_domain());
        }
        if domain.info.dying || domain.info.shutdown {
            return Err(Error::failed(format!(
                "domain {} ({wanted}) has shut down or is going away",
                domain.info.id
            )));
        }
        Ok(domain)
    }

    /// The domain `info` is about.
    ///
    /// # Errors
    /// No way to its memory.
    pub fn of(control: &'c Control, store: &'c Store, info: DomainInfo) -> Result<Domain<'c>> {
        let foreign = ForeignMemory::open(info.id)?;
        let name = store.domain_name(info.id).unwrap_or_default();
        let journal = Journal::new(&info.uuid);
        Ok(Domain {
            journal,
            ended: Cell::new(false),
            on_demand: OnceCell::new(),
            control,
            store,
            foreign,
            info,
            name,
            cache: Cache::none(),
        })
    }

    /// Xen's control interface.
    #[must_use]
    pub fn control(&self) -> &'c Control {
        self.control
    }

    /// Name and id as a person reads them: `web1 (3)`, or `- (3)` without a name.
    #[must_use]
    pub fn label(&self) -> String {
        label(&self.name, self.info.id)
    }

    /// Checks that what is noted by this domain's UUID can't be another domain's, as Xen lists them now.
    ///
    /// # Errors
    /// [`Class::NotApplicable`](crate::error::Class::NotApplicable): it may be.
    /// [`Class::TryAgain`](crate::error::Class::TryAgain): this domain never ran, and another one with its UUID did. Or domains
    /// can't be listed.
    pub fn check_uuid(&self) -> Result<()> {
        let has_run = |id| {
            let state = self.control.pause_state(id)?;
            Ok(state.is_some_and(|s| s.cpu_time_ns != 0))
        };
        let name = |id| self.store.domain_name(id).unwrap_or_default();
        let all = self.control.domains(DomId(0))?;
        own_uuid::check(&self.info, &all, has_run, |id| label(&name(id), id))
    }

    /// What a guardian of this process must know that watches changes of `spots`.
    #[must_use]
    pub fn watched_run(&self, spots: &[Spot]) -> WatchedRun {
        WatchedRun {
            domid: self.info.id.0,
            uuid: self.info.uuid.clone(),
            pid: std::process::id(),
            spots: spots.to_vec(),
        }
    }

    /// What Xen says of it now.
    fn info_now(&self) -> std::result::Result<DomainInfo, guest::Error> {
        let info = self.control.domain(self.info.id)?;
        Ok(info.unwrap_or_else(|| self.info.clone()))
    }

    /// What was done and ended could not be logged: its journal stays for the next run, whatever else this one does. That
    /// run may find another kernel in the guest, so if the change `took_place`, that is noted too.
    pub fn keep_journal(&self, took_place: bool) {
        let has_one = self.ended.replace(false) && self.journal.exists();
        if !(has_one && took_place) {
            return;
        }
        if let Err(error) = self.journal.note_done() {
            say::warn(format_args!(
                "{}: {error}: if the guest reboots before the next run, this change is not logged",
                self.label()
            ));
        }
    }

    /// What was done and ended is logged elsewhere: the journal of it is removed. The caller has the
    /// guest's lock still.
    pub fn close(&self) {
        if !self.ended.take() {
            return;
        }
        if let Err(error) = self.journal.end() {
            // The guest is as it should be, and the next run finds that out.
            say::warn(format_args!("{}: {error}", self.label()));
        }
    }
}

/// Name and id of a domain, for messages. Whoever makes a domain chooses its name, so it is one line.
#[must_use]
pub fn label(name: &str, id: DomId) -> String {
    match name {
        "" => format!("- ({id})"),
        name => format!("{} ({id})", say::one_line(name)),
    }
}

fn control_domain() -> Error {
    Error::not_applicable(
        "domain 0 is the control domain itself: xen-locus reads and changes guests only. To patch dom0's own kernel use its \
         livepatch (insmod)",
    )
}

impl Memory for Domain<'_> {
    fn map(&self, frames: &[Frame]) -> std::result::Result<Box<dyn Window>, guest::Error> {
        self.foreign.map(frames)
    }

    /// Not for a guest some of whose memory is populated on demand: a mapping would populate it, and Xen ends a guest for
    /// which it has no page left (xen/arch/x86/mm/p2m-pod.c).
    fn map_some(
        &self,
        frames: &[Frame],
    ) -> std::result::Result<(Box<dyn Window>, Vec<bool>), guest::Error> {
        let on_demand = || self.control.has_pages_on_demand(&self.info);
        match *self.on_demand.get_or_init(on_demand) {
            true => Err(guest::Error::Unsupported(format!(
                "some memory of {} is populated on demand: pages are mapped one by one",
                self.label()
            ))),
            false => self.foreign.map_some(frames),
        }
    }
}

impl MemoryMut for Domain<'_> {
    fn map_mut(&self, frames: &[Frame]) -> std::result::Result<Box<dyn WindowMut>, guest::Error> {
        self.foreign.map_mut(frames)
    }

    /// PV guests are moved by other means, if at all: Xen has no such call for them, and they are not changed meanwhile
    /// ([`Machine::is_log_dirty`]).
    fn written(&self, frames: &[Frame]) -> std::result::Result<(), guest::Error> {
        match self.info.kind {
            GuestType::Pv => Ok(()),
            GuestType::Pvh | GuestType::Hvm => self.foreign.written(frames),
        }
    }
}

impl Live for Domain<'_> {
    fn budget(&self) -> Budget {
        Budget::for_pages(self.info.pages)
    }

    fn memory(&self) -> &dyn Memory {
        self
    }

    fn kind(&self) -> GuestType {
        self.info.kind
    }

    /// Comes before all that is read of a guest's kernel, so a guest that would be misread is refused here.
    fn vcpus(&self) -> std::result::Result<Vec<Vcpu>, guest::Error> {
        self.control.check_guest(self.info.id)?;
        Ok(self.control.vcpus(&self.info)?)
    }
}

impl PagesMut for Domain<'_> {
    /// PV page tables belong to Xen's validation and are written by hypercall; those of PVH and HVM
    /// are ordinary memory.
    fn write_entry(
        &self,
        table: Frame,
        slot: usize,
        entry: u64,
    ) -> std::result::Result<(), guest::Error> {
        if self.info.kind == GuestType::Pv {
            let calls = Hypercalls::open()?;
            return Ok(calls.mmu_update(self.info.id, &[(Mfn(table.0), slot, entry)])?);
        }
        self.foreign
            .map_mut(&[table])?
            .write(slot * 8, &entry.to_le_bytes())?;
        self.written(&[table])
    }

    fn pages(&self) -> std::result::Result<u64, guest::Error> {
        Ok(self.info_now()?.pages)
    }

    fn has_pages_on_demand(&self) -> std::result::Result<bool, guest::Error> {
        Ok(self.control.has_pages_on_demand(&self.info_now()?))
    }

    fn spare(&self) -> std::result::Result<u64, guest::Error> {
        let info = self.info_now()?;
        Ok(info.max_pages.saturating_sub(info.pages))
    }

    fn vacant(&self, frames: &[Gfn]) -> std::result::Result<Vec<bool>, guest::Error> {
        self.foreign.vacant(frames)
    }

    fn not_own(&self, frames: &[Frame]) -> std::result::Result<Vec<bool>, guest::Error> {
        self.foreign.not_own(frames)
    }

    fn populate(&self, frames: &[Gfn]) -> std::result::Result<(), guest::Error> {
        Ok(self.control.populate(&self.info_now()?, frames)?)
    }
}

impl Machine for Domain<'_> {
    fn cache(&self) -> &dyn KernelCache {
        &self.cache
    }

    fn check_changes(&self) -> Result<()> {
        Ok(self.control.check_changes(&self.info)?)
    }

    fn begin(&self, change: &Change) -> Result<()> {
        locus_xen::set_guest_may_be_changed();
        self.ended.set(false);
        self.journal.begin(&Intent {
            uuid: self.info.uuid.clone(),
            domid: self.info.id.0,
            started_at: arena::now(),
            pid: std::process::id(),
            change: change.clone(),
            is_done: false,
        })
    }

    /// The journal stays until that is logged: see [`Domain::close`].
    fn ended(&self) {
        self.ended.set(true);
    }

    fn is_log_dirty(&self) -> Result<bool> {
        Ok(match self.info.kind {
            GuestType::Pv => self.control.has_shadows(self.info.id)? == Some(true),
            // Xen is told what was written.
            GuestType::Pvh | GuestType::Hvm => false,
        })
    }

    fn guard(&self, spots: &[Spot]) -> Result<Box<dyn Guard + '_>> {
        self.check_changes()?;
        let calls = PauseCalls::new(self.control, &self.info, &guard::frames(spots))?;
        Ok(Box::new(Guarded::start(calls, &self.watched_run(spots))?))
    }
}

/// A domain that runs, as Xen shows it.
#[cfg(test)]
pub(crate) fn mock_info(id: u16, uuid: &str) -> DomainInfo {
    DomainInfo {
        id: DomId(id),
        uuid: uuid.into(),
        kind: GuestType::Pvh,
        dying: false,
        shutdown: false,
        paused: false,
        vcpus: 1,
        pages: 1,
        max_pages: 1,
        shared_pages: 0,
        paged_pages: 0,
        hap: true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_domain_without_a_name_is_shown_by_its_id() {
        assert_eq!(label("web1", DomId(3)), "web1 (3)");
        assert_eq!(label("", DomId(3)), "- (3)");
    }

    #[test]
    fn domain_0_is_not_supported() {
        assert_eq!(control_domain().exit_code() as u8, 3);
    }
}
