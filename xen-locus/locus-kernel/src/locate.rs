//! Finds the kernel's image in a guest's memory, from an address that the kernel told Xen or the CPU.
//!
//! A PV kernel registers callbacks, and a PVH or HVM kernel sets `MSR_LSTAR`. Both are addresses in
//! kernel text. The image is between `0xffffffff80000000` and `0xffffffffc0000000`
//! (Documentation/arch/x86/x86_64/mm.rst), at a place chosen by KASLR. `cleanup_highmap()` and
//! `xen_cleanhighmap()` remove every other mapping there. So the run of mapped pages around the
//! known address begins at `_text`.
//!
//! The image may have holes behind that run. With page-table isolation the kernel removes the
//! mappings of what it frees of its image: what is between text, read-only data and variables, and
//! `.init` (arch/x86/mm/init.c: `free_kernel_image_pages`). The image ends before the next run that
//! begins with code, which is a module's, and at the symbol `_end`.
//!
//! With page-table isolation, too, a vCPU in user mode is on the user half of a pair of roots. That
//! half maps the kernel's entry code, or all of its code and read-only data
//! (arch/x86/mm/pti.c: `pti_clone_entry_text`, `pti_clone_kernel_text`), but never its variables.
//! The kernel half is the page before it. It is believed only where the user half is not the whole
//! kernel, and maps the same code: the page before another root may be anything.
//!
//! A saved core of a PVH or HVM guest does not have `MSR_LSTAR`. There each image is a candidate
//! if it begins with code and has read-only data and variables. The symbols that are found in a
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

/// Where Xen's own code is (`XEN_VIRT_START`, xen/arch/x86/include/asm/config.h).
const XEN_TEXT: std::ops::Range<u64> = 0xffff_82d0_0000_0000..0xffff_82d1_0000_0000;

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
    /// What a kernel that was located and not understood is: one that still boots may be understood later.
    pub(super) fn not_understood(&self, error: Error) -> Error {
        match error {
            Error::NotLinux(_) if is_unprotected(&self.regions) => still_boots(self.text_base),
            error => error,
        }
    }

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

/// Locates the kernel of a running guest whose virtual CPUs are in the states `vcpus`: what may be it, at least one place,
/// and mostly no more. All that is read in its space, later too, is paid from `budget`.
///
/// # Errors
/// [`Error::NotReady`] while no vCPU shows the entry point of a 64-bit kernel (firmware, early
/// boot), one shows a kernel that has not protected its memory yet, or they show those of several kernels and none is found;
/// [`Error::NotLinux`] if the memory there is not mapped as that of Linux; [`Error::Memory`] if the budget is spent.
pub fn locate<'m>(
    mem: &'m dyn Memory,
    kind: GuestType,
    vcpus: &[Vcpu],
    budget: &Budget,
) -> Result<Vec<Located<'m>>, Error> {
    let up = in_long_mode(vcpus)?;
    let entries = entry_points(&up)?;
    let (mut found, mut none) = (Vec::new(), None);
    for &entry in &entries {
        match locate_at(mem, kind, &up, entry, budget) {
            Ok(located) => found.push(located),
            // Another vCPU's may be the guest's own.
            Err(error @ Error::NotLinux(_)) => none = none.or(Some(error)),
            // A kernel that boots, after a crash for example: another vCPU may still be where the last kernel left it.
            Err(error) => return Err(error),
        }
    }
    match none {
        _ if !found.is_empty() => Ok(found),
        Some(error) if entries.len() == 1 => Err(error),
        _ => Err(several(&entries)),
    }
}

/// Most entry points that are tried. Of a guest that runs no guests of its own there is one.
const ENTRIES_MAX: usize = 8;

