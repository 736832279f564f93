//! How the commands about a hostile guest ended, and whether one noticed what the guest does.

use std::collections::BTreeMap;

/// How commands ended.
#[derive(Debug, Default)]
pub struct Ends {
    /// How many ended with each exit code since the guest's mode was set.
    pub now: BTreeMap<i32, u32>,
    /// How many did in earlier modes.
    pub before: BTreeMap<i32, u32>,
    /// One found that the guest's page tables lead to a frame that has no memory, or nowhere, since the mode was set.
    leads_nowhere: bool,
}

/// What is said of such tables. The exit code is 1: dom0 can't tell whose fault that is.
const NOWHERE: [&str; 2] = ["it has no memory", "is not mapped (page table level "];

impl Ends {
    /// A command ended with `rc` and `said` this.
    pub fn count(&mut self, rc: i32, said: &str) {
        *self.now.entry(rc).or_default() += 1;
        self.leads_nowhere |= rc == 1 && NOWHERE.iter().any(|words| said.contains(words));
    }

    /// How commands ended before says nothing of what the guest does now.
    pub fn begin_mode(&mut self) {
        for (rc, count) in std::mem::take(&mut self.now) {
            *self.before.entry(rc).or_default() += count;
        }
        self.leads_nowhere = false;
    }

    /// Whether any command has noticed what the guest does: it refused the guest (3), found the arena damaged (6), or page tables
    /// that lead nowhere.
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
        for said in [
            "frame 0x3 of the guest cannot be mapped: it has no memory",
            "guest address 0xffffffff826d6000 is not mapped (page table level 1)",
        ] {
            ends.count(1, said);
            assert!(ends.told(), "{said}");
            ends.begin_mode();
            assert!(!ends.told(), "{said}");
        }
        assert_eq!(ends.before.values().sum::<u32>(), 8);
    }
}
