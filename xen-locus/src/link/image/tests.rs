use locus_guest::addr::PAGE_SIZE;
use locus_kernel::fixture::{vcpus, Fixture, KIND, TEXT};
use locus_kernel::Kernel;
use locus_payload::{Klp, Modinfo, SectionFlags, SymKind};

use super::*;
use crate::arena;
use crate::link::module::ModuleSize;
use crate::link::reloc::{
    R_X86_64_32, R_X86_64_32S, R_X86_64_64, R_X86_64_PC32, R_X86_64_PC64, R_X86_64_PLT32,
};

const OUTSIDE: u64 = TEXT.0 + 0x2000;
const PERCPU: u64 = 0x1_f010;
/// Where the module entry has its table of `BUG` and `WARN` sites.
const BUGS: u64 = 0x40;

fn section(index: usize, role: Role, data: &[u8], relocs: Vec<Reloc>) -> Section {
    let exec = matches!(role, Role::Text | Role::InitText);
    Section {
        index,
        name: format!("s{index}"),
        role,
        flags: SectionFlags {
            alloc: true,
            write: false,
            exec,
        },
        align: 16,
        size: data.len() as u64,
        data: data.to_vec(),
        relocs,
    }
}

fn symbol(index: usize, name: &str, section: SymSection, value: u64) -> ElfSymbol {
    ElfSymbol {
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
    linked_with(code, relocs, returns, |_| {})
}

/// The same, with a payload changed before.
fn linked_with(
    code: &[u8],
    relocs: Vec<Reloc>,
    returns: Option<Returns>,
    change: impl Fn(&mut Payload),
) -> Result<Vec<u8>> {
    let mut fixture = Fixture::new();
    fixture.function(OUTSIDE, "outside", &[0xc3]);
    fixture.function(OUTSIDE + 16, "__fentry__", &[0xc3]);
    fixture.function(OUTSIDE + 32, "__x86_return_thunk", &[0xc3]);
    // A per-CPU variable: an absolute symbol, an offset into each CPU's area.
    fixture
        .symbols
        .push((PERCPU, 'A', "cpu_counter".to_owned()));
    fixture.function(OUTSIDE + 64, "__x86_indirect_thunk_rax", &[0xff, 0xe0]);
    let memory = fixture.build();
    let kernel = Kernel::read(&memory, KIND, &vcpus()).unwrap();
    let mut payload = Payload {
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
            ElfSymbol {
                binding: Binding::Weak,
                ..symbol(7, "nowhere_weak", SymSection::Undefined, 0)
            },
            symbol(8, "cpu_counter", SymSection::Undefined, 0),
        ],
        klp: Klp {
            place: Some((2, 0)),
            size: None,
            replace: Some(false),
            states: false,
            object_stride: None,
            func_stride: None,
            objects: vec![],
        },
        build_id: None,
    };
    change(&mut payload);
    let size = ModuleSize {
        ro: 100,
        rw: 200,
        bugs: BUGS,
    };
    let layout = ImageLayout::new(&payload, 100, size)?;
    let rights = [Rights::Text, Rights::RoData, Rights::Data, Rights::Data];
    assert_eq!(layout.rights, rights);
    let objects = GuestSymbols::new(&kernel, Vec::new());
    link(&payload, &kernel, &objects, &layout, arena::BASE, returns).map(|image| image.bytes)
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
        // `nowhere_weak` is 0, and so is the distance of nothing.
        (R_X86_64_64, 7, 0, 8, 0),
        // `incq %gs:cpu_counter`, absolute and relative.
        (R_X86_64_32S, 8, 0, 4, PERCPU),
        (
            R_X86_64_PC32,
            8,
            -4,
            4,
            PERCPU.wrapping_sub(4).wrapping_sub(at(8)),
        ),
    ] {
        let mut code = [0x90; 32];
        code[8..8 + len].fill(0);
        let image = linked(&code, vec![reloc(8, rtype, symbol, addend)], None).unwrap();
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
        (reloc(0, 9, 1, 0), "R_X86_64_GOTPCREL (9)"),
        (reloc(8, R_X86_64_64, 1, 0), "expected zeroes where"),
        (reloc(0, R_X86_64_64, 3, 0), "never placed"),
        (reloc(0, R_X86_64_64, 6, 0), "no symbol nowhere,"),
        (reloc(30, R_X86_64_64, 1, 0), "leaves it"),
        (reloc(0, R_X86_64_64, 77, 0), "symbol 77"),
    ] {
        let mut code = [0; 32];
        code[11] = 1;
        let error = linked(&code, vec![r], None).unwrap_err();
        assert!(
            error.to_string().contains(why),
            "{error} does not say {why}"
        );
    }
}

