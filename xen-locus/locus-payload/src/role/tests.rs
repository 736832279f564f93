//! Tests of the roles that sections get.

use super::*;

const CODE: SectionFlags = SectionFlags {
    alloc: true,
    write: false,
    exec: true,
};
const CONST: SectionFlags = SectionFlags {
    alloc: true,
    write: false,
    exec: false,
};
const VARS: SectionFlags = SectionFlags {
    alloc: true,
    write: true,
    exec: false,
};

#[test]
fn sections_of_a_module_get_their_roles() {
    let cases = [
        (".text", CODE, Role::Text),
        (".text.unlikely", CODE, Role::Text),
        (".text.cmdline_proc_show", CODE, Role::Text),
        (".init.text", CODE, Role::InitText),
        (".exit.text", CODE, Role::ExitText),
        (".rodata.str1.1", CONST, Role::RoData),
        (".data", VARS, Role::Data),
        (".data.rel.ro", VARS, Role::Data),
        (".data.rel.ro", CONST, Role::RoData),
        (".data..read_mostly", VARS, Role::Data),
        (".init.data", VARS, Role::InitData),
        (".exit.data", VARS, Role::ExitData),
        (".data..percpu", VARS, Role::Percpu),
        (".return_sites", CONST, Role::ReturnSites),
        (".altinstr_replacement", CODE, Role::Altinstructions),
        ("__jump_table", VARS, Role::JumpTable),
        (".smp_locks", CONST, Role::SmpLocks),
        ("__something_new", CONST, Role::Unknown),
        (".texture", CODE, Role::Unknown),
        (".fixup", CODE, Role::Text),
        (".fixup", CONST, Role::Unknown),
        ("__ex_table", CONST, Role::ExTable),
        ("__tracepoint_check", CONST, Role::Index),
        (".debug_info", SectionFlags::default(), Role::NonAlloc),
        (".comment", SectionFlags::default(), Role::NonAlloc),
        (".modinfo", SectionFlags::default(), Role::Modinfo),
        (".kpatch.funcs", CONST, Role::RoData),
        (".kpatch.callbacks.pre_patch", VARS, Role::Data),
        (".kpatch.strings", CODE, Role::Unknown),
    ];
    for (name, flags, role) in cases {
        assert_eq!(classify(name, elf::SHT_PROGBITS, flags), role, "{name}");
    }
    assert_eq!(classify(".bss", elf::SHT_NOBITS, VARS), Role::Bss);
}

#[test]
fn writable_code_is_of_unknown_purpose() {
    let flags = SectionFlags {
        alloc: true,
        write: true,
        exec: true,
    };
    assert_eq!(classify(".text", elf::SHT_PROGBITS, flags), Role::Unknown);
}

/// Names of sections: of most roles, and one that nobody knows.
const NAMES: [&str; 33] = [
    "__versions",
    ".gnu.linkonce.this_module",
    "__mcount_loc",
    ".return_sites",
    ".retpoline_sites",
    ".call_sites",
    ".ibt_endbr_seal",
    ".altinstructions",
    ".altinstr_replacement",
    ".parainstructions",
    ".smp_locks",
    "__ex_table",
    "__bug_table",
    "__jump_table",
    ".static_call_sites",
    ".orc_unwind_ip",
    "__dyndbg",
    ".kpatch.funcs",
    ".init.text",
    ".exit.text",
    // These are refused whatever they are.
    ".init_array",
    ".ctors",
    "__param",
    "__ksymtab",
    "__tracepoints_ptrs",
    ".data..percpu",
    ".klp.arch.vmlinux.x",
    ".static_call.text",
    ".my_unknown",
    ".note",
    ".text",
    ".rodata",
    ".data",
];

#[test]
fn neither_type_nor_flags_hide_what_the_name_says() {
    let kinds = [
        elf::SHT_NULL,
        elf::SHT_PROGBITS,
        elf::SHT_SYMTAB,
        elf::SHT_STRTAB,
        elf::SHT_RELA,
        elf::SHT_NOTE,
        elf::SHT_NOBITS,
        elf::SHT_REL,
        elf::SHT_INIT_ARRAY,
        elf::SHT_GROUP,
        elf::SHT_SYMTAB_SHNDX,
        SectionType(0x7000_0001),
    ];
    for name in NAMES {
        let understood = |flags: SectionFlags| {
            let role = classify(name, elf::SHT_PROGBITS, flags);
            role.needs().is_none().then_some(role)
        };
        for kind in kinds {
            for (write, exec) in [(false, false), (true, false), (false, true), (true, true)] {
                let flags = SectionFlags {
                    alloc: true,
                    write,
                    exec,
                };
                let role = classify(name, kind, flags);
                let right = match kind {
                    elf::SHT_PROGBITS if write && exec => role.needs().is_some(),
                    elf::SHT_PROGBITS => true,
                    elf::SHT_NOBITS if name == ".data" && write && !exec => role == Role::Bss,
                    elf::SHT_NOBITS if name == ".rodata" && write && !exec => role == Role::Bss,
                    elf::SHT_NOTE if name == ".note" && !write && !exec => role == Role::Note,
                    _ => role.needs().is_some(),
                };
                assert!(right, "{name} {kind:?} {flags:?}: {role:?}");
            }
        }
        // Of each name code or data is understood, and never both.
        assert!(
            understood(CODE).is_none() || understood(CONST).is_none(),
            "{name}"
        );
    }
    // What this kind of table is for is not seen in the file if it is not loaded.
    for name in [
        ".altinstructions",
        ".return_sites",
        ".gnu.linkonce.this_module",
    ] {
        for kind in [elf::SHT_PROGBITS, elf::SHT_STRTAB, elf::SHT_NULL] {
            let role = classify(name, kind, SectionFlags::default());
            assert_eq!(role, Role::Unknown, "{name}");
        }
    }
    let symbols = classify(".symtab", elf::SHT_SYMTAB, SectionFlags::default());
    assert_eq!(symbols, Role::Table);
}

#[test]
fn only_code_and_data_are_placed() {
    assert!(Role::Text.is_placed() && Role::Bss.is_placed());
    assert!(!Role::InitText.is_placed() && !Role::ThisModule.is_placed());
    assert!(Role::StaticCallTramp.needs().is_some() && Role::ReturnSites.needs().is_none());
}
