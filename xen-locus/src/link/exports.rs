//! What the kernel's own image exports to modules.
//!
//! `struct kernel_symbol` (include/linux/export-internal.h; include/linux/export.h) holds address and
//! name, as they are or as distances from their own place. Tables: include/asm-generic/vmlinux.lds.h;
//! later kernels have but the first of the two.

use crate::addr::Gva;
use crate::error::{Error, Result};
use crate::guest::fetch;
use crate::kernel::Kernel;

/// Longest table read, in bytes: there are some ten thousand entries of 12 bytes.
const TABLE_MAX: u64 = 4 << 20;
/// Largest believed `struct kernel_symbol`, in bytes.
const ENTRY_MAX: usize = 64;
/// Where the tables begin and end.
const TABLES: [[&str; 2]; 2] = [
    ["__start___ksymtab", "__stop___ksymtab"],
    ["__start___ksymtab_gpl", "__stop___ksymtab_gpl"],
];

/// Addresses of all exports, rising.
#[derive(Debug)]
pub struct Exports(Vec<Gva>);

impl Exports {
    /// Reads the tables; a kernel without symbols for them exports nothing.
    ///
    /// # Errors
    /// The guest's types lack `struct kernel_symbol` or have it in an unknown form, or its memory can't
    /// be read.
    pub fn read(kernel: &Kernel<'_>) -> Result<Exports> {
        let btf = kernel.btf()?;
        let relative = btf.has("kernel_symbol", "value_offset");
        let of = |member: &str| btf.offset_of("kernel_symbol", member);
        let value = match relative {
            true => of("value_offset")?,
            false => of("value")?,
        };
        let size = btf.size_of("kernel_symbol")?;
        if size == 0 || size > ENTRY_MAX {
            return Err(Error::NotApplicable(format!(
                "struct kernel_symbol has {size} bytes in the guest's types; expected 1 to {ENTRY_MAX}"
            )));
        }
        let mut all = Vec::new();
        for [start, stop] in TABLES {
            let Some((start, table)) = table(kernel, start, stop)? else {
                continue;
            };
            for (i, entry) in table.chunks_exact(size).enumerate() {
                let place = start.plus((i * size + value) as u64);
                all.extend(match relative {
                    true => fetch::u32(entry, value)
                        .map(|d| Gva(place.0.wrapping_add_signed(d.cast_signed().into()))),
                    false => fetch::u64(entry, value).map(Gva),
                });
            }
        }
        all.sort_unstable();
        Ok(Exports(all))
    }

    /// Whether what stands at `at` is exported, by whatever name.
    #[must_use]
    pub fn has(&self, at: Gva) -> bool {
        self.0.binary_search(&at).is_ok()
    }
}

/// The bytes between two symbols and the address of the first; `None` without them.
fn table(kernel: &Kernel<'_>, start: &str, stop: &str) -> Result<Option<(Gva, Vec<u8>)>> {
    let (Some(start), Some(stop)) = (kernel.symbols.addr(start), kernel.symbols.addr(stop)) else {
        return Ok(None);
    };
    let len = stop.0.saturating_sub(start.0).min(TABLE_MAX);
    let len = usize::try_from(len).unwrap_or(0);
    Ok(Some((start, kernel.space.read_vec(start, len)?)))
}
