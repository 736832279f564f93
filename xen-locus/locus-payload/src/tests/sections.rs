//! Tests of what sections are taken for: which are a concern, and which are refused.

use super::{parse, refused_if};
use crate::testelf::{
    Spec, SpecPlaces, TestElf, ALLOC, CODE, R_64, R_PC32, SHF_RELA_LIVEPATCH, SHN_LIVEPATCH, VARS,
};
use crate::*;

#[test]
fn half_livepatch_symbols_and_sections_are_refused() {
    let cases = [
        (".klp.sym.ext4.do_it,x", SHN_LIVEPATCH),
        (".klp.sym.ext4.do_it,0", 0),
    ];
    for (name, shndx) in cases {
        let change = |elf: &mut TestElf, _| {
            elf.symbol(name, shndx, 0, 0, 0);
        };
        refused_if(change, "only one of them");
    }
    refused_if(
        |elf, at| elf.klp_rela(".other", at.text, &[]),
        "not all of them",
    );
    for (name, kind, flags) in [
        (".klp.rela.vmlinux.text", 1, ALLOC),
        (".klp.rela.vmlinux.text", 1, ALLOC | SHF_RELA_LIVEPATCH),
        (".rodata.more", 1, ALLOC | SHF_RELA_LIVEPATCH),
        (".rodata.more", 7, ALLOC | SHF_RELA_LIVEPATCH),
    ] {
        let change = |elf: &mut TestElf, _| {
            elf.typed(name, kind, flags, &[0; 24]);
        };
        refused_if(change, "not all of them");
    }
}

#[test]
fn livepatch_symbols_are_in_livepatch_relocations_and_no_others_are() {
    refused_if(
        |elf, at| {
            let symbol = elf.undefined("do_it");
            elf.klp_rela(
                ".klp.rela.vmlinux.text",
                at.text,
                &[(8, R_PC32, symbol, -4)],
            );
        },
        "at offset 0x8 is the symbol do_it; expected livepatch symbols",
    );
    refused_if(
        |elf, at| {
            let symbol = elf.symbol(".klp.sym.vmlinux.do_it,0", SHN_LIVEPATCH, 0, 0, 0);
            elf.reloc(at.text, 8, R_PC32, symbol, -4);
        },
        "and nowhere else",
    );
}

#[test]
fn special_sections_are_named_as_concerns() {
    let (mut elf, at) = Spec::default().elf();
    let text = elf.section_symbol(at.text);
    let init = elf.section(".init.text", CODE, &[0xc3; 16]);
    let init = elf.section_symbol(init);
    let ran = elf.section(".ctors", ALLOC, &[0; 12]);
    elf.reloc(ran, 0, R_PC32, text, 0);
    let init_only = elf.section(".init_array", ALLOC, &[0; 4]);
    elf.reloc(init_only, 0, R_PC32, init, 0);
    elf.section("__bug_table", VARS, b"");
    elf.section("__brand_new", ALLOC, &[0; 4]);
    let payload = parse(&elf.build()).unwrap();
    let subjects: Vec<_> = payload.concerns().into_iter().map(|c| c.subject).collect();
    assert_eq!(subjects, [".ctors", ".init_array", "__brand_new"]);
}

#[test]
fn what_the_kernel_acts_on_is_a_concern_wherever_it_leads() {
    let names = [
        ".init_array",
        ".my_unknown",
        "__param",
        "__ksymtab",
        ".data..percpu",
        "__tracepoints_ptrs",
        ".static_call.text",
        ".klp.arch.vmlinux..altinstructions",
    ];
    let concerns = |name: &str, leads: &dyn Fn(&mut TestElf, SpecPlaces) -> usize| {
        let (mut elf, at) = Spec::default().elf();
        let symbol = leads(&mut elf, at);
        let section = elf.section(name, VARS, &[0; 8]);
        elf.reloc(section, 0, R_64, symbol, 0);
        let concerns = parse(&elf.build()).unwrap().concerns();
        concerns.into_iter().map(|c| c.subject).collect::<Vec<_>>()
    };
    for name in names {
        // To code of module_init, and to what is in no section of the payload.
        assert_eq!(concerns(name, &|e, at| e.section_symbol(at.init)), [name]);
        assert_eq!(concerns(name, &|e, _| e.undefined("printk")), [name]);
    }
    // Rows about code, of which none is placed.
    let cfi = ".kcfi_traps";
    assert!(concerns(cfi, &|e, at| e.section_symbol(at.init)).is_empty());
    assert_eq!(concerns(cfi, &|e, at| e.section_symbol(at.text)), [cfi]);
    assert_eq!(concerns(cfi, &|e, _| e.undefined("printk")), [cfi]);
}

