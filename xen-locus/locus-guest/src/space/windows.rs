//! Pages that stay mapped: windows that are remembered, mapped one by one or many by one call.

use std::cell::RefCell;
use std::collections::hash_map::RandomState;
use std::collections::HashMap;
use std::hash::{BuildHasher, Hash, Hasher};
use std::rc::Rc;

use super::walk::{entries, frame_in};
use super::{Space, PTE_PRESENT};
use crate::addr::{Frame, Gva, PAGE_LEN, PAGE_SIZE};
use crate::{budget, Error, Window};

/// Pages mapped together where objects lie side by side. A slab of `struct task_struct` has eight
/// pages, and many threads have slabs side by side. A call costs as much as fifty pages.
const BLOCK: usize = 32;
/// Most windows in a store before it is emptied: bounds what a guest can make us hold. Each may be a
/// mapping of its own, of which Linux gives a process 65530 (`vm.max_map_count`), and there are two
/// stores. 8,000 threads have their `struct task_struct` on 21,000 pages.
const KEEP: usize = 24 << 10;

/// A place in guest memory that stays mapped, for words that are read again and again.
#[derive(Clone)]
pub struct Pin {
    pub(super) window: Rc<dyn Window>,
    /// Bytes from the start of the window.
    pub(super) offset: usize,
}

impl std::fmt::Debug for Pin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pin")
            .field("offset", &self.offset)
            .finish_non_exhaustive()
    }
}

impl Pin {
    /// The little-endian 64-bit word there, as it is now.
    ///
    /// # Errors
    /// [`Error::Bounds`] if the word crosses the end of the page.
    pub fn u64(&self) -> Result<u64, Error> {
        let mut b = [0; 8];
        self.window.read(self.offset, &mut b)?;
        Ok(u64::from_le_bytes(b))
    }

    /// The little-endian 32-bit word there, as it is now.
    ///
    /// # Errors
    /// [`Error::Bounds`] if the word crosses the end of the page.
    pub fn u32(&self) -> Result<u32, Error> {
        let mut b = [0; 4];
        self.window.read(self.offset, &mut b)?;
        Ok(u32::from_le_bytes(b))
    }
}

impl Space<'_> {
    /// Maps the page of `at` and returns the place in it.
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
    pub(super) fn page(&self, at: Gva) -> Result<Rc<dyn Window>, Error> {
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
                let mut bytes = [0; 8 * BLOCK];
                self.window(table)?.read(8 * slot, &mut bytes)?;
                self.budget.count_copied(bytes.len());
                let present = entries(&bytes).filter(|e| e & PTE_PRESENT != 0);
                present.map(frame_in).collect()
            } else {
                // The frames of a large page are consecutive.
                let lowest = leaf.frame.0 & !(slots - 1);
                (0..slots).map(|i| Frame(lowest + i)).collect()
            };
            self.map_together(around);
        }
        let window = self.window(leaf.frame)?;
        keep(&self.pages, at.page(), Rc::clone(&window));
        Ok(window)
    }

    /// A window onto `frame`, mapped now or remembered.
    pub(super) fn window(&self, frame: Frame) -> Result<Rc<dyn Window>, Error> {
        if let Some(w) = self.windows.borrow().get(&frame) {
            return Ok(Rc::clone(w));
        }
        let window: Rc<dyn Window> = Rc::from(self.map(&[frame])?);
        keep(&self.windows, frame, Rc::clone(&window));
        Ok(window)
    }

    /// Maps `frames` by one call, because a call costs more than a page, and keeps a window onto each that is
    /// there: a guest that was ballooned has holes everywhere. If the call fails, each frame is mapped when
    /// it is needed.
    pub(super) fn map_together(&self, mut frames: Vec<Frame>) {
        frames.sort_unstable();
        frames.dedup();
        frames.retain(|frame| !self.windows.borrow().contains_key(frame));
        if frames.len() < 2 {
            return;
        }
        let units = budget::MAP + budget::PAGE * frames.len() as u64;
        if self.budget.spend(units).is_err() {
            return;
        }
        let Ok((whole, there)) = self.mem.map_some(&frames) else {
            return;
        };
        let whole: Rc<dyn Window> = Rc::from(whole);
        let pages = frames.into_iter().zip(there).enumerate();
        for (i, (frame, _)) in pages.filter(|(_, (_, there))| *there) {
            let whole = Rc::clone(&whole);
            keep(
                &self.windows,
                frame,
                Rc::new(PageOfWindow { whole, page: i }),
            );
        }
    }
}

/// Keeps a window in a store, which is emptied first if it is full.
fn keep<K: Eq + Hash>(
    store: &RefCell<HashMap<K, Rc<dyn Window>, KeyedHashes>>,
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
struct PageOfWindow {
    whole: Rc<dyn Window>,
    /// Number of the page in `whole`, from 0.
    page: usize,
}

impl Window for PageOfWindow {
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

/// Makes the hashes of one store. The guest chooses the numbers of frames and pages, so each store has
/// a random key of its own.
#[derive(Clone, Copy)]
pub(super) struct KeyedHashes(u64);

impl Default for KeyedHashes {
    fn default() -> KeyedHashes {
        KeyedHashes(RandomState::new().hash_one(0))
    }
}

impl BuildHasher for KeyedHashes {
    type Hasher = KeyedHash;

    fn build_hasher(&self) -> KeyedHash {
        KeyedHash(self.0)
    }
}

/// A hash of one multiplication, because a walk looks up a frame for every level.
pub(super) struct KeyedHash(u64);

impl Hasher for KeyedHash {
    fn write(&mut self, bytes: &[u8]) {
        for &b in bytes {
            self.write_u64(b.into());
        }
    }

    fn write_u64(&mut self, number: u64) {
        let product = u128::from(self.0 ^ number) * 0x9e37_79b9_7f4a_7c15;
        #[allow(clippy::cast_possible_truncation)] // the two halves of the product
        let halves = ((product >> 64) as u64, product as u64);
        self.0 = halves.0 ^ halves.1;
    }

    fn finish(&self) -> u64 {
        self.0
    }
}
