//! A small guest with modules, for tests.

#![allow(clippy::cast_possible_truncation)] // small addresses
#![allow(clippy::unwrap_used, clippy::indexing_slicing)] // part of tests only
#![allow(missing_debug_implementations)]

use locus_guest::addr::Gva;
use locus_guest::mock::MockMemory;

use crate::btf::blob::Blob;
use crate::btf::TypeKind;
use crate::fixture::Fixture;

/// Guest virtual address of the modules and all that belongs to them.
pub const DATA: u64 = 0xffff_ffff_c000_0000;
/// Distance from one module to the next, in bytes.
pub const STEP: u64 = 0x1000;
/// Length of the modules and all that belongs to them, in bytes.
pub const LEN: usize = 3 * STEP as usize;

/// How a kernel describes the memory of modules and their notes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Age {
    /// `core_layout`, counted notes, a build-id member.
    Old,
    /// `mem[]`, a group of notes.
    New,
}

/// The guest's types.
#[must_use]
pub fn blob(age: Age) -> Blob {
    let mut b = Blob::new();
    let int = b.int("int", 4);
    let long = b.int("long", 8);
    let byte = b.int("char", 1);
    let name = b.array(byte, 16);
    let id = b.array(byte, 20);
    let big_name = b.array(byte, 64);
    b.composite(
        TypeKind::Struct,
        "kallsym_iter",
        64,
        &[("name", big_name, 0)],
    );
    let two = b.composite(TypeKind::Struct, "list_head", 16, &[("next", long, 0)]);
    let states = [
        ("MODULE_STATE_LIVE", 0),
        ("MODULE_STATE_COMING", 1),
        ("MODULE_STATE_GOING", 2),
        ("MODULE_STATE_UNFORMED", 3),
    ];
    b.enumeration("module_state", &states);
    b.enumeration("mod_mem_type", &[("MOD_TEXT", 0), ("MOD_DATA", 1)]);
    module_type(&mut b, age, [int, long, name, id, two]);
    relatives(&mut b, [int, long, two]);
    taints_and_notes(&mut b, age, [int, long, byte]);
    b
}

/// `struct module`, with types of the members: int, long, name, build-id, list.
fn module_type(b: &mut Blob, age: Age, [int, long, name, id, two]: [u32; 5]) {
    let layout = b.composite(
        TypeKind::Struct,
        "module_layout",
        16,
        &[("base", long, 0), ("size", int, 64)],
    );
    let memory = b.composite(
        TypeKind::Struct,
        "module_memory",
        16,
        &[("base", long, 0), ("size", int, 64)],
    );
    let mem = b.array(memory, 2);
    let mut members = vec![
        ("state", int, 0),
        ("list", two, 8 * 8),
        ("name", name, 24 * 8),
        ("syms", long, 40 * 8),
        ("num_syms", int, 48 * 8),
        ("taints", long, 56 * 8),
        ("kallsyms", long, 64 * 8),
        ("refcnt", int, 72 * 8),
        ("source_list", two, 80 * 8),
        ("init", long, 96 * 8),
        ("exit", long, 104 * 8),
        ("notes_attrs", long, 112 * 8),
    ];
    match age {
        Age::Old => members.extend([
            ("core_layout", layout, 120 * 8),
            ("init_layout", layout, 136 * 8),
            ("build_id", id, 152 * 8),
        ]),
        Age::New => members.extend([
            ("mem", mem, 120 * 8),
            ("jump_entries", long, 152 * 8),
            ("num_jump_entries", int, 160 * 8),
        ]),
    }
    b.composite(TypeKind::Struct, "module", 176, &members);
}

/// What a module points to: uses, symbols, exports, BTF.
fn relatives(b: &mut Blob, [int, long, two]: [u32; 3]) {
    let locks = [
        ("mod", long, 0),
        ("locks", long, 64),
        ("locks_end", long, 128),
        ("next", two, 192),
    ];
    b.composite(TypeKind::Struct, "smp_alt_module", 40, &locks);
    let jump = [("code", int, 0), ("target", int, 32), ("key", long, 64)];
    b.composite(TypeKind::Struct, "jump_entry", 16, &jump);
    let site = [("addr", int, 0), ("key", int, 32)];
    b.composite(TypeKind::Struct, "static_call_site", 8, &site);
    let uses = [("source_list", two, 0), ("source", long, 128)];
    b.composite(TypeKind::Struct, "module_use", 24, &uses);
    let tables = [
        ("symtab", long, 0),
        ("num_symtab", int, 64),
        ("strtab", long, 128),
        ("typetab", long, 192),
    ];
    b.composite(TypeKind::Struct, "mod_kallsyms", 32, &tables);
    let export = [("value_offset", int, 0), ("name_offset", int, 32)];
    b.composite(TypeKind::Struct, "kernel_symbol", 12, &export);
    let own = [("list", two, 0), ("module", long, 128), ("btf", long, 192)];
    b.composite(TypeKind::Struct, "btf_module", 32, &own);
    b.composite(
        TypeKind::Struct,
        "btf",
        16,
        &[("data", long, 0), ("data_size", int, 64)],
    );
}

/// The table of taints, and the notes in sysfs.
fn taints_and_notes(b: &mut Blob, age: Age, [int, long, byte]: [u32; 3]) {
    let flag = [
        ("c_true", byte, 0),
        ("c_false", byte, 8),
        ("module", byte, 16),
    ];
    b.composite(TypeKind::Struct, "taint_flag", 3, &flag);
    let attr = b.composite(
        TypeKind::Struct,
        "bin_attribute",
        16,
        &[("size", long, 0), ("private", long, 64)],
    );
    let attrs = b.array(attr, 0);
    let group = b.composite(
        TypeKind::Struct,
        "attribute_group",
        8,
        &[("bin_attrs", long, 0)],
    );
    match age {
        Age::Old => {
            let all = [("dir", long, 0), ("notes", int, 64), ("attrs", attrs, 128)];
            b.composite(TypeKind::Struct, "module_notes_attrs", 16, &all)
        }
        Age::New => {
            let all = [("grp", group, 0), ("attrs", attrs, 64)];
            b.composite(TypeKind::Struct, "module_notes_attrs", 8, &all)
        }
    };
}

