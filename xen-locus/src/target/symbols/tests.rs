use locus_guest::addr::PAGE_LEN;
use locus_kernel::fixture::{vcpus, KIND, TEXT};
use locus_kernel::modules::sample::{data, fixture, Age, Data, DATA, LEN, STEP};

use super::*;
use crate::arena::digests::CodeDigests;
use crate::error::ExitCode;
use crate::target::kprobes::Kprobes;
use crate::target::redirect;

mod forged;
mod undefined;

/// Text of the sample's first module, which is live, and of its second, which is loading.
const CODE: [u64; 2] = [0xffff_ffff_c100_0000, 0xffff_ffff_c101_0000];
/// Offsets of `pub` and `own` in the text of each.
const PUB: u64 = 0x10;
const OWN: u64 = 0x40;
/// A nop of ftrace, `mov $42, %eax`, `ret`.
const FUNCTION: [u8; 11] = [0x0f, 0x1f, 0x44, 0, 0, 0xb8, 0x2a, 0, 0, 0, 0xc3];

/// The sample guest, its symbols moved into its modules' text.
fn modules() -> Data {
    let mut d = data(Age::New);
    for (n, text) in (0..).zip(CODE) {
        let at = DATA + n * STEP;
        for (i, offset) in [(1, PUB), (2, OWN)] {
            let symbol = at + 0x400 + 24 * i;
            d.set(symbol + 4, &[0x10]);
            d.word(symbol + 8, text + offset);
        }
        let distance = (text + PUB).wrapping_sub(at + 0x300);
        d.set(at + 0x300, &distance.to_le_bytes()[..4]);
    }
    let locks = DATA + 2 * STEP + 0x400;
    d.word(locks, locks);
    // The second has names of its own, and is live.
    d.set(DATA + STEP + 0x500, b"\0pu2\0own\0");
    d.set(DATA + STEP, &0u32.to_le_bytes());
    d
}

#[test]
fn what_the_kernel_freed_is_not_referred_to_but_per_cpu_variables_are() {
    let mut fixture = fixture(Age::New);
    let at = TEXT.0 + 0x4000;
    for (offset, name) in [
        (0, "__init_begin"),
        (0x10, "set_up_once"),
        (0x100, "__per_cpu_start"),
        (0x110, "cpu_counter"),
        (0x200, "__per_cpu_end"),
        (0x210, "set_up_twice"),
        (0x300, "__init_end"),
        (0x310, "stays"),
    ] {
        fixture.symbols.push((at + offset, 'd', name.into()));
    }
    let memory = fixture.build();
    memory.map_bytes(Gva(DATA), &modules().0, true, false);
    let kernel = Kernel::read(&memory, KIND, &vcpus()).unwrap();
    let objects = GuestSymbols::new(&kernel, Vec::new());
    for name in ["set_up_once", "set_up_twice"] {
        for result in [
            objects.undefined(name).map(Option::unwrap),
            objects.reference(Some(VMLINUX), name, 1),
        ] {
            let (exit, said) = refusal(result);
            assert_eq!(exit, ExitCode::NotApplicable);
            assert!(
                said.contains(name) && said.contains("__init memory"),
                "{said}"
            );
        }
    }
    for (name, offset) in [("cpu_counter", 0x110), ("stays", 0x310)] {
        assert_eq!(objects.undefined(name).unwrap(), Some(Gva(at + offset)));
        assert!(objects.reference(None, name, 0).is_ok());
    }
}

