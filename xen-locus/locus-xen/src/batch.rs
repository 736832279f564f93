//! What a pause asks of Xen, in two calls: one takes it and reads all registers, one gives it back.
//!
//! Each call of a process in the control domain costs two changes between user and kernel mode, with all that a
//! processor forgets by them, and libxenctrl copies what it hands over and what it gets. Here the hypercalls of a
//! step are made as one (`multicall`, xen/include/public/xen.h), in memory that was made for them before.
//!
//! Xen's control interface (`domctl`) has a version that must be met exactly. Which one is found out by asking; the
//! operations used here are the same in all that are asked for. Where none is met, or Xen takes no such call, there
//! is no batch, and [`super::Pause`] makes the calls one by one through libxenctrl.

use locus_guest::addr::Frame;
use locus_guest::{GuestType, Vcpu};
use xenctrl_sys as sys;

use super::ctl::{self, DomainInfo};
use super::dirty::{self, Telling};
use super::room::{Places, Room};
use super::{fault_point, Error};

/// Versions of the control interface whose operations used here are those that xenctrl-sys has
/// (xen/include/public/domctl.h): of Xen 4.16 and 4.17, 4.18, and 4.19 to 4.21.
const VERSIONS: std::ops::RangeInclusive<u32> = 0x15..=0x17;
/// What stands in the place of a result until there is one.
const NOT_MADE: u64 = 1 << 62;
/// Calls about the domain as a whole: taking the pause, how it stands, what was written, giving it back.
const ABOUT_ALL: usize = 4;

/// The calls of a domain's pauses. Their order in memory: the pause, how the domain stands, each vCPU's registers,
/// what was written, the end of the pause.
#[derive(Debug)]
pub(super) struct Batch {
    room: Room,
    info: DomainInfo,
    version: u32,
    /// Calls on each vCPU.
    each: usize,
    entries: Places<sys::multicall_entry>,
    controls: Places<sys::xen_domctl>,
    contexts_pv: Places<sys::vcpu_guest_context_any_t>,
    contexts_hvm: Places<sys::hvm_hw_cpu>,
    telling: Telling,
    /// Frames that may be written.
    frames: Vec<Frame>,
}

impl Batch {
    /// Makes room for the calls of pauses of a domain, in which the frames `written` may be written; `None` where
    /// Xen doesn't take them so.
    pub(super) fn of(info: &DomainInfo, written: &[Frame]) -> Option<Batch> {
        fault_point("multicall").ok()?;
        let mut batch = Batch::sized(info, written).ok()?;
        batch.version = VERSIONS.into_iter().find(|&v| batch.answers(v))?;
        // Whether Xen takes several at once is seen by the first ones, which change nothing.
        batch.vcpus_now().ok()?;
        Some(batch)
    }

    fn sized(info: &DomainInfo, written: &[Frame]) -> Result<Batch, Error> {
        let vcpus = usize::try_from(info.vcpus).unwrap_or(0);
        let (each, pv, hvm) = match info.kind {
            GuestType::Pv => (2, vcpus, 0),
            GuestType::Pvh | GuestType::Hvm => (1, 0, vcpus),
        };
        let calls = ABOUT_ALL + each * vcpus;
        let len = calls * (size_of::<sys::multicall_entry>() + size_of::<sys::xen_domctl>())
            + pv * size_of::<sys::vcpu_guest_context_any_t>()
            + hvm * size_of::<sys::hvm_hw_cpu>()
            + Telling::size(written.len());
        let mut room = Room::new(len)?;
        Ok(Batch {
            entries: room.places(calls)?,
            controls: room.places(calls)?,
            contexts_pv: room.places(pv)?,
            contexts_hvm: room.places(hvm)?,
            telling: Telling::within(&mut room, written.len())?,
            room,
            info: info.clone(),
            version: 0,
            each,
            frames: written.to_vec(),
        })
    }

    /// Whether Xen takes this version of the control interface.
    fn answers(&self, version: u32) -> bool {
        let mut op = self.control(sys::XEN_DOMCTL_getvcpuinfo);
        op.interface_version = version;
        self.room.put(&self.controls, 0, op);
        let arguments = [self.room.address(&self.controls, 0), 0, 0, 0];
        // SAFETY: the operation stands in the room's memory, and Xen writes nothing but that structure.
        let rc = unsafe { self.room.calls().call(sys::__HYPERVISOR_domctl, arguments) };
        rc == 0
    }

