//! Small ELF files for tests, in the shape that kbuild gives to livepatch modules.
//!
//! - `mod.rs`: [`TestElf`], any relocatable file;
//! - `spec.rs`: [`Spec`], whole livepatch modules made with it.
//!
//! The writer is by hand, because tests need files that are wrong: a bad machine, a section index
//! without a section, overlapping relocations, a size without contents. `object::write` has no way to
//! make most of them, and would be a further feature to build for tests only.

#![allow(clippy::unwrap_used, clippy::indexing_slicing)] // part of tests only
#![allow(missing_docs, missing_debug_implementations)] // part of tests only

mod spec;

use object::elf;

pub use spec::{Funcs, Spec, SpecPlaces, ENABLE, INIT, KPATCH_HOOK, MODULE_SIZE};

pub const R_64: u32 = elf::R_X86_64_64.0;
pub const R_PC32: u32 = elf::R_X86_64_PC32.0;
pub const R_PLT32: u32 = elf::R_X86_64_PLT32.0;
pub const R_32S: u32 = elf::R_X86_64_32S.0;
/// Flags of constants.
pub const ALLOC: u64 = elf::SHF_ALLOC.0;
/// Flags of variables.
pub const VARS: u64 = ALLOC | elf::SHF_WRITE.0;
/// Flags of code.
pub const CODE: u64 = ALLOC | elf::SHF_EXECINSTR.0;
pub const SHN_LIVEPATCH: u16 = 0xff20;
pub const SHF_RELA_LIVEPATCH: u64 = 0x0010_0000;

/// An `Elf64_Rela`.
#[derive(Clone, Copy)]
struct Rel {
    offset: u64,
    /// Symbol and type.
    info: u64,
    addend: i64,
}

struct TestSection {
    name: String,
    kind: elf::SectionType,
    flags: u64,
    data: Vec<u8>,
    nobits: u64,
    relocs: Vec<Rel>,
}

struct TestSymbol {
    name: String,
    shndx: u16,
    value: u64,
    size: u64,
    kind: u8,
}

/// An ELF file under construction. Sections and symbols are numbered from 1.
pub struct TestElf {
    /// `e_machine`.
    pub machine: u16,
    /// `e_type`.
    pub kind: u16,
    sections: Vec<TestSection>,
    symbols: Vec<TestSymbol>,
    /// Sections of livepatch relocations: name, target, relocations.
    klp_relas: Vec<(String, usize, Vec<Rel>)>,
}

impl Default for TestElf {
    fn default() -> Self {
        Self::new()
    }
}

impl TestElf {
    #[allow(clippy::new_without_default)] // part of tests only
    pub fn new() -> Self {
        Self {
            machine: elf::EM_X86_64.0,
            kind: elf::ET_REL.0,
            sections: Vec::new(),
            symbols: Vec::new(),
            klp_relas: Vec::new(),
        }
    }

    fn push(&mut self, name: &str, kind: elf::SectionType, flags: u64, data: &[u8]) -> usize {
        self.sections.push(TestSection {
            name: name.into(),
            kind,
            flags,
            data: data.to_vec(),
            nobits: 0,
            relocs: Vec::new(),
        });
        self.sections.len()
    }

    /// Adds a section of type `SHT_PROGBITS`; returns its number.
    pub fn section(&mut self, name: &str, flags: u64, data: &[u8]) -> usize {
        self.push(name, elf::SHT_PROGBITS, flags, data)
    }

    /// Adds a section of any type, an `SHT_*` value; returns its number.
    pub fn typed(&mut self, name: &str, kind: u32, flags: u64, data: &[u8]) -> usize {
        self.push(name, elf::SectionType(kind), flags, data)
    }

    pub fn note(&mut self, name: &str, data: &[u8]) -> usize {
        self.push(name, elf::SHT_NOTE, ALLOC, data)
    }

    pub fn bss(&mut self, size: u64) -> usize {
        let index = self.push(".bss", elf::SHT_NOBITS, VARS, &[]);
        self.sections[index - 1].nobits = size;
        index
    }

    /// The number of a section, which is added if it is new.
    pub fn find(&mut self, name: &str, flags: u64) -> usize {
        match self.sections.iter().position(|s| s.name == name) {
            Some(at) => at + 1,
            None => self.section(name, flags, &[]),
        }
    }

