//! An index of names by hash. It is built in every run, over tens of thousands of names, so
//! building it must be cheap.
//!
//! A guest chooses the names, and so how many of them are to be compared when one is looked for. That is
//! paid from its budget, here for all who ask. What it does not pay any more is answered all the same,
//! because "there is none" would be wrong: the next that reads the guest ends with the spent budget. So
//! that such an answer is quick too, a group has a limit. A table with more is refused where it is read.

use locus_guest::budget::Budget;

/// Most names in one group. A kernel has some three in each. Of static variables with one name, such as
/// `__func__.0`, there is one for each of a few thousand source files.
pub(super) const GROUP_MAX: u32 = 1 << 15;
/// Names that can be compared for one unit of a guest's budget.
const PER_UNIT: u32 = 4;

/// Numbers of named things, grouped by the hash of their names. A group is a chain: each item is
/// linked to the one before it in its group.
#[derive(Clone, Debug)]
pub(super) struct NameIndex {
    groups: Vec<Group>,
    /// The item before each one, plus one.
    before: Vec<u32>,
    /// A group has more than [`GROUP_MAX`] names.
    overfull: bool,
}

#[derive(Clone, Copy, Debug, Default)]
struct Group {
    /// Its last item, plus one.
    last: u32,
    /// How many items it has.
    len: u32,
}

/// Bits of a hash that choose the group.
const BITS: u32 = 16;

fn group(hash: u32) -> usize {
    (hash >> (32 - BITS)) as usize
}

impl NameIndex {
    /// An index of nothing yet, with room for so many items.
    pub(super) fn with_capacity(items: usize) -> NameIndex {
        NameIndex {
            groups: vec![Group::default(); 1 << BITS],
            before: Vec::with_capacity(items),
            overfull: false,
        }
    }

    /// Adds the next number, beginning with 0, of something whose name has this hash.
    pub(super) fn push(&mut self, hash: u32) {
        if let Some(group) = self.groups.get_mut(group(hash)) {
            self.before.push(group.last);
            // Callers have at most 2^20 names; beyond 2^32 the chain would end here.
            group.last = u32::try_from(self.before.len()).unwrap_or(0);
            group.len += 1;
            self.overfull |= group.len > GROUP_MAX;
        }
    }

    /// Whether some group has more than [`GROUP_MAX`] names.
    pub(super) fn is_overfull(&self) -> bool {
        self.overfull
    }

    /// All numbers whose name may have this hash, rising, paid from `budget`. None if there are more than
    /// [`GROUP_MAX`]: a guest that has so many names alike hides them, as it can by having none.
    pub(super) fn candidates(&self, hash: u32, budget: &Budget) -> Vec<u32> {
        // A group is 16 bits of the hash, and there are 2^16 of them.
        let group = self.groups.get(group(hash)).copied().unwrap_or_default();
        if group.len > GROUP_MAX {
            return Vec::new();
        }
        // What it says is right even if the budget is spent: see above.
        let _ = budget.spend(u64::from(group.len / PER_UNIT));
        let chain = std::iter::successors(group.last.checked_sub(1), |&i| {
            self.before.get(i as usize)?.checked_sub(1)
        });
        let mut found: Vec<u32> = chain.collect();
        found.reverse();
        found
    }
}

/// A hash of a name whose upper bits depend on all of it.
pub(super) fn hash(name: &[u8]) -> u32 {
    let (words, rest) = name.as_chunks::<8>();
    let rest = rest.len();
    let h = words
        .iter()
        .fold(SEED, |h, word| mix(h, u64::from_le_bytes(*word)));
    // What is left, as a word of its own: the end of the last eight bytes, if there are so many.
    let last = match name.last_chunk::<8>() {
        Some(word) if rest > 0 => u64::from_le_bytes(*word) >> (64 - 8 * rest),
        Some(_) => 0,
        None => name
            .iter()
            .rev()
            .fold(0, |word, &b| word << 8 | u64::from(b)),
    };
    finish(h, last, name.len())
}