#[test]
fn tables_of_another_type_or_with_other_flags_are_a_concern() {
    const NOTE: u32 = 7;
    for name in [
        ".init_array",
        ".ctors",
        "__param",
        "__ksymtab",
        "__tracepoints_ptrs",
        ".data..percpu",
        ".my_unknown",
        "__ex_table",
        "__jump_table",
        ".altinstructions",
        "__bug_table",
        ".static_call_sites",
        ".parainstructions",
        ".retpoline_sites",
        ".smp_locks",
    ] {
        for (kind, flags) in [(NOTE, ALLOC), (1, CODE), (3, ALLOC), (18, VARS)] {
            let (mut elf, at) = Spec::default().elf();
            let table = elf.typed(name, kind, flags, &[0; 24]);
            let text = elf.section_symbol(at.text);
            elf.reloc(table, 0, R_64, text, 16);
            let concerns = parse(&elf.build()).unwrap().concerns();
            let subjects: Vec<_> = concerns.iter().map(|c| &*c.subject).collect();
            assert_eq!(subjects, [name], "{kind} {flags:#x}");
        }
    }
    // An allocated table of ELF's own.
    let (mut elf, _) = Spec::default().elf();
    elf.typed(".strings", 3, ALLOC, &[0; 24]);
    assert_eq!(
        parse(&elf.build()).unwrap().concerns()[0].subject,
        ".strings"
    );
}

#[test]
fn a_table_that_is_there_twice_is_a_concern() {
    for name in [
        "__versions",
        "__jump_table",
        ".altinstructions",
        "__ex_table",
        ".kpatch.x",
    ] {
        let subjects = |count| {
            let (mut elf, _) = Spec::default().elf();
            for _ in 0..count {
                elf.section(name, ALLOC, &[0; 64]);
            }
            let concerns = parse(&elf.build()).unwrap().concerns();
            concerns.into_iter().map(|c| c.subject).collect::<Vec<_>>()
        };
        assert!(subjects(1).is_empty());
        assert_eq!(subjects(2), [name]);
    }
    let mut elf = Spec::kpatch();
    elf.section(".kpatch.funcs", ALLOC, &[0; 56]);
    let concerns = parse(&elf.build()).unwrap().concerns();
    assert_eq!(concerns[0].subject, ".kpatch.funcs");
}

#[test]
fn what_is_read_from_the_file_is_not_to_be_relocated() {
    for name in [".modinfo", "__versions", ".note.gnu.build-id"] {
        for late in [false, true] {
            let (mut elf, at) = Spec::default().elf();
            let section = elf.find(name, ALLOC);
            if name == "__versions" {
                elf.data(section).resize(64, 0);
            }
            let text = elf.section_symbol(at.text);
            let klp = elf.symbol(".klp.sym.vmlinux.foo,0", SHN_LIVEPATCH, 0, 0, 0);
            match late {
                true => elf.klp_rela(".klp.rela.vmlinux.x", section, &[(0, R_64, klp, 0)]),
                false => elf.reloc(section, 0, R_64, text, 0),
            }
            let concerns = parse(&elf.build()).unwrap().concerns();
            let subjects: Vec<_> = concerns.iter().map(|c| &*c.subject).collect();
            assert_eq!(subjects, [name]);
        }
    }
}

#[test]
fn an_alignment_that_no_module_gets_is_a_concern() {
    let mut payload = parse(&Spec::default().bytes()).unwrap();
    let data = payload.sections.iter().position(|s| s.name == ".data");
    let data = data.unwrap();
    payload.sections[data].align = 4096;
    assert_eq!(payload.concerns(), []);
    payload.sections[data].align = 8192;
    assert_eq!(payload.concerns()[0].subject, ".data");
}

#[test]
fn per_cpu_variables_of_its_own_are_a_concern() {
    let (mut elf, _) = Spec::default().elf();
    elf.section(".data..percpu", VARS, &[0; 8]);
    let concerns = parse(&elf.build()).unwrap().concerns();
    assert_eq!(concerns[0].subject, ".data..percpu");
    assert!(concerns[0].reason.contains("per-CPU"), "{concerns:?}");
}

#[test]
fn what_only_a_table_names_is_needed_too() {
    for table in [
        "__jump_table",
        "__ex_table",
        "__bug_table",
        ".altinstructions",
        ".altinstr_replacement",
        ".static_call_sites",
    ] {
        let (mut elf, _) = Spec::default().elf();
        let flags = match table {
            ".altinstr_replacement" => CODE,
            _ => ALLOC,
        };
        let section = elf.section(table, flags, &[0; 32]);
        let key = elf.undefined("a_key");
        elf.reloc(section, 8, R_PC32, key, 0);
        let late = elf.symbol(".klp.sym.ext4.its_key,0", SHN_LIVEPATCH, 0, 0, 0);
        let name = format!(".klp.rela.ext4.{table}");
        elf.klp_rela(&name, section, &[(24, R_PC32, late, 0)]);
        let needs = Payload::parse("x", &elf.build()).unwrap().summary().needs;
        for name in ["a_key", "ext4:its_key,0"] {
            assert!(needs.contains(&name.to_owned()), "{table}: {needs:?}");
        }
    }
}
