//! The pause: one count of Xen's pause counter, given back however this value ends.
//!
//! Xen's counter belongs to nobody, so a tool that stops or dies while it holds a count leaves the
//! guest frozen. While a [`Pause`] lives, the signals that would stop or end this process wait;
//! they are delivered once the guest runs again. For the one signal that can't wait each step is marked in
//! a [`Page`], which a guardian reads if this process dies.

use std::cell::Cell;
use std::mem::MaybeUninit;
use std::time::{Duration, Instant};

use locus_guest::addr::Frame;
use locus_guest::{GuestType, Vcpu};

use super::batch::Batch;
use super::dirty::Dirty;
use super::{run_first, Control, DomainInfo, Error, Page, Step};

/// Signals that wait while a guest is paused.
const HELD: [libc::c_int; 7] = [
    libc::SIGINT,
    libc::SIGTERM,
    libc::SIGHUP,
    libc::SIGQUIT,
    libc::SIGTSTP,
    libc::SIGTTIN,
    libc::SIGTTOU,
];

/// Keeps all memory of this process in place from now on: code, data and what it will allocate. Else
/// the first use of a page inside a pause waits for the kernel, or for a disk to swap it in; and outside one pages
/// come one by one, for each of which a PV control domain asks Xen.
///
/// # Errors
/// The kernel refuses: the process may not lock so much.
pub fn stay_resident() -> Result<(), Error> {
    // SAFETY: the call changes no memory's contents and takes no pointer.
    if unsafe { libc::mlockall(libc::MCL_CURRENT | libc::MCL_FUTURE) } == 0 {
        return Ok(());
    }
    Err(Error::last("locking this process in memory (mlockall)"))
}

/// The way to pause a domain, with all that is needed for it made before.
#[derive(Debug)]
pub struct Pauses<'c> {
    control: &'c Control,
    info: DomainInfo,
    way: Way,
}

/// How Xen is called in a pause.
#[derive(Debug)]
enum Way {
    /// Several hypercalls at once.
    Together(Batch),
    /// One by one, where Xen takes them so only.
    OneByOne {
        dirty: Option<Dirty>,
        frames: Vec<Frame>,
    },
}

impl<'c> Pauses<'c> {
    /// Prepares pauses of a domain in which the frames `written` may be written.
    ///
    /// # Errors
    /// No memory for the calls.
    pub fn new(
        control: &'c Control,
        info: &DomainInfo,
        written: &[Frame],
    ) -> Result<Pauses<'c>, Error> {
        match Batch::of(info, written) {
            Some(batch) => Ok(Pauses {
                control,
                info: info.clone(),
                way: Way::Together(batch),
            }),
            None => Pauses::one_by_one(control, info, written),
        }
    }

    /// The same by libxenctrl's calls, as any other program makes them.
    ///
    /// # Errors
    /// As above.
    pub fn one_by_one(
        control: &'c Control,
        info: &DomainInfo,
        written: &[Frame],
    ) -> Result<Pauses<'c>, Error> {
        // PV guests are moved by other means, if at all: Xen has no such call for them.
        let dirty = match info.kind {
            GuestType::Pv => None,
            GuestType::Pvh | GuestType::Hvm => Some(Dirty::open()?),
        };
        Ok(Pauses {
            control,
            info: info.clone(),
            way: Way::OneByOne {
                dirty,
                frames: written.to_vec(),
            },
        })
    }

    /// The registers of all vCPUs, read as in a pause, while the domain runs.
    ///
    /// # Errors
    /// Xen could not be asked for them.
    pub fn vcpus_now(&self) -> Result<Vec<Vcpu>, Error> {
        match &self.way {
            Way::Together(batch) => batch.vcpus_now(),
            Way::OneByOne { .. } => self.control.vcpus(&self.info),
        }
    }

    fn take(&self) -> Result<(), Error> {
        match &self.way {
            Way::Together(batch) => batch.pause(),
            Way::OneByOne { .. } => self.control.pause(self.info.id),
        }
    }

    /// Gives a count back, and says whether it is known to Xen what was `written`.
    fn give_back(&self, written: bool) -> Result<Result<(), Error>, Error> {
        match &self.way {
            Way::Together(batch) => batch.unpause(written),
            Way::OneByOne { dirty, frames } => {
                let told = match dirty {
                    Some(dirty) if written => dirty.mark(self.info.id, frames),
                    _ => Ok(()),
                };
                self.control.unpause(self.info.id).map(|()| told)
            }
        }
    }
}

/// How a pause ended.
#[derive(Debug)]
pub struct Ended {
    /// How long the domain was paused: from asking for the pause to handing the unpause to Xen. The way back from
    /// that call is not counted: on a busy host the guest, running again, may have the CPU before this process has.
    pub paused: Duration,
    /// Whether Xen, which may have to copy them to another host, knows of the frames that were written.
    pub told: Result<(), Error>,
}

/// A paused domain. Dropping it unpauses, also when the stack unwinds.
#[derive(Debug)]
pub struct Pause<'c> {
    pauses: &'c Pauses<'c>,
    page: &'c Page,
    began: Instant,
    held: bool,
    written: Cell<bool>,
    mask: libc::sigset_t,
    _first: First,
}

