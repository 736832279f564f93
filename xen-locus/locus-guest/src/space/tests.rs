use std::cell::RefCell;

use super::*;
use crate::addr::{Range, PAGE_SIZE};
use crate::mock::{MockMemory, ROOT};

const AT: Gva = Gva(0xffff_8880_0000_0000);

/// A mock that counts the pages of each mapping.
struct Counting {
    memory: MockMemory,
    maps: RefCell<Vec<usize>>,
}

impl Memory for Counting {
    fn map(&self, frames: &[Frame]) -> Result<Box<dyn Window>, Error> {
        self.maps.borrow_mut().push(frames.len());
        self.memory.map(frames)
    }

    fn map_some(&self, frames: &[Frame]) -> Result<(Box<dyn Window>, Vec<bool>), Error> {
        self.maps.borrow_mut().push(frames.len());
        self.memory.map_some(frames)
    }
}

/// Pages at [`AT`], each filled with its number.
fn pages(count: usize) -> Counting {
    let memory = MockMemory::new();
    let bytes: Vec<u8> = (0..count * PAGE_LEN)
        .map(|i| u8::try_from(i / PAGE_LEN % 256).unwrap())
        .collect();
    memory.map_bytes(AT, &bytes, true, false);
    Counting {
        memory,
        maps: RefCell::default(),
    }
}

fn page(n: u64) -> Gva {
    AT.plus(n * PAGE_SIZE)
}

fn byte(space: &Space<'_>, at: Gva) -> Result<u8, Error> {
    let mut byte = [0];
    space.read(at, &mut byte)?;
    Ok(byte[0])
}

#[test]
fn neighbours_are_mapped_by_one_call_and_are_what_they_are_alone() {
    let memory = pages(75);
    let alone = Space::new(&memory, ROOT, 4);
    let blocks = alone.fresh_in_blocks();
    for n in 0..75 {
        let wanted = byte(&alone, page(n)).unwrap();
        assert_eq!(u64::from(wanted), n);
        assert_eq!(byte(&blocks, page(n).plus(4095)).unwrap(), wanted);
    }
    assert!(byte(&blocks, page(75)).is_err(), "not mapped");
    let mut long = [0; 2 * PAGE_LEN];
    blocks.read(page(6).plus(100), &mut long).unwrap();
    assert_eq!((long[0], long[PAGE_LEN], long[2 * PAGE_LEN - 1]), (6, 7, 8));
    let mut maps = memory.maps.take();
    maps.retain(|&pages| pages > 1);
    assert_eq!(maps, [32, 32, 11], "the last block has a hole");
}

#[test]
fn a_neighbour_that_cannot_be_mapped_does_no_harm() {
    let memory = pages(8);
    memory
        .memory
        .map_page(page(3), Frame(0x1234_5678), true, false);
    let blocks = Space::new(&memory, ROOT, 4).fresh_in_blocks();
    assert_eq!(byte(&blocks, page(2)).unwrap(), 2);
    assert_eq!(byte(&blocks, page(4)).unwrap(), 4);
    // All others by the one call for the block, and none of them alone.
    let maps = memory.maps.take();
    assert_eq!(maps.iter().filter(|&&pages| pages > 1).count(), 1);
    assert!(byte(&blocks, page(3)).is_err());
    assert!(byte(&blocks, page(7)).is_ok());
    assert_eq!(memory.maps.take(), [1], "only the one that is missing");
}

#[test]
fn tables_are_mapped_together_and_one_that_is_missing_hides_only_its_own() {
    let memory = pages(5 * 512);
    let space = Space::new(&memory, ROOT, 4);
    let all = Range::new(AT, 5 << 21);
    let found = space.regions(all);
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].range, all);
    // The root, two tables with one entry each, and five at once.
    assert_eq!(memory.maps.take(), [1, 1, 1, 5]);
    let (table, slot, entry) = space.entry_slot(page(2 * 512), 2).unwrap();
    let far = (entry & !PTE_FRAME) | (0x1234_5678 << 12);
    memory.memory.set_entry(table, slot, far);
    let found = space.fresh().regions(all);
    let ranges: Vec<Range> = found.iter().map(|r| r.range).collect();
    assert_eq!(
        ranges,
        [Range::new(AT, 2 << 21), Range::new(page(3 * 512), 2 << 21)]
    );
}

#[test]
fn frames_are_those_of_a_walk_to_each_page() {
    let memory = pages(1100);
    let space = Space::new(&memory, ROOT, 4);
    for (from, count) in [(0, 1), (0, 1100), (3, 7), (511, 2), (510, 515), (1023, 1)] {
        let walked: Vec<Frame> = (from..from + count)
            .map(|n| space.walk(page(n)).unwrap().frame)
            .collect();
        let bytes = (count - 1) * PAGE_SIZE + 1;
        assert_eq!(space.frames(page(from), bytes).unwrap(), walked);
        let odd = page(from).plus(17);
        assert_eq!(
            space.frames(odd, bytes.saturating_sub(17).max(1)).unwrap(),
            walked
        );
    }
    assert!(space.frames(page(1000), 101 * PAGE_SIZE).is_err());
    assert!(space.frames(AT, 0).unwrap().is_empty());
}

#[test]
fn frames_of_a_large_page_cost_what_those_of_small_ones_do() {
    const GIB: u64 = 1 << 30;
    let memory = MockMemory::new();
    let tables = memory.frame();
    memory.set_entry(ROOT, (AT.0 >> 39) as usize & 511, (tables.0 << 12) | 3);
    for n in 0..512 {
        memory.set_entry(tables, usize::try_from(n).unwrap(), (n << 30) | 0x83);
    }
    let start = Gva(AT.0 & !(512 * GIB - 1));
    let space = Space::within(&memory, ROOT, 4, Budget::of(5 << 18));
    let from = start.plus(3 * GIB - 5 * PAGE_SIZE);
    let frames = space.frames(from, GIB).unwrap();
    let first = (3 << 18) - 5;
    assert!(frames.iter().zip(first..).all(|(f, n)| f.0 == n));
    assert_eq!(frames.len(), 1 << 18);
    assert!(space.budget().spent() >= 1 << 18);
    assert!(matches!(space.frames(from, 8 * GIB), Err(Error::Exhausted)));
}

#[test]
fn the_last_pages_of_all_are_followed_by_none() {
    let memory = MockMemory::new();
    let last = Gva(u64::MAX - 2 * PAGE_SIZE + 1);
    memory.map_bytes(last, &[7; 2 * PAGE_LEN], true, false);
    memory.map_bytes(Gva(0), &[8; PAGE_LEN], true, false);
    let space = Space::new(&memory, ROOT, 4);
    assert_eq!(space.frames(last, 2 * PAGE_SIZE - 1).unwrap().len(), 2);
}

#[test]
fn memory_that_was_read_into_before_shows_nothing_of_it() {
    let memory = pages(600);
    let space = Space::new(&memory, ROOT, 4);
    space.recycle(vec![0xee; 2 << 20]);
    let bytes = space.read_vec(page(1), 500 * PAGE_LEN).unwrap();
    assert_eq!(bytes.len(), 500 * PAGE_LEN);
    assert!(bytes
        .chunks(PAGE_LEN)
        .zip(1u32..)
        .all(|(part, n)| part.iter().all(|&b| u32::from(b) == n % 256)));
    space.recycle(bytes);
    assert!(space.read_vec(page(500), 101 * PAGE_LEN).is_err());
    space.recycle(vec![0xee; 1 << 20]);
    assert_eq!(space.read_vec(page(0), 10).unwrap(), [0; 10]);
}
