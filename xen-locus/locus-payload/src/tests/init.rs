//! Tests of what `module_init` does: it enables the patch, or what else it does is named.

use super::{parse, refused};

use crate::testelf::{
    Spec, SpecPlaces, TestElf, ALLOC, CODE, ENABLE, INIT, MODULE_SIZE, R_32S, R_64, R_PC32,
    R_PLT32, SHN_LIVEPATCH, VARS,
};

mod flow;
mod kpatch;
mod replace;

/// `movl $42, address(%rip)`; the address goes to offset 2, and its addend is 8 less.
const SET: [u8; 10] = [0xc7, 0x05, 0, 0, 0, 0, 42, 0, 0, 0];

/// A module whose `module_init` is `code` and then what enables the patch; and where that begins.
fn with_code(code: &[u8]) -> (TestElf, SpecPlaces, u64) {
    let (mut elf, at) = Spec::default().elf();
    let start = code.len() as u64;
    let fields: Vec<_> = [(1, R_PLT32), (8, R_32S), (13, R_PLT32)].into();
    let (fentry, enable) = (
        elf.undefined("__fentry__"),
        elf.undefined("klp_enable_patch"),
    );
    let data = elf.section_symbol(at.patch.0);
    let patch = i64::try_from(at.patch.1).unwrap();
    for place in [1, 8, 13] {
        elf.drop_reloc(at.init, place);
    }
    for (place, rtype) in fields {
        let (symbol, addend) = match place {
            1 => (fentry, -4),
            8 => (data, patch),
            _ => (enable, -4),
        };
        elf.reloc(at.init, start + place, rtype, symbol, addend);
    }
    *elf.data(at.init) = [code, &ENABLE].concat();
    elf.resize_symbol("init_module", start + ENABLE.len() as u64);
    (elf, at, start)
}

fn concerns(elf: TestElf) -> Vec<(String, String)> {
    let concerns = parse(&elf.build()).unwrap().concerns();
    concerns
        .into_iter()
        .map(|c| (c.subject, c.reason))
        .collect()
}

fn subjects(elf: TestElf) -> Vec<String> {
    concerns(elf)
        .into_iter()
        .map(|(subject, _)| subject)
        .collect()
}

/// A variable of four bytes in a section.
fn variable(elf: &mut TestElf, home: usize, name: &str) -> (usize, i64) {
    let at = elf.append(home, 8, 8);
    elf.symbol(name, u16::try_from(home).unwrap(), at, 4, 1);
    (elf.section_symbol(home), i64::try_from(at).unwrap())
}

/// The one concern must be about `module_init` and say `words`.
fn says(elf: TestElf, words: &str) {
    let found = concerns(elf);
    let right =
        matches!(&*found, [(subject, why)] if subject == "module_init" && why.contains(words));
    assert!(right, "expected {words:?}, found {found:?}");
}