#[test]
fn calls_of_fentry_become_nops_and_returns_follow_the_kernel() {
    let mut code = [0; 32];
    code[0] = 0xe8;
    code[16] = 0xe9;
    let relocs = || {
        vec![
            reloc(1, R_X86_64_PLT32, 4, -4),
            reloc(17, R_X86_64_PLT32, 5, -4),
        ]
    };
    let image = linked(&code, relocs(), Some(Returns::Plain)).unwrap();
    assert_eq!(image[..5], x86::NOP5);
    assert_eq!(image[16..21], [0xc3, 0xcc, 0xcc, 0xcc, 0xcc]);
    let image = linked(&code, relocs(), None).unwrap();
    assert_eq!(image[16], 0xe9);
    // Neither is a call of what is behind the beginning of __fentry__, or of a function of the payload of that name.
    let behind = vec![reloc(1, R_X86_64_PLT32, 4, 0)];
    assert_eq!(linked(&code, behind, None).unwrap()[0], 0xe8);
    let own = linked_with(&code, relocs(), Some(Returns::Plain), |payload| {
        payload.symbols[4].section = SymSection::Section(1);
        payload.symbols[5].section = SymSection::Section(1);
    });
    let own = own.unwrap();
    assert_eq!(own[..5], [0xe8, 0xfb, 0xff, 0xff, 0xff]);
    assert_eq!(own[16..21], [0xe9, 0xeb, 0xff, 0xff, 0xff]);
    // Data that looks like a call is none.
    let image = linked_with(&code, Vec::new(), None, |payload| {
        payload.sections[2].data = [&[0xe8][..], &[0; 8]].concat();
        payload.sections[2].size = 9;
        payload.sections[2].relocs = vec![reloc(1, R_X86_64_64, 4, 0)];
    });
    let data = &image.unwrap()[2 * PAGE_LEN..][..9];
    assert_eq!(data, [&[0xe8][..], &(OUTSIDE + 16).to_le_bytes()].concat());
}

#[test]
fn code_refers_to_rows_of_the_bug_table_where_the_module_entry_has_them() {
    // lea row(%rip), %rdi with a row that is the second of its section, of 16 bytes each
    let mut code = [0x90; 32];
    code[8..15].copy_from_slice(&[0x48, 0x8d, 0x3d, 0, 0, 0, 0]);
    let relocs = vec![reloc(11, R_X86_64_PC32, 9, 16 - 4)];
    let image = linked_with(&code, relocs.clone(), None, |payload| {
        let bugs = section(4, Role::BugTable, &[0; 32], vec![]);
        payload.sections.push(bugs);
        let table = symbol(9, "", SymSection::Section(4), 0);
        payload.symbols.push(table);
    });
    let image = image.unwrap();
    let row = 3 * PAGE_SIZE + BUGS + 16;
    let distance = u32::try_from(row - 15).unwrap();
    assert_eq!(image[11..15], distance.to_le_bytes());
    // Its bytes come with the entry.
    assert!(image[3 * PAGE_LEN..].iter().all(|&b| b == 0));
    let error = linked_with(&code, relocs, None, |payload| {
        let empty = section(4, Role::BugTable, &[], vec![]);
        payload.sections.push(empty);
        payload
            .symbols
            .push(symbol(9, "", SymSection::Section(4), 0));
    });
    assert!(error.unwrap_err().to_string().contains("never placed"));
}

#[test]
fn tables_are_read_for_the_place_of_the_code_and_never_placed() {
    // call __x86_indirect_thunk_rax, and a table that names it and a call in init code
    let mut code = [0x90; 32];
    code[8..13].copy_from_slice(&[0xe8, 0, 0, 0, 0]);
    let relocs = vec![reloc(9, R_X86_64_PLT32, 9, -4)];
    let table = |name: usize, offset: i64| {
        let entries = vec![
            reloc(0, R_X86_64_PC32, 3, 0),
            reloc(4, R_X86_64_PC32, name, offset),
        ];
        move |payload: &mut Payload| {
            let sites = section(4, Role::RetpolineSites, &[0; 8], entries.clone());
            payload.sections.push(sites);
            let thunk = symbol(9, "__x86_indirect_thunk_rax", SymSection::Undefined, 0);
            payload.symbols.push(thunk);
            payload
                .symbols
                .push(symbol(10, "text", SymSection::Section(1), 0));
        }
    };
    let image = linked_with(&code, relocs.clone(), None, table(10, 8)).unwrap();
    assert_eq!(image.len(), 4 * PAGE_LEN);
    assert_eq!(image[..8], [0x90; 8]);
    assert_eq!(image[8..13], [0xff, 0xd0, 0x0f, 0x1f, 0x00]);
    // The table leads into data, or to what is no call.
    for (name, offset, why) in [(2, 0, "no code of it"), (10, 7, "no call or jump")] {
        let error = linked_with(&code, relocs.clone(), None, table(name, offset)).unwrap_err();
        assert!(error.to_string().contains(why), "{error}");
    }
}
