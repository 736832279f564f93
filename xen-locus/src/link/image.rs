//! Lays out a payload's sections, and relocates them for their addresses.
//!
//! What the kernel's module loader does (`apply_relocate_add`, arch/x86/kernel/module.c; ftrace and
//! return sites), done from outside. What can't be done yet is refused by name.

use super::arena::Rights;
use super::module::{Built, Entry, JumpSite, Place};
use super::site::Returns;
use crate::addr::{Gva, Range, PAGE_LEN, PAGE_SIZE};
use crate::error::{Error, Result};
use crate::kernel::Kernel;
use crate::patch::{Payload, Reloc, Role, Section, SymSection, Symbol};

const R_X86_64_64: u32 = 1;
const R_X86_64_PC32: u32 = 2;
const R_X86_64_PLT32: u32 = 4;
const R_X86_64_32: u32 = 10;
const R_X86_64_32S: u32 = 11;
const R_X86_64_PC64: u32 = 24;
/// The five-byte nop in place of a call of `__fentry__`.
const FENTRY_NOP: [u8; 5] = [0x0f, 0x1f, 0x44, 0x00, 0x00];

/// Sections by their rights, each run beginning on a page.
#[derive(Debug)]
pub struct Layout {
    /// Rights of each page.
    pub rights: Vec<Rights>,
    /// Offset of each placed section, by section number.
    offsets: Vec<Option<u64>>,
    /// Offset and room of the record.
    pub record: (u64, usize),
    /// Offsets of the read-only and of the writable part of the module entry.
    pub entry: (u64, u64),
    /// Length of the code, which begins at offset 0, in bytes.
    pub text_len: u64,
}

/// A payload relocated for its place.
#[derive(Debug)]
pub struct Image {
    /// Its bytes, from its first page on; the rooms of the record and of the module entry are zero.
    pub bytes: Vec<u8>,
    /// Addresses of the new functions, in the order of the payload's objects and functions.
    pub functions: Vec<Gva>,
}

impl Image {
    /// Puts the module entry, links and all, into its room.
    ///
    /// # Errors
    /// It does not fit.
    pub fn put_entry(&mut self, layout: &Layout, entry: &Built) -> Result<()> {
        for (at, bytes) in [(layout.entry.0, &entry.ro), (layout.entry.1, &entry.rw)] {
            let at = usize::try_from(at).unwrap_or(usize::MAX);
            self.bytes
                .get_mut(at..at.saturating_add(bytes.len()))
                .ok_or_else(|| Error::Failed("the module entry does not fit its room".into()))?
                .copy_from_slice(bytes);
        }
        Ok(())
    }
}

fn rights_of(section: &Section) -> Option<Rights> {
    match section.role {
        Role::Text => Some(Rights::Text),
        Role::RoData => Some(Rights::RoData),
        Role::Data | Role::Bss => Some(Rights::Data),
        _ => None,
    }
}

/// Refuses what this loader can't do yet.
///
/// # Errors
/// [`Error::NotApplicable`] that names all of it.
pub fn check_supported(payload: &Payload) -> Result<()> {
    let concerns: Vec<String> = payload
        .concerns()
        .into_iter()
        .map(|c| format!("{}: {}", c.subject, c.reason))
        .collect();
    if concerns.is_empty() {
        return Ok(());
    }
    Err(Error::NotApplicable(format!(
        "payload {} needs what is not supported yet ({}); build it without that",
        payload.name,
        concerns.join("; ")
    )))
}

