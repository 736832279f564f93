//! The hypercalls of a pause, made as multicalls: one pauses and reads all registers, one asks whether the
//! guest may be written, one unpauses.
//!
//! Each call of a process in the control domain switches between user and kernel mode twice, which costs the processor
//! its caches and predictions, and libxenctrl copies all arguments and results. Here the hypercalls of a step are made
//! as one (`multicall`, xen/include/public/xen.h), in memory that was allocated before the pause.
//!
//! The caller of Xen's control interface (`domctl`) must give the exact version of the interface. [`PauseMulticall`]
//! finds it by trying each of [`INTERFACES`], in which the operations used here are the same. If Xen takes none of them,
//! or no multicall, [`super::Pause`] makes the calls one by one through libxenctrl.

use locus_guest::addr::Frame;
use locus_guest::{GuestType, Vcpu};
use xenctrl_sys as sys;

use super::control::HVM_SAVE_CPU;
use super::domain_info::{self, DomainInfo, WriteState};
use super::hypercall_buffer::{Array, HypercallBuffer};
use super::layout::INTERFACES;
use super::modified_memory::{self, ModifiedMemoryCall};
use super::registers;
use super::{fault_point, pause, Error};

/// The result of a call that Xen has not made yet.
const NOT_MADE: u64 = 1 << 62;
/// Calls about the domain as a whole: state, pause, state, report of written frames, state, unpause.
const DOMAIN_CALLS: usize = 6;
/// Index of the call that reads the state before the pause.
const BEFORE: usize = 0;
/// Index of the call that takes the pause.
const PAUSE: usize = 1;
/// Index of the call that reads the state in the pause.
const STATE: usize = 2;
/// Index of the first call for the first vCPU.
const VCPUS: usize = 3;

/// The calls of a domain's pauses. Their order in memory: state, pause, state, each vCPU's registers, report of written
/// frames, state, unpause.
#[derive(Debug)]
pub(super) struct PauseMulticall {
    buffer: HypercallBuffer,
    info: DomainInfo,
    version: u32,
    /// Number of calls for each vCPU.
    calls_per_vcpu: usize,
    entries: Array<sys::multicall_entry>,
    controls: Array<sys::xen_domctl>,
    contexts_pv: Array<sys::vcpu_guest_context_any_t>,
    contexts_hvm: Array<sys::hvm_hw_cpu>,
    report: ModifiedMemoryCall,
    /// Frames that may be written.
    frames: Vec<Frame>,
}

impl PauseMulticall {
    /// Prepares the calls for pauses of a domain in which the frames `written` may be written. `None` if Xen does not
    /// take them as multicalls.
    pub(super) fn new(info: &DomainInfo, written: &[Frame]) -> Option<PauseMulticall> {
        fault_point("multicall").ok()?;
        let mut calls = PauseMulticall::sized(info, written).ok()?;
        calls.version = INTERFACES.into_iter().find(|&v| calls.answers(v))?;
        // These calls change nothing, and show whether Xen takes multicalls.
        calls.vcpus_now().ok()?;
        Some(calls)
    }

    fn sized(info: &DomainInfo, written: &[Frame]) -> Result<PauseMulticall, Error> {
        let vcpus = info.vcpus as usize;
        let (calls_per_vcpu, pv, hvm) = match info.kind {
            GuestType::Pv => (2, vcpus, 0),
            GuestType::Pvh | GuestType::Hvm => (1, 0, vcpus),
        };
        let calls = DOMAIN_CALLS + calls_per_vcpu * vcpus;
        let len = calls * (size_of::<sys::multicall_entry>() + size_of::<sys::xen_domctl>())
            + pv * size_of::<sys::vcpu_guest_context_any_t>()
            + hvm * size_of::<sys::hvm_hw_cpu>()
            + ModifiedMemoryCall::size(written.len());
        let mut buffer = HypercallBuffer::new(len)?;
        Ok(PauseMulticall {
            entries: buffer.array(calls)?,
            controls: buffer.array(calls)?,
            contexts_pv: buffer.array(pv)?,
            contexts_hvm: buffer.array(hvm)?,
            report: ModifiedMemoryCall::within(&mut buffer, written.len())?,
            buffer,
            info: info.clone(),
            version: 0,
            calls_per_vcpu,
            frames: written.to_vec(),
        })
    }

