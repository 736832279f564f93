//! The arena: pages of xen-locus in the guest, without an allocation in the guest.
//!
//! The last-level page table behind the vsyscall page belongs to the kernel image
//! (`level1_fixmap_pgt`, arch/x86/kernel/head_64.S). Its other 511 entries, from
//! `0xffffffffff601000` to `0xffffffffff7fffff`, are empty, are seen by every kernel page table,
//! and lie within 2 GiB of kernel text and modules. The memory behind them is in the head of `memory.rs`.
//!
//! An entry that leads to another page than these is foreign, and nothing is written there.
//!
//! Page `i` of the arena is the page at `BASE + i * 4096`. Page 0 is the directory ([`record`]).

use std::collections::HashSet;

use locus_guest::addr::{Frame, Gva, Range, PAGE_LEN, PAGE_SIZE};
use locus_guest::{fetch, GuestType, PagesMut};
use locus_kernel::modules::ModuleReader;
use locus_kernel::Kernel;

use self::memory::{LowPages, PV_PAGES};
use self::record::{Directory, Slot};
use crate::error::{Error, Result};

mod contents;
pub mod digests;
mod memory;
mod pv_pages;
pub mod record;
mod rights;
mod room;
#[cfg(test)]
mod tests;

pub use contents::{Contents, Newer, Resident};
pub use rights::{EntryDifference, Rights};
pub use room::Usage;

/// First address of the arena.
pub const BASE: Gva = Gva(0xffff_ffff_ff60_1000);
/// Entries of the table that the arena may use.
pub const PAGES: usize = 511;
/// The kernel's page tables of its last 4 MiB or so of fixed addresses, that of the arena among them.
const TABLE: &str = "level1_fixmap_pgt";
/// Most bytes of them: `FIXMAP_PMD_NUM` pages (arch/x86/include/asm/fixmap.h).
const TABLE_MAX: u64 = 16 * PAGE_SIZE;

/// A guest's arena as its page table shows it.
#[derive(Debug)]
pub struct Arena {
    table: Frame,
    /// Entry of each page, by arena page number.
    entries: Vec<u64>,
    /// The directory; empty while the guest has no arena.
    pub directory: Directory,
}

/// All addresses of the arena.
#[must_use]
pub fn addresses() -> Range {
    Range::new(BASE, PAGES as u64 * PAGE_SIZE)
}

/// Address of arena page `page`.
#[must_use]
pub fn page_address(page: usize) -> Gva {
    BASE.plus(page as u64 * PAGE_SIZE)
}

fn foreign_arena(found: &str) -> Error {
    Error::not_applicable(format!(
        "the page-table entries for the arena, at {BASE}, are in use, but not by xen-locus: {found}"
    ))
}

impl Arena {
    /// Reads a guest's arena.
    ///
    /// # Errors
    /// There is no such page table, it is used by something else, or memory can't be read. As [`Directory::decode`].
    /// [`Cause::ArenaLost`](crate::error::Cause::ArenaLost): the entries are there, and the memory is not.
    pub fn read(kernel: &Kernel<'_>) -> Result<Arena> {
        let space = kernel.space.fresh();
        let (table, first, _) = space.entry_slot(BASE, 1).map_err(|e| {
            Error::not_applicable(format!(
                "this kernel has no page table for the arena at {BASE}: {e}; was it built without \
                 CONFIG_X86_VSYSCALL_EMULATION?"
            ))
        })?;
        let mut bytes = [0u8; PAGE_LEN];
        kernel.space.map(&[table])?.read(0, &mut bytes)?;
        let entries: Vec<u64> = (first..PAGE_LEN / 8)
            .filter_map(|slot| fetch::u64(&bytes, slot * 8))
            .collect();
        if entries.len() != PAGES {
            return Err(foreign_arena(&format!("its table begins at slot {first}")));
        }
        let mut arena = Arena {
            table,
            entries,
            directory: Directory::default(),
        };
        arena.check_table(kernel)?;
        arena.check_frames(kernel)?;
        if let Some(frame) = arena.frame(0) {
            let page = arena.directory_page(kernel, frame)?;
            // An earlier run was ended between adding the page and filling it. Fresh memory is full of zeroes; a debug
            // build of Xen fills it with another byte (`SCRUB_PATTERN`, xen/common/page_alloc.c).
            let is_blank = page.iter().all(|b| Some(b) == page.first());
            if !is_blank {
                // Only xen-locus makes an entry lead to such a frame, so the directory is its own.
                arena.directory = Directory::decode(&page)?;
            }
        } else if let Some(used) = (0..PAGES).find(|&i| arena.frame(i).is_some()) {
            return Err(foreign_arena(&format!("{} is mapped", page_address(used))));
        }
        arena.check_slots()?;
        Ok(arena)
    }

