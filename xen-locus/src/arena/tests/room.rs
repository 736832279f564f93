//! The memory that an arena gets, and the room in it.

use locus_guest::budget::Budget;
use locus_kernel::btf::blob::Blob;
use locus_kernel::fixture::renewed;

use super::*;

#[test]
fn frames_that_have_memory_are_not_taken() {
    let guest = Guest::new(GuestType::Pvh);
    guest.world.memory.add(Frame(0xfe700));
    guest.world.memory.add(Frame(0xfe702));
    let mut arena = guest.arena().unwrap();
    guest.add(&mut arena, 0, &[Rights::RoData; 3]).unwrap();
    assert_eq!(*guest.populated.borrow(), [0xfe701, 0xfe703, 0xfe704]);
}

#[test]
fn a_frame_that_cant_be_looked_at_is_not_taken_for_one_without_memory() {
    let guest = Guest::new(GuestType::Pvh);
    guest.unmappable.set(Some(0xfe703));
    let mut arena = guest.arena().unwrap();
    let added = guest.add(&mut arena, 0, &[Rights::RoData; 3]);
    refused(added, Class::Failed, "0xfe703");
    assert_eq!(*guest.populated.borrow(), [0; 0]);
    assert_eq!(guest.entry(0), 0);
}

#[test]
fn the_arenas_own_frames_are_not_asked_for() {
    let guest = Guest::new(GuestType::Pvh);
    let mut arena = guest.arena().unwrap();
    guest.add(&mut arena, 0, &[Rights::RoData; 3]).unwrap();
    arena.commit(&guest, &guest.kernel(), Vec::new()).unwrap();
    guest.asked.borrow_mut().clear();
    // A page of it that could not be mapped any more would be replaced by an empty one.
    guest.unmappable.set(Some(0xfe701));
    let mut arena = guest.arena().unwrap();
    guest.add(&mut arena, 3, &ALL).unwrap();
    assert!(guest
        .asked
        .borrow()
        .iter()
        .all(|f| !(0xfe700..0xfe703).contains(f)));
    assert_eq!(guest.populated.borrow()[3..], [0xfe703, 0xfe704, 0xfe705]);
}

/// Adds four pages, after which the arena has as many frames as pages, all of them with memory.
fn goes_on_with_what_was_left(guest: &Guest) {
    guest.entries_left.set(usize::MAX);
    guest.frames_left.set(usize::MAX);
    let mut arena = guest.arena().unwrap();
    arena.check_memory(guest, GuestType::Pvh, (1, 3)).unwrap();
    guest.add(&mut arena, 1, &ALL).unwrap();
    arena.commit(guest, &guest.kernel(), Vec::new()).unwrap();
    arena.write(guest, page_address(3), b"there").unwrap();
    let mut populated = guest.populated.borrow().clone();
    populated.sort_unstable();
    let mut own: Vec<u64> = guest.arena().unwrap().own_frames().map(|f| f.0).collect();
    own.sort_unstable();
    assert_eq!(populated, own);
    assert_eq!(own.len(), 4);
}

#[test]
fn a_frame_gets_memory_only_when_an_entry_leads_to_it() {
    for entries in 0..4 {
        let guest = Guest::new(GuestType::Pvh);
        for _ in 0..20 {
            guest.entries_left.set(0);
            let mut arena = guest.arena().unwrap();
            guest.add(&mut arena, 1, &ALL).unwrap_err();
        }
        guest.entries_left.set(entries);
        let mut arena = guest.arena().unwrap();
        let _ = guest.add(&mut arena, 1, &ALL);
        assert_eq!(guest.populated.borrow().len(), usize::from(entries > 0));
        goes_on_with_what_was_left(&guest);
    }
}

#[test]
fn what_lacks_memory_since_an_earlier_run_ended_gets_it() {
    for frames in 0..4 {
        let guest = Guest::new(GuestType::Pvh);
        guest.frames_left.set(frames);
        for _ in 0..20 {
            let mut arena = guest.arena().unwrap();
            guest.add(&mut arena, 1, &ALL).unwrap_err();
        }
        assert_eq!(guest.populated.borrow().len(), frames);
        // It counts as memory that the guest must be given yet.
        guest.spare.set(3 - frames as u64);
        let arena = guest.arena().unwrap();
        let check = arena.check_memory(&guest, GuestType::Pvh, (1, 3));
        let words = format!("needs {} more pages", 4 - frames);
        refused(check, Class::NotApplicable, &words);
        guest.spare.set(4 - frames as u64);
        goes_on_with_what_was_left(&guest);
    }
}

