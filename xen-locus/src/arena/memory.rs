//! The memory behind the arena's pages: which frames of a guest xen-locus may take for them.
//!
//! - PVH and HVM: fresh pages, at guest frames that no RAM, device or balloon uses. The 128 MiB below 4 GiB hold
//!   the local APIC and Xen's special pages. Linux adds memory in whole sections of 128 MiB, so it never puts
//!   hot-added or unpopulated memory there. And they are below the guest's highest frame, so a save of the guest
//!   need not go further. The first window is that which Xen leaves to guests for ever
//!   (0xfe700000-0xfe7fffff, "reserved for guest use": tools/firmware/hvmloader/config.h); earlier builds took
//!   frames of the other two.
//!
//!   The directory lists the frames of the first window. When the guest's kernel starts another one (kexec), no page
//!   table leads to them any more, but they keep what is in them. An arena of the new kernel takes what such a
//!   directory lists.
//!
//!   They are memory that the guest has beside its own. A restored or migrated guest may have its target and 1 MiB
//!   (`libxl__build_pre`, `LIBXL_MAXMEM_CONSTANT`), of which Xen's special pages take some. A guest that has more
//!   can't be restored. So the limit that the toolstack set for the guest is never raised.
//! - PV: the pages of PFN 0xa0 to 0xff. They are real memory that PV Linux reserves as if there were a BIOS
//!   (`xen_memory_setup`, arch/x86/xen/setup.c) and never uses. A page that holds anything or is not reserved
//!   any more is not taken ([`pv_pages`]).

use std::collections::HashSet;

use locus_guest::addr::{Frame, Gfn, Gva, PAGE_LEN, PAGE_SIZE};
use locus_guest::{fetch, GuestType, PagesMut};
use locus_kernel::Kernel;

use super::pv_pages;
use super::record::{Directory, FRAME_WORDS};
use crate::error::{Error, Result};

/// Pages that a PV guest has for the arena.
pub(super) const PV_PAGES: usize = 96;
/// Number of the first of them, as the guest counts its pages (PFN).
const PV_FIRST: u64 = 0xa0;
/// Guest frames that are tried for PVH and HVM.
const GFNS: [std::ops::Range<u64>; 3] = [0xfe700..0xfe800, 0xfef00..0xfeff8, 0xfe000..0xfe400];
/// Guest frames that the back end is asked about in one call.
const GFNS_AT_ONCE: usize = 16;
/// Pages that a PVH or HVM guest has for the arena: of the 256 that it may have beside its own, Xen's special pages
/// take about ten.
const FRESH_PAGES: usize = 240;
/// Type of usable RAM in the e820 map.
const E820_RAM: u32 = 1;
/// Most entries of the e820 map that are read.
const E820_MAX: u32 = 4096;
/// Length of one of its entries, in bytes.
const E820_ENTRY: usize = 20;
/// Offset of the first entry in the map, in bytes.
const E820_ENTRIES: usize = 4;

/// Arena pages that a guest of this type can have, the directory included.
pub(super) fn capacity(kind: GuestType) -> usize {
    match kind {
        GuestType::Pv => PV_PAGES,
        GuestType::Pvh | GuestType::Hvm => FRESH_PAGES,
    }
}

/// Refuses `count` more pages for the arena, if the guest can't be given them.
///
/// # Errors
/// [`Class::NotApplicable`](crate::error::Class::NotApplicable): it would have more memory than it can take along when
/// it is restored or migrated. Or the back end can't tell.
pub(super) fn check_spare(guest: &dyn PagesMut, kind: GuestType, count: usize) -> Result<()> {
    if kind == GuestType::Pv || count == 0 {
        return Ok(());
    }
    let spare = guest.spare()?;
    if count as u64 <= spare {
        return Ok(());
    }
    Err(Error::not_applicable(format!(
        "the arena needs {count} more pages of memory, and this {kind} guest may be given {spare}: with more it could \
         not be restored or migrated, because the toolstack gives such a guest no more than this one may have now"
    )))
}

/// Whether xen-locus puts arena pages of a PVH or HVM guest into `frame`.
pub(super) fn is_fresh_frame(frame: Frame) -> bool {
    GFNS.iter().any(|gfns| gfns.contains(&frame.0))
}

/// The frames of a PV guest's arena pages.
pub(super) struct LowPages<'k, 'm> {
    kernel: &'k Kernel<'m>,
    /// Start of the kernel's mapping of all memory.
    direct_map: Gva,
}

impl<'k, 'm> LowPages<'k, 'm> {
    /// # Errors
    /// The kernel's variable `page_offset_base` can't be read.
    pub(super) fn of(kernel: &'k Kernel<'m>) -> Result<LowPages<'k, 'm>> {
        let base = kernel.variable("page_offset_base", 8)?;
        let direct_map = Gva(kernel.space.read_u64(base)?);
        Ok(LowPages { kernel, direct_map })
    }

