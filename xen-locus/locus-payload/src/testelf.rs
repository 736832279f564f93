//! Small ELF files for tests, in the shape that kbuild gives to livepatch modules.

#![allow(clippy::unwrap_used, clippy::indexing_slicing)] // part of tests only
#![allow(missing_docs, missing_debug_implementations)] // part of tests only

pub const R_64: u32 = 1;
pub const R_PC32: u32 = 2;
pub const R_PLT32: u32 = 4;
pub const R_32S: u32 = 11;
pub const ALLOC: u64 = 2;
pub const VARS: u64 = 3;
pub const CODE: u64 = 6;
pub const SHN_LIVEPATCH: u16 = 0xff20;
const SHF_RELA_LIVEPATCH: u64 = 0x0010_0000;
const SHT_PROGBITS: u32 = 1;
const SHT_SYMTAB: u32 = 2;
const SHT_STRTAB: u32 = 3;
const SHT_RELA: u32 = 4;
const SHT_NOTE: u32 = 7;
const SHT_NOBITS: u32 = 8;

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
    kind: u32,
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
    pub machine: u16,
    pub kind: u16,
    sections: Vec<TestSection>,
    symbols: Vec<TestSymbol>,
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
            machine: 62,
            kind: 1,
            sections: Vec::new(),
            symbols: Vec::new(),
            klp_relas: Vec::new(),
        }
    }

    fn push(&mut self, name: &str, kind: u32, flags: u64, data: &[u8]) -> usize {
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
        self.push(name, SHT_PROGBITS, flags, data)
    }

    pub fn note(&mut self, name: &str, data: &[u8]) -> usize {
        self.push(name, SHT_NOTE, ALLOC, data)
    }

    pub fn bss(&mut self, size: u64) -> usize {
        let index = self.push(".bss", SHT_NOBITS, VARS, &[]);
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

    pub fn resize_symbol(&mut self, name: &str, size: u64) {
        let named = self.symbols.iter_mut().filter(|s| s.name == name);
        named.for_each(|s| s.size = size);
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

    pub fn klp_rela(&mut self, name: &str, target: usize, relocs: &[(u64, u32, usize, i64)]) {
        let relocs = relocs
            .iter()
            .map(|(o, t, s, a)| rel(*o, *t, *s, *a))
            .collect();
        self.klp_relas.push((name.into(), target, relocs));
    }

    /// The file: header, contents, section headers.
    pub fn build(self) -> Vec<u8> {
        let mut file = File::default();
        for section in &self.sections {
            let size = section.nobits.max(section.data.len() as u64);
            let head = [section.kind.into(), section.flags, size, 0, 0, 16, 0];
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
            let head = [SHT_RELA.into(), flags, size, link, target as u64, 8, 24];
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
        let head = [SHT_SYMTAB.into(), 0, size, link, 1, 8, 24];
        file.section(".symtab", head, &symbols);
        let head = [SHT_STRTAB.into(), 0, strings.len() as u64, 0, 0, 1, 0];
        file.section(".strtab", head, &strings);
        file.end(self.kind, self.machine)
    }
}

/// Contents and section headers, as they are laid out.
#[derive(Default)]
struct File {
    contents: Vec<u8>,
    names: Vec<u8>,
    headers: Vec<u8>,
    count: u16,
}

/// Size of the ELF header.
const EHDR: usize = 64;

impl File {
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
        let head = [SHT_STRTAB.into(), 0, names.len() as u64, 0, 0, 1, 0];
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

/// Old names and positions of functions.
pub type Funcs<'a> = Vec<(&'a str, u64)>;

/// A livepatch module to build; the default is like that of Linux 6.1 with one function.
pub struct Spec {
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
pub struct Places {
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
        // A call, where its target is still to be filled in.
        let mut head = [0xc3; 16];
        head[1..5].fill(0);
        let text = elf.section(".text", CODE, &head);
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

    /// A module in the shape that kpatch-build gives to them: tables in place of the structures.
    pub fn kpatch() -> TestElf {
        let mut elf = TestElf::new();
        let text = elf.section(".text", CODE, &[0xc3; 16]);
        elf.section(".modinfo", ALLOC, Spec::default().modinfo);
        elf.section(".gnu.linkonce.this_module", VARS, &[0; 896]);
        // movb $1, 0x18(%rax); ret
        let init = elf.section(".init.text", CODE, &[0xc6, 0x40, 0x18, 0x01, 0xc3]);
        elf.symbol("init_module", u16::try_from(init).unwrap(), 0, 5, 2);
        let strings = elf.section(".kpatch.strings", ALLOC, b"");
        let funcs = elf.section(".kpatch.funcs", ALLOC, b"");
        let names = elf.section_symbol(strings);
        for (object, old, sympos) in [
            ("vmlinux", "version_proc_show", 0),
            ("vmlinux", "show_it", 2),
            ("ext4", "ext4_read", 0),
        ] {
            let at = elf.append(funcs, 8, 56);
            let code = elf.append(text, 16, 16);
            let new = format!("new_{old}");
            let new = elf.symbol(&new, u16::try_from(text).unwrap(), code, 11, 2);
            elf.reloc(funcs, at, R_64, new, 0);
            elf.put_u64(funcs, at + 8, 11);
            elf.put_u64(funcs, at + 32, sympos);
            for (field, name) in [(40, old), (48, object)] {
                let name = elf.string(strings, name);
                elf.reloc(funcs, at + field, R_64, names, i64::try_from(name).unwrap());
            }
        }
        for table in ["pre_patch", "post_patch", "pre_unpatch", "post_unpatch"] {
            elf.section(&format!(".kpatch.callbacks.{table}"), VARS, &[0; 8]);
        }
        elf.section(".kpatch.force", VARS, &[0; 8]);
        elf
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