impl Layout {
    /// Places the sections, code first, then constants, a record of `record_len` bytes and what of the
    /// module entry is read only, then variables, and on pages of its own the rest of the entry: the
    /// payload's variables begin anew when it is applied again, the entry goes on.
    ///
    /// # Errors
    /// The payload is larger than any arena.
    pub fn new(payload: &Payload, record_len: usize, entry: (u64, u64)) -> Result<Layout> {
        let too_big = || {
            Error::NotApplicable(format!(
                "payload {} needs more than the arena's {} pages",
                payload.name,
                super::arena::PAGES
            ))
        };
        let mut offsets = vec![None; payload.sections.len()];
        let mut rights = Vec::new();
        let mut at = 0u64;
        let mut text_len = 0;
        let mut record = (0, record_len);
        let (mut entry_ro, mut entry_rw) = (0, 0);
        for group in [Rights::Text, Rights::RoData, Rights::Data] {
            let start = at;
            for section in payload.placed().filter(|s| rights_of(s) == Some(group)) {
                let align = section.align.clamp(1, PAGE_SIZE);
                at = at.checked_next_multiple_of(align).ok_or_else(too_big)?;
                if let Some(offset) = offsets.get_mut(section.index) {
                    *offset = Some(at);
                }
                at = at.checked_add(section.size).ok_or_else(too_big)?;
            }
            if group == Rights::Text {
                text_len = at;
            }
            if group == Rights::RoData {
                at = at.checked_next_multiple_of(8).ok_or_else(too_big)?;
                record.0 = at;
                at = at.checked_add(record_len as u64).ok_or_else(too_big)?;
                at = at.checked_next_multiple_of(64).ok_or_else(too_big)?;
                entry_ro = at;
                at = at.checked_add(entry.0).ok_or_else(too_big)?;
            }
            if group == Rights::Data {
                at = at.checked_next_multiple_of(PAGE_SIZE).ok_or_else(too_big)?;
                entry_rw = at;
                at = at.checked_add(entry.1).ok_or_else(too_big)?;
            }
            at = at.checked_next_multiple_of(PAGE_SIZE).ok_or_else(too_big)?;
            let pages = usize::try_from((at - start) / PAGE_SIZE).unwrap_or(usize::MAX);
            if rights.len().saturating_add(pages) > super::arena::PAGES {
                return Err(too_big());
            }
            rights.extend(std::iter::repeat_n(group, pages));
        }
        Ok(Layout {
            rights,
            offsets,
            record,
            entry: (entry_ro, entry_rw),
            text_len,
        })
    }

    /// What is written when the payload is applied again: the record, and the variables but for the
    /// module entry.
    #[must_use]
    pub fn rewritten(&self) -> Vec<std::ops::Range<usize>> {
        let (record, room) = self.record;
        let record = usize::try_from(record).unwrap_or(usize::MAX);
        let data = self.rights.iter().take_while(|&&r| r != Rights::Data);
        let data = data.count() * PAGE_LEN;
        let entry = usize::try_from(self.entry.1).unwrap_or(usize::MAX);
        vec![record..record.saturating_add(room), data..entry.max(data)]
    }

    /// Where all of it stands when the first page is at `base`.
    #[must_use]
    pub fn place(&self, base: Gva) -> Place {
        let pages = |which: Rights| {
            let first = self.rights.iter().position(|&r| r == which).unwrap_or(0) as u64;
            let count = self.rights.iter().filter(|&&r| r == which).count() as u64;
            Range::new(base.plus(first * PAGE_SIZE), count * PAGE_SIZE)
        };
        Place {
            text: pages(Rights::Text),
            rodata: pages(Rights::RoData),
            data: pages(Rights::Data),
            ro: base.plus(self.entry.0),
            rw: base.plus(self.entry.1),
        }
    }

    fn offset(&self, section: usize) -> Option<u64> {
        self.offsets.get(section).copied().flatten()
    }
}

/// Relocates `payload`, laid out as `layout`, for the address `base`.
///
/// # Errors
/// [`Error::NotApplicable`]: a symbol the kernel doesn't have or has several times, a relocation of
/// an unknown type or out of range, a reference into a part that is never placed.
pub fn link(
    payload: &Payload,
    kernel: &Kernel<'_>,
    layout: &Layout,
    base: Gva,
    returns: Option<Returns>,
) -> Result<Image> {
    let mut linker = Linker {
        payload,
        kernel,
        layout,
        base,
        bytes: vec![0; layout.rights.len() * PAGE_LEN],
    };
    for section in payload.placed() {
        linker.copy(section)?;
    }
    for section in &payload.sections {
        match section.role {
            Role::KlpRela { target, .. } => {
                if let Some(target) = payload.section(target).filter(|t| t.role.is_placed()) {
                    linker.relocate(target, &section.relocs)?;
                }
            }
            _ if section.role.is_placed() => linker.relocate(section, &section.relocs)?,
            _ => {}
        }
    }
    if returns == Some(Returns::Plain) {
        linker.plain_returns()?;
    }
    let functions = payload
        .klp
        .objects
        .iter()
        .flat_map(|object| &object.funcs)
        .map(|func| {
            let offset = layout.offset(func.new_section).ok_or_else(|| {
                linker.no(format!(
                    "the new {} is in no section that is placed",
                    func.old_name
                ))
            })?;
            Ok(base.plus(offset).plus(func.new_offset))
        })
        .collect::<Result<Vec<Gva>>>()?;
    Ok(Image {
        bytes: linker.bytes,
        functions,
    })
}