    /// Where the guest's kernel sees the memory of arena page `page` in its mapping of all memory.
    fn address(&self, page: usize) -> Gva {
        self.direct_map.plus((PV_FIRST + page as u64) * PAGE_SIZE)
    }

    /// The frame for arena page `page`.
    ///
    /// # Errors
    /// The page tables can't be read.
    pub(super) fn frame(&self, page: usize) -> Result<Frame> {
        Ok(self.kernel.space.walk(self.address(page))?.frame)
    }
}

/// One frame for each of these arena pages, which are not mapped yet. None of them is in `taken`, the frames that the
/// arena has already. Those of a PV guest are empty; those of the others are too, or have no memory before [`fill`].
///
/// # Errors
/// [`Class::NotApplicable`](crate::error::Class::NotApplicable): there are too few, or the guest uses one. Or the
/// back end refuses.
pub(super) fn frames_for(
    guest: &dyn PagesMut,
    kernel: &Kernel<'_>,
    pages: &[usize],
    taken: &HashSet<Frame>,
) -> Result<Vec<Frame>> {
    if kernel.kind == GuestType::Pv {
        check_not_ram(kernel, PV_FIRST, PV_FIRST + PV_PAGES as u64)?;
        let low = LowPages::of(kernel)?;
        return pages
            .iter()
            .map(|&page| {
                pv_pages::check_unused(kernel, PV_FIRST + page as u64, low.address(page))?;
                low.frame(page)
            })
            .collect();
    }
    if pages.is_empty() {
        return Ok(Vec::new());
    }
    let mut found = left_behind(guest, kernel.kind, taken)?;
    found.truncate(pages.len());
    let more = pages.len() - found.len();
    check_spare(guest, kernel.kind, more)?;
    if !found.is_empty() {
        check_not_ram(kernel, GFNS[0].start, GFNS[0].end)?;
    }
    let vacant = vacant_frames(guest, kernel, more, taken)?;
    // An old directory must be no page 0. The others keep what they have until entries lead to them: one of them may
    // be the directory that lists the rest.
    if pages.contains(&0) {
        blank(guest, &found)?;
    }
    found.extend(vacant.into_iter().map(Frame::from));
    Ok(found)
}

/// The bits of [`Directory::frames`] for those of `frames` that are in the first window.
pub(super) fn listed(frames: impl Iterator<Item = Frame>) -> [u64; FRAME_WORDS] {
    let mut bits = [0; FRAME_WORDS];
    for n in frames.filter_map(|f| f.0.checked_sub(GFNS[0].start)) {
        if let Some(word) = usize::try_from(n / 64).ok().and_then(|n| bits.get_mut(n)) {
            *word |= 1 << (n % 64);
        }
    }
    bits
}

/// The frames of the first window that the arena of an earlier kernel of this guest left behind: they have memory, are
/// not in `taken`, and a whole directory that no entry leads to lists them. Such directories come last, so the others
/// are known as long as one of them is left.
///
/// Memory that the guest put there itself is in no such list. An old Linux (`HVM_SHARED_INFO_ADDR`,
/// arch/x86/xen/enlighten.c) has its page of shared information at the first frame, where the directory would stand.
///
/// # Errors
/// The back end can't tell of one of them, or can't read it.
pub(super) fn left_behind(
    guest: &dyn PagesMut,
    kind: GuestType,
    taken: &HashSet<Frame>,
) -> Result<Vec<Frame>> {
    if kind == GuestType::Pv {
        return Ok(Vec::new());
    }
    let window = GFNS[0].clone().map(Frame);
    let mut others: Vec<Frame> = window.filter(|f| !taken.contains(f)).collect();
    let vacant = without_memory(guest, kind, &others)?;
    let vacant: HashSet<Frame> = vacant.into_iter().map(Frame::from).collect();
    others.retain(|f| !vacant.contains(f));
    let mut lists = [0; FRAME_WORDS];
    let mut directories = HashSet::new();
    for some in others.chunks(GFNS_AT_ONCE) {
        let mut bytes = vec![0; some.len() * PAGE_LEN];
        guest.map(some)?.read(0, &mut bytes)?;
        for (&frame, page) in some.iter().zip(bytes.chunks_exact(PAGE_LEN)) {
            if let Ok(directory) = Directory::decode(page) {
                directories.insert(frame);
                for (all, word) in lists.iter_mut().zip(directory.frames) {
                    *all |= word;
                }
            }
        }
    }
    others.retain(|&f| {
        let own = listed(std::iter::once(f));
        own.iter().zip(&lists).any(|(bit, all)| bit & all != 0)
    });
    others.sort_by_key(|f| directories.contains(f));
    Ok(others)
}

fn blank(guest: &dyn PagesMut, frames: &[Frame]) -> Result<()> {
    if frames.is_empty() {
        return Ok(());
    }
    let blank = vec![0; frames.len() * PAGE_LEN];
    guest.map_mut(frames)?.write(0, &blank)?;
    guest.written(frames)?;
    Ok(())
}

