use locus_guest::budget::Budget;

use super::blob::{sample, Blob};
use super::*;

#[test]
fn types_named_alike_are_paid_for_and_have_a_limit() {
    let alike = |count: u32| {
        let mut b = Blob::new();
        let name = b.name("x");
        for _ in 0..count {
            b.raw("x", TypeKind::Enum, 0, 4, &[]);
        }
        b.structure("x", 24, &[]);
        assert!(name > 0);
        Btf::new(b.bytes())
    };
    let budget = Budget::of(20_000);
    let btf = alike(20_000).unwrap().paid_from(&budget);
    for spent in [5000, 10_000, 15_000, 20_000, 20_000] {
        // What it says is right, and the next that reads the guest ends.
        assert_eq!(btf.size_of("x").unwrap(), 24);
        assert_eq!(budget.spent(), spent);
    }
    assert!(budget.check().is_err());
    let error = alike(1 << 15).unwrap_err();
    assert!(error.to_string().contains("named alike"), "{error}");
}

#[test]
fn members_are_found_through_anonymous_unions_and_dots() {
    let btf = Btf::new(sample().bytes()).unwrap();
    assert_eq!(btf.len(), 19);
    assert_eq!(btf.size_of("outer").unwrap(), 24);
    assert_eq!(btf.offset_of("outer", "a").unwrap(), 0);
    assert_eq!(btf.offset_of("outer", "b").unwrap(), 8);
    assert_eq!(btf.offset_of("outer", "c.x").unwrap(), 12);
    assert!(btf.offset_of("outer", "nope").is_err());
    assert!(btf.has("outer", "c.w") && btf.has("outer", "e"));
    assert!(!btf.has("outer", "c.nope") && !btf.has("nope", "c"));
}

#[test]
fn a_member_of_another_width_is_refused_by_name() {
    let btf = Btf::new(sample().bytes()).unwrap();
    let width = |path| {
        let widths = [1, 2, 4, 8, 16];
        widths.map(|bytes| btf.offset_of_sized("outer", path, bytes).is_ok())
    };
    assert_eq!(width("b"), [false, false, false, true, false]);
    assert_eq!(width("c.x"), [false, false, true, false, false]);
    assert_eq!(btf.offset_of_sized("outer", "c.x", 4).unwrap(), 12);
    let error = btf.offset_of_sized("outer", "c.x", 8).unwrap_err();
    let said = error.to_string();
    assert!(
        said.contains("member c.x of outer has 4 bytes in BTF; expected 8"),
        "{said}"
    );
    // A bit field has no bytes of its own.
    assert!(btf.offset_of_sized("outer", "e", 1).is_err());
}

#[test]
fn bit_fields_say_which_bits_they_are_and_have_no_byte_offset() {
    let btf = Btf::new(sample().bytes()).unwrap();
    assert!(btf.offset_of("outer", "e").is_err());
    let e = btf.bits_of("outer", "e").unwrap();
    assert_eq!(
        e,
        Bits {
            offset: 16,
            shift: 3,
            width: 5
        }
    );
    let mut bytes = [0; 24];
    bytes[16] = 0b1010_1111;
    assert_eq!(e.value(&bytes), Some(0b10101));
    assert_eq!(e.value(&bytes[..16]), None);
    let x = btf.bits_of("outer", "c.x").unwrap();
    bytes[12..16].copy_from_slice(&0x8765_4321u32.to_le_bytes());
    assert_eq!((x.width, x.value(&bytes)), (32, Some(0x8765_4321)));
    assert!(
        btf.bits_of("outer", "c").is_ok(),
        "eight bytes fit in a word"
    );
    assert!(btf.bits_of("outer", "f").is_ok(), "so do seven");
    assert!(btf.bits_of("outer", "nope").is_err());
}

#[test]
fn a_value_of_64_bits_that_begins_within_a_byte_is_whole() {
    let bits = Bits {
        offset: 0,
        shift: 4,
        width: 64,
    };
    let bytes = [0xf0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x0f];
    assert_eq!(bits.value(&bytes), Some(u64::MAX));
}

#[test]
fn enumerators_have_names_and_values() {
    let btf = Btf::new(sample().bytes()).unwrap();
    assert_eq!(btf.enum_name("state", 2).as_deref(), Some("GOING"));
    assert_eq!(btf.enum_name("state", -1).as_deref(), Some("BAD"));
    assert_eq!(btf.enum_name("state", 0xffff_ffff).as_deref(), Some("BAD"));
    assert_eq!(btf.enum_name("state", 1), None);
    assert_eq!(btf.enum_value("state", "GOING"), Some(2));
    assert_eq!(btf.enum_value("wide", "HUGE"), Some(0x1_0000_0005));
    assert_eq!(
        btf.enum_name("wide", 0x1_0000_0005).as_deref(),
        Some("HUGE")
    );
}

