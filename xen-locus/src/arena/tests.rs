//! The arena of the mock guest: pages that are added and read back, and all that is refused.

use std::cell::{Cell, RefCell};

use locus_guest::addr::Gfn;
use locus_guest::space::{PTE_PRESENT, PTE_USER};
use locus_guest::{Memory, MemoryMut, Window, WindowMut};
use locus_kernel::fixture::TEXT;
use locus_kernel::fixture_world::{World, FIXMAP};

use super::record::State;
use super::*;
use crate::error::Class;

mod room;

/// A page of the kernel's variables: pointers to the e820 map and to the mapping of all memory, and the map itself.
const VARIABLES: Gva = Gva(TEXT.0 + (12 << 20));
/// Where it sees all memory.
const DIRECT_MAP: Gva = Gva(0xffff_8880_0000_0000);
/// The first low page.
const LOW: Gva = Gva(DIRECT_MAP.0 + 0xa0 * PAGE_SIZE);

/// The guest, and what it does to the tool's writes.
struct Guest {
    world: World,
    /// Frames that were populated.
    populated: RefCell<Vec<u64>>,
    /// Frames that were asked for.
    asked: RefCell<Vec<u64>>,
    /// A frame that can't be mapped, because dom0 has no memory for that.
    unmappable: Cell<Option<u64>>,
    /// Pages of memory that it may be given.
    spare: Cell<u64>,
    /// So many entries are written, and so many frames populated, until the run is ended.
    entries_left: Cell<usize>,
    frames_left: Cell<usize>,
    /// What is written to its memory is lost.
    loses_writes: Cell<bool>,
}

impl Guest {
    fn new(kind: GuestType) -> Guest {
        Guest::with(kind, &[])
    }

    /// The same with `ram` in its memory map, each as start and length.
    fn with(kind: GuestType, ram: &[(u64, u64)]) -> Guest {
        let world = World::with(kind, |fixture| {
            for (offset, name) in [(0, "e820_table"), (8, "page_offset_base")] {
                let at = VARIABLES.plus(offset).0;
                fixture.symbols.push((at, 'D', name.to_owned()));
            }
        });
        let mut variables = Vec::new();
        variables.extend(VARIABLES.plus(16).0.to_le_bytes());
        variables.extend(DIRECT_MAP.0.to_le_bytes());
        variables.extend(u32::try_from(ram.len()).unwrap().to_le_bytes());
        for (start, len) in ram {
            variables.extend(start.to_le_bytes());
            variables.extend(len.to_le_bytes());
            variables.extend(1u32.to_le_bytes());
        }
        world.memory.map_bytes(VARIABLES, &variables, true, false);
        let low = vec![0; PV_PAGES * PAGE_LEN];
        world.memory.map_bytes(LOW, &low, true, false);
        // The first megabyte's `struct page`s, all of which say PG_reserved.
        let mut pages = vec![0; 256 * 64];
        pages.chunks_mut(64).for_each(|page| page[1] = 1 << 4);
        let at = Gva(0xffff_ea00_0000_0000);
        world.memory.map_bytes(at, &pages, true, false);
        Guest {
            world,
            populated: RefCell::default(),
            asked: RefCell::default(),
            unmappable: Cell::new(None),
            spare: Cell::new(1000),
            entries_left: Cell::new(usize::MAX),
            frames_left: Cell::new(usize::MAX),
            loses_writes: Cell::new(false),
        }
    }

    fn kernel(&self) -> Kernel<'_> {
        let world = &self.world;
        Kernel::read(&world.memory, world.kind, &world.vcpus).unwrap()
    }

    /// The arena as the guest's memory shows it now.
    fn arena(&self) -> Result<Arena> {
        Arena::read(&self.kernel())
    }

    fn table(&self) -> Frame {
        self.kernel().space.entry_slot(BASE, 1).unwrap().0
    }

    fn entry(&self, page: usize) -> u64 {
        let at = page_address(page);
        self.kernel().space.entry_slot(at, 1).unwrap().2
    }

    fn set_entry(&self, page: usize, entry: u64) {
        self.world.memory.set_entry(self.table(), page + 1, entry);
    }

    fn add(&self, arena: &mut Arena, first: usize, rights: &[Rights]) -> Result<()> {
        arena.add(self, &self.kernel(), first, rights)
    }

    /// An arena whose directory has these payloads, each as its first page and their number.
    fn committed(&self, payloads: &[(u16, u16)]) -> Arena {
        let mut arena = self.arena().unwrap();
        let slots = payloads.iter().map(|&(first, pages)| slot(first, pages));
        arena.commit(self, &self.kernel(), slots.collect()).unwrap();
        arena
    }
}