/// The entry points of the vCPUs `up`, each once. Where a vCPU runs a guest of the guest's own, its registers are those of
/// that one (xen/arch/x86/hvm/svm/nestedsvm.c, vmx/vvmx.c), so there may be several.
///
/// # Errors
/// None may be that of a 64-bit Linux kernel.
fn entry_points(up: &[&Vcpu]) -> Result<Vec<Gva>, Error> {
    let mut all: Vec<Gva> = Vec::new();
    for entry in up.iter().filter_map(|v| v.entry) {
        if !all.contains(&entry) && all.len() < ENTRIES_MAX {
            all.push(entry);
        }
    }
    let Some(&entry) = all.first() else {
        return Err(Error::NotReady(
            "the guest's kernel has not set its entry point yet: it is still booting; try again (if that \
             lasts, it may use FRED, with which a kernel sets none and is not supported)"
                .into(),
        ));
    };
    all.retain(|&entry| KERNEL_MAP <= entry && entry < KERNEL_MAP_END);
    if !all.is_empty() {
        return Ok(all);
    }
    Err(Error::NotLinux(if XEN_TEXT.contains(&entry.0) {
        format!(
            "the guest's kernel entry point is {entry}, which is code of Xen: this is a PV guest in a PV shim \
             (pvshim=1), and its kernel runs inside of that other Xen, out of reach; start it as PV or PVH"
        )
    } else {
        format!(
            "the guest's kernel entry point is {entry}; a 64-bit Linux kernel has it between \
             {KERNEL_MAP} and {KERNEL_MAP_END}. If the guest runs guests of its own, this may be that of such a \
             one; then try again"
        )
    }))
}

/// Locates the kernel whose entry point is `entry`.
fn locate_at<'m>(
    mem: &'m dyn Memory,
    kind: GuestType,
    up: &[&Vcpu],
    entry: Gva,
    budget: &Budget,
) -> Result<Located<'m>, Error> {
    let (mut elsewhere, mut boots) = (false, false);
    for Tables { space, user_half } in tables(mem, kind, up, budget) {
        budget.check().map_err(Error::Memory)?;
        let runs = runs(&space);
        let Some(at) = runs.iter().position(|run| holds(run, entry)) else {
            continue;
        };
        let regions = image(&runs, at);
        if !is_whole(&regions) {
            boots |= is_unprotected(&regions);
            continue;
        }
        if user_half.is_some_and(|half| !same_page(&half, &space, entry)) {
            elsewhere = true;
            continue;
        }
        return Ok(Located {
            space,
            // The run holds the entry point, so it has a first region.
            text_base: regions.first().map_or(entry, |r| r.range.start),
            entry: Some(entry),
            regions,
        });
    }
    budget.check().map_err(Error::Memory)?;
    if boots {
        return Err(still_boots(entry));
    }
    Err(Error::NotLinux(if elsewhere {
        format!(
            "the guest's vCPUs are on page tables that map the kernel entry point {entry} but not \
             the kernel, as the user half of page-table isolation does; the page before them, \
             which then is the kernel half, maps another page there; if a process has just ended, \
             try again"
        )
    } else {
        format!(
            "around the guest's kernel entry point {entry} no read-only data and variables are \
             mapped behind the code, as a booted Linux kernel has them; if the guest is still \
             booting, or runs guests of its own, try again"
        )
    }))
}

