//! The pause: one count of Xen's pause counter, given back however this value ends.
//!
//! No process owns the counter. If a tool stops or dies while it holds a count, the guest stays paused. So while a
//! [`Pause`] exists, signals that would stop or end this process are blocked; they are delivered when the guest runs
//! again. SIGKILL can't be blocked. For it, each step is marked in a [`SharedPage`], which a guardian reads if this
//! process dies.

use std::cell::Cell;
use std::time::{Duration, Instant};

use locus_guest::addr::{DomId, Frame};
use locus_guest::{GuestType, Vcpu};

use super::modified_memory::ModifiedMemory;
use super::multicall::PauseMulticall;
use super::{
    set_realtime_priority, Control, DomainInfo, Error, HeldSignals, PauseStep, SharedPage,
    WriteState,
};

/// Signals that are blocked while a guest is paused. Every other thread of the tool blocks all of them always
/// ([`HeldSignals`]).
const BLOCKED: [libc::c_int; 8] = [
    libc::SIGINT,
    libc::SIGTERM,
    libc::SIGHUP,
    libc::SIGQUIT,
    libc::SIGTSTP,
    libc::SIGTTIN,
    libc::SIGTTOU,
    libc::SIGXCPU,
];

/// The calls that pause and unpause a domain, with all memory for them allocated before.
#[derive(Debug)]
pub struct PauseCalls<'c> {
    control: &'c Control,
    info: DomainInfo,
    method: CallMethod,
    /// It is a PV domain, and Xen could log which pages it makes dirty.
    may_be_log_dirty: bool,
}

/// How Xen is called for a pause.
#[derive(Debug)]
enum CallMethod {
    /// Several hypercalls as one.
    Multicall(PauseMulticall),
    /// One by one through libxenctrl, if Xen takes no multicall.
    OneByOne {
        modified: Option<ModifiedMemory>,
        frames: Vec<Frame>,
    },
}

impl<'c> PauseCalls<'c> {
    /// Prepares pauses of a domain in which the frames `written` may be written (MFNs of a PV guest, else GFNs).
    ///
    /// # Errors
    /// The domain is not supported ([`Control::check_guest`]). A library or device of Xen can't be opened, or there is no
    /// memory for the calls.
    pub fn new(
        control: &'c Control,
        info: &DomainInfo,
        written: &[Frame],
    ) -> Result<PauseCalls<'c>, Error> {
        match PauseMulticall::new(info, written) {
            Some(calls) => PauseCalls::by(control, info, CallMethod::Multicall(calls)),
            None => PauseCalls::one_by_one(control, info, written),
        }
    }

    /// The same, but each call is made on its own through libxenctrl, as other programs do.
    ///
    /// # Errors
    /// As [`PauseCalls::new`].
    pub fn one_by_one(
        control: &'c Control,
        info: &DomainInfo,
        written: &[Frame],
    ) -> Result<PauseCalls<'c>, Error> {
        // Xen has no XEN_DMOP_modified_memory for PV guests.
        let modified = match info.kind {
            GuestType::Pv => None,
            GuestType::Pvh | GuestType::Hvm => Some(ModifiedMemory::open()?),
        };
        let method = CallMethod::OneByOne {
            modified,
            frames: written.to_vec(),
        };
        PauseCalls::by(control, info, method)
    }

    fn by(
        control: &'c Control,
        info: &DomainInfo,
        method: CallMethod,
    ) -> Result<PauseCalls<'c>, Error> {
        control.check_guest(info.id)?;
        let is_pv = info.kind == GuestType::Pv;
        Ok(PauseCalls {
            control,
            info: info.clone(),
            method,
            may_be_log_dirty: is_pv && control.has_shadows(info.id)?.is_some(),
        })
    }

    /// Checks the domain as [`Control::check_guest`] does.
    ///
    /// # Errors
    /// As there.
    pub fn check_guest(&self) -> Result<(), Error> {
        self.control.check_guest(self.info.id)
    }

    /// The registers of all vCPUs, read by the same calls as in a pause, while the domain runs.
    ///
    /// # Errors
    /// Xen did not give the registers of a vCPU.
    pub fn vcpus_now(&self) -> Result<Vec<Vcpu>, Error> {
        match &self.method {
            CallMethod::Multicall(calls) => calls.vcpus_now(),
            CallMethod::OneByOne { .. } => self.control.vcpus(&self.info),
        }
    }

    /// Whether each step of a pause is one call of Xen.
    #[must_use]
    pub fn is_multicall(&self) -> bool {
        matches!(self.method, CallMethod::Multicall(_))
    }

    fn pause(&self) -> Result<(), Error> {
        match &self.method {
            CallMethod::Multicall(calls) => calls.pause(),
            CallMethod::OneByOne { .. } => self.control.pause(self.info.id),
        }
    }

    /// Gives a count back. If memory was `written`, reports the frames to Xen before that; the inner result is that of
    /// the report.
    ///
    /// # Errors
    /// Xen refused to unpause. Or the domain ran while it was written; `written` is the time that its vCPUs had run
    /// before, in nanoseconds.
    fn unpause(&self, written: Option<u64>) -> Result<Result<(), Error>, Error> {
        let id = self.info.id;
        let (modified, frames) = match &self.method {
            CallMethod::Multicall(calls) => return calls.unpause(written.is_some()),
            CallMethod::OneByOne { modified, frames } => (modified, frames),
        };
        let Some(ran_ns) = written else {
            return self.control.unpause(id).map(Ok);
        };
        let reported = modified.as_ref().map(|m| m.report(id, frames));
        let state = self.control.pause_state(id);
        self.control.unpause(id)?;
        let state = state?;
        if let Some(state) = state {
            stayed_paused(id, ran_ns, state.cpu_time_ns)?;
        }
        Ok(reported.map_or(Ok(()), |reported| {
            reported.and(still_runs(id, state.is_none_or(|s| s.shutdown)))
        }))
    }
}

