//! Guest memory and guest state behind small traits.
//!
//! A back end that can only read (a saved core) implements only the reading traits, so "writing to
//! a core" does not compile. Guest memory is never a `&[u8]`: bytes are copied in and out.

pub mod budget;
pub mod core;
pub mod fetch;
#[cfg(any(test, feature = "testing"))]
pub mod mock;
pub mod space;

use crate::addr::{Frame, Gva};
use crate::guard::Spot;
use crate::journal::Change;
use crate::kernel::cache::Cache;

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
    /// A call into Xen.
    #[error(transparent)]
    Xen(#[from] crate::xen::Error),
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
    pub rip: u64,
    /// Stack pointer.
    pub rsp: u64,
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
    /// Page-table root in use, as a frame, low control bits stripped.
    pub root: u64,
    /// `CR4.LA57`: five levels of page tables.
    pub la57: bool,
    /// GS base in use now.
    pub gs_base: u64,
    /// The other GS base (`swapgs` exchanges the two).
    pub gs_other: u64,
    /// An address in kernel text that the kernel told Xen or the CPU: the PV event callback, or
    /// `MSR_LSTAR`. Zero when the kernel has not set it yet.
    pub entry: u64,
}

/// A guest that runs and can be changed. Every call into Xen that changes anything passes here.
pub trait Machine: MemoryMut {
    /// Its memory, to be read only.
    fn memory(&self) -> &dyn Memory;
    /// How it runs.
    fn kind(&self) -> GuestType;
    /// Where what is read of its kernel may be kept.
    fn cache(&self) -> &Cache;
    /// Registers of all its virtual CPUs.
    fn vcpus(&self) -> Result<Vec<Vcpu>, Error>;
    /// Notes, durably, what is about to be done.
    fn begin(&self, change: &Change) -> crate::error::Result<()>;
    /// Notes that it is known how that ended.
    fn ended(&self);
    /// Prepares for pauses, in which nothing but `spots` will be changed: should this process die in one,
    /// the guest runs again, with all of them changed or none.
    fn guard(&self, spots: &[Spot]) -> crate::error::Result<Box<dyn Guard + '_>>;
    /// Sets entry number `slot` of the last-level page table in frame `table`.
    fn write_entry(&self, table: Frame, slot: usize, entry: u64) -> Result<(), Error>;
    /// Which of these guest frames have no memory behind them.
    fn vacant(&self, frames: &[Frame]) -> Result<Vec<bool>, Error>;
    /// Puts fresh pages at vacant guest frames.
    fn populate(&self, frames: &[Frame]) -> Result<(), Error>;
}

/// The way to pause a guest, guarded while this value lives.
pub trait Guard {
    /// Comes before what is done in preparation of a pause: waits until whatever watches over this process will not
    /// do so within the next moments.
    fn settle(&self) {}
    /// Registers of all virtual CPUs, read as in a pause but while the guest runs: what is done there is done
    /// here before.
    fn vcpus(&self) -> Result<Vec<Vcpu>, Error>;
    /// Pauses it; the guest runs again when the value is dropped.
    fn pause(&self) -> Result<Box<dyn Paused + '_>, Error>;
}

/// A paused guest; unpauses when dropped.
pub trait Paused {
    /// Registers of all virtual CPUs.
    fn vcpus(&self) -> Result<Vec<Vcpu>, Error>;
    /// Says that from now on the guest's memory is changed, which held until now what was to be replaced.
    /// False, and it may not be, if the guest has shut down: whoever saves it or moves it copies it now.
    fn writing(&self) -> Result<bool, Error>;
    /// Time since the pause was asked for.
    fn elapsed(&self) -> std::time::Duration;
    /// Unpauses, and says how long the guest was paused. Whoever moves the guest as it runs knows then what was
    /// written in the pause.
    fn end(self: Box<Self>) -> Result<std::time::Duration, Error>;
}
