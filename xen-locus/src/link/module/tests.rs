use locus_guest::addr::{Gva, Range};
use locus_guest::budget::Budget;
use locus_kernel::btf::blob::Blob;
use locus_kernel::fixture::{renewed, vcpus, Fixture, KIND};
use locus_kernel::fixture_world::UNLOCKED;
use locus_kernel::Kernel;

use super::lists::{self, Users};
use super::structure::TreeNode;
use super::tree::{erase, insert, Shape};
use super::words::Words;
use crate::arena;
use crate::error::{Class, Result};
use crate::machine::mock::{payload, Guest, A};
use crate::plan::Mode;

const AT: Gva = Gva(0xffff_ffff_ff60_2000);
/// As x86-64 has them.
const SHAPE: Shape = Shape {
    parent: 0,
    right: 8,
    left: 16,
};
/// A node and its key.
const NODE: u64 = 32;

fn node(i: u64) -> Gva {
    AT.plus(64 + i * NODE)
}

fn key_of(words: &mut Words<'_, '_>, node: Gva) -> Result<u64> {
    words.get(node.plus(24))
}

/// Number of black nodes on each way down from `at`; panics when a rule is broken.
fn black_height(words: &mut Words<'_, '_>, at: Gva, parent: Gva, keys: &mut Vec<u64>) -> u32 {
    if at == Gva(0) {
        return 0;
    }
    let word = words.get(at).unwrap();
    assert_eq!(word & !3, parent.0, "the parent of {at}");
    let red = word & 1 == 0;
    let side = |words: &mut Words<'_, '_>, offset| Gva(words.get(at.plus(offset)).unwrap());
    let (left, right) = (side(words, 16), side(words, 8));
    for child in [left, right].into_iter().filter(|c| *c != Gva(0)) {
        let red_child = words.get(child).unwrap() & 1 == 0;
        assert!(!(red && red_child), "{at} and its child {child} are red");
    }
    let below_left = black_height(words, left, at, keys);
    keys.push(key_of(words, at).unwrap());
    let below_right = black_height(words, right, at, keys);
    assert_eq!(below_left, below_right, "below {at}");
    below_left + u32::from(!red)
}

#[test]
fn a_tree_stays_sorted_and_balanced_whatever_is_inserted() {
    let memory = Fixture::new().build();
    let kernel = Kernel::read(&memory, KIND, &vcpus()).unwrap();
    type Order = fn(u64) -> u64;
    let orders: [Order; 4] = [|i| i, |i| 1000 - i, |i| i * 7919 % 1009, |i| i / 3];
    for order in orders {
        let mut bytes = vec![0; 64 + 300 * 32];
        let mut words = Words::new(&kernel.space, AT, &mut bytes);
        for i in 0..300 {
            let key = order(i);
            words.set(node(i).plus(24), key).unwrap();
            let new = TreeNode {
                at: node(i),
                key: Gva(key),
            };
            insert(&mut words, SHAPE, AT, new, key_of).unwrap();
            let root = Gva(words.get(AT).unwrap());
            assert_eq!(words.get(root).unwrap() & 1, 1, "the root is black");
            let mut keys = Vec::new();
            black_height(&mut words, root, Gva(0), &mut keys);
            assert_eq!(keys.len() as u64, i + 1);
            assert!(keys.is_sorted());
        }
        assert!(words.into_writes().is_empty(), "all nodes are our own");
    }
}

#[test]
fn a_tree_stays_sorted_and_balanced_whatever_is_taken_out() {
    let memory = Fixture::new().build();
    let kernel = Kernel::read(&memory, KIND, &vcpus()).unwrap();
    type Order = fn(u64) -> u64;
    let orders: [Order; 4] = [
        |i| i,
        |i| 210 - i,
        |i| i * 79 % 211,
        |i| (i * 101 + 7) % 211,
    ];
    for order in orders {
        let mut bytes = vec![0; 64 + 211 * 32];
        let mut words = Words::new(&kernel.space, AT, &mut bytes);
        for i in 0..211 {
            words.set(node(i).plus(24), i * 83 % 211).unwrap();
            let new = TreeNode {
                at: node(i),
                key: Gva(i * 83 % 211),
            };
            insert(&mut words, SHAPE, AT, new, key_of).unwrap();
        }
        for i in 0..211 {
            let gone = node(order(i));
            let own = [0, 8, 16].map(|at| words.get(gone.plus(at)).unwrap());
            erase(&mut words, SHAPE, AT, gone).unwrap();
            // Who stands on it goes on from there.
            assert_eq!(own, [0, 8, 16].map(|at| words.get(gone.plus(at)).unwrap()));
            let root = Gva(words.get(AT).unwrap());
            let mut keys = Vec::new();
            black_height(&mut words, root, Gva(0), &mut keys);
            assert_eq!(keys.len() as u64, 210 - i);
            assert!(keys.is_sorted());
            assert!(!keys.contains(&(order(i) * 83 % 211)));
        }
    }
}