    fn control(&self, cmd: u32) -> sys::xen_domctl {
        sys::xen_domctl {
            cmd,
            interface_version: self.version,
            domain: self.info.id.0,
            ..sys::xen_domctl::default()
        }
    }

    /// Number of the call that says what was written, behind those on each vCPU.
    fn told(&self) -> usize {
        2 + self.each * usize::try_from(self.info.vcpus).unwrap_or(0)
    }

    /// Fills in all calls anew: Xen writes into them.
    pub(super) fn prepare(&self) {
        let put = |n: usize, control: sys::xen_domctl| {
            self.room.put(&self.controls, n, control);
            let at = self.room.address(&self.controls, n);
            self.entry(n, sys::__HYPERVISOR_domctl, [at, 0, 0, 0]);
        };
        put(0, self.control(sys::XEN_DOMCTL_pausedomain));
        put(1, self.control(sys::XEN_DOMCTL_getdomaininfo));
        for vcpu in 0..self.info.vcpus {
            let index = usize::try_from(vcpu).unwrap_or(0);
            let first = 2 + self.each * index;
            if self.info.kind == GuestType::Pv {
                let mut control = self.control(sys::XEN_DOMCTL_getvcpuinfo);
                control.u.getvcpuinfo.vcpu = vcpu;
                put(first, control);
                let mut control = self.control(sys::XEN_DOMCTL_getvcpucontext);
                let at = self.room.address(&self.contexts_pv, index);
                control.u.vcpucontext = sys::xen_domctl_vcpucontext {
                    vcpu,
                    ctxt: sys::__guest_handle_vcpu_guest_context_t {
                        p: std::ptr::without_provenance_mut(usize::try_from(at).unwrap_or(0)),
                    },
                };
                put(first + 1, control);
            } else {
                let mut control = self.control(sys::XEN_DOMCTL_gethvmcontext_partial);
                let at = self.room.address(&self.contexts_hvm, index);
                control.u.hvmcontext_partial = sys::xen_domctl_hvmcontext_partial {
                    type_: ctl::HVM_SAVE_CPU.into(),
                    instance: vcpu,
                    bufsz: size_of::<sys::hvm_hw_cpu>() as u64,
                    buffer: sys::__guest_handle_uint8 {
                        p: std::ptr::without_provenance_mut(usize::try_from(at).unwrap_or(0)),
                    },
                };
                put(first, control);
            }
        }
        let arguments = self.telling.put(&self.room, self.info.id, &self.frames);
        self.entry(self.told(), sys::__HYPERVISOR_dm_op, arguments);
        put(self.told() + 1, self.control(sys::XEN_DOMCTL_unpausedomain));
    }

    fn entry(&self, n: usize, op: u32, arguments: [u64; 4]) {
        let mut entry = sys::multicall_entry {
            op: op.into(),
            result: NOT_MADE,
            ..sys::multicall_entry::default()
        };
        for (to, from) in entry.args.iter_mut().zip(arguments) {
            *to = from;
        }
        self.room.put(&self.entries, n, entry);
    }

    /// Makes `count` calls from number `first` on.
    fn make(&self, first: usize, count: usize) -> Result<(), Error> {
        let arguments = [self.room.address(&self.entries, first), count as u64, 0, 0];
        // SAFETY: so many calls stand there, filled in by `prepare`, and all that they point to stands in the
        // room's memory and is as large as they say.
        let rc = unsafe {
            self.room
                .calls()
                .call(sys::__HYPERVISOR_multicall, arguments)
        };
        match rc {
            0 => Ok(()),
            _ => Err(Error::last("making several hypercalls at once (multicall)")),
        }
    }

    /// What call number `n` came to.
    fn result(&self, n: usize, what: impl FnOnce() -> String) -> Result<(), Error> {
        let result = self.room.read(&self.entries, n, |entry| entry.result);
        match result.unwrap_or(NOT_MADE).cast_signed() {
            0 => Ok(()),
            result => {
                let errno = i32::try_from(-result).unwrap_or(libc::EIO);
                Err(Error::Call {
                    call: what(),
                    why: std::io::Error::from_raw_os_error(errno).to_string(),
                    errno,
                })
            }
        }
    }

