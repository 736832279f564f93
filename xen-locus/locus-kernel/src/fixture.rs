//! A small kernel in a mock's memory, for tests: text, and constants with a symbol table. What else
//! a test needs it adds.

#![allow(clippy::cast_possible_truncation)] // small tables
#![allow(clippy::unwrap_used, clippy::indexing_slicing)] // part of tests only
#![allow(missing_debug_implementations, clippy::new_without_default)]

use std::cell::OnceCell;
use std::rc::Rc;

use locus_guest::addr::{Gva, PAGE_LEN};
use locus_guest::budget::Budget;
use locus_guest::mock::{MockMemory, ROOT};
use locus_guest::space::Space;
use locus_guest::{GuestType, Memory, Vcpu};

use crate::btf::Btf;
use crate::{locate, CachedKernel, Error, Kernel};

/// Start of the fixture's text.
pub const TEXT: Gva = Gva(0xffff_ffff_8100_0000);
/// Length of the text, in bytes.
pub const TEXT_LEN: usize = 16 * PAGE_LEN;
/// Start of its constants, right behind the text.
pub const RODATA: Gva = Gva(TEXT.0 + TEXT_LEN as u64);
/// Where the root of its page tables is mapped.
pub const TABLES: Gva = Gva(TEXT.0 + (64 << 20));
/// Its entry point.
pub const ENTRY: Gva = Gva(TEXT.0 + 0x100);

/// Order of the symbol tables, and encoding of addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tables {
    /// Offsets before the names. Per-CPU symbols are absolute (`CONFIG_KALLSYMS_ABSOLUTE_PERCPU`).
    Old,
    /// As [`Tables::Old`], with a sequence of names behind the markers.
    OldWithSequence,
    /// As [`Tables::Old`], with the offsets behind the tokens.
    New,
    /// As [`Tables::Old`], of a kernel for one CPU: all offsets are from the base.
    OldOneCpu,
    /// As [`Tables::OldOneCpu`], with the offsets behind the tokens.
    NewOneCpu,
    /// As [`Tables::Old`], with whole addresses and no base (`CONFIG_KALLSYMS_BASE_RELATIVE` is off).
    OldWhole,
    /// As [`Tables::OldWhole`], with the addresses behind the tokens.
    NewWhole,
    /// Offsets behind the tokens, relative to their own place.
    PlaceRelative,
    /// As [`Tables::PlaceRelative`], aligned to four bytes.
    Packed,
}

impl Tables {
    /// All that kernels have had.
    pub const ALL: [Tables; 9] = [
        Tables::Old,
        Tables::OldWithSequence,
        Tables::New,
        Tables::OldOneCpu,
        Tables::NewOneCpu,
        Tables::OldWhole,
        Tables::NewWhole,
        Tables::PlaceRelative,
        Tables::Packed,
    ];

    /// Whether the addresses are before the names.
    fn is_old(self) -> bool {
        use Tables::{Old, OldOneCpu, OldWhole, OldWithSequence};
        matches!(self, Old | OldWithSequence | OldOneCpu | OldWhole)
    }

    /// Whether there can be symbols far from the kernel's image, as per-CPU variables are.
    pub fn has_absolute(self) -> bool {
        use Tables::{NewOneCpu, OldOneCpu, Packed, PlaceRelative};
        !matches!(self, OldOneCpu | NewOneCpu | PlaceRelative | Packed)
    }
}

fn pad8(out: &mut Vec<u8>) {
    out.resize(out.len().next_multiple_of(8), 0);
}

/// The symbol tables as scripts/kallsyms.c lays them out, for the address `at`. Every token is the
/// character of its own number, so nothing is compressed.
pub fn kallsyms(at: Gva, symbols: &[(u64, char, String)], tables: Tables) -> Vec<u8> {
    let base = TEXT.0;
    let addresses = |out: &mut Vec<u8>| {
        if matches!(tables, Tables::OldWhole | Tables::NewWhole) {
            out.extend(symbols.iter().flat_map(|(addr, _, _)| addr.to_le_bytes()));
            return;
        }
        for (addr, _, _) in symbols {
            let place = at.0 + (out.len() as u64);
            let word = match tables {
                Tables::PlaceRelative | Tables::Packed => addr.wrapping_sub(place),
                Tables::OldOneCpu | Tables::NewOneCpu => addr.wrapping_sub(base),
                // Absolute symbols are positive, the others count down from the base.
                _ if *addr < base => *addr,
                _ => (base.wrapping_sub(1)).wrapping_sub(*addr),
            };
            out.extend((word as u32).to_le_bytes());
        }
        if !matches!(tables, Tables::PlaceRelative | Tables::Packed) {
            pad8(out);
            out.extend(base.to_le_bytes());
        }
    };
    let pad = |out: &mut Vec<u8>| match tables {
        Tables::Packed => out.resize(out.len().next_multiple_of(4), 0),
        _ => pad8(out),
    };
    let mut out = Vec::new();
    if tables.is_old() {
        addresses(&mut out);
    }
    out.extend((symbols.len() as u32).to_le_bytes());
    pad(&mut out);
    let names = out.len();
    let mut markers = Vec::new();
    for (i, (_, kind, name)) in symbols.iter().enumerate() {
        if i % 256 == 0 {
            markers.push((out.len() - names) as u32);
        }
        let len = name.len() + 1;
        if len > 127 {
            out.extend([(len & 0x7f | 0x80) as u8, (len >> 7) as u8]);
        } else {
            out.push(len as u8);
        }
        out.push(*kind as u8);
        out.extend(name.as_bytes());
    }
    pad(&mut out);
    out.extend(markers.iter().flat_map(|m| m.to_le_bytes()));
    pad(&mut out);
    if tables == Tables::OldWithSequence {
        out.extend((0..symbols.len()).flat_map(|i| [(i >> 16) as u8, (i >> 8) as u8, i as u8]));
        pad8(&mut out);
    }
    let mut index = Vec::new();
    let tokens = out.len();
    for token in 0..=255u8 {
        index.push((out.len() - tokens) as u16);
        // An unused token is empty; one that stands for itself is one byte.
        if token.is_ascii_graphic() {
            out.push(token);
        }
        out.push(0);
    }
    pad(&mut out);
    out.extend(index.iter().flat_map(|i| i.to_le_bytes()));
    if !tables.is_old() {
        addresses(&mut out);
    }
    out
}