#[test]
fn what_only_enables_the_patch_passes() {
    assert!(subjects(Spec::default().elf().0).is_empty());
    // push %rbx; mov $text,%rdi; xor %eax,%eax; call _printk; pop %rbx
    let code = [
        0x53, 0x48, 0xc7, 0xc7, 0, 0, 0, 0, 0x31, 0xc0, 0xe8, 0, 0, 0, 0, 0x5b,
    ];
    let (mut elf, at, _) = with_code(&code);
    let (strings, printk) = (elf.section_symbol(at.strings), elf.undefined("_printk"));
    elf.reloc(at.init, 4, R_32S, strings, 0);
    elf.reloc(at.init, 11, R_PLT32, printk, -4);
    assert!(subjects(elf).is_empty());

    // As samples before Linux 5.1: push %rbx; lea patch(%rip),%rbx; mov %rbx,%rdi; call klp_register_patch;
    // test %eax,%eax; jne; mov %rbx,%rdi; call klp_enable_patch; test; je; mov; call klp_unregister_patch;
    // ud2; pop %rbx; ret
    let code = [
        &[
            0x53, 0x48, 0x8d, 0x1d, 0, 0, 0, 0, 0x48, 0x89, 0xdf, 0xe8, 0, 0, 0, 0,
        ][..],
        &[0x85, 0xc0, 0x75, 0x16, 0x48, 0x89, 0xdf, 0xe8, 0, 0, 0, 0],
        &[0x85, 0xc0, 0x74, 0x0a, 0x48, 0x89, 0xdf, 0xe8, 0, 0, 0, 0],
        &[0x0f, 0x0b, 0x5b, 0xc3],
    ]
    .concat();
    let old = |last: u8| {
        let (mut elf, at) = Spec::default().elf();
        let mut code = code.clone();
        code[42] = last;
        elf.replace(at.init, &code);
        elf.resize_symbol("init_module", code.len() as u64);
        let data = elf.section_symbol(at.patch.0);
        let patch = i64::try_from(at.patch.1).unwrap();
        elf.reloc(at.init, 4, R_PC32, data, patch - 4);
        for (place, name) in [
            (12, "klp_register_patch"),
            (24, "klp_enable_patch"),
            (36, "klp_unregister_patch"),
        ] {
            let symbol = elf.undefined(name);
            elf.reloc(at.init, place, R_PLT32, symbol, -4);
        }
        elf
    };
    assert_eq!(subjects(old(0x5b)), Vec::<String>::new());
    // pop %rbp in its place
    says(old(0x5d), "returns without the stack and the registers");
}

#[test]
fn a_function_that_init_calls_in_its_own_section_is_followed() {
    // call +1; jmp over; setup: movl $42, limit(%rip); ret
    let code = [&[0xe8, 2, 0, 0, 0, 0xeb, 11][..], &SET, &[0xc3]].concat();
    for (role, expected) in [("bss", "limit"), ("data", "limit")] {
        let (mut elf, at, _) = with_code(&code);
        let home = match role {
            "bss" => elf.section(".data.other", VARS, &[]),
            _ => at.patch.0,
        };
        let (symbol, place) = variable(&mut elf, home, "limit");
        elf.reloc(at.init, 9, R_PC32, symbol, place - 8);
        assert_eq!(subjects(elf), [expected]);
    }
    // The same by a tail call into .text.
    let (mut elf, at) = Spec::default().elf();
    let setup = elf.section(".text.setup", CODE, &[&SET[..], &[0xc3]].concat());
    let (symbol, place) = variable(&mut elf, at.patch.0, "limit");
    elf.reloc(setup, 2, R_PC32, symbol, place - 8);
    let text = elf.section_symbol(setup);
    elf.drop_reloc(at.init, 13);
    elf.reloc(at.init, 13, R_PC32, text, -4);
    assert_eq!(
        subjects(elf),
        ["limit", "module_init"],
        "it enables nothing either"
    );
}

#[test]
fn a_variable_beside_the_patch_is_not_excused() {
    let (mut elf, at, _) = with_code(&SET);
    let (symbol, place) = variable(&mut elf, at.patch.0, "limit");
    elf.reloc(at.init, 2, R_PC32, symbol, place - 8);
    assert_eq!(subjects(elf), ["limit"]);
    // Nor is one of the kernel.
    let (mut elf, at, _) = with_code(&SET);
    let symbol = elf.undefined("sysctl_panic");
    elf.reloc(at.init, 2, R_PC32, symbol, -8);
    assert_eq!(subjects(elf), ["sysctl_panic"]);
}

#[test]
fn late_relocations_of_init_code_count() {
    let (mut elf, at, _) = with_code(&[0xe8, 0, 0, 0, 0]);
    let symbol = elf.symbol(".klp.sym.vmlinux.do_it,1", SHN_LIVEPATCH, 0, 0, 0);
    elf.klp_rela(
        ".klp.rela.vmlinux..init.text",
        at.init,
        &[(1, R_PLT32, symbol, -4)],
    );
    assert_eq!(subjects(elf), [".klp.sym.vmlinux.do_it,1"]);
    let (mut elf, at, _) = with_code(&[0xe8, 0, 0, 0, 0]);
    let symbol = elf.undefined("setup_table");
    elf.reloc(at.init, 1, R_PLT32, symbol, -4);
    assert_eq!(subjects(elf), ["setup_table"]);
}

