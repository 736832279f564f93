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
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use locus_guest::addr;
use locus_kernel::Kernel;
use locus_xen::{fault, uuid};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::durable::{self, Step, Target};
use crate::arena::record::Record;
use crate::error::{Error, Result};
use crate::operation::Operation;
use crate::paths;
use crate::plan::{stack, Plan};
use crate::write::Write;

/// First bytes of a journal, its schema among them.
const MAGIC: &[u8; 16] = b"XEN-LOCUS-JRNL3\n";
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
}

impl Change {
    /// The change that `plan` makes for the payload with this record.
    #[must_use]
    pub fn new(kernel: &Kernel<'_>, op: Operation, record: &Record, plan: &Plan) -> Change {
        let ranges = plan.watch.ranges().map(|(range, name)| (*range, name));
        // To undo it, no thread may be in the new code either.
        let code = stack::code_of(record);
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
        }
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

    fn path(&self) -> PathBuf {
        self.dir.join(&self.uuid)
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
        let content =
            postcard::to_stdvec(intent).map_err(|e| failed(io::Error::other(e.to_string())))?;
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
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.dir)?;
        let head = [&MAGIC[..], &Sha256::digest(content)].concat();
        let target = Target {
            path: &self.path(),
            new: &self.dir.join(format!("{}.new", self.uuid)),
            mode: 0o600,
            synced: true,
        };
        durable::replace(&target, &[&head, content], |step| {
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
    /// [`Class::Uncertain`](crate::error::Class::Uncertain): there is a journal, and it can't be read or believed.
    pub fn read(&self) -> Result<Option<Intent>> {
        let path = self.path();
        let odd = |why: &str| {
            Error::uncertain(format!(
                "the journal {} can't be believed: {why}; it says that a run on this guest did not end as \
                 it should",
                path.display()
            ))
        };
        let len = match fs::metadata(&path) {
            Ok(found) => found.len(),
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(odd(&e.to_string())),
        };
        if len > LEN_MAX {
            return Err(odd("it is too long"));
        }
        let bytes = fs::read(&path).map_err(|e| odd(&e.to_string()))?;
        let (head, content) = bytes
            .split_at_checked(HEAD)
            .ok_or_else(|| odd("it is cut off"))?;
        let (magic, digest) = head.split_at(MAGIC.len());
        if magic != MAGIC {
            return Err(odd("it is no journal of this version of xen-locus"));
        }
        if digest != &Sha256::digest(content)[..] {
            return Err(odd("its checksum is wrong"));
        }
        let intent: Intent =
            postcard::from_bytes(content).map_err(|e| odd(&format!("it is malformed: {e}")))?;
        if intent.uuid != self.uuid {
            return Err(odd("it is another guest's"));
        }
        if intent
            .change
            .writes
            .iter()
            .any(|w| w.new.len() != w.expect.len())
        {
            return Err(odd("a write in it has an old and a new length"));
        }
        if !intent.change.op.is_journaled() {
            return Err(odd("no journal is made for its operation"));
        }
        Ok(Some(intent))
    }

    /// Removes the journal, because it is known how the run ended.
    ///
    /// # Errors
    /// It can't be removed.
    pub fn end(&self) -> Result<()> {
        let removed = fault::point("journal: remove");
        let removed = match removed.and_then(|()| fs::remove_file(self.path())) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(e) => Err(e),
            Ok(()) => durable::sync_folder(&self.dir),
        };
        removed.map_err(|e| {
            Error::failed(format!(
                "the journal {} can't be removed: {e}",
                self.path().display()
            ))
        })
    }
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
mod tests {
    use locus_guest::addr::Gva;

    use super::*;
    use crate::error::ExitCode;

    const UUID: &str = "01234567-89ab-cdef-0123-456789abcdef";

    fn journal(name: &str) -> Journal {
        let dir = std::env::temp_dir().join(format!("xen-locus-{}-{name}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        Journal::within(&dir, UUID)
    }

    fn intent() -> Intent {
        Intent {
            uuid: UUID.into(),
            domid: 3,
            started_at: 12,
            pid: 34,
            change: Change {
                build_id: "abcd".into(),
                text_base: 0xffff_ffff_8100_0000,
                patch: "fix".into(),
                sha256: "00".into(),
                record: "11".into(),
                op: Operation::Apply,
                writes: vec![Write {
                    at: Gva(0xffff_ffff_8100_0005),
                    expect: vec![1; 5],
                    new: vec![2; 5],
                    about: Default::default(),
                }],
                watched: vec![Range {
                    start: 0xffff_ffff_8100_0000,
                    len: 64,
                    name: "f".into(),
                }],
            },
        }
    }

    #[test]
    fn what_is_about_to_be_done_is_read_back_until_it_is_known_how_it_ended() {
        let journal = journal("round");
        assert_eq!(journal.read().unwrap(), None);
        journal.begin(&intent()).unwrap();
        assert_eq!(journal.read().unwrap(), Some(intent()));
        let mut second = intent();
        second.change.op = Operation::Revert;
        journal.begin(&second).unwrap();
        assert_eq!(journal.read().unwrap(), Some(second));
        journal.end().unwrap();
        assert_eq!(journal.read().unwrap(), None);
        journal.end().unwrap();
    }

    #[test]
    fn a_journal_that_is_torn_or_changed_anywhere_is_not_believed() {
        let journal = journal("torn");
        journal.begin(&intent()).unwrap();
        let whole = fs::read(journal.path()).unwrap();
        for cut in 0..whole.len() {
            fs::write(journal.path(), &whole[..cut]).unwrap();
            let error = journal.read().unwrap_err();
            assert_eq!(error.exit_code(), ExitCode::Uncertain, "cut to {cut}");
        }
        for at in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[at] ^= 0x10;
            fs::write(journal.path(), &bytes).unwrap();
            assert!(journal.read().is_err(), "byte {at} changed");
        }
        fs::write(journal.path(), &whole).unwrap();
        assert!(journal.read().unwrap().is_some());
    }

    #[test]
    fn a_journal_of_another_guest_is_not_believed() {
        let journal = journal("foreign");
        journal.begin(&intent()).unwrap();
        let other = Journal::within(&journal.dir, "00000000-0000-0000-0000-000000000000");
        fs::rename(journal.path(), other.path()).unwrap();
        assert_eq!(other.read().unwrap_err().exit_code(), ExitCode::Uncertain);
    }

    #[test]
    fn a_file_that_a_run_left_half_made_is_in_nobodys_way() {
        let journal = journal("half");
        fs::create_dir_all(&journal.dir).unwrap();
        fs::write(journal.dir.join(format!("{UUID}.new")), "half").unwrap();
        assert_eq!(journal.read().unwrap(), None);
        journal.begin(&intent()).unwrap();
        assert_eq!(journal.read().unwrap(), Some(intent()));
    }

    #[test]
    fn where_no_journal_can_be_written_nothing_may_be_done() {
        let journal = journal("denied");
        fs::write(&journal.dir, "a file, no folder").unwrap();
        let error = journal.begin(&intent()).unwrap_err();
        assert_eq!(error.exit_code(), ExitCode::Failed);
        assert!(error.to_string().contains("nothing was changed"), "{error}");
    }

    #[test]
    fn a_change_whose_journal_could_not_be_read_is_not_begun() {
        let journal = journal("long");
        let of = |len: u64| {
            let mut intent = intent();
            let bytes = vec![7; usize::try_from(len).unwrap() / 2];
            (intent.change.writes[0].expect, intent.change.writes[0].new) = (bytes.clone(), bytes);
            intent
        };
        let error = journal.begin(&of(LEN_MAX)).unwrap_err().to_string();
        assert!(error.contains("nothing was changed"), "{error}");
        assert!(!journal.exists());
        // What is a little shorter is written, and read again.
        let fits = of(LEN_MAX - 4096);
        journal.begin(&fits).unwrap();
        assert_eq!(journal.read().unwrap(), Some(fits));
    }

    #[test]
    fn what_is_looked_at_anew_when_a_change_is_undone_is_not_noted() {
        use crate::machine::mock::Guest;
        use crate::write::{About, Lock};
        let guest = Guest::new();
        let redirect = intent().change.writes.remove(0);
        let about = |about| Write::condition(Gva(8), vec![0; 8], about);
        let module = about(About::Module("ext4".into()));
        let all = [
            about(About::Lock(Lock::Kprobes)),
            about(About::Kprobes),
            module.clone(),
            about(About::StaticKey),
            about(About::ModuleLists),
            redirect.clone(),
        ];
        let none = std::iter::empty();
        let change = Change::of(&guest.kernel(), Operation::Apply, "fix", &all, none);
        assert_eq!(change.writes, [module, redirect]);
        // Journals of earlier versions have no tags.
        let bytes = postcard::to_stdvec(&change.writes).unwrap();
        let read: Vec<Write> = postcard::from_bytes(&bytes).unwrap();
        assert!(read.iter().all(|w| w.about == About::Text && w.lasts()));
    }
}