/// Checks that the vCPUs of a domain ran no longer at the end of its pause than before it was written, in nanoseconds.
pub(super) fn stayed_paused(id: DomId, before_ns: u64, after_ns: u64) -> Result<(), Error> {
    match before_ns == after_ns {
        true => Ok(()),
        false => Err(Error::Environment(format!(
            "somebody else let domain {id} run while it was paused to be changed; expected that it runs when that is done"
        ))),
    }
}

/// Refuses to call the writes of a pause reported if the domain `is_shut_down` at its end: it was not at its beginning.
pub(super) fn still_runs(id: DomId, is_shut_down: bool) -> Result<(), Error> {
    match is_shut_down {
        false => Ok(()),
        true => Err(Error::Unsupported(format!(
            "domain {id} was suspended or shut down by its toolstack while it was paused to be changed, so a copy of it \
             that is being made may have a part of the change only; expected that it runs until the change is made"
        ))),
    }
}

/// How a pause ended.
#[derive(Debug)]
pub struct PauseEnd {
    /// How long the domain was paused: from the call that pauses to the call that unpauses. The return from that call
    /// is not counted, because on a busy host the guest may get the CPU before this process does.
    pub duration: Duration,
    /// Whether Xen knows which frames were written, so that a live migration copies them. An error too if a PVH or HVM
    /// domain was written and had shut down by the end of the pause: who shut it down may have copied it meanwhile.
    pub reported: Result<(), Error>,
}

/// A paused domain. It is unpaused when this value is dropped, also by a panic.
#[derive(Debug)]
pub struct Pause<'c> {
    calls: &'c PauseCalls<'c>,
    page: &'c SharedPage,
    began: Instant,
    held: Cell<bool>,
    /// How long its vCPUs together had run when it was paused, in nanoseconds, if that is known.
    ran_ns: Option<u64>,
    /// Once it was written: how long its vCPUs together had run before, in nanoseconds.
    written: Cell<Option<u64>>,
    _signals: HeldSignals,
    _priority: RaisedPriority,
}

