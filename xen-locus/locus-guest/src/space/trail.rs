//! Page-table entries that were followed, to be looked at again.
//!
//! A page that is to be written is mapped before the guest is paused. Until then the guest may lead the
//! address elsewhere and have another use for the page: so what led there is compared in the pause.

use std::collections::{btree_map, BTreeMap};

use super::{Error, Pin, Space, PTE_FRAME, PTE_LARGE, PTE_PRESENT};
use crate::addr::{Frame, Gva, PAGE_SIZE};

/// What of an entry says where it leads; its other bits are rights, and what the processor and Linux
/// note in it.
const PTE_LEADS: u64 = PTE_PRESENT | PTE_LARGE | PTE_FRAME;

/// Page-table entries that were followed, to be looked at again: a guest may change them at any time.
#[derive(Default)]
pub struct Trail {
    /// By table and slot: where the entry stands, and what of it leads on.
    entries: BTreeMap<(Frame, usize), (Pin, u64)>,
}

impl std::fmt::Debug for Trail {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let entries = self.entries.iter().map(|(at, (_, leads))| (at, leads));
        f.debug_map().entries(entries).finish()
    }
}

impl Trail {
    /// Whether all entries still lead where they led: no call, no mapping, and no memory is taken.
    ///
    /// # Errors
    /// None is to be expected: what is looked at is mapped.
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
    /// Frames behind the pages of `len` bytes at `at`, of which there are few, and adds to `trail` the
    /// entries that led there.
    ///
    /// # Errors
    /// Any page not mapped.
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
            if level == 1 || (level <= 3 && entry & PTE_LARGE != 0) {
                let size = PAGE_SIZE << (9 * (u32::from(level) - 1));
                let base = entry & PTE_FRAME & !(size - 1);
                return Ok(Frame((base + (at.0 & (size - 1))) >> 12));
            }
            level -= 1;
        }
    }
}
