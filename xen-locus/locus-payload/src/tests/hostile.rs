//! Tests of files that must be refused, and of damaged files, which must cause no panic.

use super::{parse, refused, refused_if, two_objects};
use crate::pointers::DECODED;
use crate::testelf::{Spec, SpecPlaces, TestElf, ALLOC, CODE, R_64, R_PC32, SHN_LIVEPATCH, VARS};
use crate::*;

#[test]
fn files_of_other_kinds_are_told_apart() {
    let with = |machine, kind| {
        let (mut elf, _) = Spec::default().elf();
        (elf.machine, elf.kind) = (machine, kind);
        elf
    };
    refused(
        with(183, 1),
        "wrong machine: expected x86-64 (62), found arm64 (183)",
    );
    refused(with(62, 2), "found executable (2)");
    refused(with(62, 3), "found shared object (3)");
    let mut bytes = Spec::default().bytes();
    bytes[4] = 1;
    assert!(parse(&bytes).unwrap_err().contains("32-bit"));
    for (bytes, expected) in [
        (&b""[..], "an empty file"),
        (
            b"#!/bin/sh\n",
            "not an ELF file: expected 7f 45 4c 46 at its beginning, found 23 21 2f 62; give",
        ),
        (b"\x1f\x8b\x08", "unpack it first"),
        (
            b"\x7fELF",
            "truncated: the ELF header needs 64 bytes, the file has 4",
        ),
    ] {
        let error = parse(bytes).unwrap_err();
        assert!(
            error.starts_with("test.ko: ") && error.contains(expected),
            "{error}"
        );
    }
}

#[test]
fn modules_that_are_not_livepatches_are_told_apart() {
    let plain = Spec {
        modinfo: b"name=plain\0vermagic=6.1.0\0",
        ..Spec::default()
    };
    refused(
        plain.elf().0,
        "not a livepatch: module plain calls klp_enable_patch but has no livepatch entry",
    );
    let mut object = TestElf::new();
    object.section(".text", CODE, &[0xc3]);
    object.undefined("printk");
    refused(object, "no .modinfo section");
    let mut empty = TestElf::new();
    empty.section(".modinfo", ALLOC, Spec::default().modinfo);
    empty.section(".gnu.linkonce.this_module", VARS, &[0; 896]);
    empty.undefined("printk");
    refused(empty, "no struct klp_patch can be read");
    refused_if(
        |elf, _| {
            elf.section(".kpatch.funcs", VARS, &[0; 8]);
        },
        "a multiple of 56",
    );
}

#[test]
fn relocations_and_symbols_out_of_bounds_are_refused() {
    refused_if(
        |elf, at| elf.reloc(at.text, 30, R_PC32, 1, 0),
        "lies outside the section",
    );
    refused_if(
        |elf, at| elf.reloc(at.text, u64::MAX, R_PC32, 1, 0),
        "lies outside the section",
    );
    refused_if(
        |elf, at| elf.reloc(at.text, 8, R_PC32, 9999, 0),
        "symbol 9999",
    );
    refused_if(|elf, at| elf.reloc(at.text, 8, R_PC32, 0, 0), "symbol 0");
    refused_if(|elf, at| elf.reloc(at.text, 3, R_PC32, 1, 0), "two overlap");
    let text = |at: SpecPlaces| u16::try_from(at.text).unwrap();
    let symbol = |shndx: u16, value: u64, size: u64| {
        let (mut elf, _) = Spec::default().elf();
        elf.symbol("odd", shndx, value, size, 1);
        elf
    };
    let (_, at) = Spec::default().elf();
    refused(symbol(text(at), 30, 16), "outside its section");
    refused(symbol(text(at), u64::MAX, 16), "outside its section");
    refused(symbol(900, 0, 0), "section index 0x384");
    refused(symbol(0xffff, 0, 0), "section index 0xffff");
}

#[test]
fn unprintable_and_overlong_names_are_refused() {
    let named = |name: &str| {
        let (mut elf, _) = Spec::default().elf();
        elf.undefined(name);
        elf
    };
    refused(named("\x1b[2J"), "not printable text");
    refused(
        named(&"x".repeat(513)),
        "too big: the length of a name is 513",
    );
    assert!(parse(&named(&"x".repeat(512)).build()).is_ok());
}

#[test]
fn huge_sections_without_contents_are_refused() {
    let (mut elf, _) = Spec::default().elf();
    elf.bss(MAX_FILE + 1);
    refused(elf, "too big");
}

