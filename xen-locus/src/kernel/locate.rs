//! Finds the kernel image in a guest's memory, from what the kernel told Xen or the CPU.
//!
//! A PV kernel registers callbacks, a PVH/HVM kernel sets `MSR_LSTAR`: both are addresses in kernel
//! text. The image is mapped between `0xffffffff80000000` and `0xffffffffc0000000`
//! (Documentation/arch/x86/x86_64/mm.rst), wherever KASLR put it; `cleanup_highmap()` and
//! `xen_cleanhighmap()` remove every other mapping there, so the run of mapped pages around the
//! known address begins at `_text`.

use super::Error;
use crate::addr::{Frame, Gva, Range};
use crate::guest::budget::Budget;
use crate::guest::space::{Region, Space};
use crate::guest::{GuestType, Memory, Vcpu};

/// Start of the kernel image mapping (`__START_KERNEL_map`).
pub const KERNEL_MAP: Gva = Gva(0xffff_ffff_8000_0000);
/// End of the kernel image mapping, where module space begins at the latest.
pub const KERNEL_MAP_END: Gva = Gva(0xffff_ffff_c000_0000);

/// Where the kernel is.
#[derive(Debug)]
pub struct Located<'m> {
    /// The kernel's address space.
    pub space: Space<'m>,
    /// First byte of kernel text (`_text`).
    pub text_base: Gva,
    /// The address that led here.
    pub entry: Gva,
    /// Mapped runs of the image, in order.
    pub regions: Vec<Region>,
}

/// Locates the kernel of a guest whose virtual CPUs are in the states `vcpus`; all that is read in
/// its space, later too, is paid from `budget`.
///
/// # Errors
/// [`Error::NotReady`] while no vCPU shows a 64-bit kernel's entry point (firmware, early boot);
/// [`Error::NotLinux`] when what is there is not laid out as Linux lays itself out.
pub fn locate<'m>(
    mem: &'m dyn Memory,
    kind: GuestType,
    vcpus: &[Vcpu],
    budget: &Budget,
) -> Result<Located<'m>, Error> {
    let up: Vec<&Vcpu> = vcpus.iter().filter(|v| v.online && v.long_mode).collect();
    if up.is_empty() {
        return Err(Error::NotReady(
            "no vCPU of the guest is in 64-bit mode: it is still in its firmware or boot loader, \
             or it is a 32-bit system; try again once its kernel runs"
                .into(),
        ));
    }
    let Some(first) = up.iter().find(|v| v.entry != 0) else {
        return Err(Error::NotReady(
            "the guest's kernel has not set its entry point yet: it is still booting; try again"
                .into(),
        ));
    };
    let entry = Gva(first.entry);
    if entry < KERNEL_MAP || entry >= KERNEL_MAP_END {
        return Err(Error::NotLinux(format!(
            "the guest's kernel entry point is {entry}; a 64-bit Linux kernel has it between \
             {KERNEL_MAP} and {KERNEL_MAP_END}"
        )));
    }
    let levels = if first.la57 && kind != GuestType::Pv {
        5
    } else {
        4
    };
    // With page-table isolation a vCPU in user mode runs on the user half of a pair of tables: the
    // kernel half is the page before it (`PTI_USER_PGTABLE_BIT`, arch/x86/include/asm/pgtable.h).
    let roots = up.iter().flat_map(|v| [v.root & !1, v.root]);
    for root in roots {
        budget.check().map_err(Error::Memory)?;
        let space = Space::within(mem, Frame(root), levels, budget.clone());
        let regions = space.regions(Range {
            start: KERNEL_MAP,
            end: KERNEL_MAP_END,
        });
        let Some(text) = image_around(&regions, entry) else {
            continue;
        };
        let Some(start) = text.first() else { continue };
        if !text.iter().any(|r| !r.writable && !r.executable) {
            continue;
        }
        let text_base = start.range.start;
        return Ok(Located {
            space,
            text_base,
            entry,
            regions: text,
        });
    }
    budget.check().map_err(Error::Memory)?;
    Err(Error::NotLinux(format!(
        "around the guest's kernel entry point {entry} no read-only data is mapped beside the \
         code, as a booted Linux kernel has it; if the guest is just booting, try again"
    )))
}

/// The regions of the run without holes that holds `entry`, in an executable part.
fn image_around(regions: &[Region], entry: Gva) -> Option<Vec<Region>> {
    let at = regions
        .iter()
        .position(|r| r.range.contains(entry) && r.executable)?;
    let mut first = at;
    while first > 0 && regions.get(first - 1)?.range.end == regions.get(first)?.range.start {
        first -= 1;
    }
    let mut last = at;
    while regions.get(last + 1).is_some_and(|next| {
        regions
            .get(last)
            .is_some_and(|here| here.range.end == next.range.start)
    }) {
        last += 1;
    }
    Some(regions.get(first..=last)?.to_vec())
}