    pub fn data(&mut self, section: usize) -> &mut Vec<u8> {
        &mut self.sections[section - 1].data
    }

    /// Appends `len` zeroes at the next multiple of `align`; returns their offset.
    pub fn append(&mut self, section: usize, align: usize, len: usize) -> u64 {
        let data = self.data(section);
        let at = data.len().next_multiple_of(align);
        data.resize(at + len, 0);
        at as u64
    }

    pub fn string(&mut self, section: usize, text: &str) -> u64 {
        let at = self.append(section, 1, text.len() + 1);
        let from = usize::try_from(at).unwrap();
        self.data(section)[from..from + text.len()].copy_from_slice(text.as_bytes());
        at
    }

    pub fn put_u64(&mut self, section: usize, at: u64, value: u64) {
        let at = usize::try_from(at).unwrap();
        self.data(section)[at..at + 8].copy_from_slice(&value.to_le_bytes());
    }

    /// Adds a symbol; `kind` is an `STT_*` value.
    pub fn symbol(&mut self, name: &str, shndx: u16, value: u64, size: u64, kind: u8) -> usize {
        self.symbols.push(TestSymbol {
            name: name.into(),
            shndx,
            value,
            size,
            kind,
        });
        self.symbols.len()
    }

    pub fn undefined(&mut self, name: &str) -> usize {
        self.symbol(name, 0, 0, 0, 0)
    }

    /// The symbol that stands for a section, which is added if it is new.
    pub fn section_symbol(&mut self, section: usize) -> usize {
        let shndx = u16::try_from(section).unwrap();
        match self
            .symbols
            .iter()
            .position(|s| s.kind == 3 && s.shndx == shndx)
        {
            Some(at) => at + 1,
            None => self.symbol("", shndx, 0, 0, 3),
        }
    }

    pub fn resize_symbol(&mut self, name: &str, size: u64) {
        let named = self.symbols.iter_mut().filter(|s| s.name == name);
        named.for_each(|s| s.size = size);
    }

    pub fn rename(&mut self, from: &str, to: &str) {
        let named = self.symbols.iter_mut().filter(|s| s.name == from);
        named.for_each(|s| s.name = to.into());
    }

    pub fn drop_sizes(&mut self) {
        self.symbols.iter_mut().for_each(|s| s.size = 0);
    }

    pub fn reloc(&mut self, section: usize, offset: u64, rtype: u32, symbol: usize, addend: i64) {
        self.sections[section - 1]
            .relocs
            .push(rel(offset, rtype, symbol, addend));
    }

    pub fn drop_reloc(&mut self, section: usize, offset: u64) {
        self.sections[section - 1]
            .relocs
            .retain(|r| r.offset != offset);
    }

    /// Puts bytes in front of those of a section; relocations of it stay where they are meant to be.
    pub fn prepend(&mut self, section: usize, bytes: &[u8]) {
        let section = &mut self.sections[section - 1];
        section.data.splice(..0, bytes.iter().copied());
        let relocs = section.relocs.iter_mut();
        relocs.for_each(|r| r.offset += bytes.len() as u64);
    }

    /// Gives a section other contents, without relocations.
    pub fn replace(&mut self, section: usize, bytes: &[u8]) {
        let section = &mut self.sections[section - 1];
        section.data = bytes.to_vec();
        section.relocs.clear();
    }

    pub fn klp_rela(&mut self, name: &str, target: usize, relocs: &[(u64, u32, usize, i64)]) {
        let relocs = relocs
            .iter()
            .map(|(o, t, s, a)| rel(*o, *t, *s, *a))
            .collect();
        self.klp_relas.push((name.into(), target, relocs));
    }

