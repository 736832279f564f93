//! Finds the kernel's image in a guest's memory, from an address that the kernel told Xen or the CPU.
//!
//! A PV kernel registers callbacks, and a PVH or HVM kernel sets `MSR_LSTAR`. Both are addresses in
//! kernel text. The image is between `0xffffffff80000000` and `0xffffffffc0000000`
//! (Documentation/arch/x86/x86_64/mm.rst), at a place chosen by KASLR. `cleanup_highmap()` and
//! `xen_cleanhighmap()` remove every other mapping there. So the run of mapped pages around the
//! known address begins at `_text`.
//!
//! A saved core of a PVH or HVM guest does not have `MSR_LSTAR`. There each such run is a candidate
//! if it begins with code and has read-only data behind it. The symbols that are found in a
//! candidate must then agree with the guest's state ([`agrees`]).

use locus_guest::addr::{Frame, Gva, Range};
use locus_guest::budget::Budget;
use locus_guest::space::{Region, Space, PTE_FRAME, PTE_PRESENT};
use locus_guest::{GuestType, Memory, Vcpu};

use crate::kallsyms::{Anchors, SecondAnchor, Symbols};
use crate::tasks::CPUS_MAX;
use crate::Error;

/// First guest virtual address at which the image may be (`__START_KERNEL_map`).
pub const KERNEL_MAP: Gva = Gva(0xffff_ffff_8000_0000);
/// First guest virtual address behind those for the image. Modules begin here at the latest.
pub const KERNEL_MAP_END: Gva = Gva(0xffff_ffff_c000_0000);

/// Lowest address of the kernel's half of the address space.
const KERNEL_HALF: u64 = 1 << 63;

/// Where a kernel is, or may be.
#[derive(Debug)]
pub struct Located<'m> {
    /// An address space that maps it: that of the process that a vCPU was in.
    pub space: Space<'m>,
    /// Guest virtual address of the first byte of its text (`_text`).
    pub text_base: Gva,
    /// The entry point that led here, a guest virtual address; `None` if it was found by page tables alone.
    pub entry: Option<Gva>,
    /// Mapped runs of its image, in rising order of addresses.
    pub regions: Vec<Region>,
}

impl Located<'_> {
    /// What symbols that are found here must agree with: the place, and the entry point or `state`.
    pub(super) fn anchors<'a>(&self, state: &'a dyn Fn(&Symbols) -> bool) -> Anchors<'a> {
        Anchors {
            text_base: self.text_base,
            second: self
                .entry
                .map_or(SecondAnchor::State(state), SecondAnchor::Entry),
        }
    }
}

/// Most runs of mapped pages that are tried as the image, where no entry point is known.
const CANDIDATES: usize = 8;

/// Locates the kernel of a running guest whose virtual CPUs are in the states `vcpus`. All that is
/// read in its space, later too, is paid from `budget`.
///
/// # Errors
/// [`Error::NotReady`] while no vCPU shows the entry point of a 64-bit kernel (firmware, early
/// boot); [`Error::NotLinux`] if the memory there is not mapped as that of Linux; [`Error::Memory`]
/// if the budget is spent.
pub fn locate<'m>(
    mem: &'m dyn Memory,
    kind: GuestType,
    vcpus: &[Vcpu],
    budget: &Budget,
) -> Result<Located<'m>, Error> {
    let up = in_long_mode(vcpus)?;
    let Some(entry) = up.iter().find_map(|v| v.entry) else {
        return Err(Error::NotReady(
            "the guest's kernel has not set its entry point yet: it is still booting; try again"
                .into(),
        ));
    };
    if entry < KERNEL_MAP || entry >= KERNEL_MAP_END {
        return Err(Error::NotLinux(format!(
            "the guest's kernel entry point is {entry}; a 64-bit Linux kernel has it between \
             {KERNEL_MAP} and {KERNEL_MAP_END}"
        )));
    }
    for space in spaces(mem, kind, &up, budget) {
        budget.check().map_err(Error::Memory)?;
        if let Some(regions) = runs(&space).into_iter().find(|run| holds(run, entry)) {
            if has_constants(&regions) {
                return Ok(Located {
                    space,
                    // The run holds the entry point, so it has a first region.
                    text_base: regions.first().map_or(entry, |r| r.range.start),
                    entry: Some(entry),
                    regions,
                });
            }
        }
    }
    budget.check().map_err(Error::Memory)?;
    Err(Error::NotLinux(format!(
        "around the guest's kernel entry point {entry} no read-only data is mapped beside the \
         code, as a booted Linux kernel has it; if the guest is just booting, try again"
    )))
}

