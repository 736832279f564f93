//! Pointers in a file that was never loaded: relocations say where they lead.

use std::collections::{BTreeMap, HashMap, HashSet};

use iced_x86::{Decoder, DecoderOptions};
use object::elf;

use super::elf::{reloc_width, Reloc, Section};
use super::error::{PayloadErrorKind, Result};
use super::role::Role;
use super::symbol::{ElfSymbol, SymKind, SymSection};
use super::MAX_NAME;

/// Where a pointer in the file's data leads.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pointee {
    /// The symbol that the relocation names.
    pub symbol: usize,
    /// Where that symbol is defined.
    pub section: SymSection,
    /// Offset in that section in bytes, with the addend; at most the size of the section.
    pub offset: u64,
}

/// A file's sections and symbols, with indexes for following pointers.
pub(super) struct View<'a> {
    sections: &'a [Section],
    symbols: &'a [ElfSymbol],
    /// Sizes of variables in bytes, by section and offset.
    objects: HashMap<(usize, u64), Vec<u64>>,
    /// Functions with a size, by section and offset: index of the first symbol, and its size in bytes.
    functions: HashMap<(usize, u64), (usize, u64)>,
    /// Offsets that livepatch relocations change, sorted, by section.
    late: HashMap<usize, Vec<u64>>,
    /// What code refers to, and what data refers to, sorted by where they lead.
    of_code: Vec<Reference>,
    of_data: Vec<Reference>,
}

/// A reference of the payload to its own sections.
struct Reference {
    /// Section and offset that it leads to.
    to: (usize, i128),
    /// By how much the true offset may be greater.
    slack: i128,
    /// Section and offset of the relocation.
    from: (usize, u64),
}

/// Whether a section holds code that may run; code of `module_exit` does not before the module is taken out.
fn is_code(section: &Section) -> bool {
    section.flags.exec && section.role != Role::ExitText
}

/// The relocations of a section, those of its livepatch sections too.
struct Home<'a> {
    section: &'a Section,
    relocs: Vec<&'a Reloc>,
}

/// All sections that relocations change, those of livepatch sections too. Each is listed once, however many sections
/// relocate it: what is done for each costs as much as it is long.
fn homes(sections: &[Section]) -> Vec<Home<'_>> {
    let mut relocs: BTreeMap<usize, Vec<&Reloc>> = BTreeMap::new();
    for section in sections.iter().filter(|s| !s.relocs.is_empty()) {
        let all = relocs.entry(section.home()).or_default();
        all.extend(&section.relocs);
    }
    let home = |(index, relocs)| {
        let section = sections.get(index)?;
        Some(Home { section, relocs })
    };
    relocs.into_iter().filter_map(home).collect()
}

/// The references in the code (`of_code`) or in the data of the payload to its own sections, sorted by where
/// they lead.
fn references(homes: &[Home<'_>], symbols: &[ElfSymbol], of_code: bool) -> Vec<Reference> {
    let mut found = Vec::new();
    let wanted = |h: &&Home<'_>| h.section.role != Role::ExitText && is_code(h.section) == of_code;
    for home in homes.iter().filter(wanted) {
        let ends = if of_code { ends(home) } else { HashMap::new() };
        for reloc in &home.relocs {
            let Some(symbol) = symbols.get(reloc.symbol) else {
                continue;
            };
            let SymSection::Section(to) = symbol.section else {
                continue;
            };
            let relative = matches!(
                elf::RelocationType(reloc.rtype),
                elf::R_X86_64_PC32 | elf::R_X86_64_PLT32 | elf::R_X86_64_PC64
            );
            let at = i128::from(symbol.value) + i128::from(reloc.addend);
            let (at, slack) = match (of_code && relative, ends.get(&reloc.offset)) {
                (false, _) => (at, 0),
                (true, Some(&end)) => (at + i128::from(end - reloc.offset), 0),
                (true, None) => (at + 4, 4),
            };
            found.push(Reference {
                to: (to, at),
                slack,
                from: (home.section.index, reloc.offset),
            });
        }
    }
    found.sort_unstable_by_key(|r| r.to);
    found
}

/// Those of `all` that lead to offsets `from..to` of a section: the places of their relocations.
fn leading_to(
    all: &[Reference],
    section: usize,
    from: u64,
    to: u64,
) -> impl Iterator<Item = (usize, u64)> + use<'_> {
    let (from, to) = (i128::from(from), i128::from(to));
    let first = all.partition_point(|r| r.to < (section, from - 4));
    all.iter()
        .skip(first)
        .take_while(move |r| r.to.0 == section && r.to.1 < to)
        .filter(move |r| r.to.1 + r.slack >= from)
        .map(|r| r.from)
}

