//! The arena: pages of ours in the guest, without an allocation in the guest.
//!
//! The last-level page table behind the vsyscall page belongs to the kernel image
//! (`level1_fixmap_pgt`, arch/x86/kernel/head_64.S). Its other 511 entries, from
//! `0xffffffffff601000` to `0xffffffffff7fffff`, are empty, are seen by every kernel page table,
//! and lie within 2 GiB of kernel text and modules. The memory behind them:
//!
//! - PVH and HVM: fresh pages, at guest frames that no RAM, device or balloon uses: the 128 MiB
//!   below 4 GiB hold the local APIC and Xen's special pages, so Linux never places hot-added or
//!   unpopulated memory, which comes in whole 128 MiB sections, there; and they lie below the
//!   guest's highest frame, so a save need not walk further.
//! - PV: the pages of PFN 0xa0 to 0xff, which are real memory that PV Linux reserves as if there were
//!   a BIOS (`xen_memory_setup`, arch/x86/xen/setup.c) and never uses. One that holds anything or is
//!   not reserved any more is not taken ([`low`]).
//!
//! An entry that leads to another page than these is none of ours, and nothing is written there.
//!
//! Page `i` of the arena is the page at `BASE + i * 4096`. Page 0 is the directory ([`record`]).

use std::collections::HashSet;
use std::fmt;

use locus_guest::addr::{Frame, Gfn, Gva, Range, PAGE_LEN, PAGE_SIZE};
use locus_guest::space::{
    PTE_ACCESSED, PTE_DIRTY, PTE_FRAME, PTE_NX, PTE_PRESENT, PTE_USER, PTE_WRITE,
};
use locus_guest::{GuestType, PagesMut};
use locus_kernel::Kernel;

use self::record::{Directory, Record, Slot};
use crate::error::{Error, Result};

pub mod digests;
mod low;
pub mod record;

/// First address of the arena.
pub const BASE: Gva = Gva(0xffff_ffff_ff60_1000);
/// Entries of the table that the arena may use.
pub const PAGES: usize = 511;
/// Pages a PV guest has for it.
const PV_PAGES: usize = 96;
/// First page frame number of them.
const PV_FIRST: u64 = 0xa0;
/// Guest frames tried for PVH and HVM.
const GFNS: [std::ops::Range<u64>; 2] = [0xfef00..0xfeff8, 0xfe000..0xfe400];
/// Xen's mark of a PV guest's entries that are for its kernel alone; all of them are for user mode as
/// the processor sees it (`_PAGE_GUEST_KERNEL`, xen/arch/x86/include/asm/x86_64/page.h).
const XEN_KERNEL: u64 = 1 << 52;
/// The kernel's page tables of its last 4 MiB or so of fixed addresses, that of the arena among them.
const TABLE: &str = "level1_fixmap_pgt";
/// Most bytes of them: `FIXMAP_PMD_NUM` pages (arch/x86/include/asm/fixmap.h).
const TABLE_MAX: u64 = 16 * PAGE_SIZE;
/// Type of usable RAM in the e820 map.
const E820_RAM: u32 = 1;

/// What the guest may do with a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rights {
    /// Read and execute.
    Text,
    /// Read.
    RoData,
    /// Read and write.
    Data,
}

impl Rights {
    fn bits(self) -> u64 {
        match self {
            Rights::Text => 0,
            Rights::RoData => PTE_NX,
            Rights::Data => PTE_NX | PTE_WRITE | PTE_DIRTY,
        }
    }

    /// Those of `entry`; none of ours allow both writing and execution.
    fn of(entry: u64) -> Option<Rights> {
        match (entry & PTE_NX != 0, entry & PTE_WRITE != 0) {
            (false, true) => None,
            (false, false) => Some(Rights::Text),
            (true, false) => Some(Rights::RoData),
            (true, true) => Some(Rights::Data),
        }
    }
}

impl fmt::Display for Rights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Rights::Text => "code",
            Rights::RoData => "read only",
            Rights::Data => "writable",
        })
    }
}

/// A guest's arena as its page table shows it.
#[derive(Debug)]
pub struct Arena {
    table: Frame,
    /// Entry of each page, by arena page number.
    entries: Vec<u64>,
    /// The directory; empty while the guest has no arena.
    pub directory: Directory,
}