#[test]
fn a_tree_with_a_loop_is_refused() {
    let memory = Fixture::new().build();
    let kernel = Kernel::read(&memory, KIND, &vcpus()).unwrap();
    let mut bytes = vec![0; 64 + 4 * 32];
    let mut words = Words::new(&kernel.space, AT, &mut bytes);
    words.set(AT, node(0).0).unwrap();
    words.set(node(0), 1).unwrap();
    words.set(node(0).plus(8), node(0).0).unwrap();
    let new = TreeNode {
        at: node(1),
        key: Gva(5),
    };
    let refused = insert(&mut words, SHAPE, AT, new, key_of);
    assert!(refused.unwrap_err().to_string().contains("loop"));
}

#[test]
fn what_was_read_is_expected_and_what_was_changed_is_written() {
    let mut fixture = Fixture::new();
    fixture.function(locus_kernel::fixture::TEXT.0 + 0x1000, "word", &[7; 16]);
    let memory = fixture.build();
    let kernel = Kernel::read(&memory, KIND, &vcpus()).unwrap();
    let at = Gva(locus_kernel::fixture::TEXT.0 + 0x1000);
    let mut words = Words::new(&kernel.space, AT, &mut []);
    assert_eq!(words.get(at).unwrap(), 0x0707_0707_0707_0707);
    words.set(at.plus(8), 1).unwrap();
    assert!(words.get(at.plus(1)).is_err(), "not aligned");
    let writes = words.into_writes();
    assert_eq!(writes[0].expect, writes[0].new);
    assert_eq!(writes[1].expect, [7; 8]);
    assert_eq!(writes[1].new, 1u64.to_le_bytes());
}

/// What is said to a kernel whose `struct module` has so many kinds of memory.
fn with_kinds_of_memory(kinds: u32) -> Result<[Gva; 2]> {
    let mut b = Blob::with_integers();
    let nodes = b.structure("latch_tree_node", 48, &[]);
    let node = [("node", nodes, 0)];
    let node = b.structure("mod_tree_node", 56, &node);
    b.structure("module_memory", 72, &[("base", 4, 0), ("mtn", node, 16)]);
    let all = b.array(4, kinds);
    b.structure("module", 448, &[("mem", all, 0)]);
    let members = [
        ("__rb_parent_color", 4, 0),
        ("rb_right", 4, 8),
        ("rb_left", 4, 16),
    ];
    b.structure("rb_node", 24, &members);
    b.structure("rb_root", 8, &[("rb_node", 4, 0)]);
    let root = b.structure("latch_tree_root", 24, &[("seq", 3, 0), ("tree", 4, 8)]);
    let members = [("root", root, 0), ("addr_min", 4, 24), ("addr_max", 4, 32)];
    b.structure("mod_tree_root", 40, &members);
    let guest = Guest::new();
    let kernel = renewed(&guest.kernel(), &b.bytes(), Budget::default())?;
    lists::address_bounds(&kernel)
}

#[test]
fn a_module_without_kinds_of_memory_is_not_taken_for_one_without_nodes() {
    with_kinds_of_memory(7).unwrap();
    for kinds in [0, 65] {
        let error = with_kinds_of_memory(kinds).unwrap_err().to_string();
        assert!(
            error.contains(&format!("has {kinds} kinds of memory")),
            "{error}"
        );
    }
}

/// The whole arena.
const OWN: Range = Range {
    start: arena::BASE,
    end: Gva(arena::BASE.0 + arena::PAGES as u64 * 4096),
};

/// Why the first payload of `guest` can't be taken out of its lists.
fn why_not_removed(guest: &Guest) -> String {
    let resident = &guest.residents().unwrap()[0];
    let removed = lists::remove(&guest.kernel(), resident.record.module, OWN, Users::None);
    removed.map(|_| ()).unwrap_err().to_string()
}

#[test]
fn a_payload_whose_node_is_not_found_is_not_half_taken_out() {
    let guest = Guest::new();
    guest.applied(&payload("fix", &[A]));
    let module = guest.residents().unwrap()[0].record.module;
    // `core_layout.base`
    guest.poke(module.plus(88).0, &[0; 8]);
    let said = why_not_removed(&guest);
    assert!(
        said.contains("names none of the payload's memory"),
        "{said}"
    );
}

#[test]
fn functions_without_a_lock_are_watched_where_they_are_inlined_or_the_kernel_is_refused() {
    for name in ["module_bug_finalize", "module_bug_cleanup"] {
        let guest = Guest::with(|f| f.symbols.retain(|s| s.2 != name));
        let error = guest.apply(&payload("fix", &[A]), Mode::Apply).unwrap_err();
        assert_eq!(error.class(), Class::NotApplicable, "{error}");
        assert!(error.to_string().contains("load_module"), "{error}");
        let guest = Guest::with(|f| {
            f.symbols.retain(|s| s.2 != name);
            for (at, caller) in [(0x40, "load_module"), (0x60, "free_module")] {
                f.function(UNLOCKED.0 + at, caller, &[0xc3]);
            }
        });
        guest.applied(&payload("fix", &[A]));
        let module = guest.residents().unwrap()[0].record.module;
        let change = lists::remove(&guest.kernel(), module, OWN, Users::None).unwrap();
        let watched = |at: u64| {
            change
                .watched
                .iter()
                .any(|w| w.range.contains(UNLOCKED.plus(at)))
        };
        assert!(watched(0x40));
        assert_eq!(watched(0x60), name == "module_bug_cleanup");
    }
}
