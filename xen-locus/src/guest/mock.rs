//! A guest made of frames in this process, for tests.

#![allow(clippy::unwrap_used, clippy::indexing_slicing)] // part of tests only
#![allow(missing_debug_implementations)]

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;

use super::space::{PTE_NX, PTE_PRESENT, PTE_WRITE};
use super::{Error, Memory, MemoryMut, Window, WindowMut};
use crate::addr::{Frame, Gva, PAGE_LEN, PAGE_SIZE};

type Page = Rc<RefCell<Vec<u8>>>;

/// Frames by number; frame 1 is the page-table root.
#[derive(Default)]
pub struct MockMemory {
    frames: RefCell<HashMap<u64, Page>>,
}

/// The root of a mock's page tables.
pub const ROOT: Frame = Frame(1);

impl MockMemory {
    /// No memory but an empty page-table root.
    pub fn new() -> MockMemory {
        let mock = MockMemory::default();
        mock.frames
            .borrow_mut()
            .insert(ROOT.0, Page::new(RefCell::new(vec![0; PAGE_LEN])));
        mock
    }

    /// Adds a zeroed frame.
    pub fn frame(&self) -> Frame {
        let mut frames = self.frames.borrow_mut();
        let number = 1 + frames.len() as u64;
        frames.insert(number, Page::new(RefCell::new(vec![0; PAGE_LEN])));
        Frame(number)
    }

    fn page(&self, frame: Frame) -> Result<Page, Error> {
        let why = || Error::Frame {
            frame,
            why: "the mock has no such frame".into(),
        };
        self.frames.borrow().get(&frame.0).cloned().ok_or_else(why)
    }

    /// Overwrites an entry of a page table.
    pub fn set_entry(&self, table: Frame, slot: usize, entry: u64) {
        let page = self.page(table).unwrap();
        page.borrow_mut()[slot * 8..slot * 8 + 8].copy_from_slice(&entry.to_le_bytes());
    }

    fn entry(&self, table: Frame, slot: usize) -> u64 {
        let page = self.page(table).unwrap();
        let page = page.borrow();
        u64::from_le_bytes(page[slot * 8..slot * 8 + 8].try_into().unwrap())
    }

    /// Maps `frame` at `at`.
    pub fn map_page(&self, at: Gva, frame: Frame, writable: bool, executable: bool) {
        let mut table = ROOT;
        for level in (2..=4).rev() {
            let slot = ((at.0 >> (12 + 9 * (level - 1))) & 511) as usize;
            if self.entry(table, slot) & PTE_PRESENT == 0 {
                let next = self.frame();
                self.set_entry(table, slot, (next.0 << 12) | PTE_PRESENT | PTE_WRITE);
            }
            table = Frame((self.entry(table, slot) & super::space::PTE_FRAME) >> 12);
        }
        let rights = if writable { PTE_WRITE } else { 0 } | if executable { 0 } else { PTE_NX };
        let slot = ((at.0 >> 12) & 511) as usize;
        self.set_entry(table, slot, (frame.0 << 12) | PTE_PRESENT | rights);
    }

    /// Maps fresh frames with `bytes` at `at`, a page's start.
    pub fn map_bytes(&self, at: Gva, bytes: &[u8], writable: bool, executable: bool) {
        for (i, part) in bytes.chunks(PAGE_LEN).enumerate() {
            let frame = self.frame();
            self.page(frame).unwrap().borrow_mut()[..part.len()].copy_from_slice(part);
            self.map_page(at.plus(i as u64 * PAGE_SIZE), frame, writable, executable);
        }
    }
}

struct MockWindow(Vec<Page>);

impl Window for MockWindow {
    fn read(&self, offset: usize, buf: &mut [u8]) -> Result<(), Error> {
        let bounds = Error::Bounds {
            offset,
            len: buf.len(),
            size: self.0.len() * PAGE_LEN,
        };
        for (i, b) in buf.iter_mut().enumerate() {
            let at = offset + i;
            let page = self.0.get(at / PAGE_LEN).ok_or_else(|| bounds.clone())?;
            *b = page.borrow()[at % PAGE_LEN];
        }
        Ok(())
    }
}

impl WindowMut for MockWindow {
    fn write(&self, offset: usize, bytes: &[u8]) -> Result<(), Error> {
        let bounds = Error::Bounds {
            offset,
            len: bytes.len(),
            size: self.0.len() * PAGE_LEN,
        };
        for (i, &b) in bytes.iter().enumerate() {
            let at = offset + i;
            let page = self.0.get(at / PAGE_LEN).ok_or_else(|| bounds.clone())?;
            page.borrow_mut()[at % PAGE_LEN] = b;
        }
        Ok(())
    }
}

impl Memory for MockMemory {
    fn map(&self, frames: &[Frame]) -> Result<Box<dyn Window>, Error> {
        let pages = frames
            .iter()
            .map(|&f| self.page(f))
            .collect::<Result<_, _>>()?;
        Ok(Box::new(MockWindow(pages)))
    }
}

impl MemoryMut for MockMemory {
    fn map_mut(&self, frames: &[Frame]) -> Result<Box<dyn WindowMut>, Error> {
        let pages = frames
            .iter()
            .map(|&f| self.page(f))
            .collect::<Result<_, _>>()?;
        Ok(Box::new(MockWindow(pages)))
    }
}