fn slot(first: u16, pages: u16) -> Slot {
    Slot {
        state: State::Applied,
        first,
        pages,
        applied_at: 0,
        record_offset: 0,
        record_len: 0,
        record_sha256: [0; 32],
    }
}

fn spend(left: &Cell<usize>) -> Outcome<()> {
    let ended = || locus_guest::Error::Odd("the run was ended".into());
    left.set(left.get().checked_sub(1).ok_or_else(ended)?);
    Ok(())
}

type Outcome<T> = std::result::Result<T, locus_guest::Error>;

impl Memory for Guest {
    fn map(&self, frames: &[Frame]) -> Outcome<Box<dyn Window>> {
        self.world.memory.map(frames)
    }
}

impl MemoryMut for Guest {
    fn map_mut(&self, frames: &[Frame]) -> Outcome<Box<dyn WindowMut>> {
        Ok(Box::new(Pages {
            window: self.world.memory.map_mut(frames)?,
            loses_writes: self.loses_writes.get(),
        }))
    }
}

struct Pages {
    window: Box<dyn WindowMut>,
    loses_writes: bool,
}

impl Window for Pages {
    fn read(&self, offset: usize, buf: &mut [u8]) -> Outcome<()> {
        self.window.read(offset, buf)
    }
}

impl WindowMut for Pages {
    fn write(&self, offset: usize, bytes: &[u8]) -> Outcome<()> {
        match self.loses_writes {
            true => Ok(()),
            false => self.window.write(offset, bytes),
        }
    }
}

impl PagesMut for Guest {
    fn write_entry(&self, table: Frame, slot: usize, entry: u64) -> Outcome<()> {
        spend(&self.entries_left)?;
        self.world.memory.set_entry(table, slot, entry);
        Ok(())
    }

    fn pages(&self) -> Outcome<u64> {
        Ok(1 << 16)
    }

    fn has_pages_on_demand(&self) -> Outcome<bool> {
        Ok(false)
    }

    fn spare(&self) -> Outcome<u64> {
        Ok(self.spare.get())
    }

    fn vacant(&self, frames: &[Gfn]) -> Outcome<Vec<bool>> {
        let asked = &mut *self.asked.borrow_mut();
        asked.extend(frames.iter().map(|f| f.0));
        if let Some(&frame) = frames.iter().find(|f| Some(f.0) == self.unmappable.get()) {
            let why = std::io::Error::from_raw_os_error(libc::ENOMEM).to_string();
            return Err(locus_guest::Error::Frame {
                frame: frame.into(),
                why,
            });
        }
        let memory = &self.world.memory;
        Ok(frames.iter().map(|&f| !memory.has(f.into())).collect())
    }

    fn not_own(&self, _: &[Frame]) -> Outcome<Vec<bool>> {
        unreachable!("an arena asks for vacant frames")
    }

    fn populate(&self, frames: &[Gfn]) -> Outcome<()> {
        for &frame in frames {
            spend(&self.frames_left)?;
            assert!(!self.world.memory.has(frame.into()), "{frame} has memory");
            self.world.memory.add(frame.into());
            self.populated.borrow_mut().push(frame.0);
        }
        Ok(())
    }
}

fn refused<T: std::fmt::Debug>(result: Result<T>, class: Class, words: &str) {
    let error = result.unwrap_err();
    assert_eq!(error.class(), class, "{error}");
    assert!(
        error.to_string().contains(words),
        "{error} does not say {words}"
    );
}

const ALL: [Rights; 3] = [Rights::Text, Rights::RoData, Rights::Data];

