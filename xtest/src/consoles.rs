//! What consoles say when something in a guest, in dom0 or in Xen is broken. Pure: text in, reports out.

/// Words of a line with which Linux begins to report that something is broken.
const LINUX: &[&str] = &[
    "BUG:",
    "kernel BUG at",
    "WARNING:",
    "Oops",
    "general protection",
    "Kernel panic",
    "rcu: INFO:",
    "blocked for more than",
    "hard LOCKUP",
    "page allocation failure",
    "Out of memory:",
    "Internal error",
    "corrupted",
    "NMI backtrace for cpu",
];
/// Words of Xen's lines, for a domain or itself.
const XEN: &[&str] = &[
    "Xen BUG",
    "Xen WARN",
    "Assertion",
    "FATAL",
    "Panic on CPU",
    "Watchdog",
    "Triple fault",
    "domain_crash",
    "crashed on cpu",
    "Failed vm entry",
    "mm.c",
    "p2m",
    "Unhandled",
];
/// Lines within a report of Linux. Where no report precedes them, its first line was lost.
const INSIDE: &[&str] = &["Call Trace:", "---[ end trace"];
/// Words of a report of RCU or of the watchdog that a CPU was not heard of. A machine that stood still makes guests
/// report that, with nothing wrong in them.
pub const STALL: &[&str] = &["rcu: INFO:", "soft lockup"];
/// Words of lines that continue a report of a stall after a stack: the stack of another CPU follows.
const STALL_GOES_ON: &[&str] = &[
    "NMI backtrace for cpu",
    "kthread starved",
    "kthread timer wakeup didn't happen",
    "Stack dump where RCU GP kthread last ran",
    "Task dump for CPU",
];
/// What Xen says when its platform timer wrapped unseen, which happens when QEMU did not run it for seconds.
const WRAPPED: &str = "unexpectedly wrapped";

/// Something that is broken: the lines of one report.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// Its lines, at least one. The first says what it is.
    pub lines: Vec<String>,
    /// A stall, seen to its end.
    pub stall: bool,
}

impl Report {
    /// The first line.
    pub fn head(&self) -> &str {
        self.lines.first().map_or("", String::as_str)
    }

    /// Whether one of these is in its first line.
    pub fn is_one_of(&self, expected: &[&str]) -> bool {
        expected.iter().any(|words| self.head().contains(words))
    }
}

/// A text taken apart.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Read {
    /// All reports, in order.
    pub reports: Vec<Report>,
    /// Lines that belong to none.
    pub others: Vec<String>,
    /// How often Xen found that the machine had stood still.
    pub stops: usize,
}

/// Takes the text of a console, or of a kernel's log, apart.
///
/// A report of Linux goes on to its `end trace`; one of a stall to its `</TASK>`, and to those of further CPUs that
/// follow at once. A line with words of the first kind begins a new report, so that nothing is hidden in another. Each
/// such line of Xen is a report of its own.
pub fn read(text: &str) -> Read {
    let mut read = Read::default();
    let mut place = Place::Outside;
    for line in text.lines() {
        if line.contains(WRAPPED) {
            read.stops += 1;
        }
        if line.contains("(XEN)") {
            if has(line, XEN) {
                read.reports.push(alone(line));
            } else {
                read.others.push(line.to_owned());
            }
            continue;
        }
        place = read.linux(line, place);
    }
    read
}

/// Where in the text the next line is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    Outside,
    /// In the last report.
    Inside,
    /// Behind a stack of the last report, which is of a stall.
    Behind,
}

impl Read {
    /// Takes a line of a kernel.
    fn linux(&mut self, line: &str, place: Place) -> Place {
        let goes_on = has(line, STALL_GOES_ON);
        if has(line, LINUX) && !(goes_on && place != Place::Outside) {
            self.reports.push(alone(line));
            return Place::Inside;
        }
        match (place, self.reports.last_mut()) {
            (Place::Inside, Some(last)) => {
                last.lines.push(line.to_owned());
                if line.contains("---[ end trace") {
                    Place::Outside
                } else if has(last.head(), STALL) && line.contains("</TASK>") {
                    last.stall = true;
                    Place::Behind
                } else {
                    Place::Inside
                }
            }
            (Place::Behind, Some(last)) if goes_on => {
                last.lines.push(line.to_owned());
                last.stall = false;
                Place::Inside
            }
            _ if has(line, INSIDE) => {
                self.reports.push(alone(line));
                Place::Inside
            }
            _ => {
                self.others.push(line.to_owned());
                Place::Outside
            }
        }
    }
}

fn alone(line: &str) -> Report {
    Report {
        lines: vec![line.to_owned()],
        stall: false,
    }
}

fn has(line: &str, words: &[&str]) -> bool {
    words.iter().any(|words| line.contains(words))
}

/// What is wrong in a text, and how many reports were excused.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Judged {
    /// Reports that nobody expected.
    pub wrong: Vec<Report>,
    /// Stalls that the machine caused.
    pub excused: usize,
}

