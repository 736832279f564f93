//! ORC: the kernel's own table of how to step from a function's stack frame to its caller's.
//!
//! `__start_orc_unwind_ip` holds, sorted, the addresses at which a row of the table begins to hold,
//! each 32 bits wide and relative to its own place; `__start_orc_unwind` holds the rows, `struct
//! orc_entry`. How rows are used: arch/x86/kernel/unwind_orc.c. How they are packed changed:
//!
//! - [`OrcFormat::End`]: `type` is two bits wide (call, registers, interrupt frame); "undefined" and
//!   "end of stack" are rows whose stack pointer has no base, told apart by the bit `end`.
//! - [`OrcFormat::SignalEnd`]: the bit `signal` came with Linux kernel commit ffb1b4a41016
//!   ("x86/unwind/orc: Add 'signal' field to ORC metadata"). Before it the frame above registers or
//!   an interrupt frame was one that had been interrupted, and no other.
//! - [`OrcFormat::Typed`]: Linux kernel commit fb799447ae29 ("x86,objtool: Split UNWIND_HINT_EMPTY in
//!   two") made `type` three bits wide, with "undefined" and "end of stack" among the types, and
//!   took `end` away.
//! - [`OrcFormat::Reordered`]: the same, but Linux kernel commit 1735858caa4b ("objtool/x86: Reorder
//!   ORC register numbering") gave the registers other numbers and added RAX.
//!
//! The first three are told apart by the members of `orc_entry` in BTF. The last two look the same
//! there: Linux kernel commit b9f174c811e3 ("x86/unwind/orc: Add ELF section with ORC version
//! identifier") put into `.orc_header` the SHA-1 of the format's definitions in
//! arch/x86/include/asm/orc_types.h (scripts/orc_hash.sh). The three known hashes were confirmed by
//! hashing those definitions. A kernel without it is judged by its rows: most of them are plain
//! frames based on the stack pointer, under one of the two numberings of it.

use locus_guest::addr::{Gva, Range};
use locus_guest::fetch;
use locus_guest::space::Space;

use super::btf::{Bits, Btf};
use super::{Error, Kernel};

/// Most rows believed. Debian's kernels have 0.3 to 0.5 million.
const ROWS_MAX: usize = 1 << 22;
/// Most rows believed of a module beyond those that its text has room for: its init code, whose rows
/// stay when it is gone, may be larger than what stays of it.
const GONE_MAX: u64 = 1 << 14;
/// Bytes of `.orc_header`.
const HASH_LEN: usize = 20;
/// Rows looked at to tell the numbering of registers.
const SAMPLE: usize = 4096;
/// Largest believed `struct orc_entry`, in bytes.
const ROW_LEN_MAX: usize = 16;

/// How rows are packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OrcFormat {
    /// Two-bit types, and a bit for the end of a stack.
    End,
    /// The same, and a bit for interrupted frames.
    SignalEnd,
    /// Three-bit types.
    Typed,
    /// The same with other numbers for the registers.
    Reordered,
}

impl std::fmt::Display for OrcFormat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            OrcFormat::End => "end",
            OrcFormat::SignalEnd => "signal-end",
            OrcFormat::Typed => "typed",
            OrcFormat::Reordered => "typed-reordered",
        })
    }
}

/// The hashes in `.orc_header`, as `scripts/orc_hash.sh` makes them of each format's definitions.
pub const FORMAT_HASHES: [(OrcFormat, [u8; HASH_LEN]); 3] = [
    (
        OrcFormat::SignalEnd,
        [
            0xdb, 0x84, 0xae, 0xd4, 0x10, 0x3b, 0x31, 0xdd, 0x51, 0xe0, 0x17, 0xf8, 0xf7, 0x97,
            0x83, 0xca, 0x98, 0x5c, 0x2c, 0x51,
        ],
    ),
    (
        OrcFormat::Typed,
        [
            0xfe, 0x5d, 0x32, 0xbf, 0x58, 0x1b, 0xd6, 0x3b, 0x2c, 0xa9, 0xa5, 0xc6, 0x5b, 0xa5,
            0xa6, 0x25, 0xea, 0xb3, 0xfe, 0x24,
        ],
    ),
    (
        OrcFormat::Reordered,
        [
            0x13, 0x7c, 0x36, 0xad, 0x76, 0x27, 0xc4, 0xdd, 0x55, 0x93, 0x21, 0x76, 0xbb, 0x0e,
            0xcd, 0xbd, 0x50, 0x41, 0xfc, 0x82,
        ],
    ),
];