/// The hash of the name that begins `bytes` and ends before the first NUL, or after `most` bytes.
pub(super) fn hash_string(bytes: &[u8], most: usize) -> u32 {
    const ONES: u64 = 0x0101_0101_0101_0101;
    let mut h = SEED;
    let (words, _) = bytes.as_chunks::<8>();
    for (at, word) in (0..most).step_by(8).zip(words) {
        let word = u64::from_le_bytes(*word);
        // The lowest bit set marks the first NUL.
        let nul = word.wrapping_sub(ONES) & !word & (ONES << 7);
        if nul != 0 && at + 8 <= most {
            let len = nul.trailing_zeros() / 8;
            return finish(h, word & !(u64::MAX << (8 * len)), at + len as usize);
        }
        h = mix(h, word);
    }
    // It is cut short, or near the end of all strings.
    let bytes = bytes.get(..most).unwrap_or(bytes);
    hash(bytes.split(|&b| b == 0).next().unwrap_or(bytes))
}

const SEED: u64 = 0;

fn mix(h: u64, word: u64) -> u64 {
    (h.rotate_left(29) ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

fn finish(h: u64, last: u64, len: usize) -> u32 {
    (mix(mix(h, last), len as u64) >> 32) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_is_among_its_candidates_in_rising_order() {
        let names: Vec<String> = (0..5000).map(|i| format!("name_{}", i % 4000)).collect();
        let mut index = NameIndex::with_capacity(0);
        names.iter().for_each(|n| index.push(hash(n.as_bytes())));
        for (i, name) in names.iter().enumerate() {
            let found = index.candidates(hash(name.as_bytes()), &Budget::default());
            assert!(found.contains(&u32::try_from(i).unwrap()), "{name}");
            assert!(found.is_sorted());
        }
        assert!(NameIndex::with_capacity(0)
            .candidates(hash(b"x"), &Budget::default())
            .is_empty());
    }

    #[test]
    fn a_string_has_the_hash_of_its_name() {
        let text: Vec<u8> = (0..60).map(|i| b'a' + i % 26).collect();
        for len in 0..40 {
            for behind in [0, 1, 7, 8, 20] {
                let mut string = text[..len].to_vec();
                string.push(0);
                string.resize(len + 1 + behind, b'!');
                assert_eq!(
                    hash_string(&string, 32),
                    hash(&text[..len.min(32)]),
                    "{len}"
                );
                assert_eq!(hash_string(&string, 512), hash(&text[..len]), "{len}");
            }
        }
        assert_eq!(hash_string(b"no end", 512), hash(b"no end"));
    }

    #[test]
    fn names_spread_over_the_groups() {
        let mut index = NameIndex::with_capacity(100_000);
        (0..100_000).for_each(|i| index.push(hash(format!("__symbol_{i}").as_bytes())));
        let budget = Budget::default();
        let group = |g: u32| index.candidates(g << (32 - BITS), &budget).len();
        let longest = (0..1 << BITS).map(group).max();
        assert!(longest < Some(20), "{longest:?}");
    }

    #[test]
    fn names_alike_are_paid_for_and_have_a_limit() {
        let mut index = NameIndex::with_capacity(0);
        (0..GROUP_MAX).for_each(|_| index.push(hash(b"x")));
        let budget = Budget::of(3 * u64::from(GROUP_MAX / PER_UNIT) - 1);
        for left in [true, true, false] {
            let found = index.candidates(hash(b"x"), &budget);
            assert_eq!(found.len(), GROUP_MAX as usize);
            assert_eq!(budget.check().is_ok(), left);
        }
        assert!(!index.is_overfull());
        index.push(hash(b"x"));
        assert!(index.is_overfull());
        assert_eq!(index.candidates(hash(b"x"), &budget), [0; 0]);
    }
}
