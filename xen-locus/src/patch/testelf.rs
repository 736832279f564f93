//! Small ELF files for tests, in the shape that kbuild gives to livepatch modules.

use object::elf;
use object::write::elf::{FileHeader, Rel, SectionHeader, Sym, Writer};
use object::Endianness;

pub(super) const R_64: u32 = 1;
pub(super) const R_PC32: u32 = 2;
pub(super) const R_PLT32: u32 = 4;
pub(super) const R_32S: u32 = 11;
pub(super) const ALLOC: u64 = 2;
pub(super) const VARS: u64 = 3;
pub(super) const CODE: u64 = 6;
pub(super) const SHN_LIVEPATCH: u16 = 0xff20;
const SHF_RELA_LIVEPATCH: u64 = 0x0010_0000;

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
pub(super) struct TestElf {
    pub machine: u16,
    pub kind: u16,
    sections: Vec<TestSection>,
    symbols: Vec<TestSymbol>,
    klp_relas: Vec<(String, usize, Vec<Rel>)>,
}

impl TestElf {
    pub fn new() -> Self {
        Self {
            machine: 62,
            kind: 1,
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

    pub fn section(&mut self, name: &str, flags: u64, data: &[u8]) -> usize {
        self.push(name, elf::SHT_PROGBITS, flags, data)
    }

    pub fn note(&mut self, name: &str, data: &[u8]) -> usize {
        self.push(name, elf::SHT_NOTE, ALLOC, data)
    }

    pub fn bss(&mut self, size: u64) -> usize {
        let index = self.push(".bss", elf::SHT_NOBITS, VARS, &[]);
        self.sections[index - 1].nobits = size;
        index
    }

    pub fn find(&mut self, name: &str, flags: u64) -> usize {
        match self.sections.iter().position(|s| s.name == name) {
            Some(at) => at + 1,
            None => self.section(name, flags, &[]),
        }
    }

    pub fn data(&mut self, section: usize) -> &mut Vec<u8> {
        &mut self.sections[section - 1].data
    }

    /// Appends zeroes at the next multiple of `align` and tells where.
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

    /// The symbol of a section.
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
            .retain(|r| r.r_offset != offset);
    }

    pub fn klp_rela(&mut self, name: &str, target: usize, relocs: &[(u64, u32, usize, i64)]) {
        let relocs = relocs
            .iter()
            .map(|(o, t, s, a)| rel(*o, *t, *s, *a))
            .collect();
        self.klp_relas.push((name.into(), target, relocs));
    }

    pub fn build(mut self) -> Vec<u8> {
        let mut out = Vec::new();
        let mut relas: Vec<(String, u64, usize, Vec<Rel>)> = Vec::new();
        for (at, section) in self.sections.iter_mut().enumerate() {
            if !section.relocs.is_empty() {
                let name = format!(".rela{}", section.name);
                relas.push((name, 0, at + 1, std::mem::take(&mut section.relocs)));
            }
        }
        for (name, target, relocs) in self.klp_relas {
            relas.push((name, ALLOC | SHF_RELA_LIVEPATCH, target, relocs));
        }
        let mut w = Writer::new(Endianness::Little, true, &mut out);
        w.reserve_file_header();
        let names: Vec<_> = self
            .sections
            .iter()
            .map(|s| w.add_section_name(s.name.as_bytes()))
            .collect();
        let rela_names: Vec<_> = relas
            .iter()
            .map(|r| w.add_section_name(r.0.as_bytes()))
            .collect();
        for _ in 0..names.len() + rela_names.len() {
            w.reserve_section_index();
        }
        let symtab = w.reserve_symtab_section_index();
        w.reserve_strtab_section_index();
        w.reserve_shstrtab_section_index();
        let strings: Vec<_> = self
            .symbols
            .iter()
            .map(|s| w.add_string(s.name.as_bytes()))
            .collect();
        for _ in &self.symbols {
            w.reserve_symbol_index(None);
        }
        let offsets: Vec<u64> = self
            .sections
            .iter()
            .map(|s| w.reserve(s.data.len() as u64, 32))
            .collect();
        let rela_offsets: Vec<u64> = relas
            .iter()
            .map(|r| w.reserve_relocations(r.3.len(), true))
            .collect();
        w.reserve_symtab();
        w.reserve_strtab().unwrap();
        w.reserve_shstrtab().unwrap();
        w.reserve_section_headers();

        w.write_file_header(&FileHeader {
            os_abi: elf::ELFOSABI_NONE,
            abi_version: 0,
            e_type: elf::FileType(self.kind),
            e_machine: elf::Machine(self.machine),
            e_entry: 0,
            e_flags: elf::FileFlags(0),
        })
        .unwrap();
        for (section, offset) in self.sections.iter().zip(&offsets) {
            w.pad_until(*offset);
            w.write(&section.data);
        }
        for (relas, offset) in relas.iter().zip(&rela_offsets) {
            w.pad_until(*offset);
            relas.3.iter().for_each(|r| w.write_relocation(true, r));
        }
        w.write_null_symbol();
        for (symbol, name) in self.symbols.iter().zip(&strings) {
            w.write_symbol(&Sym {
                section: None,
                st_name: w.string_offset(Some(*name)),
                st_info: elf::SymbolInfo(symbol.kind | 0x10),
                st_other: elf::SymbolOther(0),
                st_shndx: elf::SymbolSection(symbol.shndx),
                st_value: symbol.value,
                st_size: symbol.size,
            });
        }
        w.write_strtab();
        w.write_shstrtab();
        w.write_null_section_header();
        for ((section, name), offset) in self.sections.iter().zip(&names).zip(&offsets) {
            w.write_section_header(&SectionHeader {
                sh_name: w.section_name_offset(Some(*name)),
                sh_type: section.kind,
                sh_flags: elf::SectionFlags(section.flags),
                sh_addr: 0,
                sh_offset: *offset,
                sh_size: section.nobits.max(section.data.len() as u64),
                sh_link: 0,
                sh_info: 0,
                sh_addralign: 16,
                sh_entsize: 0,
            });
        }
        for ((rela, name), offset) in relas.iter().zip(&rela_names).zip(&rela_offsets) {
            w.write_section_header(&SectionHeader {
                sh_name: w.section_name_offset(Some(*name)),
                sh_type: elf::SHT_RELA,
                sh_flags: elf::SectionFlags(rela.1),
                sh_addr: 0,
                sh_offset: *offset,
                sh_size: rela.3.len() as u64 * 24,
                sh_link: symtab.0,
                sh_info: u32::try_from(rela.2).unwrap(),
                sh_addralign: 8,
                sh_entsize: 24,
            });
        }
        w.write_symtab_section_header(1);
        w.write_strtab_section_header();
        w.write_shstrtab_section_header();
        out
    }
}

fn rel(offset: u64, rtype: u32, symbol: usize, addend: i64) -> Rel {
    Rel {
        r_offset: offset,
        r_sym: u32::try_from(symbol).unwrap(),
        r_type: elf::RelocationType(rtype),
        r_addend: addend,
    }
}

/// Old names and positions of functions.
pub(super) type Funcs<'a> = Vec<(&'a str, u64)>;