/// What the caller's stack pointer is reckoned from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SpBase {
    /// Nothing: the row says there is no caller to be found.
    Undefined,
    /// The stack pointer, plus the offset.
    Sp,
    /// The frame pointer, plus the offset.
    Bp,
    /// The word that the stack pointer points to, plus the offset. Before Linux kernel commit
    /// 87ccc826bf1c ("x86/unwind/orc: Change REG_SP_INDIRECT") the offset was added before the word
    /// was read; Debian's 5.10, which is older, has no such row.
    SpIndirect,
    /// The word at the frame pointer plus the offset.
    BpIndirect,
    /// RAX; the offset counts for nothing with this and the following.
    Ax,
    /// RDX.
    Dx,
    /// RDI.
    Di,
    /// R10.
    R10,
    /// R13.
    R13,
}

/// The caller's stack pointer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CallerSp {
    /// What it is reckoned from.
    pub base: SpBase,
    /// Offset, in bytes; see [`SpBase`] for where it is added.
    pub offset: i16,
}

/// Where the caller's frame pointer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CallerBp {
    /// It is still in RBP; above registers, in their `bp`.
    Kept,
    /// In memory, so many bytes from the caller's stack pointer as the row's [`CallerSp`] gives it.
    FromPrevSp(i16),
    /// In memory, so many bytes from where RBP points.
    FromBp(i16),
}

/// What stands at the caller's stack pointer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrameKind {
    /// A return address in the word below it.
    Call,
    /// `struct pt_regs` begins there, with the caller's registers.
    Regs,
    /// An interrupt frame (RIP, CS, RFLAGS, RSP, SS) begins there.
    RegsPartial,
    /// There is no caller: the walk ended well.
    EndOfStack,
    /// The kernel doesn't know this place: the walk failed.
    Undefined,
}

/// How to step from an address to its caller, the same for every format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OrcRow {
    /// The caller's stack pointer.
    pub sp: CallerSp,
    /// The caller's frame pointer.
    pub bp: CallerBp,
    /// What stands there.
    pub kind: FrameKind,
    /// The caller was interrupted: its address is that of the instruction it goes on with. The row
    /// for it is looked up at that address; else, at a return address, at the byte before.
    pub signal: bool,
}

/// Where the members of `struct orc_entry` stand.
#[derive(Clone, Copy, Debug)]
struct EntryLayout {
    format: OrcFormat,
    len: usize,
    sp_offset: Bits,
    bp_offset: Bits,
    sp_reg: Bits,
    bp_reg: Bits,
    kind: Bits,
    signal: Option<Bits>,
    end: Option<Bits>,
}

/// The value that `bits` has in the structure in `bytes`.
fn value(bits: Bits, bytes: &[u8]) -> Option<u64> {
    let end = bits.shift.checked_add(bits.width).filter(|&n| n <= 64)?;
    let len = usize::try_from(end.div_ceil(8)).ok()?;
    let part = bytes.get(bits.offset..bits.offset.checked_add(len)?)?;
    let word = part.iter().rev().fold(0, |w, &b| (w << 8) | u64::from(b));
    let mask = u64::MAX.checked_shr(64 - bits.width).unwrap_or(0);
    Some(word.checked_shr(bits.shift)? & mask)
}

