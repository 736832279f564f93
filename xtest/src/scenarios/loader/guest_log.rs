//! What a guest's kernel says during a test.

use std::cell::{Cell, RefCell};
use std::sync::atomic::{AtomicU32, Ordering};

use crate::check;
use crate::guest::Guest;
use crate::scenario::Ctx;
use crate::verdict::Verdict;

/// What an emulated machine on a busy host makes a kernel say.
const HOST_IS_BUSY: &[&str] = &[
    "hrtimer: interrupt took",
    "clocksource",
    "sched: RT throttling",
    "random: crng",
    "sched: DL replenish lagged too much",
];

/// Marks so far: guests outlive a [`Log`], and each mark may be found only once in theirs.
static MARKS: AtomicU32 = AtomicU32::new(0);

/// A place in the kernel's log of a guest, and what may follow it.
#[derive(Debug, Default)]
pub struct Log {
    mark: Cell<u32>,
    stalls: RefCell<String>,
}

impl Log {
    /// From here on. The mark is a line in the guest's log.
    pub fn mark(&self, guest: &Guest) -> Result<(), Verdict> {
        self.mark.set(MARKS.fetch_add(1, Ordering::Relaxed));
        guest.ok(&format!("echo '{}' > /dev/kmsg", self.text()))?;
        Ok(())
    }

    fn text(&self) -> String {
        format!("locus-test mark {}.", self.mark.get())
    }

    /// Lines since the mark.
    pub fn since(&self, guest: &Guest) -> Result<String, Verdict> {
        guest.ok(&format!("dmesg | sed '1,/{}$/d'", self.text()))
    }

    /// Nothing was said since the mark but what a busy host explains, and the kernel's own "Dynamic
    /// Preempt" when it is told to change.
    pub fn nothing_new(&self, ctx: &Ctx, guest: &Guest) -> Result<(), Verdict> {
        let log = self.since(guest)?;
        let new: Vec<&str> = log
            .lines()
            .filter(|line| !HOST_IS_BUSY.iter().any(|noise| line.contains(noise)))
            .filter(|line| !line.contains("Dynamic Preempt: "))
            .collect();
        // Xen itself says when the emulated machine stood still, dom0 and all; RCU in the guest notices.
        let stalls = ctx
            .dom0
            .ok("xl dmesg | grep -c 'unexpectedly wrapped' || true")?;
        let stood_still = self.stalls.replace(stalls.clone()) != stalls
            && new
                .first()
                .is_some_and(|line| line.contains("rcu: INFO: rcu_preempt"));
        if stood_still {
            ctx.dom0
                .note("the machine stood still: RCU stalls in the guest's log do not count");
            return Ok(());
        }
        check!(
            new.is_empty(),
            "new in the guest's kernel log:\n{}",
            new.join("\n")
        );
        Ok(())
    }
}