/// Builds the module entry of a payload that is linked for the address `base`.
///
/// # Errors
/// As [`link`] and [`Entry::build`].
pub fn entry(
    entry: &Entry<'_>,
    payload: &Payload,
    kernel: &Kernel<'_>,
    layout: &Layout,
    base: Gva,
) -> Result<Built> {
    let linker = Linker {
        payload,
        kernel,
        layout,
        base,
        bytes: Vec::new(),
    };
    let jumps: Vec<JumpSite> = Vec::new();
    entry.build(
        kernel,
        layout.place(base),
        &|reloc| linker.value(reloc),
        &|section| layout.offset(section).map(|at| base.plus(at).0),
        &jumps,
    )
}

struct Linker<'a, 'm> {
    payload: &'a Payload,
    kernel: &'a Kernel<'m>,
    layout: &'a Layout,
    base: Gva,
    bytes: Vec<u8>,
}

impl Linker<'_, '_> {
    fn no(&self, why: String) -> Error {
        Error::NotApplicable(format!("payload {}: {why}", self.payload.name))
    }

    fn copy(&mut self, section: &Section) -> Result<()> {
        let start = self.layout.offset(section.index).unwrap_or(u64::MAX);
        let start = usize::try_from(start).unwrap_or(usize::MAX);
        let room = start
            .checked_add(section.data.len())
            .and_then(|end| self.bytes.get_mut(start..end));
        match room {
            Some(room) => {
                room.copy_from_slice(&section.data);
                Ok(())
            }
            None => Err(self.no(format!("section {} does not fit its place", section.name))),
        }
    }

    fn relocate(&mut self, section: &Section, relocs: &[Reloc]) -> Result<()> {
        for reloc in relocs {
            let Some(symbol) = self.payload.symbol(reloc.symbol) else {
                return Err(self.no(format!("relocation against symbol {}", reloc.symbol)));
            };
            // The pointer to the module itself has no meaning outside of the module loader.
            if section.index == self.payload.klp.section && reloc.offset == self.payload.klp.offset
            {
                continue;
            }
            if symbol.name == "__fentry__" && self.fentry(section, reloc.offset)? {
                continue;
            }
            let target = self.address(symbol, section, reloc.offset)?;
            self.patch(section, reloc, target, symbol)?;
        }
        Ok(())
    }

    /// Turns a call of `__fentry__` into the nop the kernel's ftrace would make of it.
    fn fentry(&mut self, section: &Section, offset: u64) -> Result<bool> {
        let Some(at) = offset.checked_sub(1) else {
            return Ok(false);
        };
        let is_call = self.slice(section, at, 1)?.first() == Some(&0xe8);
        if is_call {
            self.slice(section, at, 5)?.copy_from_slice(&FENTRY_NOP);
        }
        Ok(is_call)
    }

    /// Turns each `jmp` to the return thunk into `ret`, padded with breakpoints, as the kernel does
    /// on a CPU that needs no return mitigation (`apply_returns`, arch/x86/kernel/alternative.c).
    fn plain_returns(&mut self) -> Result<()> {
        let payload = self.payload;
        for section in payload
            .sections
            .iter()
            .filter(|s| s.role == Role::Text && s.size > 0)
        {
            for reloc in &section.relocs {
                let thunk = payload
                    .symbol(reloc.symbol)
                    .is_some_and(|s| s.name == "__x86_return_thunk");
                let Some(at) = reloc.offset.checked_sub(1).filter(|_| thunk) else {
                    continue;
                };
                let code = self.slice(section, at, 5)?;
                if code.first() == Some(&0xe9) {
                    code.copy_from_slice(&[0xc3, 0xcc, 0xcc, 0xcc, 0xcc]);
                }
            }
        }
        Ok(())
    }

    /// The bytes at `offset` of a placed section.
    fn slice(&mut self, section: &Section, offset: u64, len: usize) -> Result<&mut [u8]> {
        let no = self.no(format!(
            "a relocation of section {} leaves it",
            section.name
        ));
        let inside = offset
            .checked_add(len as u64)
            .is_some_and(|end| end <= section.size);
        let start = self
            .layout
            .offset(section.index)
            .and_then(|start| start.checked_add(offset))
            .and_then(|start| usize::try_from(start).ok());
        match start {
            Some(start) if inside => self.bytes.get_mut(start..start + len).ok_or(no),
            _ => Err(no),
        }
    }

    /// The value of a relocation's symbol, of a section that is not placed itself.
    fn value(&self, reloc: &Reloc) -> Result<Gva> {
        let found = self
            .payload
            .symbol(reloc.symbol)
            .and_then(|symbol| Some((symbol, self.payload.section(0)?)));
        match found {
            Some((symbol, none)) => self.address(symbol, none, reloc.offset),
            None => Err(self.no(format!("relocation against symbol {}", reloc.symbol))),
        }
    }