/// An applied or parked payload: its place in the directory and its record.
#[derive(Clone, Debug)]
pub struct Resident {
    /// Number in the directory.
    pub index: usize,
    /// Its directory entry.
    pub slot: Slot,
    /// Its record.
    pub record: Record,
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
    /// There is no such page table, it is used by something else, or memory can't be read.
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
        let entries: Vec<u64> = bytes
            .chunks_exact(8)
            .skip(first)
            .map(|c| u64::from_le_bytes(c.try_into().unwrap_or_default()))
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
            let mut page = vec![0; PAGE_LEN];
            kernel.space.map(&[frame])?.read(0, &mut page)?;
            // Nothing but zeroes: an earlier run was ended between adding the page and filling it.
            if page.iter().any(|&b| b != 0) {
                // It leads to where only xen-locus puts it.
                arena.directory = Directory::decode(&page).ok_or_else(|| {
                    Error::uncertain(format!(
                        "the arena's directory at {BASE} is damaged: neither of its copies is whole; \
                         the guest or another tool changed it"
                    ))
                })?;
            }
        } else if let Some(used) = (0..PAGES).find(|&i| arena.frame(i).is_some()) {
            return Err(foreign_arena(&format!("{} is mapped", page_address(used))));
        }
        arena.check_slots()?;
        Ok(arena)
    }

    /// Refuses a table that is not the kernel's own: entries are written into it, and the guest could
    /// have made its page tables lead anywhere.
    fn check_table(&self, kernel: &Kernel<'_>) -> Result<()> {
        let Some(own) = kernel.symbols.addr(TABLE) else {
            return Ok(());
        };
        let room = kernel.symbols.room(own).unwrap_or(PAGE_SIZE);
        let frames = kernel.space.frames(own, room.clamp(1, TABLE_MAX))?;
        if frames.contains(&self.table) {
            return Ok(());
        }
        Err(foreign_arena(&format!(
            "{} is their page table, which is none of the kernel's {TABLE} at {own}",
            self.table
        )))
    }

    /// Refuses entries that lead to pages which xen-locus can't have put there: what is written to a
    /// page of the arena must not reach memory that the guest uses for something else.
    fn check_frames(&self, kernel: &Kernel<'_>) -> Result<()> {
        let mut low = None;
        let mut seen = HashSet::new();
        for (page, &entry) in self.entries.iter().enumerate().filter(|(_, &e)| e != 0) {
            let ours = match self.frame(page) {
                Some(frame) if !seen.insert(frame) => false,
                Some(frame) if kernel.kind == GuestType::Pv => {
                    let low = match low {
                        Some(base) => base,
                        None => *low.insert(direct_map(kernel)?),
                    };
                    page < PV_PAGES && kernel.space.walk(low_page(low, page))?.frame == frame
                }
                Some(frame) => GFNS.iter().any(|gfns| gfns.contains(&frame.0)),
                None => false,
            };
            if !ours {
                let what = format!(
                    "the entry of {} is {entry:#x}, which is no page of the arena",
                    page_address(page)
                );
                // With a directory of ours it was us who had these addresses first.
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
        let entry = self.entries.get(page)?;
        (entry & PTE_PRESENT != 0).then_some(Frame((entry & PTE_FRAME) >> 12))
    }

    /// How the entry of `page` differs from one that xen-locus makes for `rights`, as what is expected
    /// and what is there; `None` if it does not. That the guest used the page is no difference.
    #[must_use]
    pub fn compare(
        &self,
        kind: GuestType,
        page: usize,
        rights: Rights,
    ) -> Option<(String, String)> {
        let entry = self.entries.get(page).copied().unwrap_or(0);
        let shown = |rights: &str| format!("{rights} (entry {entry:#x})");
        if entry & PTE_PRESENT == 0 {
            return Some((rights.to_string(), shown("no page")));
        }
        let user = entry & PTE_USER != 0 && !(kind == GuestType::Pv && entry & XEN_KERNEL != 0);
        let found = Rights::of(entry).filter(|_| !user);
        if found != Some(rights) {
            let found = match found {
                Some(found) => found.to_string(),
                None if user => "for user mode too".into(),
                None => "writable code".into(),
            };
            return Some((rights.to_string(), shown(&found)));
        }
        None
    }

    /// Frames behind `range`, which must lie in the arena.
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

    /// How many pages the guest can give, and how many payloads use.
    #[must_use]
    pub fn room(&self, kind: GuestType) -> (usize, usize) {
        let used = self
            .directory
            .slots
            .iter()
            .map(|s| usize::from(s.pages))
            .sum();
        (capacity(kind) - 1, used)
    }

    /// All payloads in the arena, with their records.
    ///
    /// # Errors
    /// A record was changed.
    pub fn residents(&self, kernel: &Kernel<'_>) -> Result<Vec<Resident>> {
        let mut found = Vec::new();
        for (index, slot) in self.directory.slots.iter().enumerate() {
            let len = slot.record_len as usize;
            let room = u64::from(slot.pages) * PAGE_SIZE;
            if len > record::RECORD_MAX || u64::from(slot.record_offset) + len as u64 > room {
                return Err(Error::uncertain(format!(
                    "the arena's directory is damaged: record {index} does not fit its pages"
                )));
            }
            let at = page_address(slot.first.into()).plus(slot.record_offset.into());
            let mut bytes = vec![0; len];
            self.window(kernel, Range::new(at, len as u64))?
                .read(at.offset(), &mut bytes)?;
            let record = Record::decode(&bytes, slot).map_err(Error::uncertain)?;
            let own = Range::new(page_address(slot.first.into()), room);
            let module = record.module;
            // two words stand before it, and are read to tell whether the guest knows it
            if !own.contains(module) || module.0 - own.start.0 < record::MODULE {
                return Err(Error::uncertain(format!(
                    "the record of payload {} has its struct module at {module}, outside of its own \
                     pages: the guest's memory was changed",
                    record.name
                )));
            }
            found.push(Resident {
                index,
                slot: slot.clone(),
                record,
            });
        }
        Ok(found)
    }

    fn window(&self, kernel: &Kernel<'_>, range: Range) -> Result<Box<dyn locus_guest::Window>> {
        Ok(kernel.space.map(&self.frames(range)?)?)
    }

    /// The first run of pages for `rights`, one element a page: not owned by a payload, and empty or
    /// left behind with the same rights by a run that was ended early.
    ///
    /// # Errors
    /// Too little arena, or no free entry of the directory: says how much there is.
    pub fn find_room(&self, kind: GuestType, rights: &[Rights]) -> Result<usize> {
        if self.directory.slots.len() >= record::ENTRIES_MAX {
            return Err(full());
        }
        let capacity = capacity(kind);
        let owned = |page: usize| {
            self.directory
                .slots
                .iter()
                .any(|slot| pages_of(slot).contains(&page))
        };
        let fits = |page: usize, want: Rights| {
            let entry = self.entries.get(page).copied().unwrap_or(0);
            !owned(page) && (entry & PTE_PRESENT == 0 || Rights::of(entry) == Some(want))
        };
        (1..capacity.saturating_sub(rights.len().saturating_sub(1)))
            .find(|&first| {
                rights
                    .iter()
                    .enumerate()
                    .all(|(i, &want)| fits(first + i, want))
            })
            .ok_or_else(|| {
                let (room, used) = self.room(kind);
                Error::not_applicable(format!(
                    "the payload needs {} arena pages in one run; this {kind} guest has {room}, of \
                     which payloads, parked ones included, use {used}",
                    rights.len()
                ))
            })
    }

    /// Adds pages `first…` with the given rights; those already there are kept.
    ///
    /// # Errors
    /// No memory for them, or Xen refused an entry. Pages added before stay: nothing refers to them.
    pub fn add(
        &mut self,
        guest: &dyn PagesMut,
        kernel: &Kernel<'_>,
        first: usize,
        rights: &[Rights],
    ) -> Result<()> {
        if first > 0 && self.frame(0).is_none() {
            // A run may end between any two entries, and the directory says whose the others are.
            self.add(guest, kernel, 0, &[Rights::RoData])?;
        }
        let missing: Vec<(usize, Rights)> = rights
            .iter()
            .enumerate()
            .map(|(i, &r)| (first + i, r))
            .filter(|&(page, _)| self.frame(page).is_none())
            .collect();
        let frames = match kernel.kind {
            GuestType::Pv => {
                check_not_ram(kernel, PV_FIRST, PV_FIRST + PV_PAGES as u64)?;
                let base = direct_map(kernel)?;
                let mut frames = Vec::new();
                for &(page, _) in &missing {
                    low::check_unused(kernel, PV_FIRST + page as u64, low_page(base, page))?;
                    frames.push(kernel.space.walk(low_page(base, page))?.frame);
                }
                frames
            }
            GuestType::Pvh | GuestType::Hvm => {
                let fresh = vacant_frames(guest, kernel, missing.len())?;
                let frames: Vec<Frame> = fresh.into_iter().map(Frame::from).collect();
                let blank = vec![0; frames.len() * PAGE_LEN];
                if !frames.is_empty() {
                    guest.map_mut(&frames)?.write(0, &blank)?;
                    guest.written(&frames)?;
                }
                frames
            }
        };
        self.check_still(guest, &missing)?;
        for (&(page, rights), &frame) in missing.iter().zip(&frames) {
            let entry = (frame.0 << 12) | PTE_PRESENT | PTE_ACCESSED | rights.bits();
            guest.write_entry(self.table, page + 1, entry)?;
            if let Some(known) = self.entries.get_mut(page) {
                *known = entry;
            }
        }
        Ok(())
    }

    /// Writes `bytes` at `at` in the arena and reads them back.
    ///
    /// # Errors
    /// A page is not there, or what is read back differs.
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
                "what was written to the arena at {at} is not what stands there: the guest changes \
                 these pages"
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
        };
        let (half, bytes) = next.encode();
        self.write(guest, BASE.plus(half as u64), &bytes)?;
        self.directory = next;
        Ok(())
    }
}