/// A kernel to be built.
pub struct Fixture {
    /// Its text, from [`TEXT`] on.
    pub text: Vec<u8>,
    /// Its symbols: address, type, name. `_text`, the entry point, and 1500 others are there from the start.
    pub symbols: Vec<(u64, char, String)>,
    /// Its constants by name; a symbol is added for each.
    pub constants: Vec<(&'static str, Vec<u8>)>,
    /// The form of its symbol table.
    pub tables: Tables,
}

impl Fixture {
    /// A kernel with nothing in it but what every kernel has.
    pub fn new() -> Fixture {
        let mut symbols = vec![
            (TEXT.0, 'T', "_text".to_owned()),
            (ENTRY.0, 'T', "entry".to_owned()),
            (TABLES.0, 'D', "init_top_pgt".to_owned()),
        ];
        // The last page of text is full of small symbols.
        let filler = TEXT.0 + TEXT_LEN as u64 - PAGE_LEN as u64;
        symbols.extend((0..1500).map(|i| (filler + i, 't', format!("filler_{i}"))));
        let banner = b"Linux version 6.1.0-test (builder) #1\n\0".to_vec();
        Fixture {
            text: vec![0xcc; TEXT_LEN],
            symbols,
            constants: vec![("linux_banner", banner)],
            tables: Tables::Old,
        }
    }

    /// Adds a function with this code at the address `at`, which is within the text.
    pub fn function(&mut self, at: u64, name: &str, code: &[u8]) {
        self.symbols.push((at, 't', name.to_owned()));
        let start = (at - TEXT.0) as usize;
        self.text[start..start + code.len()].copy_from_slice(code);
    }

    /// Builds the kernel in a mock's memory.
    pub fn build(mut self) -> MockMemory {
        let mut rodata = vec![0; 64];
        for (name, bytes) in &self.constants {
            self.symbols
                .push((RODATA.0 + rodata.len() as u64, 'D', (*name).to_owned()));
            rodata.extend(bytes);
            pad8(&mut rodata);
        }
        self.symbols.sort();
        if self.tables == Tables::Packed {
            rodata.extend([0; 4]);
        }
        let at = RODATA.plus(rodata.len() as u64);
        rodata.extend(kallsyms(at, &self.symbols, self.tables));
        let memory = MockMemory::new();
        memory.map_bytes(TEXT, &self.text, false, true);
        memory.map_bytes(RODATA, &rodata, false, false);
        memory.map_page(TABLES, ROOT, true, false);
        memory
    }
}

/// The state of the fixture's only vCPU, halted in user mode.
pub fn vcpus() -> Vec<Vcpu> {
    vec![Vcpu {
        online: true,
        user: true,
        long_mode: true,
        root: ROOT,
        entry: Some(ENTRY),
        ..Vcpu::default()
    }]
}

/// The type of guest that it is read as.
pub const KIND: GuestType = GuestType::Pvh;

/// The same `kernel` with the budget `budget` and nothing remembered of its memory. Its types
/// become `btf`, unless that is empty.
///
/// # Errors
/// [`Error::Odd`] if `btf` is not well-formed.
pub fn renewed<'m>(kernel: &Kernel<'m>, btf: &[u8], budget: Budget) -> Result<Kernel<'m>, Error> {
    let types = match btf {
        [] => kernel.btf.clone(),
        bytes => OnceCell::from(Rc::new(Btf::new(bytes.to_vec())?.paid_from(&budget))),
    };
    let symbols = kernel.symbols.clone().paid_from(&budget);
    Ok(Kernel {
        space: Space::within(kernel.space.memory(), ROOT, 4, budget),
        kind: kernel.kind,
        text_base: kernel.text_base,
        regions: kernel.regions.clone(),
        symbols,
        release: kernel.release.clone(),
        build_id: kernel.build_id.clone(),
        cpus_max: kernel.cpus_max,
        btf: types,
    })
}

/// The kernel in `memory` with what a cache `kept` of it; `None` if that does not fit.
pub fn with_kept<'m>(
    memory: &'m dyn Memory,
    vcpus: &[Vcpu],
    kept: CachedKernel,
) -> Option<Kernel<'m>> {
    let located = locate::locate(memory, KIND, vcpus, &Budget::default());
    let located = located.ok()?.into_iter().next()?;
    Kernel::kept(&located, KIND, located.anchors(&|_| true), kept)
}
