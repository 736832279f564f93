//! Which scenarios are left, and which machine runs them.

use std::collections::VecDeque;

use crate::profile::{Profile, PROFILES};
use crate::scenario::Scenario;

/// The scenarios of a profile that were not begun yet.
#[derive(Debug)]
struct Queue {
    profile: &'static Profile,
    left: VecDeque<Scenario>,
    /// Machines of this profile that run now.
    machines: u32,
    /// Boots so far.
    boots: u32,
}

/// What is left to do, and the number of the host's processors that no machine uses.
#[derive(Debug)]
pub struct Work {
    queues: Vec<Queue>,
    free: u32,
}

/// A second machine of a profile is worth its boot if so many seconds of work are left.
pub const WORTH: f64 = 120.0;

impl Work {
    /// All scenarios, and no machine.
    pub fn new(scenarios: &[Scenario], cpus: u32) -> Self {
        let queue = |profile: &&'static Profile| Queue {
            profile,
            left: scenarios
                .iter()
                .filter(|s| s.profile == *profile)
                .copied()
                .collect(),
            machines: 0,
            boots: 0,
        };
        let queues = PROFILES.iter().map(queue);
        Self {
            queues: queues.filter(|q| !q.left.is_empty()).collect(),
            free: cpus,
        }
    }

    /// Whether each scenario was begun.
    pub fn is_done(&self) -> bool {
        self.queues.iter().all(|q| q.left.is_empty())
    }

    /// Takes a profile for a machine: the first that has none and fits, or else the one with most work left for another
    /// machine. A profile that is too large for the host runs alone.
    pub fn take(&mut self, cpus: u32, seconds: &dyn Fn(&str) -> f64) -> Option<usize> {
        let free = self.free;
        let fits = |q: &Queue| !q.left.is_empty() && q.profile.cpus.min(cpus) <= free;
        let left = |q: &Queue| -> f64 { q.left.iter().map(|s| seconds(s.name)).sum() };
        let new = self.queues.iter().position(|q| q.machines == 0 && fits(q));
        let at = new.or_else(|| {
            let queues = self.queues.iter().enumerate();
            queues
                .filter(|(_, q)| fits(q) && left(q) > WORTH)
                .max_by(|(_, a), (_, b)| left(a).total_cmp(&left(b)))
                .map(|(at, _)| at)
        })?;
        let queue = self.queues.get_mut(at)?;
        queue.machines += 1;
        self.free -= queue.profile.cpus.min(cpus);
        Some(at)
    }

    /// A machine has ended.
    pub fn give_back(&mut self, at: usize, cpus: u32) {
        if let Some(queue) = self.queues.get_mut(at) {
            queue.machines -= 1;
            self.free += queue.profile.cpus.min(cpus);
        }
    }

    /// The next scenario of a profile.
    pub fn next(&mut self, at: usize) -> Option<Scenario> {
        self.queues.get_mut(at)?.left.pop_front()
    }

    /// The number of boots of this profile before this one.
    pub fn boot(&mut self, at: usize) -> u32 {
        let Some(queue) = self.queues.get_mut(at) else {
            return 0;
        };
        queue.boots += 1;
        queue.boots - 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scenarios;

    #[test]
    fn a_free_processor_takes_over_from_the_machine_with_most_work() {
        let usual = scenarios::usual();
        let seconds = |_: &str| 50.0;
        let mut work = Work::new(&usual, 2);
        // The one with two processors first, alone.
        let at = work.take(2, &seconds).unwrap();
        assert_eq!(work.queues[at].profile.cpus, 2);
        assert_eq!(work.take(2, &seconds), None);
        while work.next(at).is_some() {}
        work.give_back(at, 2);
        let (one, two) = (work.take(2, &seconds), work.take(2, &seconds));
        let two = two.unwrap();
        assert_ne!(one, Some(two));
        while work.next(two).is_some() {}
        work.give_back(two, 2);
        let three = work.take(2, &seconds).unwrap();
        assert_eq!(work.queues[three].machines, 1, "a new profile comes first");
        while work.next(three).is_some() {}
        work.give_back(three, 2);
        // Now a second machine helps the first one.
        assert_eq!(work.take(2, &seconds), one);
        assert!(!work.is_done());
        while work.next(one.unwrap()).is_some() {}
        assert!(work.is_done());
    }
}