#[test]
fn code_that_is_not_understood_is_named() {
    for (code, words) in [
        (&[0xff, 0xd0][..], "branches to where the file does not say"),
        (&[0xff, 0xe0], "branches to where the file does not say"),
        (&[0xc7, 0x00, 1, 0, 0, 0], "reads or writes memory"),
        (&[0x48, 0x89, 0x44, 0x24, 0x08], "reads or writes memory"),
        (
            &[0x65, 0x48, 0x8b, 0x04, 0x25, 0, 0, 0, 0],
            "reads or writes memory",
        ),
        (&[0x48, 0x89, 0xc4], "moves the stack"),
        (&[0x0f, 0x30], "does Wrmsr"),
        (&[0x0f, 0x22, 0xd8], "does Mov"),
        (&[0xf3, 0xaa], "does Stosb"),
        (&[0x06], "no instruction"),
        (&[0xeb, 0x7f], "where there is no code"),
        (&[0x74, 0x7f], "where there is no code"),
    ] {
        let found = concerns(with_code(code).0);
        let said =
            |(subject, why): &(String, String)| subject == "module_init" && why.contains(words);
        assert!(
            found.iter().any(said),
            "expected {words:?}, found {found:?}"
        );
    }
    // Code behind its end.
    let (mut elf, at, _) = with_code(&[]);
    elf.data(at.init).truncate(12);
    elf.resize_symbol("init_module", 12);
    elf.drop_reloc(at.init, 13);
    assert_eq!(concerns(elf).len(), 2);
    // A relocation that fits no operand.
    let (mut elf, at, _) = with_code(&[0x90; 8]);
    let data = elf.section_symbol(at.patch.0);
    elf.reloc(at.init, 2, R_32S, data, 0);
    let found = concerns(elf);
    assert!(found[0].1.contains("fits no operand"), "{found:?}");
}

#[test]
fn code_that_never_ends_is_given_up() {
    let code = vec![0x90; 1 << 16];
    let found = concerns(with_code(&code).0);
    assert!(
        found.iter().any(|(_, why)| why.contains("too long")),
        "{found:?}"
    );
    // jmp to itself
    says(with_code(&[0xeb, 0xfe]).0, "does not enable the patch");
}

#[test]
fn a_patch_must_be_enabled_and_no_other_one() {
    says(
        {
            let (mut elf, at) = Spec::default().elf();
            elf.data(at.init).fill(0xc3);
            for place in [1, 8, 13] {
                elf.drop_reloc(at.init, place);
            }
            elf
        },
        "does not enable the patch",
    );
    let (mut elf, at) = Spec::default().elf();
    elf.drop_reloc(at.init, 8);
    let data = elf.section_symbol(at.patch.0);
    elf.reloc(at.init, 8, R_32S, data, i64::try_from(at.objs.1).unwrap());
    refused(elf, "code of the payload refers to this array");
    let (mut elf, at) = Spec::default().elf();
    elf.drop_reloc(at.init, 8);
    let strings = elf.section_symbol(at.strings);
    elf.reloc(at.init, 8, R_32S, strings, 0);
    says(elf, "another address than that of its struct klp_patch");
    // On one of two ways: je over the mov.
    let (mut elf, at) = Spec::default().elf();
    elf.data(at.init)[..5].copy_from_slice(&[0x85, 0xc0, 0x74, 0x08, 0x90]);
    elf.drop_reloc(at.init, 1);
    says(elf, "another address than that of its struct klp_patch");
    // No module_init at all.
    let (mut elf, _) = Spec::default().elf();
    elf.rename("init_module", "no_init");
    assert_eq!(subjects(elf), ["module_init", "struct module"]);
}

