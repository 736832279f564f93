//! Tests of where the code of `module_init` goes: returns, calls, faults.

use super::{concerns, hidden, says, subjects, with_code};
use crate::testelf::{TestElf, ALLOC, R_32S, R_PC32, R_PLT32};

/// Among the concerns must be one that says `words`.
pub(super) fn says_too(elf: TestElf, words: &str) {
    let found = concerns(elf);
    let right = found.iter().any(|(_, why)| why.contains(words));
    assert!(right, "expected {words:?}, found {found:?}");
}

#[test]
fn returns_lead_to_the_caller_and_nowhere_else() {
    // call +2; jmp over the function; the function
    let called = |function: &[u8]| {
        let over = u8::try_from(function.len()).unwrap();
        let code = [&[0xe8, 2, 0, 0, 0, 0xeb, over][..], function].concat();
        with_code(&code)
    };
    let returns = "returns without the stack and the registers";
    let address = "takes the address of code";
    // lea hidden(%rip),%rax; push %rax; and ret, or jmp __x86_return_thunk
    for end in [&[0xc3][..], &[0xe9, 0, 0, 0, 0]] {
        let function = [&[0x48, 0x8d, 0x05, 0, 0, 0, 0, 0x50], end].concat();
        for words in [returns, address] {
            let (mut elf, at, _) = called(&function);
            let section = hidden(&mut elf, &at);
            elf.reloc(at.init, 10, R_PC32, section, -4);
            if end.len() > 1 {
                let thunk = elf.undefined("__x86_return_thunk");
                elf.reloc(at.init, 16, R_PLT32, thunk, -4);
            }
            says_too(elf, words);
        }
    }
    for (function, words) in [
        // add $-8,%rsp; ret
        (&[0x48, 0x83, 0xc4, 0xf8, 0xc3][..], returns),
        // push $7; ret, and ret $8
        (&[0x6a, 0x07, 0xc3], returns),
        (&[0xc2, 8, 0], "leaves the kernel"),
        // pop %rax; add $16,%rax; push %rax; ret
        (
            &[0x58, 0x48, 0x83, 0xc0, 0x10, 0x50, 0xc3],
            "takes its return address",
        ),
        // add $8,%rsp; ret; the same with esp; push %ax; sub $4,%rsp
        (&[0x48, 0x83, 0xc4, 0x08, 0xc3], "moves the stack"),
        (&[0x83, 0xc4, 0x08, 0xc3], "moves the stack"),
        (&[0x66, 0x50, 0xc3], "moves the stack"),
        (&[0x48, 0x83, 0xec, 0x04, 0xc3], "moves the stack"),
        // mov %rsp,%rax; lea 8(%rsp),%rax
        (&[0x48, 0x89, 0xe0, 0xc3], "takes an address of the stack"),
        (
            &[0x48, 0x8d, 0x44, 0x24, 0x08, 0xc3],
            "takes an address of the stack",
        ),
        // xor %ebx,%ebx; ret. push %rbx; push %r12; pop %rbx; pop %r12; ret
        (&[0x31, 0xdb, 0xc3], returns),
        (&[0x53, 0x41, 0x54, 0x5b, 0x41, 0x5c, 0xc3], returns),
        // lea 16(%rip),%rax, which no relocation fills in
        (&[0x48, 0x8d, 0x05, 0x10, 0, 0, 0, 0xc3], address),
        // test %eax,%eax; je over push %rax; ret
        (
            &[0x85, 0xc0, 0x74, 0x01, 0x50, 0xc3],
            "by two ways with different stacks",
        ),
    ] {
        says_too(called(function).0, words);
    }
    // push %rbp; mov %rsp,%rbp; push %rbx; sub $16,%rsp; xor %ebx,%ebx; add $16,%rsp; pop %rbx; pop %rbp; ret
    let fine = [
        0x55, 0x48, 0x89, 0xe5, 0x53, 0x48, 0x83, 0xec, 0x10, 0x31, 0xdb, 0x48, 0x83, 0xc4, 0x10,
        0x5b, 0x5d, 0xc3,
    ];
    assert!(subjects(called(&fine).0).is_empty());
    // push %rbp; mov %rsp,%rbp; sub $16,%rsp; leave; ret
    let fine = [0x55, 0x48, 0x89, 0xe5, 0x48, 0x83, 0xec, 0x10, 0xc9, 0xc3];
    assert!(subjects(called(&fine).0).is_empty());
}

#[test]
fn calls_lead_to_where_the_functions_of_the_kernel_begin() {
    let call = |addend: i64| {
        let (mut elf, at, _) = with_code(&[0xe8, 0, 0, 0, 0]);
        let symbol = elf.undefined("_printk");
        elf.reloc(at.init, 1, R_PLT32, symbol, addend);
        elf
    };
    assert!(subjects(call(-4)).is_empty());
    says(call(60), "branches to where the file does not say");
    // mov $_printk,%rax
    let (mut elf, at, _) = with_code(&[0x48, 0xc7, 0xc0, 0, 0, 0, 0]);
    let symbol = elf.undefined("_printk");
    elf.reloc(at.init, 3, R_32S, symbol, 0);
    assert_eq!(subjects(elf), ["_printk"]);
}

#[test]
fn a_fault_that_is_mended_elsewhere_is_named() {
    let (mut elf, at, _) = with_code(&[0x0f, 0x0b]);
    let section = hidden(&mut elf, &at);
    let init = elf.section_symbol(at.init);
    let table = elf.section("__ex_table", ALLOC, &[0; 12]);
    elf.reloc(table, 0, R_PC32, init, 0);
    elf.reloc(table, 4, R_PC32, section, 0);
    assert_eq!(subjects(elf), ["__ex_table"]);
}