#[test]
fn memory_that_the_guest_populated_itself_is_never_the_arenas() {
    let guest = Guest::new(GuestType::Pvh);
    for frame in 0xfe700..0xfe710 {
        guest.world.memory.add(Frame(frame));
    }
    // Even if it looks like a page of the arena.
    let (at, bytes) = Directory::default().encode();
    guest.world.memory.fill(Frame(0xfe700), at, &bytes);
    guest.frames_left.set(2);
    let mut arena = guest.arena().unwrap();
    guest.add(&mut arena, 1, &ALL).unwrap_err();
    goes_on_with_what_was_left(&guest);
    assert!(guest.populated.borrow().iter().all(|f| *f >= 0xfe710));
}

/// The guest's kernel starts another one, whose page table of the arena is empty.
fn kexec(guest: &Guest) {
    (0..PAGES).for_each(|page| guest.set_entry(page, 0));
}

/// A new kernel's arena of four pages, as one that was there before. Returns its frames.
fn four_pages(guest: &Guest) -> HashSet<Frame> {
    let mut arena = guest.committed(&[]);
    let before = arena.own_frames().count();
    assert!(arena.check_memory(guest, GuestType::Pvh, (1, 3)).is_ok());
    guest.add(&mut arena, 1, &ALL).unwrap();
    let kernel = guest.kernel();
    arena.commit(guest, &kernel, vec![slot(1, 3)]).unwrap();
    assert_eq!((before, arena.own_frames().count()), (1, 4));
    arena.own_frames().collect()
}

#[test]
fn what_the_arena_of_an_earlier_kernel_left_is_taken_first_and_blank() {
    let guest = Guest::new(GuestType::Pvh);
    // The guest's own, one of them in the middle.
    for frame in [0xfe700, 0xfe703] {
        guest.world.memory.add(Frame(frame));
        guest.world.memory.fill(Frame(frame), 100, b"mine");
    }
    let first = four_pages(&guest);
    let arena = guest.arena().unwrap();
    arena.write(&guest, page_address(3), b"a word").unwrap();
    guest.spare.set(0);
    for _ in 0..20 {
        kexec(&guest);
        assert_eq!(four_pages(&guest), first);
        let kernel = guest.kernel();
        for page in 1..4 {
            let bytes = kernel.space.read_vec(page_address(page), PAGE_LEN);
            assert_eq!(bytes.unwrap(), [0; PAGE_LEN]);
        }
    }
    assert_eq!(guest.populated.borrow().len(), 4);
    for frame in [0xfe700, 0xfe703] {
        let mut mine = [0; 4];
        let window = guest.world.memory.map(&[Frame(frame)]).unwrap();
        window.read(100, &mut mine).unwrap();
        assert_eq!(&mine, b"mine");
    }
}

#[test]
fn what_an_earlier_kernel_left_is_not_lost_by_runs_that_are_ended() {
    let guest = Guest::new(GuestType::Pvh);
    let first = four_pages(&guest);
    kexec(&guest);
    guest.spare.set(0);
    for entries in [0, 1, 1, 1, 0] {
        guest.entries_left.set(entries);
        let mut arena = guest.arena().unwrap();
        let _ = guest.add(&mut arena, 1, &ALL);
    }
    guest.entries_left.set(usize::MAX);
    let mut arena = guest.arena().unwrap();
    guest.add(&mut arena, 1, &ALL).unwrap();
    assert_eq!(arena.own_frames().collect::<HashSet<_>>(), first);
    assert_eq!(guest.arena().unwrap().directory, Directory::default());
}

