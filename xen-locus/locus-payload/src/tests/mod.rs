//! Tests of whole payload files: what is read from them.

mod hostile;
mod init;
mod sections;

use crate::testelf::{Funcs, Spec, SpecPlaces, TestElf, CODE, R_64, R_PC32, SHN_LIVEPATCH, VARS};
use crate::*;

pub(super) fn parse(bytes: &[u8]) -> Result<Payload, String> {
    Payload::parse("test.ko", bytes).map_err(|e| e.to_string())
}

pub(super) fn refused(elf: TestElf, expected: &str) {
    match parse(&elf.build()) {
        Err(error) => assert!(
            error.contains(expected),
            "expected {expected:?}, found: {error}"
        ),
        Ok(payload) => panic!("expected {expected:?}, found {:?}", payload.klp),
    }
}

/// A spec with a change to the file that it makes must be refused.
pub(super) fn refused_if(change: impl FnOnce(&mut TestElf, SpecPlaces), expected: &str) {
    let (mut elf, places) = Spec::default().elf();
    change(&mut elf, places);
    refused(elf, expected);
}

pub(super) fn two_objects() -> Spec {
    Spec {
        objects: vec![
            (
                None,
                vec![("version_proc_show", 0), ("loadavg_proc_show", 2)],
            ),
            (
                Some("ext4"),
                vec![("ext4_read", 0), ("ext4_write", 0), ("ext4_sync", 1)],
            ),
            (Some("nf_tables"), vec![("nft_one", 0)]),
        ],
        ..Spec::default()
    }
}

fn names(payload: &Payload) -> Vec<(Option<&str>, Funcs<'_>)> {
    payload
        .klp
        .objects
        .iter()
        .map(|o| {
            let funcs = o
                .funcs
                .iter()
                .map(|f| (f.old_name.as_str(), f.old_sympos))
                .collect();
            (o.name.as_deref(), funcs)
        })
        .collect()
}

#[test]
fn a_plain_livepatch_is_read() {
    let bytes = Spec::default().bytes();
    let payload = parse(&bytes).unwrap();
    assert_eq!(payload.name, "locus_test");
    assert_eq!(payload.file_len, bytes.len() as u64);
    assert_eq!(
        payload.build_id.as_deref(),
        Some(&[0xaa, 0xbb, 0xcc, 0xdd][..])
    );
    assert_eq!(payload.klp.object_stride, Some(168));
    assert_eq!(payload.klp.func_stride, Some(152));
    assert_eq!(payload.klp.size, Some(200));
    assert_eq!(payload.klp.replace, Some(false));
    assert_eq!(names(&payload), [(None, vec![("cmdline_proc_show", 0)])]);
    let func = &payload.klp.objects[0].funcs[0];
    assert_eq!(payload.section(func.new_section).unwrap().role, Role::Text);
    assert_eq!((func.new_offset, func.new_size), (16, 11));
    assert_eq!(
        payload.symbol(func.new_symbol).unwrap().name,
        "new_0_cmdline_proc_show"
    );
    let placed: Vec<_> = payload.placed().map(|s| s.name.as_str()).collect();
    assert_eq!(placed, [".text", ".rodata.str1.1", ".data", ".bss"]);
    let needed = payload.needed_symbols();
    assert_eq!(payload.symbol(needed[0]).unwrap().name, "__fentry__");
    assert_eq!(needed.len(), 1);
    assert!(payload.concerns().is_empty());
    assert!(payload
        .sections
        .iter()
        .enumerate()
        .all(|(at, s)| s.index == at));
}

#[test]
fn several_objects_and_functions_are_read_with_every_layout() {
    let homes = [
        [".data"; 3],
        [".data", ".data.rel.ro", ".data..read_mostly"],
        [".data.rel.ro", ".data.rel.ro", ".data"],
        [".data..read_mostly", ".data.patch", ".data.patch"],
    ];
    for homes in homes {
        for named in [false, true] {
            for (object_stride, func_stride) in [(168, 152), (48, 24), (176, 160), (400, 96)] {
                let spec = Spec {
                    homes,
                    named,
                    object_stride,
                    func_stride,
                    ..two_objects()
                };
                let payload = parse(&spec.bytes()).unwrap();
                assert_eq!(names(&payload), spec.objects);
                assert_eq!(payload.klp.object_stride, Some(object_stride as u64));
                assert_eq!(payload.klp.func_stride, Some(func_stride as u64));
            }
        }
    }
}

