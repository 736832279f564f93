//! Are the low pages of a PV guest unused, as PV Linux leaves them?
//!
//! They are memory like any other: a guest may have given one to its allocator, or keep data in it.
//! What is certain of an unused one is that nothing was ever written to it since Xen gave it to the
//! guest, scrubbed, and that `struct page` calls it reserved.

use crate::addr::{Gva, PAGE_LEN};
use crate::error::{Error, Result};
use crate::kernel::Kernel;

/// Refuses the page `pfn`, which the kernel sees at `at`, if the guest uses it.
///
/// # Errors
/// [`Error::NotApplicable`]: it does; or its memory can't be read.
pub fn check_unused(kernel: &Kernel<'_>, pfn: u64, at: Gva) -> Result<()> {
    let used = |how: &str| {
        Error::NotApplicable(format!(
            "the arena wants page frame {pfn:#x}, which PV Linux reserves and never uses, but the \
             guest uses it: {how}; the page is left alone"
        ))
    };
    let mut page = vec![0; PAGE_LEN];
    kernel.space.read(at, &mut page)?;
    if page.iter().any(|&b| b != 0) {
        return Err(used("it is not empty"));
    }
    match reserved(kernel, pfn)? {
        Some(false) => Err(used("its struct page does not say PG_reserved")),
        Some(true) | None => Ok(()),
    }
}

/// What `struct page` says (`PG_reserved`, include/linux/page-flags.h); `None` where the kernel's types
/// don't tell where that stands.
fn reserved(kernel: &Kernel<'_>, pfn: u64) -> Result<Option<bool>> {
    let (Some(base), Ok(btf)) = (kernel.symbols.addr("vmemmap_base"), kernel.btf()) else {
        return Ok(None);
    };
    let (Ok(size), Ok(flags), Some(bit)) = (
        btf.size_of("page"),
        btf.offset_of("page", "flags"),
        btf.enum_value("pageflags", "PG_reserved"),
    ) else {
        return Ok(None);
    };
    let base = Gva(kernel.space.read_u64(base)?);
    let page = base.plus((size as u64).wrapping_mul(pfn));
    let flags = kernel.space.read_u64(page.plus(flags as u64))?;
    let bit = u32::try_from(bit)
        .ok()
        .and_then(|bit| flags.checked_shr(bit));
    Ok(bit.map(|flag| flag & 1 == 1))
}