/// `bytes` with all sections from number `from` to `to` on the contents of section `like`.
fn sharing(mut bytes: Vec<u8>, like: usize, from: usize, to: usize) -> Vec<u8> {
    let table = u64::from_le_bytes(bytes[40..48].try_into().unwrap());
    let header = |index: usize| usize::try_from(table).unwrap() + 64 * index;
    // sh_offset and sh_size
    let place = bytes[header(like) + 24..header(like) + 40].to_vec();
    for index in from..=to {
        let at = header(index) + 24;
        bytes[at..at + 16].copy_from_slice(&place);
    }
    bytes
}

#[test]
fn no_more_is_kept_than_the_file_has() {
    let kept = |bytes: &[u8]| parse(bytes).map(|p| p.sections.iter().map(|s| s.data.len()).sum());
    let plain = Spec::default().bytes();
    let all: usize = kept(&plain).unwrap();
    assert!(all <= plain.len());
    for (flags, name, words) in [
        (ALLOC, ".rodata.more", "share bytes of the file"),
        (0, ".modinfo", "several such sections"),
        (ALLOC, ".modinfo", "several such sections"),
    ] {
        let (mut elf, _) = Spec::default().elf();
        let large = elf.section(".rodata.large", ALLOC, &[0; 1 << 16]);
        let first = large + 1;
        for _ in 0..100 {
            elf.section(name, flags, &[]);
        }
        let bytes = sharing(elf.build(), large, first, large + 100);
        let error = kept(&bytes).unwrap_err();
        assert!(error.contains(words), "{error}");
    }
}

#[test]
fn names_are_no_more_than_the_file_has() {
    let (mut elf, _) = Spec::default().elf();
    for _ in 0..1000 {
        elf.undefined("");
    }
    elf.undefined(&"x".repeat(500));
    let mut bytes = elf.build();
    let count = parse(&bytes).unwrap().symbols.len();
    let number = |bytes: &[u8], at: usize| {
        let field = bytes[at..at + 8].try_into().unwrap();
        usize::try_from(u64::from_le_bytes(field)).unwrap()
    };
    let table = number(&bytes, 40);
    let mut headers = (table..bytes.len()).step_by(64);
    let symtab = headers.find(|at| bytes[at + 4] == 2).unwrap();
    let first = number(&bytes, symtab + 24);
    let last = first + 24 * (count - 1);
    for symbol in (last - 24 * 1000..last).step_by(24) {
        // st_name
        bytes.copy_within(last..last + 4, symbol);
    }
    let error = parse(&bytes).unwrap_err();
    assert!(error.contains("total length of symbol names"), "{error}");
    let list = [b"depends=", &b"a,".repeat(4097)[..], b"\0vermagic=6.1.0\0"].concat();
    let error = crate::modinfo::Modinfo::parse(&list)
        .unwrap_err()
        .to_string();
    assert!(error.contains("names in .modinfo is 4097"), "{error}");
}

#[test]
fn relocations_of_no_effect_are_dropped() {
    let (mut elf, at) = Spec::default().elf();
    for _ in 0..10_000 {
        elf.reloc(at.patch.0, at.patch.1 + 8, 0, 0, 0);
        elf.reloc(at.text, 0, 0, 1, 0);
    }
    let payload = parse(&elf.build()).unwrap();
    let plain = parse(&Spec::default().bytes()).unwrap();
    let count = |p: &Payload| p.sections.iter().map(|s| s.relocs.len()).sum::<usize>();
    assert_eq!(count(&payload), count(&plain));
    assert_eq!(payload.klp, plain.klp);
}

#[test]
fn a_file_cut_anywhere_is_refused_and_never_panics() {
    let bytes = two_objects().bytes();
    assert!(parse(&bytes).is_ok());
    for len in 0..bytes.len() {
        assert!(parse(&bytes[..len]).is_err(), "cut at {len}");
    }
    assert!(parse(&bytes[..bytes.len() / 2])
        .unwrap_err()
        .contains("truncated"));
}

#[test]
fn a_file_with_any_byte_changed_never_panics() {
    let mut bytes = two_objects().bytes();
    for at in 0..bytes.len() {
        let old = bytes[at];
        for change in [0xff, 0x01, 0x80] {
            bytes[at] = old ^ change;
            if let Ok(payload) = parse(&bytes) {
                let _ = payload.summary();
            }
        }
        bytes[at] = old;
    }
}

#[test]
fn a_file_with_many_bytes_changed_never_panics() {
    let good = two_objects().bytes();
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut random = |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        usize::try_from(state >> 33).unwrap() % below
    };
    for _ in 0..20_000 {
        let mut bytes = good.clone();
        for _ in 0..=random(8) {
            let at = random(bytes.len());
            let values = [0, 1, 8, 0x7f, 0x80, 0xff];
            bytes[at] = values[random(values.len())];
        }
        if let Ok(payload) = parse(&bytes) {
            let _ = payload.summary();
        }
    }
}