fn full() -> Error {
    Error::not_applicable(format!(
        "the arena's directory is full: {} payloads, parked ones included",
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

fn capacity(kind: GuestType) -> usize {
    match kind {
        GuestType::Pv => PV_PAGES,
        GuestType::Pvh | GuestType::Hvm => PAGES,
    }
}

/// Start of the kernel's mapping of all memory.
fn direct_map(kernel: &Kernel<'_>) -> Result<Gva> {
    let base = kernel.symbols.need("page_offset_base")?;
    Ok(Gva(kernel.space.read_u64(base)?))
}

/// Where a PV guest's kernel sees the memory of arena page `page` in that mapping, which begins at `base`.
fn low_page(base: Gva, page: usize) -> Gva {
    base.plus((PV_FIRST + page as u64) * PAGE_SIZE)
}

/// `count` guest frames without memory behind them.
fn vacant_frames(guest: &dyn PagesMut, kernel: &Kernel<'_>, count: usize) -> Result<Vec<Gfn>> {
    let mut found = Vec::new();
    for window in GFNS {
        if found.len() >= count {
            break;
        }
        check_not_ram(kernel, window.start, window.end)?;
        let candidates: Vec<Gfn> = window.map(Gfn).collect();
        // A few more than needed at a time: each is asked for by a foreign mapping.
        for some in candidates.chunks(16) {
            let vacant = guest.vacant(some)?;
            found.extend(some.iter().zip(vacant).filter(|(_, v)| *v).map(|(&f, _)| f));
            if found.len() >= count {
                break;
            }
        }
    }
    if found.len() < count {
        return Err(Error::not_applicable(format!(
            "{count} free guest frames are needed for the arena, and {} were found below 4 GiB",
            found.len()
        )));
    }
    found.truncate(count);
    guest.populate(&found)?;
    Ok(found)
}

/// Refuses frames `first..end` when the guest's own memory map calls any of them usable RAM:
/// `e820_table` (arch/x86/kernel/e820.c) points to a count and packed entries {u64 address, u64
/// size, u32 type}.
fn check_not_ram(kernel: &Kernel<'_>, first: u64, end: u64) -> Result<()> {
    let table = Gva(kernel.space.read_u64(kernel.symbols.need("e820_table")?)?);
    let count = kernel.space.read_u32(table)?;
    if count > 4096 {
        return Err(Error::not_applicable(format!(
            "the guest's e820_table has {count} entries; expected at most 4096"
        )));
    }
    let bytes = kernel.space.read_vec(table.plus(4), count as usize * 20)?;
    for entry in bytes.chunks_exact(20) {
        use locus_guest::fetch;
        let (Some(start), Some(size), Some(kind)) = (
            fetch::u64(entry, 0),
            fetch::u64(entry, 8),
            fetch::u32(entry, 16),
        ) else {
            continue;
        };
        let stop = start.saturating_add(size);
        if kind == E820_RAM && start < end * PAGE_SIZE && stop > first * PAGE_SIZE {
            return Err(Error::not_applicable(format!(
                "the arena wants guest frames {first:#x} to {end:#x}, but the guest's memory map \
                 calls {start:#x} to {stop:#x} usable RAM"
            )));
        }
    }
    Ok(())
}
