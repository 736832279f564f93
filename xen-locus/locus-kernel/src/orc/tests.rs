#![allow(clippy::cast_possible_truncation)] // small tables

use locus_guest::addr::{Gva, Range};
use locus_guest::mock::{MockMemory, ROOT};
use locus_guest::space::Space;

use super::layout::EntryLayout;
use super::sample::{btf, frame, kinds, numbers, pack, ALL};
use super::*;
use crate::btf::{Bits, Btf};
use crate::fixture::{vcpus, Fixture, KIND, TEXT, TEXT_LEN};
use crate::{Error, Kernel};

fn layout(format: OrcFormat) -> EntryLayout {
    let bits = |offset, shift, width| Bits {
        offset,
        shift,
        width,
    };
    let typed = matches!(format, OrcFormat::Typed | OrcFormat::Reordered);
    EntryLayout {
        format,
        len: 6,
        sp_offset: bits(0, 0, 16),
        bp_offset: bits(2, 0, 16),
        sp_reg: bits(4, 0, 4),
        bp_reg: bits(4, 4, 4),
        kind: bits(5, 0, if typed { 3 } else { 2 }),
        signal: match format {
            OrcFormat::End => None,
            OrcFormat::SignalEnd => Some(bits(5, 2, 1)),
            _ => Some(bits(5, 3, 1)),
        },
        end: match format {
            OrcFormat::End => Some(bits(5, 2, 1)),
            OrcFormat::SignalEnd => Some(bits(5, 3, 1)),
            _ => None,
        },
    }
}

/// A row that knows no caller.
fn undefined(format: OrcFormat) -> Vec<u8> {
    pack(format, (0, 0), (0, 0), 0, 0)
}

fn sp(base: SpBase, offset: i16) -> CallerSp {
    CallerSp { base, offset }
}

#[test]
fn a_row_means_the_same_in_every_format() {
    for format in ALL {
        let layout = layout(format);
        let [stack, base, prev, di, stack_at, base_at] = numbers(format);
        let [call, regs, partial] = kinds(format);
        let row = |sp, bp, kind| layout.row(&pack(format, sp, bp, kind, 0)).unwrap();

        let plain = row((stack, 24), (prev, -16), call);
        assert_eq!(plain.sp, sp(SpBase::Sp, 24), "{format}");
        assert_eq!(plain.bp, CallerBp::FromPrevSp(-16), "{format}");
        assert_eq!(
            (plain.kind, plain.signal),
            (FrameKind::Call, false),
            "{format}"
        );

        let other = row((base, -8), (base, 8), regs);
        assert_eq!(other.sp, sp(SpBase::Bp, -8), "{format}");
        assert_eq!(other.bp, CallerBp::FromBp(8), "{format}");
        assert_eq!(other.kind, FrameKind::Regs, "{format}");

        assert_eq!(
            row((stack, 0), (0, 0), partial).kind,
            FrameKind::RegsPartial
        );
        assert_eq!(row((stack, 0), (0, 99), call).bp, CallerBp::Kept);
        assert_eq!(
            row((stack_at, 8), (0, 0), call).sp,
            sp(SpBase::SpIndirect, 8)
        );
        assert_eq!(
            row((base_at, -8), (0, 0), call).sp,
            sp(SpBase::BpIndirect, -8)
        );
        // The kernel adds no offset to these.
        assert_eq!(row((di, 8), (0, 0), regs).sp, sp(SpBase::Di, 0));
    }
}

#[test]
fn the_frame_above_registers_was_interrupted() {
    let signal = |format, kind, flags| {
        let bytes = pack(format, (numbers(format)[0], 0), (0, 0), kind, flags);
        layout(format).row(&bytes).unwrap().signal
    };
    assert!(!signal(OrcFormat::End, 0, 0));
    assert!(signal(OrcFormat::End, 1, 0));
    assert!(signal(OrcFormat::End, 2, 0));
    // Since it has a bit of its own it says so itself.
    for format in [OrcFormat::SignalEnd, OrcFormat::Typed, OrcFormat::Reordered] {
        for kind in kinds(format) {
            assert!(!signal(format, kind, 0), "{format}");
            assert!(signal(format, kind, 1), "{format}");
        }
    }
}

