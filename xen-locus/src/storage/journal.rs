//! What a run is about to do to a guest, on disk before the first byte of the guest is changed.
//!
//! One file for each guest, `UUID` below [`paths::JOURNALS`]. It is there while a run is under way, and after a run
//! that died. The file is replaced as a whole ([`super::durable`]), and the folder is synced. It begins with a magic
//! number and a digest of what follows.
//!
//! The guest's memory decides how a run ended. The journal says that there was a run, what it was about, and which
//! bytes were where before.

use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use locus_guest::addr;
use locus_kernel::Kernel;
use locus_xen::{fault, uuid};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::durable::{self, Replacement, Step};
use crate::arena::record::Record;
use crate::error::{Error, Result};
use crate::operation::Operation;
use crate::paths;
use crate::plan::{patch_stack, Plan};
use crate::write::Write;

/// First bytes of a journal, its format among them.
const MAGIC: &[u8; 16] = b"XEN-LOCUS-JRNL3\n";
/// The part of them that all formats have. The number of the format follows.
const MAGIC_OF_ALL: &[u8] = b"XEN-LOCUS-JRNL";
/// Name of the first fault point of a run that matters to the guest.
const FIRST_FAULT: &str = "journal";
const HEAD: usize = MAGIC.len() + 32;
/// Longest journal that is written or read, in bytes.
const LEN_MAX: u64 = 32 << 20;

/// A range of guest code that no thread may be in while the change is made or undone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Range {
    /// Its first address, guest-virtual.
    pub start: u64,
    /// Its length, in bytes.
    pub len: u64,
    /// Its name in messages.
    pub name: String,
}

/// A run that is under way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Intent {
    /// The guest's UUID.
    pub uuid: String,
    /// Its domain id.
    pub domid: u16,
    /// When it began, in seconds since 1970.
    pub started_at: u64,
    /// Process id of the run, in dom0.
    pub pid: u32,
    /// What it is about to do.
    pub change: Change,
    /// The change took place as a whole, and only its line in the audit log is missing. Noted beside the journal
    /// ([`Journal::note_done`]).
    #[serde(skip)]
    pub is_done: bool,
}

/// What a guest's journal says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Noted {
    /// There is none.
    Nothing,
    /// A run was about to do this, and it is not known how that ended.
    Intent(Box<Intent>),
    /// There is one, and it can't be believed. The sentence says why.
    Damaged(String),
}

/// What a run is about to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    /// Build-id of the guest's kernel, in hex.
    pub build_id: String,
    /// Guest-virtual address of its text. It differs after a reboot of the same kernel (KASLR).
    pub text_base: u64,
    /// Name of the payload.
    pub patch: String,
    /// SHA-256 of its file, in hex.
    pub sha256: String,
    /// SHA-256 of the record that is placed in the guest, in hex; empty where none is.
    pub record: String,
    /// What is done with it.
    pub op: Operation,
    /// What is written, in that order, with words that must be as they were when it is undone ([`Write::lasts`]).
    pub writes: Vec<Write>,
    /// Code that no thread may be in meanwhile.
    pub watched: Vec<Range>,
    /// Generation of the arena's directory before it; `None` if it was not noted. In the file it is behind all else, where
    /// builds that do not know it look at nothing.
    #[serde(skip)]
    pub generation: Option<u64>,
}

impl Change {
    /// The change that `plan` makes for the payload with this record.
    #[must_use]
    pub fn new(kernel: &Kernel<'_>, op: Operation, record: &Record, plan: &Plan) -> Change {
        let ranges = plan.watch.ranges().map(|(range, name)| (*range, name));
        // To undo it, no thread may be in the new code either.
        let code = patch_stack::code_of(record);
        let code = code.iter().map(|w| (w.range, &*w.name));
        Change {
            sha256: record.sha256.clone(),
            ..Change::of(kernel, op, &record.name, &plan.writes, ranges.chain(code))
        }
    }

    /// A change that places no payload: to undo `writes`, no thread may be in `watched`.
    #[must_use]
    pub fn of<'w>(
        kernel: &Kernel<'_>,
        op: Operation,
        patch: &str,
        writes: &[Write],
        watched: impl Iterator<Item = (addr::Range, &'w str)>,
    ) -> Change {
        let watched = watched.map(|(range, name)| Range {
            start: range.start.0,
            len: range.len(),
            name: name.to_owned(),
        });
        Change {
            build_id: kernel
                .build_id
                .as_deref()
                .map(hex::encode)
                .unwrap_or_default(),
            text_base: kernel.text_base.0,
            patch: patch.to_owned(),
            sha256: String::new(),
            record: String::new(),
            op,
            writes: writes.iter().filter(|w| w.lasts()).cloned().collect(),
            watched: watched.collect(),
            generation: None,
        }
    }