/// A livepatch module to build; the default is like that of Linux 6.1 with one function.
pub(super) struct Spec {
    /// Objects: name and functions (old name and sympos).
    pub objects: Vec<(Option<&'static str>, Funcs<'static>)>,
    pub object_stride: usize,
    pub func_stride: usize,
    /// Sections of the patch, the objects and the functions.
    pub homes: [&'static str; 3],
    /// Pointers name the variable itself, not its section.
    pub named: bool,
    pub modinfo: &'static [u8],
}

impl Default for Spec {
    fn default() -> Self {
        Self {
            objects: vec![(None, vec![("cmdline_proc_show", 0)])],
            object_stride: 168,
            func_stride: 152,
            homes: [".data"; 3],
            named: false,
            modinfo: b"livepatch=Y\0license=GPL\0description=A test\0depends=\0\
                name=locus_test\0vermagic=6.1.0-56-amd64 SMP preempt \0",
        }
    }
}

/// Where the parts of a built [`Spec`] are.
#[derive(Clone, Copy)]
pub(super) struct Places {
    pub text: usize,
    pub strings: usize,
    pub this_module: usize,
    /// Section and offset of the `struct klp_patch`.
    pub patch: (usize, u64),
    pub objs: (usize, u64),
    /// Those of the last object.
    pub funcs: (usize, u64),
}

impl Spec {
    pub fn bytes(&self) -> Vec<u8> {
        self.elf().0.build()
    }

