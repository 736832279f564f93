//! The audit log: one line of JSON for every action on a guest, done or failed.
//!
//! Each line has the hash of the line before it and ends with its own hash, the SHA-256 of all that is before that
//! member. A line that is changed or removed in the middle thus breaks the chain after it. Each line also has the number of
//! the first line of its file, so that lines missing at the front are noticed. Number and hash of the last line are also
//! stored in another file, so that lines missing at the end are noticed. Root in dom0 can rewrite all of it; no other user
//! can change it unnoticed.
//!
//! - [`history`]: reads all lines and checks the chain;
//! - `writer`: appends a line;
//! - `rotation`: whether a log that is empty was rotated;
//! - [`entries`]: what came of a run, by the entries since it began;
//! - [`in_force`]: which patches are in force in a guest after a line;
//! - `kept`: the same in a file for each guest, which outlasts the rotation of the log.

pub mod entries;
pub mod history;
pub mod in_force;
mod kept;
mod rotation;
mod writer;

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read as _};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use locus_xen::fault;
use memchr::{memchr, memmem};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use crate::paths::{self, AUDIT_HEAD, AUDIT_LOCK, AUDIT_LOG};
pub use history::History;
use in_force::InForce;
pub use writer::Writer;

/// Longest line, in bytes, with its line break.
const LINE_MAX: u64 = 64 << 10;
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
    /// Number of the first line of its file; 0 in a line that an earlier version wrote.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub first: u64,
    /// In the first line of a file that is not the first file: why it begins there, [`ROTATED`] or [`LOST`]. A string, as
    /// [`Action::op`] is.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub begins: String,
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

/// [`Line::begins`]: the log was rotated, so the lines before are in another file.
pub const ROTATED: &str = "rotated";
/// [`Line::begins`]: the log was emptied or removed, so the lines before are lost.
pub const LOST: &str = "lost";

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde passes a reference"
)]
fn is_zero(number: &u64) -> bool {
    *number == 0
}

/// What is known of the last line that was logged.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Head {
    /// Its number; 0 before the first line.
    seq: u64,
    /// Its hash.
    hash: String,
    /// Number of the first line of its file. It also says that what is in force is kept for each guest ([`kept`]), except
    /// perhaps for the guest of the last line. 0 if an earlier version wrote this: neither is known.
    #[serde(default, skip_serializing_if = "is_zero")]
    first: u64,
}

impl Head {
    /// Of no line.
    fn none() -> Head {
        Head {
            seq: 0,
            hash: NONE.to_owned(),
            first: 0,
        }
    }

    /// Of the line before `line`.
    fn before(line: &Line) -> Head {
        Head {
            seq: line.seq.wrapping_sub(1),
            hash: line.prev.clone(),
            first: 0,
        }
    }
}

/// An audit log.
#[derive(Clone, Debug)]
pub struct Audit {
    log: PathBuf,
    beside: Option<Beside>,
    /// So many steps are left until the run is ended.
    #[cfg(test)]
    left: std::cell::Cell<u32>,
}

/// What belongs to a log that is written.
#[derive(Clone, Debug)]
struct Beside {
    /// The file with [`Head`].
    head: PathBuf,
    /// The folder with what is in force in each guest ([`kept`]).
    kept: PathBuf,
    /// The lock of all these files. The log itself is none, because another file may get its name.
    lock: PathBuf,
}

impl Audit {
    /// The log of this host.
    #[must_use]
    pub fn system() -> Audit {
        Audit::new(
            AUDIT_LOG.as_ref(),
            Some(Beside {
                head: AUDIT_HEAD.into(),
                kept: paths::IN_FORCE.into(),
                lock: AUDIT_LOCK.into(),
            }),
        )
    }

    /// A copy of a log, without the other files that belong to it.
    #[must_use]
    pub fn copy(log: &Path) -> Audit {
        Audit::new(log, None)
    }

    fn new(log: &Path, beside: Option<Beside>) -> Audit {
        Audit {
            log: log.to_owned(),
            beside,
            #[cfg(test)]
            left: std::cell::Cell::new(u32::MAX),
        }
    }

