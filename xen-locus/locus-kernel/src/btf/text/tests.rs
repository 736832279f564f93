use super::super::blob::{sample, Blob};
use super::*;

fn text(btf: &Btf, wanted: &str) -> String {
    let found = btf.describe(wanted, &Budget::default()).unwrap();
    found.into_iter().map(|d| d.text).collect()
}

/// Without the spaces that only align.
fn tight(text: &str) -> String {
    let words: Vec<&str> = text.split_whitespace().collect();
    words.join(" ")
}

#[test]
fn a_structure_is_shown_with_offsets_sizes_bit_fields_and_holes() {
    let btf = Btf::new(sample().bytes()).unwrap();
    assert_eq!(
        tight(&text(&btf, "struct outer")),
        "struct outer { int a; /* 0 4 */ /* hole of 4 bytes */ union { long b; /* 8 8 */ \
         struct inner c; /* 8 8 */ }; /* 8 8 */ int d:3; /* 16: 0 4 */ int e:5; /* 16: 3 4 */ \
         u8 f[7]; /* 17 7 */ }; /* size: 24 */"
    );
    let shown = btf.describe("outer", &Budget::default()).unwrap();
    let names: Vec<&str> = shown[0].members.iter().map(|m| m.name.as_str()).collect();
    assert_eq!(names, ["a", "b", "c", "d", "e", "f"]);
    assert_eq!(shown[0].members[4].bits, Some((3, 5)));
    assert_eq!(shown[0].members[2].offset, 8);
    assert!(text(&btf, "union outer").is_empty());
}

#[test]
fn functions_and_pointers_to_them_are_shown_as_prototypes() {
    let btf = Btf::new(sample().bytes()).unwrap();
    let list = "(struct outer *o, const struct outer *from, unsigned char __user *buf, ...)";
    assert_eq!(
        text(&btf, "copy_outer"),
        format!("long copy_outer{list};\n")
    );
    assert_eq!(
        text(&btf, "copy_fn"),
        format!("typedef long (*copy_fn){list}; /* size: 8 */\n")
    );
}

#[test]
fn enums_show_their_values() {
    let btf = Btf::new(sample().bytes()).unwrap();
    assert_eq!(
        text(&btf, "enum state"),
        "enum state {\n\tLIVE = 0,\n\tGOING = 2,\n\tBAD = -1,\n}; /* size: 4 */\n"
    );
    assert!(text(&btf, "wide").contains("HUGE = 4294967301"));
}

#[test]
fn arrays_of_pointers_and_pointers_to_arrays_are_told_apart() {
    let mut b = Blob::new();
    let int = b.int("int", 4);
    let pointer = b.refer("", TypeKind::Ptr, int);
    let constant = b.refer("", TypeKind::Const, pointer);
    let many = b.array(constant, 4);
    let row = b.array(int, 3);
    let to_row = b.refer("", TypeKind::Ptr, row);
    let nameless = b.composite(TypeKind::Struct, "", 4, &[("x", int, 0)]);
    let rows = b.array(nameless, 2);
    let members = [
        ("many", many, 0),
        ("to_row", to_row, 256),
        ("two", rows, 320),
    ];
    b.composite(TypeKind::Struct, "s", 48, &members);
    let btf = Btf::new(b.bytes()).unwrap();
    assert_eq!(
        tight(&text(&btf, "s")),
        "struct s { int *const many[4]; /* 0 32 */ int (*to_row)[3]; /* 32 8 */ \
         struct { int x; /* 40 4 */ } two[2]; /* 40 8 */ }; /* size: 48 */"
    );
}

#[test]
fn namesakes_with_long_members_are_paid_for() {
    let mut b = Blob::new();
    let mut long = b.int(&"i".repeat(400), 4);
    for _ in 0..12 {
        long = b.refer("", TypeKind::Ptr, long);
    }
    let name = "m".repeat(400);
    let members: Vec<_> = (0..300).map(|_| (name.as_str(), long, 0)).collect();
    for _ in 0..64 {
        b.composite(TypeKind::Struct, "many", 4, &members);
    }
    b.composite(TypeKind::Struct, "one", 4, &[(&name, long, 0)]);
    let btf = Btf::new(b.bytes()).unwrap();
    // 64 x 300 members of 1.6 KB each are 31 MB.
    let budget = Budget::default();
    assert!(matches!(
        btf.describe("many", &budget),
        Err(Error::Memory(locus_guest::Error::Exhausted))
    ));
    assert!(btf.describe("one", &budget).is_err(), "nothing is left");
    budget.renew();
    assert_eq!(btf.describe("one", &budget).unwrap().len(), 1);
    assert!(budget.spent() < 5000, "{}", budget.spent());
}

#[test]
fn names_cannot_command_a_terminal() {
    let mut b = Blob::new();
    let int = b.int("int", 4);
    b.composite(TypeKind::Struct, "s", 4, &[("\x1b[2J", int, 0)]);
    let btf = Btf::new(b.bytes()).unwrap();
    assert!(text(&btf, "s").contains("int ?[2J;"));
}
