//! The mock guest moves what is to be written elsewhere.

use locus_guest::addr::Frame;
use locus_guest::space::Trail;
use locus_guest::space::{PTE_FRAME, PTE_PRESENT};

use super::super::write::write_all;
use super::*;
use crate::arena::BASE;

/// What nobody but the guest may write.
const OWN: [u8; 8] = *b"its own.";

/// A frame of the guest's own.
fn own(guest: &Guest) -> Frame {
    let frame = guest.world.memory.frame();
    guest.world.memory.fill(frame, 0, &OWN);
    frame
}

fn is_own(guest: &Guest, frame: Frame) -> bool {
    let mut page = vec![0; locus_guest::addr::PAGE_LEN];
    let window = guest.world.memory.map(&[frame]).unwrap();
    window.read(0, &mut page).unwrap();
    page.starts_with(&OWN) && page[OWN.len()..].iter().all(|&b| b == 0)
}

/// Makes arena page `page` lead to `frame`.
fn lead(guest: &Guest, page: u64, frame: Frame) {
    let at = BASE.plus(page * locus_guest::addr::PAGE_SIZE);
    let (table, slot, entry) = guest.kernel().space.entry_slot(at, 1).unwrap();
    let entry = (entry & !PTE_FRAME) | PTE_PRESENT | frame.0 << 12;
    guest.world.memory.set_entry(table, slot, entry);
}

#[test]
fn addresses_of_the_arena_that_the_guest_uses_are_left_alone() {
    for page in [0, 1, 7] {
        let guest = Guest::new();
        let frame = own(&guest);
        lead(&guest, page, frame);
        let error = guest.apply(&payload("one", &[A]), Mode::Apply).unwrap_err();
        assert_eq!(error.exit_code(), ExitCode::NotApplicable, "{error}");
        assert!(error.to_string().contains("not by xen-locus"), "{error}");
        assert!(is_own(&guest, frame), "page {page} was written");
    }
}

#[test]
fn nothing_is_written_where_a_page_of_the_arena_leads_elsewhere() {
    let guest = Guest::new();
    guest.applied(&payload("one", &[A]));
    let before = Arena::read(&guest.kernel()).unwrap();
    let first = BASE.plus(locus_guest::addr::PAGE_SIZE);
    let frames = before
        .frames(locus_guest::addr::Range::new(first, 1))
        .unwrap();
    // Its own page, and one of ours twice.
    for frame in [own(&guest), Frame(frames[0].0 + 1)] {
        lead(&guest, 1, frame);
        for error in [
            guest.status().unwrap_err(),
            guest.revert("one").unwrap_err(),
            guest.apply(&payload("two", &[B]), Mode::Apply).unwrap_err(),
        ] {
            assert_eq!(error.exit_code(), ExitCode::Uncertain, "{error}");
            assert!(
                error.to_string().contains("no page of the arena"),
                "{error}"
            );
        }
    }
    lead(&guest, 1, frames[0]);
    assert_eq!(guest.runs(), ["one", "", ""]);
    guest.revert("one").unwrap();
}

#[test]
fn a_page_that_moves_before_the_guest_is_paused_is_not_written() {
    let guest = Guest::new();
    let kernel = guest.kernel();
    let at = Gva(FUNCTIONS[A].1);
    let mut trail = Trail::default();
    let frames = kernel.space.trace(at, 5, &mut trail).unwrap();
    assert_eq!(frames, kernel.space.frames(at, 5).unwrap());
    assert!(trail.holds().unwrap());
    let (table, slot, entry) = kernel.space.entry_slot(at, 1).unwrap();
    let copy = guest.world.memory.frame();
    for other in [entry & !PTE_PRESENT, (entry & !PTE_FRAME) | copy.0 << 12] {
        guest.world.memory.set_entry(table, slot, other);
        assert!(!trail.holds().unwrap());
        let error = write_all(&[], &trail, || panic!("it began")).unwrap_err();
        assert_eq!(error.exit_code(), ExitCode::TryAgain, "{error}");
    }
    // What the processor notes in an entry is no move.
    guest.world.memory.set_entry(table, slot, entry ^ 0x60);
    assert!(trail.holds().unwrap());
}

#[test]
fn a_directory_that_was_changed_too_often_to_count_is_uncertain() {
    let guest = Guest::new();
    guest.applied(&payload("one", &[A]));
    let arena = Arena::read(&guest.kernel()).unwrap();
    let directory = crate::arena::record::Directory {
        generation: u64::MAX,
        ..arena.directory.clone()
    };
    let (at, copy) = directory.encode();
    let frames = arena
        .frames(locus_guest::addr::Range::new(BASE, 1))
        .unwrap();
    guest.world.memory.fill(frames[0], at, &copy);
    let error = guest.revert("one").unwrap_err();
    assert_eq!(error.exit_code(), ExitCode::Uncertain, "{error}");
    assert_eq!(guest.runs(), ["one", "", ""]);
}
