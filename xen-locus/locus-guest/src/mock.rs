//! A guest whose frames are in this process, for tests.
//!
//! All functions panic where a test has made a mistake: a frame that does not exist, bytes that leave it.

#![allow(clippy::unwrap_used, clippy::indexing_slicing)] // part of tests only
#![allow(missing_debug_implementations)]

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;

use crate::addr::{Frame, Gva, PAGE_LEN, PAGE_SIZE};
use crate::space::{PTE_FRAME, PTE_NX, PTE_PRESENT, PTE_WRITE};
use crate::{Error, Memory, MemoryMut, Window, WindowMut};

type MockPage = Rc<RefCell<Vec<u8>>>;

/// A guest's memory: frames by number, of which [`ROOT`] is the root of 4-level page tables.
#[derive(Default)]
pub struct MockMemory {
    frames: RefCell<HashMap<u64, MockPage>>,
}

/// The frame with the root of a mock's page tables.
pub const ROOT: Frame = Frame(1);

impl MockMemory {
    /// Memory of one frame, an empty page-table root.
    #[must_use]
    pub fn new() -> MockMemory {
        let mock = MockMemory::default();
        mock.frames
            .borrow_mut()
            .insert(ROOT.0, MockPage::new(RefCell::new(vec![0; PAGE_LEN])));
        mock
    }

    /// Adds a zeroed frame with the next free number.
    #[must_use]
    pub fn frame(&self) -> Frame {
        let mut frames = self.frames.borrow_mut();
        let number = 1 + frames.len() as u64;
        frames.insert(number, MockPage::new(RefCell::new(vec![0; PAGE_LEN])));
        Frame(number)
    }

    /// True if the memory has that frame.
    #[must_use]
    pub fn has(&self, frame: Frame) -> bool {
        self.frames.borrow().contains_key(&frame.0)
    }

    /// Adds a zeroed frame of this number, or zeroes the one that is there.
    pub fn add(&self, frame: Frame) {
        let page = MockPage::new(RefCell::new(vec![0; PAGE_LEN]));
        self.frames.borrow_mut().insert(frame.0, page);
    }

    fn page(&self, frame: Frame) -> Result<MockPage, Error> {
        let found = self.frames.borrow().get(&frame.0).cloned();
        found.ok_or(Error::NoMemory { frame })
    }

    fn pages(&self, frames: &[Frame]) -> Result<Vec<MockPage>, Error> {
        frames.iter().map(|&f| self.page(f)).collect()
    }

    /// Takes the frame away, as if it never had memory.
    pub fn take(&self, frame: Frame) {
        self.frames.borrow_mut().remove(&frame.0);
    }

