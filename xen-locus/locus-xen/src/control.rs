//! `libxenctrl`: domains, virtual CPUs, guest memory size.

use std::ffi::{c_int, c_uint, c_ulong, c_void};
use std::fs;
use std::ptr::{null_mut, NonNull};

use locus_guest::addr::{DomId, Gfn};
use locus_guest::{GuestType, Vcpu};
use xenctrl_sys::{
    self as sys, vcpu_guest_context_any_t, xc_domaininfo_t, xc_interface, xc_vcpuinfo_t, xen_pfn_t,
    xentoollog_logger,
};

use super::domain_info::{self, domain_info, DomainInfo, PauseState, WriteState};
use super::layout::{self, Filled, XenVersion};
use super::library::{self, functions};
use super::registers::{down_or, vcpu_hvm, vcpu_pv};
use super::{fault_point, Error};

mod shadows;

/// `HVM_SAVE_CODE(CPU)`: a macro, so `xenctrl-sys` has no constant for it
/// (xen/include/public/arch-x86/hvm/save.h).
pub(super) const HVM_SAVE_CPU: u16 = 2;

functions! {
    /// What is used of `libxenctrl` (tools/include/xenctrl.h). These prototypes are the same in Xen 4.16 to 4.22.
    struct Functions checked by xenctrl_sys {
        fn xc_interface_open(*mut xentoollog_logger, *mut xentoollog_logger, c_uint) -> *mut xc_interface;
        fn xc_interface_close(*mut xc_interface) -> c_int;
        fn xc_domain_pause(*mut xc_interface, u32) -> c_int;
        fn xc_domain_unpause(*mut xc_interface, u32) -> c_int;
        fn xc_domain_getinfolist(*mut xc_interface, u32, c_uint, *mut xc_domaininfo_t) -> c_int;
        fn xc_vcpu_getinfo(*mut xc_interface, u32, u32, *mut xc_vcpuinfo_t) -> c_int;
        fn xc_vcpu_getcontext(*mut xc_interface, u32, u32, *mut vcpu_guest_context_any_t) -> c_int;
        fn xc_domain_hvm_getcontext_partial(*mut xc_interface, u32, u16, u16, *mut c_void, u32) -> c_int;
        fn xc_domain_get_pod_target(*mut xc_interface, u32, *mut u64, *mut u64, *mut u64) -> c_int;
        fn xc_shadow_control(*mut xc_interface, u32, c_uint, *mut c_uint, c_uint) -> c_int;
        fn xc_domain_populate_physmap_exact(*mut xc_interface, u32, c_ulong, c_uint, c_uint, *mut xen_pfn_t) -> c_int;
    }
}

/// A handle on the hypervisor's control interface.
pub struct Control {
    handle: NonNull<xc_interface>,
    functions: Functions,
    version: XenVersion,
    /// `xc_altp2m_get_domain_state`, if the library has it.
    altp2m: Option<GetAltp2mState>,
}

/// The prototype of `xc_altp2m_get_domain_state` (tools/include/xenctrl.h).
type GetAltp2mState = unsafe extern "C" fn(*mut xc_interface, u32, *mut bool) -> c_int;
const _: GetAltp2mState = sys::xc_altp2m_get_domain_state;

impl std::fmt::Debug for Control {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Control")
    }
}

impl Control {
    /// Opens the interface with the library of the running hypervisor (`libxenctrl.so.MAJOR.MINOR`).
    ///
    /// # Errors
    /// This is not Xen, the library is missing, or there is no access to `/dev/xen/privcmd`; [`Error::Unsupported`]: this
    /// Xen describes domains in a form that is not read here.
    pub fn open() -> Result<Control, Error> {
        let part = |part: &str| {
            fs::read_to_string(format!("/sys/hypervisor/version/{part}"))
                .map(|s| s.trim().to_owned())
                .map_err(|e| {
                    Error::Environment(format!("cannot read Xen's version in /sys/hypervisor: {e}"))
                })
        };
        let version = XenVersion::parse(&part("major")?, &part("minor")?)?;
        version.check_readable()?;
        let name = format!("libxenctrl.so.{version}");
        let functions = Functions::load(&name)?;
        // SAFETY: the prototype is that of Xen's header, as compared above.
        let altp2m = library::load(&name).and_then(|library| unsafe {
            library::symbol(&library, &name, "xc_altp2m_get_domain_state")
        });
        // SAFETY: null loggers mean "log errors to stderr" by default; flags 0.
        let handle = unsafe { (functions.xc_interface_open)(null_mut(), null_mut(), 0) };
        let handle = NonNull::new(handle).ok_or_else(|| {
            Error::last("opening Xen's control interface (xc_interface_open, /dev/xen/privcmd)")
        })?;
        let control = Control {
            handle,
            functions,
            version,
            // `functions` keeps the code mapped.
            altp2m: altp2m.ok(),
        };
        control.check_layout()?;
        Ok(control)
    }