    pub fn elf(&self) -> (TestElf, Places) {
        let mut elf = TestElf::new();
        elf.note(
            ".note.gnu.build-id",
            b"\x04\0\0\0\x04\0\0\0\x03\0\0\0GNU\0\xaa\xbb\xcc\xdd",
        );
        let text = elf.section(".text", CODE, &[0xc3; 16]);
        let strings = elf.section(".rodata.str1.1", ALLOC | 0x30, b"");
        elf.section(".modinfo", ALLOC, self.modinfo);
        let this_module = elf.section(".gnu.linkonce.this_module", VARS, &[0; 896]);
        let homes = self.homes.map(|home| elf.find(home, VARS));
        elf.bss(64);
        elf.section(".return_sites", ALLOC, &[0; 4]);
        elf.section(".debug_info", 0, &[0; 32]);
        let fentry = elf.undefined("__fentry__");
        elf.reloc(text, 1, R_PLT32, fentry, -4);
        let text_symbol = elf.section_symbol(text);
        let sites = elf.find(".return_sites", ALLOC);
        elf.reloc(sites, 0, R_PC32, text_symbol, 4);

        let patch = self.variable(&mut elf, homes[0], "patch", 200);
        let count = self.objects.len() + 1;
        let objs = self.variable(&mut elf, homes[1], "objs", self.object_stride * count);
        let module = elf.symbol(
            "__this_module",
            u16::try_from(this_module).unwrap(),
            0,
            896,
            1,
        );
        elf.reloc(homes[0], patch, R_64, module, 0);
        self.point(&mut elf, homes[0], patch + 8, "objs", homes[1], objs);
        let mut last = (homes[2], 0);
        for (index, (name, funcs)) in self.objects.iter().enumerate() {
            let object = objs + (index * self.object_stride) as u64;
            if let Some(name) = name {
                let at = elf.string(strings, name);
                self.point(&mut elf, homes[1], object, "", strings, at);
            }
            let label = format!("funcs{index}");
            let size = self.func_stride * (funcs.len() + 1);
            let array = self.variable(&mut elf, homes[2], &label, size);
            last.1 = array;
            self.point(&mut elf, homes[1], object + 8, &label, homes[2], array);
            for (number, (old, sympos)) in funcs.iter().enumerate() {
                let func = array + (number * self.func_stride) as u64;
                let at = elf.string(strings, old);
                self.point(&mut elf, homes[2], func, "", strings, at);
                let code = elf.append(text, 16, 16);
                let new = format!("new_{index}_{old}");
                elf.symbol(&new, u16::try_from(text).unwrap(), code, 11, 2);
                self.point(&mut elf, homes[2], func + 8, &new, text, code);
                elf.put_u64(homes[2], func + 16, *sympos);
            }
        }
        let patch = (homes[0], patch);
        (
            elf,
            Places {
                text,
                strings,
                this_module,
                patch,
                objs: (homes[1], objs),
                funcs: last,
            },
        )
    }

    fn variable(&self, elf: &mut TestElf, home: usize, name: &str, size: usize) -> u64 {
        let at = elf.append(home, 32, size);
        elf.symbol(name, u16::try_from(home).unwrap(), at, size as u64, 1);
        at
    }

    /// Makes a field point at a place, through the place's own symbol or its section's.
    fn point(
        &self,
        elf: &mut TestElf,
        home: usize,
        field: u64,
        label: &str,
        to: usize,
        offset: u64,
    ) {
        let named = elf
            .symbols
            .iter()
            .position(|s| self.named && s.name == label && s.size > 0);
        match named {
            Some(at) => elf.reloc(home, field, R_64, at + 1, 0),
            None => {
                let symbol = elf.section_symbol(to);
                elf.reloc(home, field, R_64, symbol, i64::try_from(offset).unwrap());
            }
        }
    }
}
