//! What failed and is tried again later, with longer and longer waits.

use std::collections::HashMap;
use std::hash::Hash;
use std::time::{Duration, Instant};

/// Keys of what is tried again, each with the time when it is due.
#[derive(Debug)]
pub(super) struct Backoff<K> {
    due: HashMap<K, (Instant, Duration)>,
    first: Duration,
    longest: Duration,
}

impl<K: Eq + Hash + Clone + Ord> Backoff<K> {
    /// The first wait is `first`; each after it twice as long, up to `longest`.
    pub(super) fn new(first: Duration, longest: Duration) -> Backoff<K> {
        Backoff {
            due: HashMap::new(),
            first,
            longest,
        }
    }

    /// Whether `key` is here and not due yet.
    pub(super) fn is_early(&self, key: &K, now: Instant) -> bool {
        self.due.get(key).is_some_and(|(at, _)| *at > now)
    }

    /// The keys that are due, in the order in which they became due.
    pub(super) fn due(&self, now: Instant) -> Vec<K> {
        let due = self.due.iter().filter(|(_, (at, _))| *at <= now);
        let mut due: Vec<_> = due.map(|(key, (at, _))| (*at, key.clone())).collect();
        due.sort();
        due.into_iter().map(|(_, key)| key).collect()
    }

    /// `key` failed once more: it waits from now on, until the time that is returned.
    pub(super) fn put_off(&mut self, key: K, now: Instant) -> Instant {
        self.put_off_up_to(key, now, self.longest)
    }

    /// The same, with a longest wait of its own.
    pub(super) fn put_off_up_to(&mut self, key: K, now: Instant, longest: Duration) -> Instant {
        let last = self.due.get(&key).map(|(_, wait)| *wait);
        let wait = last.map_or(self.first, |w| (w * 2).min(longest));
        let at = now + wait;
        self.due.insert(key, (at, wait));
        at
    }

    /// `key` is not tried again. Its next wait, if there is one, is the first.
    pub(super) fn forget(&mut self, key: &K) {
        self.due.remove(key);
    }

    /// Forgets all keys of which `keep` is false.
    pub(super) fn retain(&mut self, keep: impl Fn(&K) -> bool) {
        self.due.retain(|key, _| keep(key));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_the_longest_and_start_again_when_forgotten() {
        let second = Duration::from_secs(1);
        let mut backoff = Backoff::new(second, second * 3);
        let mut now = Instant::now();
        assert!(!backoff.is_early(&1, now));
        for wait in [1, 2, 3, 3, 1] {
            if wait == 1 {
                backoff.forget(&1);
            }
            backoff.put_off(1, now);
            assert!(backoff.is_early(&1, now + second * wait - second / 2));
            assert!(backoff.due(now + second * wait - second / 2).is_empty());
            now += second * wait;
            assert!(!backoff.is_early(&1, now));
            assert_eq!(backoff.due(now), [1]);
        }
        backoff.retain(|key| *key != 1);
        assert!(backoff.due(now).is_empty());
    }
}