#[test]
fn arrays_have_a_length_and_others_do_not() {
    let btf = Btf::new(sample().bytes()).unwrap();
    assert_eq!(btf.array_len("outer", "f").unwrap(), 7);
    assert!(btf.array_len("outer", "a").is_err());
}

#[test]
fn a_module_s_types_and_strings_continue_those_of_the_kernel() {
    let kernel = sample();
    let base = Rc::new(Btf::new(kernel.bytes()).unwrap());
    let inner = base.find(&[TypeKind::Struct], "inner").unwrap();
    let mut blob = Blob::on(&kernel);
    let own = blob.composite(TypeKind::Struct, "own", 16, &[("i", inner, 64)]);
    assert_eq!(own, 20);
    blob.composite(
        TypeKind::Struct,
        "more",
        32,
        &[("", own, 128), ("o", own, 0)],
    );
    let btf = Btf::split(base, blob.bytes()).unwrap();
    assert_eq!(btf.len(), 2);
    assert_eq!(btf.offset_of("own", "i.x").unwrap(), 12);
    assert_eq!(btf.offset_of("more", "i.x").unwrap(), 28);
    assert_eq!(btf.offset_of("outer", "c.x").unwrap(), 12);
    assert_eq!(btf.size_of("more").unwrap(), 32);
    assert!(btf.size_of("other").is_err());
}

#[test]
fn any_mutation_of_a_blob_is_refused_or_harmless() {
    let good = sample().bytes();
    let ask = |btf: &Btf| {
        let _ = btf.offset_of("outer", "c.x");
        let _ = btf.bits_of("outer", "e");
        let _ = btf.array_len("outer", "f");
        let _ = btf.enum_name("state", 2);
        for what in ["outer", "state", "wide", "copy_outer", "copy_fn", "u8"] {
            let _ = btf.describe(what, &Budget::default());
        }
    };
    for at in 0..good.len() {
        for value in [0, 1, 0x7f, 0xff, good[at] ^ 0x80, good[at].wrapping_add(1)] {
            let mut bad = good.clone();
            bad[at] = value;
            if let Ok(btf) = Btf::new(bad) {
                ask(&btf);
            }
        }
        assert!(Btf::new(good[..at].to_vec()).is_err(), "cut at {at}");
    }
}

#[test]
fn a_huge_blob_is_refused() {
    let mut blob = sample().bytes();
    blob.resize(100 << 20, 0);
    assert!(matches!(Btf::new(blob), Err(Error::Odd(_))));
}

#[test]
fn cycles_and_bushes_of_anonymous_members_end_soon() {
    let mut b = Blob::new();
    // Every structure has 100 anonymous members of the next type, and the last points at the first.
    for i in 1..=20 {
        let next = if i == 20 { 1 } else { i + 1 };
        let members = vec![("", next, 0); 100];
        b.composite(
            TypeKind::Struct,
            if i == 1 { "bush" } else { "" },
            8,
            &members,
        );
    }
    let chain = b.refer("chain", TypeKind::Typedef, 22);
    assert_eq!(chain, 21);
    b.refer("niahc", TypeKind::Typedef, 21);
    let array = b.array(23, u32::MAX);
    b.composite(
        TypeKind::Struct,
        "holder",
        8,
        &[("a", array, 0), ("c", chain, 0)],
    );
    let btf = Btf::new(b.bytes()).unwrap();
    let start = std::time::Instant::now();
    assert!(btf.offset_of("bush", "x").is_err());
    assert!(btf.bits_of("holder", "a").is_err());
    assert!(btf.bits_of("holder", "c").is_err());
    assert!(!btf.has("holder", "c.x"));
    for what in ["bush", "chain", "holder"] {
        let budget = Budget::default();
        // The bush is too much.
        let found = btf.describe(what, &budget).unwrap_or_default();
        let text: usize = found.iter().map(|d| d.text.len()).sum();
        assert!(text < 16 << 20, "{what}: {text}");
        assert!(text > 0 || budget.check().is_err(), "{what}");
    }
    assert!(start.elapsed().as_secs() < 5, "{:?}", start.elapsed());
}

#[test]
fn an_enum_that_never_ends_is_looked_at_in_part() {
    let names: Vec<String> = (0..1 << 17).map(|i| format!("E{i}")).collect();
    let mut values: Vec<(&str, i64)> = names.iter().map(String::as_str).zip(0..).collect();
    values.push(("BEYOND", -7));
    let mut b = Blob::new();
    b.enumeration("endless", &values);
    let btf = Btf::new(b.bytes()).unwrap();
    assert_eq!(btf.enum_value("endless", "E131071"), Some(131_071));
    assert_eq!(btf.enum_value("endless", "BEYOND"), None);
    assert_eq!(btf.enum_name("endless", -7), None);
}