    /// Whether Xen takes this version of the control interface.
    fn answers(&self, version: u32) -> bool {
        let mut op = self.control(sys::XEN_DOMCTL_getvcpuinfo);
        op.interface_version = version;
        self.buffer.put(&self.controls, 0, op);
        let arguments = [self.buffer.address(&self.controls, 0), 0, 0, 0];
        // SAFETY: the operation is in the buffer, and Xen writes nothing but that structure.
        let rc = unsafe {
            self.buffer
                .calls()
                .call(sys::__HYPERVISOR_domctl, arguments)
        };
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

    /// Index of the call that reports written frames. It comes after the calls for the vCPUs.
    fn report_index(&self) -> usize {
        VCPUS + self.calls_per_vcpu * self.info.vcpus as usize
    }

    /// Index of the call that reads the state at the end of the pause.
    fn end_index(&self) -> usize {
        self.report_index() + 1
    }

    /// Index of the call that unpauses.
    fn unpause_index(&self) -> usize {
        self.report_index() + 2
    }

    /// Fills in all calls. Comes before each multicall, because Xen writes into the arguments and results.
    pub(super) fn prepare(&self) {
        let put = |n: usize, control: sys::xen_domctl| {
            self.buffer.put(&self.controls, n, control);
            let at = self.buffer.address(&self.controls, n);
            self.entry(n, sys::__HYPERVISOR_domctl, [at, 0, 0, 0]);
        };
        put(BEFORE, self.control(sys::XEN_DOMCTL_getdomaininfo));
        put(PAUSE, self.control(sys::XEN_DOMCTL_pausedomain));
        put(STATE, self.control(sys::XEN_DOMCTL_getdomaininfo));
        for vcpu in 0..self.info.vcpus {
            let index = vcpu as usize;
            let first = VCPUS + self.calls_per_vcpu * index;
            if self.info.kind == GuestType::Pv {
                let mut control = self.control(sys::XEN_DOMCTL_getvcpuinfo);
                control.u.getvcpuinfo.vcpu = vcpu;
                put(first, control);
                let mut control = self.control(sys::XEN_DOMCTL_getvcpucontext);
                control.u.vcpucontext = sys::xen_domctl_vcpucontext {
                    vcpu,
                    ctxt: sys::__guest_handle_vcpu_guest_context_t {
                        p: self.buffer.pointer(&self.contexts_pv, index).cast(),
                    },
                };
                put(first + 1, control);
            } else {
                let mut control = self.control(sys::XEN_DOMCTL_gethvmcontext_partial);
                control.u.hvmcontext_partial = sys::xen_domctl_hvmcontext_partial {
                    type_: HVM_SAVE_CPU.into(),
                    instance: vcpu,
                    bufsz: size_of::<sys::hvm_hw_cpu>() as u64,
                    buffer: sys::__guest_handle_uint8 {
                        p: self.buffer.pointer(&self.contexts_hvm, index).cast(),
                    },
                };
                put(first, control);
            }
        }
        let arguments = self.report.put(&self.buffer, self.info.id, &self.frames);
        self.entry(self.report_index(), sys::__HYPERVISOR_dm_op, arguments);
        put(
            self.end_index(),
            self.control(sys::XEN_DOMCTL_getdomaininfo),
        );
        put(
            self.unpause_index(),
            self.control(sys::XEN_DOMCTL_unpausedomain),
        );
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
        self.buffer.put(&self.entries, n, entry);
    }

    /// Makes `count` calls from index `first` on, as one multicall.
    fn call(&self, first: usize, count: usize) -> Result<(), Error> {
        let arguments = [
            self.buffer.address(&self.entries, first),
            count as u64,
            0,
            0,
        ];
        // SAFETY: there are `count` calls, filled in by `prepare`, and all that they point to is in the buffer and has
        // the size that they give.
        let rc = unsafe {
            self.buffer
                .calls()
                .call(sys::__HYPERVISOR_multicall, arguments)
        };
        match rc {
            0 => Ok(()),
            _ => Err(Error::last("making several hypercalls at once (multicall)")),
        }
    }

    /// The result of the call with index `n`; `what` says in an error what it was for.
    fn result(&self, n: usize, what: impl FnOnce() -> String) -> Result<(), Error> {
        let result = self.buffer.read(&self.entries, n, |entry| entry.result)?;
        match result.cast_signed() {
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

    /// Takes one pause count of the domain, waits until none of its vCPUs runs, and reads its state and all registers.
    /// [`PauseMulticall::prepare`] comes before.
    ///
    /// # Errors
    /// Xen refused; the domain is not paused.
    pub(super) fn pause(&self) -> Result<(), Error> {
        fault_point("xc_domain_pause")?;
        let made = self.call(0, self.report_index());
        // The pause may have been made though calls after it failed: its own result decides.
        let paused = self.result(PAUSE, || format!("pausing domain {}", self.info.id));
        paused.or_else(|error| made.and(Err(error)))
    }

    /// Whether the domain, which was paused, may be written now: [`domain_info::write_state`].
    ///
    /// # Errors
    /// It is not supported as it is now, or Xen did not give its state.
    pub(super) fn write_state(&self) -> Result<WriteState, Error> {
        let ran_ns = Some(self.state(STATE, |info| info.cpu_time)?);
        self.call(STATE, 1)?;
        self.state(STATE, |info| {
            domain_info::write_state(self.info.id, info, ran_ns)
        })?
    }

    /// Whether the domain had shut down or was suspended by what call number `n` says.
    fn shut_down(&self, n: usize) -> Result<bool, Error> {
        self.state(n, |info| domain_info::is_shut_down(self.info.id, info))
    }

    /// Whether somebody else held a pause of the domain right before the last one of this process; `None` if Xen did not
    /// say.
    pub(super) fn was_paused(&self) -> Option<bool> {
        let paused = |info: &sys::xc_domaininfo_t| info.flags & sys::XEN_DOMINF_paused != 0;
        self.state(BEFORE, paused).ok()
    }

    /// Time that all its vCPUs together had run at the last pause, in nanoseconds; `None` if Xen did not say.
    pub(super) fn cpu_time_ns(&self) -> Option<u64> {
        self.state(STATE, |info| info.cpu_time).ok()
    }

    /// What call number `n` says of the domain's state.
    fn state<R>(&self, n: usize, of: impl FnOnce(&sys::xc_domaininfo_t) -> R) -> Result<R, Error> {
        self.result(n, || format!("asking for domain {}", self.info.id))?;
        self.buffer.read(&self.controls, n, |control| {
            // SAFETY: the part of the union that Xen fills in for this operation, and any bytes are a value.
            of(unsafe { &control.u.getdomaininfo })
        })
    }

    /// The registers of all vCPUs at the last multicall.
    ///
    /// # Errors
    /// Xen did not give the registers of a vCPU.
    pub(super) fn vcpus(&self) -> Result<Vec<Vcpu>, Error> {
        (0..self.info.vcpus).map(|vcpu| self.vcpu(vcpu)).collect()
    }

    /// The registers of all vCPUs now: the same calls as in a pause, but without the pause.
    ///
    /// # Errors
    /// The multicall failed, or Xen did not give the registers of a vCPU.
    pub(super) fn vcpus_now(&self) -> Result<Vec<Vcpu>, Error> {
        self.prepare();
        self.call(STATE, self.report_index() - STATE)?;
        self.vcpus()
    }

    fn vcpu(&self, vcpu: u32) -> Result<Vcpu, Error> {
        let index = vcpu as usize;
        let first = VCPUS + self.calls_per_vcpu * index;
        let what = || format!("reading vCPU {vcpu} of domain {}", self.info.id);
        let found = if self.info.kind == GuestType::Pv {
            self.result(first, what)?;
            let online = self.buffer.read(&self.controls, first, |control| {
                // SAFETY: the part of the union that Xen fills in for this operation, and any bytes are a value.
                unsafe { control.u.getvcpuinfo.online != 0 }
            })?;
            let parse = |c: &_| registers::vcpu_pv(vcpu, online, c);
            self.result(first + 1, what)
                .and_then(|()| self.buffer.read(&self.contexts_pv, index, parse))
        } else {
            let parse = |c: &_| registers::vcpu_hvm(vcpu, c);
            self.result(first, what)
                .and_then(|()| self.buffer.read(&self.contexts_hvm, index, parse))
        };
        found.or_else(|error| registers::down_or(error, vcpu))
    }

    /// Gives the pause count back. If memory was `written`, reports the written frames to Xen before that; the inner
    /// result is that of the report, and an error too if the domain has shut down since the pause was taken.
    ///
    /// # Errors
    /// Xen refused to unpause. Or the domain ran while it was written.
    pub(super) fn unpause(&self, written: bool) -> Result<Result<(), Error>, Error> {
        // A guest that stays paused is no case for a test: this fault point is counted, but never fails.
        let _ = fault_point("xc_domain_unpause");
        let reports = written && !self.frames.is_empty() && self.info.kind != GuestType::Pv;
        let first = match (reports, written) {
            (true, _) => self.report_index(),
            (false, true) => self.end_index(),
            (false, false) => self.unpause_index(),
        };
        let made = self.call(first, self.unpause_index() + 1 - first);
        let unpaused = self.result(self.unpause_index(), || {
            format!("unpausing domain {}", self.info.id)
        });
        unpaused.or_else(|error| made.and(Err(error)))?;
        if written {
            let ran_ns = |n| self.state(n, |info| info.cpu_time);
            pause::stayed_paused(self.info.id, ran_ns(STATE)?, ran_ns(self.end_index())?)?;
        }
        if !reports {
            return Ok(Ok(()));
        }
        let reported = self.result(self.report_index(), || {
            modified_memory::failed(self.info.id)
        });
        let is_shut_down = self.shut_down(self.end_index());
        Ok(reported.and(is_shut_down.and_then(|is| pause::still_runs(self.info.id, is))))
    }
}
