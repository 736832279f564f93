//! A guest with many exports at one place, and many names for it.

use locus_guest::budget::Budget;
use locus_kernel::btf::blob::Blob;
use locus_kernel::fixture::{renewed, vcpus, Fixture, KIND, TEXT};

use super::*;
use crate::target::symbols::GuestSymbols;

#[test]
fn each_export_of_a_place_is_looked_at_once_and_paid_for() {
    const NAMES: u64 = 1000;
    const EXPORTS: u64 = 50_000;
    const NAME: &str = "module_layout";
    let mut types = Blob::with_integers();
    // The members lie over each other, so that a table has room for many.
    let members = [("value_offset", 3, 0), ("name_offset", 3, 0)];
    types.structure("kernel_symbol", 4, &members);
    let code = TEXT.0 + 0x1000;
    let tables = Gva(TEXT.0 + (16 << 20));
    let mut fixture = Fixture::new();
    for _ in 0..NAMES {
        fixture.symbols.push((code, 't', NAME.to_owned()));
    }
    let ends = [(0, "__start___ksymtab"), (4 * EXPORTS, "__stop___ksymtab")];
    for (offset, name) in ends {
        fixture
            .symbols
            .push((tables.plus(offset).0, 'D', name.into()));
    }
    let memory = fixture.build();
    let distance = |i| code.wrapping_sub(tables.0 + 4 * i).to_le_bytes();
    let bytes: Vec<u8> = (0..EXPORTS)
        .flat_map(|i| distance(i).into_iter().take(4))
        .collect();
    memory.map_bytes(tables, &bytes, false, false);
    let kernel = Kernel::read(&memory, KIND, &vcpus()).unwrap();
    let kernel = renewed(&kernel, &types.bytes(), Budget::default()).unwrap();
    let all = Exports::read(&kernel).unwrap();
    let budget = kernel.space.budget();
    let before = budget.spent();
    assert_eq!(all.crc(&kernel, NAME).unwrap(), None);
    assert!((EXPORTS..EXPORTS + NAMES).contains(&(budget.spent() - before)));
    budget
        .spend(budget.limit() - budget.spent() - EXPORTS / 2)
        .unwrap();
    let error = all.crc(&kernel, NAME).unwrap_err();
    assert!(error.to_string().contains("costs more"), "{error}");
}

#[test]
fn a_table_in_a_form_that_is_not_known_is_no_kernel_without_exports() {
    let exported = |symbols: &[&str]| {
        let mut fixture = Fixture::new();
        for (name, at) in symbols.iter().zip(TEXT.0 + (16 << 20)..) {
            fixture.symbols.push((at, 'D', (*name).to_owned()));
        }
        let memory = fixture.build();
        let kernel = Kernel::read(&memory, KIND, &vcpus()).unwrap();
        let mut types = Blob::with_integers();
        types.structure("kernel_symbol", 4, &[("value_offset", 3, 0)]);
        let kernel = renewed(&kernel, &types.bytes(), Budget::default()).unwrap();
        let symbols = GuestSymbols::new(&kernel, Vec::new());
        let exported = symbols.exported();
        exported.map(|all| all.is_some()).map_err(|e| e.to_string())
    };
    assert_eq!(exported(&[]), Ok(false));
    let error = exported(&[TABLE, "__stop___ksymtab"]).unwrap_err();
    assert!(error.contains("name_offset"), "{error}");
}