/// The vCPUs tell of several kernels, and none of them is found.
fn several(entries: &[Gva]) -> Error {
    let entries: Vec<String> = entries.iter().map(Gva::to_string).collect();
    Error::NotReady(format!(
        "the guest's vCPUs have the entry points of several kernels ({}), and none of these kernels is found on the page \
         tables that they are on: the guest runs guests of its own, or one kernel has just followed another; try again",
        entries.join(", ")
    ))
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
    let inside = |image: &[Region]| up.iter().any(|v| !v.user && holds(image, v.rip));
    for Tables { space, user_half } in tables(mem, kind, &up, budget) {
        budget.check().map_err(Error::Memory)?;
        if user_half.is_some_and(|half| !same_code(&half, &space)) {
            continue;
        }
        let runs = runs(&space);
        let mut found: Vec<(Gva, Vec<Region>)> = (0..runs.len())
            .filter_map(|at| {
                let start = code_start(runs.get(at)?)?;
                let image = image(&runs, at);
                is_whole(&image).then_some((start, image))
            })
            .collect();
        if found.is_empty() {
            continue;
        }
        found.sort_by_key(|(_, image)| !inside(image));
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
        "no page tables of the guest's vCPUs map code with read-only data and variables behind it \
         between {KERNEL_MAP} and {KERNEL_MAP_END}, as a booted 64-bit Linux kernel has them"
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

/// Page tables that may map the kernel.
struct Tables<'m> {
    space: Space<'m>,
    /// What led here, if they are only supposed: the user half of a pair, behind `space`'s root.
    user_half: Option<Space<'m>>,
}

/// The page tables that the vCPUs `up` are on: first those in kernel mode, then those in user mode,
/// then the kernel halves that may belong to them.
fn tables<'m>(
    mem: &'m dyn Memory,
    kind: GuestType,
    up: &[&Vcpu],
    budget: &Budget,
) -> Vec<Tables<'m>> {
    let five = up.iter().any(|v| v.la57) && kind != GuestType::Pv;
    let levels = if five { 5 } else { 4 };
    let (user, kernel): (Vec<&Vcpu>, Vec<&Vcpu>) = up.iter().copied().partition(|v| v.user);
    let mut roots: Vec<Frame> = Vec::new();
    for vcpu in kernel.into_iter().chain(user) {
        if !roots.contains(&vcpu.root) {
            roots.push(vcpu.root);
        }
    }
    let space = |root| Space::within(mem, root, levels, budget.clone());
    let own = roots.iter().map(|&root| Tables {
        space: space(root),
        user_half: None,
    });
    // `PTI_USER_PGTABLE_BIT` (arch/x86/include/asm/pgtable.h) is the lowest bit of a frame's number.
    // Entry code is in kernel mode and still on the user half. Xen's PV guests have no isolation.
    let halves = roots
        .iter()
        .filter(|r| r.0 & 1 == 1 && kind != GuestType::Pv);
    let halves = halves.map(|&root| Tables {
        space: space(Frame(root.0 & !1)),
        user_half: Some(space(root)),
    });
    own.chain(halves).collect()
}

/// Whether the two halves of a pair map the same page at `at`, in kernel code.
fn same_page(user_half: &Space<'_>, kernel_half: &Space<'_>, at: Gva) -> bool {
    match (user_half.walk(at), kernel_half.walk(at)) {
        (Ok(user), Ok(kernel)) => user.executable && user.frame == kernel.frame,
        _ => false,
    }
}

/// Whether the first kernel code that the user half maps is the same in the kernel half.
fn same_code(user_half: &Space<'_>, kernel_half: &Space<'_>) -> bool {
    let runs = runs(user_half);
    let code = runs.iter().flatten().find(|r| r.executable);
    code.is_some_and(|code| same_page(user_half, kernel_half, code.range.start))
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

/// Where `run` begins, if it begins with code.
fn code_start(run: &[Region]) -> Option<Gva> {
    let first = run.first().filter(|r| r.executable)?;
    Some(first.range.start)
}

/// The image that begins with the run number `first`: that run, and those behind it up to the next
/// that begins with code.
fn image(runs: &[Vec<Region>], first: usize) -> Vec<Region> {
    let mut runs = runs.iter().skip(first);
    let text = runs.next().into_iter();
    let rest = runs.take_while(|run| code_start(run).is_none());
    text.chain(rest).flatten().copied().collect()
}

/// Whether memory of an image can be written and executed. So is all of it while Linux boots, until `mark_rodata_ro`
/// (arch/x86/mm/init_64.c) makes code and constants read-only, and then all behind the code not executable. The kernel is not
/// `SYSTEM_RUNNING` then.
fn is_unprotected(image: &[Region]) -> bool {
    image.iter().any(|r| r.writable && r.executable)
}

fn still_boots(at: Gva) -> Error {
    Error::NotReady(format!(
        "memory of the guest's kernel around {at} can be written and executed: the kernel is still booting, and has not \
         protected its memory yet; try again (if that lasts, it was booted with rodata=off, or is no Linux: neither is supported)"
    ))
}

/// Whether an image has read-only data and variables, as that of a booted kernel.
fn is_whole(image: &[Region]) -> bool {
    let data = |writable| move |r: &Region| !r.executable && r.writable == writable;
    image.iter().any(data(false)) && image.iter().any(data(true))
}
