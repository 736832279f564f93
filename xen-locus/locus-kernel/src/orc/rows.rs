//! The rows of an ORC table, read and checked, for many questions.

use locus_guest::addr::{Gva, Range};
use locus_guest::space::Space;

use super::layout::EntryLayout;
use super::{OrcFormat, OrcRow, OrcTable, ROWS_MAX};
use crate::locate::KERNEL_MAP_END;
use crate::{Error, Kernel};

/// Most rows believed of a module beyond those that its text has room for. Rows of its init code
/// stay after that code is gone, and it may have been larger than what stays.
const GONE_MAX: u64 = 1 << 14;

/// The rows of an ORC table, read. Each is known to have a meaning in the table's format.
pub struct OrcRows {
    layout: EntryLayout,
    /// The address at which each row begins to apply, as its offset from `base`; sorted.
    ips: Vec<u32>,
    base: u64,
    rows: Vec<u8>,
    text: Vec<Range>,
    /// Where code was that the kernel has discarded.
    discarded: Option<Range>,
}

impl std::fmt::Debug for OrcRows {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("OrcRows")
            .field("format", &self.layout.format)
            .field("rows", &self.ips.len())
            .finish_non_exhaustive()
    }
}

impl OrcRows {
    /// Reads the table of the kernel itself: 3.9 MB in Debian's 6.1.
    ///
    /// Rows may be for code that the kernel has discarded since it booted: `__init_begin` to
    /// `__init_end`, with exit code and replacements of alternatives. [`OrcRows::row`] gives none
    /// of them. Nor are there rows for code among the kernel's data, which runs elsewhere or never: `.data..relocate_kernel`
    /// (arch/x86/kernel/vmlinux.lds.S).
    ///
    /// # Errors
    /// As [`OrcTable::of`]; [`Error::Odd`] if the addresses are not sorted or are outside the
    /// kernel's image, or if a row has no meaning.
    pub fn read(kernel: &Kernel<'_>) -> Result<OrcRows, Error> {
        let table = OrcTable::of(kernel)?;
        let end = |name| kernel.symbols.need(name);
        let text = vec![Range {
            start: kernel.text_base,
            end: end("_etext")?,
        }];
        let discarded = match (end("__init_begin"), end("__init_end")) {
            (Ok(start), Ok(end)) => Some(Range { start, end }),
            _ => None,
        };
        let image = Range {
            start: kernel.text_base,
            end: KERNEL_MAP_END,
        };
        OrcRows::load(&kernel.space, &table, text, discarded, image)
    }

    /// Reads the table of a module from `space`: `count` rows at `rows`, their addresses at `ips`
    /// (`orc_unwind_ip`, `orc_unwind` and `num_orcs` of `mod->arch`).
    ///
    /// Rows outside `text` are left out, because those of the module's init code stay in the table
    /// after that code is gone. The format is that of the kernel's own table: the kernel reads both
    /// through one `struct orc_entry`.
    ///
    /// # Errors
    /// As [`OrcRows::read`].
    pub fn of_module(
        kernel: &Kernel<'_>,
        space: &Space<'_>,
        (ips, rows, count): (Gva, Gva, usize),
        text: Vec<Range>,
    ) -> Result<OrcRows, Error> {
        // A row applies to at least one byte, but two may begin where one section ends and the next begins.
        let bytes = text.iter().map(Range::len).fold(0u64, u64::saturating_add);
        let most = bytes.saturating_mul(2).saturating_add(GONE_MAX);
        if count > ROWS_MAX || count as u64 > most {
            return Err(Error::Odd(format!(
                "a module claims {count} ORC rows for {bytes} bytes of text; expected at most \
                 {ROWS_MAX}, and no more than {most} for so much text"
            )));
        }
        let table = OrcTable {
            ips,
            rows,
            count,
            layout: OrcTable::of(kernel)?.layout,
        };
        let anywhere = Range {
            start: Gva(0),
            end: Gva(u64::MAX),
        };
        OrcRows::load(space, &table, text, None, anywhere)
    }