/// Gives memory to those of `frames`, of the arena of a PVH or HVM guest, that have none. Its bytes are zero, and so are
/// those of all `new` frames then, which the arena did not have before.
///
/// The page table leads to these frames already. So memory is never put where no later run would know it for the
/// arena's: what a run that ends here has done, the next one goes on with.
///
/// # Errors
/// As [`check_spare`]; or the back end refuses.
pub(super) fn fill(
    guest: &dyn PagesMut,
    kind: GuestType,
    frames: &[Frame],
    new: &[Frame],
) -> Result<()> {
    if kind == GuestType::Pv {
        return Ok(());
    }
    let empty = without_memory(guest, kind, frames)?;
    check_spare(guest, kind, empty.len())?;
    if !empty.is_empty() {
        guest.populate(&empty)?;
    }
    let mut dirty: HashSet<Frame> = empty.into_iter().map(Frame::from).collect();
    dirty.extend(new);
    blank(guest, &dirty.into_iter().collect::<Vec<_>>())
}

/// Those of `frames`, of the arena, that have no memory. Those of a PV guest all have some.
///
/// # Errors
/// The back end can't tell of one of them.
pub(super) fn without_memory(
    guest: &dyn PagesMut,
    kind: GuestType,
    frames: &[Frame],
) -> Result<Vec<Gfn>> {
    if kind == GuestType::Pv {
        return Ok(Vec::new());
    }
    let mut found = Vec::new();
    for some in frames.chunks(GFNS_AT_ONCE) {
        let gfns: Vec<Gfn> = some.iter().map(|f| Gfn(f.0)).collect();
        found.extend(vacant_among(guest, &gfns)?);
    }
    Ok(found)
}

/// Those of `some` guest frames, at most [`GFNS_AT_ONCE`], that have no memory.
fn vacant_among<'f>(
    guest: &dyn PagesMut,
    some: &'f [Gfn],
) -> Result<impl Iterator<Item = Gfn> + 'f> {
    let both = some.iter().zip(guest.vacant(some)?);
    Ok(both.filter(|(_, vacant)| *vacant).map(|(&frame, _)| frame))
}

/// `count` guest frames without memory behind them, none of them in `taken`.
fn vacant_frames(
    guest: &dyn PagesMut,
    kernel: &Kernel<'_>,
    count: usize,
    taken: &HashSet<Frame>,
) -> Result<Vec<Gfn>> {
    let mut found = Vec::new();
    for window in GFNS {
        if found.len() >= count {
            break;
        }
        check_not_ram(kernel, window.start, window.end)?;
        let candidates = window.map(Gfn).filter(|&f| !taken.contains(&f.into()));
        let candidates: Vec<Gfn> = candidates.collect();
        for some in candidates.chunks(GFNS_AT_ONCE) {
            found.extend(vacant_among(guest, some)?);
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
    Ok(found)
}

/// Refuses a kernel whose types have another memory map than the one that is read. Types without one are no reason.
fn check_e820(kernel: &Kernel<'_>) -> Result<()> {
    let Ok(btf) = kernel.btf() else {
        return Ok(());
    };
    let (table, entry) = ("e820_table", "e820_entry");
    let mut all = Vec::new();
    if btf.size_of(table).is_ok() {
        all.push((
            "nr_entries",
            btf.offset_of_sized(table, "nr_entries", 4)?,
            0,
        ));
        all.push(("entries", btf.offset_of(table, "entries")?, E820_ENTRIES));
    }
    if let Ok(size) = btf.size_of(entry) {
        all.push(("the end", size, E820_ENTRY));
        for (member, bytes, expected) in [("addr", 8, 0), ("size", 8, 8), ("type", 4, 16)] {
            all.push((member, btf.offset_of_sized(entry, member, bytes)?, expected));
        }
    }
    match all.into_iter().find(|(_, found, expected)| found != expected) {
        None => Ok(()),
        Some((what, found, expected)) => Err(Error::not_applicable(format!(
            "the guest's memory map has another form: {what} of its e820_table is at the offset {found}, expected {expected}; so \
             it can't be known which guest frames are RAM"
        ))),
    }
}

/// Refuses frames `first..end` when the guest's own memory map calls any of them usable RAM:
/// `e820_table` (arch/x86/kernel/e820.c) points to a count and packed entries {u64 address, u64
/// size, u32 type}.
pub(super) fn check_not_ram(kernel: &Kernel<'_>, first: u64, end: u64) -> Result<()> {
    let table = Gva(kernel.space.read_u64(kernel.variable("e820_table", 8)?)?);
    check_e820(kernel)?;
    let count = kernel.space.read_u32(table)?;
    if count > E820_MAX {
        return Err(Error::not_applicable(format!(
            "the guest's e820_table has {count} entries; expected at most {E820_MAX}"
        )));
    }
    let bytes = kernel
        .space
        .read_vec(table.plus(E820_ENTRIES as u64), count as usize * E820_ENTRY)?;
    for entry in bytes.chunks_exact(E820_ENTRY) {
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
