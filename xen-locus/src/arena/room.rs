//! How much room there is in an arena, and where.

use locus_guest::{GuestType, PagesMut};
use serde::Serialize;

use super::memory::{self, capacity};
use super::record::{self, Slot, State};
use super::{full, pages_of, Arena, PAGES};
use crate::error::{Error, Result};

/// How full an arena is: numbers of pages for payloads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Usage {
    /// All that there can be.
    pub pages: usize,
    /// In use, by parked payloads too.
    pub used: usize,
    /// Of these, of parked payloads.
    pub parked: usize,
    /// Not in use.
    pub free: usize,
}

impl Arena {
    /// How many pages payloads can have in a guest of this type, and how many they use, parked ones included.
    #[must_use]
    pub fn room(&self, kind: GuestType) -> (usize, usize) {
        (capacity(kind) - 1, self.pages(|_| true))
    }

    /// How full it is in a guest of this type.
    #[must_use]
    pub fn usage(&self, kind: GuestType) -> Usage {
        let (pages, used) = self.room(kind);
        Usage {
            pages,
            used,
            parked: self.parked(),
            free: pages.saturating_sub(used),
        }
    }

    /// How many pages parked payloads have.
    #[must_use]
    pub fn parked(&self) -> usize {
        self.pages(|slot| slot.state == State::Parked)
    }

    /// What to say when less than a fifth of the pages, or of the places for payloads, is free.
    #[must_use]
    pub fn little_room(&self, kind: GuestType) -> Option<String> {
        let (room, used) = self.room(kind);
        let payloads = self.directory.slots.len();
        let is_little = |all: usize, used: usize| all.saturating_sub(used) < all.div_ceil(5);
        let some = is_little(room, used) || is_little(record::ENTRIES_MAX, payloads);
        some.then(|| {
            format!(
                "the arena is nearly full: payloads use {used} of {room} pages, and there are {payloads} of at most {}{}",
                record::ENTRIES_MAX,
                self.advice()
            )
        })
    }

    fn pages(&self, which: impl Fn(&Slot) -> bool) -> usize {
        let slots = self.directory.slots.iter().filter(|slot| which(slot));
        slots.map(|slot| usize::from(slot.pages)).sum()
    }

    /// The first run of so many pages that belong to no payload. They are empty, or were left behind by a run that was
    /// ended early or by a payload that was reclaimed.
    ///
    /// # Errors
    /// [`Class::NotApplicable`](crate::error::Class::NotApplicable): there are too few pages in one run, or the
    /// directory is full.
    pub fn find_room(&self, kind: GuestType, count: usize) -> Result<usize> {
        if self.directory.slots.len() >= record::ENTRIES_MAX {
            return Err(full());
        }
        let mut owned = [false; PAGES];
        for page in self.directory.slots.iter().flat_map(pages_of) {
            if let Some(owned) = owned.get_mut(page) {
                *owned = true;
            }
        }
        let last = capacity(kind).saturating_sub(count.saturating_sub(1));
        (1..last)
            .find(|&first| {
                let run = owned.get(first..first.saturating_add(count));
                run.is_some_and(|run| !run.contains(&true))
            })
            .ok_or_else(|| {
                let (room, used) = self.room(kind);
                Error::not_applicable(format!(
                    "the payload needs {count} arena pages in one run; this {kind} guest has {room}, of \
                     which payloads, parked ones included, use {used}{}",
                    self.advice()
                ))
            })
    }

    /// What to do about a lack of room, as the end of a sentence.
    fn advice(&self) -> String {
        match self.parked() {
            0 => String::new(),
            parked => format!(
                "; {parked} of the pages are of reverted payloads: `xen-locus reclaim` gives them back"
            ),
        }
    }

    /// Refuses `count` pages from number `first` on, and a directory, if the guest can't be given the memory that they
    /// need.
    ///
    /// # Errors
    /// [`Class::NotApplicable`](crate::error::Class::NotApplicable); or the back end can't tell.
    pub fn check_memory(
        &self,
        guest: &dyn PagesMut,
        kind: GuestType,
        (first, count): (usize, usize),
    ) -> Result<()> {
        let pages = std::iter::once(0).chain(first..first.saturating_add(count));
        let missing = pages.filter(|&page| self.frame(page).is_none()).count();
        let mut unfilled = self.unfilled(0, 1);
        unfilled.extend(self.unfilled(first, count));
        let unfilled = memory::without_memory(guest, kind, &unfilled)?.len();
        let left = match missing {
            0 => 0,
            _ => memory::left_behind(guest, kind, &self.own_frames().collect())?.len(),
        };
        memory::check_spare(guest, kind, missing.saturating_sub(left) + unfilled)
    }
}