/// Memory of the modules.
pub struct Data(pub Vec<u8>);

impl Data {
    /// Overwrites bytes at a guest virtual address.
    pub fn set(&mut self, at: u64, bytes: &[u8]) {
        let at = (at - DATA) as usize;
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// Overwrites a 64-bit word at a guest virtual address.
    pub fn word(&mut self, at: u64, value: u64) {
        self.set(at, &value.to_le_bytes());
    }

    /// A module whose tables follow it; `next` is its successor's place.
    fn module(&mut self, age: Age, n: u64, name: &str, next: u64) {
        let at = DATA + n * STEP;
        self.word(at + 8, next);
        self.set(at + 24, name.as_bytes());
        self.word(at + 40, at + 0x300);
        self.word(at + 48, 1);
        self.word(at + 64, at + 0x200);
        self.word(at + 72, 1);
        self.word(at + 80, at + 80);
        self.word(at + 104, 0);
        self.word(at + 120, 0xffff_ffff_c100_0000 + n * 0x10000);
        self.word(at + 128, 0x3000);
        self.word(at + 136, 0xffff_ffff_c200_0000);
        self.word(at + 144, if age == Age::New { 0x1000 } else { 0 });
        // mod_kallsyms: a nameless symbol, two functions, of which the first is exported.
        self.word(at + 0x200, at + 0x400);
        self.word(at + 0x208, 3);
        self.word(at + 0x210, at + 0x500);
        self.word(at + 0x218, at + 0x600);
        for (i, (name, value)) in [(0u32, 0u64), (1, at + 0x1000), (5, at + 0x1010)]
            .into_iter()
            .enumerate()
        {
            let entry = at + 0x400 + 24 * i as u64;
            self.set(entry, &name.to_le_bytes());
            self.word(entry + 8, value);
        }
        self.set(at + 0x500, b"\0pub\0own\0");
        self.set(at + 0x600, b"Ttt");
        // kernel_symbol: both offsets are relative to their own place.
        self.set(at + 0x300, &(0x1000u32 - 0x300).to_le_bytes());
        self.set(at + 0x304, &(0x501u32 - 0x304).to_le_bytes());
    }

    fn note(&mut self, age: Age, module: u64) {
        let attrs = module + 0x800;
        self.word(module + 112, attrs);
        let attr = attrs + 16;
        match age {
            Age::Old => self.word(attrs + 8, 1),
            Age::New => {
                self.word(attrs, attrs + 0x40);
                self.word(attrs + 0x40, attr);
            }
        }
        self.word(attr, 24);
        self.word(attr + 8, attrs + 0x80);
        self.set(attrs + 0x80, &[4, 0, 0, 0, 8, 0, 0, 0, 3, 0, 0, 0]);
        self.set(attrs + 0x8c, b"GNU\0\x01\x02\x03\x04\x05\x06\x07\x08");
    }
}

/// Two modules: `first`, and `second`, which uses it. Only the second has types and a taint.
#[must_use]
pub fn data(age: Age) -> Data {
    let mut d = Data(vec![0; LEN]);
    let (first, second, heads) = (DATA, DATA + STEP, DATA + 2 * STEP);
    d.word(heads, second + 8);
    d.module(age, 1, "second", first + 8);
    d.module(age, 0, "first", heads);
    d.word(first + 72, 2);
    d.word(first + 96, 0x1234);
    let link = heads + 0x100;
    d.word(first + 80, link);
    d.word(link, first + 80);
    d.word(link + 16, second);
    d.set(second, &1u32.to_le_bytes());
    d.word(second + 56, 0b101);
    d.note(age, first);
    if age == Age::Old {
        d.set(second + 152, &[9; 20]);
    }
    let own = split(age).bytes();
    let types = heads + 0x200;
    d.word(heads + 16, types);
    d.word(types, heads + 16);
    d.word(types + 16, second);
    d.word(types + 24, types + 0x40);
    d.word(types + 0x40, types + 0x80);
    d.word(types + 0x48, own.len() as u64);
    d.set(types + 0x80, &own);
    d
}

/// The types of the second module.
#[must_use]
pub fn split(age: Age) -> Blob {
    let mut b = Blob::on(&blob(age));
    b.composite(TypeKind::Struct, "only_here", 8, &[("x", 2, 0)]);
    b
}

/// The guest without its modules' memory.
#[must_use]
pub fn fixture(age: Age) -> Fixture {
    let mut fixture = Fixture::new();
    let heads = DATA + 2 * STEP;
    fixture.symbols.push((heads, 'd', "modules".into()));
    fixture
        .symbols
        .push((heads + 16, 'd', "btf_modules".into()));
    fixture.constants.push(("__start_BTF", blob(age).bytes()));
    fixture.constants.push(("__stop_BTF", Vec::new()));
    fixture
        .constants
        .push(("taint_flags", b"PG\x01F \x00E \x01".to_vec()));
    fixture.constants.push(("after_taint_flags", vec![0]));
    fixture
}

/// The guest with `data` as its modules' memory.
#[must_use]
pub fn guest(age: Age, data: &Data) -> MockMemory {
    let memory = fixture(age).build();
    memory.map_bytes(Gva(DATA), &data.0, true, false);
    memory
}