/// Places that may be the kernel of a saved guest, of which no entry point is known: at least one,
/// at most eight. Places where a vCPU was in kernel mode come first. Reading is paid from `budget`,
/// as by [`locate`].
///
/// # Errors
/// [`Error::NotReady`] if no vCPU was in 64-bit mode; [`Error::NotLinux`] if nothing is mapped as Linux is;
/// [`Error::Memory`] if the budget is spent.
pub fn candidates<'m>(
    mem: &'m dyn Memory,
    kind: GuestType,
    vcpus: &[Vcpu],
    budget: &Budget,
) -> Result<Vec<Located<'m>>, Error> {
    let up = in_long_mode(vcpus)?;
    let inside = |run: &[Region]| up.iter().any(|v| !v.user && holds(run, v.rip));
    for space in spaces(mem, kind, &up, budget) {
        budget.check().map_err(Error::Memory)?;
        let mut found: Vec<(Gva, Vec<Region>)> = runs(&space)
            .into_iter()
            .filter_map(|run| Some((image_start(&run)?, run)))
            .collect();
        if found.is_empty() {
            continue;
        }
        found.sort_by_key(|(_, run)| !inside(run));
        found.truncate(CANDIDATES);
        let place = |(text_base, regions)| Located {
            space: space.fresh(),
            text_base,
            entry: None,
            regions,
        };
        return Ok(found.into_iter().map(place).collect());
    }
    budget.check().map_err(Error::Memory)?;
    Err(Error::NotLinux(format!(
        "no page tables of the guest's vCPUs map code with read-only data behind it between \
         {KERNEL_MAP} and {KERNEL_MAP_END}, as a booted 64-bit Linux kernel has it"
    )))
}

/// Whether symbols that were found in a candidate agree with the guest's state, which did not lead
/// to them. One of two facts is enough:
///
/// - `init_top_pgt` is a root of page tables that maps the kernel by the same table as `space`, in
///   which the symbols were found;
/// - a vCPU's GS base is one of `__per_cpu_offset[]` (arch/x86/kernel/setup_percpu.c:
///   `cpu_kernelmode_gs_base`).
#[must_use]
pub fn agrees(symbols: &Symbols, space: &Space<'_>, vcpus: &[Vcpu]) -> bool {
    // What can't be read agrees with nothing.
    is_own_root(symbols, space) == Some(true) || is_percpu(symbols, space, vcpus) == Some(true)
}

fn is_own_root(symbols: &Symbols, space: &Space<'_>) -> Option<bool> {
    let root = space.walk(symbols.addr("init_top_pgt")?).ok()?.frame;
    let entry_of = |space: &Space<'_>| {
        let (_, _, entry) = space.entry_slot(KERNEL_MAP, space.levels()).ok()?;
        (entry & PTE_PRESENT != 0).then_some(entry & PTE_FRAME)
    };
    Some(entry_of(&space.with_root(root))? == entry_of(space)?)
}

fn is_percpu(symbols: &Symbols, space: &Space<'_>, vcpus: &[Vcpu]) -> Option<bool> {
    let table = symbols.addr("__per_cpu_offset")?;
    let count = space.read_u32(symbols.addr("nr_cpu_ids")?).ok()? as usize;
    let bytes = space.read_vec(table, count.min(CPUS_MAX) * 8).ok()?;
    let is_base = |base: Gva| {
        base.0 >= KERNEL_HALF
            && bytes
                .chunks_exact(8)
                .any(|word| word == base.0.to_le_bytes())
    };
    let up = |v: &&Vcpu| v.online && v.long_mode;
    let mut up = vcpus.iter().filter(up);
    Some(up.any(|v| is_base(v.gs_base) || is_base(v.gs_other)))
}

fn in_long_mode(vcpus: &[Vcpu]) -> Result<Vec<&Vcpu>, Error> {
    let up: Vec<&Vcpu> = vcpus.iter().filter(|v| v.online && v.long_mode).collect();
    if up.is_empty() {
        return Err(Error::NotReady(
            "no vCPU of the guest is in 64-bit mode: it is still in its firmware or boot loader, \
             or it is a 32-bit system; try again once its kernel runs"
                .into(),
        ));
    }
    Ok(up)
}

/// The address spaces that the vCPUs `up` are in.
fn spaces<'m>(
    mem: &'m dyn Memory,
    kind: GuestType,
    up: &[&Vcpu],
    budget: &Budget,
) -> Vec<Space<'m>> {
    let five = up.iter().any(|v| v.la57) && kind != GuestType::Pv;
    let levels = if five { 5 } else { 4 };
    // With page-table isolation a vCPU in user mode runs on the user half of a pair of tables: the
    // kernel half is the page before it (`PTI_USER_PGTABLE_BIT`, arch/x86/include/asm/pgtable.h).
    let mut roots: Vec<Frame> = Vec::new();
    for root in up.iter().flat_map(|v| [Frame(v.root.0 & !1), v.root]) {
        if !roots.contains(&root) {
            roots.push(root);
        }
    }
    let space = |root| Space::within(mem, root, levels, budget.clone());
    roots.into_iter().map(space).collect()
}

/// Runs of mapped pages without holes, where the image may be.
fn runs(space: &Space<'_>) -> Vec<Vec<Region>> {
    let regions = space.regions(Range {
        start: KERNEL_MAP,
        end: KERNEL_MAP_END,
    });
    regions
        .chunk_by(|a, b| a.range.end == b.range.start)
        .map(<[Region]>::to_vec)
        .collect()
}

/// Whether `at` is in an executable part of `run`.
fn holds(run: &[Region], at: Gva) -> bool {
    run.iter().any(|r| r.executable && r.range.contains(at))
}

/// Where the image in `run` would begin; `None` if it does not begin with code, or has no read-only
/// data behind it.
fn image_start(run: &[Region]) -> Option<Gva> {
    let first = run.first().filter(|r| r.executable)?;
    has_constants(run).then_some(first.range.start)
}

fn has_constants(run: &[Region]) -> bool {
    run.iter().any(|r| !r.writable && !r.executable)
}
