//! A guest's virtual address space: page-table walks, and reads by guest virtual address.
//!
//! | file | subject |
//! |---|---|
//! | `mod.rs` | [`Space`]: how one is made, and reads of bytes, words and strings; [`if_mapped`] |
//! | `walk.rs` | one page-table walk: from an address to an entry, a [`Leaf`], or frames |
//! | `regions.rs` | all mapped ranges and their rights ([`Region`]) |
//! | `windows.rs` | mapped pages that are remembered, and places that stay mapped ([`Pin`]) |
//! | `trail.rs` | the entries of a walk, to be compared later ([`Trail`]) |
//!
//! Windows onto pages, page tables among them, stay mapped. So a walk over many small objects costs
//! one foreign mapping per page. All of it is paid from a [`Budget`]. Memory that the guest may remap
//! while we read it (vmalloc space: thread stacks, modules) needs a fresh `Space`, see
//! [`Space::fresh`].
//!
//! Layout of page-table entries: Intel SDM volume 3, chapter 4.5 ("4-level paging and 5-level paging").

mod regions;
#[cfg(test)]
mod tests;
mod trail;
mod walk;
mod windows;

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;

pub use regions::Region;
pub use trail::Trail;
pub use walk::Leaf;
use windows::KeyedHashes;
pub use windows::Pin;

use crate::addr::{Frame, Gva, PAGE_LEN};
use crate::budget::{self, Budget};
use crate::{Error, Memory, Window};

/// Bit 0 (`P`): the entry is present.
pub const PTE_PRESENT: u64 = 1;
/// Bit 1 (`R/W`): the entry allows writing.
pub const PTE_WRITE: u64 = 1 << 1;
/// Bit 2 (`U/S`): the entry allows access in user mode.
pub const PTE_USER: u64 = 1 << 2;
/// Bit 5 (`A`): the processor has used the entry.
pub const PTE_ACCESSED: u64 = 1 << 5;
/// Bit 6 (`D`): the processor has written through the entry.
pub const PTE_DIRTY: u64 = 1 << 6;
/// Bit 7 (`PS`), in levels 2 and 3: the entry maps a large page (2 MiB or 1 GiB).
pub const PTE_LARGE: u64 = 1 << 7;
/// Bit 63 (`XD`): the entry forbids instruction fetches.
pub const PTE_NX: u64 = 1 << 63;
/// Bits 12 to 51: the physical address of the frame or of the next table, in bytes.
pub const PTE_FRAME: u64 = 0x000f_ffff_ffff_f000;

/// Most pages that one call maps when a long range is read.
pub const BATCH: usize = 512;
/// Reads of at most this many bytes don't use the spare buffer.
const SPARE_MIN: usize = 1 << 20;
/// Longest read in one piece, in bytes.
const READ_MAX: usize = 64 << 20;

