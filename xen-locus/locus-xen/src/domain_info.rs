//! What Xen says of a domain, and whether this tool can do right by such a one.

use locus_guest::addr::DomId;
use locus_guest::GuestType;
use xenctrl_sys::{self as sys, xc_domaininfo_t};

use super::{uuid, Error};

/// Emulated devices that only an HVM guest has; PVH has a local APIC at most
/// (xen/include/public/arch-x86/xen.h).
const EMU_HVM_ONLY: u32 = sys::XEN_X86_EMU_IOAPIC | sys::XEN_X86_EMU_PIC;

/// A domain as Xen describes it (`struct xen_domctl_getdomaininfo`, xen/include/public/domctl.h).
#[derive(Clone, Debug)]
pub struct DomainInfo {
    /// Xen's id of it; another domain may have it after this one is gone.
    pub id: DomId,
    /// Its UUID, as [`uuid::to_text`] writes it.
    pub uuid: String,
    /// Whether it is PV, PVH or HVM.
    pub kind: GuestType,
    /// It is being destroyed.
    pub dying: bool,
    /// It has shut down or crashed.
    pub shutdown: bool,
    /// A toolstack or this tool held a pause of it.
    pub paused: bool,
    /// Number of its virtual CPUs, including those that are down.
    pub vcpus: u32,
    /// Memory that it has, in pages of 4 KiB.
    pub pages: u64,
    /// Memory that it may have, in pages of 4 KiB.
    pub max_pages: u64,
    /// Pages that it shares with other domains (`mem_sharing`).
    pub shared_pages: u64,
    /// Pages that are paged out (`xenpaging`).
    pub paged_pages: u64,
    /// The processor translates its addresses twice (hardware-assisted paging). Else Xen has page tables of its own for it
    /// (shadow paging).
    pub hap: bool,
}

/// Whether a domain is paused, and which domain it is. Read without allocating memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PauseState {
    /// Its UUID, in the order of the bytes of its text.
    pub uuid: [u8; 16],
    /// Something holds a pause of it (`xl pause`, or this tool).
    pub paused: bool,
    /// Time that all its vCPUs together have run, in nanoseconds.
    pub cpu_time_ns: u64,
    /// It has shut down or crashed, or is suspended: by itself, or to be saved or migrated.
    pub shutdown: bool,
}

impl DomainInfo {
    /// Checks that what is mapped of the guest's memory is what its vCPUs see, now and later.
    ///
    /// # Errors
    /// [`Error::Unsupported`]: it may not be.
    pub fn check_supported(&self) -> Result<(), Error> {
        check_own(self.id, self.shared_pages, self.paged_pages)?;
        // Xen sees no write of the control domain to a page table that it shadows.
        if self.kind != GuestType::Pv && !self.hap {
            return Err(Error::Unsupported(format!(
                "domain {} ({}) runs with shadow paging (hap=0 in its configuration, or a host without EPT or NPT), \
                 with which xen-locus was never tried: start it with hap=1",
                self.id, self.kind
            )));
        }
        Ok(())
    }
}

/// Checks that the domain `id` has all of its memory to itself.
///
/// # Errors
/// [`Error::Unsupported`]: some pages are shared or paged out.
fn check_own(id: DomId, shared_pages: u64, paged_pages: u64) -> Result<(), Error> {
    // A page that is shared becomes another one when the guest writes to it, and a mapping shows the old one for ever.
    // A page that is paged out is waited for without limit (tools/libs/foreignmemory/linux.c).
    if shared_pages != 0 {
        return Err(Error::Unsupported(format!(
            "domain {id} shares {shared_pages} pages with other domains (mem_sharing, or a fork of a VM): what is mapped \
             of them goes stale when the guest writes; end the sharing, and try again"
        )));
    }
    if paged_pages != 0 {
        return Err(Error::Unsupported(format!(
            "{paged_pages} pages of domain {id} are paged out (xenpaging): they can't be read within a limited time; end \
             xenpaging for it, and try again"
        )));
    }
    Ok(())
}

/// Whether the domain `id` had shut down or was suspended, or there was none, by this answer of Xen.
pub(super) fn is_shut_down(id: DomId, info: &xc_domaininfo_t) -> bool {
    info.domain != id.0 || info.flags & sys::XEN_DOMINF_shutdown != 0
}

/// Whether a domain that was paused may be written now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriteState {
    /// It may.
    Held,
    /// It has shut down or is suspended, or is gone: it may be saved or migrated now.
    ShutDown,
    /// Somebody else let it run in the pause, so what was looked at is stale. It may run now.
    LetRun,
}

/// Whether the domain `id` may be written, by what Xen says of it right before. `ran_ns` is how long its vCPUs together had
/// run when it was paused, if that is known.
///
/// # Errors
/// [`Error::Unsupported`]: some of its memory is not its own, so what was looked at in the pause may be stale.
pub(super) fn write_state(
    id: DomId,
    info: &xc_domaininfo_t,
    ran_ns: Option<u64>,
) -> Result<WriteState, Error> {
    if is_shut_down(id, info) {
        return Ok(WriteState::ShutDown);
    }
    let is_paused = info.flags & sys::XEN_DOMINF_paused != 0;
    if !is_paused || ran_ns.is_some_and(|before| before != info.cpu_time) {
        return Ok(WriteState::LetRun);
    }
    check_own(id, info.shr_pages, info.paged_pages)?;
    Ok(WriteState::Held)
}