/// For each relative address that relocations make in code, by its offset: the end of its instruction, which the
/// address is relative to. Only addresses that decoding finds as the displacement or branch target of an
/// instruction.
fn ends(home: &Home<'_>) -> HashMap<u64, u64> {
    #[cfg(test)]
    DECODED.with(|count| count.set(count.get() + home.section.data.len()));
    let places: HashSet<u64> = home.relocs.iter().map(|r| r.offset).collect();
    let mut decoder = Decoder::with_ip(64, &home.section.data, 0, DecoderOptions::NONE);
    let mut ends = HashMap::new();
    while decoder.can_decode() && !places.is_empty() {
        let instruction = decoder.decode();
        let fields = decoder.get_constant_offsets(&instruction);
        let near =
            instruction.is_call_near() || instruction.is_jmp_near() || instruction.is_jcc_near();
        let at = match (fields.has_displacement(), near && fields.has_immediate()) {
            (true, _) => fields.displacement_offset(),
            (_, true) => fields.immediate_offset(),
            _ => continue,
        };
        let at = instruction.ip() + at as u64;
        if places.contains(&at) {
            ends.insert(at, instruction.next_ip());
        }
    }
    ends
}

#[cfg(test)]
thread_local! {
    /// Bytes of code that were decoded, for tests of what a file costs.
    pub(super) static DECODED: std::cell::Cell<usize> = const { std::cell::Cell::new(0) };
}

impl<'a> View<'a> {
    /// The view of a whole file.
    pub fn new(sections: &'a [Section], symbols: &'a [ElfSymbol]) -> Self {
        let mut objects: HashMap<_, Vec<u64>> = HashMap::new();
        let mut functions = HashMap::new();
        for symbol in symbols.iter().filter(|s| s.size > 0) {
            let SymSection::Section(section) = symbol.section else {
                continue;
            };
            let key = (section, symbol.value);
            match symbol.kind {
                SymKind::Object => {
                    let sizes = objects.entry(key).or_default();
                    if !sizes.contains(&symbol.size) {
                        // Two are enough to know that they disagree.
                        sizes.truncate(1);
                        sizes.push(symbol.size);
                    }
                }
                SymKind::Func => {
                    functions.entry(key).or_insert((symbol.index, symbol.size));
                }
                _ => {}
            }
        }
        let mut late: HashMap<usize, Vec<u64>> = HashMap::new();
        for section in sections {
            if let Role::KlpRela { target, .. } = section.role {
                late.entry(target)
                    .or_default()
                    .extend(section.relocs.iter().map(|r| r.offset));
            }
        }
        for places in late.values_mut() {
            places.sort_unstable();
        }
        let homes = homes(sections);
        Self {
            of_code: references(&homes, symbols, true),
            of_data: references(&homes, symbols, false),
            sections,
            symbols,
            objects,
            functions,
            late,
        }
    }