/// What `f` makes of the guest with `d` as its modules' memory.
fn with<T>(d: &Data, f: impl FnOnce(&Kernel<'_>) -> T) -> T {
    let mut fixture = fixture(Age::New);
    fixture.function(TEXT.0 + 0x1000, "in_kernel", &[0xc3]);
    fixture.function(TEXT.0 + 0x1010, "twice", &[0xc3]);
    fixture.function(TEXT.0 + 0x1020, "twice", &[0xc3]);
    let locks = DATA + 2 * STEP + 0x400;
    fixture.symbols.push((locks, 'd', "smp_alt_modules".into()));
    let memory = fixture.build();
    memory.map_bytes(Gva(DATA), &d.0, true, false);
    for text in CODE {
        let mut code = vec![0xcc; 3 * PAGE_LEN];
        code[0x40..0x4b].copy_from_slice(&FUNCTION);
        memory.map_bytes(Gva(text), &code, false, true);
    }
    let kernel = Kernel::read(&memory, KIND, &vcpus()).unwrap();
    f(&kernel)
}

fn refusal<T: std::fmt::Debug>(result: Result<T>) -> (ExitCode, String) {
    let error = result.unwrap_err();
    (error.exit_code(), error.to_string())
}

#[test]
fn functions_of_modules_are_found_and_examined_in_their_own_module() {
    with(&modules(), |kernel| {
        let objects = GuestSymbols::new(kernel, Vec::new());
        let at = objects.symbol(Some("first"), "own", 0).unwrap();
        assert_eq!(at, Gva(CODE[0] + OWN));
        assert_eq!(
            objects.symbol(Some("second"), "own", 1).unwrap(),
            Gva(CODE[1] + OWN)
        );
        let owner = objects.object(Some("first")).unwrap();
        let function =
            redirect::examine(kernel, owner, "own", at, None, &Kprobes::default()).unwrap();
        assert_eq!(function.site.at, at.plus(5));
        // The next symbol's room ends with the memory of the module's text.
        assert_eq!(owner.room(kernel, Gva(CODE[0] + PUB)), OWN - PUB);
        assert_eq!(owner.room(kernel, at), 0x3000 - OWN);
        let used: Vec<_> = objects.used().unwrap().iter().map(|m| m.addr).collect();
        assert_eq!(used, [Gva(DATA + STEP), Gva(DATA)]);
        // Data of the module, and text of another.
        for (at, owner) in [(0xffff_ffff_c200_0000, "first"), (CODE[1] + OWN, "first")] {
            let owner = objects.object(Some(owner)).unwrap();
            let (exit, said) = refusal(redirect::examine(
                kernel,
                owner,
                "own",
                Gva(at),
                None,
                &Kprobes::default(),
            ));
            assert!(
                exit == ExitCode::NotApplicable || exit == ExitCode::Failed,
                "{said}"
            );
        }
    });
}

#[test]
fn positions_count_within_the_module_in_the_order_of_its_table() {
    let mut d = modules();
    // Both symbols of the first module are called `pub`.
    d.set(DATA + 0x400 + 48, &1u32.to_le_bytes());
    with(&d, |kernel| {
        let objects = GuestSymbols::new(kernel, Vec::new());
        let symbol = |sympos| objects.symbol(Some("first"), "pub", sympos);
        assert_eq!(symbol(1).unwrap(), Gva(CODE[0] + PUB));
        assert_eq!(symbol(2).unwrap(), Gva(CODE[0] + OWN));
        for (sympos, words) in [(0, "does not say which"), (3, "number 3: it has 2")] {
            let (exit, said) = refusal(symbol(sympos));
            assert_eq!(exit, ExitCode::NotApplicable);
            assert!(said.contains(words), "{said}");
        }
    });
}

#[test]
fn a_module_that_is_not_there_or_not_live_is_named() {
    let mut d = modules();
    d.set(DATA + STEP, &1u32.to_le_bytes());
    with(&d, |kernel| {
        let objects = GuestSymbols::new(kernel, Vec::new());
        for (object, name, exit, words) in [
            ("ext4", "x", ExitCode::NotApplicable, "modprobe ext4"),
            ("second", "own", ExitCode::TryAgain, "is loading"),
            (
                "first",
                "none",
                ExitCode::NotApplicable,
                "module first has no symbol none",
            ),
            (VMLINUX, "none", ExitCode::NotApplicable, "no symbol none"),
        ] {
            let (found, said) = refusal(objects.symbol(Some(object), name, 0));
            assert_eq!(found, exit, "{said}");
            assert!(said.contains(words), "{said}");
        }
        assert!(objects.object(Some("ext4")).is_err());
        assert!(objects.used().unwrap().is_empty());
    });
}

#[test]
fn undefined_symbols_are_the_kernels_then_those_that_one_module_exports() {
    with(&modules(), |kernel| {
        let objects = GuestSymbols::new(kernel, Vec::new());
        let kernels = objects.undefined("in_kernel").unwrap();
        assert_eq!(kernels, Some(Gva(TEXT.0 + 0x1000)));
        assert!(objects.used().unwrap().is_empty());
        assert_eq!(objects.undefined("pub").unwrap(), Some(Gva(CODE[0] + PUB)));
        let used: Vec<_> = objects
            .used()
            .unwrap()
            .iter()
            .map(|m| m.name.clone())
            .collect();
        assert_eq!(used, ["first"]);
        // Not exported, so other modules may not use it; and nowhere at all.
        assert_eq!(objects.undefined("own").unwrap(), None);
        assert_eq!(objects.undefined("none").unwrap(), None);
        let (exit, said) = refusal(objects.undefined("twice"));
        assert_eq!(exit, ExitCode::NotApplicable);
        assert!(
            said.starts_with("2 symbols of the kernel are called twice")
                && said.contains("a number from 1 to 2"),
            "{said}"
        );
    });
    let mut both = modules();
    both.set(DATA + STEP + 0x500, b"\0pub\0own\0");
    with(&both, |kernel| {
        let (exit, said) = refusal(GuestSymbols::new(kernel, Vec::new()).undefined("pub"));
        assert_eq!(exit, ExitCode::NotApplicable);
        assert!(said.contains("several modules: second, first"), "{said}");
    });
}

#[test]
fn places_that_the_kernel_rewrites_in_a_module_are_left_alone() {
    // The module's jump entry, and a lock prefix of it, stand at its function's `mov`.
    let site = CODE[0] + OWN + 5;
    let distance = |from: u64, to: u64| to.wrapping_sub(from).to_le_bytes()[..4].to_vec();
    let table = DATA + 0x900;
    for (to, refused) in [(site, true), (site + 4, true), (site + 5, false)] {
        let mut d = modules();
        d.word(DATA + 152, table);
        d.set(DATA + 160, &1u32.to_le_bytes());
        d.set(table, &distance(table, to));
        let found = with(&d, |kernel| {
            let objects = GuestSymbols::new(kernel, Vec::new());
            let owner = objects.object(Some("first")).unwrap();
            redirect::examine(
                kernel,
                owner,
                "own",
                Gva(CODE[0] + OWN),
                None,
                &Kprobes::default(),
            )
            .map_err(|e| e.to_string())
        });
        match found {
            Ok(_) => assert!(!refused, "{to:#x}"),
            Err(said) => assert!(refused && said.contains("jump label"), "{said}"),
        }
    }
    let mut d = modules();
    let (locks, head) = (DATA + 0x980, DATA + 2 * STEP + 0x400);
    for (at, value) in [
        (head, locks + 24),
        (locks, DATA),
        (locks + 8, table),
        (locks + 16, table + 4),
        (locks + 24, head),
    ] {
        d.word(at, value);
    }
    d.set(table, &distance(table, site));
    with(&d, |kernel| {
        let objects = GuestSymbols::new(kernel, Vec::new());
        let owner = objects.object(Some("first")).unwrap();
        let (exit, said) = refusal(redirect::examine(
            kernel,
            owner,
            "own",
            Gva(CODE[0] + OWN),
            None,
            &Kprobes::default(),
        ));
        assert_eq!(exit, ExitCode::NotApplicable);
        assert!(said.contains("lock prefix"), "{said}");
        let other = objects.object(Some("second")).unwrap();
        assert!(redirect::examine(
            kernel,
            other,
            "own",
            Gva(CODE[1] + OWN),
            None,
            &Kprobes::default()
        )
        .is_ok());
    });
}

#[test]
fn a_module_that_went_or_came_back_elsewhere_is_noticed() {
    use crate::arena::record::{ModuleAt, Record};
    use crate::target::modules_present;
    let record = |name: &str, at: u64, base: u64| Record {
        schema: 1,
        name: "fix".into(),
        sha256: String::new(),
        description: String::new(),
        cves: Vec::new(),
        functions: Vec::new(),
        text: (Gva(0), 0),
        code: CodeDigests::default(),
        rodata_len: 0,
        rodata_sha256: String::new(),
        module: Gva(0),
        objects: vec![ModuleAt {
            name: name.into(),
            at: Gva(at),
            base: Gva(base),
        }],
        entry_only: false,
        record_room: None,
        uses: Some(Vec::new()),
        nudge: None,
    };
    with(&modules(), |kernel| {
        let gone = |record: &Record| {
            modules_present::gone(kernel, record)
                .unwrap()
                .unwrap_or_default()
        };
        assert_eq!(gone(&record("first", DATA, CODE[0])), "");
        let said = gone(&record("ext4", DATA, CODE[0]));
        assert!(
            said.contains("module ext4") && said.contains("not loaded any more"),
            "{said}"
        );
        for moved in [
            record("first", DATA, CODE[0] + 0x1000),
            record("first", DATA + STEP, CODE[0]),
        ] {
            assert!(gone(&moved).contains("was loaded again"), "{moved:?}");
        }
        // What is compared in the pause: state, name, place.
        let there = record("first", DATA, CODE[0]).objects;
        let conditions = modules_present::conditions(kernel, &there).unwrap();
        let expected: Vec<(u64, Vec<u8>)> = vec![
            (DATA, vec![0; 4]),
            (DATA + 24, b"first\0".to_vec()),
            (DATA + 120, CODE[0].to_le_bytes().to_vec()),
        ];
        let found: Vec<_> = conditions
            .iter()
            .map(|w| (w.at.0, w.expect.clone()))
            .collect();
        assert_eq!(found, expected);
        assert!(conditions.iter().all(|w| w.expect == w.new));
    });
}

/// Moves both modules into the arena: payloads that were applied, the second last.
fn payloads(d: &Data) -> Vec<u8> {
    let by = arena::BASE.0.wrapping_sub(DATA);
    let mut moved = d.0.clone();
    for word in moved.chunks_exact_mut(8) {
        let value = u64::from_le_bytes(word.try_into().unwrap());
        if (DATA..DATA + LEN as u64).contains(&value) {
            word.copy_from_slice(&value.wrapping_add(by).to_le_bytes());
        }
    }
    moved
}

#[test]
fn global_symbols_of_applied_payloads_come_last_the_newest_first() {
    let mut d = modules();
    for n in 0..2 {
        // Nothing is exported. `own` is global in both; `pub` is local to the first.
        d.word(DATA + n * STEP + 48, 0);
    }
    d.set(DATA + 0x400 + 24 + 4, &[0]);
    let mut fixture = fixture(Age::New);
    for (_, kind, name) in &mut fixture.symbols {
        if *kind == 'd' {
            assert!(name == "modules" || name == "btf_modules");
        }
    }
    for symbol in fixture.symbols.iter_mut().filter(|s| s.1 == 'd') {
        symbol.0 = symbol.0.wrapping_sub(DATA).wrapping_add(arena::BASE.0);
    }
    let memory = fixture.build();
    memory.map_bytes(arena::BASE, &payloads(&d), true, false);
    let kernel = Kernel::read(&memory, KIND, &vcpus()).unwrap();
    // What counts is who was applied last, not the order of the guest's list, in which those that are
    // undone go on to stand.
    let [first, second] = [arena::BASE, arena::BASE.plus(STEP)];
    for (applied, name, found) in [
        (vec![second, first], "own", Some((CODE[1] + OWN, "second"))),
        (vec![first, second], "own", Some((CODE[0] + OWN, "first"))),
        (vec![first], "own", Some((CODE[0] + OWN, "first"))),
        (vec![second, first], "pub", None),
        (vec![], "own", None),
    ] {
        let objects = GuestSymbols::new(&kernel, applied);
        let at = objects.undefined(name).unwrap();
        assert_eq!(at, found.map(|(at, _)| Gva(at)));
        let used = objects.used().unwrap();
        let used: Vec<&str> = used.iter().map(|m| m.name.as_str()).collect();
        assert_eq!(
            used,
            found.map(|(_, who)| who).into_iter().collect::<Vec<_>>()
        );
    }
    let objects = GuestSymbols::new(&kernel, Vec::new());
    // They are nothing that a payload may patch.
    let (exit, said) = refusal(objects.object(Some("second")));
    assert_eq!(exit, ExitCode::NotApplicable, "{said}");
}

#[test]
fn a_payload_for_a_module_that_is_not_loaded_is_refused_as_a_whole() {
    use crate::arena::Arena;
    use crate::plan;
    use locus_guest::GuestType;
    use locus_kernel::fixture_world::World;
    use locus_payload::testelf::Spec;
    use locus_payload::Payload;
    let world = World::new(GuestType::Pvh);
    let kernel = Kernel::read(&world.memory, world.kind, &world.vcpus).unwrap();
    let prepare = |module: Option<&'static str>| {
        let spec = Spec {
            objects: vec![
                (None, vec![("cmdline_proc_show", 0)]),
                (module, vec![("ext4_read", 0)]),
            ],
            ..Spec::default()
        };
        let payload = Payload::parse("test.ko", &spec.bytes()).unwrap();
        plan::prepare(
            &kernel,
            &Arena::read(&kernel).unwrap(),
            &payload,
            plan::Mode::Apply,
        )
    };
    let (exit, said) = refusal(prepare(Some("ext4")));
    assert_eq!(exit, ExitCode::NotApplicable);
    assert!(
        said.contains("payload locus_test: module ext4 is not loaded"),
        "{said}"
    );
}