#[test]
fn added_pages_have_their_rights_and_hold_what_is_written() {
    for kind in [GuestType::Pvh, GuestType::Pv] {
        let guest = Guest::new(kind);
        let mut arena = guest.arena().unwrap();
        assert_eq!(arena.directory, Directory::default());
        guest.add(&mut arena, 1, &ALL).unwrap();
        let at = page_address(2).plus(PAGE_SIZE - 4);
        arena.write(&guest, at, b"in two pages").unwrap();
        let kernel = guest.kernel();
        assert_eq!(kernel.space.read_vec(at, 12).unwrap(), b"in two pages");
        // As a later run sees it: the directory was added too, and is empty.
        let arena = guest.arena().unwrap();
        assert_eq!(arena.directory, Directory::default());
        for (page, rights) in [Rights::RoData].into_iter().chain(ALL).enumerate() {
            assert_eq!(arena.compare(kind, page, rights), None, "page {page}");
        }
        let frames = arena.frames(Range::new(BASE, 4 * PAGE_SIZE)).unwrap();
        let own: HashSet<Frame> = frames.iter().copied().collect();
        assert_eq!(own.len(), 4);
        refused(
            arena.frames(Range::new(page_address(4), 1)),
            Class::Failed,
            "page 4",
        );
        // What is there is not added again.
        let mut again = guest.arena().unwrap();
        guest.add(&mut again, 1, &ALL).unwrap();
        let after = again.frames(Range::new(BASE, 4 * PAGE_SIZE)).unwrap();
        assert_eq!(frames, after);
    }
}

#[test]
fn only_the_kernels_own_page_table_is_the_arenas() {
    let guest = Guest::new(GuestType::Pvh);
    let elsewhere = guest.world.memory.frame();
    guest.world.memory.map_page(FIXMAP, elsewhere, true, false);
    refused(guest.arena(), Class::NotApplicable, TABLE);
    let table = guest.table();
    guest.world.memory.map_page(FIXMAP, table, true, false);
    assert!(guest.arena().is_ok());
}

#[test]
fn without_the_symbol_of_the_kernels_page_table_no_table_is_the_arenas() {
    let world = World::with(GuestType::Pvh, |f| f.symbols.retain(|s| s.2 != TABLE));
    let kernel = Kernel::read(&world.memory, world.kind, &world.vcpus).unwrap();
    refused(Arena::read(&kernel), Class::NotApplicable, TABLE);
}

#[test]
fn entries_that_changed_since_they_were_read_are_not_overwritten() {
    let guest = Guest::new(GuestType::Pvh);
    let mut arena = guest.arena().unwrap();
    guest.add(&mut arena, 0, &[Rights::RoData]).unwrap();
    let foreign = guest.world.memory.frame().0 << 12 | PTE_PRESENT;
    guest.set_entry(3, foreign);
    let added = guest.add(&mut arena, 1, &ALL);
    refused(added, Class::NotApplicable, "meanwhile");
    assert_eq!(guest.entry(3), foreign);
    assert_eq!((guest.entry(1), guest.entry(2)), (0, 0));
    // Read again, it is damage: the directory shows that the arena was there first.
    refused(guest.arena(), Class::Uncertain, "no page of the arena");
}

#[test]
fn entries_of_others_are_no_arena() {
    for page in [0, 3] {
        let guest = Guest::new(GuestType::Pvh);
        let frame = guest.world.memory.frame();
        guest.set_entry(page, frame.0 << 12 | PTE_PRESENT);
        refused(guest.arena(), Class::NotApplicable, "not by xen-locus");
        // A frame that the arena would take, without a directory.
        guest.set_entry(page, 0xfef05 << 12 | PTE_PRESENT);
        guest.world.memory.add(Frame(0xfef05));
        match page {
            0 => assert!(guest.arena().is_ok()),
            _ => refused(guest.arena(), Class::NotApplicable, "is mapped"),
        }
    }
}

#[test]
fn differences_of_an_entry_are_named() {
    let guest = Guest::new(GuestType::Pvh);
    let mut arena = guest.arena().unwrap();
    guest.add(&mut arena, 1, &ALL).unwrap();
    let entry = guest.entry(1);
    for (changed, words) in [
        (entry | locus_guest::space::PTE_WRITE, "writable code"),
        (entry | locus_guest::space::PTE_NX, "read only"),
        (entry | PTE_USER, "for user mode too"),
    ] {
        guest.set_entry(1, changed);
        let found = guest.arena().unwrap();
        let found = found.compare(GuestType::Pvh, 1, Rights::Text).unwrap();
        assert_eq!(found.expected, "code");
        assert_eq!(found.found, format!("{words} (entry {changed:#x})"));
    }
    let none = arena.compare(GuestType::Pvh, 9, Rights::Data).unwrap();
    assert_eq!(none.found, "no page (entry 0x0)");
}