#[test]
fn a_payload_is_read_from_a_file_and_named_in_errors() {
    let missing = Path::new("/nonexistent/payload.ko");
    let error = Payload::read(missing).unwrap_err().to_string();
    assert!(
        error.starts_with("/nonexistent/payload.ko: can't read the payload"),
        "{error}"
    );
    let error = Payload::read(Path::new("/")).unwrap_err().to_string();
    assert!(error.contains("not a regular file"), "{error}");
}

#[test]
fn a_pipe_is_no_payload_and_nobody_waits_for_it() {
    let path = std::env::temp_dir().join(format!("locus-pipe-{}", std::process::id()));
    let _ = std::fs::remove_file(&path);
    let made = std::process::Command::new("mkfifo").arg(&path).status();
    assert!(made.unwrap().success());
    let refused = [path.as_path(), "/dev/null".as_ref(), "/".as_ref()].map(|path| {
        let error = Payload::read(path).unwrap_err();
        matches!(error.kind, PayloadErrorKind::NotAFile)
    });
    std::fs::remove_file(&path).unwrap();
    assert_eq!(refused, [true; 3]);
}

#[test]
fn code_is_decoded_once_however_many_sections_relocate_it() {
    let decoded = |sections: u64, size: usize| {
        let (mut elf, _) = Spec::default().elf();
        let mut code = vec![0x90; size];
        code[..4 * 1024].fill(0);
        let code = elf.section(".text.large", CODE, &code);
        let symbol = elf.symbol(".klp.sym.vmlinux.foo,0", SHN_LIVEPATCH, 0, 0, 0);
        for n in 0..sections {
            let name = format!(".klp.rela.vmlinux.{n}");
            elf.klp_rela(&name, code, &[(4 * n, R_PC32, symbol, -4)]);
        }
        DECODED.set(0);
        parse(&elf.build()).unwrap();
        DECODED.get()
    };
    let one = decoded(1, 1 << 16);
    assert_eq!(decoded(1000, 1 << 16), one);
    assert!(decoded(1000, 1 << 17) <= 2 * one);
}

#[test]
fn late_relocations_that_overlap_are_refused() {
    let late = |offset: u64, plain: bool| {
        move |elf: &mut TestElf, at: SpecPlaces| {
            let symbol = elf.symbol(".klp.sym.vmlinux.foo,0", SHN_LIVEPATCH, 0, 0, 0);
            elf.klp_rela(".klp.rela.vmlinux.a", at.text, &[(8, R_PC32, symbol, -4)]);
            match plain {
                true => elf.reloc(at.text, offset, R_PC32, 1, -4),
                false => elf.klp_rela(".klp.rela.ext4.b", at.text, &[(offset, R_PC32, symbol, -4)]),
            }
        }
    };
    for plain in [false, true] {
        for offset in [5, 8, 11] {
            refused_if(late(offset, plain), "two overlap");
        }
        let (mut elf, at) = Spec::default().elf();
        late(12, plain)(&mut elf, at);
        assert!(parse(&elf.build()).is_ok());
    }
}

#[test]
fn a_name_that_a_relocation_makes_longer_is_refused() {
    // Behind the last name come zeroes; the relocation begins on its last byte, or on the zero that ends it.
    let changed = |back: u64, late: bool| {
        let (mut elf, at) = Spec::default().elf();
        let end = elf.data(at.strings).len() as u64;
        elf.data(at.strings).extend([0; 8]);
        let value = u64::from_le_bytes(*b"_other\0\0");
        let more = elf.symbol("more", 0xfff1, value, 0, 0);
        let klp = elf.symbol(".klp.sym.vmlinux.foo,0", SHN_LIVEPATCH, 0, 0, 0);
        match late {
            true => elf.klp_rela(
                ".klp.rela.vmlinux.x",
                at.strings,
                &[(end - back, R_64, klp, 0)],
            ),
            false => elf.reloc(at.strings, end - back, R_64, more, 0),
        }
        elf
    };
    for late in [false, true] {
        for back in [1, 2] {
            refused(
                changed(back, late),
                "old_name doesn't point at a printable name",
            );
        }
        assert!(parse(&changed(0, late).build()).is_ok());
    }
    // One that begins in front of the name and reaches into it.
    refused_if(
        |elf, at| {
            let more = elf.symbol("more", 0xfff1, 0, 0, 0);
            let start = elf.string(at.strings, "0123456789");
            let section = elf.section_symbol(at.strings);
            elf.drop_reloc(at.funcs.0, at.funcs.1);
            let name = i64::try_from(start + 4).unwrap();
            elf.reloc(at.funcs.0, at.funcs.1, R_64, section, name);
            elf.reloc(at.strings, start, R_64, more, 0);
        },
        "old_name doesn't point at a printable name",
    );
}