impl EntryLayout {
    /// The members, and the format as far as they tell it.
    fn of(btf: &Btf) -> Result<EntryLayout, Error> {
        let bits = |member| btf.bits_of("orc_entry", member);
        let maybe = |member| bits(member).ok();
        let (kind, signal, end) = (bits("type")?, maybe("signal"), maybe("end"));
        let format = match (kind.width, signal, end) {
            (2, None, Some(_)) => OrcFormat::End,
            (2, Some(_), Some(_)) => OrcFormat::SignalEnd,
            (3, Some(_), None) => OrcFormat::Typed,
            (width, ..) => {
                return Err(Error::Odd(format!(
                    "ORC rows have a type of {width} bits, signal: {}, end: {}; that is no format \
                     this tool knows",
                    signal.is_some(),
                    end.is_some()
                )))
            }
        };
        let layout = EntryLayout {
            format,
            len: btf.size_of("orc_entry")?,
            sp_offset: bits("sp_offset")?,
            bp_offset: bits("bp_offset")?,
            sp_reg: bits("sp_reg")?,
            bp_reg: bits("bp_reg")?,
            kind,
            signal,
            end,
        };
        let offsets = [layout.sp_offset, layout.bp_offset];
        let regs = [layout.sp_reg, layout.bp_reg];
        if !(1..=ROW_LEN_MAX).contains(&layout.len)
            || offsets.iter().any(|b| b.width != 16)
            || regs.iter().any(|b| b.width != 4)
        {
            return Err(Error::Odd(format!(
                "struct orc_entry is {} bytes with members {offsets:?} {regs:?}; expected offsets \
                 of 16 bits and registers of 4",
                layout.len
            )));
        }
        Ok(layout)
    }

    fn offset(bits: Bits, row: &[u8]) -> Option<i16> {
        Some(u16::try_from(value(bits, row)?).ok()?.cast_signed())
    }

    fn base(self, row: &[u8]) -> Option<SpBase> {
        let number = value(self.sp_reg, row)?;
        Some(if self.format == OrcFormat::Reordered {
            match number {
                0 => SpBase::Undefined,
                1 => SpBase::Ax,
                2 => SpBase::Dx,
                3 => SpBase::Sp,
                4 => SpBase::Bp,
                5 => SpBase::Di,
                6 => SpBase::R10,
                7 => SpBase::R13,
                9 => SpBase::SpIndirect,
                10 => SpBase::BpIndirect,
                _ => return None,
            }
        } else {
            match number {
                0 => SpBase::Undefined,
                2 => SpBase::Dx,
                3 => SpBase::Di,
                4 => SpBase::Bp,
                5 => SpBase::Sp,
                6 => SpBase::R10,
                7 => SpBase::R13,
                8 => SpBase::BpIndirect,
                9 => SpBase::SpIndirect,
                _ => return None,
            }
        })
    }

    fn saved_bp(self, row: &[u8]) -> Option<CallerBp> {
        let offset = EntryLayout::offset(self.bp_offset, row)?;
        let prev_sp = if self.format == OrcFormat::Reordered {
            8
        } else {
            1
        };
        match value(self.bp_reg, row)? {
            0 => Some(CallerBp::Kept),
            4 => Some(CallerBp::FromBp(offset)),
            number if number == prev_sp => Some(CallerBp::FromPrevSp(offset)),
            _ => None,
        }
    }

    fn kind(self, row: &[u8]) -> Option<FrameKind> {
        let number = value(self.kind, row)?;
        if matches!(self.format, OrcFormat::Typed | OrcFormat::Reordered) {
            return Some(match number {
                0 => FrameKind::Undefined,
                1 => FrameKind::EndOfStack,
                2 => FrameKind::Call,
                3 => FrameKind::Regs,
                4 => FrameKind::RegsPartial,
                _ => return None,
            });
        }
        if self.base(row)? == SpBase::Undefined {
            return Some(match value(self.end?, row)? {
                0 => FrameKind::Undefined,
                _ => FrameKind::EndOfStack,
            });
        }
        Some(match number {
            0 => FrameKind::Call,
            1 => FrameKind::Regs,
            2 => FrameKind::RegsPartial,
            _ => return None,
        })
    }

