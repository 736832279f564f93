use locus_guest::addr::Range;
use locus_guest::budget::Budget;

use super::names::{find_names, SYMBOLS_MIN};
use super::*;
use crate::fixture::{vcpus, Fixture, Tables, ENTRY, KIND, TEXT};
use crate::Kernel;

#[test]
fn symbols_are_read_in_every_order_and_encoding_of_the_tables() {
    for tables in Tables::ALL {
        let mut fixture = Fixture::new();
        fixture.tables = tables;
        let long = "a_very_long_name_".repeat(12);
        fixture.function(TEXT.0 + 0x200, "twice", &[0xc3]);
        fixture.function(TEXT.0 + 0x300, "twice", &[0xc3]);
        fixture.function(TEXT.0 + 0x340, &long, &[0xc3]);
        if tables.has_absolute() {
            fixture.symbols.push((0x4000, 'A', "per_cpu".into()));
        }
        let memory = fixture.build();
        let kernel = Kernel::read(&memory, KIND, &vcpus()).unwrap();
        let symbols = &kernel.symbols;
        assert_eq!(kernel.release, "6.1.0-test", "{tables:?}");
        let is_there = |name| symbols.places.iter().any(|(found, _)| found == name);
        let whole = matches!(tables, Tables::OldWhole | Tables::NewWhole);
        assert_eq!(is_there("kallsyms_addresses"), whole, "{tables:?}");
        assert_eq!(is_there("kallsyms_offsets"), !whole, "{tables:?}");
        assert_eq!(symbols.addr("entry"), Some(ENTRY));
        assert_eq!(symbols.all("twice").count(), 2);
        assert_eq!(symbols.addr(&long), Some(TEXT.plus(0x340)));
        assert_eq!(symbols.room(TEXT.plus(0x200)), Some(0x100));
        assert_eq!(
            symbols.covering(TEXT.plus(0x305)),
            Some(("twice".into(), 5))
        );
        if tables.has_absolute() {
            assert_eq!(symbols.addr("per_cpu"), Some(Gva(0x4000)));
        }
        assert_eq!(kernel.function("twice", 2).unwrap(), TEXT.plus(0x300));
        assert!(kernel.function("twice", 0).is_err());
        assert!(kernel.function("twice", 3).is_err());
    }
}

#[test]
fn tokens_are_found_behind_a_sequence_that_leaves_no_room_for_padding() {
    for more in 0..16 {
        let mut fixture = Fixture::new();
        fixture.tables = Tables::OldWithSequence;
        for n in 0..more {
            fixture.function(TEXT.0 + 0x200 + n, &format!("more_{n}"), &[0xc3]);
        }
        let kernel = fixture.build();
        let kernel = Kernel::read(&kernel, KIND, &vcpus());
        assert!(kernel.is_ok(), "{more}");
    }
}

#[test]
fn a_table_whose_addresses_disagree_with_the_anchors_is_not_believed() {
    let memory = Fixture::new().build();
    let mut vcpus = vcpus();
    vcpus[0].entry = Some(ENTRY.plus(1));
    let error = Kernel::read(&memory, KIND, &vcpus).unwrap_err();
    assert!(matches!(error, Error::NotLinux(_)), "{error}");
}

#[test]
fn a_guest_in_its_firmware_is_not_ready() {
    let memory = Fixture::new().build();
    for change in [
        |v: &mut locus_guest::Vcpu| v.long_mode = false,
        |v: &mut locus_guest::Vcpu| v.entry = None,
    ] {
        let mut vcpus = vcpus();
        change(&mut vcpus[0]);
        let error = Kernel::read(&memory, KIND, &vcpus).unwrap_err();
        assert!(matches!(error, Error::NotReady(_)), "{error}");
    }
}

#[test]
fn damaged_tables_are_refused_or_harmless() {
    let symbols: Vec<_> = (0..1500)
        .map(|i| (TEXT.0 + i, 't', format!("s{i}")))
        .collect();
    let at = crate::fixture::RODATA;
    let good =
        [Tables::New, Tables::Packed].map(|tables| crate::fixture::kallsyms(at, &symbols, tables));
    for step in 0..400 {
        let mut bad = good[step % 2].clone();
        let place = step * 7919 % bad.len();
        bad[place] ^= 1 << (step % 8);
        let memory = locus_guest::mock::MockMemory::new();
        memory.map_bytes(at, &bad, false, false);
        let space = Space::new(&memory, locus_guest::mock::ROOT, 4);
        let range = Range {
            start: at,
            end: at.plus(1 << 20),
        };
        let regions = space.regions(range);
        let _ = read(
            &space,
            &regions,
            Anchors {
                text_base: TEXT,
                second: SecondAnchor::Entry(TEXT),
            },
        );
    }
}

#[test]
fn counts_that_fit_no_names_are_paid_for() {
    // Each word is a count, and the first "name" behind it has no length: 0 and zeroes.
    let data: Vec<u8> = SYMBOLS_MIN.to_le_bytes().repeat(4096);
    let data = [data, vec![0; 64]].concat();
    let budget = Budget::of(1 << 20);
    assert!(find_names(&data, data.len(), &budget).unwrap().is_none());
    let scanned = budget.spent();
    assert!(scanned >= 2 * 4096, "{scanned}");
    let budget = Budget::of(4096);
    assert!(find_names(&data, data.len(), &budget).is_err());
}