    /// Whether a guest whose directory has this generation can't have seen the change: it was rebooted since, or restored
    /// from an earlier save. A generation never sinks while a kernel runs.
    #[must_use]
    pub fn is_unknown_to(&self, generation: u64) -> bool {
        // Earlier builds did not note it. What is reverted or given back was in a directory.
        let least = self.generation.unwrap_or(match self.op {
            Operation::Revert | Operation::Reclaim => 1,
            _ => 0,
        });
        generation < least
    }
}

/// The journal of one guest, which may be there or not.
#[derive(Clone, Debug)]
pub struct Journal {
    dir: PathBuf,
    uuid: String,
}

impl Journal {
    /// The journal of the guest `uuid`, in the usual folder.
    #[must_use]
    pub fn new(uuid: &str) -> Journal {
        Journal::within(Path::new(paths::JOURNALS), uuid)
    }

    /// The same in another folder.
    #[must_use]
    pub fn within(dir: &Path, uuid: &str) -> Journal {
        Journal {
            dir: dir.to_owned(),
            uuid: uuid.to_owned(),
        }
    }

    /// Whether the file is there.
    #[must_use]
    pub fn exists(&self) -> bool {
        self.path().exists()
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        self.dir.join(&self.uuid)
    }

    /// The file that says that the change took place as a whole. It is empty, so a full disk has room for it.
    fn done(&self) -> PathBuf {
        self.dir.join(format!("{}.done", self.uuid))
    }

    /// Notes that the change took place as a whole, and that it could not be logged.
    ///
    /// # Errors
    /// It can't be noted.
    pub fn note_done(&self) -> Result<()> {
        let noted = fault::point("journal: done").and_then(|()| {
            let mut options = fs::File::options();
            options.write(true).create(true).truncate(true).mode(0o600);
            options.open(self.done())?;
            durable::sync_folder(&self.dir)
        });
        noted.map_err(|e| Error::failed(format!("{} can't be made: {e}", self.done().display())))
    }

    /// Writes what is about to be done; it is durable when this returns.
    ///
    /// # Errors
    /// [`Class::Failed`](crate::error::Class::Failed): it can't be written, so nothing may be done.
    pub fn begin(&self, intent: &Intent) -> Result<()> {
        let failed = |e: io::Error| {
            Error::failed(format!(
                "the journal {} can't be written, so nothing was changed: {e}",
                self.path().display()
            ))
        };
        let content = (intent, intent.change.generation);
        let content =
            postcard::to_stdvec(&content).map_err(|e| failed(io::Error::other(e.to_string())))?;
        let len = (HEAD + content.len()) as u64;
        if len > LEN_MAX {
            let why = format!(
                "it would have {len} bytes, and {LEN_MAX} are the most that is read of one"
            );
            return Err(failed(io::Error::other(why)));
        }
        self.write(&content).map_err(failed)
    }

    fn write(&self, content: &[u8]) -> io::Result<()> {
        fault::point(FIRST_FAULT)?;
        paths::own_folder(&self.dir)?;
        // Of a run before this one.
        durable::remove(&self.done())?;
        let head = [&MAGIC[..], &Sha256::digest(content)].concat();
        let file = Replacement {
            path: &self.path(),
            new: &self.dir.join(format!("{}.new", self.uuid)),
            mode: 0o600,
            synced: true,
        };
        durable::replace(&file, &[&head, content], |step| {
            fault::point(match step {
                Step::Open => "journal: open",
                Step::Write(0) => "journal: write",
                Step::Write(_) => "journal: write content",
                Step::Sync => "journal: sync",
                Step::Rename => "journal: rename",
            })
        })?;
        fault::point("journal: sync folder")?;
        durable::sync_folder(&self.dir)
    }