    /// Path of the log.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.log
    }

    fn failed(&self, what: &str, error: &io::Error) -> Error {
        let log = self.log.display();
        Error::failed(match self.beside {
            Some(_) => format!(
                "{what} the audit log {log} or what is known of its last line ({AUDIT_HEAD}): {error}"
            ),
            None => format!("{what} the audit log {log}: {error}"),
        })
    }

    /// A step of a run that writes: a fault point. A test can end the run there.
    fn step(&self, name: &str) -> io::Result<()> {
        #[cfg(test)]
        match self.left.get().checked_sub(1) {
            Some(left) => self.left.set(left),
            None => return Err(io::Error::other(format!("ended at {name}"))),
        }
        fault::point(name)
    }

    /// Opens the log for writing about the guest `uuid`. An action that can't be logged must not begin.
    ///
    /// # Errors
    /// [`Class::Failed`](crate::error::Class::Failed).
    pub fn open(&self, uuid: &str) -> Result<Writer<'_>> {
        let open = || {
            self.step("audit: open")?;
            let beside = self.beside.as_ref().ok_or_else(|| {
                io::Error::new(io::ErrorKind::Unsupported, "a copy of a log is not written")
            })?;
            for path in [&beside.head, &self.log] {
                if let Some(folder) = path.parent() {
                    paths::own_folder(folder)?;
                }
            }
            self.read_head()?;
            let lock = paths::open_lock(&beside.lock)?;
            let log = self.open_log()?;
            match kept::read(&beside.kept, uuid) {
                Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                    // No line is half written meanwhile.
                    lock.lock()?;
                    let known = last_of(&log, uuid, BLOCK)?.ok_or_else(|| no_other(&error))?;
                    kept::update(&beside.kept, uuid, known.seq, &known.in_force)?;
                    lock.unlock()?;
                }
                kept => drop(kept?),
            }
            Ok(Writer::new(self, beside, lock, log))
        };
        open().map_err(|error| self.failed("cannot open", &error))
    }

    fn open_log(&self) -> io::Result<File> {
        let mut options = OpenOptions::new();
        options.read(true).append(true).create(true).mode(0o600);
        let file = options.custom_flags(libc::O_NOFOLLOW).open(&self.log)?;
        match file.metadata()?.is_file() {
            true => Ok(file),
            false => Err(io::Error::other("it is no file")),
        }
    }

    fn read_head(&self) -> io::Result<Option<Head>> {
        let Some(beside) = &self.beside else {
            return Ok(None);
        };
        match fs::read(&beside.head) {
            Ok(bytes) => Ok(Some(serde_json::from_slice(&bytes)?)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Opens the log for reading. `None` if it isn't there; that a copy isn't there is an error. Nothing is written to it or
    /// beside it as long as both files that are returned are open.
    fn open_to_read(&self) -> io::Result<(Option<File>, Option<File>)> {
        let open = |path: &Path| match File::open(path) {
            Ok(file) => file.lock_shared().map(|()| Some(file)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        };
        let lock = match &self.beside {
            // Where no run ever made it, no run writes.
            Some(beside) => open(&beside.lock)?,
            // Somebody named this file.
            None => {
                let file = File::open(&self.log)?;
                return file.lock_shared().map(|()| (Some(file), None));
            }
        };
        Ok((open(&self.log)?, lock))
    }

    /// The patches that are in force in the guest `uuid`, in the order they were applied; none for a guest without a
    /// line. That the log was rotated changes nothing. The chain is not checked: [`Audit::history`] does that.
    ///
    /// # Errors
    /// [`Class::Failed`](crate::error::Class::Failed) when the log, or what is kept of it, can't be read.
    pub fn in_force(&self, uuid: &str) -> Result<Vec<InForce>> {
        let read = || {
            let (log, _lock) = self.open_to_read()?;
            let kept = match &self.beside {
                Some(beside) => kept::read(&beside.kept, uuid)?.unwrap_or_default(),
                None => kept::Kept::default(),
            };
            // A head that can't be read tells nothing.
            let head = self.read_head().ok().flatten();
            let line = match (&head, &log) {
                (Some(head), _) if head.first != 0 => {
                    let last = rotation::last(&self.log, log.as_ref(), head)?;
                    last.filter(|line| line.action.uuid == uuid)
                }
                (_, Some(log)) => last_of(log, uuid, BLOCK)?,
                (_, None) => None,
            };
            Ok(match line {
                Some(line) if line.seq > kept.seq => line.in_force,
                _ => kept.in_force,
            })
        };
        read().map_err(|error| self.failed("cannot read", &error))
    }

    /// Reads the log and checks its chain. A log that isn't there is an empty one, unless it is a copy.
    ///
    /// # Errors
    /// [`Class::Failed`](crate::error::Class::Failed) when it can't be read.
    pub fn history(&self) -> Result<History> {
        let read = || {
            let (log, _lock) = self.open_to_read()?;
            let mut history = History::default();
            let ends = match log {
                Some(log) => history.read(BufReader::new(log))?,
                None => Vec::new(),
            };
            match self.read_head() {
                Ok(None) if self.beside.is_none() || ends.is_empty() => {}
                Ok(None) => history.faults.push(format!(
                    "{AUDIT_HEAD} is not there: whether lines are missing at the end can't be told"
                )),
                Ok(Some(head)) => history.check_end(&ends, &head, &self.log),
                Err(error) => history.faults.push(format!("{AUDIT_HEAD}: {error}")),
            }
            Ok(history)
        };
        read().map_err(|error| self.failed("cannot read", &error))
    }
}

/// What is kept of a guest is damaged, and the log has no line about that guest.
fn no_other(damaged: &io::Error) -> io::Error {
    io::Error::other(format!(
        "{damaged}, and the log has no entry about that guest: expected the patches that are in force in it; compare with \
         `xen-locus status`, and move the file away"
    ))
}

fn digest(text: &str) -> String {
    hex::encode(Sha256::digest(text.as_bytes()))
}

/// Calls `each` with the lines of a log: the number of a line in the file, from 1, and the line and its hash as [`parse`]
/// finds them.
fn for_each_line(
    mut from: impl BufRead,
    mut each: impl FnMut(u64, Option<(Line, Option<String>)>) -> io::Result<()>,
) -> io::Result<()> {
    let mut text = Vec::new();
    for number in 1u64.. {
        text.clear();
        if from.by_ref().take(LINE_MAX).read_until(b'\n', &mut text)? == 0 {
            break;
        }
        each(number, parse(&text))?;
    }
    Ok(())
}

/// A line, and its hash if it is right.
fn parse(text: &[u8]) -> Option<(Line, Option<String>)> {
    let text = std::str::from_utf8(text).ok()?.strip_suffix('\n')?;
    let line: Line = serde_json::from_str(text).ok()?;
    let (hashed, own) = text.rsplit_once(OWN)?;
    let own = own.strip_suffix("\"}")?;
    Some((line, (digest(hashed) == own).then(|| own.to_owned())))
}

/// The last line about the guest `uuid`. Searches from the end, `block` bytes at a time.
fn last_of(file: &File, uuid: &str, block: usize) -> io::Result<Option<Line>> {
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
        if found.is_some() {
            return Ok(found);
        }
        rest = bytes;
        // A longer line is no entry.
        rest.truncate(BLOCK);
        end = start;
    }
    Ok(None)
}

/// A log of actions, as an operation on a guest needs it.
pub trait Log: fmt::Debug {
    /// Opens it for writing about the guest `uuid`.
    ///
    /// # Errors
    /// It can't be opened: the operation must not begin.
    fn open(&self, uuid: &str) -> Result<Box<dyn Append + '_>>;
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
    fn open(&self, uuid: &str) -> Result<Box<dyn Append + '_>> {
        Ok(Box::new(Audit::open(self, uuid)?))
    }

    fn in_force(&self, uuid: &str) -> Result<Vec<InForce>> {
        Audit::in_force(self, uuid)
    }
}

#[cfg(test)]
mod tests;
