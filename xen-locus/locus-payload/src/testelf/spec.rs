//! Whole livepatch modules for tests.

use super::{TestElf, ALLOC, CODE, R_32S, R_64, R_PC32, R_PLT32, VARS};

/// Functions: old name and `old_sympos`.
pub type Funcs<'a> = Vec<(&'a str, u64)>;

/// Size of a `struct module` in bytes, as the guest of `locus_kernel::fixture_world` has it.
pub const MODULE_SIZE: usize = 448;

/// Offset of the member `init` there.
pub const INIT: u64 = 392;

/// A livepatch module to build; the default is like that of Linux 6.1 with one function.
pub struct Spec {
    /// Objects: name and functions (old name and sympos).
    pub objects: Vec<(Option<&'static str>, Funcs<'static>)>,
    /// `sizeof(struct klp_object)`.
    pub object_stride: usize,
    /// `sizeof(struct klp_func)`.
    pub func_stride: usize,
    /// Sections that hold the patch, the objects and the functions.
    pub homes: [&'static str; 3],
    /// Pointers refer to the symbol of the variable, not to that of its section.
    pub named: bool,
    /// Contents of `.modinfo`.
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

/// Where the parts of a built [`Spec`] are: section numbers, and offsets in bytes.
#[derive(Clone, Copy)]
pub struct SpecPlaces {
    pub text: usize,
    pub strings: usize,
    pub this_module: usize,
    /// Section and offset of the `struct klp_patch`.
    pub patch: (usize, u64),
    /// Section and offset of the array of objects.
    pub objs: (usize, u64),
    /// Section and offset of the functions of the last object.
    pub funcs: (usize, u64),
    /// Section of `module_init`.
    pub init: usize,
}

/// The `module_init` that enables a patch: `call __fentry__; mov $patch,%rdi; jmp klp_enable_patch`. Relocations
/// are at 1, 8 and 13.
pub const ENABLE: [u8; 17] = [
    0xe8, 0, 0, 0, 0, 0x48, 0xc7, 0xc7, 0, 0, 0, 0, 0xe9, 0, 0, 0, 0,
];

/// A `module_init` of kpatch, in short: `call __kmalloc; mov .kpatch.funcs(%rip),%rdx; mov %rdx,(%rax);
/// movb $1,0x18(%rax); mov %rax,%rdi; jmp klp_enable_patch`. Relocations are at 1, 8 and 23.
pub const KPATCH_HOOK: [u8; 27] = [
    0xe8, 0, 0, 0, 0, 0x48, 0x8b, 0x15, 0, 0, 0, 0, 0x48, 0x89, 0x10, 0xc6, 0x40, 0x18, 0x01, 0x48,
    0x89, 0xc7, 0xe9, 0, 0, 0, 0,
];

impl Spec {
    /// The file.
    pub fn bytes(&self) -> Vec<u8> {
        self.elf().0.build()
    }

    /// The file before it is built, so that a test can change it, and its parts.
    pub fn elf(&self) -> (TestElf, SpecPlaces) {
        let mut elf = TestElf::new();
        elf.note(
            ".note.gnu.build-id",
            b"\x04\0\0\0\x04\0\0\0\x03\0\0\0GNU\0\xaa\xbb\xcc\xdd",
        );
        // A call whose target a relocation fills in.
        let mut head = [0xc3; 16];
        head[1..5].fill(0);
        let text = elf.section(".text", CODE, &head);
        let strings = elf.section(".rodata.str1.1", ALLOC | 0x30, b"");
        elf.section(".modinfo", ALLOC, self.modinfo);
        let this_module = elf.section(".gnu.linkonce.this_module", VARS, &[0; MODULE_SIZE]);
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
            MODULE_SIZE as u64,
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
        let init = elf.section(".init.text", CODE, &ENABLE);
        let (code, data) = (u16::try_from(init).unwrap(), elf.section_symbol(homes[0]));
        let entry = elf.symbol("init_module", code, 0, ENABLE.len() as u64, 2);
        elf.reloc(this_module, INIT, R_64, entry, 0);
        let enable = elf.undefined("klp_enable_patch");
        elf.reloc(init, 1, R_PLT32, fentry, -4);
        elf.reloc(init, 8, R_32S, data, i64::try_from(patch).unwrap());
        elf.reloc(init, 13, R_PLT32, enable, -4);
        let patch = (homes[0], patch);
        (
            elf,
            SpecPlaces {
                text,
                strings,
                this_module,
                patch,
                objs: (homes[1], objs),
                funcs: last,
                init,
            },
        )
    }

    /// A module in the shape that kpatch-build makes: tables in place of the structures.
    pub fn kpatch() -> TestElf {
        let mut elf = TestElf::new();
        let text = elf.section(".text", CODE, &[0xc3; 16]);
        elf.section(".modinfo", ALLOC, Spec::default().modinfo);
        let this_module = elf.section(".gnu.linkonce.this_module", VARS, &[0; MODULE_SIZE]);
        let init = elf.section(".init.text", CODE, &KPATCH_HOOK);
        let size = KPATCH_HOOK.len() as u64;
        let entry = elf.symbol("init_module", u16::try_from(init).unwrap(), 0, size, 2);
        elf.reloc(this_module, INIT, R_64, entry, 0);
        let alloc = elf.undefined("__kmalloc");
        elf.reloc(init, 1, R_PLT32, alloc, -4);
        let enable = elf.undefined("klp_enable_patch");
        elf.reloc(init, 23, R_PLT32, enable, -4);
        let strings = elf.section(".kpatch.strings", ALLOC, b"");
        let funcs = elf.section(".kpatch.funcs", ALLOC, b"");
        let names = elf.section_symbol(strings);
        let table = elf.section_symbol(funcs);
        elf.reloc(init, 8, R_PC32, table, -4);
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

    /// Adds the relocation that makes a field point at a place, through the symbol of the place or of its
    /// section.
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
