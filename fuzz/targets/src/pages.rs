//! Page tables: the search for the kernel, walks and reads.

use locus_guest::addr::{Frame, Gva, Range, PAGE_LEN};
use locus_guest::budget::{Budget, LIMIT};
use locus_guest::mock::MockMemory;
use locus_guest::space::{Space, PTE_FRAME};
use locus_kernel::fixture::{vcpus, ENTRY, KIND, TEXT};
use locus_kernel::locate::{locate, KERNEL_MAP};

/// Units of the budget for one input: enough to find the kernel, and few enough for many inputs.
const BUDGET: u64 = LIMIT / 1024;
/// Most frames of an input.
const FRAMES: usize = 16;

/// `data` is frames. The first is the root; the others are tables or pages, as entries use them. Entries name
/// frames by number, from 1 and modulo one more than there are. So tables lead to each other, and sometimes
/// to a frame that does not exist.
pub fn run(data: &[u8]) {
    let memory = MockMemory::new();
    let count = data.len().div_ceil(PAGE_LEN).clamp(1, FRAMES);
    for (i, page) in data.chunks(PAGE_LEN).take(FRAMES).enumerate() {
        let frame = if i == 0 {
            locus_guest::mock::ROOT
        } else {
            memory.frame()
        };
        for (slot, word) in page.chunks_exact(8).enumerate() {
            let word = u64::from_le_bytes(word.try_into().unwrap());
            let number = 1 + ((word & PTE_FRAME) >> 12) % (count as u64 + 1);
            memory.set_entry(frame, slot, word & !PTE_FRAME | number << 12);
        }
    }
    let _ = locate(&memory, KIND, &vcpus(), &Budget::of(BUDGET));
    for levels in [4, 5] {
        let space = Space::within(&memory, Frame(1), levels, Budget::of(BUDGET));
        let around = Range::new(Gva(ENTRY.0 - (1 << 20)), 2 << 20);
        for region in space.regions(around) {
            assert!(region.range.start < region.range.end);
            assert!(region.range.end <= around.end);
            let leaf = space.walk(region.range.start);
            assert!(leaf.is_ok_and(|l| l.writable == region.writable));
        }
        let _ = space.regions(Range::new(Gva(0), u64::MAX));
        let space = Space::within(&memory, Frame(1), levels, Budget::of(BUDGET));
        for at in [Gva(0), TEXT, KERNEL_MAP, Gva(u64::MAX), Gva(u64::MAX - 7)] {
            let _ = space.read_u64(at);
            let _ = space.read_vec(at, 5 * PAGE_LEN);
            let _ = space.read_cstr(at, 100);
            let _ = space.entry_slot(at, 1);
            let _ = space.pin(at).map(|pin| pin.u64());
        }
    }
}

/// Good tables, a root whose entries all lead to the root, and tables of one entry each with a large page.
pub fn seeds() -> Vec<Vec<u8>> {
    let sane: Vec<u64> = (0..5 * 512)
        .map(|i| match i {
            511 => 1 << 12 | 3,
            1022 => 2 << 12 | 3,
            1032 => 3 << 12 | 3, // ENTRY's
            1536..1600 => 4 << 12 | 1,
            1600..1700 => 4 << 12 | 1 | 1 << 63,
            _ => 0,
        })
        .collect();
    let own = vec![3; 512];
    let mut large = vec![0; 1024];
    large[511] = 1 << 12 | 3;
    large[1022] = 1 << 12 | 3 | 1 << 7;
    [sane, own, large]
        .iter()
        .map(|words: &Vec<u64>| words.iter().flat_map(|w| w.to_le_bytes()).collect())
        .collect()
}
