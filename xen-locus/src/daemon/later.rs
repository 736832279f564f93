//! What failed now and is to be tried again later, less and less often.

use std::collections::HashMap;
use std::hash::Hash;
use std::time::{Duration, Instant};

/// Things by key, each with the time when it is due.
#[derive(Debug)]
pub(super) struct Later<K> {
    due: HashMap<K, (Instant, Duration)>,
    first: Duration,
    longest: Duration,
}

impl<K: Eq + Hash + Clone> Later<K> {
    /// The first wait is `first`; each after it twice as long, up to `longest`.
    pub(super) fn new(first: Duration, longest: Duration) -> Later<K> {
        Later {
            due: HashMap::new(),
            first,
            longest,
        }
    }

    /// Whether `key` is to be left alone for now.
    pub(super) fn is_early(&self, key: &K, now: Instant) -> bool {
        self.due.get(key).is_some_and(|(at, _)| *at > now)
    }

    /// Those that are due.
    pub(super) fn due(&self, now: Instant) -> Vec<K> {
        let due = self.due.iter().filter(|(_, (at, _))| *at <= now);
        due.map(|(key, _)| key.clone()).collect()
    }

    /// `key` failed once more.
    pub(super) fn put_off(&mut self, key: K, now: Instant) {
        let last = self.due.get(&key).map(|(_, wait)| *wait);
        let wait = last.map_or(self.first, |w| (w * 2).min(self.longest));
        self.due.insert(key, (now + wait, wait));
    }

    /// Nothing is to be tried of `key` any more.
    pub(super) fn forget(&mut self, key: &K) {
        self.due.remove(key);
    }

    /// Keeps those of which `keep` is true.
    pub(super) fn retain(&mut self, keep: impl Fn(&K) -> bool) {
        self.due.retain(|key, _| keep(key));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_the_longest_and_begin_anew_when_forgotten() {
        let second = Duration::from_secs(1);
        let mut later = Later::new(second, second * 3);
        let mut now = Instant::now();
        assert!(!later.is_early(&1, now));
        for wait in [1, 2, 3, 3, 1] {
            if wait == 1 {
                later.forget(&1);
            }
            later.put_off(1, now);
            assert!(later.is_early(&1, now + second * wait - second / 2));
            assert!(later.due(now + second * wait - second / 2).is_empty());
            now += second * wait;
            assert!(!later.is_early(&1, now));
            assert_eq!(later.due(now), [1]);
        }
        later.retain(|key| *key != 1);
        assert!(later.due(now).is_empty());
    }
}