/// What was read, or `None` if the guest's page tables map nothing there. A spent budget, or a page that could not be mapped
/// into this process, says nothing about the guest.
///
/// # Errors
/// It can't be read for another reason.
pub fn if_mapped<T>(read: Result<T, Error>) -> Result<Option<T>, Error> {
    match read {
        Ok(found) => Ok(Some(found)),
        Err(Error::NotMapped { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The address space below one page-table root.
pub struct Space<'m> {
    mem: &'m dyn Memory,
    root: Frame,
    levels: u8,
    budget: Budget,
    /// Pages are mapped together with their neighbours, and `pages` remembers them.
    blocks: bool,
    /// Windows by the address of their page; filled only with `blocks`.
    pages: RefCell<HashMap<Gva, Rc<dyn Window>, KeyedHashes>>,
    /// Windows by frame.
    windows: RefCell<HashMap<Frame, Rc<dyn Window>, KeyedHashes>>,
    /// A buffer of this process that an earlier read has used.
    spare: Rc<Cell<Vec<u8>>>,
}

impl std::fmt::Debug for Space<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Space")
            .field("root", &self.root)
            .field("levels", &self.levels)
            .finish()
    }
}

impl<'m> Space<'m> {
    /// The address space below the page-table root `root`, with a budget of its own. `levels` is the
    /// number of page-table levels, 4 or 5 (`CR4.LA57`).
    #[must_use]
    pub fn new(mem: &'m dyn Memory, root: Frame, levels: u8) -> Self {
        Space::within(mem, root, levels, Budget::default())
    }

    /// As [`Space::new`], but paid from `budget`.
    #[must_use]
    pub fn within(mem: &'m dyn Memory, root: Frame, levels: u8, budget: Budget) -> Self {
        Space {
            mem,
            root,
            levels,
            budget,
            blocks: false,
            pages: RefCell::default(),
            windows: RefCell::default(),
            spare: Rc::default(),
        }
    }

    /// The space below another root of the same guest, with the same budget and windows.
    #[must_use]
    pub fn with_root(&self, root: Frame) -> Space<'m> {
        Space {
            windows: self.windows.clone(),
            spare: Rc::clone(&self.spare),
            ..Space::within(self.mem, root, self.levels, self.budget.clone())
        }
    }

    /// The same space and budget, with no windows remembered: the next access reads the page tables
    /// as they are then.
    #[must_use]
    pub fn fresh(&self) -> Space<'m> {
        Space::within(self.mem, self.root, self.levels, self.budget.clone())
    }

    /// As [`Space::fresh`], with a budget of its own.
    #[must_use]
    pub fn fresh_within(&self, budget: Budget) -> Space<'m> {
        Space::within(self.mem, self.root, self.levels, budget)
    }

    /// As [`Space::fresh`], for many small objects that lie side by side. One call maps each page
    /// together with its neighbours, and the space remembers which address led to which page. So it
    /// must not be used for memory that the guest may remap.
    #[must_use]
    pub fn fresh_in_blocks(&self) -> Space<'m> {
        Space {
            blocks: true,
            ..self.fresh()
        }
    }

    /// Number of page-table levels: 4 or 5.
    #[must_use]
    pub fn levels(&self) -> u8 {
        self.levels
    }

    /// The guest memory below this space. What is mapped through it directly is not paid from the
    /// budget.
    #[must_use]
    pub fn memory(&self) -> &'m dyn Memory {
        self.mem
    }

    /// The budget from which all reads are paid.
    #[must_use]
    pub fn budget(&self) -> &Budget {
        &self.budget
    }

    /// Maps `frames` one after the other into one window, paid from the budget.
    ///
    /// # Errors
    /// A frame can't be mapped, or [`Error::Exhausted`].
    pub fn map(&self, frames: &[Frame]) -> Result<Box<dyn Window>, Error> {
        self.budget
            .spend(budget::MAP + budget::PAGE * frames.len() as u64)?;
        self.mem.map(frames)
    }

    /// Fills `buf` with the bytes from `at` on.
    ///
    /// # Errors
    /// A byte is not mapped or can't be read, or [`Error::Exhausted`]; `buf` is then partly filled.
    pub fn read(&self, at: Gva, buf: &mut [u8]) -> Result<(), Error> {
        if buf.len() > 4 * PAGE_LEN {
            return self.read_long(at, buf);
        }
        let mut at = at;
        let mut rest = buf;
        while !rest.is_empty() {
            let n = rest.len().min(PAGE_LEN - at.offset());
            let (now, later) = rest.split_at_mut(n);
            self.page(at)?.read(at.offset(), now)?;
            self.budget.count_copied(n);
            rest = later;
            at = at.plus(n as u64);
        }
        Ok(())
    }

    fn read_long(&self, at: Gva, buf: &mut [u8]) -> Result<(), Error> {
        let mut at = at;
        let mut rest = buf;
        while !rest.is_empty() {
            let n = rest.len().min(BATCH * PAGE_LEN - at.offset());
            let (now, later) = rest.split_at_mut(n);
            let frames = self.frames(at, n as u64)?;
            self.map(&frames)?.read(at.offset(), now)?;
            self.budget.count_copied(n);
            rest = later;
            at = at.plus(n as u64);
        }
        Ok(())
    }

    /// The little-endian 64-bit word at `at`.
    ///
    /// # Errors
    /// As [`Space::read`].
    pub fn read_u64(&self, at: Gva) -> Result<u64, Error> {
        let mut b = [0; 8];
        self.read(at, &mut b)?;
        Ok(u64::from_le_bytes(b))
    }

    /// The little-endian 32-bit word at `at`.
    ///
    /// # Errors
    /// As [`Space::read`].
    pub fn read_u32(&self, at: Gva) -> Result<u32, Error> {
        let mut b = [0; 4];
        self.read(at, &mut b)?;
        Ok(u32::from_le_bytes(b))
    }

    /// The `len` bytes from `at` on.
    ///
    /// # Errors
    /// As [`Space::read`]; [`Error::Odd`] if `len` is more than 64 MiB.
    pub fn read_vec(&self, at: Gva, len: usize) -> Result<Vec<u8>, Error> {
        if len > READ_MAX {
            return Err(Error::Odd(format!(
                "the guest's tables ask for a read of {len} bytes at {at}; at most {READ_MAX} are read"
            )));
        }
        let mut v = if len > SPARE_MIN {
            self.spare.take()
        } else {
            Vec::new()
        };
        v.resize(len, 0);
        self.read(at, &mut v)?;
        Ok(v)
    }

    /// Hands back a buffer, for the next long [`Space::read_vec`]. To touch memory that is new to this
    /// process can take as long as to copy a page of the guest.
    pub fn recycle(&self, bytes: Vec<u8>) {
        self.spare.set(bytes);
    }

    /// The NUL-terminated string of at most `max` bytes at `at`. Bytes that are not UTF-8 are
    /// replaced.
    ///
    /// # Errors
    /// As [`Space::read`]; [`Error::Odd`] if there is no NUL within `max` bytes.
    pub fn read_cstr(&self, at: Gva, max: usize) -> Result<String, Error> {
        let mut bytes = Vec::new();
        let mut at = at;
        while bytes.len() < max {
            let n = (PAGE_LEN - at.offset()).min(64).min(max - bytes.len());
            let mut part = vec![0; n];
            self.read(at, &mut part)?;
            if let Some(end) = part.iter().position(|&b| b == 0) {
                part.truncate(end);
                bytes.extend(part);
                return Ok(String::from_utf8_lossy(&bytes).into_owned());
            }
            bytes.extend(part);
            at = at.plus(n as u64);
        }
        Err(Error::Odd(format!(
            "no end of string within {max} bytes before {at}"
        )))
    }
}
