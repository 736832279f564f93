//! The page-table entries of a walk, to be compared later.
//!
//! A page that is to be written is mapped before the guest is paused. Until the pause the guest may map
//! the address elsewhere and use the page for something else. So the entries that led to the page are
//! compared again during the pause.

use std::collections::{btree_map, BTreeMap};

use super::walk::{frame_of_leaf, is_leaf};
use super::{Pin, Space, PTE_FRAME, PTE_LARGE, PTE_PRESENT};
use crate::addr::{Frame, Gva, PAGE_SIZE};
use crate::Error;

/// The bits of an entry that say where it leads. The others are rights, and flags that the processor
/// and Linux change at any time.
const PTE_LEADS: u64 = PTE_PRESENT | PTE_LARGE | PTE_FRAME;

/// Page-table entries that walks have followed, each mapped, so that a change can be seen later.
#[derive(Default)]
pub struct Trail {
    /// By frame of the table and number of the entry: its place, and the bits of it that lead on.
    entries: BTreeMap<(Frame, usize), (Pin, u64)>,
}

impl std::fmt::Debug for Trail {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let entries = self.entries.iter().map(|(at, (_, leads))| (at, leads));
        f.debug_map().entries(entries).finish()
    }
}

impl Trail {
    /// True if all entries still lead to the same frames. Makes no call, maps nothing, and allocates no
    /// memory, so it is fit for the pause.
    ///
    /// # Errors
    /// The back end can't read a page that is mapped.
    pub fn holds(&self) -> Result<bool, Error> {
        for (pin, leads) in self.entries.values() {
            if pin.u64()? & PTE_LEADS != *leads {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

impl Space<'_> {
    /// The frames behind the pages of `len` bytes from `at` on, as [`Space::frames`], for a few pages.
    /// Adds the entries that led to them to `trail`.
    ///
    /// # Errors
    /// [`Error::NotMapped`] for the first page that is not mapped, or the page tables can't be read.
    pub fn trace(&self, at: Gva, len: u64, trail: &mut Trail) -> Result<Vec<Frame>, Error> {
        let mut frames = Vec::new();
        let last = at.plus(len.saturating_sub(1)).page();
        let mut page = at.page();
        loop {
            frames.push(self.follow(page, trail)?);
            if page == last {
                return Ok(frames);
            }
            page = page.plus(PAGE_SIZE);
        }
    }

    /// The frame of `at`; adds the entries that led there to `trail`.
    fn follow(&self, at: Gva, trail: &mut Trail) -> Result<Frame, Error> {
        let mut level = self.levels;
        loop {
            let (table, slot, entry) = self.entry_slot(at, level)?;
            if entry & PTE_PRESENT == 0 {
                return Err(Error::NotMapped { at, level });
            }
            if let btree_map::Entry::Vacant(free) = trail.entries.entry((table, slot)) {
                let window = self.window(table)?;
                let offset = 8 * slot;
                free.insert((Pin { window, offset }, entry & PTE_LEADS));
            }
            if is_leaf(entry, level) {
                return Ok(frame_of_leaf(entry, level, at));
            }
            level -= 1;
        }
    }
}
