//! What reading one guest may cost.
//!
//! Everything that is read from a guest goes through page tables that the guest wrote, follows pointers
//! that it chose, and is as long as it says. Lists that never end, counts of 2^32, tables that map one
//! page everywhere: each makes a reader touch more and more pages. So the pages touched are counted in
//! one place, and a guest that needs more than any honest one is refused. The limits of single subjects
//! (most tasks, most symbols) say what is accepted. The budget says when to stop.
//!
//! One unit is about a tenth of a microsecond on current hardware, so that the smallest budget is spent in
//! less than a second, and the largest in less than four.

use std::cell::Cell;
use std::rc::Rc;

use crate::Error;

/// Units of the smallest budget. To read 24 MiB and look through all of it costs 350,000 units. To list a
/// thread with three pages of its own costs some 200, so that 40,000 threads can be listed.
pub const LIMIT: u64 = 8 << 20;
/// Units that are added for each page of the guest's memory: a thread takes at least six pages, of which four are
/// its stack.
const UNITS_PER_PAGE: u64 = 32;
/// Most units that are added: as many as 131,072 threads cost, and no more threads are listed.
const MORE_MAX: u64 = 200 << 17;
/// Units of one page-table walk.
pub const WALK: u64 = 1;
/// Units of mapping frames of the guest by one call, and of unmapping them.
pub const MAP: u64 = 32;
/// Units of each page that is mapped, and of copying it.
pub const PAGE: u64 = 16;
/// Bytes that can be looked at, one by one, for one unit.
pub const BYTES_PER_UNIT: u64 = 100;

/// A budget. Its clones share the units: everything that reads one guest for one command has a clone.
#[derive(Clone, Debug)]
pub struct Budget {
    left: Rc<Cell<u64>>,
    copied: Rc<Cell<u64>>,
    limit: u64,
}

impl Default for Budget {
    fn default() -> Budget {
        Budget::of(LIMIT)
    }
}

impl Budget {
    /// A budget of `limit` units.
    #[must_use]
    pub fn of(limit: u64) -> Budget {
        Budget {
            left: Rc::new(Cell::new(limit)),
            copied: Rc::default(),
            limit,
        }
    }

    /// The budget for reading a guest that has `pages` pages of 4 KiB. The hypervisor says how many, not the guest.
    #[must_use]
    pub fn for_pages(pages: u64) -> Budget {
        Budget::of(LIMIT + pages.saturating_mul(UNITS_PER_PAGE).min(MORE_MAX))
    }

    /// Units of the whole budget.
    #[must_use]
    pub fn limit(&self) -> u64 {
        self.limit
    }

    /// Takes `units` from the budget.
    ///
    /// # Errors
    /// [`Error::Exhausted`] if fewer are left. Then none are left, and every later call fails too.
    pub fn spend(&self, units: u64) -> Result<(), Error> {
        let left = self.left.get().checked_sub(units);
        self.left.set(left.unwrap_or_default());
        left.map(|_| ()).ok_or(Error::Exhausted)
    }

    /// Adds `len` to the bytes that were copied out of the guest. Takes no units.
    pub fn count_copied(&self, len: usize) {
        self.copied.set(self.copied.get() + len as u64);
    }

    /// Bytes copied out of the guest so far.
    #[must_use]
    pub fn copied(&self) -> u64 {
        self.copied.get()
    }

    /// Takes the units for looking at each of `len` bytes.
    ///
    /// # Errors
    /// As [`Budget::spend`].
    pub fn scan(&self, len: usize) -> Result<(), Error> {
        self.spend(len as u64 / BYTES_PER_UNIT)
    }

    /// Checks that some units are left.
    ///
    /// # Errors
    /// [`Error::Exhausted`] if not.
    pub fn check(&self) -> Result<(), Error> {
        if self.left.get() == 0 {
            return Err(Error::Exhausted);
        }
        Ok(())
    }

    /// Units spent since the start or the last [`Budget::refill`].
    #[must_use]
    pub fn spent(&self) -> u64 {
        self.limit - self.left.get()
    }

    /// Makes the budget whole again, for work that is repeated until a deadline: once a round.
    ///
    /// # Errors
    /// As [`Budget::check`]: it stays spent, because what was read last may be incomplete, with nobody told.
    pub fn refill(&self) -> Result<(), Error> {
        self.check()?;
        self.renew();
        Ok(())
    }

    /// The same, spent or not: for one who has just said, as an error, that it was spent.
    pub fn renew(&self) {
        self.left.set(self.limit);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_budget_that_was_overdrawn_stays_empty_until_it_is_refilled() {
        let budget = Budget::of(10);
        let same = budget.clone();
        budget.spend(6).unwrap();
        assert_eq!(same.spent(), 6);
        assert!(matches!(same.spend(5), Err(Error::Exhausted)));
        assert!(budget.check().is_err());
        assert!(budget.spend(1).is_err());
        assert!(budget.refill().is_err(), "what was spent is not forgotten");
        assert!(budget.check().is_err());
        budget.renew();
        same.spend(9).unwrap();
        same.refill().unwrap();
        same.spend(10).unwrap();
    }

    #[test]
    fn as_many_threads_as_fit_into_a_guest_s_memory_can_be_listed() {
        const THREAD: u64 = 200;
        for gib in [1, 2, 3, 8, 512] {
            let pages: u64 = gib << 18;
            let threads = (pages / 7).min(1 << 17);
            assert!(Budget::for_pages(pages).limit() > THREAD * threads, "{gib}");
        }
        assert_eq!(Budget::for_pages(u64::MAX).limit(), LIMIT + MORE_MAX);
    }
}