    /// The row in `bytes`; `None` when a register or type in it is unknown.
    fn row(self, bytes: &[u8]) -> Option<OrcRow> {
        let kind = self.kind(bytes)?;
        if matches!(kind, FrameKind::EndOfStack | FrameKind::Undefined) {
            return Some(OrcRow {
                sp: CallerSp {
                    base: SpBase::Undefined,
                    offset: 0,
                },
                bp: CallerBp::Kept,
                kind,
                signal: false,
            });
        }
        let base = self.base(bytes)?;
        let offset = match base {
            SpBase::Undefined => return None,
            SpBase::Sp | SpBase::Bp | SpBase::SpIndirect | SpBase::BpIndirect => {
                EntryLayout::offset(self.sp_offset, bytes)?
            }
            SpBase::Ax | SpBase::Dx | SpBase::Di | SpBase::R10 | SpBase::R13 => 0,
        };
        let signal = match self.signal {
            Some(bit) => value(bit, bytes)? != 0,
            None => kind != FrameKind::Call,
        };
        Some(OrcRow {
            sp: CallerSp { base, offset },
            bp: self.saved_bp(bytes)?,
            kind,
            signal,
        })
    }

    /// Whether most of the rows in `bytes` are frames of calls based on the stack pointer.
    fn is_plausible(self, bytes: &[u8]) -> bool {
        let rows = bytes.chunks_exact(self.len).take(SAMPLE);
        let all = rows.len();
        let plain = |row: &&[u8]| {
            self.row(row)
                .is_some_and(|r| r.kind == FrameKind::Call && r.sp.base == SpBase::Sp)
        };
        rows.filter(plain).count() * 2 > all
    }
}

/// Where a table stands, and how it is packed.
#[derive(Debug)]
pub struct OrcTable {
    ips: Gva,
    rows: Gva,
    count: usize,
    layout: EntryLayout,
}

impl OrcTable {
    /// The kernel's own table. Reads no more of it than is needed to tell the format.
    ///
    /// # Errors
    /// [`Error::Missing`] when the kernel has none; [`Error::Odd`] when its two parts don't fit each
    /// other, or its format isn't known.
    pub fn of(kernel: &Kernel<'_>) -> Result<OrcTable, Error> {
        let ips = kernel.between("__start_orc_unwind_ip", "__stop_orc_unwind_ip", 1 << 30)?;
        let rows = kernel.between("__start_orc_unwind", "__stop_orc_unwind", 1 << 30)?;
        let mut layout = EntryLayout::of(kernel.btf()?)?;
        let count = usize::try_from(ips.len() / 4).unwrap_or(usize::MAX);
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

    /// Bytes of a row.
    #[must_use]
    pub fn row_len(&self) -> usize {
        self.layout.len
    }

    /// The row in `bytes`; `None` when it means nothing in this table's format.
    #[must_use]
    pub fn row(&self, bytes: &[u8]) -> Option<OrcRow> {
        self.layout.row(bytes)
    }

    /// How rows are packed.
    #[must_use]
    pub fn format(&self) -> OrcFormat {
        self.layout.format
    }
}

/// The format that `.orc_header` names.
fn header(kernel: &Kernel<'_>) -> Result<Option<OrcFormat>, Error> {
    let Some(at) = kernel.symbols.addr("__start_orc_header") else {
        return Ok(None);
    };
    let found = kernel.space.read_vec(at, HASH_LEN)?;
    match FORMAT_HASHES.iter().find(|(_, hash)| hash[..] == found[..]) {
        Some((format, _)) => Ok(Some(*format)),
        None => Err(Error::Odd(format!(
            "the kernel's .orc_header at {at} is {}: an ORC format this tool doesn't know",
            hex::encode(&found)
        ))),
    }
}

/// A table, read.
pub struct OrcRows {
    layout: EntryLayout,
    /// The addresses, as offsets from `base`.
    ips: Vec<u32>,
    base: u64,
    rows: Vec<u8>,
    text: Vec<Range>,
    /// Where code stood that is gone.
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
    /// Reads the kernel's own table: 3.9 MB in Debian's 6.1.
    ///
    /// # Errors
    /// As [`OrcTable::of`]; [`Error::Odd`] when the addresses are not sorted or leave the kernel's
    /// text, or a row isn't known. Rows may also be for what the kernel has discarded since it
    /// booted (`__init_begin` to `__init_end`, code of exit and replacements of alternatives
    /// included); [`OrcRows::row`] gives none for it.
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
        OrcRows::load(&kernel.space, &table, text, discarded, false)
    }