/// Checks the answer of `xc_altp2m_get_domain_state` for a domain: `active`, or the error.
///
/// # Errors
/// [`Error::Unsupported`]: it has other views of its memory, in which a function may not be the one that is patched.
pub(super) fn check_views(id: DomId, active: bool, error: Option<Error>) -> Result<(), Error> {
    match error {
        // This processor or this build of Xen has no such views; or they are off for this domain.
        Some(Error::Call {
            errno: libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL,
            ..
        }) => Ok(()),
        Some(error) => Err(error),
        None if active => Err(Error::Unsupported(format!(
            "domain {id} has other views of its memory (altp2m, as introspection uses): its vCPUs may execute copies of \
             pages that can't be reached from here; end the introspection of it, and try again"
        ))),
        None => Ok(()),
    }
}

/// What Xen said, as it is used here.
pub(super) fn domain_info(info: &xc_domaininfo_t) -> DomainInfo {
    let has = |flag: u32| info.flags & flag != 0;
    let kind = if !has(sys::XEN_DOMINF_hvm_guest) {
        GuestType::Pv
    } else if info.arch_config.emulation_flags & EMU_HVM_ONLY == 0 {
        GuestType::Pvh
    } else {
        GuestType::Hvm
    };
    DomainInfo {
        id: DomId(info.domain),
        uuid: uuid::to_text(&info.handle),
        kind,
        dying: has(sys::XEN_DOMINF_dying),
        shutdown: has(sys::XEN_DOMINF_shutdown),
        paused: has(sys::XEN_DOMINF_paused),
        vcpus: info.max_vcpu_id.saturating_add(1).min(4096),
        pages: info.tot_pages,
        max_pages: info.max_pages,
        shared_pages: info.shr_pages,
        paged_pages: info.paged_pages,
        hap: has(sys::XEN_DOMINF_hap),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pvh() -> xc_domaininfo_t {
        xc_domaininfo_t {
            domain: 3,
            flags: sys::XEN_DOMINF_hvm_guest | sys::XEN_DOMINF_hap,
            tot_pages: 1000,
            ..xc_domaininfo_t::default()
        }
    }

    /// The same, in a pause.
    fn paused() -> xc_domaininfo_t {
        let mut info = pvh();
        info.flags |= sys::XEN_DOMINF_paused;
        info.cpu_time = 1000;
        info
    }

    /// Why a domain is refused; empty if it is not.
    fn refused(change: impl FnOnce(&mut xc_domaininfo_t)) -> String {
        let mut info = pvh();
        change(&mut info);
        match domain_info(&info).check_supported() {
            Ok(()) => String::new(),
            Err(Error::Unsupported(why)) => why,
            Err(other) => panic!("{other}"),
        }
    }

    #[test]
    fn a_guest_whose_memory_is_shared_paged_out_or_shadowed_is_refused_by_name() {
        assert_eq!(refused(|_| ()), "");
        assert!(refused(|info| info.shr_pages = 7).contains("shares 7 pages"));
        assert!(refused(|info| info.paged_pages = 8).contains("8 pages of domain 3 are paged out"));
        let shadow = |info: &mut xc_domaininfo_t| info.flags &= !sys::XEN_DOMINF_hap;
        assert!(refused(shadow).contains("shadow paging"));
        // A PV guest needs no such paging.
        assert_eq!(refused(|info| info.flags = 0), "");
    }

    #[test]
    fn what_begins_during_the_wait_is_noticed_in_the_pause() {
        let may = |change: fn(&mut xc_domaininfo_t)| {
            let mut info = paused();
            change(&mut info);
            write_state(DomId(3), &info, Some(1000))
        };
        assert!(matches!(may(|_| ()), Ok(WriteState::Held)));
        let other = may(|info| info.domain = 4);
        assert!(matches!(other, Ok(WriteState::ShutDown)));
        let shut_down = |info: &mut xc_domaininfo_t| info.flags |= sys::XEN_DOMINF_shutdown;
        assert!(matches!(may(shut_down), Ok(WriteState::ShutDown)));
        // Somebody took the pause, and may have given another one.
        let runs = |info: &mut xc_domaininfo_t| info.flags &= !sys::XEN_DOMINF_paused;
        assert!(matches!(may(runs), Ok(WriteState::LetRun)));
        assert!(matches!(
            may(|info| info.cpu_time = 1001),
            Ok(WriteState::LetRun)
        ));
        let unknown = write_state(DomId(3), &paused(), None);
        assert!(matches!(unknown, Ok(WriteState::Held)));
        assert!(matches!(
            may(|info| info.shr_pages = 1),
            Err(Error::Unsupported(_))
        ));
        assert!(matches!(
            may(|info| info.paged_pages = 1),
            Err(Error::Unsupported(_))
        ));
    }

    #[test]
    fn a_guest_with_other_views_of_its_memory_is_refused_and_one_that_can_have_none_is_not() {
        let failed = |errno| Error::Call {
            call: String::new(),
            why: String::new(),
            errno,
        };
        let id = DomId(3);
        assert!(check_views(id, false, None).is_ok());
        let active = check_views(id, true, None);
        assert!(matches!(active, Err(Error::Unsupported(why)) if why.contains("altp2m")));
        for none in [libc::EOPNOTSUPP, libc::ENOSYS, libc::EINVAL] {
            assert!(check_views(id, true, Some(failed(none))).is_ok());
        }
        assert!(check_views(id, false, Some(failed(libc::EPERM))).is_err());
    }
}