#[test]
fn one_array_may_be_of_many_functions() {
    for count in 1..40 {
        let funcs = vec![("a_function", 1); count];
        let spec = Spec {
            objects: vec![(None, funcs)],
            ..Spec::default()
        };
        let payload = parse(&spec.bytes()).unwrap();
        assert_eq!(payload.klp.objects[0].funcs.len(), count);
        assert_eq!(payload.klp.func_stride, Some(152));
    }
}

#[test]
fn the_replace_field_is_told_where_it_can_be() {
    let with = |changes: &[(u64, u8)], states: bool| {
        let (mut elf, at) = Spec::default().elf();
        for (offset, value) in changes {
            let index = usize::try_from(at.patch.1 + offset).unwrap();
            elf.data(at.patch.0)[index] = *value;
        }
        if states {
            let symbol = elf.section_symbol(at.strings);
            elf.reloc(at.patch.0, at.patch.1 + 16, R_64, symbol, 0);
        }
        let payload = parse(&elf.build()).unwrap();
        (payload.klp.replace, payload.klp.states)
    };
    assert_eq!(with(&[(24, 1)], false), (Some(true), false));
    assert_eq!(with(&[(16, 1)], false), (Some(true), false));
    assert_eq!(with(&[(24, 1)], true), (Some(true), true));
    assert_eq!(with(&[(24, 2)], false), (None, false));
    assert_eq!(with(&[(24, 1), (40, 1)], false), (None, false));
    assert_eq!(with(&[], true), (Some(false), true));
}

#[test]
fn callbacks_are_seen() {
    let (mut elf, at) = Spec::default().elf();
    let symbol = elf.section_symbol(at.text);
    elf.reloc(at.objs.0, at.objs.1 + 24, R_64, symbol, 0);
    let payload = parse(&elf.build()).unwrap();
    assert!(payload.klp.objects[0].callbacks);
    assert!(payload.concerns()[0].reason.contains("callbacks"));
}

#[test]
fn other_structures_with_an_owner_are_not_taken_for_a_patch() {
    let (mut elf, at) = Spec::default().elf();
    let module = elf.symbol(
        "__this_module",
        u16::try_from(at.this_module).unwrap(),
        0,
        448,
        1,
    );
    let text = elf.section_symbol(at.text);
    let strings = elf.section_symbol(at.strings);
    for (symbol, addend) in [(text, 16), (strings, 0), (text, 0)] {
        let ops = elf.append(at.patch.0, 32, 64);
        elf.reloc(at.patch.0, ops, R_64, module, 0);
        elf.reloc(at.patch.0, ops + 8, R_64, symbol, addend);
    }
    assert_eq!(parse(&elf.build()).unwrap().klp.place, Some(at.patch));
}

#[test]
fn two_patches_are_ambiguous() {
    refused_if(
        |elf, at| {
            let this = u16::try_from(at.this_module).unwrap();
            let module = elf.symbol("__this_module", this, 0, 448, 1);
            let home = at.patch.0;
            let mut variable = |name: &str, size: usize| {
                let place = elf.append(home, 32, size);
                let section = u16::try_from(home).unwrap();
                let symbol = elf.symbol(name, section, place, size as u64, 1);
                (place, symbol)
            };
            let (second, _) = variable("patch2", 200);
            let (objs, objs_symbol) = variable("objs2", 336);
            let (funcs, funcs_symbol) = variable("funcs2", 304);
            let (name, code) = (elf.section_symbol(at.strings), elf.section_symbol(at.text));
            for (place, symbol, addend) in [
                (second, module, 0),
                (second + 8, objs_symbol, 0),
                (objs + 8, funcs_symbol, 0),
                (funcs, name, 0),
                (funcs + 8, code, 16),
            ] {
                elf.reloc(home, place, R_64, symbol, addend);
            }
        },
        "both look like struct klp_patch",
    );
}