    pub fn section(&self, index: usize) -> Option<&'a Section> {
        self.sections.get(index)
    }

    /// A place for messages, such as `.data+0x40`.
    pub fn place(&self, section: usize, offset: u64) -> String {
        let name = self.section(section).map_or("?", |s| s.name.as_str());
        format!("{name}+{offset:#x}")
    }

    /// True if `reloc` makes the address of the module's own `struct module`.
    pub fn is_this_module(&self, reloc: &Reloc) -> bool {
        let Some(pointee) = self.resolve(reloc) else {
            return false;
        };
        match pointee.section {
            SymSection::Section(index) => {
                pointee.offset == 0
                    && self
                        .section(index)
                        .is_some_and(|s| s.role == Role::ThisModule)
            }
            _ => false,
        }
    }

    /// Where the pointer that `reloc` makes leads; `None` if it makes no pointer, or one to nowhere.
    fn resolve(&self, reloc: &Reloc) -> Option<Pointee> {
        if reloc.rtype != elf::R_X86_64_64.0 {
            return None;
        }
        let symbol = self.symbols.get(reloc.symbol)?;
        let offset = symbol.value.checked_add_signed(reloc.addend)?;
        if let SymSection::Section(index) = symbol.section {
            if offset > self.section(index)?.size {
                return None;
            }
        }
        Some(Pointee {
            symbol: reloc.symbol,
            section: symbol.section,
            offset,
        })
    }

    /// Relocations that start at offsets `from..to` of a section.
    pub fn relocs_in<'s>(
        &self,
        section: &'s Section,
        from: u64,
        to: u64,
    ) -> impl Iterator<Item = &'s Reloc> + use<'s> {
        let first = section.relocs.partition_point(|r| r.offset < from);
        section
            .relocs
            .iter()
            .skip(first)
            .take_while(move |r| r.offset < to)
    }

    /// True if relocations change a byte at offsets `from..to` of a section, late ones too. Those that begin earlier
    /// may reach into it.
    pub fn is_changed(&self, section: &Section, from: u64, to: u64) -> bool {
        let reaches = |r: &Reloc| r.offset.saturating_add(reloc_width(r.rtype)) > from;
        self.relocs_in(section, from.saturating_sub(7), to)
            .any(reaches)
            || self.is_late(section, from, to)
    }

    /// True if livepatch relocations change a byte at offsets `from..to`, whose value is not in the file.
    pub fn is_late(&self, section: &Section, from: u64, to: u64) -> bool {
        let Some(places) = self.late.get(&section.index) else {
            return false;
        };
        let first = places.partition_point(|at| *at < from.saturating_sub(7));
        places.get(first).is_some_and(|at| *at < to)
    }

    /// True if code of the payload refers to offsets `from..to` of a section. Then `module_init` may fill in
    /// fields that are zero in the file.
    ///
    /// An instruction that could not be decoded may have a constant after its address. Then up to four
    /// bytes too many count as part of the range.
    pub fn code_refers_to(&self, section: usize, from: u64, to: u64) -> bool {
        leading_to(&self.of_code, section, from, to)
            .next()
            .is_some()
    }

    /// The first place in data, other than `known`, whose pointer leads to offsets `from..to` of a section.
    /// Through it `module_init` may change what is there, although no code names it.
    pub fn pointer_to(
        &self,
        section: usize,
        from: u64,
        to: u64,
        known: Option<(usize, u64)>,
    ) -> Option<(usize, u64)> {
        leading_to(&self.of_data, section, from, to).find(|from| Some(*from) != known)
    }

    /// The places in code and data that refer to offsets `from..to` of a section.
    pub fn referrers(
        &self,
        section: usize,
        from: u64,
        to: u64,
    ) -> impl Iterator<Item = (usize, u64)> + use<'_> {
        let code = leading_to(&self.of_code, section, from, to);
        code.chain(leading_to(&self.of_data, section, from, to))
    }

    /// The pointer at `offset` of a section; `None` is a null pointer.
    pub fn pointer(&self, section: &Section, offset: u64) -> Result<Option<Pointee>> {
        let end = offset.saturating_add(8);
        let fail = |problem: &str| {
            Err(PayloadErrorKind::malformed(
                self.place(section.index, offset),
                problem,
            ))
        };
        if self.is_late(section, offset, end) {
            return fail("expected a value known in the file, found a livepatch relocation");
        }
        // A relocation that starts earlier may reach into the field.
        let mut near = self
            .relocs_in(section, offset.saturating_sub(7), end)
            .filter(|r| r.offset.saturating_add(reloc_width(r.rtype)) > offset);
        match (near.next(), near.next()) {
            (None, _) if section.role == Role::Bss && end <= section.size => Ok(None),
            (None, _) => match self.bytes(section, offset, end) {
                Some(bytes) if bytes.iter().all(|b| *b == 0) => Ok(None),
                Some(_) => fail("expected an address or zero, found another number"),
                None => fail("expected an address, found the end of the section"),
            },
            (Some(reloc), None) if reloc.offset == offset => match self.resolve(reloc) {
                Some(pointee) => Ok(Some(pointee)),
                None => fail("expected an address (R_X86_64_64) inside a section"),
            },
            _ => fail("expected one address, found another relocation across it"),
        }
    }

    /// The 8-byte number at `offset` of a section, which no relocation may change.
    pub fn literal(&self, section: &Section, offset: u64) -> Result<u64> {
        let end = offset.saturating_add(8);
        let bytes = self
            .bytes(section, offset, end)
            .and_then(|b| <[u8; 8]>::try_from(b).ok());
        match bytes {
            Some(bytes) if !self.is_changed(section, offset, end) => Ok(u64::from_le_bytes(bytes)),
            _ => Err(PayloadErrorKind::malformed(
                self.place(section.index, offset),
                "expected a plain number of 8 bytes",
            )),
        }
    }

    /// The bytes at offsets `from..to` of a section; `None` if the file has no contents there.
    fn bytes<'s>(&self, section: &'s Section, from: u64, to: u64) -> Option<&'s [u8]> {
        section
            .data
            .get(usize::try_from(from).ok()?..usize::try_from(to).ok()?)
    }

    /// True if offsets `from..to` of a section hold zeroes only, and no relocation changes them.
    pub fn is_zero(&self, section: &Section, from: u64, to: u64) -> bool {
        !self.is_changed(section, from, to)
            && match section.role {
                Role::Bss => to <= section.size,
                _ => self
                    .bytes(section, from, to)
                    .is_some_and(|b| b.iter().all(|b| *b == 0)),
            }
    }

    /// The first two bytes at offsets `from..to` of a section that are not zero, with their offsets.
    pub fn nonzero_bytes(&self, section: &Section, from: u64, to: u64) -> Result<Vec<(u64, u8)>> {
        let bytes = self.bytes(section, from, to.max(from)).ok_or_else(|| {
            PayloadErrorKind::malformed(
                self.place(section.index, from),
                "expected data, found the end of the section",
            )
        })?;
        let numbered = (from..).zip(bytes.iter().copied());
        Ok(numbered.filter(|(_, byte)| *byte != 0).take(2).collect())
    }

    /// The data section that a pointer leads to.
    pub fn data(&self, pointee: &Pointee) -> Option<&'a Section> {
        let SymSection::Section(index) = pointee.section else {
            return None;
        };
        self.section(index)
            .filter(|s| matches!(s.role, Role::Data | Role::RoData | Role::Bss))
    }

    /// Size in bytes of the variable that starts at `offset` of a section; `None` if no symbol gives it.
    pub fn object_size(&self, section: usize, offset: u64) -> Result<Option<u64>> {
        match self.objects.get(&(section, offset)).map(Vec::as_slice) {
            None | Some([]) => Ok(None),
            Some([size]) => Ok(Some(*size)),
            Some(_) => Err(PayloadErrorKind::malformed(
                self.place(section, offset),
                "symbols of different sizes start here",
            )),
        }
    }

    /// Index of the symbol of the function that a pointer into `section` leads to, and its size in bytes.
    pub fn function(&self, pointee: &Pointee, section: usize) -> Option<(usize, u64)> {
        let named = self.symbols.get(pointee.symbol)?;
        if named.kind == SymKind::Func && named.size > 0 && named.value == pointee.offset {
            return Some((named.index, named.size));
        }
        self.functions.get(&(section, pointee.offset)).copied()
    }

    /// The printable ASCII text, ended by a zero byte, that a pointer leads to.
    pub fn string(&self, pointee: &Pointee) -> Option<&'a str> {
        let section = self.data(pointee)?;
        let start = usize::try_from(pointee.offset).ok()?;
        let most = usize::try_from(MAX_NAME).ok()?.saturating_add(1);
        let bytes = section.data.get(start..)?;
        let end = bytes.iter().take(most).position(|b| *b == 0)?;
        // The zero byte that ends it counts, too.
        let to = pointee.offset.saturating_add(end as u64).saturating_add(1);
        if self.is_changed(section, pointee.offset, to) {
            return None;
        }
        let text = std::str::from_utf8(bytes.get(..end)?).ok()?;
        text.chars().all(|c| c.is_ascii_graphic()).then_some(text)
    }

    /// The name that `field` of a structure points at. `pointee` is where the field leads.
    pub fn name(
        &self,
        structure: &'static str,
        at: (usize, u64),
        field: &str,
        pointee: Option<Pointee>,
    ) -> Result<String> {
        match pointee.and_then(|p| self.string(&p)) {
            Some(text) if !text.is_empty() => Ok(text.to_owned()),
            _ => self.fault(
                structure,
                at,
                format!("{field} doesn't point at a printable name of 1 to {MAX_NAME} bytes"),
            ),
        }
    }

    /// The error that a structure of the payload, at an offset of a section, can't be right.
    pub fn fault<T>(
        &self,
        structure: &'static str,
        (section, offset): (usize, u64),
        problem: impl Into<String>,
    ) -> Result<T> {
        Err(PayloadErrorKind::Klp {
            structure,
            place: self.place(section, offset),
            problem: problem.into(),
        })
    }
}