impl<'c> Pause<'c> {
    /// Pauses the domain; returns once none of its vCPUs runs. Each step is marked in `page`.
    ///
    /// # Errors
    /// Xen refused: the domain is gone, or its counter is full.
    pub fn new(pauses: &'c Pauses<'c>, page: &'c Page) -> Result<Pause<'c>, Error> {
        let mask = hold_signals();
        let mut pause = Pause {
            pauses,
            page,
            began: Instant::now(),
            held: false,
            written: Cell::new(false),
            mask,
            _first: First::begin(),
        };
        let standing = pauses.control.standing(pauses.info.id)?;
        page.set_paused_by_others(standing.is_some_and(|s| s.paused));
        if let Way::Together(batch) = &pauses.way {
            batch.prepare();
        }
        page.set_step(Step::Pausing);
        pause.began = Instant::now();
        if let Err(error) = pauses.take() {
            page.set_step(Step::Idle);
            return Err(error);
        }
        pause.held = true;
        page.set_step(Step::Paused);
        Ok(pause)
    }

    /// The registers of all vCPUs.
    ///
    /// # Errors
    /// Xen could not be asked for them.
    pub fn vcpus(&self) -> Result<Vec<Vcpu>, Error> {
        match &self.pauses.way {
            Way::Together(batch) => batch.vcpus(),
            Way::OneByOne { .. } => self.pauses.control.vcpus(&self.pauses.info),
        }
    }

    /// Says that the guest's memory is being changed from now on, unless the guest has shut down, be it to
    /// be saved or moved: false then. Nobody who is paused can do that any more.
    ///
    /// # Errors
    /// Xen can't be asked.
    pub fn writing(&self) -> Result<bool, Error> {
        let runs = match &self.pauses.way {
            Way::Together(batch) => !batch.is_shut_down()?,
            Way::OneByOne { .. } => {
                let standing = self.pauses.control.standing(self.pauses.info.id)?;
                standing.is_some_and(|s| !s.shutdown)
            }
        };
        if runs {
            self.written.set(true);
            self.page.set_step(Step::Writing);
        }
        Ok(runs)
    }

    /// Time since the pause was asked for.
    #[must_use]
    pub fn elapsed(&self) -> Duration {
        self.began.elapsed()
    }

    /// Unpauses; before that Xen is told of what was written.
    ///
    /// # Errors
    /// Xen refused: the domain is gone.
    pub fn end(mut self) -> Result<Ended, Error> {
        let paused = self.began.elapsed();
        let told = self.give_back()?;
        Ok(Ended { paused, told })
    }

    fn give_back(&mut self) -> Result<Result<(), Error>, Error> {
        self.held = false;
        self.page.set_step(Step::Unpausing);
        let done = self.pauses.give_back(self.written.get());
        self.page.set_step(Step::Idle);
        done
    }
}

impl Drop for Pause<'_> {
    fn drop(&mut self) {
        if self.held {
            // A domain that is gone needs no unpause, and there is nobody left to tell.
            let _ = self.give_back();
        }
        // SAFETY: the mask was filled by pthread_sigmask.
        unsafe {
            libc::pthread_sigmask(
                libc::SIG_SETMASK,
                &raw const self.mask,
                std::ptr::null_mut(),
            )
        };
    }
}

/// While it lives this process runs before all of ordinary priority, if it may: what else the control domain has
/// to do can wait for so short a time, and the guest can't.
#[derive(Debug)]
struct First {
    /// The policy from before, and its parameter.
    before: Option<(libc::c_int, libc::sched_param)>,
}

impl First {
    fn begin() -> First {
        let mut parameter = libc::sched_param { sched_priority: 0 };
        // SAFETY: the calls are about this thread; the parameter is a plain structure of ours.
        let policy = unsafe {
            libc::sched_getparam(0, &raw mut parameter);
            libc::sched_getscheduler(0)
        };
        // Its guardian comes before it.
        run_first(1);
        First {
            before: (policy >= 0).then_some((policy, parameter)),
        }
    }
}

impl Drop for First {
    fn drop(&mut self) {
        if let Some((policy, parameter)) = self.before {
            // SAFETY: as above.
            unsafe { libc::sched_setscheduler(0, policy, &raw const parameter) };
        }
    }
}

/// Blocks [`HELD`] for this thread and returns the mask from before. The tool has one thread.
fn hold_signals() -> libc::sigset_t {
    let mut held = MaybeUninit::<libc::sigset_t>::zeroed();
    let mut before = MaybeUninit::<libc::sigset_t>::zeroed();
    // SAFETY: the sets are valid memory; an all-zero sigset_t is an empty one, so `before` is
    // initialised even if the call failed.
    unsafe {
        libc::sigemptyset(held.as_mut_ptr());
        for signal in HELD {
            libc::sigaddset(held.as_mut_ptr(), signal);
        }
        libc::pthread_sigmask(libc::SIG_BLOCK, held.as_ptr(), before.as_mut_ptr());
        before.assume_init()
    }
}
