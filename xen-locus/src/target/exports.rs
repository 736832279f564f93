//! What the kernel's own image exports to modules.
//!
//! `struct kernel_symbol` (include/linux/export-internal.h; include/linux/export.h) holds address and
//! name, as they are or as distances from their own place. Tables: include/asm-generic/vmlinux.lds.h;
//! later kernels have but the first of the two.
//!
//! With `CONFIG_MODVERSIONS` there is a table of CRCs beside each, in the same order: 32 bits each,
//! themselves. Other architectures had distances to CRCs until Linux kernel commit 7b4537199a4a
//! ("kbuild: link symbol CRCs at final link, removing `CONFIG_MODULE_REL_CRCS`") (in v5.19); a table that
//! looks like that, or has another size, counts as none.

use std::collections::HashSet;

use locus_guest::addr::Gva;
use locus_guest::fetch;
use locus_kernel::Kernel;

use crate::error::{Error, Result};

/// Longest table read, in bytes: there are some ten thousand entries of 12 bytes.
const TABLE_MAX: u64 = 4 << 20;
/// Largest believed `struct kernel_symbol`, in bytes.
const ENTRY_MAX: usize = 64;
/// Longest believed name, in bytes.
const NAME_MAX: usize = 512;
/// Farthest a distance from one place of the kernel's image to another leads, in bytes. One in sixteen
/// CRCs is no larger.
const IMAGE_MAX: u32 = 128 << 20;
/// Where the table begins that each kernel with modules has.
pub const TABLE: &str = "__start___ksymtab";
/// The tables: symbols from and to, and their CRCs.
const TABLES: [[&str; 4]; 2] = [
    [
        TABLE,
        "__stop___ksymtab",
        "__start___kcrctab",
        "__stop___kcrctab",
    ],
    [
        "__start___ksymtab_gpl",
        "__stop___ksymtab_gpl",
        "__start___kcrctab_gpl",
        "__stop___kcrctab_gpl",
    ],
];

/// One export.
#[derive(Clone, Copy, Debug)]
struct Export {
    at: Gva,
    /// Where its name stands.
    name: Gva,
    crc: Option<u32>,
}

/// All exports, by rising address.
#[derive(Debug)]
pub struct Exports(Vec<Export>);

impl Exports {
    /// Reads the tables; a kernel without symbols for them exports nothing.
    ///
    /// # Errors
    /// The guest's types lack `struct kernel_symbol` or have it in an unknown form, or its memory can't
    /// be read.
    pub fn read(kernel: &Kernel<'_>) -> Result<Exports> {
        let btf = kernel.btf()?;
        let relative = btf.has("kernel_symbol", "value_offset");
        let bytes = if relative { 4 } else { 8 };
        let of = |member: &str| btf.offset_of_sized("kernel_symbol", member, bytes);
        let (value, name) = match relative {
            true => (of("value_offset")?, of("name_offset")?),
            false => (of("value")?, of("name")?),
        };
        let size = btf.size_of("kernel_symbol")?;
        if size == 0 || size > ENTRY_MAX {
            return Err(Error::not_applicable(format!(
                "struct kernel_symbol has {size} bytes in the guest's types; expected 1 to {ENTRY_MAX}"
            )));
        }
        let mut all = Vec::new();
        for [start, stop, crcs, crcs_end] in TABLES {
            let Some((start, table)) = table(kernel, start, stop)? else {
                continue;
            };
            let count = table.len() / size;
            let crcs = table_of_crcs(kernel, crcs, crcs_end, count)?;
            for (i, entry) in table.chunks_exact(size).enumerate() {
                let target = |field: usize| {
                    let place = start.plus((i * size + field) as u64);
                    match relative {
                        true => fetch::u32(entry, field)
                            .map(|d| Gva(place.0.wrapping_add_signed(d.cast_signed().into()))),
                        false => fetch::u64(entry, field).map(Gva),
                    }
                };
                if let (Some(at), Some(name)) = (target(value), target(name)) {
                    let crc = crcs.as_ref().and_then(|crcs| fetch::u32(crcs, 4 * i));
                    all.push(Export { at, name, crc });
                }
            }
        }
        all.sort_by_key(|e| e.at);
        Ok(Exports(all))
    }

    fn at(&self, at: Gva) -> impl Iterator<Item = &Export> {
        let first = self.0.partition_point(|e| e.at < at);
        // `first` is at most the length.
        let rest = self.0.get(first..).unwrap_or_default();
        rest.iter().take_while(move |e| e.at == at)
    }

    /// Whether what stands at `at` is exported, by whatever name.
    #[must_use]
    pub fn has(&self, at: Gva) -> bool {
        self.at(at).next().is_some()
    }

    /// The CRC of the export `name`; `None` if there is no such export, or its CRC is not known.
    ///
    /// # Errors
    /// The guest's memory can't be read, or its budget is spent.
    pub fn crc(&self, kernel: &Kernel<'_>, name: &str) -> Result<Option<u32>> {
        let budget = kernel.space.budget();
        // A guest may have many symbols of one name at one place, and many exports there.
        let mut places = HashSet::new();
        for at in kernel.symbols.addrs(name).filter(|&at| places.insert(at)) {
            // Several names may stand for one place, each with a CRC of its own.
            for export in self.at(at) {
                budget.spend(1)?;
                if export.crc.is_some() && kernel.space.read_cstr(export.name, NAME_MAX)? == name {
                    return Ok(export.crc);
                }
            }
        }
        budget.check()?;
        Ok(None)
    }
}

/// The bytes between two symbols and the address of the first; `None` without them.
fn table(kernel: &Kernel<'_>, start: &str, stop: &str) -> Result<Option<(Gva, Vec<u8>)>> {
    let (Some(start), Some(stop)) = (kernel.symbols.addr(start), kernel.symbols.addr(stop)) else {
        return Ok(None);
    };
    let len = stop.0.saturating_sub(start.0).min(TABLE_MAX);
    // At most TABLE_MAX, so it fits.
    let len = usize::try_from(len).unwrap_or_default();
    Ok(Some((start, kernel.space.read_vec(start, len)?)))
}

/// The CRCs of `count` exports, if these are CRCs.
fn table_of_crcs(
    kernel: &Kernel<'_>,
    start: &str,
    stop: &str,
    count: usize,
) -> Result<Option<Vec<u8>>> {
    let Some((_, crcs)) = table(kernel, start, stop)? else {
        return Ok(None);
    };
    let far = |word: &[u8]| {
        let distance = fetch::u32(word, 0).map(|w| w.cast_signed().unsigned_abs());
        distance.is_some_and(|d| d > IMAGE_MAX)
    };
    let fits = crcs.len() == count * 4 && crcs.chunks_exact(4).any(far);
    Ok(fits.then_some(crcs))
}

#[cfg(test)]
mod tests;