    /// Reads `table`, whose rows are for `text` or what was `discarded`. Others are left out if they are for `elsewhere`, and
    /// are an error if not.
    fn load(
        space: &Space<'_>,
        table: &OrcTable,
        text: Vec<Range>,
        discarded: Option<Range>,
        elsewhere: Range,
    ) -> Result<OrcRows, Error> {
        let all: Vec<Range> = text.iter().copied().chain(discarded).collect();
        let odd =
            |i: usize, what: String| Error::Odd(format!("ORC row {i} of {} {what}", table.count));
        // Without text every row is outside it, and the base is not used.
        let base = all.iter().map(|r| r.start.0).min().unwrap_or(0);
        let raw = space.read_vec(table.ips, table.count * 4)?;
        let mut ips = Vec::with_capacity(table.count);
        let mut left_out = Vec::new();
        let mut last = 0;
        let (words, _) = raw.as_chunks::<4>();
        for (i, word) in words.iter().enumerate() {
            let word = i32::from_le_bytes(*word);
            let place = table.ips.plus(4 * i as u64);
            let ip = Gva(place.0.wrapping_add_signed(word.into()));
            // A row may begin where text ends, and says "undefined from here".
            if !all.iter().any(|r| r.contains(ip) || r.end == ip) {
                if elsewhere.contains(ip) {
                    left_out.push(i);
                    continue;
                }
                return Err(odd(
                    i,
                    format!("is for {ip}; expected within {elsewhere:?}"),
                ));
            }
            let offset = u32::try_from(ip.0 - base)
                .map_err(|_| odd(i, format!("is for {ip}, too far from {base:#x}")))?;
            if offset < last {
                return Err(odd(i, format!("is for {ip}, below the row before it")));
            }
            last = offset;
            ips.push(offset);
        }
        drop(raw);
        let mut rows = space.read_vec(table.rows, table.count * table.layout.len)?;
        for (i, bytes) in rows.chunks_exact(table.layout.len).enumerate() {
            if table.layout.row(bytes).is_none() {
                return Err(odd(
                    i,
                    format!(
                        "reads {bytes:02x?}, which means nothing in the format {}",
                        table.layout.format
                    ),
                ));
            }
        }
        if !left_out.is_empty() {
            let rest = rows.chunks_exact(table.layout.len).enumerate();
            let rest = rest.filter(|(i, _)| left_out.binary_search(i).is_err());
            rows = rest.flat_map(|(_, row)| row.iter().copied()).collect();
        }
        Ok(OrcRows {
            layout: table.layout,
            ips,
            base,
            rows,
            text,
            discarded,
        })
    }

    /// Number of rows.
    #[must_use]
    pub fn len(&self) -> usize {
        self.ips.len()
    }

    /// Whether there are no rows. A module may have none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ips.is_empty()
    }

    /// The format of the table that the rows come from.
    #[must_use]
    pub fn format(&self) -> OrcFormat {
        self.layout.format
    }

    /// The row that applies at the guest virtual address `ip`: of the rows that begin at or below
    /// it the highest, of equal ones the last. `None` outside the text that the table is for, and
    /// below its first row.
    ///
    /// For a return address, ask for the byte before it, because the call may be the last
    /// instruction of its function.
    #[must_use]
    pub fn row(&self, ip: Gva) -> Option<OrcRow> {
        if !self.text.iter().any(|r| r.contains(ip)) {
            return None;
        }
        self.row_at(ip)
    }

    /// The row for `ip` in code that the kernel has discarded since it booted; `None` elsewhere.
    /// The idle task of the first CPU still has return addresses into such code on its stack, and
    /// never returns there.
    #[must_use]
    pub fn row_discarded(&self, ip: Gva) -> Option<OrcRow> {
        self.discarded
            .filter(|range| range.contains(ip))
            .and_then(|_| self.row_at(ip))
    }

    fn row_at(&self, ip: Gva) -> Option<OrcRow> {
        let offset = ip.0.checked_sub(self.base)?;
        let next = self.ips.partition_point(|&at| u64::from(at) <= offset);
        self.nth(next.checked_sub(1)?)
    }

    fn nth(&self, i: usize) -> Option<OrcRow> {
        let start = i.checked_mul(self.layout.len)?;
        let bytes = self.rows.get(start..start.checked_add(self.layout.len)?)?;
        self.layout.row(bytes)
    }

    /// All rows in rising order, each with the guest virtual address at which it begins to apply.
    pub fn iter(&self) -> impl Iterator<Item = (Gva, OrcRow)> + '_ {
        let ip = |(i, &at): (usize, &u32)| Some((Gva(self.base + u64::from(at)), self.nth(i)?));
        self.ips.iter().enumerate().filter_map(ip)
    }
}
