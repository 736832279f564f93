//! Everything that talks to Xen; the only place with `unsafe`.
//!
//! `libxenctrl` changes its soname with every Xen release, so the library of the *running*
//! hypervisor is loaded at run time; types and constants come from `xenctrl-sys`. The stable
//! libraries (foreign memory, hypercalls) are loaded the same way, so that one binary starts
//! anywhere and can say what is missing.
#![deny(clippy::print_stderr)]

mod batch;
mod call;
mod ctl;
mod detached;
mod dirty;
pub mod fault;
mod foreign;
mod library;
mod memory;
mod page;
mod pause;
mod room;
pub mod uuid;

pub use call::Hypercalls;
pub use ctl::{Control, DomainInfo, Standing};
#[cfg(feature = "faults")]
pub use detached::end_self;
pub use detached::{detach, run_first, Other};
pub use foreign::{Access, Foreign};
pub use memory::{at_work, keep, resident, Memory};
pub use page::{End, Page, Step};
pub use pause::{stay_resident, Ended, Pause, Pauses};

use std::fs;
use std::sync::Arc;

/// A call into Xen, or the way to it, failed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// This is no dom0, or not root.
    #[error("{0}")]
    Environment(String),
    /// Xen does not offer this here.
    #[error("{0}")]
    Unsupported(String),
    /// A library is missing or is not what it should be.
    #[error("cannot use {library}: {why}; it comes with the Xen tools of the running hypervisor")]
    Library {
        /// Its file name.
        library: String,
        /// What the loader said.
        why: String,
    },
    /// A call failed.
    #[error("{call} failed: {why}")]
    Call {
        /// The call and what it was about.
        call: String,
        /// `errno` in words.
        why: String,
        /// `errno`.
        errno: i32,
    },
}

/// To those who only know guest memory Xen is one back end of several.
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

/// The place before `call` at which a test may have it fail ([`fault`]).
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
/// [`Error::Environment`] with one sentence.
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