#[test]
fn tables_that_change_init_code_are_named() {
    for name in [
        ".altinstructions",
        "__jump_table",
        ".static_call_sites",
        ".parainstructions",
        ".retpoline_sites",
        ".smp_locks",
        "__ex_table",
    ] {
        let (mut elf, at, _) = with_code(&[0x90; 5]);
        let init = elf.section_symbol(at.init);
        let table = elf.section(name, ALLOC, &[0; 16]);
        elf.reloc(table, 0, R_PC32, init, 2);
        assert_eq!(subjects(elf), [name]);
        let (mut elf, at) = Spec::default().elf();
        let text = elf.section_symbol(at.text);
        let table = elf.section(name, ALLOC, &[0; 16]);
        elf.reloc(table, 0, R_PC32, text, 16);
        assert!(subjects(elf).is_empty(), "{name} about placed code");
    }
}

/// Code that refers to the patch's variables is not followed by `module_init`, and counts too.
fn referring(rtype: u32, place: impl Fn(&SpecPlaces) -> u64, bias: i64) -> TestElf {
    let (mut elf, at) = Spec::default().elf();
    let code = elf.section(".text.more", CODE, &[0x90; 32]);
    let data = elf.section_symbol(at.patch.0);
    let addend = i64::try_from(place(&at)).unwrap() + bias;
    elf.reloc(code, 8, rtype, data, addend);
    elf
}

#[test]
fn fields_that_code_may_set_are_not_taken_from_the_file() {
    let replace = |elf: TestElf| parse(&elf.build()).unwrap().klp.replace;
    // &patch, by absolute and by relative address.
    assert_eq!(replace(referring(R_32S, |at| at.patch.1, 0)), Some(false));
    assert_eq!(replace(referring(R_PC32, |at| at.patch.1, -4)), Some(false));
    // patch.replace = a register, and = a constant.
    assert_eq!(replace(referring(R_PC32, |at| at.patch.1 + 24, -4)), None);
    assert_eq!(replace(referring(R_PC32, |at| at.patch.1 + 24, -5)), None);
    let words = "module_init may change it";
    refused(referring(R_PC32, |at| at.funcs.1 + 16, -4), words);
    refused(referring(R_PC32, |at| at.objs.1, -8), words);
}

#[test]
fn fields_that_a_pointer_leads_to_are_not_taken_from_the_file() {
    let pointing = |place: &dyn Fn(&SpecPlaces) -> u64| {
        let (mut elf, at) = Spec::default().elf();
        let pointers = elf.section(".data.pointers", VARS, &[0; 8]);
        let data = elf.section_symbol(at.patch.0);
        let addend = i64::try_from(place(&at)).unwrap();
        elf.reloc(pointers, 0, R_64, data, addend);
        elf
    };
    let words = "the pointer at .data.pointers+0x0 leads to it";
    refused(pointing(&|at| at.patch.1), words);
    refused(pointing(&|at| at.patch.1 + 24), words);
    refused(pointing(&|at| at.objs.1), words);
    refused(pointing(&|at| at.funcs.1 + 16), words);
    let behind = pointing(&|at| at.funcs.1 + 2 * 152);
    assert!(parse(&behind.build()).is_ok());
}

#[test]
fn tables_about_what_begins_in_front_of_init_code_and_reaches_it_are_named() {
    // jmp over a byte, which is not reached; the row is about that byte and what follows.
    let named = |name: &str, field: usize, len: u8| {
        let (mut elf, at, _) = with_code(&[0xeb, 0x01, 0x90, 0x90]);
        let init = elf.section_symbol(at.init);
        let mut row = [0; 16];
        row[field] = len;
        let table = elf.section(name, ALLOC, &row);
        elf.reloc(table, 0, R_PC32, init, 2);
        subjects(elf)
    };
    let none: [&str; 0] = [];
    for (name, field) in [
        (".altinstructions", 10),
        (".altinstructions", 12),
        (".parainstructions", 9),
    ] {
        assert_eq!(named(name, field, 1), none);
        assert_eq!(named(name, field, 2), [name]);
    }
    assert_eq!(named("__jump_table", 8, 0), ["__jump_table"]);
    assert_eq!(named("__ex_table", 8, 0), none);
    // The same by an address that another type makes.
    let (mut elf, at, _) = with_code(&[0x90; 8]);
    let init = elf.section_symbol(at.init);
    let table = elf.section("__jump_table", ALLOC, &[0; 24]);
    elf.reloc(table, 0, 24, init, 2);
    assert_eq!(subjects(elf), ["__jump_table"]);
}