    /// Writes `bytes` at offset `at` of a frame, in bytes.
    pub fn fill(&self, frame: Frame, at: usize, bytes: &[u8]) {
        let page = self.page(frame).unwrap();
        page.borrow_mut()[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// Writes entry number `slot` of the page table in frame `table`.
    pub fn set_entry(&self, table: Frame, slot: usize, entry: u64) {
        let page = self.page(table).unwrap();
        page.borrow_mut()[slot * 8..slot * 8 + 8].copy_from_slice(&entry.to_le_bytes());
    }

    fn entry(&self, table: Frame, slot: usize) -> u64 {
        let page = self.page(table).unwrap();
        let page = page.borrow();
        u64::from_le_bytes(page[slot * 8..slot * 8 + 8].try_into().unwrap())
    }

    /// Maps `frame` at the page of `at`, with the page tables that this needs.
    pub fn map_page(&self, at: Gva, frame: Frame, writable: bool, executable: bool) {
        let mut table = ROOT;
        for level in (2..=4).rev() {
            let slot = ((at.0 >> (12 + 9 * (level - 1))) & 511) as usize;
            if self.entry(table, slot) & PTE_PRESENT == 0 {
                let next = self.frame();
                self.set_entry(table, slot, (next.0 << 12) | PTE_PRESENT | PTE_WRITE);
            }
            table = Frame((self.entry(table, slot) & PTE_FRAME) >> 12);
        }
        let rights = if writable { PTE_WRITE } else { 0 } | if executable { 0 } else { PTE_NX };
        let slot = ((at.0 >> 12) & 511) as usize;
        self.set_entry(table, slot, (frame.0 << 12) | PTE_PRESENT | rights);
    }

    /// Maps new frames that hold `bytes` from `at` on, which is the start of a page.
    pub fn map_bytes(&self, at: Gva, bytes: &[u8], writable: bool, executable: bool) {
        for (i, part) in bytes.chunks(PAGE_LEN).enumerate() {
            let frame = self.frame();
            self.page(frame).unwrap().borrow_mut()[..part.len()].copy_from_slice(part);
            self.map_page(at.plus(i as u64 * PAGE_SIZE), frame, writable, executable);
        }
    }
}

struct MockWindow(Vec<MockPage>);

impl MockWindow {
    /// Calls `each` for the parts of the pages that `len` bytes at `offset` touch.
    fn parts(
        &self,
        offset: usize,
        len: usize,
        mut each: impl FnMut(&MockPage, std::ops::Range<usize>, usize),
    ) -> Result<(), Error> {
        let size = self.0.len() * PAGE_LEN;
        if offset.checked_add(len).is_none_or(|end| end > size) {
            return Err(Error::Bounds { offset, len, size });
        }
        let mut done = 0;
        while done < len {
            let at = offset + done;
            let start = at % PAGE_LEN;
            let n = (PAGE_LEN - start).min(len - done);
            each(&self.0[at / PAGE_LEN], start..start + n, done);
            done += n;
        }
        Ok(())
    }
}

impl Window for MockWindow {
    fn read(&self, offset: usize, buf: &mut [u8]) -> Result<(), Error> {
        self.parts(offset, buf.len(), |page, part, done| {
            buf[done..done + part.len()].copy_from_slice(&page.borrow()[part]);
        })
    }
}

impl WindowMut for MockWindow {
    fn write(&self, offset: usize, bytes: &[u8]) -> Result<(), Error> {
        self.parts(offset, bytes.len(), |page, part, done| {
            let len = part.len();
            page.borrow_mut()[part].copy_from_slice(&bytes[done..done + len]);
        })
    }
}

impl Memory for MockMemory {
    fn map(&self, frames: &[Frame]) -> Result<Box<dyn Window>, Error> {
        Ok(Box::new(MockWindow(self.pages(frames)?)))
    }

    fn map_some(&self, frames: &[Frame]) -> Result<(Box<dyn Window>, Vec<bool>), Error> {
        let pages = frames.iter().map(|&f| self.page(f).ok());
        let (pages, there) = pages
            .map(|p| (p.clone().unwrap_or_default(), p.is_some()))
            .unzip();
        Ok((Box::new(MockWindow(pages)), there))
    }
}

impl MemoryMut for MockMemory {
    fn map_mut(&self, frames: &[Frame]) -> Result<Box<dyn WindowMut>, Error> {
        Ok(Box::new(MockWindow(self.pages(frames)?)))
    }
}

/// A mock whose memory changes while it is read: some words come out with all bits inverted.
pub struct ChangingMemory {
    /// The memory without the changes.
    pub unchanged: MockMemory,
    /// Of `every` 8-byte words that are read, the last is inverted.
    pub every: usize,
    /// Number of 8-byte words read until now.
    pub words: Rc<Cell<usize>>,
}

struct ChangingWindow {
    window: Box<dyn Window>,
    every: usize,
    words: Rc<Cell<usize>>,
}

impl Window for ChangingWindow {
    fn read(&self, offset: usize, buf: &mut [u8]) -> Result<(), Error> {
        self.window.read(offset, buf)?;
        for word in buf.chunks_mut(8) {
            self.words.set(self.words.get() + 1);
            if self.words.get().is_multiple_of(self.every) {
                word.iter_mut().for_each(|b| *b = !*b);
            }
        }
        Ok(())
    }
}

impl Memory for ChangingMemory {
    fn map(&self, frames: &[Frame]) -> Result<Box<dyn Window>, Error> {
        Ok(Box::new(ChangingWindow {
            window: self.unchanged.map(frames)?,
            every: self.every,
            words: Rc::clone(&self.words),
        }))
    }
}