impl<'c> Pause<'c> {
    /// Pauses the domain, and returns when none of its vCPUs runs. Each step is marked in `page` before it is done.
    ///
    /// # Errors
    /// Xen refused: the domain is gone, or its counter is full.
    pub fn new(calls: &'c PauseCalls<'c>, page: &'c SharedPage) -> Result<Pause<'c>, Error> {
        let signals = HeldSignals::these(&BLOCKED);
        let mut pause = Pause {
            calls,
            page,
            began: Instant::now(),
            held: Cell::new(false),
            ran_ns: None,
            written: Cell::new(None),
            _signals: signals,
            _priority: RaisedPriority::begin(),
        };
        let state = calls.control.pause_state(calls.info.id)?;
        page.set_paused_by_others(state.is_some_and(|s| s.paused));
        if let CallMethod::Multicall(calls) = &calls.method {
            calls.prepare();
        }
        page.set_cpu_time_ns(None);
        page.set_step(PauseStep::Pausing);
        pause.began = Instant::now();
        if let Err(error) = calls.pause() {
            page.set_step(PauseStep::Idle);
            return Err(error);
        }
        pause.held.set(true);
        pause.ran_ns = match &calls.method {
            CallMethod::Multicall(calls) => {
                // What others held was read right before the pause was taken, by the same call.
                if let Some(others) = calls.was_paused() {
                    page.set_paused_by_others(others);
                }
                calls.cpu_time_ns()
            }
            CallMethod::OneByOne { .. } => {
                let state = calls.control.pause_state(calls.info.id);
                state.ok().flatten().map(|state| state.cpu_time_ns)
            }
        };
        page.set_cpu_time_ns(pause.ran_ns);
        page.set_step(PauseStep::Paused);
        Ok(pause)
    }

    /// The registers of all vCPUs.
    ///
    /// # Errors
    /// Xen did not give the registers of a vCPU.
    pub fn vcpus(&self) -> Result<Vec<Vcpu>, Error> {
        match &self.calls.method {
            CallMethod::Multicall(calls) => calls.vcpus(),
            CallMethod::OneByOne { .. } => self.calls.control.vcpus(&self.calls.info),
        }
    }

    /// Comes right before the first write to the guest's memory. Marks that step, and then the guest may be written. Else it
    /// may not be.
    ///
    /// A guest can't do that later while it is paused. Its toolstack can: libxl itself shuts down an HVM guest that
    /// has no PV drivers or is in an ACPI sleep state (`domain_suspend_callback_common`,
    /// tools/libs/light/libxl_dom_suspend.c). [`PauseEnd::reported`] tells of that.
    ///
    /// # Errors
    /// [`Error::Unsupported`]: it began to share memory, or memory was paged out, since the last attempt
    /// ([`PauseCalls::check_guest`]). Or Xen did not give its state.
    pub fn writing(&self) -> Result<WriteState, Error> {
        let (state, ran_ns) = match &self.calls.method {
            CallMethod::Multicall(calls) => (calls.write_state()?, calls.cpu_time_ns()),
            CallMethod::OneByOne { .. } => {
                let id = self.calls.info.id;
                self.calls.control.write_state(id, self.ran_ns)?
            }
        };
        match state {
            WriteState::Held => {
                self.page.set_cpu_time_ns(ran_ns);
                self.written.set(ran_ns);
                self.page.set_step(PauseStep::Writing);
            }
            // Whoever let it run took the pause. One that is there now is not ours to give back.
            WriteState::LetRun => {
                self.held.set(false);
                self.page.set_step(PauseStep::Idle);
            }
            WriteState::ShutDown => {}
        }
        Ok(state)
    }

    /// Whether Xen may log which pages the domain makes dirty, without those that are written from here: see
    /// [`Control::has_shadows`].
    ///
    /// # Errors
    /// Xen did not say.
    pub fn is_log_dirty(&self) -> Result<bool, Error> {
        let calls = self.calls;
        Ok(calls.may_be_log_dirty && calls.control.has_shadows(calls.info.id)? == Some(true))
    }

    /// Time since the call that pauses.
    #[must_use]
    pub fn elapsed(&self) -> Duration {
        self.began.elapsed()
    }

    /// Unpauses the domain. If it was written, the written frames are reported to Xen before that.
    ///
    /// # Errors
    /// Xen refused: the domain is gone. Or it ran while it was written.
    pub fn end(self) -> Result<PauseEnd, Error> {
        let duration = self.began.elapsed();
        let reported = self.unpause()?;
        Ok(PauseEnd { duration, reported })
    }

    fn unpause(&self) -> Result<Result<(), Error>, Error> {
        if !self.held.replace(false) {
            return Ok(Ok(()));
        }
        self.page.set_step(PauseStep::Unpausing);
        let done = self.calls.unpause(self.written.get());
        self.page.set_step(PauseStep::Idle);
        done
    }
}

impl Drop for Pause<'_> {
    fn drop(&mut self) {
        // If the domain is gone, it needs no unpause.
        let _ = self.unpause();
    }
}

/// Real-time priority for this process while this value exists, if the kernel allows it: other work of the control
/// domain can wait for the few microseconds of a pause.
#[derive(Debug)]
struct RaisedPriority {
    /// The policy before, and its parameter.
    before: Option<(libc::c_int, libc::sched_param)>,
}

impl RaisedPriority {
    fn begin() -> RaisedPriority {
        let mut parameter = libc::sched_param { sched_priority: 0 };
        // SAFETY: the calls are about this thread; the parameter is a plain structure.
        let policy = unsafe {
            libc::sched_getparam(0, &raw mut parameter);
            libc::sched_getscheduler(0)
        };
        // The guardian has a higher priority.
        set_realtime_priority(1);
        RaisedPriority {
            before: (policy >= 0).then_some((policy, parameter)),
        }
    }
}

impl Drop for RaisedPriority {
    fn drop(&mut self) {
        if let Some((policy, parameter)) = self.before {
            // SAFETY: as above.
            unsafe { libc::sched_setscheduler(0, policy, &raw const parameter) };
        }
    }
}