    /// The value of a symbol.
    fn address(&self, symbol: &Symbol, section: &Section, offset: u64) -> Result<Gva> {
        match symbol.section {
            SymSection::Section(index) => match self.layout.offset(index) {
                Some(start) => Ok(self.base.plus(start).plus(symbol.value)),
                None => Err(self.no(format!(
                    "{}+{offset:#x} refers to {} in section {}, which is never placed",
                    section.name,
                    symbol.name,
                    self.payload.section(index).map_or("?", |s| s.name.as_str())
                ))),
            },
            SymSection::Absolute => Ok(Gva(symbol.value)),
            SymSection::Livepatch => match &symbol.klp {
                Some(klp) if klp.object == "vmlinux" => self
                    .kernel
                    .function(&klp.symbol, klp.sympos)
                    .map_err(|e| self.no(e.to_string())),
                Some(klp) => Err(self.no(format!(
                    "symbol {} of module {}: symbols of modules are not supported yet",
                    klp.symbol, klp.object
                ))),
                None => Err(self.no(format!("symbol {} is no .klp.sym", symbol.name))),
            },
            SymSection::Undefined => self
                .kernel
                .function(&symbol.name, 0)
                .map_err(|e| self.no(e.to_string())),
            _ => Err(self.no(format!("symbol {} has no place", symbol.name))),
        }
    }

    fn patch(
        &mut self,
        section: &Section,
        reloc: &Reloc,
        target: Gva,
        symbol: &Symbol,
    ) -> Result<()> {
        let place = self
            .layout
            .offset(section.index)
            .map_or(self.base, |start| self.base.plus(start).plus(reloc.offset));
        let value = target.0.wrapping_add_signed(reloc.addend);
        let Some((bytes, len)) = encode(reloc.rtype, value, place) else {
            return Err(self.no(format!(
                "{}+{:#x}: {} at {target} is out of reach of a relocation of type {} from {place}, \
                 or the type is not supported",
                section.name, reloc.offset, symbol.name, reloc.rtype
            )));
        };
        self.slice(section, reloc.offset, len)?
            .copy_from_slice(bytes.get(..len).unwrap_or_default());
        Ok(())
    }
}

/// The bytes of a relocation and how many of them count; `None` when `value` is out of reach of
/// `place`, or the type is none of those that kernel modules use.
pub(super) fn encode(rtype: u32, value: u64, place: Gva) -> Option<([u8; 8], usize)> {
    let relative = value.wrapping_sub(place.0);
    Some(match rtype {
        R_X86_64_64 => (value.to_le_bytes(), 8),
        R_X86_64_PC64 => (relative.to_le_bytes(), 8),
        R_X86_64_PC32 | R_X86_64_PLT32 => (signed32(relative)?, 4),
        R_X86_64_32S => (signed32(value)?, 4),
        R_X86_64_32 => (u32::try_from(value).ok().map(|_| value.to_le_bytes())?, 4),
        _ => return None,
    })
}

