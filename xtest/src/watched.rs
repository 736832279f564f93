//! The consoles of a machine: those of guests, and the one that Xen and dom0 share.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use crate::consoles::{judge, read, Judged, STALL};
use crate::dom0::Dom0;
use crate::verdict::Verdict;

/// A line in a guest's log: a start of the guest begins.
pub const START: &str = "xtest: the guest is started";
/// A line in a guest's log: what came since [`START`] does not count, because QEMU lost the guest.
pub const LOST: &str = "xtest: this start does not count";

/// The most lines that are shown of one report.
const SHOWN: usize = 12;

/// The name of the console that is no guest's.
const XEN_AND_DOM0: &str = "Xen and dom0";

/// The words that are expected on this console.
fn expected_of<'w>(console: &str, expected: &[&'w str], long_pauses: bool) -> Vec<&'w str> {
    let mut words = expected.to_vec();
    if long_pauses && console != XEN_AND_DOM0 {
        words.extend(STALL);
    }
    words
}

/// How far the consoles were read.
#[derive(Debug)]
pub struct Watched {
    xen: PathBuf,
    xen_at: usize,
    guests_at: BTreeMap<String, u64>,
}

/// What a look at all consoles found.
#[derive(Debug, Default)]
pub struct Look {
    /// What is wrong, in words; empty if nothing is.
    pub wrong: String,
    /// Reports that were excused.
    pub excused: usize,
}

impl Watched {
    /// Nothing was read yet. `xen` is the file of the console of Xen and dom0.
    pub fn new(xen: PathBuf) -> Self {
        Self {
            xen,
            xen_at: 0,
            guests_at: BTreeMap::new(),
        }
    }

    /// The text of Xen's and dom0's console since the last look, which stays unread; and where it ends.
    pub fn peek_xen(&self) -> (String, usize) {
        let bytes = std::fs::read(&self.xen).unwrap_or_default();
        let new = bytes.get(self.xen_at..).unwrap_or_default();
        (String::from_utf8_lossy(new).into_owned(), bytes.len())
    }

    /// Looks at what all consoles say since the last look. Lines with one of `expected` in them are expected; after long
    /// pauses a guest may also report that a CPU was stuck.
    pub fn look(&mut self, dom0: &Dom0, expected: &[&str], long_pauses: bool) -> Look {
        let mut texts = BTreeMap::new();
        // The agent writes a guest's last words a moment after they were said.
        std::thread::sleep(Duration::from_millis(100));
        if !dom0.is_down() {
            match self.guests(dom0) {
                Ok(guests) => texts = guests,
                Err(why) => {
                    return Look {
                        wrong: format!("the guests' consoles can't be read: {why}"),
                        excused: 0,
                    }
                }
            }
        }
        let (xen, end) = self.peek_xen();
        self.xen_at = end;
        let stops = read(&xen).stops;
        texts.insert(XEN_AND_DOM0.to_owned(), xen);
        let mut look = Look::default();
        for (name, text) in &texts {
            let expected = &expected_of(name, expected, long_pauses);
            let judged = judge(read(&counting(text)).reports, expected, stops);
            look.excused += judged.excused;
            look.wrong += &said(name, &judged);
        }
        look
    }

    /// The texts of guests' consoles since the last look, by the guest's name.
    fn guests(&mut self, dom0: &Dom0) -> Result<BTreeMap<String, String>, Verdict> {
        let known: Vec<String> = self
            .guests_at
            .iter()
            .map(|(name, at)| format!("{name} {at}"))
            .collect();
        // For each file with more than was read: a line with its name and size, then what is new.
        let out = dom0.sh(&format!(
            "cd /var/log; for f in guest-*.log; do [ -e $f ] || continue; size=$(stat -c %s $f); \
             at=$(echo '{}' | awk -v f=$f '$1 == f {{n = $2}} END {{print n + 0}}'); \
             [ $size -gt $at ] || continue; printf '\\001%s %s\\n' $f $size; \
             tail -c +$((at + 1)) $f | head -c $((size - at)); done",
            known.join("\n")
        ))?;
        let text = String::from_utf8_lossy(&out.stdout);
        let mut texts = BTreeMap::<String, String>::new();
        let mut last = String::new();
        for part in text.split('\u{1}').skip(1) {
            let (head, body) = part.split_once('\n').unwrap_or((part, ""));
            let size = head.split_once(' ').and_then(|(file, size)| {
                let size = size.parse().ok()?;
                file.starts_with("guest-").then(|| (file.to_owned(), size))
            });
            if let Some((file, size)) = size {
                self.guests_at.insert(file.clone(), size);
                texts.insert(file.clone(), body.to_owned());
                last = file;
            } else if let Some(text) = texts.get_mut(&last) {
                // A guest wrote this byte itself.
                *text += part;
            }
        }
        Ok(texts)
    }
}

/// A guest's log without starts that do not count.
fn counting(text: &str) -> String {
    let mut kept = String::new();
    let mut start = 0;
    for line in text.lines() {
        if line.contains(START) {
            start = kept.len();
        }
        if line.contains(LOST) {
            kept.truncate(start);
            continue;
        }
        kept += line;
        kept.push('\n');
    }
    kept
}

fn said(name: &str, judged: &Judged) -> String {
    let mut text = String::new();
    for report in &judged.wrong {
        text += &format!("on the console of {name}:\n");
        for line in report.lines.iter().take(SHOWN) {
            text += &format!("    {line}\n");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_pause_excuses_a_guest_and_not_dom0() {
        let (guest, dom0) = ("guest-pv.log", XEN_AND_DOM0);
        assert!(expected_of(guest, &["x"], true).contains(&STALL[0]));
        assert_eq!(expected_of(dom0, &["x"], true), ["x"]);
        assert_eq!(expected_of(guest, &["x"], false), ["x"]);
    }

    #[test]
    fn a_start_that_does_not_count_takes_its_lines_with_it() {
        let text =
            format!("one\nWARNING: a\n{START}\nKernel panic\n{LOST}\n{START}\nBUG: b\n{START}\n");
        let kept = counting(&text);
        assert_eq!(kept, format!("one\nWARNING: a\n{START}\nBUG: b\n{START}\n"));
    }
}
