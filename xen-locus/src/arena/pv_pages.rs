//! Are the low pages of a PV guest unused, as PV Linux leaves them?
//!
//! They are memory like any other: a guest may have given one to its allocator, or have data in it. An unused
//! one is still as Xen gave it to the guest, scrubbed: nothing was ever written to it. And its `struct page`
//! says that it is reserved.

use locus_guest::addr::{Gva, PAGE_LEN};
use locus_kernel::Kernel;

use crate::error::{Error, Result};

/// Refuses page `pfn` of a PV guest, which the kernel sees at `at`, if the guest uses it.
///
/// # Errors
/// [`Class::NotApplicable`](crate::error::Class::NotApplicable): the guest uses it. Or its memory can't be read.
pub fn check_unused(kernel: &Kernel<'_>, pfn: u64, at: Gva) -> Result<()> {
    let used = |how: &str| {
        Error::not_applicable(format!(
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

/// Whether `struct page` has the flag `PG_reserved` (include/linux/page-flags.h); `None` where the kernel's types
/// don't have it.
fn reserved(kernel: &Kernel<'_>, pfn: u64) -> Result<Option<bool>> {
    let (Some(base), Ok(btf)) = (kernel.symbols.addr("vmemmap_base"), kernel.btf()) else {
        return Ok(None);
    };
    let (Ok(size), Ok(flags), Some(bit)) = (
        btf.size_of("page"),
        btf.offset_of_sized("page", "flags", 8),
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ExitCode;
    use locus_guest::addr::PAGE_SIZE;
    use locus_kernel::btf::blob::Blob;
    use locus_kernel::fixture::{vcpus, Fixture, KIND, TEXT};

    const PFN: u64 = 0xa5;
    /// Where the kernel sees the page, and its array of `struct page`.
    const AT: Gva = Gva(0xffff_8880_000a_5000);
    const PAGES: Gva = Gva(0xffff_ea00_0000_0000);
    /// A variable of the kernel's.
    const BASE: u64 = TEXT.0 + (8 << 20);
    const RESERVED: u64 = 1 << 12;

    /// What is said to a page that holds `bytes` and has `flags`.
    fn said(bytes: &[u8], flags: u64) -> std::result::Result<(), (ExitCode, String)> {
        let mut types = Blob::new();
        let long = types.int("long", 8);
        types.structure("page", 64, &[("flags", long, 0)]);
        types.enumeration("pageflags", &[("PG_locked", 0), ("PG_reserved", 12)]);
        let mut fixture = Fixture::new();
        let symbol = (BASE, 'd', "vmemmap_base".to_owned());
        fixture.symbols.push(symbol);
        fixture.constants.push(("__start_BTF", types.bytes()));
        fixture.constants.push(("__stop_BTF", Vec::new()));
        let memory = fixture.build();
        memory.map_bytes(Gva(BASE), &PAGES.0.to_le_bytes(), true, false);
        memory.map_bytes(AT, bytes, true, false);
        let at = PAGES.plus(64 * PFN);
        let mut pages = vec![0xff; at.offset()];
        pages.extend(flags.to_le_bytes());
        pages.resize(usize::try_from(PAGE_SIZE).unwrap(), 0xff);
        memory.map_bytes(at.page(), &pages, true, false);
        let kernel = Kernel::read(&memory, KIND, &vcpus()).unwrap();
        check_unused(&kernel, PFN, AT).map_err(|e| (e.exit_code(), e.to_string()))
    }

    #[test]
    fn a_low_page_is_taken_only_if_it_is_empty_and_reserved() {
        assert_eq!(said(&[0; 4096], RESERVED), Ok(()));
        let mut last = [0; 4096];
        last[4095] = 1;
        for (bytes, flags, words) in [
            (&last, RESERVED, "not empty"),
            (&[0; 4096], !RESERVED, "PG_reserved"),
        ] {
            let (code, text) = said(bytes, flags).unwrap_err();
            assert_eq!(code, ExitCode::NotApplicable, "{text}");
            assert!(text.contains(words) && text.contains("0xa5"), "{text}");
        }
    }
}