#[test]
fn only_a_whole_directory_tells_what_an_earlier_kernel_left() {
    let guest = Guest::new(GuestType::Pvh);
    let first = four_pages(&guest);
    let page = guest.arena().unwrap().frames(Range::new(BASE, 1)).unwrap()[0];
    guest.world.memory.fill(page, 100, &[0xff]);
    guest.world.memory.fill(page, record::COPY + 100, &[0xff]);
    kexec(&guest);
    assert!(four_pages(&guest).is_disjoint(&first));
    // A directory of an earlier build lists none.
    let listed = Directory {
        frames: [0; 4],
        ..guest.arena().unwrap().directory
    };
    let (at, bytes) = listed.encode();
    let page = guest.arena().unwrap().frames(Range::new(BASE, 1)).unwrap()[0];
    guest.world.memory.fill(page, 0, &[0; PAGE_LEN]);
    guest.world.memory.fill(page, at, &bytes);
    let second: HashSet<Frame> = guest.arena().unwrap().own_frames().collect();
    kexec(&guest);
    assert!(four_pages(&guest).is_disjoint(&second));
}

#[test]
fn a_directory_without_memory_is_lost_where_other_pages_have_some() {
    let guest = Guest::new(GuestType::Pvh);
    guest.set_entry(0, 0xfe700 << 12 | PTE_PRESENT);
    assert_eq!(guest.arena().unwrap().directory, Directory::default());
    guest.set_entry(1, 0xfe701 << 12 | PTE_PRESENT);
    assert_eq!(guest.arena().unwrap().directory, Directory::default());
    guest.world.memory.add(Frame(0xfe701));
    refused(guest.arena(), Class::NotApplicable, "reboot it now");
}

#[test]
fn a_directory_page_that_a_debug_build_of_xen_filled_is_blank() {
    let guest = Guest::new(GuestType::Pvh);
    guest.set_entry(0, 0xfe700 << 12 | PTE_PRESENT);
    guest.world.memory.add(Frame(0xfe700));
    guest
        .world
        .memory
        .fill(Frame(0xfe700), 0, &[0xc2; PAGE_LEN]);
    let mut arena = guest.arena().unwrap();
    assert_eq!(arena.directory, Directory::default());
    arena.commit(&guest, &guest.kernel(), Vec::new()).unwrap();
    assert_eq!(guest.arena().unwrap().directory.generation, 1);
}

#[test]
fn an_arena_at_the_frames_of_earlier_builds_is_read_and_goes_on_in_the_first_window() {
    let guest = Guest::new(GuestType::Pvh);
    for (page, frame) in [(0, 0xfef00), (1, 0xfef01), (2, 0xfe000)] {
        guest.world.memory.add(Frame(frame));
        guest.set_entry(page, rights::entry_for(Frame(frame), Rights::RoData));
    }
    let mut arena = guest.arena().unwrap();
    guest.add(&mut arena, 3, &ALL).unwrap();
    assert_eq!(*guest.populated.borrow(), [0xfe700, 0xfe701, 0xfe702]);
    assert!(guest.arena().is_ok());
}

#[test]
fn more_memory_than_a_restored_guest_gets_is_not_taken() {
    let guest = Guest::new(GuestType::Pvh);
    let mut arena = guest.arena().unwrap();
    guest.spare.set(3);
    let words = "needs 4 more pages of memory, and this pvh guest may be given 3";
    let all = (1, 3);
    refused(
        arena.check_memory(&guest, GuestType::Pvh, all),
        Class::NotApplicable,
        words,
    );
    arena.check_memory(&guest, GuestType::Pv, all).unwrap();
    arena.check_memory(&guest, GuestType::Pvh, (1, 2)).unwrap();
    guest.add(&mut arena, 1, &ALL[..1]).unwrap();
    guest.spare.set(1);
    let words = "needs 2 more pages of memory, and this pvh guest may be given 1";
    refused(guest.add(&mut arena, 1, &ALL), Class::NotApplicable, words);
    assert_eq!(guest.populated.borrow().len(), 2);
    // What is there already is not counted.
    arena.check_memory(&guest, GuestType::Pvh, (1, 2)).unwrap();
}

#[test]
fn frames_that_the_memory_map_calls_ram_are_refused() {
    for (kind, start) in [(GuestType::Pvh, 0xfe70_1000), (GuestType::Pv, 0xa_1000)] {
        let guest = Guest::with(kind, &[(start, 0x1000)]);
        let mut arena = guest.arena().unwrap();
        let added = guest.add(&mut arena, 0, &[Rights::RoData]);
        refused(added, Class::NotApplicable, "usable RAM");
        assert_eq!(guest.entry(0), 0);
    }
}

