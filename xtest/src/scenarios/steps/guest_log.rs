//! What a guest's kernel logs during a step of a test. The runner looks at what all consoles say that is broken; this
//! is for steps in which nothing at all may be logged, or for what must be.

use std::cell::Cell;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::check;
use crate::consoles::{judge, read};
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

/// Marks so far. Guests outlive a [`Log`], and each mark may be found only once in theirs.
static MARKS: AtomicU32 = AtomicU32::new(0);

/// A place in the kernel's log of a guest.
#[derive(Debug)]
pub struct Log {
    mark: Cell<u32>,
    /// How often the machine had stood still at that place.
    stops: Cell<usize>,
}

impl Log {
    /// The log from here on.
    pub fn begin(ctx: &Ctx, guest: &Guest) -> Result<Self, Verdict> {
        let log = Self {
            mark: Cell::new(0),
            stops: Cell::new(0),
        };
        log.mark(ctx, guest)?;
        Ok(log)
    }

    /// Moves the place to here. The mark is a line in the guest's log.
    pub fn mark(&self, ctx: &Ctx, guest: &Guest) -> Result<(), Verdict> {
        self.mark.set(MARKS.fetch_add(1, Ordering::Relaxed));
        guest.ok(&format!("echo '{}' > /dev/kmsg", self.text()))?;
        self.stops.set(stops(ctx)?);
        Ok(())
    }

    fn text(&self) -> String {
        format!("locus-test mark {}.", self.mark.get())
    }

    /// Lines since the mark.
    ///
    /// # Errors
    ///
    /// [`Verdict::Error`] if the mark is not in the log any more: then nothing is known of what came after it.
    pub fn since(&self, guest: &Guest) -> Result<String, Verdict> {
        let out = guest.sh(&since_mark("dmesg", &self.text()))?;
        match out.rc {
            0 => Ok(out.text()),
            rc => Err(Verdict::Error(format!(
                "{}: {:?} is not in the kernel's log any more ({rc}): {}",
                guest.name,
                self.text(),
                out.err_text()
            ))),
        }
    }

    /// Checks that there is no line since the mark, except those that a busy host explains, and the
    /// kernel's own "Dynamic Preempt" when it is told to change.
    pub fn nothing_new(&self, ctx: &Ctx, guest: &Guest) -> Result<(), Verdict> {
        let log = read(&self.since(guest)?);
        let stops = stops(ctx)?.saturating_sub(self.stops.get());
        let judged = judge(log.reports, &[], stops);
        let mut new: Vec<String> = log
            .others
            .into_iter()
            .filter(|line| !HOST_IS_BUSY.iter().any(|noise| line.contains(noise)))
            .filter(|line| !line.contains("Dynamic Preempt: "))
            .collect();
        new.extend(judged.wrong.into_iter().flat_map(|report| report.lines));
        check!(
            new.is_empty(),
            "new in the guest's kernel log:\n{}",
            new.join("\n")
        );
        Ok(())
    }
}

/// A shell command that prints what `log` prints behind the line that ends with `mark`, and fails if there is none.
fn since_mark(log: &str, mark: &str) -> String {
    format!(
        "{log} | awk -v mark='{mark}' 'found; substr($0, length($0) - length(mark) + 1) == mark \
         {{found = 1}} END {{exit !found}}'"
    )
}

/// How often Xen has found its platform timer wrapped, which happens when QEMU did not run it for
/// seconds.
fn stops(ctx: &Ctx) -> Result<usize, Verdict> {
    let text = ctx
        .dom0
        .ok("xl dmesg | grep -c 'unexpectedly wrapped' || true")?;
    text.parse()
        .map_err(|_| Verdict::Error(format!("xl dmesg: {text:?}")))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::since_mark;

    fn after(log: &str) -> (Option<i32>, String) {
        let cmd = since_mark(&format!("printf '{log}'"), "locus-test mark 7.");
        let out = Command::new("sh").args(["-c", &cmd]).output().unwrap();
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        (out.status.code(), text)
    }

    #[test]
    fn a_mark_that_is_gone_is_an_error_and_one_in_the_first_line_is_found() {
        let first = "[ 1.0] locus-test mark 7.\\nBUG: oops\\n";
        assert_eq!(after(first), (Some(0), "BUG: oops\n".to_owned()));
        let later = format!("one\\n{first}");
        assert_eq!(after(&later), (Some(0), "BUG: oops\n".to_owned()));
        for gone in ["", "BUG: oops\\n", "[ 1.0] locus-test mark 77.\\nx\\n"] {
            assert_eq!(after(gone).0, Some(1), "{gone}");
        }
        assert_eq!(
            after("[ 1.0] locus-test mark 7.\\n"),
            (Some(0), String::new())
        );
    }
}
