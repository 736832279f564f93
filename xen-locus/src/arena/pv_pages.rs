//! Are the low pages of a PV guest unused, as PV Linux leaves them?
//!
//! They are memory like any other: a guest may have given one to its allocator, or have data in it. An unused
//! one is still as Xen gave it to the guest, scrubbed: nothing was ever written to it. And its `struct page`
//! says that it is reserved.

use locus_guest::addr::{Gva, PAGE_LEN};
use locus_kernel::Kernel;

use crate::error::{Error, Result};

/// The flag of a page that no allocator has.
const FLAG: &str = "PG_reserved";
/// Where a kernel has its array of `struct page` that does not choose that when it boots, and so has no variable for it
/// (arch/x86/include/asm/pgtable_64_types.h: `__VMEMMAP_BASE_L4`).
const FIXED: Gva = Gva(0xffff_ea00_0000_0000);

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
    match is_reserved(kernel, pfn)? {
        true => Ok(()),
        false => Err(used("its struct page does not say PG_reserved")),
    }
}

/// Whether `struct page` has the flag `PG_reserved` (include/linux/page-flags.h).
///
/// # Errors
/// [`Class::NotApplicable`](crate::error::Class::NotApplicable): the kernel's types don't have it. Or memory can't be read.
fn is_reserved(kernel: &Kernel<'_>, pfn: u64) -> Result<bool> {
    let btf = kernel.btf()?;
    let size = btf.size_of("page")? as u64;
    let flags = btf.offset_of_sized("page", "flags", 8)? as u64;
    let bit = btf.enum_value("pageflags", FLAG);
    let bit = bit.and_then(|bit| u32::try_from(bit).ok());
    let Some(bit) = bit.filter(|&bit| bit < u64::BITS) else {
        return Err(Error::not_applicable(format!(
            "the guest's types have no {FLAG} among the pageflags; expected it, to see whether a page of a PV guest is unused"
        )));
    };
    let base = match kernel.variable_if_any("vmemmap_base", 8)? {
        Some(at) => Gva(kernel.space.read_u64(at)?),
        None => FIXED,
    };
    let page = base.plus(size.wrapping_mul(pfn));
    let flags = kernel.space.read_u64(page.plus(flags))?;
    Ok(flags >> bit & 1 == 1)
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
    const PAGES: Gva = FIXED;
    /// A variable of the kernel's.
    const BASE: u64 = TEXT.0 + (8 << 20);
    const RESERVED: u64 = 1 << 12;

    /// What is said to a page that holds `bytes` and has `flags`.
    fn said(bytes: &[u8], flags: u64) -> std::result::Result<(), (ExitCode, String)> {
        said_by("vmemmap_base", FLAG, bytes, flags)
    }

    /// The same by a kernel that has these names for the variable and the flag.
    fn said_by(
        variable: &str,
        flag: &str,
        bytes: &[u8],
        flags: u64,
    ) -> std::result::Result<(), (ExitCode, String)> {
        let mut types = Blob::new();
        let long = types.int("long", 8);
        types.structure("page", 64, &[("flags", long, 0)]);
        types.enumeration("pageflags", &[("PG_locked", 0), (flag, 12)]);
        let mut fixture = Fixture::new();
        let symbol = (BASE, 'd', variable.to_owned());
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

    #[test]
    fn a_low_page_of_which_it_is_not_known_whether_it_is_reserved_is_not_taken() {
        let (code, text) = said_by("vmemmap_base", "PG_kept", &[0; 4096], RESERVED).unwrap_err();
        assert_eq!(code, ExitCode::NotApplicable, "{text}");
        assert!(text.contains("no PG_reserved"), "{text}");
        // A kernel without the variable has its pages at a fixed place.
        assert_eq!(said_by("other", FLAG, &[0; 4096], RESERVED), Ok(()));
        let (_, text) = said_by("other", FLAG, &[0; 4096], !RESERVED).unwrap_err();
        assert!(text.contains("does not say PG_reserved"), "{text}");
    }
}