    /// The bytes of page 0, in `frame`; none if an earlier run was ended before it had memory.
    fn directory_page(&self, kernel: &Kernel<'_>, frame: Frame) -> Result<Vec<u8>> {
        let window = match contents::map(kernel, &[frame]) {
            Ok(window) => window,
            Err(e) if e.is_arena_lost() && self.is_unused(kernel) => return Ok(Vec::new()),
            Err(e) => return Err(e),
        };
        let mut page = vec![0; PAGE_LEN];
        window.read(0, &mut page)?;
        Ok(page)
    }

    /// Whether nothing was lost with the memory of page 0. It gets memory before another page has an entry. And of an arena
    /// whose payloads were all reclaimed, none of which is a module of the guest's, all memory may go.
    fn is_unused(&self, kernel: &Kernel<'_>) -> bool {
        let is_vacant = |frame| {
            let mapped = kernel.space.map(&[frame]);
            matches!(mapped, Err(locus_guest::Error::NoMemory { .. }))
        };
        let all = || ModuleReader::new(kernel).and_then(|mut reader| reader.all());
        let has_modules =
            || all().map_or(true, |all| all.iter().any(|m| addresses().contains(m.addr)));
        let alone = self.own_frames().count() == 1;
        alone || (self.own_frames().all(is_vacant) && !has_modules())
    }

    /// Refuses a table that is not the kernel's own: entries are written into it, and a hostile guest's page tables
    /// may lead anywhere.
    fn check_table(&self, kernel: &Kernel<'_>) -> Result<()> {
        let own = kernel.symbols.need(TABLE)?;
        // The last symbol has no next one: it is one page at least.
        let room = kernel.symbols.room(own).unwrap_or(PAGE_SIZE);
        let frames = kernel.space.frames(own, room.clamp(1, TABLE_MAX))?;
        if frames.contains(&self.table) {
            return Ok(());
        }
        Err(foreign_arena(&format!(
            "{} is their page table, expected one of the kernel's {TABLE} at {own}",
            self.table
        )))
    }

    /// Refuses entries that lead to pages which xen-locus can't have put there: a write to a page of the arena must
    /// not reach memory that the guest uses for something else.
    fn check_frames(&self, kernel: &Kernel<'_>) -> Result<()> {
        let mut low = None;
        let mut seen = HashSet::new();
        for (page, &entry) in self.entries.iter().enumerate().filter(|(_, &e)| e != 0) {
            let ours = match self.frame(page) {
                Some(frame) if !seen.insert(frame) => false,
                Some(frame) if kernel.kind == GuestType::Pv => {
                    let low = match &mut low {
                        Some(low) => low,
                        none => none.insert(LowPages::of(kernel)?),
                    };
                    page < PV_PAGES && low.frame(page)? == frame
                }
                Some(frame) => memory::is_fresh_frame(frame),
                None => false,
            };
            if !ours {
                let what = format!(
                    "the entry of {} is {entry:#x}, which is no page of the arena",
                    page_address(page)
                );
                // With a directory there, xen-locus had these addresses first.
                let first = page == 0 || self.frame(0).is_none();
                return Err(if first {
                    foreign_arena(&what)
                } else {
                    Error::uncertain(format!(
                        "the arena is damaged: {what}; the guest or another tool changed it"
                    ))
                });
            }
        }
        Ok(())
    }

