//! Reads a log and checks that nothing was changed in it or taken out of it.

use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::path::Path;

use super::{for_each_line, rotation, Action, Audit, Head, Line, LOST, NONE, ROTATED};
use crate::error::Result;

/// The content of a log.
#[derive(Debug, Default)]
pub struct History {
    /// Its lines, including those after a fault.
    pub lines: Vec<Line>,
    /// Signs that it was changed; empty if there are none.
    pub faults: Vec<String>,
    /// What must be known to read it, and is no fault: that it was rotated.
    pub notes: Vec<String>,
}

impl History {
    /// Reads all lines; returns number and hash of each.
    pub(super) fn read(&mut self, from: impl BufRead) -> io::Result<Vec<Head>> {
        let mut ends: Vec<Head> = Vec::new();
        let mut is_cut = false;
        for_each_line(from, |number, parsed| {
            let Some((line, hash)) = parsed else {
                self.faults.push(format!("line {number} is no entry"));
                return Ok(());
            };
            let seq = line.seq;
            if hash.is_none() {
                self.faults.push(format!(
                    "line {number} (entry {seq}) is not what was written: its hash differs"
                ));
            }
            match ends.last() {
                None => self.check_begin(&line),
                Some(before) => {
                    if line.prev != before.hash || seq != before.seq.wrapping_add(1) {
                        self.faults.push(format!(
                            "line {number} (entry {seq}) does not follow the one before it (entry {})",
                            before.seq
                        ));
                    }
                }
            }
            let first = ends.first().map_or(seq, |end| end.seq);
            if line.first != 0 && line.first != first && !is_cut {
                is_cut = true;
                self.faults.push(format!(
                    "it began with entry {} and now begins with entry {first}: it was cut at its front",
                    line.first
                ));
            }
            ends.push(Head {
                seq,
                hash: hash.unwrap_or_default(),
                first: line.first,
            });
            self.lines.push(line);
            Ok(())
        })?;
        Ok(ends)
    }

    /// Checks how a log begins.
    fn check_begin(&mut self, line: &Line) {
        let seq = line.seq;
        match (&*line.begins, seq) {
            (ROTATED, _) => self.notes.push(format!(
                "it begins with entry {seq}: the entries before that are in the file to which it was rotated"
            )),
            (LOST, _) => self.faults.push(format!(
                "it begins with entry {seq}: the entries before that are lost, because the log was emptied or removed, \
                 and not rotated"
            )),
            ("", 1) if line.prev == NONE => {}
            ("", 1) => self.faults.push("something was before entry 1".to_owned()),
            ("", _) => self.notes.push(format!(
                "it begins with entry {seq}: why is not known, because an earlier version of xen-locus wrote that"
            )),
            (other, _) => self.notes.push(format!(
                "it begins with entry {seq}, for a reason that this version of xen-locus does not know: {other}"
            )),
        }
    }

    /// Checks that the file `log` ends as `head` says. `ends` are number and hash of its lines.
    pub(super) fn check_end(&mut self, ends: &[Head], head: &Head, log: &Path) {
        let is_head = |end: &Head| end.seq == head.seq && end.hash == head.hash;
        // A run that died between the two files left the line before the last in the head, which may be in another file.
        let last = ends.iter().rev().take(2).any(is_head);
        let only = self.lines.first().filter(|_| ends.len() == 1);
        let goes_on = |line: &Line| line.seq == head.seq.wrapping_add(1) && line.prev == head.hash;
        if last || only.is_some_and(goes_on) || (ends.is_empty() && head.seq == 0) {
            return;
        }
        if !ends.is_empty() {
            self.faults.push(format!(
                "the last line should be entry {} with hash {}, and is not there",
                head.seq, head.hash
            ));
            return;
        }
        match rotation::find(log, head) {
            Some(found) => self.notes.push(format!(
                "it was rotated, and nothing was logged since: entry {} is in {}",
                found.line.seq,
                found.path.display()
            )),
            None => self.faults.push(format!(
                "it has no entries, and the last line should be entry {} with hash {}: it was emptied or removed, or \
                 rotated to where that can't be seen",
                head.seq, head.hash
            )),
        }
    }
}

impl Audit {
    /// The number of the last entry; 0 if there is none.
    ///
    /// # Errors
    /// [`Class::Failed`](crate::error::Class::Failed) when the log can't be read.
    pub fn last_entry(&self) -> Result<u64> {
        let read = || {
            let (log, _lock) = self.open_to_read()?;
            let head = self.read_head()?.unwrap_or_else(Head::none);
            let last = rotation::last(&self.log, log.as_ref(), &head)?;
            Ok(last.map_or(head.seq, |line| line.seq.max(head.seq)))
        };
        read().map_err(|error| self.failed("cannot read", &error))
    }

    /// The lines after the entry with this number that are `wanted`, also those in files to which the log was rotated since.
    /// `None` if the log and these files do not go back that far. No other line is kept in memory.
    ///
    /// # Errors
    /// [`Class::Failed`](crate::error::Class::Failed) when the log can't be read.
    pub fn lines_since(&self, entry: u64, wanted: Wanted<'_>) -> Result<Option<Vec<Line>>> {
        let read = || {
            let (log, _lock) = self.open_to_read()?;
            let lines_in = |file| lines_in(file, &|line| line.seq > entry && wanted(&line.action));
            let (before, mut lines) = log.map_or_else(|| Ok((None, Vec::new())), lines_in)?;
            // The line with which the file before these lines ends.
            let mut end = match before {
                Some(before) => before,
                None => {
                    let head = self.read_head()?.unwrap_or_else(Head::none);
                    rotation::find(&self.log, &head).map_or(head, |found| found.end())
                }
            };
            while end.seq > entry {
                let Some(found) = rotation::find_end(&self.log, &end) else {
                    return Ok(None);
                };
                let (before, mut earlier) = lines_in(File::open(found.path)?)?;
                end = match before {
                    Some(before) if before.seq < end.seq => before,
                    _ => return Ok(None),
                };
                earlier.append(&mut lines);
                lines = earlier;
            }
            Ok(Some(lines))
        };
        read().map_err(|error| self.failed("cannot read", &error))
    }
}

/// Which actions somebody wants to know.
pub type Wanted<'a> = &'a dyn Fn(&Action) -> bool;

/// What the first line of a file says of the line before it, and those lines of the file that are `wanted`.
fn lines_in(file: File, wanted: &dyn Fn(&Line) -> bool) -> io::Result<(Option<Head>, Vec<Line>)> {
    let (mut before, mut lines) = (None, Vec::new());
    for_each_line(BufReader::new(file), |_, parsed| {
        if let Some((line, _)) = parsed {
            before.get_or_insert_with(|| Head::before(&line));
            lines.extend(wanted(&line).then_some(line));
        }
        Ok(())
    })?;
    Ok((before, lines))
}
