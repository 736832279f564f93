//! Memory and registers of a Xen guest behind small traits: of a live guest, a saved core, or a mock.
//!
//! One trait for each ability. A back end that can only read (a saved core) implements only the reading
//! traits, so that "write to a core" does not compile. Guest memory is never a `&[u8]`: bytes are copied
//! in and out. Live guests are in the crate `locus-xen`.
//!
//! ```no_run
//! use std::path::Path;
//!
//! use locus_guest::addr::{Frame, Gva};
//! use locus_guest::core::Core;
//! use locus_guest::space::Space;
//! use locus_guest::Error;
//!
//! /// The 64-bit word at `at` in a saved guest whose page tables begin at `root`.
//! fn word_of_core(path: &Path, root: Frame, at: Gva) -> Result<u64, Error> {
//!     let core = Core::open(path)?;
//!     // Four levels of page tables. All reads together may cost one budget.
//!     let space = Space::new(&core, root, 4);
//!     space.read_u64(at)
//! }
//! ```
//!
//! Files, in the order of the data:
//!
//! | file | subject |
//! |---|---|
//! | `addr.rs` | kinds of addresses and frame numbers, as types |
//! | `lib.rs` | [`Memory`] (frames are mapped) and [`Window`] (bytes are copied), [`Vcpu`], [`Live`], [`PagesMut`], [`Error`] |
//! | `core/` | a back end: the file that `xl dump-core` writes |
//! | `mock.rs` | a back end for tests: frames in this process (feature `testing`) |
//! | `budget.rs` | what reading one guest may cost |
//! | `space/` | reads by guest virtual address, through the guest's page tables |
//! | `fetch.rs` | little-endian fields of the bytes that were read |
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

/// Why guest memory or guest state can't be read or changed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// The guest's page tables map nothing at that address.
    #[error("guest address {at} is not mapped (page table level {level})")]
    NotMapped {
        /// The address asked for.
        at: Gva,
        /// Level of the table whose entry is not present (1 = last).
        level: u8,
    },
    /// A frame could not be mapped.
    #[error("{frame} of the guest cannot be mapped: {why}")]
    Frame {
        /// The frame.
        frame: Frame,
        /// The reason, as the back end says it.
        why: String,
    },
    /// A frame could not be mapped to be read, because the guest has no memory there.
    #[error("{frame} of the guest cannot be mapped: it has no memory")]
    NoMemory {
        /// The frame.
        frame: Frame,
    },
    /// An access that leaves its window.
    #[error("access of {len} bytes at offset {offset} leaves a window of {size} bytes")]
    Bounds {
        /// Where the access begins, in bytes from the start of the window.
        offset: usize,
        /// Length of the access, in bytes.
        len: usize,
        /// Size of the window, in bytes.
        size: usize,
    },
    /// Data of the guest or of a core is not as it must be. The message says what was expected and what
    /// was found.
    #[error("{0}")]
    Odd(String),
    /// To read the guest costs more than is spent on a guest of its memory ([`budget`]).
    #[error(
        "reading the guest was given up, because it costs more than is spent on a guest: it has too many threads \
         (more than 40,000, and more than one for each 28 KiB of its memory, or more than 131,072), or its \
         tables or lists lead in circles, or lie"
    )]
    Exhausted,
    /// The back end can't do this for this guest. The message says what and why.
    #[error("{0}")]
    Unsupported(String),
    /// A call of the back end failed. This is its own error.
    #[error(transparent)]
    Backend(Arc<dyn std::error::Error + Send + Sync>),
}

/// Frames of guest memory that stay mapped while this value lives.
pub trait Window {
    /// Fills `buf` with the guest's bytes from `offset` on, in bytes from the start of the window. The
    /// guest may change them at the same time.
    ///
    /// # Errors
    /// [`Error::Bounds`] if they do not all lie in the window; or the back end can't read them.
    fn read(&self, offset: usize, buf: &mut [u8]) -> Result<(), Error>;
}

/// A window that can be written.
pub trait WindowMut: Window {
    /// Copies `bytes` into the guest from `offset` on, in bytes from the start of the window.
    ///
    /// # Errors
    /// [`Error::Bounds`] if they do not all fit into the window; or the back end can't write them.
    fn write(&self, offset: usize, bytes: &[u8]) -> Result<(), Error>;
}

