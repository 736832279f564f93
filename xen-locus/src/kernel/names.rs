//! An index of names by hash: tens of thousands of them, made anew in every run.

/// Numbers of named things, grouped by the hash of their names.
#[derive(Clone, Debug)]
pub(super) struct Index {
    /// Where each group starts in `items`.
    starts: Vec<u32>,
    items: Vec<u32>,
}

/// Bits of a hash that choose the group.
const BITS: u32 = 16;

fn group(hash: u32) -> usize {
    (hash >> (32 - BITS)) as usize
}

impl Index {
    /// Groups the numbers 0, 1, … by their `hashes`; within a group they rise.
    pub(super) fn of(hashes: &[u32]) -> Index {
        let mut starts = vec![0; (1 << BITS) + 1];
        for &hash in hashes {
            if let Some(n) = starts.get_mut(group(hash) + 1) {
                *n += 1;
            }
        }
        let mut sum = 0;
        for start in &mut starts {
            sum += *start;
            *start = sum;
        }
        let mut next = starts.clone();
        let mut items = vec![0; hashes.len()];
        for (number, &hash) in (0..).zip(hashes) {
            if let Some(place) = next.get_mut(group(hash)) {
                if let Some(item) = items.get_mut(*place as usize) {
                    *item = number;
                }
                *place += 1;
            }
        }
        Index { starts, items }
    }

    /// All numbers whose name may be `name`, rising.
    pub(super) fn candidates(&self, name: &[u8]) -> &[u32] {
        let group = group(hash(name));
        let bound = |at: usize| self.starts.get(at).map_or(0, |&s| s as usize);
        self.items
            .get(bound(group)..bound(group + 1))
            .unwrap_or_default()
    }
}

/// A hash of a name whose upper bits depend on all of it.
pub(super) fn hash(name: &[u8]) -> u32 {
    const FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;
    let mix = |h: u64, word: u64| (h.rotate_left(29) ^ word).wrapping_mul(FACTOR);
    let mut h = name.len() as u64;
    for word in name.chunks_exact(8) {
        h = mix(h, u64::from_le_bytes(word.try_into().unwrap_or_default()));
    }
    // The last eight bytes, some of them a second time; or the few there are.
    let last = match name.last_chunk::<8>() {
        Some(word) => u64::from_le_bytes(*word),
        None => name.iter().fold(0, |word, &b| word << 8 | u64::from(b)),
    };
    (mix(h, last) >> 32) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_is_among_its_candidates_in_rising_order() {
        let names: Vec<String> = (0..5000).map(|i| format!("name_{}", i % 4000)).collect();
        let hashes: Vec<u32> = names.iter().map(|n| hash(n.as_bytes())).collect();
        let index = Index::of(&hashes);
        for (i, name) in names.iter().enumerate() {
            let found = index.candidates(name.as_bytes());
            assert!(found.contains(&u32::try_from(i).unwrap()), "{name}");
            assert!(found.is_sorted());
        }
        assert!(Index::of(&[]).candidates(b"x").is_empty());
    }

    #[test]
    fn names_spread_over_the_groups() {
        let hashes: Vec<u32> = (0..100_000)
            .map(|i| hash(format!("__symbol_{i}").as_bytes()))
            .collect();
        let index = Index::of(&hashes);
        let longest = index.starts.windows(2).map(|w| w[1] - w[0]).max();
        assert!(longest < Some(20), "{longest:?}");
    }
}
