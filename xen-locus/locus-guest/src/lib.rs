//! Guest memory and guest state behind small traits.
//!
//! A back end that can only read (a saved core) implements only the reading traits, so "writing to
//! a core" does not compile. Guest memory is never a `&[u8]`: bytes are copied in and out.
#![forbid(unsafe_code)]
#![deny(clippy::print_stderr)]

pub mod addr;
pub mod budget;
pub mod core;
pub mod fetch;
#[cfg(any(test, feature = "testing"))]
pub mod mock;
pub mod space;

use std::sync::Arc;

use crate::addr::{Frame, Gfn, Gva};

/// Failure to reach guest memory.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// Nothing is mapped there in the guest's page tables.
    #[error("guest address {at} is not mapped (page table level {level})")]
    NotMapped {
        /// The address asked for.
        at: Gva,
        /// Level whose entry was not present, 1 = last.
        level: u8,
    },
    /// A frame could not be mapped.
    #[error("{frame} of the guest cannot be mapped: {why}")]
    Frame {
        /// The frame.
        frame: Frame,
        /// The reason as the back end gives it.
        why: String,
    },
    /// An access outside a window, or another internal bound.
    #[error("access of {len} bytes at offset {offset} leaves a window of {size} bytes")]
    Bounds {
        /// Byte offset asked for.
        offset: usize,
        /// Length asked for, in bytes.
        len: usize,
        /// Size of the window, in bytes.
        size: usize,
    },
    /// The guest's data is not what it must be.
    #[error("{0}")]
    Odd(String),
    /// Reading the guest cost more than any honest guest costs ([`budget`]).
    #[error(
        "reading the guest was given up after {} units of work, far more than a Linux kernel of \
         any distribution takes: its tables or lists are too long, lead in circles, or lie",
        budget::LIMIT
    )]
    Exhausted,
    /// The back end does not offer this for this guest.
    #[error("{0}")]
    Unsupported(String),
    /// A call of the back end failed; the reason is its own error.
    #[error(transparent)]
    Backend(Arc<dyn std::error::Error + Send + Sync>),
}

/// Frames of guest memory that stay mapped while this value lives.
pub trait Window {
    /// Copies bytes out of the guest.
    fn read(&self, offset: usize, buf: &mut [u8]) -> Result<(), Error>;
}

/// A window that can be written.
pub trait WindowMut: Window {
    /// Copies bytes into the guest.
    fn write(&self, offset: usize, bytes: &[u8]) -> Result<(), Error>;
}

/// Guest memory that can be read.
pub trait Memory {
    /// Maps `frames` one after the other into one window; fails if any frame can't be mapped.
    fn map(&self, frames: &[Frame]) -> Result<Box<dyn Window>, Error>;
}

/// Guest memory that can be written.
pub trait MemoryMut: Memory {
    /// Maps `frames` for writing.
    fn map_mut(&self, frames: &[Frame]) -> Result<Box<dyn WindowMut>, Error>;

    /// Says that `frames` were written, so that whoever moves the guest as it runs copies them again.
    /// Nobody moves memory that is no guest's.
    fn written(&self, frames: &[Frame]) -> Result<(), Error> {
        let _ = frames;
        Ok(())
    }
}

/// How a guest runs on Xen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum GuestType {
    /// Paravirtual: page tables hold machine frames and belong to Xen's validation.
    Pv,
    /// Hardware-assisted without firmware or device model.
    Pvh,
    /// Hardware-assisted with firmware and device model.
    Hvm,
}

impl std::fmt::Display for GuestType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            GuestType::Pv => "pv",
            GuestType::Pvh => "pvh",
            GuestType::Hvm => "hvm",
        })
    }
}

/// What is needed of one virtual CPU's registers.
#[derive(Clone, Debug, Default)]
pub struct Vcpu {
    /// Xen's number of it.
    pub id: u32,
    /// It is up: its context means something.
    pub online: bool,
    /// Instruction pointer.
    pub rip: Gva,
    /// Stack pointer.
    pub rsp: Gva,
    /// Frame pointer, and the other registers on which the kernel's unwinder may base a frame.
    pub rbp: u64,
    /// RAX.
    pub rax: u64,
    /// RDX.
    pub rdx: u64,
    /// RDI.
    pub rdi: u64,
    /// R10.
    pub r10: u64,
    /// R13.
    pub r13: u64,
    /// It runs in user mode.
    pub user: bool,
    /// It is in 64-bit mode with paging on.
    pub long_mode: bool,
    /// Page-table root in use, control bits stripped.
    pub root: Frame,
    /// `CR4.LA57`: five levels of page tables.
    pub la57: bool,
    /// GS base in use now.
    pub gs_base: Gva,
    /// The other GS base (`swapgs` exchanges the two).
    pub gs_other: Gva,
    /// An address in kernel text that the kernel told Xen or the CPU: the PV event callback, or
    /// `MSR_LSTAR`. `None` when the kernel has not set it yet, or a core doesn't tell.
    pub entry: Option<Gva>,
}

/// A guest that runs and can be looked at.
pub trait Live {
    /// Its memory, to be read only.
    fn memory(&self) -> &dyn Memory;
    /// How it runs.
    fn kind(&self) -> GuestType;
    /// Registers of all its virtual CPUs.
    ///
    /// # Errors
    /// The back end can't tell.
    fn vcpus(&self) -> Result<Vec<Vcpu>, Error>;
}

/// A guest whose kernel can be given pages.
pub trait PagesMut: MemoryMut {
    /// Sets entry number `slot` of the last-level page table in frame `table`.
    ///
    /// # Errors
    /// The back end refuses the entry, or can't reach the table.
    fn write_entry(&self, table: Frame, slot: usize, entry: u64) -> Result<(), Error>;
    /// Says for each of these guest frames whether it has no memory behind it.
    ///
    /// # Errors
    /// The back end can't tell.
    fn vacant(&self, frames: &[Gfn]) -> Result<Vec<bool>, Error>;
    /// Puts fresh pages at vacant guest frames.
    ///
    /// # Errors
    /// There is no memory for them, or the back end refuses.
    fn populate(&self, frames: &[Gfn]) -> Result<(), Error>;
}
