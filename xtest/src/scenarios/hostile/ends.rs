//! How the commands about a hostile guest ended, and whether one noticed what the guest does.

use std::collections::BTreeMap;

/// How commands ended.
#[derive(Debug, Default)]
pub struct Ends {
    /// How many ended with each exit code since the guest's mode was set.
    pub now: BTreeMap<i32, u32>,
    /// How many did in earlier modes.
    pub before: BTreeMap<i32, u32>,
    /// One found that the guest's page tables lead to a frame that has no memory, since the mode was set.
    leads_nowhere: bool,
}

/// What is said of such a frame. The exit code is 1: dom0 can't tell whose fault that is.
const NO_MEMORY: &str = "it has no memory";

impl Ends {
    /// A command ended with `rc` and `said` this.
    pub fn count(&mut self, rc: i32, said: &str) {
        *self.now.entry(rc).or_default() += 1;
        self.leads_nowhere |= rc == 1 && said.contains(NO_MEMORY);
    }

    /// How commands ended before says nothing of what the guest does now.
    pub fn begin_mode(&mut self) {
        for (rc, count) in std::mem::take(&mut self.now) {
            *self.before.entry(rc).or_default() += count;
        }
        self.leads_nowhere = false;
    }

    /// Whether any command has noticed what the guest does: it refused the guest (3), found the arena damaged (6), or a frame
    /// without memory.
    pub fn told(&self) -> bool {
        self.now.contains_key(&3) || self.now.contains_key(&6) || self.leads_nowhere
    }
}

#[cfg(test)]
mod tests {
    use super::Ends;

    #[test]
    fn what_was_noticed_in_one_mode_does_not_count_for_the_next() {
        let mut ends = Ends::default();
        for rc in [0, 1, 2, 5] {
            ends.count(rc, "why");
        }
        assert!(!ends.told());
        for rc in [3, 6] {
            ends.count(rc, "why");
            assert!(ends.told(), "{rc}");
            ends.begin_mode();
            assert!(!ends.told(), "{rc}");
        }
        ends.count(
            1,
            "frame 0x3 of the guest cannot be mapped: it has no memory",
        );
        assert!(ends.told());
        ends.begin_mode();
        assert!(!ends.told());
        assert_eq!(ends.before.values().sum::<u32>(), 7);
    }
}
