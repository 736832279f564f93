//! Page-table walks: from a guest virtual address to an entry, to a frame, or to many frames.

use super::{Space, PTE_FRAME, PTE_LARGE, PTE_NX, PTE_PRESENT, PTE_WRITE};
use crate::addr::{Frame, Gva, PAGE_LEN, PAGE_SIZE};
use crate::budget;
use crate::Error;

/// Entries of a page table.
pub(super) const ENTRIES: usize = PAGE_LEN / 8;

/// The end of a walk: the entry that maps an address.
#[derive(Clone, Copy, Debug)]
pub struct Leaf {
    /// The 4 KiB frame that holds the address, also within a large page.
    pub frame: Frame,
    /// The last page-table entry of the walk, as the guest wrote it.
    pub entry: u64,
    /// True if the entries of all levels allow writing.
    pub writable: bool,
    /// True if no entry of any level forbids execution.
    pub executable: bool,
    /// Size of the page, in bytes: 4 KiB, 2 MiB or 1 GiB.
    pub size: u64,
}

/// Number of the entry for `at` in a table of `level` (1 = last).
pub(super) fn slot(at: Gva, level: u8) -> usize {
    #[allow(clippy::cast_possible_truncation)] // below 512
    let slot = ((at.0 >> (12 + 9 * (u32::from(level) - 1))) & 511) as usize;
    slot
}

/// Bytes that one entry of a table of `level` maps.
pub(super) fn span(level: u8) -> u64 {
    PAGE_SIZE << (9 * (u32::from(level) - 1))
}

/// The frame of a small page or of the next table, as `entry` names it.
pub(super) fn frame_in(entry: u64) -> Frame {
    Frame((entry & PTE_FRAME) >> 12)
}

/// True if a present `entry` of a table of `level` maps a page, not a further table.
pub(super) fn is_leaf(entry: u64, level: u8) -> bool {
    level == 1 || (level <= 3 && entry & PTE_LARGE != 0)
}

/// The 4 KiB frame that holds `at`, where `entry` of a table of `level` maps it.
pub(super) fn frame_of_leaf(entry: u64, level: u8, at: Gva) -> Frame {
    let within = span(level) - 1;
    let base = entry & PTE_FRAME & !within;
    Frame((base + (at.0 & within)) >> 12)
}

/// The page-table entries in `bytes`, which are a table or a part of one.
pub(super) fn entries(bytes: &[u8]) -> impl Iterator<Item = u64> + Clone + '_ {
    let (words, _) = bytes.as_chunks::<8>();
    words.iter().map(|word| u64::from_le_bytes(*word))
}

impl Space<'_> {
    /// Entry number `slot` of the page table in `frame`.
    fn entry(&self, frame: Frame, slot: usize) -> Result<u64, Error> {
        let mut entry = [0; 8];
        self.window(frame)?.read(8 * slot, &mut entry)?;
        self.budget.count_copied(entry.len());
        Ok(u64::from_le_bytes(entry))
    }

    /// Follows the page tables for `at` down to level `stop` (1 = the last one). Returns the frame of
    /// the table of that level, the number of the entry in it, and the entry, present or not.
    ///
    /// # Errors
    /// [`Error::NotMapped`] if an entry above that level is not present or maps a large page, or the
    /// page tables can't be read.
    pub fn entry_slot(&self, at: Gva, stop: u8) -> Result<(Frame, usize, u64), Error> {
        self.budget.spend(budget::WALK)?;
        let mut frame = self.root;
        let mut level = self.levels;
        loop {
            let slot = slot(at, level);
            let entry = self.entry(frame, slot)?;
            if level == stop {
                return Ok((frame, slot, entry));
            }
            if entry & PTE_PRESENT == 0 || entry & PTE_LARGE != 0 {
                return Err(Error::NotMapped { at, level });
            }
            frame = frame_in(entry);
            level -= 1;
        }
    }

    /// Walks the page tables for `at`.
    ///
    /// # Errors
    /// [`Error::NotMapped`], or the page tables can't be read.
    pub fn walk(&self, at: Gva) -> Result<Leaf, Error> {
        let mut frame = self.root;
        let mut level = self.levels;
        let (mut writable, mut executable) = (true, true);
        self.budget.spend(budget::WALK)?;
        loop {
            let entry = self.entry(frame, slot(at, level))?;
            if entry & PTE_PRESENT == 0 {
                return Err(Error::NotMapped { at, level });
            }
            writable &= entry & PTE_WRITE != 0;
            executable &= entry & PTE_NX == 0;
            if is_leaf(entry, level) {
                return Ok(Leaf {
                    frame: frame_of_leaf(entry, level, at),
                    entry,
                    writable,
                    executable,
                    size: span(level),
                });
            }
            frame = frame_in(entry);
            level -= 1;
        }
    }

    /// The frames behind the pages of `len` bytes from `at` on, in the order of their addresses.
    ///
    /// # Errors
    /// [`Error::NotMapped`] for the first page that is not mapped, or the page tables can't be read.
    pub fn frames(&self, at: Gva, len: u64) -> Result<Vec<Frame>, Error> {
        let mut frames = Vec::new();
        let mut page = at.page();
        let end = at.0.checked_add(len).ok_or(Error::NotMapped {
            at,
            level: self.levels,
        })?;
        // Pages that are left. An address may be the last of all, so they are counted.
        let mut left = end.saturating_sub(page.0).div_ceil(PAGE_SIZE);
        while left > 0 {
            if let Ok((table, first, _)) = self.entry_slot(page, 1) {
                // Small pages: one table has the entries of the next ones too.
                let behind = ENTRIES - first;
                let count = usize::try_from(left).map_or(behind, |left| left.min(behind));
                left -= count as u64;
                let mut bytes = vec![0; 8 * count];
                self.window(table)?.read(8 * first, &mut bytes)?;
                self.budget.count_copied(bytes.len());
                self.budget.spend(budget::WALK * count as u64)?;
                for entry in entries(&bytes) {
                    if entry & PTE_PRESENT == 0 {
                        return Err(Error::NotMapped { at: page, level: 1 });
                    }
                    frames.push(frame_in(entry));
                    page = page.plus(PAGE_SIZE);
                }
                continue;
            }
            let leaf = self.walk(page)?;
            // The frames of a large page are consecutive. They cost what those of small pages do: they are kept as those are.
            let count = (leaf.size - (page.0 & (leaf.size - 1))) / PAGE_SIZE;
            let count = count.min(left);
            self.budget.spend(budget::WALK * count)?;
            frames.extend((leaf.frame.0..).map(Frame).zip(0..count).map(|(f, _)| f));
            page = page.plus(count * PAGE_SIZE);
            left -= count;
        }
        Ok(frames)
    }
}
