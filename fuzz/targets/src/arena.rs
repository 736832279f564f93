//! The arena: its directory and records, in pages that the guest can change.

use locus_guest::addr::{Frame, Gva, PAGE_LEN};
use locus_guest::space::{Space, PTE_FRAME, PTE_NX, PTE_PRESENT};
use locus_kernel::fixture::{KIND, TEXT};
use locus_kernel::Kernel;
use sha2::{Digest, Sha256};
use xen_locus::arena::digests::CodeDigests;
use xen_locus::arena::record::{Directory, Function, Record, Slot, State, SCHEMA};
use xen_locus::arena::{page_address, Arena, BASE};
use xen_locus::plan::{self, Stack};
use xen_locus::verify;

use super::{guest, stage};

fn sample_record() -> Record {
    Record {
        schema: SCHEMA,
        name: "locus_test".into(),
        sha256: "0".repeat(64),
        description: "a test".into(),
        cves: vec!["CVE-2000-0001".into()],
        functions: vec![Function {
            name: "entry".into(),
            object: "vmlinux".into(),
            old: TEXT.plus(0x100),
            old_size: 64,
            new: page_address(1),
            new_size: 32,
            new_cold: Vec::new(),
            old_cold: Vec::new(),
            site: TEXT.plus(0x105),
            found: [0xcc; 5],
            old_bytes: [0xcc; 5],
            new_bytes: [0xe9, 1, 2, 3, 4],
        }],
        text: (page_address(1), 32),
        module: page_address(2).plus(3072 + 64),
        code: CodeDigests::default(),
        rodata_len: 4096,
        rodata_sha256: "0".repeat(64),
        objects: Vec::new(),
        entry_only: false,
        record_room: None,
        uses: Some(Vec::new()),
    }
}

fn sample_slot(record: &[u8], state: State) -> Slot {
    Slot {
        state,
        first: 1,
        pages: 2,
        applied_at: 1_700_000_000,
        record_offset: PAGE_LEN as u32,
        record_len: record.len() as u32,
        record_sha256: Sha256::digest(record).into(),
    }
}

fn page_of(directory: &Directory) -> Vec<u8> {
    let mut page = vec![0; PAGE_LEN];
    let (at, copy) = directory.encode();
    page[at..at + copy.len()].copy_from_slice(&copy);
    page
}

/// `data` is the first page of an arena.
pub fn directory(data: &[u8]) {
    if let Some(directory) = Directory::decode(data) {
        assert_eq!(Directory::decode(&page_of(&directory)), Some(directory));
    }
}

/// A directory of one payload.
pub fn directory_seeds() -> Vec<Vec<u8>> {
    let slot = sample_slot(b"{}", State::Applied);
    [1, 2]
        .map(|generation| {
            page_of(&Directory {
                generation,
                slots: vec![slot.clone()],
            })
        })
        .to_vec()
}

/// `data` is a record whose digest is the one in the directory.
pub fn record(data: &[u8]) {
    let slot = sample_slot(data, State::Applied);
    let _ = Record::decode(data, &slot);
}

/// One well-formed record.
pub fn record_seeds() -> Vec<Vec<u8>> {
    vec![serde_json::to_vec(&sample_record()).unwrap()]
}

/// Frames of the arena in these tests.
const FRAMES: std::ops::Range<u64> = 0xfef00..0xfef00 + PAGES as u64;
/// Number of those frames.
const PAGES: usize = 7;

/// A guest whose arena is the input.
struct ArenaStage {
    guest: stage::Stage,
    table: Frame,
    frames: Vec<Frame>,
}

impl ArenaStage {
    fn new() -> ArenaStage {
        let guest = guest::stage();
        let memory = guest.memory;
        memory.map_page(Gva(BASE.0 - PAGE_LEN as u64), memory.frame(), false, false);
        let space = Space::new(memory, locus_guest::mock::ROOT, 4);
        let (table, _, _) = space.entry_slot(BASE, 1).unwrap();
        ArenaStage {
            table,
            frames: FRAMES
                .map(Frame)
                .inspect(|&frame| memory.add(frame))
                .collect(),
            guest,
        }
    }

