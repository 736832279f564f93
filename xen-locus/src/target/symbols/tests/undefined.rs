//! Tests of symbols that both the kernel and a module may have.

use locus_guest::budget::Budget;
use locus_guest::mock::MockMemory;
use locus_kernel::fixture::renewed;
use locus_payload::{SymKind, SymSection};

use super::*;

#[test]
fn a_weak_symbol_is_only_what_is_exported() {
    let asked = |exported: bool, name: &str| {
        let memory = kernel_and_module_with_pub(exported);
        let kernel = Kernel::read(&memory, KIND, &vcpus()).unwrap();
        let symbol = ElfSymbol {
            index: 1,
            name: name.into(),
            value: 0,
            size: 0,
            section: SymSection::Undefined,
            binding: Binding::Weak,
            kind: SymKind::NoType,
            klp: None,
        };
        GuestSymbols::new(&kernel, Vec::new()).unresolved(&symbol)
    };
    // Functions of single files of the kernel, by one and by two of that name.
    assert_eq!(asked(false, "own").unwrap(), None);
    assert_eq!(asked(false, "twice").unwrap(), None);
    assert_eq!(asked(false, "none").unwrap(), None);
    let of_module = Some(Gva(CODE[0] + PUB));
    assert_eq!(asked(false, "pub").unwrap(), of_module);
    assert_eq!(asked(true, "pub").unwrap(), Some(Gva(TEXT.0 + 0x1000)));
}

/// Memory in which `pub` is exported by the first module, and `own` by none, and the kernel has both.
fn kernel_and_module_with_pub(exported: bool) -> MockMemory {
    kernel_with_namesakes(exported, 0)
}

/// The same with so many others in the kernel that are called `pub`, and are not exported.
fn kernel_with_namesakes(exported: bool, namesakes: usize) -> MockMemory {
    let mut fixture = fixture(Age::New);
    let at = TEXT.0 + 0x1000;
    let other = (at + 32, 't', "pub".to_owned());
    fixture
        .symbols
        .extend(std::iter::repeat_n(other, namesakes));
    fixture.function(at, "pub", &[0xc3]);
    fixture.function(at + 16, "own", &[0xc3]);
    let table = DATA + 2 * STEP + 0xf00;
    fixture
        .symbols
        .push((table, 'd', "__start___ksymtab".into()));
    fixture
        .symbols
        .push((table + 12, 'd', "__stop___ksymtab".into()));
    let mut d = modules();
    if exported {
        d.set(table, &at.wrapping_sub(table).to_le_bytes()[..4]);
    }
    let memory = fixture.build();
    memory.map_bytes(Gva(DATA), &d.0, true, false);
    memory
}

#[test]
fn many_references_to_a_name_that_many_symbols_have_are_paid_for() {
    let memory = kernel_with_namesakes(true, 20_000);
    let kernel = Kernel::read(&memory, KIND, &vcpus()).unwrap();
    for binding in [Binding::Global, Binding::Weak] {
        let symbol = ElfSymbol {
            index: 1,
            name: "pub".into(),
            value: 0,
            size: 0,
            section: SymSection::Undefined,
            binding,
            kind: SymKind::NoType,
            klp: None,
        };
        let kernel = renewed(&kernel, &[], Budget::of(300_000)).unwrap();
        let symbols = GuestSymbols::new(&kernel, Vec::new());
        let found = (0..20).map_while(|_| symbols.unresolved(&symbol).ok());
        let found: Vec<Option<Gva>> = found.collect();
        // 25,000 units each time, and never an answer that is only for want of budget.
        assert!((5..12).contains(&found.len()), "{found:?}");
        assert!(found.iter().all(|at| *at == Some(Gva(TEXT.0 + 0x1000))));
        let error = symbols.unresolved(&symbol).unwrap_err();
        assert!(error.to_string().contains("costs more"), "{error}");
        assert!(
            symbols.exported().is_ok_and(|all| all.is_some()),
            "it was read before"
        );
        assert!(GuestSymbols::new(&kernel, Vec::new()).exported().is_err());
    }
}

#[test]
fn a_symbol_that_the_kernel_keeps_to_itself_and_a_module_exports_is_refused() {
    let asked = |exported: bool, name: &str| {
        let memory = kernel_and_module_with_pub(exported);
        let kernel = Kernel::read(&memory, KIND, &vcpus()).unwrap();
        GuestSymbols::new(&kernel, Vec::new()).undefined(name)
    };
    let (exit, said) = refusal(asked(false, "pub"));
    assert_eq!(exit, ExitCode::NotApplicable);
    let both = format!("kernel at {}", Gva(TEXT.0 + 0x1000));
    assert!(
        said.contains(&both) && said.contains("module first exports"),
        "{said}"
    );
    let kernels = Some(Gva(TEXT.0 + 0x1000));
    assert_eq!(asked(true, "pub").unwrap(), kernels);
    assert_eq!(asked(false, "own").unwrap(), Some(Gva(TEXT.0 + 0x1010)));
}
