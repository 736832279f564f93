#![allow(clippy::cast_possible_truncation)] // small addresses

use super::*;
use crate::guest::mock::MockMemory;
use crate::kernel::btf::blob::Blob;
use crate::kernel::btf::Kind;
use crate::kernel::fixture::{vcpus, Fixture, KIND};

/// Where the fixture's modules and what belongs to them stand.
const DATA: u64 = 0xffff_ffff_c000_0000;
/// Of one module to the next.
const STEP: u64 = 0x4000;

/// How a kernel describes the memory of modules and their notes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Age {
    /// `core_layout`, counted notes, a build-id member.
    Old,
    /// `mem[]`, a group of notes.
    New,
}

fn blob(age: Age) -> Blob {
    let mut b = Blob::new();
    let int = b.int("int", 4);
    let long = b.int("long", 8);
    let byte = b.int("char", 1);
    let name = b.array(byte, 16);
    let id = b.array(byte, 20);
    let big_name = b.array(byte, 64);
    b.composite(Kind::Struct, "kallsym_iter", 64, &[("name", big_name, 0)]);
    let two = b.composite(Kind::Struct, "list_head", 16, &[("next", long, 0)]);
    let states = [
        ("MODULE_STATE_LIVE", 0),
        ("MODULE_STATE_COMING", 1),
        ("MODULE_STATE_GOING", 2),
        ("MODULE_STATE_UNFORMED", 3),
    ];
    b.enumeration("module_state", &states);
    b.enumeration("mod_mem_type", &[("MOD_TEXT", 0), ("MOD_DATA", 1)]);
    let layout = b.composite(
        Kind::Struct,
        "module_layout",
        16,
        &[("base", long, 0), ("size", int, 64)],
    );
    let memory = b.composite(
        Kind::Struct,
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
        Age::New => members.push(("mem", mem, 120 * 8)),
    }
    b.composite(Kind::Struct, "module", 176, &members);
    let uses = [("source_list", two, 0), ("source", long, 128)];
    b.composite(Kind::Struct, "module_use", 24, &uses);
    let tables = [
        ("symtab", long, 0),
        ("num_symtab", int, 64),
        ("strtab", long, 128),
        ("typetab", long, 192),
    ];
    b.composite(Kind::Struct, "mod_kallsyms", 32, &tables);
    let export = [("value_offset", int, 0), ("name_offset", int, 32)];
    b.composite(Kind::Struct, "kernel_symbol", 12, &export);
    let own = [("list", two, 0), ("module", long, 128), ("btf", long, 192)];
    b.composite(Kind::Struct, "btf_module", 32, &own);
    b.composite(
        Kind::Struct,
        "btf",
        16,
        &[("data", long, 0), ("data_size", int, 64)],
    );
    let flag = [
        ("c_true", byte, 0),
        ("c_false", byte, 8),
        ("module", byte, 16),
    ];
    b.composite(Kind::Struct, "taint_flag", 3, &flag);
    let attr = b.composite(
        Kind::Struct,
        "bin_attribute",
        16,
        &[("size", long, 0), ("private", long, 64)],
    );
    let attrs = b.array(attr, 0);
    let group = b.composite(
        Kind::Struct,
        "attribute_group",
        8,
        &[("bin_attrs", long, 0)],
    );
    match age {
        Age::Old => {
            let all = [("dir", long, 0), ("notes", int, 64), ("attrs", attrs, 128)];
            b.composite(Kind::Struct, "module_notes_attrs", 16, &all)
        }
        Age::New => {
            let all = [("grp", group, 0), ("attrs", attrs, 64)];
            b.composite(Kind::Struct, "module_notes_attrs", 8, &all)
        }
    };
    b
}

/// Memory of the modules.
struct Data(Vec<u8>);

