//! A guest's kernel address space: page-table walk and reads by virtual address.
//!
//! Windows onto pages, page tables among them, stay mapped, so a walk over many small objects costs
//! one foreign mapping per page. All of it is paid from a [`Budget`]. What the guest may remap while
//! we look (vmalloc space: thread stacks, modules) wants a fresh `Space`, see [`Space::fresh`].
//! Layout of entries: Intel SDM volume 3, chapter 4.5 ("4-level paging and 5-level paging").

#[cfg(test)]
mod tests;
mod trail;

use std::cell::{Cell, RefCell};
use std::collections::hash_map::RandomState;
use std::collections::HashMap;
use std::hash::{BuildHasher, Hash, Hasher};
use std::rc::Rc;

use super::budget::{self, Budget};
use super::{fetch, Error, Memory, Window};
use crate::addr::{Frame, Gva, Range, PAGE_LEN, PAGE_SIZE};

pub use trail::Trail;

/// Entry is present.
pub const PTE_PRESENT: u64 = 1;
/// Entry allows writing.
pub const PTE_WRITE: u64 = 1 << 1;
/// Entry is for user mode too.
pub const PTE_USER: u64 = 1 << 2;
/// Accessed.
pub const PTE_ACCESSED: u64 = 1 << 5;
/// Dirty.
pub const PTE_DIRTY: u64 = 1 << 6;
/// In levels 2 and 3: maps a large page.
pub const PTE_LARGE: u64 = 1 << 7;
/// No instruction fetch.
pub const PTE_NX: u64 = 1 << 63;
/// The frame's address bits.
pub const PTE_FRAME: u64 = 0x000f_ffff_ffff_f000;

/// Pages mapped by one call when a long range is read.
pub const BATCH: usize = 512;
/// Pages mapped together where objects stand side by side: the slabs of `struct task_struct` have
/// eight, and many threads have slabs side by side. A call costs as much as fifty pages.
const BLOCK: usize = 32;
/// Windows kept before a store is emptied: bounds what a guest can make us hold. Each may be a mapping
/// of its own, of which Linux gives a process 65530 (`vm.max_map_count`), and there are two stores.
/// 8,000 threads have their `struct task_struct` on 21,000 pages.
const KEEP: usize = 24 << 10;
/// Shorter reads take memory of their own, in bytes.
const SPARE_MIN: usize = 1 << 20;
/// Longest read in one piece, in bytes.
const READ_MAX: usize = 64 << 20;
/// Entries of a page table.
const ENTRIES: usize = PAGE_LEN / 8;
/// Units of the budget for looking at all entries of a table.
const TABLE: u64 = 16;
/// Units of the budget for a region found: they are kept, so they must not be many.
const REGION: u64 = 64;

/// Where a virtual address leads.
#[derive(Clone, Copy, Debug)]
pub struct Leaf {
    /// The frame that holds the address.
    pub frame: Frame,
    /// The last entry of the walk.
    pub entry: u64,
    /// All levels allow writing.
    pub writable: bool,
    /// No level forbids execution.
    pub executable: bool,
    /// Size of the page, in bytes.
    pub size: u64,
}

/// A run of addresses mapped with equal rights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Where.
    pub range: Range,
    /// May be written.
    pub writable: bool,
    /// May be executed.
    pub executable: bool,
}

