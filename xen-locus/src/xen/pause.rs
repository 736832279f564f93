//! The pause: one count of Xen's pause counter, given back however this value ends.
//!
//! Xen's counter belongs to nobody, so a tool that stops or dies while it holds a count leaves the
//! guest frozen. While a [`Pause`] lives, the signals that would stop or end this process wait;
//! they are delivered once the guest runs again. For the one signal that can't wait each step is marked in
//! a [`Page`], which a guardian reads if this process dies.

use std::mem::MaybeUninit;
use std::time::{Duration, Instant};

use super::{Control, Error, Page, Step};
use crate::addr::DomId;

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
/// the first use of a page inside a pause waits for the kernel, or for a disk to swap it in.
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

/// A paused domain. Dropping it unpauses, also when the stack unwinds.
#[derive(Debug)]
pub struct Pause<'c> {
    control: &'c Control,
    page: &'c Page,
    domain: DomId,
    began: Instant,
    held: bool,
    mask: libc::sigset_t,
}

impl<'c> Pause<'c> {
    /// Pauses `domain`; returns once none of its vCPUs runs. Each step is marked in `page`.
    ///
    /// # Errors
    /// Xen refused: the domain is gone, or its counter is full.
    pub fn new(control: &'c Control, page: &'c Page, domain: DomId) -> Result<Pause<'c>, Error> {
        let mask = hold_signals();
        let mut pause = Pause {
            control,
            page,
            domain,
            began: Instant::now(),
            held: false,
            mask,
        };
        let others = control.standing(domain)?.is_some_and(|s| s.paused);
        page.set_paused_by_others(others);
        page.set_step(Step::Pausing);
        pause.began = Instant::now();
        if let Err(error) = control.pause(domain) {
            page.set_step(Step::Idle);
            return Err(error);
        }
        pause.held = true;
        page.set_step(Step::Paused);
        Ok(pause)
    }

    /// Says that the guest's memory is being changed from now on, unless the guest has shut down, be it to
    /// be saved or moved: false then. Nobody who is paused can do that any more.
    ///
    /// # Errors
    /// Xen can't be asked.
    pub fn writing(&self) -> Result<bool, Error> {
        let standing = self.control.standing(self.domain)?;
        let runs = standing.is_some_and(|s| !s.shutdown);
        if runs {
            self.page.set_step(Step::Writing);
        }
        Ok(runs)
    }

    /// Time since the pause was asked for.
    #[must_use]
    pub fn elapsed(&self) -> Duration {
        self.began.elapsed()
    }

    /// Unpauses and says how long the domain was paused: from asking for the pause to handing the
    /// unpause to Xen. The way back from that call is not counted: on a busy host the guest, running
    /// again, may have the CPU before this process has.
    ///
    /// # Errors
    /// Xen refused: the domain is gone.
    pub fn end(mut self) -> Result<Duration, Error> {
        let paused = self.began.elapsed();
        self.give_back()?;
        Ok(paused)
    }

    fn give_back(&mut self) -> Result<(), Error> {
        self.held = false;
        self.page.set_step(Step::Unpausing);
        let done = self.control.unpause(self.domain);
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
