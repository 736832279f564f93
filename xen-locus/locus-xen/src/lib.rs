//! All calls into Xen and the kernel that need `unsafe`: domains, foreign memory, hypercalls, the pause of a guest.
//!
//! `libxenctrl` has another soname in each Xen release, so the library of the *running* hypervisor is loaded at run
//! time. The stable libraries (`libxenforeignmemory`, `libxencall`, `libxenstore`) are loaded the same way, so that one program
//! starts anywhere and can say what is missing. Types and constants come from `xenctrl-sys`.
#![deny(clippy::print_stderr)]

mod control;
mod domain_info;
pub mod fault;
mod foreign_memory;
mod hypercall;
mod hypercall_buffer;
mod layout;
mod library;
mod modified_memory;
mod multicall;
mod pause;
mod process;
mod process_memory;
mod registers;
mod shared_page;
mod signals;
pub mod uuid;
mod xenstore_list;

pub use control::Control;
pub use domain_info::{DomainInfo, PauseState, WriteState};
pub use foreign_memory::ForeignMemory;
pub use hypercall::Hypercalls;
pub use layout::XenVersion;
pub use pause::{Pause, PauseCalls, PauseEnd};
pub use process::{detach, is_ignored, limit_cpu, set_realtime_priority, shut_out_others, Process};
pub use process_memory::{
    keep_freed_memory, limit_memory, lock_memory, set_guest_may_be_changed, unlock_memory,
    ExitingAllocator,
};
pub use shared_page::{PauseStep, SharedPage, WaitOutcome};
pub use signals::HeldSignals;
pub use xenstore_list::XenstoreList;

use std::fs;
use std::sync::Arc;

/// A call into Xen failed, or it could not be made.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// This is not dom0, not root, or a resource is missing; the text says which.
    #[error("{0}")]
    Environment(String),
    /// Xen does not offer this operation to this control domain, or for this guest.
    #[error("{0}")]
    Unsupported(String),
    /// A library is missing, or lacks a function.
    #[error("cannot use {library}: {why}; it comes with the Xen tools of the running hypervisor")]
    Library {
        /// Its file name.
        library: String,
        /// The message of the dynamic loader.
        why: String,
    },
    /// A call of a library or of the kernel failed.
    #[error("{call} failed: {why}")]
    Call {
        /// What was done, and the name of the call.
        call: String,
        /// The text of `errno`.
        why: String,
        /// `errno`; 0 if the call set none.
        errno: i32,
    },
}

/// Xen is one of several back ends of `locus_guest`.
impl From<Error> for locus_guest::Error {
    fn from(error: Error) -> locus_guest::Error {
        match error {
            Error::Unsupported(why) => locus_guest::Error::Unsupported(why),
            other => locus_guest::Error::Backend(Arc::new(other)),
        }
    }
}

impl Error {
    fn last(call: impl Into<String>) -> Error {
        let os = std::io::Error::last_os_error();
        Error::Call {
            call: call.into(),
            why: os.to_string(),
            errno: os.raw_os_error().unwrap_or(0),
        }
    }
}

/// The fault point before `call` ([`fault`]).
fn fault_point(call: &'static str) -> Result<(), Error> {
    fault::point(call).map_err(|e| Error::Call {
        call: call.into(),
        why: e.to_string(),
        errno: libc::EIO,
    })
}

/// Checks that this is root in a Xen control domain.
///
/// # Errors
/// [`Error::Environment`]: one sentence that says what is missing.
pub fn check_environment() -> Result<(), Error> {
    let no = |why: &str| Err(Error::Environment(why.into()));
    if !fs::read_to_string("/sys/hypervisor/type").is_ok_and(|t| t.trim() == "xen") {
        return no("this machine does not run under Xen: run xen-locus in dom0");
    }
    // SAFETY: geteuid has no preconditions and cannot fail.
    if unsafe { libc::geteuid() } != 0 {
        return no("xen-locus must be run as root");
    }
    match fs::read_to_string("/proc/xen/capabilities") {
        Ok(caps) if caps.contains("control_d") => Ok(()),
        Ok(_) => no("this is a Xen guest, not the control domain: run xen-locus in dom0"),
        Err(_) => no(
            "/proc/xen/capabilities cannot be read, so this is no dom0, or xenfs is not \
                      mounted (mount -t xenfs xenfs /proc/xen)",
        ),
    }
}