/// Adds a function that sets a variable, in a section of its own; the symbol of that section.
fn hidden(elf: &mut TestElf, at: &SpecPlaces) -> usize {
    let code = elf.section(".text.hidden", CODE, &[&SET[..], &[0xc3]].concat());
    let (symbol, place) = variable(elf, at.patch.0, "limit");
    elf.reloc(code, 2, R_PC32, symbol, place - 8);
    elf.section_symbol(code)
}

#[test]
fn struct_module_names_init_module_and_then_cleanup_module() {
    // `init` at the place of the hidden function or of init_module, and behind it a symbol called so.
    let with = |members: &[(u64, &str)]| {
        let (mut elf, at) = Spec::default().elf();
        let section = hidden(&mut elf, &at);
        let code = u16::try_from(section_of(&mut elf, ".text.hidden")).unwrap();
        let init = u16::try_from(at.init).unwrap();
        elf.drop_reloc(at.this_module, INIT);
        for (offset, name) in members {
            let symbol = match *name {
                "init_module" => elf.section_symbol(at.init),
                "hidden" => section,
                "late" => elf.symbol(".klp.sym.vmlinux.foo,0", SHN_LIVEPATCH, 0, 0, 0),
                "second" => elf.symbol("init_module", init, 5, 0, 2),
                name => elf.symbol(name, code, 0, 11, 2),
            };
            let name = *name;
            match name {
                "late" => elf.klp_rela(
                    ".klp.rela.vmlinux.x",
                    at.this_module,
                    &[(*offset, R_64, symbol, 0)],
                ),
                _ => elf.reloc(at.this_module, *offset, R_64, symbol, 0),
            }
        }
        subjects(elf)
    };
    let none: [&str; 0] = [];
    assert_eq!(with(&[(312, "init_module")]), none);
    let both = [(312, "init_module"), (400, "cleanup_module")];
    assert_eq!(with(&both), none);
    for members in [
        &[(312, "cleanup_module")][..],
        &[(312, "cleanup_module"), (400, "init_module")],
        &[(312, "hidden")],
        &[(312, "late")],
    ] {
        assert_eq!(with(members), ["module_init", "struct module"]);
    }
    let more = [both[0], both[1], (408, "hidden")];
    assert_eq!(with(&more), ["struct module"]);
    assert_eq!(
        with(&[(312, "init_module"), (400, "hidden")]),
        ["struct module"]
    );
    let two = with(&[(312, "init_module"), (400, "second")]);
    assert!(two.contains(&"init_module".to_owned()), "{two:?}");
    assert_eq!(with(&[]), ["module_init"]);

    let (mut elf, at) = Spec::default().elf();
    elf.put_u64(at.this_module, 400, 1);
    assert_eq!(subjects(elf), ["struct module"]);
}

/// The number of a section that there is.
fn section_of(elf: &mut TestElf, name: &str) -> usize {
    elf.find(name, CODE)
}

#[test]
fn there_is_one_struct_module_and_the_kernel_takes_it() {
    let with = |flags: u64| {
        let (mut elf, _) = Spec::default().elf();
        elf.section(".gnu.linkonce.this_module", flags, &[0; MODULE_SIZE]);
        elf
    };
    refused(with(VARS), "has several sections .gnu.linkonce.this_module");
    for flags in [0, CODE] {
        assert_eq!(subjects(with(flags)), [".gnu.linkonce.this_module"]);
    }
}