#[test]
fn the_digits_are_found_wherever_they_stand() {
    for at in 0..64 {
        let mut data = vec![b'x'; 96];
        data[at..at + DIGITS.len()].copy_from_slice(DIGITS);
        for from in (0..=at).step_by(8) {
            assert_eq!(find_digits(&data, from), [at], "from {from}");
        }
        data[at + 9] = b'x';
        assert!(find_digits(&data, 0).is_empty());
    }
}

#[test]
fn symbols_move_with_the_text_and_per_cpu_offsets_stay() {
    let mut fixture = Fixture::new();
    fixture.function(TEXT.0 + 0x200, "first", &[0xc3]);
    fixture.symbols.push((0x4000, 'A', "per_cpu".into()));
    let memory = fixture.build();
    let kernel = Kernel::read(&memory, KIND, &vcpus()).unwrap();
    let mut symbols = kernel.symbols.clone();
    symbols.slide(0x20_0000);
    assert_eq!(symbols.addr("entry"), Some(ENTRY.plus(0x20_0000)));
    assert_eq!(symbols.addr("per_cpu"), Some(Gva(0x4000)));
    assert_eq!(
        symbols.covering(TEXT.plus(0x20_0200)),
        Some(("first".into(), 0))
    );
}

/// The addresses that [`Symbols::cold_parts`] finds for the function at `entry` if a guest has also these symbols.
fn cold(more: impl IntoIterator<Item = (u64, String)>, entry: u64) -> Result<Vec<u64>, Error> {
    let mut fixture = Fixture::new();
    let more = more.into_iter().map(|(at, name)| (TEXT.0 + at, 't', name));
    fixture.symbols.extend(more);
    let memory = fixture.build();
    let kernel = Kernel::read(&memory, KIND, &vcpus()).unwrap();
    let found = kernel.symbols.cold_parts(TEXT.plus(entry))?;
    Ok(found.into_iter().map(|at| at.0 - TEXT.0).collect())
}

#[test]
fn parts_of_a_function_are_found_by_each_of_its_names() {
    let named = |all: &[(u64, &str)]| -> Vec<(u64, String)> {
        all.iter().map(|&(at, name)| (at, name.into())).collect()
    };
    let symbols = named(&[
        (0x1200, "f"),
        (0x1200, "g"),
        (0x1300, "ff"),
        (0x1480, "g.cold"),
        (0x1400, "f.cold"),
        (0x1400, "g.cold"),
        (0x1500, "ff.cold"),
        (0x1600, "f.isra.0.cold"),
        // Where a compiler does not number them, this is none.
        (0x1700, "f.cold.7"),
    ]);
    assert_eq!(cold(symbols.clone(), 0x1200).unwrap(), [0x1400, 0x1480]);
    assert_eq!(cold(symbols.clone(), 0x1300).unwrap(), [0x1500]);
    assert_eq!(cold(symbols, 0x1400).unwrap(), [0; 0]);
    let numbered = named(&[
        (0x1200, "f"),
        (0x1300, "ff"),
        (0x1400, "f.cold.7"),
        (0x1500, "ff.cold.8"),
    ]);
    assert_eq!(cold(numbered, 0x1200).unwrap(), [0x1400]);
}

#[test]
fn names_that_a_guest_forged_do_not_multiply() {
    // As many pairs as would take gigabytes.
    let names = |n: u64| (0x1200, format!("f{}", n % 16));
    let parts = |n: u64| (0x1300 + n % 64, format!("f{}.cold", n % 16));
    let forged = (0..50_000).map(names).chain((0..50_000).map(parts));
    let expected: Vec<u64> = (0x1300..0x1340).collect();
    assert_eq!(cold(forged, 0x1200).unwrap(), expected);
    // Numbered, all at one address.
    let forged = (0..50_000).map(|n| (0x1200, format!("f{}.cold.{n}", n % 16)));
    assert!(cold(forged, 0x1200).is_err());
    for (count, is_much) in [(256, false), (257, true)] {
        let found = cold((0..count).map(|n| (0x1200, format!("f{n}"))), 0x1200);
        assert_eq!(found.is_err(), is_much, "{count} names");
    }
    for (count, is_much) in [(64, false), (65, true)] {
        let parts = (0..count).map(|n| (0x1300 + n, "f.cold".to_owned()));
        let found = cold(parts.chain([(0x1200, "f".to_owned())]), 0x1200);
        assert_eq!(found.is_err(), is_much, "{count} parts");
        if let Err(error) = found {
            assert!(error.to_string().contains("at most 64"), "{error}");
        }
    }
}

#[test]
fn the_next_symbol_is_the_same_however_often_it_is_asked_for() {
    let kernel = Fixture::new().build();
    let kernel = Kernel::read(&kernel, KIND, &vcpus()).unwrap();
    let room = kernel.symbols.room(ENTRY);
    assert!(room.is_some());
    for _ in 0..40 {
        assert_eq!(kernel.symbols.room(ENTRY), room);
    }
}
