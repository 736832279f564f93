//! All mapped ranges of an address space, with their rights.

use super::walk::{entries, frame_in, is_leaf, slot, span, ENTRIES};
use super::{Space, PTE_NX, PTE_PRESENT, PTE_WRITE};
use crate::addr::{Frame, Gva, Range, PAGE_LEN};
use crate::Error;

/// Units of the budget for looking at all entries of a table.
const TABLE: u64 = 16;
/// Units of the budget for a region that was found. Regions are kept, so they must not be many.
const REGION: u64 = 64;

/// A range of mapped addresses with equal rights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// The guest virtual addresses, whole pages except where the range asked for begins or ends.
    pub range: Range,
    /// True if the entries of all levels allow writing.
    pub writable: bool,
    /// True if no entry of any level forbids execution.
    pub executable: bool,
}

impl Space<'_> {
    /// The regions in `range`, by rising address. Three things count as not mapped: what lies below
    /// a table that can't be read, all that is left when the budget is spent, and what lies farther
    /// from the start than the root maps.
    #[must_use]
    pub fn regions(&self, range: Range) -> Vec<Region> {
        let mut found = Vec::new();
        let rights = Region {
            range,
            writable: true,
            executable: true,
        };
        // Only the budget can fail, and then the next access reports it.
        let _ = self.regions_below(self.root, self.levels, rights, &mut found);
        found
    }

    /// Adds the regions of `above.range`, which one table of `level` maps, with at most the rights
    /// of `above`.
    fn regions_below(
        &self,
        table: Frame,
        level: u8,
        above: Region,
        found: &mut Vec<Region>,
    ) -> Result<(), Error> {
        self.budget.spend(TABLE)?;
        let mut bytes = [0u8; PAGE_LEN];
        let read = self
            .window(table)
            .and_then(|window| window.read(0, &mut bytes));
        if read.is_err() {
            return self.budget.check();
        }
        self.budget.count_copied(PAGE_LEN);
        let mut at = above.range.start;
        let mut parts = Vec::new();
        // A range may begin in the middle of the table, and the root's may be longer than the table.
        let in_order = entries(&bytes).cycle().skip(slot(at, level));
        for entry in in_order.take(ENTRIES) {
            if at >= above.range.end {
                break;
            }
            let last = Gva(at.0 | (span(level) - 1));
            let end = last.0.checked_add(1).map_or(above.range.end, Gva);
            let here = Region {
                range: Range {
                    start: at,
                    end: end.min(above.range.end),
                },
                writable: above.writable && entry & PTE_WRITE != 0,
                executable: above.executable && entry & PTE_NX == 0,
            };
            at = end;
            if entry & PTE_PRESENT != 0 {
                parts.push((here, entry));
            }
        }
        let tables = parts.iter().filter(|(_, entry)| !is_leaf(*entry, level));
        self.map_together(tables.map(|&(_, entry)| frame_in(entry)).collect());
        for (here, entry) in parts {
            if is_leaf(entry, level) {
                self.add_region(here, found)?;
            } else {
                self.regions_below(frame_in(entry), level - 1, here, found)?;
            }
        }
        Ok(())
    }

    fn add_region(&self, here: Region, found: &mut Vec<Region>) -> Result<(), Error> {
        if let Some(last) = found.last_mut() {
            let rights = |r: &Region| (r.writable, r.executable);
            if last.range.end == here.range.start && rights(last) == rights(&here) {
                last.range.end = here.range.end;
                return Ok(());
            }
        }
        self.budget.spend(REGION)?;
        found.push(here);
        Ok(())
    }
}