impl Data {
    fn set(&mut self, at: u64, bytes: &[u8]) {
        let at = (at - DATA) as usize;
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn word(&mut self, at: u64, value: u64) {
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

/// Two modules: `first`, used by `second`, which is alone in having types and a taint.
fn data(age: Age) -> Data {
    let mut d = Data(vec![0; 0xc000]);
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

fn split(age: Age) -> Blob {
    let mut b = Blob::on(&blob(age));
    b.composite(Kind::Struct, "only_here", 8, &[("x", 2, 0)]);
    b
}

fn guest(age: Age, data: &Data) -> MockMemory {
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
    let memory = fixture.build();
    memory.map_bytes(Gva(DATA), &data.0, true, false);
    memory
}

#[test]
fn modules_are_what_proc_modules_says_in_both_layouts() {
    for age in [Age::Old, Age::New] {
        let memory = guest(age, &data(age));
        let kernel = Kernel::read(&memory, KIND, &vcpus()).unwrap();
        let all = Reader::new(&kernel).unwrap().all().unwrap();
        let names: Vec<&str> = all.iter().map(|m| m.name.as_str()).collect();
        assert_eq!(names, ["second", "first"]);
        let (second, first) = (&all[0], &all[1]);
        assert_eq!((first.state, second.state), (State::Live, State::Loading));
        assert_eq!((first.refcount, second.refcount), (Some(1), Some(0)));
        assert_eq!(first.used_by, ["second"]);
        assert!(first.permanent && !second.permanent);
        assert_eq!((first.taints.as_str(), second.taints.as_str()), ("", "PE"));
        assert_eq!(first.base, Gva(0xffff_ffff_c100_0000));
        assert_eq!(
            first.build_id.as_deref(),
            Some(&[1, 2, 3, 4, 5, 6, 7, 8][..])
        );
        let kinds: Vec<&str> = first.parts.iter().map(|p| p.kind.as_str()).collect();
        match age {
            Age::Old => {
                assert_eq!((first.size, kinds), (0x3000, vec!["core"]));
                assert_eq!(second.build_id.as_deref(), Some(&[9; 20][..]));
            }
            Age::New => {
                assert_eq!((first.size, kinds), (0x4000, vec!["text", "data"]));
                assert_eq!(second.build_id, None);
            }
        }
    }
}

#[test]
fn symbols_are_those_proc_kallsyms_shows_upper_case_if_exported() {
    let memory = guest(Age::New, &data(Age::New));
    let kernel = Kernel::read(&memory, KIND, &vcpus()).unwrap();
    let all = Reader::new(&kernel)
        .unwrap()
        .each(|reader, module| reader.symbols(module))
        .unwrap();
    let symbol = |name: &str, kind, at| Symbol {
        name: name.into(),
        kind,
        addr: Gva(at),
    };
    assert_eq!(
        all[1],
        [
            symbol("pub", 'T', DATA + 0x1000),
            symbol("own", 't', DATA + 0x1010)
        ]
    );
    assert_eq!(all[0][0].addr, Gva(DATA + STEP + 0x1000));
}

#[test]
fn types_of_a_module_stand_on_those_of_the_kernel() {
    let memory = guest(Age::New, &data(Age::New));
    let kernel = Kernel::read(&memory, KIND, &vcpus()).unwrap();
    let all = Reader::new(&kernel)
        .unwrap()
        .each(|reader, module| Ok((reader.btf(module)?, reader.btf_bytes(module)?)))
        .unwrap();
    assert!(all[1].0.is_none());
    let btf = all[0].0.as_ref().unwrap();
    assert_eq!((btf.len(), btf.size_of("only_here").unwrap()), (1, 8));
    assert_eq!(btf.size_of("module").unwrap(), 176);
    assert_eq!(all[0].1.as_deref(), Some(&split(Age::New).bytes()[..]));
}

#[test]
fn a_module_that_is_not_formed_is_not_shown() {
    let mut d = data(Age::New);
    d.set(DATA, &3u32.to_le_bytes());
    let memory = guest(Age::New, &d);
    let kernel = Kernel::read(&memory, KIND, &vcpus()).unwrap();
    assert_eq!(Reader::new(&kernel).unwrap().all().unwrap().len(), 1);
}

/// Everything that is read of modules.
fn read_all(kernel: &Kernel<'_>) -> Result<(), Error> {
    Reader::new(kernel)?.each(|reader, module| {
        reader.symbols(module)?;
        reader.btf(module)
    })?;
    Ok(())
}

#[test]
fn lists_without_end_and_huge_counts_are_refused() {
    let heads = DATA + 2 * STEP;
    for (at, value, why) in [
        (heads, heads + 0x300, "does not come back"),
        (DATA + 80, heads + 0x300, "does not come back"),
        (heads + 16, heads + 0x300, "does not come back"),
        (
            DATA + 0x208,
            u64::from(u32::MAX),
            "symbols; expected at most",
        ),
        (DATA + 48, u64::from(u32::MAX), "exports; expected at most"),
        (DATA + 0x418, 0xffff_ffff, "bytes of symbol names"),
        (DATA, 77, "in state 77"),
        (
            heads + 0x200 + 0x48,
            u64::from(u32::MAX),
            "bytes; expected at most",
        ),
        (DATA + 0x210, 0x1000, "not mapped"),
    ] {
        let mut d = data(Age::New);
        // A list that leads into itself but not to its head.
        d.word(heads + 0x300, heads + 0x308);
        d.word(heads + 0x308, heads + 0x300);
        d.word(at, value);
        let memory = guest(Age::New, &d);
        let kernel = Kernel::read(&memory, KIND, &vcpus()).unwrap();
        let error = read_all(&kernel).unwrap_err().to_string();
        assert!(error.contains(why), "{at:#x}: {error}");
    }
}

#[test]
fn modules_that_share_a_huge_table_cost_bounded_reading() {
    let mut d = data(Age::New);
    let (first, second) = (DATA, DATA + STEP);
    d.word(second + 64, first + 0x200);
    d.word(first + 0x200, DATA + 0xc000);
    d.word(first + 0x208, 100_000);
    let memory = guest(Age::New, &d);
    memory.map_bytes(Gva(DATA + 0xc000), &vec![0; 4 << 20], true, false);
    let kernel = Kernel::read(&memory, KIND, &vcpus()).unwrap();
    let reader = Reader::new(&kernel).unwrap();
    let module = &reader.list().unwrap()[1];
    // Enough for one of the two.
    reader.left.set(4 << 20);
    assert!(reader.symbols(module).unwrap().is_empty());
    let refused = reader.symbols(module).unwrap_err().to_string();
    assert!(refused.contains("symbols and types"), "{refused}");
}

#[test]
fn any_mutation_of_modules_is_refused_or_harmless() {
    let good = data(Age::Old);
    let heads = (2 * STEP) as usize;
    let places = (0..0xb0)
        .chain(0x200..0x220)
        .chain(0x300..0x30c)
        .chain(0x400..0x448)
        .chain(0x800..0x8a0)
        .chain(heads..heads + 32)
        .chain(heads + 0x100..heads + 0x118)
        .chain(heads + 0x200..heads + 0x2c0);
    let base = guest(Age::Old, &good);
    let kernel = Kernel::read(&base, KIND, &vcpus()).unwrap();
    for at in places {
        let mut bad = Data(good.0.clone());
        bad.0[at] ^= [0x01, 0x80, 0xff, 0x10][at % 4];
        base.map_bytes(Gva(DATA), &bad.0, true, false);
        let _ = read_all(&kernel);
    }
}
