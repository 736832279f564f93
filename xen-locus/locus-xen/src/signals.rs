//! Signals that are held back for a while.

use std::marker::PhantomData;
use std::mem::MaybeUninit;

/// Signals that this thread holds back while this value exists. A thread that it starts meanwhile holds them back for its
/// whole life.
///
/// A signal to a process goes to any thread that does not hold it back. So a thread that keeps signals from the process for
/// a while needs all other threads to hold them back always.
#[derive(Debug)]
pub struct HeldSignals {
    before: libc::sigset_t,
    /// The mask belongs to this thread.
    _of_thread: PhantomData<*const ()>,
}

impl HeldSignals {
    /// Holds all signals back that can be.
    #[must_use]
    pub fn all() -> HeldSignals {
        let mut held = MaybeUninit::<libc::sigset_t>::zeroed();
        // SAFETY: the set is valid memory.
        unsafe { libc::sigfillset(held.as_mut_ptr()) };
        // SAFETY: it was filled.
        HeldSignals::hold(&unsafe { held.assume_init() })
    }

    /// Holds back the signals by which a terminal stops a process, as Ctrl-Z does.
    #[must_use]
    pub fn of_job_control() -> HeldSignals {
        HeldSignals::these(&[libc::SIGTSTP, libc::SIGTTIN, libc::SIGTTOU])
    }

    /// Holds these signals back.
    pub(crate) fn these(signals: &[libc::c_int]) -> HeldSignals {
        let mut held = MaybeUninit::<libc::sigset_t>::zeroed();
        // SAFETY: the set is valid memory.
        unsafe { libc::sigemptyset(held.as_mut_ptr()) };
        for &signal in signals {
            // SAFETY: as above; a number that is no signal is refused.
            unsafe { libc::sigaddset(held.as_mut_ptr(), signal) };
        }
        // SAFETY: it was made empty, and then filled.
        HeldSignals::hold(&unsafe { held.assume_init() })
    }

    fn hold(held: &libc::sigset_t) -> HeldSignals {
        let mut before = MaybeUninit::<libc::sigset_t>::zeroed();
        // SAFETY: the sets are valid memory; an all-zero sigset_t is an empty one, so `before` is initialised even if the
        // call failed.
        let before = unsafe {
            libc::pthread_sigmask(libc::SIG_BLOCK, held, before.as_mut_ptr());
            before.assume_init()
        };
        HeldSignals {
            before,
            _of_thread: PhantomData,
        }
    }
}

impl Drop for HeldSignals {
    fn drop(&mut self) {
        // SAFETY: pthread_sigmask filled the set, for this thread: the value can't be sent to another one.
        unsafe {
            libc::pthread_sigmask(
                libc::SIG_SETMASK,
                &raw const self.before,
                std::ptr::null_mut(),
            )
        };
    }
}