    /// Checks that the library describes domains in the form that is read here, and that it finds domain 0. It is asked
    /// twice, into memory that was filled before.
    fn check_layout(&self) -> Result<(), Error> {
        let mut answers = layout::Answers::new();
        for answer in answers.each() {
            // SAFETY: the call fills one structure. The buffer is aligned for it, and many times as large as that of any
            // version of Xen.
            let n = unsafe {
                (self.functions.xc_domain_getinfolist)(
                    self.handle.as_ptr(),
                    0,
                    1,
                    answer.as_mut_ptr().cast(),
                )
            };
            if n < 0 {
                return Err(Error::last("asking for domain 0 (xc_domain_getinfolist)"));
            }
        }
        answers.check(self.version)
    }

    /// The version of Xen that this host runs.
    #[must_use]
    pub fn version(&self) -> XenVersion {
        self.version
    }

    /// Checks that guests can be changed on this Xen: that its control interface is one with which this build was made or
    /// compared.
    ///
    /// # Errors
    /// [`Error::Unsupported`]: it is another one.
    pub fn check_changes(&self, info: &DomainInfo) -> Result<(), Error> {
        // A version that is not known by its number may still have an interface that is known.
        if self.version.is_known() || super::multicall::PauseMulticall::new(info, &[]).is_some() {
            return Ok(());
        }
        Err(layout::unknown(self.version))
    }

    /// Checks that this tool can do right by the domain, as Xen describes it now ([`DomainInfo::check_supported`]), and that
    /// its vCPUs see its memory as this tool does.
    ///
    /// # Errors
    /// [`Error::Unsupported`]: it can't. Or the domain is gone, or a call failed.
    pub fn check_guest(&self, id: DomId) -> Result<(), Error> {
        let info = self
            .domain(id)?
            .ok_or_else(|| Error::Environment(format!("domain {id} is gone")))?;
        info.check_supported()?;
        let mut active = false;
        let (Some(get), true) = (self.altp2m, info.kind != GuestType::Pv) else {
            return Ok(());
        };
        // SAFETY: a valid handle, and a place for the answer.
        let rc = unsafe { get(self.handle.as_ptr(), u32::from(id.0), &raw mut active) };
        let error = (rc != 0).then(|| {
            Error::last(format!(
                "asking whether domain {id} has other views of its memory (xc_altp2m_get_domain_state)"
            ))
        });
        domain_info::check_views(id, active, error)
    }

    /// All domains with id `first` or a higher one.
    ///
    /// # Errors
    /// `xc_domain_getinfolist` failed.
    pub fn domains(&self, first: DomId) -> Result<Vec<DomainInfo>, Error> {
        fault_point("xc_domain_getinfolist")?;
        const AT_ONCE: c_uint = 64;
        let mut found = Vec::new();
        let mut next = u32::from(first.0);
        loop {
            let mut infos = vec![xc_domaininfo_t::default(); AT_ONCE as usize];
            // SAFETY: the buffer holds AT_ONCE elements of the type the call fills.
            let n = unsafe {
                (self.functions.xc_domain_getinfolist)(
                    self.handle.as_ptr(),
                    next,
                    AT_ONCE,
                    infos.as_mut_ptr(),
                )
            };
            let Ok(n) = usize::try_from(n) else {
                return Err(Error::last("listing domains (xc_domain_getinfolist)"));
            };
            infos.truncate(n);
            let Some(last) = infos.last() else {
                return Ok(found);
            };
            next = u32::from(last.domain) + 1;
            found.extend(infos.iter().map(domain_info));
            if n < AT_ONCE as usize {
                return Ok(found);
            }
        }
    }

