//! Symbols that a guest's module forged.

use super::*;

#[test]
fn names_that_a_module_forged_do_not_multiply() {
    let symbol = |name: String, at: u64| ModuleSymbol {
        name,
        kind: 't',
        addr: Gva(at),
        global: false,
    };
    with(&modules(), |kernel| {
        let objects = GuestSymbols::new(kernel, Vec::new());
        let Object::Module(module, _) = objects.object(Some("first")).unwrap() else {
            panic!("it is a module")
        };
        let cold =
            |symbols: &[ModuleSymbol]| Object::Module(module, symbols).cold_parts(kernel, Gva(1));
        // As many pairs as would take a minute.
        let names = (0..100_000).map(|n| symbol(format!("f{}", n % 200), 1));
        let parts = (0..100_000).map(|n| symbol(format!("f{}.cold", n % 200), 2 + n % 64));
        let forged: Vec<_> = names.chain(parts).collect();
        let expected: Vec<Gva> = (2..66).map(Gva).collect();
        assert_eq!(cold(&forged).unwrap(), expected);
        for more in [symbol("f0.cold.1".into(), 66), symbol("f200".into(), 1)] {
            let mut forged = forged.clone();
            let many = (0..57).map(|n| symbol(format!("{}{n}", more.name), more.addr.0));
            forged.extend(many);
            let (exit, said) = refusal(cold(&forged));
            assert_eq!(exit, ExitCode::NotApplicable);
            assert!(said.contains("expected at most"), "{said}");
        }
        // Each function is paid for.
        let budget = kernel.space.budget();
        let before = budget.spent();
        cold(&forged).unwrap();
        // So is the room of its 64 parts.
        assert!(budget.spent() - before >= 65 * (forged.len() as u64 / PER_UNIT));
        budget.spend(budget.limit()).unwrap_err();
        let (_, said) = refusal(cold(&forged));
        assert!(said.contains("given up"), "{said}");
    });
}
