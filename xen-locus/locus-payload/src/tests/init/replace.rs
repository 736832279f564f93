//! Tests of what the `module_init` of kpatch-build sets `replace` to.

use crate::testelf::{Spec, TestElf, CODE, KPATCH_HOOK, R_PC32, R_PLT32};
use crate::tests::parse;

/// `movb $1, 0x18(%rax)`, and the same of 0.
const SETS: [u8; 4] = [0xc6, 0x40, 0x18, 0x01];
const CLEARS: [u8; 4] = [0xc6, 0x40, 0x18, 0x00];

/// What is told of a hook that does this to its patch, whose address is in rax.
fn told(body: &[u8], change: &dyn Fn(&mut TestElf, usize)) -> Option<bool> {
    let mut elf = Spec::kpatch();
    let init = elf.find(".init.text", CODE);
    elf.drop_reloc(init, 23);
    let code = [&KPATCH_HOOK[..15], body, &KPATCH_HOOK[19..]].concat();
    elf.resize_symbol("init_module", code.len() as u64);
    *elf.data(init) = code;
    let enable = elf.undefined("klp_enable_patch");
    elf.reloc(init, 19 + body.len() as u64, R_PLT32, enable, -4);
    change(&mut elf, init);
    parse(&elf.build()).unwrap().klp.replace
}

fn plain(parts: &[&[u8]]) -> Option<bool> {
    told(&parts.concat(), &|_, _| ())
}

/// `mov %rax,lpatch(%rip)` and `mov lpatch(%rip),%rax`.
const KEEP: [u8; 7] = [0x48, 0x89, 0x05, 0, 0, 0, 0];
const LOAD: [u8; 7] = [0x48, 0x8b, 0x05, 0, 0, 0, 0];

/// The variable that the hook keeps the address of its patch in has its address at these offsets of the body, with so
/// many bytes of the instruction behind.
fn kept(body: &[&[u8]], fields: &[(u64, i64)]) -> Option<bool> {
    told(&body.concat(), &|elf, init| {
        let bss = elf.bss(8);
        elf.symbol("lpatch", u16::try_from(bss).unwrap(), 0, 8, 1);
        let variable = elf.section_symbol(bss);
        for (field, behind) in fields {
            elf.reloc(init, 15 + field, R_PC32, variable, -4 - behind);
        }
    })
}

#[test]
fn one_constant_that_surely_is_put_there_is_told() {
    assert_eq!(plain(&[&SETS]), Some(true));
    assert_eq!(plain(&[&CLEARS]), Some(false));
    // Until 5.4, and by a copy of the address. mov %rax,%rdx; movb $0,0x10(%rdx)
    assert_eq!(plain(&[&[0xc6, 0x40, 0x10, 0]]), Some(false));
    assert_eq!(
        plain(&[&[0x48, 0x89, 0xc2, 0xc6, 0x42, 0x18, 0]]),
        Some(false)
    );
    assert_eq!(plain(&[&[0xc6, 0x40, 0x18, 2]]), None);
    assert_eq!(plain(&[&[0xc6, 0x40, 0x19, 1]]), None);
    assert_eq!(plain(&[&SETS, &SETS]), None);
    assert_eq!(plain(&[]), None);
    // test %rax,%rax; je behind the store
    assert_eq!(plain(&[&[0x48, 0x85, 0xc0, 0x74, 4], &SETS]), None);
}

#[test]
fn the_patch_is_followed_through_the_variable_that_holds_it() {
    assert_eq!(
        kept(&[&KEEP, &LOAD, &CLEARS], &[(3, 0), (10, 0)]),
        Some(false)
    );
    // Its other members, by the copy in the register: mov %rdx,8(%rax)
    let objs: [u8; 4] = [0x48, 0x89, 0x50, 0x08];
    assert_eq!(
        kept(&[&KEEP, &objs, &LOAD, &SETS], &[(3, 0), (14, 0)]),
        Some(true)
    );
    // Something else is put into the variable later. mov %rdx,lpatch(%rip)
    let other = [0x48, 0x89, 0x15, 0, 0, 0, 0];
    assert_eq!(
        kept(
            &[&KEEP, &other, &LOAD, &CLEARS],
            &[(3, 0), (10, 0), (17, 0)]
        ),
        None
    );
    // Its address is taken. lea lpatch(%rip),%rcx
    let lea = [0x48, 0x8d, 0x0d, 0, 0, 0, 0];
    assert_eq!(
        kept(&[&KEEP, &lea, &LOAD, &CLEARS], &[(3, 0), (10, 0), (17, 0)]),
        None
    );
    // A part of it is changed. movb $1,lpatch(%rip)
    let part = [0xc6, 0x05, 0, 0, 0, 0, 1];
    assert_eq!(
        kept(&[&KEEP, &part, &LOAD, &CLEARS], &[(3, 0), (9, 1), (17, 0)]),
        None
    );
}