    /// What Xen knows of the domain with this id; `None` if there is none.
    fn info(&self, id: DomId) -> Result<Option<xc_domaininfo_t>, Error> {
        fault_point("xc_domain_getinfolist")?;
        let mut info = xc_domaininfo_t::default();
        // SAFETY: the buffer holds one element of the type the call fills.
        let n = unsafe {
            (self.functions.xc_domain_getinfolist)(
                self.handle.as_ptr(),
                u32::from(id.0),
                1,
                &raw mut info,
            )
        };
        // If there is no such domain, Xen returns the next one.
        match n {
            1 if info.domain == id.0 => Ok(Some(info)),
            0 | 1 => Ok(None),
            _ => Err(Error::last(format!(
                "asking for domain {id} (xc_domain_getinfolist)"
            ))),
        }
    }

    /// The domain with this id; `None` if there is none.
    ///
    /// # Errors
    /// `xc_domain_getinfolist` failed.
    pub fn domain(&self, id: DomId) -> Result<Option<DomainInfo>, Error> {
        Ok(self.info(id)?.as_ref().map(domain_info))
    }

    /// Whether the domain with this id is paused; `None` if there is no such domain.
    ///
    /// # Errors
    /// `xc_domain_getinfolist` failed.
    pub fn pause_state(&self, id: DomId) -> Result<Option<PauseState>, Error> {
        Ok(self.info(id)?.map(|info| PauseState {
            uuid: info.handle,
            paused: info.flags & sys::XEN_DOMINF_paused != 0,
            cpu_time_ns: info.cpu_time,
            shutdown: info.flags & sys::XEN_DOMINF_shutdown != 0,
        }))
    }

    /// Whether the paused domain with this id may be written ([`domain_info::write_state`]), and the time that all its
    /// vCPUs together have run, in nanoseconds; no time if there is no such domain. `ran_ns` is that time when it was paused.
    ///
    /// # Errors
    /// It is not supported as it is now, or `xc_domain_getinfolist` failed.
    pub(super) fn write_state(
        &self,
        id: DomId,
        ran_ns: Option<u64>,
    ) -> Result<(WriteState, Option<u64>), Error> {
        Ok(match self.info(id)? {
            Some(info) => (
                domain_info::write_state(id, &info, ran_ns)?,
                Some(info.cpu_time),
            ),
            None => (WriteState::ShutDown, None),
        })
    }

    /// Whether some memory of the domain is populated on demand, when it is first used, or by a mapping. True also if Xen
    /// does not say.
    #[must_use]
    pub fn has_pages_on_demand(&self, info: &DomainInfo) -> bool {
        if info.kind == GuestType::Pv {
            return false;
        }
        let (mut pages, mut cached, mut entries) = (0, 0, 0);
        // SAFETY: a valid handle, and places for the three answers.
        let rc = unsafe {
            (self.functions.xc_domain_get_pod_target)(
                self.handle.as_ptr(),
                u32::from(info.id.0),
                &raw mut pages,
                &raw mut cached,
                &raw mut entries,
            )
        };
        rc != 0 || entries != 0
    }

    /// Takes one pause count of a domain and waits until none of its vCPUs runs.
    pub(super) fn pause(&self, id: DomId) -> Result<(), Error> {
        fault_point("xc_domain_pause")?;
        // SAFETY: a valid handle; the call takes plain numbers.
        self.check(
            unsafe { (self.functions.xc_domain_pause)(self.handle.as_ptr(), u32::from(id.0)) },
            || format!("pausing domain {id} (xc_domain_pause)"),
        )
    }

    /// Gives one pause count back, which a [`super::Pause`] took in this process or in one that died.
    ///
    /// # Errors
    /// Xen refused: the domain is gone, or its pause counter is zero.
    pub fn unpause(&self, id: DomId) -> Result<(), Error> {
        // A guest that stays paused is no case for a test: this fault point is counted, but never fails.
        let _ = fault_point("xc_domain_unpause");
        // SAFETY: a valid handle; the call takes plain numbers.
        self.check(
            unsafe { (self.functions.xc_domain_unpause)(self.handle.as_ptr(), u32::from(id.0)) },
            || format!("unpausing domain {id} (xc_domain_unpause)"),
        )
    }

    /// The registers of all virtual CPUs. They belong to one moment only while the domain is paused.
    ///
    /// # Errors
    /// `xc_vcpu_getinfo`, `xc_vcpu_getcontext` or `xc_domain_hvm_getcontext_partial` failed.
    pub fn vcpus(&self, info: &DomainInfo) -> Result<Vec<Vcpu>, Error> {
        (0..info.vcpus).map(|vcpu| self.vcpu(info, vcpu)).collect()
    }

