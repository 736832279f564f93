//! The audit log: one line of JSON for every action on a guest, done or failed.
//!
//! Each line has the hash of the line before it and ends with its own hash, the SHA-256 of all that is before that
//! member. A line that is changed or removed in the middle thus breaks the chain after it. Number and hash of the
//! last line are also stored in another file, so that lines missing at the end are noticed. Root in dom0 can rewrite
//! all of it; no other user can change it unnoticed.

pub mod in_force;

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt};
use std::path::{Path, PathBuf};

use locus_xen::fault;
use memchr::{memchr, memmem};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::durable::{self, Step, Target};
use crate::error::{Error, Result};
use crate::paths::{AUDIT_HEAD, AUDIT_LOG};
use in_force::InForce;

/// Longest line, in bytes.
const LINE_MAX: u64 = 64 << 10;
/// Longest message in one.
const MESSAGE_MAX: usize = 4096;
/// Bytes read at once in the search for a guest's last line: several lines.
const BLOCK: usize = 256 << 10;
/// What is before a line's own hash.
const OWN: &str = ",\"hash\":\"";
/// The hash before the first line.
const NONE: &str = "0000000000000000000000000000000000000000000000000000000000000000";

/// One action on a guest and its result, successful or not.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Action {
    /// When it ended, in seconds since 1970.
    pub time: u64,
    /// Who asked for it.
    pub who: String,
    /// Name of the [`Operation`](crate::operation::Operation). A string, because a line of a later version is an entry too, whatever its operation
    /// is called: as an unknown variant it would look like a damaged line.
    pub op: String,
    /// Id of the domain.
    pub domid: u16,
    /// Its name.
    pub domain: String,
    /// Its UUID.
    pub uuid: String,
    /// Of `recover`: name of the operation that was interrupted.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub of: String,
    /// Name of the payload.
    pub patch: String,
    /// SHA-256 of its file, in hex; of a reverted patch the one in its record in the guest.
    pub sha256: String,
    /// SHA-256 of the record that was placed in the guest's memory, in hex; empty where none was.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub record: String,
    /// The result, in the words of `-o json`.
    pub result: String,
    /// The exit code.
    pub exit: u8,
    /// Patches that are no longer in force because of it; of `recover` all that are not in force.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub superseded: Vec<String>,
    /// What went wrong.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
    /// How long the guest was paused, in microseconds.
    pub pause_us: u64,
    /// SHA-256 of the guest's code of all functions concerned, before and after, in hex; empty where
    /// nothing was changed.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub text_before: String,
    /// See `text_before`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub text_after: String,
}

/// A line of the log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Line {
    /// Version of this structure.
    pub schema: u32,
    /// Its number, from 1.
    pub seq: u64,
    /// What was done.
    #[serde(flatten)]
    pub action: Action,
    /// Patches that are in force in the guest after it, in the order they were applied. A patch that was lost in a
    /// reboot counts until it is reverted.
    #[serde(default)]
    pub in_force: Vec<InForce>,
    /// Hash of the line before it, in hex.
    pub prev: String,
}

/// The last line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Head {
    seq: u64,
    hash: String,
}

/// The content of a log.
#[derive(Debug, Default)]
pub struct History {
    /// Its lines, including those after a fault.
    pub lines: Vec<Line>,
    /// Signs that it was changed; empty if there are none.
    pub faults: Vec<String>,
}

/// An audit log.
#[derive(Clone, Debug)]
pub struct Audit {
    log: PathBuf,
    head: Option<PathBuf>,
}

impl Audit {
    /// The log of this host.
    #[must_use]
    pub fn system() -> Audit {
        Audit {
            log: AUDIT_LOG.into(),
            head: Some(AUDIT_HEAD.into()),
        }
    }

    /// A copy of a log, without the file that has number and hash of its last line.
    #[must_use]
    pub fn copy(log: &Path) -> Audit {
        Audit {
            log: log.to_owned(),
            head: None,
        }
    }