/// An address space below one page-table root.
pub struct Space<'m> {
    mem: &'m dyn Memory,
    root: Frame,
    levels: u8,
    budget: Budget,
    /// Pages are mapped with their neighbours, and remembered.
    blocks: bool,
    /// The pages that are.
    pages: RefCell<HashMap<Gva, Rc<dyn Window>, Keys>>,
    windows: RefCell<HashMap<Frame, Rc<dyn Window>, Keys>>,
    /// Memory of this process that was read into before.
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
    /// The address space of page-table root `root`, with 4 or 5 `levels` and a budget of its own.
    #[must_use]
    pub fn new(mem: &'m dyn Memory, root: Frame, levels: u8) -> Self {
        Space::within(mem, root, levels, Budget::default())
    }

    /// The address space of page-table root `root`, with 4 or 5 `levels`, paid from `budget`.
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

    /// The space below another root, with the same budget and windows.
    #[must_use]
    pub fn with_root(&self, root: Frame) -> Space<'m> {
        Space {
            windows: self.windows.clone(),
            spare: Rc::clone(&self.spare),
            ..Space::within(self.mem, root, self.levels, self.budget.clone())
        }
    }

    /// The same space and budget, with nothing remembered.
    #[must_use]
    pub fn fresh(&self) -> Space<'m> {
        Space::within(self.mem, self.root, self.levels, self.budget.clone())
    }

    /// The same as [`Space::fresh`], for many small objects that stand side by side: each page is
    /// mapped together with those around it, and where it is remembered: not for what the guest may remap.
    #[must_use]
    pub fn fresh_in_blocks(&self) -> Space<'m> {
        Space {
            blocks: true,
            ..self.fresh()
        }
    }

    /// Levels of its page tables: 4 or 5.
    #[must_use]
    pub fn levels(&self) -> u8 {
        self.levels
    }

    /// The memory below; what is mapped there directly is not paid.
    #[must_use]
    pub fn memory(&self) -> &'m dyn Memory {
        self.mem
    }

    /// What reading may still cost.
    #[must_use]
    pub fn budget(&self) -> &Budget {
        &self.budget
    }

    /// Maps frames, paid from the budget.
    ///
    /// # Errors
    /// A frame can't be mapped, or the budget is spent.
    pub fn map(&self, frames: &[Frame]) -> Result<Box<dyn Window>, Error> {
        self.budget
            .spend(budget::MAP + budget::PAGE * frames.len() as u64)?;
        self.mem.map(frames)
    }

    /// Entry number `slot` of the page table in `frame`.
    fn entry(&self, frame: Frame, slot: usize) -> Result<u64, Error> {
        let mut entry = [0; 8];
        self.window(frame)?.read(8 * slot, &mut entry)?;
        self.budget.note(entry.len());
        Ok(u64::from_le_bytes(entry))
    }

    /// Follows the page tables for `at` down to `stop` (1 = the last level) and says in which table
    /// frame and slot the entry of that level stands.
    ///
    /// # Errors
    /// Not mapped above that level, or mapped by a large page above it.
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
            frame = Frame((entry & PTE_FRAME) >> 12);
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
            let large = level > 1 && level <= 3 && entry & PTE_LARGE != 0;
            if level == 1 || large {
                let size = PAGE_SIZE << (9 * (level - 1));
                let base = entry & PTE_FRAME & !(size - 1);
                let frame = Frame((base + (at.0 & (size - 1))) >> 12);
                return Ok(Leaf {
                    frame,
                    entry,
                    writable,
                    executable,
                    size,
                });
            }
            frame = Frame((entry & PTE_FRAME) >> 12);
            level -= 1;
        }
    }

    /// Frames behind the pages of `len` bytes at `at`.
    ///
    /// # Errors
    /// Any page not mapped.
    pub fn frames(&self, at: Gva, len: u64) -> Result<Vec<Frame>, Error> {
        let mut frames = Vec::new();
        let mut page = at.page();
        let end = at.0.checked_add(len).ok_or(Error::NotMapped {
            at,
            level: self.levels,
        })?;
        while page.0 < end {
            let rest = usize::try_from((end - page.0).div_ceil(PAGE_SIZE)).unwrap_or(ENTRIES);
            if let Ok((table, first, _)) = self.entry_slot(page, 1) {
                // Of small pages, the table's entries follow each other.
                let count = (ENTRIES - first).min(rest);
                let mut entries = vec![0; 8 * count];
                self.window(table)?.read(8 * first, &mut entries)?;
                self.budget.note(entries.len());
                self.budget.spend(budget::WALK * count as u64)?;
                for i in 0..count {
                    let entry = fetch::u64(&entries, 8 * i).unwrap_or(0);
                    if entry & PTE_PRESENT == 0 {
                        return Err(Error::NotMapped { at: page, level: 1 });
                    }
                    frames.push(Frame((entry & PTE_FRAME) >> 12));
                    page = page.plus(PAGE_SIZE);
                }
                continue;
            }
            let leaf = self.walk(page)?;
            let mut next = leaf.frame.0;
            loop {
                frames.push(Frame(next));
                page = page.plus(PAGE_SIZE);
                // A large page's other frames follow the first.
                if page.0 >= end || page.0 & (leaf.size - 1) == 0 {
                    break;
                }
                next += 1;
            }
        }
        Ok(frames)
    }

    /// Fills `buf` from `at`.
    ///
    /// # Errors
    /// Any byte not mapped or not readable; `buf` is then partly filled.
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
            self.budget.note(n);
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
            self.budget.note(n);
            rest = later;
            at = at.plus(n as u64);
        }
        Ok(())
    }

    /// The mapped page of `at`, and the offset in it: for words that are read again and again.
    ///
    /// # Errors
    /// As [`Space::read`].
    pub fn pin(&self, at: Gva) -> Result<Pin, Error> {
        Ok(Pin {
            window: self.page(at)?,
            offset: at.offset(),
        })
    }

    /// A window onto the page of `at`.
    fn page(&self, at: Gva) -> Result<Rc<dyn Window>, Error> {
        if !self.blocks {
            return self.window(self.walk(at)?.frame);
        }
        if let Some(window) = self.pages.borrow().get(&at.page()) {
            self.budget.spend(budget::WALK)?;
            return Ok(Rc::clone(window));
        }
        let leaf = self.walk(at)?;
        if !self.windows.borrow().contains_key(&leaf.frame) {
            let slots = BLOCK as u64;
            let first = Gva(at.0 & !(slots * PAGE_SIZE - 1));
            let around = if leaf.size == PAGE_SIZE {
                let (table, slot, _) = self.entry_slot(first, 1)?;
                let mut entries = [0; 8 * BLOCK];
                self.window(table)?.read(8 * slot, &mut entries)?;
                self.budget.note(entries.len());
                let entries = (0..BLOCK).filter_map(|i| fetch::u64(&entries, 8 * i));
                let present = entries.filter(|e| e & PTE_PRESENT != 0);
                present.map(|e| Frame((e & PTE_FRAME) >> 12)).collect()
            } else {
                // A large page's frames follow each other.
                let lowest = leaf.frame.0 & !(slots - 1);
                (0..slots).map(|i| Frame(lowest + i)).collect()
            };
            self.map_together(around);
        }
        let window = self.window(leaf.frame)?;
        keep(&self.pages, at.page(), Rc::clone(&window));
        Ok(window)
    }

    fn window(&self, frame: Frame) -> Result<Rc<dyn Window>, Error> {
        if let Some(w) = self.windows.borrow().get(&frame) {
            return Ok(Rc::clone(w));
        }
        let window: Rc<dyn Window> = Rc::from(self.map(&[frame])?);
        keep(&self.windows, frame, Rc::clone(&window));
        Ok(window)
    }

    /// Reads a little-endian 64-bit word.
    ///
    /// # Errors
    /// As [`Space::read`].
    pub fn read_u64(&self, at: Gva) -> Result<u64, Error> {
        let mut b = [0; 8];
        self.read(at, &mut b)?;
        Ok(u64::from_le_bytes(b))
    }

    /// Reads a little-endian 32-bit word.
    ///
    /// # Errors
    /// As [`Space::read`].
    pub fn read_u32(&self, at: Gva) -> Result<u32, Error> {
        let mut b = [0; 4];
        self.read(at, &mut b)?;
        Ok(u32::from_le_bytes(b))
    }

    /// Reads `len` bytes.
    ///
    /// # Errors
    /// As [`Space::read`]; [`Error::Odd`] when they are more than 64 MiB.
    pub fn read_vec(&self, at: Gva, len: usize) -> Result<Vec<u8>, Error> {
        if len > READ_MAX {
            return Err(Error::Odd(format!(
                "the guest's tables want {len} bytes at {at} read; at most {READ_MAX} are"
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

    /// Gives back what was read into, for the next long [`Space::read_vec`]: to touch memory that is
    /// new to this process can take as long as to copy a page of the guest.
    pub fn recycle(&self, bytes: Vec<u8>) {
        self.spare.set(bytes);
    }

    /// Reads a NUL-terminated string of at most `max` bytes; bytes that are no UTF-8 are replaced.
    ///
    /// # Errors
    /// As [`Space::read`]; [`Error::Odd`] when no NUL comes within `max` bytes.
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

    /// Runs of mapped pages with equal rights in `range`. What lies below a table that can't be read
    /// counts as not mapped; so does all that is left when the budget is spent, and what lies farther
    /// from the start than the root maps.
    #[must_use]
    pub fn regions(&self, range: Range) -> Vec<Region> {
        let mut found = Vec::new();
        let rights = Region {
            range,
            writable: true,
            executable: true,
        };
        // All that can fail is the budget, and then the next access says so.
        let _ = self.regions_below(self.root, self.levels, rights, &mut found);
        found
    }

    /// Adds the regions of `above.range`, which one table of `level` maps, with at most the rights
    /// of `above`.
    fn regions_below(
        &self,
        table: Frame,
        level: u8,
        above: Region,
        found: &mut Vec<Region>,
    ) -> Result<(), Error> {
        self.budget.spend(TABLE)?;
        let mut entries = [0u8; PAGE_LEN];
        let read = self
            .window(table)
            .and_then(|window| window.read(0, &mut entries));
        if read.is_err() {
            return self.budget.check();
        }
        self.budget.note(PAGE_LEN);
        let span = PAGE_SIZE << (9 * (u32::from(level) - 1));
        let mut at = above.range.start;
        let is_leaf = |entry: u64| level == 1 || (level <= 3 && entry & PTE_LARGE != 0);
        let frame = |entry: u64| Frame((entry & PTE_FRAME) >> 12);
        let mut parts = Vec::new();
        for _ in 0..ENTRIES {
            if at >= above.range.end {
                break;
            }
            let last = Gva(at.0 | (span - 1));
            let end = last.0.checked_add(1).map_or(above.range.end, Gva);
            let entry = fetch::u64(&entries, 8 * slot(at, level)).unwrap_or(0);
            let here = Region {
                range: Range {
                    start: at,
                    end: end.min(above.range.end),
                },
                writable: above.writable && entry & PTE_WRITE != 0,
                executable: above.executable && entry & PTE_NX == 0,
            };
            at = end;
            if entry & PTE_PRESENT != 0 {
                parts.push((here, entry));
            }
        }
        let tables = parts.iter().filter(|(_, entry)| !is_leaf(*entry));
        self.map_together(tables.map(|&(_, entry)| frame(entry)).collect());
        for (here, entry) in parts {
            if is_leaf(entry) {
                self.add_region(here, found)?;
            } else {
                self.regions_below(frame(entry), level - 1, here, found)?;
            }
        }
        Ok(())
    }

    /// Maps frames by one call and keeps a window onto each: a call costs more than a page. Where
    /// that fails, each is mapped when it is wanted.
    fn map_together(&self, mut frames: Vec<Frame>) {
        frames.sort_unstable();
        frames.dedup();
        frames.retain(|frame| !self.windows.borrow().contains_key(frame));
        if frames.len() < 2 {
            return;
        }
        let Ok(whole) = self.map(&frames) else { return };
        let whole: Rc<dyn Window> = Rc::from(whole);
        for (i, frame) in frames.into_iter().enumerate() {
            let whole = Rc::clone(&whole);
            keep(&self.windows, frame, Rc::new(Part { whole, page: i }));
        }
    }

    fn add_region(&self, here: Region, found: &mut Vec<Region>) -> Result<(), Error> {
        if let Some(last) = found.last_mut() {
            let rights = |r: &Region| (r.writable, r.executable);
            if last.range.end == here.range.start && rights(last) == rights(&here) {
                last.range.end = here.range.end;
                return Ok(());
            }
        }
        self.budget.spend(REGION)?;
        found.push(here);
        Ok(())
    }
}

/// Keeps a window, in a store that is emptied when it holds many.
fn keep<K: Eq + Hash>(
    store: &RefCell<HashMap<K, Rc<dyn Window>, Keys>>,
    key: K,
    window: Rc<dyn Window>,
) {
    let mut windows = store.borrow_mut();
    if windows.len() >= KEEP {
        windows.clear();
    }
    windows.insert(key, window);
}

/// One page of a window onto several.
struct Part {
    whole: Rc<dyn Window>,
    page: usize,
}

impl Window for Part {
    fn read(&self, offset: usize, buf: &mut [u8]) -> Result<(), Error> {
        match offset.checked_add(buf.len()) {
            Some(end) if end <= PAGE_LEN => self.whole.read(self.page * PAGE_LEN + offset, buf),
            _ => Err(Error::Bounds {
                offset,
                len: buf.len(),
                size: PAGE_LEN,
            }),
        }
    }
}

/// Hashes numbers of frames and pages, which the guest chooses: so each store has a key of its own.
#[derive(Clone, Copy)]
struct Keys(u64);

impl Default for Keys {
    fn default() -> Keys {
        Keys(RandomState::new().hash_one(0))
    }
}

impl BuildHasher for Keys {
    type Hasher = KeyedHash;

    fn build_hasher(&self) -> KeyedHash {
        KeyedHash(self.0)
    }
}

/// One multiplication: walks look up a frame for every level.
struct KeyedHash(u64);

impl Hasher for KeyedHash {
    fn write(&mut self, bytes: &[u8]) {
        for &b in bytes {
            self.write_u64(b.into());
        }
    }

    fn write_u64(&mut self, number: u64) {
        let product = u128::from(self.0 ^ number) * 0x9e37_79b9_7f4a_7c15;
        #[allow(clippy::cast_possible_truncation)] // its two halves
        let halves = ((product >> 64) as u64, product as u64);
        self.0 = halves.0 ^ halves.1;
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

/// A place in guest memory that stays mapped.
#[derive(Clone)]
pub struct Pin {
    window: Rc<dyn Window>,
    offset: usize,
}

impl std::fmt::Debug for Pin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pin")
            .field("offset", &self.offset)
            .finish_non_exhaustive()
    }
}

impl Pin {
    /// The 64-bit word there.
    ///
    /// # Errors
    /// It crosses the page's end.
    pub fn u64(&self) -> Result<u64, Error> {
        let mut b = [0; 8];
        self.window.read(self.offset, &mut b)?;
        Ok(u64::from_le_bytes(b))
    }

    /// The 32-bit word there.
    ///
    /// # Errors
    /// It crosses the page's end.
    pub fn u32(&self) -> Result<u32, Error> {
        let mut b = [0; 4];
        self.window.read(self.offset, &mut b)?;
        Ok(u32::from_le_bytes(b))
    }
}

fn slot(at: Gva, level: u8) -> usize {
    usize::try_from((at.0 >> (12 + 9 * (u32::from(level) - 1))) & 511).unwrap_or(0)
}