    /// The file: header, contents, section headers.
    pub fn build(self) -> Vec<u8> {
        let mut file = FileLayout::default();
        for section in &self.sections {
            let size = section.nobits.max(section.data.len() as u64);
            let head = [section.kind.0.into(), section.flags, size, 0, 0, 16, 0];
            file.section(&section.name, head, &section.data);
        }
        let symtab = 1 + self.sections.len() + self.klp_relas.len();
        let symtab = symtab
            + self
                .sections
                .iter()
                .filter(|s| !s.relocs.is_empty())
                .count();
        let mut rela = |name: &str, flags, target: usize, relocs: &[Rel]| {
            let bytes: Vec<u8> = relocs
                .iter()
                .flat_map(|r| [r.offset, r.info, r.addend.cast_unsigned()])
                .flat_map(u64::to_le_bytes)
                .collect();
            let (size, link) = (bytes.len() as u64, symtab as u64);
            let head = [
                elf::SHT_RELA.0.into(),
                flags,
                size,
                link,
                target as u64,
                8,
                24,
            ];
            file.section(name, head, &bytes);
        };
        for (at, section) in self.sections.iter().enumerate() {
            if !section.relocs.is_empty() {
                let name = format!(".rela{}", section.name);
                rela(&name, 0, at + 1, &section.relocs);
            }
        }
        for (name, target, relocs) in &self.klp_relas {
            rela(name, ALLOC | SHF_RELA_LIVEPATCH, *target, relocs);
        }
        let (mut symbols, mut strings) = (vec![0; 24], vec![0]);
        for symbol in &self.symbols {
            let name = if symbol.name.is_empty() {
                0
            } else {
                u32::try_from(strings.len()).unwrap()
            };
            symbols.extend(name.to_le_bytes());
            symbols.extend([symbol.kind | 0x10, 0]); // all of them global
            symbols.extend(symbol.shndx.to_le_bytes());
            symbols.extend(symbol.value.to_le_bytes());
            symbols.extend(symbol.size.to_le_bytes());
            strings.extend(symbol.name.as_bytes());
            strings.push(0);
        }
        let (size, link) = (symbols.len() as u64, symtab as u64 + 1);
        let head = [elf::SHT_SYMTAB.0.into(), 0, size, link, 1, 8, 24];
        file.section(".symtab", head, &symbols);
        let head = [
            elf::SHT_STRTAB.0.into(),
            0,
            strings.len() as u64,
            0,
            0,
            1,
            0,
        ];
        file.section(".strtab", head, &strings);
        file.end(self.kind, self.machine)
    }
}

/// The file in the making: contents, names and headers of its sections.
#[derive(Default)]
struct FileLayout {
    contents: Vec<u8>,
    names: Vec<u8>,
    headers: Vec<u8>,
    count: u16,
}

/// Size of the ELF header, in bytes.
const EHDR: usize = 64;

impl FileLayout {
    /// Adds a section; `head` is its type, flags, size, link, info, alignment and entry size.
    fn section(&mut self, name: &str, head: [u64; 7], contents: &[u8]) {
        let [kind, flags, size, link, info, align, entry] = head;
        if self.headers.is_empty() {
            self.headers = vec![0; 64];
            self.names.push(0);
            self.count = 1;
        }
        self.contents
            .resize(self.contents.len().next_multiple_of(32), 0);
        let word = |value: u64| u32::try_from(value).unwrap().to_le_bytes();
        let offset = (EHDR + self.contents.len()) as u64;
        self.headers.extend(word(self.names.len() as u64));
        self.headers.extend(word(kind));
        for wide in [flags, 0, offset, size] {
            self.headers.extend(wide.to_le_bytes());
        }
        self.headers.extend(word(link));
        self.headers.extend(word(info));
        self.headers.extend(align.to_le_bytes());
        self.headers.extend(entry.to_le_bytes());
        self.names.extend(name.as_bytes());
        self.names.push(0);
        self.contents.extend(contents);
        self.count += 1;
    }

    fn end(mut self, kind: u16, machine: u16) -> Vec<u8> {
        let mut names = self.names.clone();
        names.extend(b".shstrtab\0");
        let head = [elf::SHT_STRTAB.0.into(), 0, names.len() as u64, 0, 0, 1, 0];
        self.section(".shstrtab", head, &names);
        self.contents
            .resize(self.contents.len().next_multiple_of(8), 0);
        let mut out = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
        out.extend(kind.to_le_bytes());
        out.extend(machine.to_le_bytes());
        out.extend(1u32.to_le_bytes());
        let table = (EHDR + self.contents.len()) as u64;
        for wide in [0, 0, table] {
            out.extend(wide.to_le_bytes());
        }
        out.extend(0u32.to_le_bytes());
        for half in [64, 0, 0, 64, self.count, self.count - 1] {
            out.extend(half.to_le_bytes());
        }
        out.extend(self.contents);
        out.extend(self.headers);
        out
    }
}

fn rel(offset: u64, rtype: u32, symbol: usize, addend: i64) -> Rel {
    Rel {
        offset,
        info: (symbol as u64) << 32 | u64::from(rtype),
        addend,
    }
}