#[test]
fn the_end_of_a_stack_differs_from_a_place_unknown() {
    for format in ALL {
        let kind = |bytes: &[u8]| layout(format).row(bytes).unwrap().kind;
        assert_eq!(kind(&undefined(format)), FrameKind::Undefined, "{format}");
        let end = match format {
            OrcFormat::End => pack(format, (0, 0), (0, 0), 0, 1),
            OrcFormat::SignalEnd => pack(format, (0, 0), (0, 0), 0, 2),
            _ => pack(format, (0, 0), (0, 0), 1, 0),
        };
        assert_eq!(kind(&end), FrameKind::EndOfStack, "{format}");
    }
}

#[test]
fn unknown_registers_and_types_are_no_rows() {
    for format in ALL {
        let [stack, ..] = numbers(format);
        let [call, ..] = kinds(format);
        let layout = layout(format);
        let bad = match format {
            OrcFormat::End | OrcFormat::SignalEnd => 3,
            _ => 5,
        };
        assert!(layout
            .row(&pack(format, (stack, 8), (0, 0), bad, 0))
            .is_none());
        assert!(layout
            .row(&pack(format, (15, 8), (0, 0), call, 0))
            .is_none());
        assert!(layout
            .row(&pack(format, (stack, 8), (7, 0), call, 0))
            .is_none());
        assert!(layout.row(&[0; 5]).is_none());
        if matches!(format, OrcFormat::Typed | OrcFormat::Reordered) {
            assert!(layout.row(&pack(format, (0, 8), (0, 0), call, 0)).is_none());
        }
    }
}

const IPS: Gva = Gva(TEXT.0 + (32 << 20));
const ROWS: Gva = Gva(IPS.0 + 0x10000);

/// A kernel with an ORC table.
struct Sample {
    format: OrcFormat,
    rows: Vec<(u64, Vec<u8>)>,
    header: Option<[u8; HASH_LEN]>,
    /// What the symbols say beyond the rows there are, in bytes of addresses and of rows.
    lie: (u64, u64),
    /// Where code stood that the kernel discarded.
    init: Option<(u64, u64)>,
}

impl Sample {
    fn new(format: OrcFormat) -> Sample {
        let header = FORMAT_HASHES
            .iter()
            .find(|(f, _)| *f == format)
            .map(|(_, h)| *h);
        Sample {
            format,
            rows: vec![
                (TEXT.0, frame(format, 8)),
                (TEXT.0 + 0x10, undefined(format)),
                (TEXT.0 + 0x10, frame(format, 16)),
                (TEXT.0 + 0x20, frame(format, 24)),
                (TEXT.0 + 0x1000, undefined(format)),
            ],
            header,
            lie: (0, 0),
            init: None,
        }
    }