    /// Refuses to write entries that something else wrote since they were read.
    fn check_still(&self, guest: &dyn PagesMut, pages: &[(usize, Rights)]) -> Result<()> {
        let table = guest.map(&[self.table])?;
        for &(page, _) in pages {
            let mut found = [0; 8];
            table.read(8 * (page + 1), &mut found)?;
            let found = u64::from_le_bytes(found);
            if self.entries.get(page) != Some(&found) {
                return Err(foreign_arena(&format!(
                    "the entry of {} became {found:#x} meanwhile",
                    page_address(page)
                )));
            }
        }
        Ok(())
    }

    fn check_slots(&self) -> Result<()> {
        let mut owner = [false; PAGES];
        for slot in &self.directory.slots {
            for page in pages_of(slot) {
                let taken = owner.get_mut(page).filter(|taken| !**taken && page > 0);
                match taken {
                    Some(taken) if self.frame(page).is_some() => *taken = true,
                    _ => {
                        return Err(Error::uncertain(format!(
                            "the arena's directory is damaged: page {page} is claimed but not \
                             there, or claimed twice; the guest or another tool changed it"
                        )))
                    }
                }
            }
        }
        Ok(())
    }

    fn frame(&self, page: usize) -> Option<Frame> {
        rights::frame_of(*self.entries.get(page)?)
    }

    /// How the entry of `page` differs from one that xen-locus makes for `rights`; `None` if it does not. That the
    /// guest used the page is no difference.
    #[must_use]
    pub fn compare(&self, kind: GuestType, page: usize, rights: Rights) -> Option<EntryDifference> {
        rights::compare(kind, self.entry(page), rights)
    }

    /// The entry of `page`; 0, as an empty one, for a page that no arena has.
    fn entry(&self, page: usize) -> u64 {
        self.entries.get(page).copied().unwrap_or(0)
    }

    /// Frames behind `range`, which must be in the arena.
    ///
    /// # Errors
    /// A page of it is not there.
    pub fn frames(&self, range: Range) -> Result<Vec<Frame>> {
        let first = (range.start.page().0.wrapping_sub(BASE.0) / PAGE_SIZE) as usize;
        let last = (range.end.0.wrapping_sub(1).wrapping_sub(BASE.0) / PAGE_SIZE) as usize;
        (first..=last)
            .map(|page| {
                self.frame(page).ok_or_else(|| {
                    Error::failed(format!("arena page {page} of {PAGES} is not there"))
                })
            })
            .collect()
    }

