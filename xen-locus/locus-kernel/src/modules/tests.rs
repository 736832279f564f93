#![allow(clippy::cast_possible_truncation)] // small addresses

use super::sample::{data, guest, split, Age, Data, DATA, LEN, STEP};
use super::*;
use crate::fixture::{vcpus, KIND};

#[test]
fn modules_are_what_proc_modules_says_in_both_layouts() {
    for age in [Age::Old, Age::New] {
        let memory = guest(age, &data(age));
        let kernel = Kernel::read(&memory, KIND, &vcpus()).unwrap();
        let all = ModuleReader::new(&kernel).unwrap().all().unwrap();
        let names: Vec<&str> = all.iter().map(|m| m.name.as_str()).collect();
        assert_eq!(names, ["second", "first"]);
        let (second, first) = (&all[0], &all[1]);
        assert_eq!(
            (first.state, second.state),
            (ModuleState::Live, ModuleState::Loading)
        );
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
    let all = ModuleReader::new(&kernel)
        .unwrap()
        .each(|reader, module| reader.symbols(module))
        .unwrap();
    let symbol = |name: &str, kind, at| ModuleSymbol {
        name: name.into(),
        kind,
        addr: Gva(at),
        global: false,
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
fn names_of_symbols_have_nothing_that_a_terminal_obeys() {
    let mut d = data(Age::New);
    // In place of `own`.
    d.set(DATA + 0x505, b"\x1b\xc3 ");
    let memory = guest(Age::New, &d);
    let kernel = Kernel::read(&memory, KIND, &vcpus()).unwrap();
    let all = ModuleReader::new(&kernel)
        .unwrap()
        .each(|reader, module| reader.symbols(module))
        .unwrap();
    let names: Vec<&str> = all[1].iter().map(|symbol| &*symbol.name).collect();
    assert_eq!(names.len(), 2);
    assert!(names.contains(&"pub"), "{names:?}");
    let is_plain = |name: &&str| name.chars().all(|c| c.is_ascii_graphic());
    assert!(names.iter().all(is_plain), "{names:?}");
    assert!(names.iter().any(|name| name.starts_with('?')), "{names:?}");
}

#[test]
fn types_of_a_module_stand_on_those_of_the_kernel() {
    let memory = guest(Age::New, &data(Age::New));
    let kernel = Kernel::read(&memory, KIND, &vcpus()).unwrap();
    let all = ModuleReader::new(&kernel)
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
    assert_eq!(ModuleReader::new(&kernel).unwrap().all().unwrap().len(), 1);
}

/// Everything that is read of modules.
fn read_all(kernel: &Kernel<'_>) -> Result<(), Error> {
    ModuleReader::new(kernel)?.each(|reader, module| {
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
    d.word(first + 0x200, DATA + LEN as u64);
    d.word(first + 0x208, 100_000);
    let memory = guest(Age::New, &d);
    memory.map_bytes(Gva(DATA + LEN as u64), &vec![0; 4 << 20], true, false);
    let kernel = Kernel::read(&memory, KIND, &vcpus()).unwrap();
    let reader = ModuleReader::new(&kernel).unwrap();
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