/// The low half of `value` if it is the sign-extension of it.
fn signed32(value: u64) -> Option<[u8; 8]> {
    i32::try_from(value.cast_signed())
        .ok()
        .map(|_| value.to_le_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::fixture::{vcpus, Fixture, KIND, TEXT};
    use crate::link::arena;
    use crate::patch::{Binding, Klp, Modinfo, SectionFlags, SymKind};

    const OUTSIDE: u64 = TEXT.0 + 0x2000;

    fn section(index: usize, role: Role, data: &[u8], relocs: Vec<Reloc>) -> Section {
        Section {
            index,
            name: format!("s{index}"),
            role,
            flags: SectionFlags {
                alloc: true,
                write: false,
                exec: false,
            },
            align: 16,
            size: data.len() as u64,
            data: data.to_vec(),
            relocs,
        }
    }

    fn symbol(index: usize, name: &str, section: SymSection, value: u64) -> Symbol {
        Symbol {
            index,
            name: name.into(),
            value,
            size: 0,
            section,
            binding: Binding::Global,
            kind: SymKind::Func,
            klp: None,
        }
    }

    fn reloc(offset: u64, rtype: u32, symbol: usize, addend: i64) -> Reloc {
        Reloc {
            offset,
            rtype,
            symbol,
            addend,
        }
    }

    /// Text of 32 bytes with one relocation, and data.
    fn linked(code: &[u8], relocs: Vec<Reloc>, returns: Option<Returns>) -> Result<Vec<u8>> {
        let mut fixture = Fixture::new();
        fixture.function(OUTSIDE, "outside", &[0xc3]);
        fixture.function(OUTSIDE + 16, "__fentry__", &[0xc3]);
        fixture.function(OUTSIDE + 32, "__x86_return_thunk", &[0xc3]);
        let memory = fixture.build();
        let kernel = Kernel::read(&memory, KIND, &vcpus()).unwrap();
        let payload = Payload {
            name: "p".into(),
            sha256: [0; 32],
            file_len: 0,
            modinfo: Modinfo::default(),
            sections: vec![
                section(0, Role::Null, &[], vec![]),
                section(1, Role::Text, code, relocs),
                section(2, Role::Data, &[7; 8], vec![]),
                section(3, Role::InitText, &[0xc3; 8], vec![]),
            ],
            symbols: vec![
                symbol(0, "", SymSection::Undefined, 0),
                symbol(1, "outside", SymSection::Undefined, 0),
                symbol(2, "own", SymSection::Section(2), 0),
                symbol(3, "init", SymSection::Section(3), 0),
                symbol(4, "__fentry__", SymSection::Undefined, 0),
                symbol(5, "__x86_return_thunk", SymSection::Undefined, 0),
                symbol(6, "nowhere", SymSection::Undefined, 0),
            ],
            klp: Klp {
                section: 2,
                offset: 0,
                size: None,
                replace: Some(false),
                states: false,
                object_stride: 0,
                func_stride: 0,
                objects: vec![],
            },
            build_id: None,
        };
        let layout = Layout::new(&payload, 100, (100, 100))?;
        let rights = [Rights::Text, Rights::RoData, Rights::Data, Rights::Data];
        assert_eq!(layout.rights, rights);
        link(&payload, &kernel, &layout, arena::BASE, returns).map(|image| image.bytes)
    }

    #[test]
    fn every_known_relocation_gets_the_value_the_abi_says() {
        let at = |offset: u64| arena::BASE.0 + offset;
        let own = arena::BASE.0 + 2 * PAGE_SIZE;
        for (rtype, symbol, addend, len, value) in [
            (R_X86_64_64, 1, 4, 8, OUTSIDE + 4),
            (R_X86_64_PC64, 1, 0, 8, OUTSIDE.wrapping_sub(at(8))),
            (
                R_X86_64_PC32,
                1,
                -4,
                4,
                OUTSIDE.wrapping_sub(4).wrapping_sub(at(8)),
            ),
            (R_X86_64_PLT32, 2, 0, 4, own.wrapping_sub(at(8))),
            (R_X86_64_32S, 2, 1, 4, own + 1),
        ] {
            let image = linked(&[0x90; 32], vec![reloc(8, rtype, symbol, addend)], None).unwrap();
            assert_eq!(
                image[8..8 + len],
                value.to_le_bytes()[..len],
                "type {rtype}"
            );
            assert_eq!(image[..8], [0x90; 8]);
            assert_eq!(image[8 + len..32], [0x90; 24][..24 - len]);
        }
    }

    #[test]
    fn what_cannot_be_relocated_is_refused_by_name() {
        for (r, why) in [
            (reloc(0, R_X86_64_32, 1, 0), "out of reach"),
            (reloc(0, 9, 1, 0), "type 9"),
            (reloc(0, R_X86_64_64, 3, 0), "never placed"),
            (reloc(0, R_X86_64_64, 6, 0), "no symbol nowhere"),
            (reloc(30, R_X86_64_64, 1, 0), "leaves it"),
            (reloc(0, R_X86_64_64, 77, 0), "symbol 77"),
        ] {
            let error = linked(&[0x90; 32], vec![r], None).unwrap_err();
            assert!(
                error.to_string().contains(why),
                "{error} does not say {why}"
            );
        }
    }

    #[test]
    fn calls_of_fentry_become_nops_and_returns_follow_the_kernel() {
        let mut code = [0x90; 32];
        code[0] = 0xe8;
        code[16] = 0xe9;
        let relocs = || {
            vec![
                reloc(1, R_X86_64_PLT32, 4, -4),
                reloc(17, R_X86_64_PLT32, 5, -4),
            ]
        };
        let image = linked(&code, relocs(), Some(Returns::Plain)).unwrap();
        assert_eq!(image[..5], FENTRY_NOP);
        assert_eq!(image[16..21], [0xc3, 0xcc, 0xcc, 0xcc, 0xcc]);
        let image = linked(&code, relocs(), None).unwrap();
        assert_eq!(image[16], 0xe9);
    }
}