#[test]
fn damaged_structures_are_refused_with_their_place() {
    refused_if(
        |elf, at| elf.drop_reloc(at.patch.0, at.patch.1),
        "no struct klp_patch can be read",
    );
    refused_if(
        |elf, at| elf.drop_reloc(at.patch.0, at.patch.1 + 8),
        "no struct klp_patch",
    );
    refused_if(
        |elf, at| elf.drop_reloc(at.funcs.0, at.funcs.1 + 8),
        "struct klp_func at .data+",
    );
    refused_if(
        |elf, at| elf.put_u64(at.funcs.0, at.funcs.1 + 40, 1),
        "fields are not zero",
    );
    refused_if(
        |elf, at| elf.put_u64(at.objs.0, at.objs.1 + 64, 1),
        "fields are not zero",
    );
    refused_if(
        |elf, at| elf.put_u64(at.objs.0, at.objs.1 + 300, 1),
        "element of zeroes",
    );
    refused_if(
        |elf, at| elf.put_u64(at.funcs.0, at.funcs.1 + 200, 1),
        "element of zeroes",
    );
    refused_if(|elf, _| elf.drop_sizes(), "no symbol gives the size");
    refused_if(
        |elf, at| {
            let symbol = elf.section_symbol(at.text);
            elf.drop_reloc(at.funcs.0, at.funcs.1 + 8);
            elf.reloc(at.funcs.0, at.funcs.1 + 8, R_64, symbol, 17);
        },
        "no function symbol",
    );
    refused_if(
        |elf, at| {
            let symbol = elf.undefined("somewhere_else");
            elf.drop_reloc(at.funcs.0, at.funcs.1 + 8);
            elf.reloc(at.funcs.0, at.funcs.1 + 8, R_64, symbol, 0);
        },
        "not in the payload",
    );
    refused_if(
        |elf, at| {
            let init = elf.section(".init.text", CODE, &[0xc3; 16]);
            let symbol = elf.symbol("new", u16::try_from(init).unwrap(), 0, 16, 2);
            elf.drop_reloc(at.funcs.0, at.funcs.1 + 8);
            elf.reloc(at.funcs.0, at.funcs.1 + 8, R_64, symbol, 0);
        },
        "code that stays loaded",
    );
    refused_if(
        |elf, at| {
            let name = ".klp.sym.vmlinux.a_callback,0";
            let kernel = elf.symbol(name, SHN_LIVEPATCH, 0, 0, 0);
            let place = at.objs.1 + 16;
            elf.klp_rela(
                ".klp.rela.vmlinux.data",
                at.objs.0,
                &[(at.funcs.1 + 16, R_64, kernel, 0)],
            );
            elf.klp_rela(
                ".klp.rela.vmlinux.data",
                at.objs.0,
                &[(place, R_64, kernel, 0)],
            );
        },
        "plain number",
    );
}

#[test]
fn livepatch_relocations_and_symbols_are_read() {
    let (mut elf, at) = Spec::default().elf();
    let symbol = elf.symbol(".klp.sym.ext4.do_it.isra.0,2", SHN_LIVEPATCH, 0, 0, 0);
    elf.klp_rela(".klp.rela.ext4.text", at.text, &[(8, R_PC32, symbol, -4)]);
    let payload = parse(&elf.build()).unwrap();
    let rela = payload
        .sections
        .iter()
        .find(|s| s.name == ".klp.rela.ext4.text")
        .unwrap();
    assert_eq!(
        rela.role,
        Role::KlpRela {
            object: "ext4".into(),
            target: at.text
        }
    );
    assert_eq!(
        rela.relocs,
        [Reloc {
            offset: 8,
            rtype: R_PC32,
            symbol,
            addend: -4
        }]
    );
    let expected = KlpSym {
        object: "ext4".into(),
        symbol: "do_it.isra.0".into(),
        sympos: 2,
    };
    assert_eq!(
        payload.symbol(symbol).unwrap().klp.as_ref(),
        Some(&expected)
    );
    assert!(payload.needed_symbols().contains(&symbol));
    assert!(payload
        .summary()
        .needs
        .contains(&"ext4:do_it.isra.0,2".to_owned()));
}

#[test]
fn a_module_without_a_name_in_modinfo_has_one_in_its_struct_module() {
    let spec = Spec {
        modinfo: b"livepatch=Y\0vermagic=4.9.0\0",
        ..Spec::default()
    };
    let (mut elf, at) = spec.elf();
    elf.data(at.this_module)[24..32].copy_from_slice(b"old_name");
    assert_eq!(parse(&elf.build()).unwrap().name, "old_name");
    refused(spec.elf().0, "no name");
}

#[test]
fn an_object_may_have_callbacks_only() {
    let (mut elf, at) = Spec::default().elf();
    let bss = elf.find(".bss", VARS);
    let none = elf.symbol("no_funcs", u16::try_from(bss).unwrap(), 0, 48, 1);
    elf.drop_reloc(at.objs.0, at.objs.1 + 8);
    elf.reloc(at.objs.0, at.objs.1 + 8, R_64, none, 0);
    let callback = elf.section_symbol(at.text);
    elf.reloc(at.objs.0, at.objs.1 + 16, R_64, callback, 0);
    let payload = parse(&elf.build()).unwrap();
    assert!(payload.klp.objects[0].callbacks && payload.klp.objects[0].funcs.is_empty());
    let reasons: Vec<_> = payload.concerns().into_iter().map(|c| c.reason).collect();
    assert!(reasons
        .iter()
        .any(|r| r.contains("callbacks have to be run")));
    assert!(reasons.iter().any(|r| r.contains("replaces no function")));
}