/// Guest memory that can be read.
pub trait Memory {
    /// Maps `frames`, which need not be consecutive, one after the other into one window.
    ///
    /// # Errors
    /// [`Error::Frame`] if one of them can't be mapped; then none is. A live PVH or HVM guest's back end tells a frame
    /// without memory from it: [`Error::NoMemory`].
    fn map(&self, frames: &[Frame]) -> Result<Box<dyn Window>, Error>;

    /// As [`Memory::map`], but for pages of which not all may be there, and that are only likely to be needed. Says for
    /// each whether it is mapped; a page of the window that is not must not be read.
    ///
    /// # Errors
    /// No page can be mapped so. Each that is needed can be mapped alone.
    fn map_some(&self, frames: &[Frame]) -> Result<(Box<dyn Window>, Vec<bool>), Error> {
        Ok((self.map(frames)?, vec![true; frames.len()]))
    }
}

/// Guest memory that can be written.
pub trait MemoryMut: Memory {
    /// As [`Memory::map`], for writing.
    ///
    /// # Errors
    /// As [`Memory::map`].
    fn map_mut(&self, frames: &[Frame]) -> Result<Box<dyn WindowMut>, Error>;

    /// Tells the back end that `frames` were written, so that a live migration copies them again. Does
    /// nothing for memory that is never migrated.
    ///
    /// # Errors
    /// The back end can't pass it on.
    fn written(&self, frames: &[Frame]) -> Result<(), Error> {
        let _ = frames;
        Ok(())
    }
}

/// The type of a guest, as Xen names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum GuestType {
    /// Paravirtual. Page tables hold machine frames (MFN), and Xen checks every change of them.
    Pv,
    /// Hardware virtualisation without firmware or device model. Page tables hold guest frames (GFN).
    Pvh,
    /// Hardware virtualisation with firmware and device model. Page tables hold guest frames (GFN).
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

/// A guest that runs and can be read.
pub trait Live {
    /// The guest's memory, for reading.
    fn memory(&self) -> &dyn Memory;
    /// The guest's type.
    fn kind(&self) -> GuestType;
    /// The registers of all its vCPUs, by their number, as they are now.
    ///
    /// # Errors
    /// The back end can't read them.
    fn vcpus(&self) -> Result<Vec<Vcpu>, Error>;
    /// What reading it may cost.
    fn budget(&self) -> budget::Budget {
        budget::Budget::default()
    }
}

/// A guest whose kernel can be given pages.
pub trait PagesMut: MemoryMut {
    /// Sets entry number `slot` of the last-level page table in frame `table`.
    ///
    /// # Errors
    /// The back end refuses the entry, or can't reach the table.
    fn write_entry(&self, table: Frame, slot: usize, entry: u64) -> Result<(), Error>;
    /// How many pages of memory it has.
    ///
    /// # Errors
    /// The back end can't tell.
    fn pages(&self) -> Result<u64, Error>;
    /// Whether some of its memory is populated when it is first used, or by a mapping.
    ///
    /// # Errors
    /// The back end can't tell.
    fn has_pages_on_demand(&self) -> Result<bool, Error>;
    /// How many pages of memory it may be given, beyond those that it has.
    ///
    /// # Errors
    /// The back end can't tell.
    fn spare(&self) -> Result<u64, Error>;
    /// Says for each of these guest frames whether it has no memory behind it.
    ///
    /// # Errors
    /// The back end can't tell of one of them. A frame that can't be looked at may well have memory.
    fn vacant(&self, frames: &[Gfn]) -> Result<Vec<bool>, Error>;
    /// Says for each of these frames whether none of the guest's own memory is there: there is none at all, or a PV guest
    /// maps another domain's.
    ///
    /// # Errors
    /// As [`PagesMut::vacant`].
    fn not_own(&self, frames: &[Frame]) -> Result<Vec<bool>, Error>;
    /// Puts fresh pages at vacant guest frames.
    ///
    /// # Errors
    /// There is no memory for them, they are more than [`PagesMut::spare`], or the back end refuses.
    fn populate(&self, frames: &[Gfn]) -> Result<(), Error>;
}
