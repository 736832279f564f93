//! The arena: its directory and records, in pages that the guest can change.

use locus_guest::addr::{Frame, Gva, PAGE_LEN};
use locus_guest::budget::{Budget, LIMIT};
use locus_guest::mock::{MockMemory, ROOT};
use locus_guest::space::{Space, PTE_FRAME, PTE_NX, PTE_PRESENT};
use locus_kernel::fixture::{renewed, KIND, TEXT};
use locus_kernel::split_functions::PARTS_MAX;
use locus_kernel::Kernel;
use sha2::{Digest, Sha256};
use xen_locus::arena::digests::CodeDigests;
use xen_locus::arena::record::{Directory, Function, Record, Slot, State, MODULE, SCHEMA};
use xen_locus::arena::{page_address, Arena, BASE};
use xen_locus::nudge::place::Place;
use xen_locus::plan::{self, PatchStack};
use xen_locus::{ops, verify};

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
        nudge: None,
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
    if let Ok(directory) = Directory::decode(data) {
        assert_eq!(
            Directory::decode(&page_of(&directory)).ok(),
            Some(directory)
        );
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
                ..Directory::default()
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
const FRAMES: std::ops::Range<u64> = 0xfe000..0xfe000 + PAGES as u64;
/// Number of those frames: as many as a PV guest's arena has, and as an input can have.
const PAGES: usize = 96;
/// Units of the budget for one input: four times what a full arena takes whose payloads let threads go on.
const BUDGET: u64 = LIMIT / 8;

/// Maps what is in front of the arena, and returns the arena's page table.
fn table_in(memory: &MockMemory) -> Frame {
    memory.map_page(Gva(BASE.0 - PAGE_LEN as u64), memory.frame(), false, false);
    let (table, _, _) = Space::new(memory, ROOT, 4).entry_slot(BASE, 1).unwrap();
    memory.map_page(guest::FIXMAP, table, true, false);
    table
}

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
        ArenaStage {
            table: table_in(memory),
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
        let mut pages: Vec<Vec<u8>> = pages.take(PAGES).map(whole).collect();
        let words = table.chunks_exact(8);
        let words: Vec<u64> = words
            .map(|word| u64::from_le_bytes(word.try_into().unwrap()))
            .collect();
        let count = pages.len();
        // The number of the page that the entry of a slot leads to.
        let number = |slot: usize| {
            let word = words.get(slot).filter(|&&word| word != 0)?;
            let number = ((word & PTE_FRAME) >> 12) as usize % (count + 1);
            (number < count).then_some(number)
        };
        renew_digests(&mut pages, |page| number(page + 1));
        for (&frame, page) in self.frames.iter().zip(&pages) {
            memory.fill(frame, 0, page);
        }
        for (slot, &word) in words.iter().enumerate() {
            let frame = match number(slot) {
                Some(number) => self.frames[number].0,
                None => PTE_FRAME >> 12,
            };
            let entry = word & !PTE_FRAME | frame << 12;
            memory.set_entry(self.table, slot, if word == 0 { 0 } else { entry });
        }
        let kernel = self.guest.kernel(&guest::variables())?;
        renewed(&kernel, &[], Budget::of(BUDGET)).ok()
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
    for gate in arena.gates(&kernel).unwrap_or_default() {
        let _ = Place::of(&kernel, &gate);
    }
    let stack = PatchStack::new(&residents);
    for resident in stack.applied() {
        let _ = stack.displaced(&kernel, resident, &[]);
        let _ = plan::undo(&kernel, &stack, resident);
        let _ = stack.watched(&resident.record.functions, true);
    }
    let _ = ops::patches_and_drained("", &kernel, None);
}

/// Makes the digests of the records in `pages` right, in the directory that counts. `number` says which of the pages is a
/// page of the arena.
fn renew_digests(pages: &mut [Vec<u8>], number: impl Fn(usize) -> Option<usize>) {
    let Some(first) = number(0) else { return };
    let Ok(mut directory) = Directory::decode(&pages[first]) else {
        return;
    };
    for slot in &mut directory.slots {
        let own = usize::from(slot.first)..usize::from(slot.first) + usize::from(slot.pages);
        let bytes: Vec<u8> = own
            .filter_map(&number)
            .flat_map(|page| pages[page].clone())
            .collect();
        let record = bytes.get(slot.record_offset as usize..);
        if let Some(record) = record.and_then(|r| r.get(..slot.record_len as usize)) {
            slot.record_sha256 = Sha256::digest(record).into();
        }
    }
    let (at, copy) = directory.encode();
    pages[first][at..at + copy.len()].copy_from_slice(&copy);
}

/// Bytes in front of a payload's record.
const FRONT: usize = MODULE as usize;

/// Pages of an arena with `count` payloads of `pages` pages each. All are applied, let threads go on in what they replace, and
/// replace the same functions, of as many parts as are believed.
fn full(count: usize, pages: usize) -> Vec<Vec<u8>> {
    let parts = vec![(Gva(1), 1); PARTS_MAX];
    let (mut arena, mut slots) = (vec![Vec::new()], Vec::new());
    for payload in 0..count {
        let first = 1 + payload * pages;
        let mut record = sample_record();
        record.name = format!("p{payload}");
        record.entry_only = true;
        record.module = page_address(first).plus(MODULE);
        let function = Function {
            old_cold: parts.clone(),
            new_cold: parts.clone(),
            ..record.functions.remove(0)
        };
        let mut json = serde_json::to_vec(&record).unwrap();
        for n in 0.. {
            let at = TEXT.plus(0x100 + n);
            record.functions.push(Function {
                old: at,
                site: at.plus(5),
                ..function.clone()
            });
            let longer = serde_json::to_vec(&record).unwrap();
            if FRONT + longer.len() > pages * PAGE_LEN {
                break;
            }
            json = longer;
        }
        slots.push(Slot {
            first: first as u16,
            pages: pages as u16,
            record_offset: FRONT as u32,
            ..sample_slot(&json, State::Applied)
        });
        // The words before its `struct module` say that the guest does not know it.
        let mut bytes = vec![0; FRONT];
        bytes.append(&mut json);
        bytes.resize(pages * PAGE_LEN, 0);
        arena.extend(bytes.chunks(PAGE_LEN).map(<[u8]>::to_vec));
    }
    arena[0] = page_of(&Directory {
        generation: 2,
        slots,
        ..Directory::default()
    });
    arena
}

/// The word in an input's page table for its page of this number.
fn entry(page: usize) -> u64 {
    (page as u64) << 12 | PTE_PRESENT | PTE_NX
}

/// Puts these pages of an arena into a guest.
#[cfg(test)]
pub(super) fn put_full(memory: &MockMemory, count: usize, pages: usize) {
    let table = table_in(memory);
    for (n, page) in full(count, pages).iter().enumerate() {
        let frame = Frame(FRAMES.start + n as u64);
        memory.add(frame);
        memory.fill(frame, 0, page);
        memory.set_entry(table, n + 1, entry(frame.0 as usize));
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

/// Arenas with payloads on each other: a few, and as many as there can be. And two with one payload, which is applied or being
/// applied.
pub fn arena_seeds() -> Vec<Vec<u8>> {
    let mut seeds = vec![layers(3, 2), layers(31, 3)];
    seeds.extend(one_payload());
    seeds
}

/// The input for an arena with `count` payloads of `pages` pages each, all on the same functions.
fn layers(count: usize, pages: usize) -> Vec<u8> {
    let pages = full(count, pages);
    let mut table: Vec<u64> = vec![0; 512];
    (0..pages.len()).for_each(|page| table[page + 1] = entry(page));
    let mut data: Vec<u8> = table.iter().flat_map(|w| w.to_le_bytes()).collect();
    data.extend(pages.concat());
    data
}

fn one_payload() -> Vec<Vec<u8>> {
    let record = serde_json::to_vec(&sample_record()).unwrap();
    [State::Applied, State::Applying]
        .map(|state| {
            let mut table = vec![0u64; 512];
            for page in 0..3 {
                table[page + 1] = entry(page);
            }
            let mut data: Vec<u8> = table.iter().flat_map(|w| w.to_le_bytes()).collect();
            data.extend(page_of(&Directory {
                generation: 2,
                slots: vec![sample_slot(&record, state)],
                ..Directory::default()
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
    use xen_locus::arena::record::ENTRIES_MAX;

    #[test]
    fn the_arena_of_the_seeds_shows_its_payload() {
        let stage = ArenaStage::new();
        for seed in one_payload() {
            let kernel = stage.kernel(&seed).unwrap();
            let arena = Arena::read(&kernel).unwrap();
            let residents = plan::residents(&kernel, &arena).unwrap();
            assert_eq!(residents[0].record, sample_record());
        }
        let kernel = stage.kernel(&arena_seeds()[0]).unwrap();
        let arena = Arena::read(&kernel).unwrap();
        let residents = plan::residents(&kernel, &arena).unwrap();
        assert_eq!(residents.len(), 3);
        assert!(residents[2].record.functions.len() > 4);
    }

    #[test]
    fn the_full_arena_of_the_seeds_is_an_input_and_is_read_to_its_end() {
        let seed = &arena_seeds()[1];
        // `-max_len` of libFuzzer, in fuzz/run.sh.
        assert!(seed.len() <= 401_408, "{}", seed.len());
        let kernel = ArenaStage::new().kernel(seed).unwrap();
        let (patches, drained) = ops::patches_and_drained("", &kernel, None).unwrap();
        assert_eq!((patches.len(), drained.is_some()), (ENTRIES_MAX, true));
        // What a run of the target reads besides takes less than that.
        assert!(kernel.space.budget().spent() < BUDGET / 3);
    }

    #[test]
    fn a_changed_record_is_read_with_its_digest() {
        let stage = ArenaStage::new();
        let mut seed = arena_seeds().remove(0);
        let at = seed.windows(4).position(|w| w == b"\"p1\"").unwrap();
        seed[at + 2] = b'7';
        let kernel = stage.kernel(&seed).unwrap();
        let residents = plan::residents(&kernel, &Arena::read(&kernel).unwrap()).unwrap();
        assert_eq!(residents[1].record.name, "p7");
    }
}
