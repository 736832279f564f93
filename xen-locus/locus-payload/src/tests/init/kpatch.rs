//! Tests of the `module_init` of kpatch-build.

use super::flow::says_too;
use super::{says, subjects, variable, SET};
use crate::testelf::{Spec, TestElf, ALLOC, CODE, KPATCH_HOOK, R_32S, R_PC32, R_PLT32, VARS};
use crate::tests::refused_if;

/// The hook of kpatch with other code in front.
fn kpatch(code: &[u8], change: &dyn Fn(&mut TestElf, usize)) -> TestElf {
    let mut elf = Spec::kpatch();
    let init = elf.find(".init.text", CODE);
    elf.prepend(init, code);
    elf.resize_symbol("init_module", (code.len() + KPATCH_HOOK.len()) as u64);
    change(&mut elf, init);
    elf
}

#[test]
fn the_hook_of_kpatch_is_known_by_what_it_calls_and_uses() {
    let with = |code: &[u8], change: &dyn Fn(&mut TestElf, usize)| subjects(kpatch(code, change));
    assert!(with(&[], &|_, _| ()).is_empty());
    // sub $16,%rsp; mov %gs:0x28,%rax; mov %rax,8(%rsp); mov 8(%rsp),%rax; sub %gs:0x28,%rax
    // mov %rax,%rdi; mov %rax,%rsi; mov $4,%ecx; rep movsl; mov %rax,8(%rdi); add $16,%rsp
    let fine = [
        &[0x48, 0x83, 0xec, 0x10][..],
        &[0x65, 0x48, 0x8b, 0x04, 0x25, 0x28, 0, 0, 0],
        &[0x48, 0x89, 0x44, 0x24, 0x08, 0x48, 0x8b, 0x44, 0x24, 0x08],
        &[0x65, 0x48, 0x2b, 0x04, 0x25, 0x28, 0, 0, 0],
        &[
            0x48, 0x89, 0xc7, 0x48, 0x89, 0xc6, 0xb9, 4, 0, 0, 0, 0xf3, 0xa5,
        ],
        &[0x48, 0x89, 0x47, 0x08, 0x48, 0x83, 0xc4, 0x10],
    ]
    .concat();
    assert_eq!(with(&fine, &|_, _| ()), Vec::<String>::new());
    // push %rbp; mov %rsp,%rbp; sub $16,%rsp; or $-1,%eax; mov %eax,-4(%rbp); mov -4(%rbp),%eax; leave
    let fine = [
        0x55, 0x48, 0x89, 0xe5, 0x48, 0x83, 0xec, 0x10, 0x83, 0xc8, 0xff, 0x89, 0x45, 0xfc, 0x8b,
        0x45, 0xfc, 0xc9,
    ];
    assert_eq!(with(&fine, &|_, _| ()), Vec::<String>::new());
    let call = |name: &'static str| {
        with(&[0xe8, 0, 0, 0, 0], &move |e, init| {
            let symbol = e.undefined(name);
            e.reloc(init, 1, R_PLT32, symbol, -4);
        })
    };
    assert!(call("kmalloc_trace").is_empty() && call("strcmp").is_empty());
    assert_eq!(call("schedule"), ["schedule"]);
    // A variable of its own, and one that a new function uses too.
    let set = |shared: bool| {
        with(&SET, &move |e, init| {
            let bss = e.section(".data.hook", VARS, &[]);
            let (symbol, at) = variable(e, bss, "lpatch");
            e.reloc(init, 2, R_PC32, symbol, at - 8);
            if shared {
                let text = e.find(".text", CODE);
                let place = e.append(text, 16, 16);
                e.reloc(text, place + 2, R_PC32, symbol, at - 4);
            }
        })
    };
    assert!(set(false).is_empty());
    assert_eq!(set(true), ["lpatch"]);
    let kernel = with(&SET, &|e, init| {
        let symbol = e.undefined("kmalloc_caches");
        e.reloc(init, 2, R_PC32, symbol, -8);
    });
    assert_eq!(kernel, ["kmalloc_caches"], "it may be read only");
}

#[test]
fn the_hook_of_kpatch_uses_memory_by_what_it_has_set() {
    for (code, words) in [
        // mov %rax,8(%rbx); mov %rax,(%rdi)
        (
            &[0x48, 0x89, 0x43, 0x08][..],
            "a register that it has not set",
        ),
        (
            &[0x31, 0xc0, 0x48, 0x89, 0x07],
            "a register that it has not set",
        ),
        // xor %eax,%eax; mov %rax,8(%rsp); the same by rbp and by an index
        (
            &[0x31, 0xc0, 0x48, 0x89, 0x44, 0x24, 0x08],
            "uses the stack of its caller",
        ),
        (
            &[
                0x31, 0xc0, 0x55, 0x48, 0x89, 0xe5, 0x48, 0x89, 0x45, 0x08, 0x5d,
            ],
            "uses the stack of its caller",
        ),
        (
            &[0x31, 0xc0, 0x50, 0x48, 0x89, 0x04, 0x04, 0x58],
            "uses the stack of its caller",
        ),
        // push %rbx; mov (%rsp),%rax; pop %rbx. push %rbx; pop %rax; mov %rax,(%rax)
        (
            &[0x53, 0x48, 0x8b, 0x04, 0x24, 0x5b],
            "reads of the stack what it has not put there",
        ),
        (
            &[0x53, 0x58, 0x48, 0x89, 0x00],
            "a register that it has not set",
        ),
        // mov %gs:0,%rax
        (
            &[0x65, 0x48, 0x8b, 0x04, 0x25, 0, 0, 0, 0],
            "at a fixed address",
        ),
    ] {
        says_too(kpatch(code, &|_, _| ()), words);
    }
    // mov $kfree,%rdi, and mov $hidden,%rdi
    for (own, words) in [
        (false, "module_init refers to it"),
        (true, "takes the address of code"),
    ] {
        let elf = kpatch(&[0x48, 0xc7, 0xc7, 0, 0, 0, 0], &|e, init| {
            let text = e.find(".text", CODE);
            let symbol = match own {
                true => e.section_symbol(text),
                false => e.undefined("kfree"),
            };
            e.reloc(init, 3, R_32S, symbol, 0);
        });
        says_too(elf, words);
    }
}

#[test]
fn the_hook_of_kpatch_uses_the_table_and_no_other_patch() {
    let elf = kpatch(&[], &|e, init| {
        e.drop_reloc(init, 8);
        let other = e.section(".rodata.other", ALLOC, &[0; 8]);
        let other = e.section_symbol(other);
        e.reloc(init, 8, R_PC32, other, -4);
    });
    says(elf, "does not use .kpatch.funcs");
    refused_if(
        |elf, at| {
            elf.section(".kpatch.funcs", ALLOC, &[]);
            let _ = at;
        },
        "has a struct klp_patch and the tables of kpatch-build",
    );
}