    /// Reads the table of a module: `count` rows at `rows`, their addresses at `ips`
    /// (`mod->arch.orc_unwind`, `orc_unwind_ip`, `num_orcs`). Rows for other places than `text` are
    /// left out: those for its init code stay in the table when that code is gone. Its format is
    /// taken to be the kernel's own: the kernel reads both through one `struct orc_entry`.
    ///
    /// # Errors
    /// As [`OrcRows::read`].
    pub fn of_module(
        kernel: &Kernel<'_>,
        space: &Space<'_>,
        (ips, rows, count): (Gva, Gva, usize),
        text: Vec<Range>,
    ) -> Result<OrcRows, Error> {
        // A row holds for a byte at least, but two begin where one section ends and the next begins.
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
        OrcRows::load(space, &table, text, None, true)
    }

    /// Reads `table`, whose rows are for `text` or what was `discarded`; others are left out if it is
    /// `partial`, and else are an error.
    fn load(
        space: &Space<'_>,
        table: &OrcTable,
        text: Vec<Range>,
        discarded: Option<Range>,
        partial: bool,
    ) -> Result<OrcRows, Error> {
        let all: Vec<Range> = text.iter().copied().chain(discarded).collect();
        let odd =
            |i: usize, what: String| Error::Odd(format!("ORC row {i} of {} {what}", table.count));
        let base = all.iter().map(|r| r.start.0).min().unwrap_or(0);
        let raw = space.read_vec(table.ips, table.count * 4)?;
        let mut ips = Vec::with_capacity(table.count);
        let mut left_out = Vec::new();
        let mut last = 0;
        for (i, word) in raw.chunks_exact(4).enumerate() {
            let word = fetch::u32(word, 0).unwrap_or(0).cast_signed();
            let place = table.ips.plus(4 * i as u64);
            let ip = Gva(place.0.wrapping_add_signed(word.into()));
            // A row may begin where text ends: "undefined from here".
            if !all.iter().any(|r| r.contains(ip) || r.end == ip) {
                if partial {
                    left_out.push(i);
                    continue;
                }
                return Err(odd(i, format!("is for {ip}; expected within {all:?}")));
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

    /// Whether it has no rows: a module may have none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ips.is_empty()
    }

    /// How its rows are packed.
    #[must_use]
    pub fn format(&self) -> OrcFormat {
        self.layout.format
    }

    /// The row that holds at `ip`: of the rows that begin at or below it the highest, of equal ones
    /// the last. `None` outside the text that the table is for, and below its first row.
    ///
    /// For a return address ask at the byte before it: the call may be the last instruction of its
    /// function.
    #[must_use]
    pub fn row(&self, ip: Gva) -> Option<OrcRow> {
        if !self.text.iter().any(|r| r.contains(ip)) {
            return None;
        }
        self.row_at(ip)
    }

    /// The row that held at `ip` in code that the kernel discarded after it booted. The idle task of
    /// the first CPU still has return addresses into it on its stack, and never returns there.
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

    /// All rows, each with the address at which it begins to hold.
    pub fn iter(&self) -> impl Iterator<Item = (Gva, OrcRow)> + '_ {
        let ip = |(i, &at): (usize, &u32)| Some((Gva(self.base + u64::from(at)), self.nth(i)?));
        self.ips.iter().enumerate().filter_map(ip)
    }
}

#[cfg(any(test, feature = "testing"))]
pub mod sample;
#[cfg(test)]
mod tests;