#[test]
fn a_torn_directory_is_the_one_before_and_two_torn_copies_are_uncertain() {
    let guest = Guest::new(GuestType::Pvh);
    let mut arena = guest.committed(&[]);
    guest.add(&mut arena, 1, &ALL).unwrap();
    let slots = vec![slot(1, 3)];
    arena.commit(&guest, &guest.kernel(), slots).unwrap();
    let read = guest.arena().unwrap();
    assert_eq!(read.directory, arena.directory);
    assert_eq!(read.room(GuestType::Pvh), (239, 3));
    assert_eq!(read.room(GuestType::Pv), (95, 3));
    let page = read.frames(Range::new(BASE, 1)).unwrap()[0];
    // Generation 2 is in the first half, generation 1 in the second.
    guest.world.memory.fill(page, 100, &[0xff]);
    let before = guest.arena().unwrap().directory;
    assert_eq!((before.generation, before.slots.len()), (1, 0));
    guest.world.memory.fill(page, record::COPY + 100, &[0xff]);
    refused(guest.arena(), Class::Uncertain, "neither of its copies");
}

#[test]
fn writes_that_do_not_last_are_an_error() {
    let guest = Guest::new(GuestType::Pvh);
    let mut arena = guest.arena().unwrap();
    guest.add(&mut arena, 1, &ALL).unwrap();
    guest.loses_writes.set(true);
    let at = page_address(3);
    refused(
        arena.write(&guest, at, b"lost"),
        Class::Failed,
        &at.to_string(),
    );
    let before = arena.directory.clone();
    let done = arena.commit(&guest, &guest.kernel(), Vec::new());
    assert_eq!(done.unwrap_err().class(), Class::Failed);
    assert_eq!(arena.directory, before);
    // There is no page to write to.
    refused(
        arena.write(&guest, page_address(9), b"x"),
        Class::Failed,
        "not there",
    );
}

#[test]
fn a_directory_that_claims_what_is_not_there_is_uncertain() {
    for slots in [
        vec![slot(0, 1)],
        vec![slot(3, 2)],
        vec![slot(1, 2), slot(2, 1)],
        vec![slot(510, 2)],
    ] {
        let guest = Guest::new(GuestType::Pvh);
        let mut arena = guest.committed(&[]);
        guest.add(&mut arena, 1, &ALL).unwrap();
        arena.commit(&guest, &guest.kernel(), slots).unwrap();
        refused(guest.arena(), Class::Uncertain, "directory is damaged");
    }
}

#[test]
fn a_record_that_is_not_as_the_directory_says_is_uncertain() {
    for (offset, len, words) in [
        (3 * 4096, 1, "does not fit its pages"),
        (0, u32::MAX, "does not fit its pages"),
        (0, 16, "another digest"),
    ] {
        let guest = Guest::new(GuestType::Pvh);
        let mut arena = guest.committed(&[]);
        guest.add(&mut arena, 1, &ALL).unwrap();
        let damaged = Slot {
            record_offset: offset,
            record_len: len,
            ..slot(1, 3)
        };
        let kernel = guest.kernel();
        arena.commit(&guest, &kernel, vec![damaged]).unwrap();
        let read = guest.arena().unwrap();
        refused(read.residents(&guest.kernel()), Class::Uncertain, words);
    }
}

#[test]
fn entries_without_the_memory_that_they_lead_to_are_a_lost_arena() {
    for lost in [0, 2] {
        let guest = Guest::new(GuestType::Pvh);
        let mut arena = guest.committed(&[]);
        guest.add(&mut arena, 1, &ALL).unwrap();
        let slots = vec![Slot {
            record_offset: 4096,
            record_len: 16,
            ..slot(1, 3)
        }];
        arena.commit(&guest, &guest.kernel(), slots).unwrap();
        let frame = arena.frame(lost).unwrap();
        guest.world.memory.take(frame);
        let read = guest.arena().and_then(|a| a.residents(&guest.kernel()));
        let error = read.unwrap_err();
        assert!(error.is_arena_lost(), "{error}");
        assert_eq!(error.class(), Class::NotApplicable);
        assert!(error.to_string().contains("reboot it now"), "{error}");
        // The entries stay, so nothing new is put behind them.
        assert_ne!(guest.entry(lost), 0);
        assert!(!guest.world.memory.has(frame));
    }
}
