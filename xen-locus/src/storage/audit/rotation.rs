//! Whether a log was rotated: renamed or copied to a file beside it, whose name begins with that of the log.
//!
//! Such a file is told by its last line. A log that was emptied or removed leaves none. A file that is compressed at once is
//! not read; the rule of this project for logrotate compresses one later.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use super::{parse, Head, Line, LINE_MAX};

/// The file to which a log was rotated, and its last line.
pub(super) struct Rotated {
    pub(super) path: PathBuf,
    pub(super) line: Line,
    pub(super) hash: String,
}

impl Rotated {
    /// Number and hash of its last line.
    pub(super) fn end(&self) -> Head {
        Head {
            seq: self.line.seq,
            hash: self.hash.clone(),
            first: 0,
        }
    }
}

/// The file to which `log` was rotated, if `head` is of its last line. After a run that died between the two it may be of
/// the line before.
pub(super) fn find(log: &Path, head: &Head) -> Option<Rotated> {
    let follows = |found: &Rotated| {
        found.line.seq == head.seq.wrapping_add(1) && found.line.prev == head.hash
    };
    // A file that begins and ends with the line after the head may be beside the one that ends with the head.
    search(log, follows).or_else(|| find_end(log, head))
}

/// The file to which `log` was rotated that ends with the line of `head`.
pub(super) fn find_end(log: &Path, head: &Head) -> Option<Rotated> {
    let is_end = |found: &Rotated| found.line.seq == head.seq && found.hash == head.hash;
    search(log, is_end)
}

/// A file to which `log` may have been rotated, and which `fits`.
fn search(log: &Path, fits: impl Fn(&Rotated) -> bool) -> Option<Rotated> {
    let name = log.file_name()?.to_str()?;
    let entries = fs::read_dir(log.parent()?).ok()?.flatten();
    let others = entries.filter(|entry| {
        let other = entry.file_name();
        let rest = other.to_str().and_then(|other| other.strip_prefix(name));
        let is_file = entry.file_type().is_ok_and(|kind| kind.is_file());
        is_file && rest.is_some_and(|rest| rest.starts_with(['.', '-']))
    });
    let mut rotated = others.filter_map(|entry| {
        let path = entry.path();
        let (line, hash) = File::open(&path).and_then(|file| last_in(&file)).ok()??;
        let hash = hash?;
        Some(Rotated { path, line, hash })
    });
    rotated.find(fits)
}

/// The last line that was logged, if it is found: in the open `file` of `log`, or where that was rotated.
pub(super) fn last(log: &Path, file: Option<&File>, head: &Head) -> io::Result<Option<Line>> {
    if let Some(file) = file {
        if let Some((line, _)) = last_in(file)? {
            return Ok(Some(line));
        }
    }
    Ok(find(log, head).map(|found| found.line))
}

/// The last line of `file` that is an entry, as [`parse`] finds it.
pub(super) fn last_in(file: &File) -> io::Result<Option<(Line, Option<String>)>> {
    let len = file.metadata()?.len();
    let start = len.saturating_sub(LINE_MAX);
    let mut tail = vec![0; usize::try_from(len - start).unwrap_or(0)];
    file.read_exact_at(&mut tail, start)?;
    let mut lines = tail.split_inclusive(|&byte| byte == b'\n').rev();
    Ok(lines.find_map(parse))
}
