use locus_guest::addr::Gva;
use locus_kernel::fixture::{vcpus, Fixture, KIND};
use locus_kernel::Kernel;

use super::structure::TreeNode;
use super::tree::{erase, insert, Shape};
use super::words::Words;
use crate::error::Result;

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
