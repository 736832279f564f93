//! The kernel's ORC table: where it is in the guest, and in which format.

use locus_guest::addr::Gva;

use super::layout::{EntryLayout, SAMPLE};
use super::{OrcFormat, OrcRow, FORMAT_HASHES, HASH_LEN, ROWS_MAX};
use crate::{to_usize, Error, Kernel};

/// Where an ORC table is in the guest, how many rows it has, and their format.
#[derive(Debug)]
pub struct OrcTable {
    /// Address of the first part, 32-bit words.
    pub(super) ips: Gva,
    /// Address of the rows.
    pub(super) rows: Gva,
    pub(super) count: usize,
    pub(super) layout: EntryLayout,
}

impl OrcTable {
    /// The table of the kernel itself. Of its rows at most 4096 are read, where that is needed to
    /// tell the format.
    ///
    /// # Errors
    /// [`Error::Missing`] if the kernel has none (`CONFIG_UNWINDER_ORC`); [`Error::Odd`] if its two
    /// parts don't match, or its format isn't known; [`Error::Memory`].
    pub fn of(kernel: &Kernel<'_>) -> Result<OrcTable, Error> {
        let ips = kernel.between("__start_orc_unwind_ip", "__stop_orc_unwind_ip", 1 << 30)?;
        let rows = kernel.between("__start_orc_unwind", "__stop_orc_unwind", 1 << 30)?;
        let mut layout = EntryLayout::of(kernel.btf()?)?;
        let count = to_usize(ips.len() / 4)?;
        let fits = count.checked_mul(layout.len).map(|n| n as u64) == Some(rows.len());
        if !ips.len().is_multiple_of(4) || !fits || !(1..=ROWS_MAX).contains(&count) {
            return Err(Error::Odd(format!(
                "the ORC tables have {} bytes of addresses and {} bytes of rows of {} bytes; \
                 expected as many addresses as rows, at most {ROWS_MAX}",
                ips.len(),
                rows.len(),
                layout.len
            )));
        }
        if let Some(named) = header(kernel)? {
            // The members can't tell these two apart.
            let same = named == layout.format
                || (named, layout.format) == (OrcFormat::Reordered, OrcFormat::Typed);
            if !same {
                return Err(Error::Odd(format!(
                    "the kernel's .orc_header names the ORC format {named}, but BTF has \
                     struct orc_entry in the format {}",
                    layout.format
                )));
            }
            layout.format = named;
        } else if layout.format == OrcFormat::Typed {
            let sample = count.min(SAMPLE) * layout.len;
            let bytes = kernel.space.read_vec(rows.start, sample)?;
            if !layout.is_plausible(&bytes) {
                layout.format = OrcFormat::Reordered;
            }
        }
        Ok(OrcTable {
            ips: ips.start,
            rows: rows.start,
            count,
            layout,
        })
    }

    /// Number of rows.
    #[must_use]
    #[allow(clippy::len_without_is_empty)] // a table without rows is not believed
    pub fn len(&self) -> usize {
        self.count
    }

    /// Size of a row (`struct orc_entry`), in bytes.
    #[must_use]
    pub fn row_len(&self) -> usize {
        self.layout.len
    }

    /// Decodes the row in `bytes`, a `struct orc_entry`. `None` if it has no meaning in this table's format.
    #[must_use]
    pub fn row(&self, bytes: &[u8]) -> Option<OrcRow> {
        self.layout.row(bytes)
    }

    /// The format of the rows.
    #[must_use]
    pub fn format(&self) -> OrcFormat {
        self.layout.format
    }
}

/// The format that `.orc_header` names; `None` for a kernel without it.
fn header(kernel: &Kernel<'_>) -> Result<Option<OrcFormat>, Error> {
    let Some(at) = kernel.symbols.addr("__start_orc_header") else {
        return Ok(None);
    };
    let found = kernel.space.read_vec(at, HASH_LEN)?;
    match FORMAT_HASHES.iter().find(|(_, hash)| hash[..] == found[..]) {
        Some((format, _)) => Ok(Some(*format)),
        None => Err(Error::Odd(format!(
            "the kernel's .orc_header at {at} is {}: an unknown ORC format",
            hex::encode(&found)
        ))),
    }
}