    /// Takes one pause count of the domain, waits until none of its vCPUs runs, and reads how it stands and all
    /// registers. [`Batch::prepare`] comes before.
    ///
    /// # Errors
    /// It is not paused.
    pub(super) fn pause(&self) -> Result<(), Error> {
        fault_point("xc_domain_pause")?;
        let made = self.make(0, self.told());
        // It may have been made though others were not: what counts is its own result.
        let paused = self.result(0, || format!("pausing domain {}", self.info.id));
        paused.or_else(|error| made.and(Err(error)))
    }

    /// Whether the domain has shut down or is suspended, as the last calls found it.
    ///
    /// # Errors
    /// Xen could not be asked, or the domain is another.
    pub(super) fn is_shut_down(&self) -> Result<bool, Error> {
        self.result(1, || format!("asking for domain {}", self.info.id))?;
        let down = self.room.read(&self.controls, 1, |control| {
            // SAFETY: what Xen fills in of this operation, and any bytes are a value.
            let info = unsafe { &control.u.getdomaininfo };
            info.domain != self.info.id.0 || info.flags & sys::XEN_DOMINF_shutdown != 0
        });
        Ok(down.unwrap_or(true))
    }

    /// The registers of all vCPUs, as the last calls found them.
    ///
    /// # Errors
    /// Xen could not be asked for them.
    pub(super) fn vcpus(&self) -> Result<Vec<Vcpu>, Error> {
        (0..self.info.vcpus).map(|vcpu| self.vcpu(vcpu)).collect()
    }

    /// The same as they are now: what is called in a pause, without the pause.
    ///
    /// # Errors
    /// As there; the call could not be made.
    pub(super) fn vcpus_now(&self) -> Result<Vec<Vcpu>, Error> {
        self.prepare();
        self.make(1, self.told() - 1)?;
        self.vcpus()
    }

    fn vcpu(&self, vcpu: u32) -> Result<Vcpu, Error> {
        let index = usize::try_from(vcpu).unwrap_or(0);
        let first = 2 + self.each * index;
        let what = || format!("reading vCPU {vcpu} of domain {}", self.info.id);
        let found = if self.info.kind == GuestType::Pv {
            self.result(first, what)?;
            let online = self.room.read(&self.controls, first, |control| {
                // SAFETY: what Xen fills in of this operation, and any bytes are a value.
                unsafe { control.u.getvcpuinfo.online != 0 }
            });
            let parse = |c: &_| ctl::vcpu_pv(vcpu, online.unwrap_or(false), c);
            self.result(first + 1, what)
                .map(|()| self.room.read(&self.contexts_pv, index, parse))
        } else {
            let parse = |c: &_| ctl::vcpu_hvm(vcpu, c);
            self.result(first, what)
                .map(|()| self.room.read(&self.contexts_hvm, index, parse))
        };
        match found {
            Ok(found) => Ok(found.unwrap_or_default()),
            Err(error) => ctl::down_or(error, vcpu),
        }
    }

    /// Gives the pause count back; if memory was written, says first which frames were, and returns whether Xen
    /// knows.
    ///
    /// # Errors
    /// It could not be given back.
    pub(super) fn unpause(&self, written: bool) -> Result<Result<(), Error>, Error> {
        // A guest that can't be unpaused is nothing to be tried: the place counts, but never fails.
        let _ = fault_point("xc_domain_unpause");
        let telling = written && !self.frames.is_empty() && self.info.kind != GuestType::Pv;
        let (first, count) = match telling {
            true => (self.told(), 2),
            false => (self.told() + 1, 1),
        };
        let made = self.make(first, count);
        let unpaused = self.result(self.told() + 1, || {
            format!("unpausing domain {}", self.info.id)
        });
        unpaused.or_else(|error| made.and(Err(error)))?;
        if !telling {
            return Ok(Ok(()));
        }
        Ok(self.result(self.told(), || dirty::failed(self.info.id)))
    }
}