    /// What was about to be done, if it is not known how that ended.
    ///
    /// # Errors
    /// [`Class::NotApplicable`](crate::error::Class::NotApplicable): another version of xen-locus wrote it.
    /// [`Class::Failed`](crate::error::Class::Failed): the file can't be read now.
    pub fn read(&self) -> Result<Noted> {
        let path = self.path();
        let damaged = |why: &str| {
            Ok(Noted::Damaged(format!(
                "the journal {} can't be believed: {why}; it says that a run on this guest did not end as \
                 it should",
                path.display()
            )))
        };
        let unread = |e: io::Error| {
            Error::failed(format!(
                "the journal {} can't be read: {e}; it says that a run on this guest did not end as it should, so nothing was \
                 done",
                path.display()
            ))
        };
        let len = match fs::metadata(&path) {
            Ok(found) => found.len(),
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Noted::Nothing),
            Err(e) => return Err(unread(e)),
        };
        if len > LEN_MAX {
            return damaged("it is too long");
        }
        let bytes = fs::read(&path).map_err(unread)?;
        if let Some(format) = other_format(&bytes) {
            return Err(self.of_another_version(&format!("it is of format {format}")));
        }
        let Some((head, content)) = bytes.split_at_checked(HEAD) else {
            return damaged("it is cut off");
        };
        let (magic, digest) = head.split_at(MAGIC.len());
        if magic != MAGIC {
            return damaged("it does not begin as a journal does");
        }
        if digest != &Sha256::digest(content)[..] {
            return damaged("its checksum is wrong");
        }
        // From here on all is as a run wrote it.
        let other = |e: postcard::Error| self.of_another_version(&format!("its content: {e}"));
        let read = postcard::take_from_bytes::<Intent>(content);
        let (mut intent, rest) = read.map_err(other)?;
        if !rest.is_empty() {
            intent.change.generation = postcard::from_bytes(rest).map_err(other)?;
        }
        let op = intent.change.op;
        if !op.is_journaled() {
            return Err(self.of_another_version(&format!("it is about {op}")));
        }
        if intent.uuid != self.uuid {
            return damaged("it is another guest's");
        }
        intent.is_done = self.done().exists();
        let differ = |w: &Write| w.new.len() != w.expect.len();
        if intent.change.writes.iter().any(differ) {
            return damaged("a write in it has an old and a new length");
        }
        Ok(Noted::Intent(Box::new(intent)))
    }

    /// What this version can't read, and another one wrote.
    fn of_another_version(&self, found: &str) -> Error {
        Error::not_applicable(format!(
            "the journal {} was written by another version of xen-locus, probably a newer one: expected format {}, found that \
             {found}; a run of that version on this guest did not end as it should, so nothing was done: run `xen-locus \
             recover` of that version",
            self.path().display(),
            format_of(MAGIC).unwrap_or_default()
        ))
    }

    /// Where a journal is kept that can't be believed: beside the others, under a name that has the time when it was last
    /// written.
    #[must_use]
    pub fn aside(&self) -> PathBuf {
        let time = fs::metadata(self.path()).map(|m| m.mtime()).unwrap_or(0);
        self.dir.join(format!("{}.damaged-{time}", self.uuid))
    }

    /// Removes the journal, because `recover` found out how the run ended. One that can't be believed is moved to
    /// [`Journal::aside`].
    ///
    /// # Errors
    /// It can't be removed or moved; or as [`Journal::read`].
    pub fn retire(&self) -> Result<()> {
        if !matches!(self.read()?, Noted::Damaged(_)) {
            return self.end();
        }
        let aside = self.aside();
        let moved = fault::point("journal: set aside");
        let moved = moved.and_then(|()| fs::rename(self.path(), &aside));
        let moved = moved.and_then(|()| durable::sync_folder(&self.dir));
        moved.map_err(|e| {
            Error::failed(format!(
                "the journal {} can't be moved to {}: {e}",
                self.path().display(),
                aside.display()
            ))
        })
    }

    /// Removes the journal, because it is known how the run ended.
    ///
    /// # Errors
    /// It can't be removed.
    pub fn end(&self) -> Result<()> {
        let ended = fault::point("journal: remove").and_then(|()| {
            if durable::remove(&self.path())? {
                durable::sync_folder(&self.dir)?;
            }
            durable::remove(&self.done()).map(drop)
        });
        ended.map_err(|e| {
            Error::failed(format!(
                "the journal {} can't be removed: {e}",
                self.path().display()
            ))
        })
    }
}

/// The number of the format that a journal with these first bytes has.
fn format_of(bytes: &[u8]) -> Option<String> {
    let rest = bytes.strip_prefix(MAGIC_OF_ALL)?;
    let end = MAGIC.len() - MAGIC_OF_ALL.len();
    let digits = rest.iter().take(end).take_while(|b| b.is_ascii_digit());
    let number: String = digits.map(|&b| char::from(b)).collect();
    let is_whole = match rest.get(number.len()) {
        Some(b'\n') => true,
        // A longer number fills the room of the line's end.
        Some(_) => number.len() == end,
        None => false,
    };
    (is_whole && !number.is_empty()).then_some(number)
}

/// The number of its format, if that is not the one that this version reads.
fn other_format(bytes: &[u8]) -> Option<String> {
    format_of(bytes).filter(|_| !bytes.starts_with(MAGIC))
}

/// UUIDs of the guests that have a journal in the usual folder.
///
/// # Errors
/// The folder can't be read.
pub fn all() -> Result<Vec<String>> {
    let failed = |e: io::Error| Error::failed(format!("cannot read {}: {e}", paths::JOURNALS));
    let entries = match fs::read_dir(paths::JOURNALS) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(failed(e)),
    };
    let mut found = Vec::new();
    for entry in entries {
        let name = entry.map_err(failed)?.file_name();
        if let Some(uuid) = name.to_str().filter(|n| uuid::is_text(n)) {
            found.push(uuid.to_owned());
        }
    }
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests;