    /// Path of the log.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.log
    }

    fn failed(&self, what: &str, error: &io::Error) -> Error {
        Error::failed(format!(
            "{what} the audit log {} or what is known of its last line ({AUDIT_HEAD}): {error}",
            self.log.display()
        ))
    }

    /// Opens the log for writing. An action that can't be recorded must not begin.
    ///
    /// # Errors
    /// [`Class::Failed`](crate::error::Class::Failed).
    pub fn open(&self) -> Result<Writer<'_>> {
        let open = || {
            fault::point("audit: open")?;
            for path in self.head.iter().chain([&self.log]) {
                if let Some(folder) = path.parent() {
                    fs::create_dir_all(folder)?;
                }
            }
            self.read_head()?;
            let mut options = OpenOptions::new();
            options.read(true).append(true).create(true).mode(0o600);
            options.open(&self.log)
        };
        match open() {
            Ok(file) => Ok(Writer { audit: self, file }),
            Err(error) => Err(self.failed("cannot open", &error)),
        }
    }

    fn read_head(&self) -> io::Result<Option<Head>> {
        let Some(head) = &self.head else {
            return Ok(None);
        };
        match fs::read(head) {
            Ok(bytes) => Ok(Some(serde_json::from_slice(&bytes)?)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The patches that are in force in the guest `uuid`, in the order they were applied; none for a guest without a
    /// line. The time does not depend on the lines before the guest's last one. The chain is not checked:
    /// [`Audit::history`] does that.
    ///
    /// # Errors
    /// [`Class::Failed`](crate::error::Class::Failed) when the log can't be read.
    pub fn in_force(&self, uuid: &str) -> Result<Vec<InForce>> {
        let read = match File::open(&self.log) {
            Ok(file) => file
                .lock_shared()
                .and_then(|()| last_in_force(&file, uuid, BLOCK)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => Err(error),
        };
        read.map_err(|error| self.failed("cannot read", &error))
    }

    /// Reads the log and checks its chain. A log that isn't there is an empty one.
    ///
    /// # Errors
    /// [`Class::Failed`](crate::error::Class::Failed) when it can't be read.
    pub fn history(&self) -> Result<History> {
        let failed = |error: io::Error| self.failed("cannot read", &error);
        let mut history = History::default();
        let mut last = match File::open(&self.log) {
            Ok(file) => {
                file.lock_shared().map_err(failed)?;
                history.read(BufReader::new(file)).map_err(failed)?
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(failed(error)),
        };
        // A run that died between the two files left the line before the last in the head.
        last.reverse();
        match self.read_head() {
            Ok(None) if self.head.is_none() || last.is_empty() => {}
            Ok(None) => history.faults.push(format!(
                "{AUDIT_HEAD} is not there: whether lines are missing at the end can't be told"
            )),
            Ok(Some(head)) if last.iter().take(2).any(|line| *line == head) => {}
            Ok(Some(head)) => history.faults.push(format!(
                "the last line should be entry {} with hash {}, and is not there",
                head.seq, head.hash
            )),
            Err(error) => history.faults.push(format!("{AUDIT_HEAD}: {error}")),
        }
        Ok(history)
    }
}

impl History {
    /// Reads all lines; returns number and hash of each.
    fn read(&mut self, mut from: impl BufRead) -> io::Result<Vec<Head>> {
        let mut heads: Vec<Head> = Vec::new();
        for number in 1u64.. {
            let mut text = Vec::new();
            if from.by_ref().take(LINE_MAX).read_until(b'\n', &mut text)? == 0 {
                break;
            }
            let Some((line, hash)) = parse(&text) else {
                self.faults.push(format!("line {number} is no entry"));
                continue;
            };
            if hash.is_none() {
                self.faults.push(format!(
                    "line {number} (entry {}) is not what was written: its hash differs",
                    line.seq
                ));
            }
            if let Some(before) = heads.last() {
                if line.prev != before.hash || line.seq != before.seq.wrapping_add(1) {
                    self.faults.push(format!(
                        "line {number} (entry {}) does not follow the one before it (entry {})",
                        line.seq, before.seq
                    ));
                }
            }
            heads.push(Head {
                seq: line.seq,
                hash: hash.unwrap_or_default(),
            });
            self.lines.push(line);
        }
        Ok(heads)
    }
}

fn digest(text: &str) -> String {
    hex::encode(Sha256::digest(text.as_bytes()))
}

/// A line, and its hash if it is right.
fn parse(text: &[u8]) -> Option<(Line, Option<String>)> {
    let text = std::str::from_utf8(text).ok()?.strip_suffix('\n')?;
    let line: Line = serde_json::from_str(text).ok()?;
    let (hashed, own) = text.rsplit_once(OWN)?;
    let own = own.strip_suffix("\"}")?;
    Some((line, (digest(hashed) == own).then(|| own.to_owned())))
}

/// What is in force by the last line about the guest `uuid`. Searches from the end, `block` bytes at a time.
fn last_in_force(file: &File, uuid: &str, block: usize) -> io::Result<Vec<InForce>> {
    // A quote within a string has a backslash before it, so only the member is found.
    let member = format!("\"uuid\":{}", serde_json::to_string(uuid)?);
    let member = memmem::Finder::new(&member);
    let mut end = file.metadata()?.len();
    // What was read of the line that begins before `end`.
    let mut rest = Vec::new();
    while end > 0 {
        let start = end.saturating_sub(block as u64);
        let mut bytes = vec![0; usize::try_from(end - start).unwrap_or(0)];
        file.read_exact_at(&mut bytes, start)?;
        bytes.append(&mut rest);
        let whole = match start {
            0 => 0,
            _ => memchr(b'\n', &bytes).map_or(bytes.len(), |at| at + 1),
        };
        let lines = bytes.split_off(whole);
        let mut lines = lines.split_inclusive(|&byte| byte == b'\n').rev();
        let found = lines.find_map(|text| {
            member.find(text)?;
            parse(text).map(|(line, _)| line)
        });
        if let Some(line) = found {
            return Ok(line.in_force);
        }
        rest = bytes;
        // A longer line is no entry.
        rest.truncate(BLOCK);
        end = start;
    }
    Ok(Vec::new())
}

/// A log of actions, as an operation on a guest needs it.
pub trait Log: fmt::Debug {
    /// Opens it for writing.
    ///
    /// # Errors
    /// It can't be opened: the operation must not begin.
    fn open(&self) -> Result<Box<dyn Append + '_>>;
    /// The patches that are in force in the guest `uuid` by its last line, in the order they were applied.
    ///
    /// # Errors
    /// It can't be read.
    fn in_force(&self, uuid: &str) -> Result<Vec<InForce>>;
}

/// An open log of actions.
pub trait Append {
    /// Appends a line; it is on disk when this returns.
    ///
    /// # Errors
    /// It can't be appended: the log is as it was before.
    fn append(&mut self, action: Action) -> Result<()>;
}

impl Log for Audit {
    fn open(&self) -> Result<Box<dyn Append + '_>> {
        Ok(Box::new(Audit::open(self)?))
    }

    fn in_force(&self, uuid: &str) -> Result<Vec<InForce>> {
        Audit::in_force(self, uuid)
    }
}

impl Append for Writer<'_> {
    fn append(&mut self, action: Action) -> Result<()> {
        Writer::append(self, action)
    }
}

/// A log that is open.
#[derive(Debug)]
pub struct Writer<'a> {
    audit: &'a Audit,
    file: File,
}

impl Writer<'_> {
    /// Appends a line; it is on disk when this returns.
    ///
    /// # Errors
    /// [`Class::Failed`](crate::error::Class::Failed): the log is as it was before.
    pub fn append(&mut self, action: Action) -> Result<()> {
        let appended = self.file.lock().and_then(|()| {
            let done = self.append_locked(action);
            self.file.unlock().and(done)
        });
        appended.map_err(|error| self.audit.failed("cannot write", &error))
    }

    fn append_locked(&mut self, mut action: Action) -> io::Result<()> {
        let end = action.message.floor_char_boundary(MESSAGE_MAX);
        action.message.truncate(end);
        fault::point("audit: append")?;
        let before = self.last()?;
        let in_force = last_in_force(&self.file, &action.uuid, BLOCK)?;
        let line = Line {
            schema: 1,
            seq: before.seq.wrapping_add(1),
            in_force: in_force::after(in_force, &action),
            action,
            prev: before.hash,
        };
        let text = serde_json::to_string(&line)?;
        let hashed = text.strip_suffix('}').unwrap_or(&text);
        let head = Head {
            seq: line.seq,
            hash: digest(hashed),
        };
        let len = self.file.metadata()?.len();
        let written = self.write(&format!("{hashed}{OWN}{}\"}}\n", head.hash), &head);
        if written.is_err() {
            // Nothing stays of a line that is not recorded. If it can't be removed, `history` reports a fault.
            let _ = self.file.set_len(len);
        }
        written
    }

    /// Writes a line, and then its number and hash to the other file.
    fn write(&mut self, text: &str, head: &Head) -> io::Result<()> {
        self.file.write_all(text.as_bytes())?;
        fault::point("audit: sync")?;
        self.file.sync_data()?;
        let Some(at) = &self.audit.head else {
            return Ok(());
        };
        let target = Target {
            path: at,
            new: &at.with_extension("new"),
            mode: 0o644,
            synced: true,
        };
        durable::replace(&target, &[&serde_json::to_vec(head)?], |step| match step {
            Step::Rename => fault::point("audit: rename"),
            _ => Ok(()),
        })?;
        // An error here must not undo the line, because the head has it already. After a power failure the head may
        // then be some lines behind.
        let _ = at.parent().map(durable::sync_folder);
        Ok(())
    }

    /// Number and hash of the last line: of this log, or of the log that was rotated away. A line that was cut short
    /// gets its line break, and stays as a fault.
    fn last(&mut self) -> io::Result<Head> {
        let head = self.audit.read_head()?.unwrap_or(Head {
            seq: 0,
            hash: NONE.to_owned(),
        });
        let len = self.file.metadata()?.len();
        self.file
            .seek(SeekFrom::Start(len.saturating_sub(LINE_MAX)))?;
        let mut tail = Vec::new();
        self.file.read_to_end(&mut tail)?;
        if tail.last().is_some_and(|&byte| byte != b'\n') {
            self.file.write_all(b"\n")?;
            tail.push(b'\n');
        }
        let lines = tail.split_inclusive(|&byte| byte == b'\n');
        let last = lines.rev().find_map(parse);
        // A run that died between the two files left one line more than the head has.
        Ok(match last {
            Some((line, Some(hash))) if line.seq >= head.seq => Head {
                seq: line.seq,
                hash,
            },
            _ => head,
        })
    }
}

#[cfg(test)]
mod tests;