    /// The frames of all its pages.
    pub fn own_frames(&self) -> impl Iterator<Item = Frame> + '_ {
        (0..self.entries.len()).filter_map(|page| self.frame(page))
    }

    /// Maps pages from number `first` on, with the given rights. Those that are mapped already keep their memory.
    ///
    /// # Errors
    /// There is no memory for them, the guest changed an entry since the arena was read, or Xen refuses an entry.
    /// Pages that were added before the error stay, some of them without memory: nothing refers to them, and the next
    /// call gives them what they lack.
    pub fn add(
        &mut self,
        guest: &dyn PagesMut,
        kernel: &Kernel<'_>,
        first: usize,
        rights: &[Rights],
    ) -> Result<()> {
        if first > 0 && self.directory.generation == 0 {
            // A run may end between any two entries, and only the directory shows that the others are the arena's.
            self.add(guest, kernel, 0, &[Rights::RoData])?;
        }
        let wanted = rights.iter().enumerate().map(|(i, &r)| (first + i, r));
        let wanted: Vec<(usize, Rights)> = wanted
            .filter(|&(page, rights)| Rights::of_page(self.entry(page)) != Some(rights))
            .collect();
        let missing = wanted.iter().map(|&(page, _)| page);
        let missing: Vec<usize> = missing.filter(|&page| self.frame(page).is_none()).collect();
        let taken = self.own_frames().collect();
        let fresh = memory::frames_for(guest, kernel, &missing, &taken)?;
        self.check_still(guest, &wanted)?;
        let mut unused = fresh.iter().copied();
        for &(page, rights) in &wanted {
            let Some(frame) = self.frame(page).or_else(|| unused.next()) else {
                break;
            };
            // Rights that grow need no flush: a CPU that knows the old ones looks again when they are not enough
            // (arch/x86/mm/fault.c: `spurious_kernel_fault`).
            let entry = rights::entry_for(frame, rights);
            guest.write_entry(self.table, page + 1, entry)?;
            if let Some(known) = self.entries.get_mut(page) {
                *known = entry;
            }
        }
        let unfilled = self.unfilled(first, rights.len());
        memory::fill(guest, kernel.kind, &unfilled, &fresh)
    }

    /// The frames of `count` pages from number `first` on that may have no memory yet. What the directory lists has it,
    /// and so does the directory once it was written.
    fn unfilled(&self, first: usize, count: usize) -> Vec<Frame> {
        let listed: HashSet<usize> = self.directory.slots.iter().flat_map(pages_of).collect();
        (first..first.saturating_add(count))
            .filter(|&page| page > 0 || self.directory.generation == 0)
            .filter(|page| !listed.contains(page))
            .filter_map(|page| self.frame(page))
            .collect()
    }

    /// Writes `bytes` at `at` in the arena and reads them back.
    ///
    /// # Errors
    /// A page is not there, or the bytes read back differ.
    pub fn write(&self, guest: &dyn PagesMut, at: Gva, bytes: &[u8]) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        let frames = self.frames(Range::new(at, bytes.len() as u64))?;
        let window = guest.map_mut(&frames)?;
        window.write(at.offset(), bytes)?;
        guest.written(&frames)?;
        let mut back = vec![0; bytes.len()];
        window.read(at.offset(), &mut back)?;
        if back != bytes {
            return Err(Error::failed(format!(
                "the arena at {at} does not hold what was just written there: the guest changes these \
                 pages"
            )));
        }
        Ok(())
    }

    /// Puts `directory` in force, making page 0 if there is none.
    ///
    /// # Errors
    /// As [`Arena::add`] and [`Arena::write`].
    pub fn commit(
        &mut self,
        guest: &dyn PagesMut,
        kernel: &Kernel<'_>,
        slots: Vec<Slot>,
    ) -> Result<()> {
        if slots.len() > record::ENTRIES_MAX {
            return Err(full());
        }
        self.add(guest, kernel, 0, &[Rights::RoData])?;
        let next = Directory {
            generation: self.directory.generation.checked_add(1).ok_or_else(|| {
                Error::uncertain(
                    "the arena's directory is damaged: it says that it was changed 2^64 times",
                )
            })?,
            slots,
            frames: memory::listed(self.own_frames()),
        };
        let (half, bytes) = next.encode();
        self.write(guest, BASE.plus(half as u64), &bytes)?;
        self.directory = next;
        Ok(())
    }
}

fn full() -> Error {
    Error::not_applicable(format!(
        "the arena's directory is full: {} payloads, parked ones included; `xen-locus reclaim` makes room where some \
         are parked",
        record::ENTRIES_MAX
    ))
}

/// Seconds since 1970.
#[must_use]
pub fn now() -> u64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

fn pages_of(slot: &Slot) -> std::ops::Range<usize> {
    let first = usize::from(slot.first);
    first..first + usize::from(slot.pages)
}