    fn vcpu(&self, info: &DomainInfo, vcpu: u32) -> Result<Vcpu, Error> {
        fault_point("xc_vcpu_getcontext")?;
        match info.kind {
            GuestType::Pv => self.vcpu_pv(info.id, vcpu),
            GuestType::Pvh | GuestType::Hvm => self.vcpu_hvm(info.id, vcpu),
        }
    }

    fn vcpu_pv(&self, id: DomId, vcpu: u32) -> Result<Vcpu, Error> {
        let what = |call: &str| format!("reading vCPU {vcpu} of domain {id} ({call})");
        let mut state = Filled::<xc_vcpuinfo_t>::new();
        // SAFETY: the buffer begins with the type that the call fills, and has room behind it.
        let rc = unsafe {
            (self.functions.xc_vcpu_getinfo)(
                self.handle.as_ptr(),
                u32::from(id.0),
                vcpu,
                state.as_mut_ptr(),
            )
        };
        self.check(rc, || what("xc_vcpu_getinfo"))?;
        let online = state.get("xc_vcpu_getinfo")?.online != 0;
        let mut any = Filled::<vcpu_guest_context_any_t>::new();
        // SAFETY: the buffer begins with the union of all context layouts, and has room behind it.
        let rc = unsafe {
            (self.functions.xc_vcpu_getcontext)(
                self.handle.as_ptr(),
                u32::from(id.0),
                vcpu,
                any.as_mut_ptr(),
            )
        };
        match rc {
            0 => Ok(vcpu_pv(vcpu, online, any.get("xc_vcpu_getcontext")?)),
            _ => down_or(Error::last(what("xc_vcpu_getcontext")), vcpu),
        }
    }

    fn vcpu_hvm(&self, id: DomId, vcpu: u32) -> Result<Vcpu, Error> {
        let mut c = sys::hvm_hw_cpu::default();
        let what =
            || format!("reading vCPU {vcpu} of domain {id} (xc_domain_hvm_getcontext_partial)");
        let too_large = |_| Error::Unsupported(format!("{}: number too large", what()));
        let size = u32::try_from(size_of::<sys::hvm_hw_cpu>()).map_err(too_large)?;
        let instance = u16::try_from(vcpu).map_err(too_large)?;
        // SAFETY: the buffer is of the type and size that record HVM_SAVE_CPU has.
        let rc = unsafe {
            (self.functions.xc_domain_hvm_getcontext_partial)(
                self.handle.as_ptr(),
                u32::from(id.0),
                HVM_SAVE_CPU,
                instance,
                (&raw mut c).cast(),
                size,
            )
        };
        if rc != 0 {
            return down_or(Error::last(what()), vcpu);
        }
        Ok(vcpu_hvm(vcpu, &c))
    }

    /// Gives the domain new pages at the frames `gfns`, which must have none. Its memory limit stays as the toolstack
    /// set it: a restored or migrated domain gets no more.
    ///
    /// # Errors
    /// [`Error::Unsupported`]: the limit does not allow it. The host has no memory, or a frame could not be populated.
    /// The frames before it are populated then.
    pub fn populate(&self, info: &DomainInfo, gfns: &[Gfn]) -> Result<(), Error> {
        fault_point("xc_domain_populate_physmap_exact")?;
        let id = info.id;
        if info.pages.saturating_add(gfns.len() as u64) > info.max_pages {
            return Err(Error::Unsupported(format!(
                "domain {id} needs {} more pages; it has {} and may have {}",
                gfns.len(),
                info.pages,
                info.max_pages
            )));
        }
        let mut frames: Vec<xen_pfn_t> = gfns.iter().map(|f| f.0).collect();
        // SAFETY: the buffer has as many frame numbers as the call is given.
        let rc = unsafe {
            (self.functions.xc_domain_populate_physmap_exact)(
                self.handle.as_ptr(),
                u32::from(id.0),
                frames.len() as c_ulong,
                0,
                0,
                frames.as_mut_ptr(),
            )
        };
        self.check(rc, || {
            format!(
                "giving domain {id} {} pages (xc_domain_populate_physmap_exact): has the host free memory? `xl info` \
                 shows it (free_memory), and what is kept for domains that are being built (outstanding_claims)",
                gfns.len()
            )
        })
    }

    fn check(&self, rc: c_int, what: impl FnOnce() -> String) -> Result<(), Error> {
        if rc == 0 {
            Ok(())
        } else {
            Err(Error::last(what()))
        }
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        // SAFETY: the handle was opened by this library and is used no more.
        unsafe { (self.functions.xc_interface_close)(self.handle.as_ptr()) };
    }
}