#[test]
fn a_payload_that_names_the_build_id_of_another_kernel_is_refused() {
    use crate::arena::Arena;
    use crate::plan;
    use locus_guest::GuestType;
    use locus_kernel::fixture_world::World;
    use locus_payload::testelf::Spec;
    use locus_payload::Payload;
    let world = World::new(GuestType::Pvh);
    let mut kernel = Kernel::read(&world.memory, world.kind, &world.vcpus).unwrap();
    let spec = Spec {
        modinfo: b"livepatch=Y\0license=GPL\0name=locus_test\0target_build_id=0badcafe\0\
            vermagic=6.1.0-56-amd64 SMP preempt \0",
        ..Spec::default()
    };
    let payload = Payload::parse("test.ko", &spec.bytes()).unwrap();
    for (found, told) in [
        (None, Some("the guest's has none")),
        (Some(vec![1, 2]), Some("the guest's has 0102")),
        (Some(vec![0x0b, 0xad, 0xca, 0xfe]), None),
    ] {
        kernel.build_id = found;
        let arena = Arena::read(&kernel).unwrap();
        let prepared = plan::prepare(&kernel, &arena, &payload, plan::Mode::Apply);
        match told {
            None => assert!(prepared.is_ok(), "{:?}", prepared.err()),
            Some(words) => {
                let (exit, said) = refusal(prepared);
                assert_eq!(exit, ExitCode::NotApplicable);
                assert!(said.contains(words) && said.contains("0badcafe"), "{said}");
            }
        }
    }
}