    fn table<T>(&self, look: impl FnOnce(&Kernel<'_>) -> T) -> T {
        let mut fixture = Fixture::new();
        let n = self.rows.len() as u64;
        for (name, at) in [
            ("_etext", TEXT.0 + TEXT_LEN as u64),
            ("__start_orc_unwind_ip", IPS.0),
            ("__stop_orc_unwind_ip", IPS.0 + 4 * n + self.lie.0),
            ("__start_orc_unwind", ROWS.0),
            ("__stop_orc_unwind", ROWS.0 + 6 * n + self.lie.1),
        ] {
            fixture.symbols.push((at, 'R', name.to_owned()));
        }
        if let Some((start, end)) = self.init {
            let symbol = |(at, name): (u64, &str)| (at, 'T', name.to_owned());
            let both = [(start, "__init_begin"), (end, "__init_end")];
            fixture.symbols.extend(both.map(symbol));
        }
        let blob = btf(self.format);
        fixture.constants.push(("__start_BTF", blob));
        fixture.constants.push(("__stop_BTF", Vec::new()));
        if let Some(hash) = self.header {
            fixture
                .constants
                .push(("__start_orc_header", hash.to_vec()));
        }
        let memory = fixture.build();
        let ips: Vec<u8> = (0u64..)
            .zip(&self.rows)
            .flat_map(|(i, (ip, _))| (ip.wrapping_sub(IPS.0 + 4 * i) as u32).to_le_bytes())
            .collect();
        let rows: Vec<u8> = self.rows.iter().flat_map(|(_, r)| r.clone()).collect();
        memory.map_bytes(IPS, &ips, false, false);
        memory.map_bytes(ROWS, &rows, false, false);
        look(&Kernel::read(&memory, KIND, &vcpus()).unwrap())
    }

    fn read(&self) -> Result<OrcRows, Error> {
        self.table(OrcRows::read)
    }
}

#[test]
fn every_format_is_told_by_its_members_and_its_hash() {
    for format in ALL {
        let orc = Sample::new(format).read().unwrap();
        assert_eq!((orc.format(), orc.len()), (format, 5));
        assert_eq!(orc.iter().count(), 5);
        assert_eq!(orc.row(TEXT).unwrap().sp, sp(SpBase::Sp, 8), "{format}");
    }
}

#[test]
fn without_a_hash_the_rows_tell_which_numbers_the_registers_have() {
    for format in [OrcFormat::Typed, OrcFormat::Reordered] {
        let mut sample = Sample::new(format);
        sample.header = None;
        assert_eq!(sample.read().unwrap().format(), format);
    }
}

#[test]
fn an_unknown_hash_or_one_that_contradicts_btf_is_refused() {
    let mut sample = Sample::new(OrcFormat::Typed);
    sample.header = Some([0x5a; HASH_LEN]);
    let error = sample.read().unwrap_err().to_string();
    assert!(error.contains("5a5a5a"), "{error}");
    for (format, hash) in [
        (OrcFormat::End, 0),
        (OrcFormat::SignalEnd, 1),
        (OrcFormat::Typed, 0),
    ] {
        let mut sample = Sample::new(format);
        sample.header = Some(FORMAT_HASHES[hash].1);
        assert!(sample.read().is_err(), "{format}");
    }
}

#[test]
fn the_last_of_the_highest_rows_at_or_below_an_address_counts() {
    let orc = Sample::new(OrcFormat::Typed).read().unwrap();
    let offset = |at: u64| orc.row(TEXT.plus(at)).map(|r| (r.kind, r.sp.offset));
    assert_eq!(offset(0xf), Some((FrameKind::Call, 8)));
    assert_eq!(offset(0x10), Some((FrameKind::Call, 16)));
    assert_eq!(offset(0x1f), Some((FrameKind::Call, 16)));
    assert_eq!(offset(0x20), Some((FrameKind::Call, 24)));
    assert_eq!(offset(0x2000), Some((FrameKind::Undefined, 0)));
    assert_eq!(orc.row(TEXT.plus(TEXT_LEN as u64)), None);
    assert_eq!(orc.row(Gva(TEXT.0 - 1)), None);
    assert_eq!(orc.row(Gva(u64::MAX)), None);
}

#[test]
fn below_the_first_row_there_is_none() {
    let mut sample = Sample::new(OrcFormat::End);
    sample.rows.remove(0);
    let orc = sample.read().unwrap();
    assert_eq!(orc.row(TEXT.plus(0xf)), None);
    assert!(orc.row(TEXT.plus(0x10)).is_some());
}

#[test]
fn a_table_out_of_order_out_of_the_image_or_of_unknown_rows_is_refused() {
    let good = Sample::new(OrcFormat::Typed);
    assert!(good.read().is_ok());
    for damage in [
        (|rows| rows.swap(0, 3)) as fn(&mut Vec<(u64, Vec<u8>)>),
        |rows| rows[0].0 = TEXT.0 - 1,
        |rows| rows[4].0 = 0xffff_ffff_c000_0000,
        |rows| rows[2].1[4] = 0xff,
    ] {
        let mut bad = Sample::new(OrcFormat::Typed);
        damage(&mut bad.rows);
        assert!(matches!(bad.read(), Err(Error::Odd(_))));
    }
}

#[test]
fn rows_for_discarded_code_and_for_code_among_data_are_not_given() {
    let init = TEXT.0 + (48 << 20);
    let mut sample = Sample::new(OrcFormat::Typed);
    // Code among the data (`.data..relocate_kernel`).
    let data = TEXT.0 + (32 << 20);
    sample.rows.push((data, frame(OrcFormat::Typed, 8)));
    sample.rows.push((init + 0x10, frame(OrcFormat::Typed, 8)));
    let orc = sample.read().unwrap();
    assert_eq!(orc.len(), 5);
    for at in [data, init + 0x10] {
        assert_eq!(orc.row(Gva(at)), None);
        assert_eq!(orc.row_discarded(Gva(at)), None);
    }
    sample.init = Some((init, init + 0x1000));
    let orc = sample.read().unwrap();
    assert_eq!(orc.len(), 6);
    assert_eq!(orc.row(Gva(init + 0x10)), None);
    let discarded = |at: u64| orc.row_discarded(Gva(at)).map(|row| row.sp.offset);
    assert_eq!(discarded(init + 0x10), Some(8));
    assert_eq!(discarded(init + 0x1000), None);
    assert_eq!(discarded(TEXT.0), None);
    assert!(orc.row(TEXT).is_some());
}

#[test]
fn sizes_that_do_not_fit_each_other_are_refused() {
    for lie in [(2, 0), (4, 0), (0, 6), (0, 1), (1 << 25, 6 << 23)] {
        let mut sample = Sample::new(OrcFormat::Typed);
        sample.lie = lie;
        assert!(matches!(sample.read(), Err(Error::Odd(_))), "{lie:?}");
    }
}

#[test]
fn a_table_that_ends_in_unmapped_memory_is_an_error() {
    let mut sample = Sample::new(OrcFormat::Typed);
    sample.lie = (4 * 4096, 6 * 4096);
    assert!(matches!(sample.read(), Err(Error::Memory(_))));
}

#[test]
fn a_module_brings_its_own_table_for_its_own_text() {
    let text = Range::new(Gva(0xffff_ffff_c000_0000), 0x1000);
    let at = Gva(0xffff_ffff_c010_0000);
    let rows = at.plus(0x100);
    let mut bytes = Vec::new();
    for (i, ip) in [text.start.0, text.start.0 + 0x40].into_iter().enumerate() {
        bytes.extend((ip.wrapping_sub(at.0 + 4 * i as u64) as u32).to_le_bytes());
    }
    bytes.resize(0x100, 0);
    bytes.extend(frame(OrcFormat::Reordered, 8));
    bytes.extend(frame(OrcFormat::Reordered, 16));
    let module = MockMemory::new();
    module.map_bytes(at, &bytes, false, false);
    let space = Space::new(&module, ROOT, 4);
    Sample::new(OrcFormat::Reordered).table(|kernel| {
        let read = |count, text| OrcRows::of_module(kernel, &space, (at, rows, count), vec![text]);
        let orc = read(2, text).unwrap();
        let offset = |at: u64| orc.row(text.start.plus(at)).map(|r| r.sp.offset);
        assert_eq!(offset(0x3f), Some(8));
        assert_eq!(offset(0x40), Some(16));
        assert_eq!(offset(0x1000), None);
        assert!(read(0, text).unwrap().is_empty());
        // The second row is for what is gone.
        let orc = read(2, Range::new(text.start, 0x20)).unwrap();
        assert_eq!(orc.len(), 1);
        assert_eq!(orc.row(text.start.plus(0x1f)).map(|r| r.sp.offset), Some(8));
        assert_eq!(orc.row(text.start.plus(0x40)), None);
        let orc = read(2, Range::new(text.start.plus(0x20), 0x100)).unwrap();
        assert_eq!(
            orc.row(text.start.plus(0x40)).map(|r| r.sp.offset),
            Some(16)
        );
        assert!(read(usize::MAX, text).is_err());
        // More than one for each byte of it, and more than init code leaves behind.
        let error = read(0x2000 + 0x4001, text).unwrap_err().to_string();
        assert!(error.contains("24577 ORC rows for 4096 bytes"), "{error}");
        // Rows for nothing of its text.
        assert_eq!(read(4, text).unwrap().len(), 2);
    });
}

#[test]
fn any_mutation_of_the_types_is_refused_or_harmless() {
    let good = btf(OrcFormat::Typed);
    let rows = frame(OrcFormat::Typed, 8);
    for at in 0..good.len() {
        for value in [0, 1, 0x3f, 0x7f, 0x80, 0xff] {
            let mut bad = good.clone();
            bad[at] = value;
            if let Ok(layout) = Btf::new(bad).and_then(|btf| EntryLayout::of(&btf)) {
                let _ = layout.row(&rows);
                let _ = layout.is_plausible(&rows);
            }
        }
    }
}