/// Judges reports. Expected are those with one of `expected` in their first line. Of the stalls, at most `stops` are
/// excused: each time that the machine stood still explains one in each log.
pub fn judge(reports: Vec<Report>, expected: &[&str], stops: usize) -> Judged {
    let mut judged = Judged::default();
    for report in reports {
        if report.is_one_of(expected) {
            continue;
        }
        if report.stall && judged.excused < stops {
            judged.excused += 1;
        } else {
            judged.wrong.push(report);
        }
    }
    judged
}

#[cfg(test)]
mod tests {
    use super::*;

    const WARN: &str = "[  1.0] ------------[ cut here ]------------\n\
        [  1.0] WARNING: CPU: 0 PID: 1 at locus_warn.c:7 locus_warn_inner+0x1/0x2 [locus_warn]\n\
        [  1.0] Call Trace:\n\
        [  1.0]  <TASK>\n\
        [  1.0]  </TASK>\n\
        [  1.0] ---[ end trace 0000000000000000 ]---\n";
    const STALLED: &str = "[  2.0] rcu: INFO: rcu_preempt self-detected stall on CPU\n\
        [  2.0] rcu: \t0-....: (5249 ticks this GP)\n\
        [  2.0] Call Trace:\n\
        [  2.0]  <TASK>\n\
        [  2.0]  </TASK>\n";
    const OTHER_CPU: &str = "[  2.1] NMI backtrace for cpu 1\n\
        [  2.1] Call Trace:\n\
        [  2.1]  </TASK>\n";
    const OOPS: &str = "[  3.0] BUG: kernel NULL pointer dereference, address: 0\n\
        [  3.0] Oops: 0002 [#1] PREEMPT SMP NOPTI\n\
        [  3.0] Call Trace:\n\
        [  3.0] ---[ end trace 0000000000000000 ]---\n";

    fn heads(text: &str, expected: &[&str], stops: usize) -> Vec<String> {
        let judged = judge(read(text).reports, expected, stops);
        judged.wrong.iter().map(|r| r.head().to_owned()).collect()
    }

    #[test]
    fn a_report_is_expected_by_name_and_only_to_its_end() {
        assert_eq!(heads(WARN, &["locus_warn.c"], 0), [""; 0]);
        assert_eq!(heads(WARN, &["other.c"], 0).len(), 1);
        let both = format!("{WARN}{OOPS}");
        let found = heads(&both, &["locus_warn.c"], 0);
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(found[0].contains("NULL pointer"), "{found:?}");
        // Within an expected report another one begins.
        let nested = WARN.replace("[  1.0]  <TASK>\n", OOPS);
        let found = heads(&nested, &["locus_warn.c"], 0);
        assert!(found[0].contains("NULL pointer"), "{found:?}");
    }

    #[test]
    fn a_stop_of_the_machine_excuses_one_stall_and_nothing_else() {
        assert_eq!(heads(STALLED, &[], 0).len(), 1);
        assert_eq!(heads(STALLED, &[], 1), [""; 0]);
        let all_cpus = format!("{STALLED}{OTHER_CPU}");
        assert_eq!(heads(&all_cpus, &[], 1), [""; 0]);
        let twice = format!("{STALLED}{STALLED}");
        assert_eq!(heads(&twice, &[], 1).len(), 1);
        for after in [OOPS, WARN] {
            let found = heads(&format!("{STALLED}{after}"), &[], 9);
            assert!(!found.is_empty(), "{after}");
        }
        // A line within it names what taints the kernel (since Linux 6.12, kernel/panic.c: `taint_flags`).
        let tainted = STALLED.replace(
            "Call Trace:",
            "Tainted: [L]=SOFTLOCKUP\n[  2.0] Call Trace:",
        );
        assert_eq!(heads(&tainted, &[], 1), [""; 0]);
        // One that is cut short may hide anything.
        let cut = STALLED.replace("</TASK>", "");
        assert_eq!(heads(&cut, &[], 9).len(), 1);
    }

    #[test]
    fn lines_after_a_stall_are_lines_again() {
        let text = format!("{STALLED}[  2.2] hello\n");
        assert_eq!(read(&text).others, ["[  2.2] hello"]);
    }

    #[test]
    fn a_report_without_its_first_line_counts() {
        let rest = WARN.split_once("[locus_warn]\n").unwrap().1;
        assert_eq!(heads(rest, &["locus_warn.c"], 9).len(), 1);
        assert_eq!(heads("[ 1.0] ---[ end trace 0 ]---\n", &[], 9).len(), 1);
    }

    #[test]
    fn each_line_of_xen_counts_by_itself() {
        let text = "(XEN) Freed 656kB init memory\n\
            (XEN) mm.c:2134:d1v0 Bad L1 flags 800000\n\
            (XEN) Assertion 'x' failed at y.c:1\n\
            (XEN) Platform timer appears to have unexpectedly wrapped 3 times.\n";
        assert_eq!(heads(text, &["Bad L1 flags"], 9).len(), 1);
        assert_eq!(read(text).stops, 1);
        assert_eq!(read(text).others.len(), 2);
    }

    #[test]
    fn a_quiet_console_is_quiet() {
        let text =
            "dom0 is up after 9.20 s, agent on /dev/vport0p1\n[    3.45] Grant table initialized\n";
        assert_eq!(heads(text, &[], 0), [""; 0]);
        assert_eq!(read("").reports, []);
    }
}