    /// The kernel with the arena that is `data`.
    fn kernel(&self, data: &[u8]) -> Option<Kernel<'static>> {
        let memory = self.guest.memory;
        let mut pages = data.chunks_exact(PAGE_LEN);
        let table = pages.next().unwrap_or(&[0; PAGE_LEN]);
        let count = pages.len().min(PAGES) as u64;
        for (&frame, page) in self.frames.iter().zip(pages) {
            memory.fill(frame, 0, &whole(page));
        }
        for (slot, word) in table.chunks_exact(8).enumerate() {
            let word = u64::from_le_bytes(word.try_into().unwrap());
            if word == 0 {
                memory.set_entry(self.table, slot, 0);
                continue;
            }
            let number = ((word & PTE_FRAME) >> 12) % (count + 1);
            let frame = match self.frames.get(number as usize) {
                Some(frame) if number < count => frame.0,
                _ => PTE_FRAME >> 12,
            };
            memory.set_entry(self.table, slot, word & !PTE_FRAME | frame << 12);
        }
        self.guest.kernel(&guest::variables())
    }
}

thread_local! {
    static STAGE: ArenaStage = ArenaStage::new();
}

/// `data` is the page table of the arena, and then its pages. Entries name these pages by number, modulo one
/// more than there are; the last number is no page. Digests are corrected, so that what they protect is read.
pub fn arena(data: &[u8]) {
    let Some(kernel) = STAGE.with(|stage| stage.kernel(data)) else {
        return;
    };
    let Ok(arena) = Arena::read(&kernel) else {
        return;
    };
    let _ = arena.room(KIND);
    let _ = arena.find_room(KIND, 2);
    let _ = verify::compare_once(&kernel, None);
    let residents = plan::residents(&kernel, &arena).unwrap_or_default();
    let stack = Stack::new(&residents);
    for resident in stack.applied() {
        let _ = stack.displaced(&kernel, resident);
        let _ = plan::undo(&kernel, &stack, resident);
    }
}

/// A copy of the page in which the digest of each half that looks like a directory is correct.
fn whole(page: &[u8]) -> Vec<u8> {
    let mut page = page.to_vec();
    for copy in page.chunks_mut(PAGE_LEN / 2) {
        if copy.starts_with(b"XENLOCUS") {
            let digest = Sha256::digest(&copy[32..]);
            copy[16..32].copy_from_slice(&digest[..16]);
        }
    }
    page
}

/// Arenas with one payload, which is applied or being applied.
pub fn arena_seeds() -> Vec<Vec<u8>> {
    let record = serde_json::to_vec(&sample_record()).unwrap();
    [State::Applied, State::Applying]
        .map(|state| {
            let mut table = vec![0u64; 512];
            for page in 0..3 {
                table[page + 1] = (page as u64) << 12 | PTE_PRESENT | PTE_NX;
            }
            let mut data: Vec<u8> = table.iter().flat_map(|w| w.to_le_bytes()).collect();
            data.extend(page_of(&Directory {
                generation: 2,
                slots: vec![sample_slot(&record, state)],
            }));
            data.extend(vec![0xcc; PAGE_LEN]);
            let mut page = record.clone();
            page.resize(PAGE_LEN, 0);
            data.extend(page);
            data
        })
        .to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_arena_of_the_seeds_shows_its_payload() {
        let stage = ArenaStage::new();
        for seed in arena_seeds() {
            let kernel = stage.kernel(&seed).unwrap();
            let arena = Arena::read(&kernel).unwrap();
            let residents = plan::residents(&kernel, &arena).unwrap();
            assert_eq!(residents[0].record, sample_record());
        }
    }
}
