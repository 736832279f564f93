//! What a guest's kernel logs during a test.

use std::cell::{Cell, RefCell};
use std::sync::atomic::{AtomicU32, Ordering};

use crate::check;
use crate::guest::Guest;
use crate::scenario::Ctx;
use crate::verdict::Verdict;

/// What an emulated machine on a busy host makes a kernel log.
const HOST_IS_BUSY: &[&str] = &[
    "hrtimer: interrupt took",
    "clocksource",
    "sched: RT throttling",
    "random: crng",
    "sched: DL replenish lagged too much",
];

/// What a kernel logs when something in it is broken.
pub const BROKEN: [&str; 4] = ["Oops", "BUG:", "WARNING:", "general protection"];

/// Checks that none of `words` is in the guest's whole log.
pub fn lacks(guest: &Guest, words: &[&str]) -> Result<(), Verdict> {
    let log = guest.ok("dmesg")?;
    for word in words {
        check!(!log.contains(word), "{word} in the guest's log: {log}");
    }
    Ok(())
}

/// Marks so far. Guests outlive a [`Log`], and each mark may be found only once in theirs.
static MARKS: AtomicU32 = AtomicU32::new(0);

/// A place in the kernel's log of a guest, and what may follow it.
#[derive(Debug)]
pub struct Log {
    mark: Cell<u32>,
    stalls: RefCell<String>,
}

impl Log {
    /// The log from here on.
    pub fn begin(ctx: &Ctx, guest: &Guest) -> Result<Self, Verdict> {
        let log = Self {
            mark: Cell::new(0),
            stalls: RefCell::new(stalls(ctx)?),
        };
        log.mark(guest)?;
        Ok(log)
    }

    /// Moves the place to here. The mark is a line in the guest's log.
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

    /// Checks that there is no line since the mark, except those that a busy host explains, and the
    /// kernel's own "Dynamic Preempt" when it is told to change.
    pub fn nothing_new(&self, ctx: &Ctx, guest: &Guest) -> Result<(), Verdict> {
        let log = self.since(guest)?;
        let new: Vec<&str> = log
            .lines()
            .filter(|line| !HOST_IS_BUSY.iter().any(|noise| line.contains(noise)))
            .filter(|line| !line.contains("Dynamic Preempt: "))
            .collect();
        // Xen itself says when the emulated machine stopped, dom0 included. RCU in the guest notices.
        let stalls = stalls(ctx)?;
        let stopped = self.stalls.replace(stalls.clone()) != stalls
            && new
                .first()
                .is_some_and(|line| line.contains("rcu: INFO: rcu_preempt"));
        if stopped {
            let name = &guest.name;
            eprintln!(
                "xtest: {name}: the machine stopped for a while, so RCU stalls in its log do not count"
            );
            ctx.dom0.note(
                "the machine stopped for a while: RCU stalls in the guest's log do not count",
            );
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

/// How often Xen has found its platform timer wrapped, which happens when QEMU did not run it for
/// seconds.
fn stalls(ctx: &Ctx) -> Result<String, Verdict> {
    ctx.dom0
        .ok("xl dmesg | grep -c 'unexpectedly wrapped' || true")
}