#[test]
fn what_is_not_understood_of_the_patch_leaves_open_what_it_replaces() {
    for (body, what) in [
        (&[0xc7, 0x40, 0x18, 1, 0, 0, 0][..], "movl $1,0x18(%rax)"),
        (&[0x88, 0x50, 0x18], "mov %dl,0x18(%rax)"),
        (&[0x48, 0x89, 0x50, 0x18], "mov %rdx,0x18(%rax)"),
        (&[0x48, 0x89, 0x50, 0x11], "mov %rdx,0x11(%rax)"),
        (&[0x80, 0x40, 0x18, 1], "addb $1,0x18(%rax)"),
        (&[0xc6, 0x40, 0xff, 1], "movb $1,-1(%rax)"),
        (
            &[0x48, 0x8d, 0x48, 0x18, 0xc6, 0x01, 1],
            "lea 0x18(%rax),%rcx; movb $1,(%rcx)",
        ),
        (
            &[0x48, 0x89, 0xc1, 0x48, 0x83, 0xc1, 0x18, 0xc6, 0x01, 1],
            "mov %rax,%rcx; add $0x18,%rcx; movb $1,(%rcx)",
        ),
        (
            &[
                0x48, 0x89, 0xc7, 0xb9, 8, 0, 0, 0, 0x31, 0xc0, 0xf3, 0x48, 0xab, 0x48, 0x8d, 0x47,
                0xc0,
            ],
            "mov %rax,%rdi; mov $8,%ecx; xor %eax,%eax; rep stosq; lea -64(%rdi),%rax",
        ),
        (
            &[0x31, 0xc9, 0xc6, 0x44, 0x08, 0x18, 1],
            "xor %ecx,%ecx; movb $1,0x18(%rax,%rcx)",
        ),
        (&[0x48, 0x89, 0x02], "mov %rax,(%rdx)"),
        (&[0x48, 0x89, 0x00], "mov %rax,(%rax)"),
        (
            &[0x50, 0x59, 0xc6, 0x41, 0x18, 1],
            "push %rax; pop %rcx; movb $1,0x18(%rcx)",
        ),
    ] {
        assert_eq!(plain(&[body, &CLEARS]), None, "{what}");
        assert_eq!(plain(&[&CLEARS, body]), None, "{what}, later");
    }
    // Other structures are not looked at: mov %rdx,0x18(%rdx), where rdx is read of the table of functions.
    assert_eq!(plain(&[&[0x48, 0x89, 0x52, 0x18], &CLEARS]), Some(false));
}

#[test]
fn a_function_of_the_payload_that_gets_the_patch_is_followed() {
    // push %rbx; mov %rax,%rbx; mov %rax,%rdi; call 1f; mov %rbx,%rax; pop %rbx; jmp 2f;
    // 1: BODY; ret; 2:
    let with = |body: &[u8]| {
        let len = u8::try_from(body.len()).unwrap();
        let before = [
            0x53,
            0x48,
            0x89,
            0xc3,
            0x48,
            0x89,
            0xc7,
            0xe8,
            6,
            0,
            0,
            0,
            0x48,
            0x89,
            0xd8,
            0x5b,
            0xeb,
            len + 1,
        ];
        plain(&[&CLEARS, &before, body, &[0xc3]])
    };
    assert_eq!(with(&[0x31, 0xc0]), Some(false));
    // movl $1,0x18(%rdi)
    assert_eq!(with(&[0xc7, 0x47, 0x18, 1, 0, 0, 0]), None);
    // mov %rdi,%rax: it may return the patch, and nobody writes by that.
    assert_eq!(with(&[0x48, 0x89, 0xf8]), Some(false));
}

#[test]
fn an_allocator_of_the_hook_is_known_by_what_it_returns() {
    // The hook calls `code` and `jmp __kmalloc`, or `call __kmalloc` and `more`, and that calls the kernel.
    let with = |before: &[u8], more: Option<&[u8]>| {
        told(&CLEARS, &|elf, init| {
            elf.drop_reloc(init, 1);
            let start = elf.data(init).len();
            let distance = u32::try_from(start - 5).unwrap();
            elf.data(init)[1..5].copy_from_slice(&distance.to_le_bytes());
            let branch = if more.is_some() { 0xe8 } else { 0xe9 };
            let function = [before, &[branch, 0, 0, 0, 0], more.unwrap_or_default()].concat();
            elf.data(init).extend(function);
            let alloc = elf.undefined("__kmalloc");
            let place = (start + before.len() + 1) as u64;
            elf.reloc(init, place, R_PLT32, alloc, -4);
        })
    };
    assert_eq!(with(&[], None), Some(false));
    assert_eq!(with(&[], Some(&[0xc3])), Some(false));
    // movl $1,0x18(%rax); ret
    assert_eq!(with(&[], Some(&[0xc7, 0x40, 0x18, 1, 0, 0, 0, 0xc3])), None);
    // It returns nothing, or what it read: xor %eax,%eax; ret, and mov (%rax),%rax; ret
    assert_eq!(with(&[], Some(&[0x31, 0xc0, 0xc3])), None);
    assert_eq!(with(&[], Some(&[0x48, 0x8b, 0x00, 0xc3])), None);
}
