//! Where the members of `struct orc_entry` are in each format, and how their values are read.

use super::{CallerBp, CallerSp, FrameKind, OrcFormat, OrcRow, SpBase};
use crate::btf::{Bits, Btf};
use crate::Error;

/// Rows looked at to tell the numbering of registers.
pub(super) const SAMPLE: usize = 4096;
/// Largest believed `struct orc_entry`, in bytes.
const ROW_LEN_MAX: usize = 16;

/// Where the members of `struct orc_entry` are.
#[derive(Clone, Copy, Debug)]
pub(super) struct EntryLayout {
    pub format: OrcFormat,
    /// Size of the structure, in bytes.
    pub len: usize,
    pub sp_offset: Bits,
    pub bp_offset: Bits,
    pub sp_reg: Bits,
    pub bp_reg: Bits,
    pub kind: Bits,
    pub signal: Option<Bits>,
    pub end: Option<Bits>,
}

impl EntryLayout {
    /// The members, and the format as far as they tell it.
    pub fn of(btf: &Btf) -> Result<EntryLayout, Error> {
        let bits = |member| btf.bits_of("orc_entry", member);
        let maybe = |member| bits(member).ok();
        let (kind, signal, end) = (bits("type")?, maybe("signal"), maybe("end"));
        let format = match (kind.width, signal, end) {
            (2, None, Some(_)) => OrcFormat::End,
            (2, Some(_), Some(_)) => OrcFormat::SignalEnd,
            (3, Some(_), None) => OrcFormat::Typed,
            (width, ..) => {
                return Err(Error::Odd(format!(
                    "ORC rows have a type of {width} bits, signal: {}, end: {}; that is no known \
                     format",
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
        Some(u16::try_from(bits.value(row)?).ok()?.cast_signed())
    }

    fn base(self, row: &[u8]) -> Option<SpBase> {
        let number = self.sp_reg.value(row)?;
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
        match self.bp_reg.value(row)? {
            0 => Some(CallerBp::Kept),
            4 => Some(CallerBp::FromBp(offset)),
            number if number == prev_sp => Some(CallerBp::FromPrevSp(offset)),
            _ => None,
        }
    }

    fn kind(self, row: &[u8]) -> Option<FrameKind> {
        let number = self.kind.value(row)?;
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
            return Some(match self.end?.value(row)? {
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
    pub fn row(self, bytes: &[u8]) -> Option<OrcRow> {
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
            Some(bit) => bit.value(bytes)? != 0,
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
    pub fn is_plausible(self, bytes: &[u8]) -> bool {
        let rows = bytes.chunks_exact(self.len).take(SAMPLE);
        let all = rows.len();
        let plain = |row: &&[u8]| {
            self.row(row)
                .is_some_and(|r| r.kind == FrameKind::Call && r.sp.base == SpBase::Sp)
        };
        rows.filter(plain).count() * 2 > all
    }
}