#[test]
fn a_low_page_that_the_guest_uses_is_left_alone() {
    let guest = Guest::new(GuestType::Pv);
    let mut arena = guest.arena().unwrap();
    guest.add(&mut arena, 0, &[Rights::RoData]).unwrap();
    let frame = guest.kernel().space.walk(LOW.plus(2 * PAGE_SIZE));
    guest.world.memory.fill(frame.unwrap().frame, 100, b"mine");
    let added = guest.add(&mut arena, 1, &ALL);
    refused(added, Class::NotApplicable, "page frame 0xa2");
    assert_eq!((1..4).map(|page| guest.entry(page)).sum::<u64>(), 0);
}

#[test]
fn room_is_the_first_run_that_is_free_or_was_left_behind() {
    let guest = Guest::new(GuestType::Pvh);
    let mut arena = guest.committed(&[]);
    guest.add(&mut arena, 1, &ALL).unwrap();
    let kernel = guest.kernel();
    arena.commit(&guest, &kernel, vec![slot(1, 3)]).unwrap();
    let find = |arena: &Arena, count| arena.find_room(GuestType::Pvh, count);
    assert_eq!(find(&arena, 3).unwrap(), 4);
    // Left behind by a run that was ended: taken again, and with other rights.
    guest.add(&mut arena, 4, &ALL).unwrap();
    let frames = arena
        .frames(Range::new(page_address(4), 3 * PAGE_SIZE))
        .unwrap();
    assert_eq!(find(&arena, 3).unwrap(), 4);
    let turned = [Rights::Data, Rights::Text, Rights::RoData];
    guest.add(&mut arena, 4, &turned).unwrap();
    let mut read = guest.arena().unwrap();
    for (page, rights) in (4..).zip(turned) {
        assert_eq!(read.compare(GuestType::Pvh, page, rights), None);
    }
    let after = read
        .frames(Range::new(page_address(4), 3 * PAGE_SIZE))
        .unwrap();
    assert_eq!(frames, after);
    // To the last page and no further.
    assert_eq!(find(&read, 236).unwrap(), 4);
    refused(
        find(&read, 237),
        Class::NotApplicable,
        "this pvh guest has 239, of which payloads, parked ones included, use 3",
    );
    let pv = read.find_room(GuestType::Pv, 93);
    refused(pv, Class::NotApplicable, "pv guest has 95");
    assert_eq!(read.little_room(GuestType::Pv), None);
    read.directory.slots = vec![slot(1, 77)];
    let said = read.little_room(GuestType::Pv).unwrap();
    assert!(
        said.contains("use 77 of 95 pages") && !said.contains("reclaim"),
        "{said}"
    );
    read.directory.slots = vec![slot(1, 0); 25];
    let said = read.little_room(GuestType::Pvh).unwrap();
    assert!(said.contains("there are 25 of at most 31"), "{said}");
    read.directory.slots = vec![slot(1, 3)];
    read.directory.slots[0].state = State::Parked;
    refused(
        find(&read, 237),
        Class::NotApplicable,
        "3 of the pages are of reverted payloads: `xen-locus reclaim`",
    );
    arena.directory.slots = vec![slot(1, 1); record::ENTRIES_MAX];
    refused(find(&arena, 3), Class::NotApplicable, "directory is full");
    let slots = vec![slot(1, 1); record::ENTRIES_MAX + 1];
    let full = arena.commit(&guest, &kernel, slots);
    refused(full, Class::NotApplicable, "directory is full");
}

#[test]
fn a_memory_map_of_another_form_is_not_read() {
    for (entry, words) in [
        (24, "the end of its e820_table is at the offset 24"),
        (20, ""),
    ] {
        let guest = Guest::new(GuestType::Pvh);
        let mut types = Blob::with_integers();
        let members = [("addr", 4, 0), ("size", 4, 8), ("type", 3, 16)];
        types.structure("e820_entry", entry, &members);
        let kernel = guest.kernel();
        let kernel = renewed(&kernel, &types.bytes(), Budget::default()).unwrap();
        let checked = memory::check_not_ram(&kernel, 0, 1);
        match words {
            "" => checked.unwrap(),
            words => refused(checked, Class::NotApplicable, words),
        }
    }
}
