//! The audit log: one line of JSON for every action on a guest, done or failed.
//!
//! Each line carries the hash of the one before it and ends with its own, the SHA-256 of all before
//! that member: who changes or removes a line in the middle breaks the chain behind it. Number and hash
//! of the last line are kept elsewhere too, so lines missing at the end are noticed. Whoever is root in
//! dom0 can write all of it anew; who can't, can't unnoticed.

pub mod in_force;

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt};
use std::path::{Path, PathBuf};

use locus_xen::fault;
use memchr::{memchr, memmem};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use self::in_force::InForce;
use crate::error::{Error, Result};

/// Where the system's log is.
pub const LOG: &str = "/var/log/xen-locus/audit.jsonl";
/// Where its last line is known from.
const HEAD: &str = "/var/lib/xen-locus/audit-head.json";
/// Longest line, in bytes.
const LINE_MAX: u64 = 64 << 10;
/// Longest message in one.
const MESSAGE_MAX: usize = 4096;
/// Bytes read at once by who looks for a guest's last line: several lines.
const BLOCK: usize = 256 << 10;
/// What stands before a line's own hash.
const OWN: &str = ",\"hash\":\"";
/// The hash before the first line.
const NONE: &str = "0000000000000000000000000000000000000000000000000000000000000000";

/// What an action did, or failed to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Action {
    /// When it ended, in seconds since 1970.
    pub time: u64,
    /// Who asked for it.
    pub who: String,
    /// `apply`, `replace`, `revert` or `recover`.
    pub op: String,
    /// Id of the domain.
    pub domid: u16,
    /// Its name.
    pub domain: String,
    /// Its UUID.
    pub uuid: String,
    /// What the run was about that `recover` settled: `apply` or `revert`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub of: String,
    /// Name of the payload.
    pub patch: String,
    /// SHA-256 of its file, in hex; of one that is reverted as the guest's memory has it.
    pub sha256: String,
    /// SHA-256 of the record that was placed in the guest's memory, in hex; empty where none was.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub record: String,
    /// What came of it, as `-o json` says it.
    pub result: String,
    /// The exit code.
    pub exit: u8,
    /// Patches that are not in force any more because of it; of `recover` all that are not.
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
    /// Patches that are in force in the guest after it, in the order they were applied: those too that went with a
    /// kernel, until somebody takes them back.
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

/// What a log holds.
#[derive(Debug, Default)]
pub struct History {
    /// Its lines, those too that stand behind a fault.
    pub lines: Vec<Line>,
    /// What shows that somebody changed it; empty if nothing does.
    pub faults: Vec<String>,
}

/// An audit log.
#[derive(Clone, Debug)]
pub struct Audit {
    log: PathBuf,
    head: Option<PathBuf>,
}

impl Audit {
    /// The system's.
    #[must_use]
    pub fn system() -> Audit {
        Audit {
            log: LOG.into(),
            head: Some(HEAD.into()),
        }
    }

    /// A copy of a log: its last line isn't known from elsewhere.
    #[must_use]
    pub fn copy(log: &Path) -> Audit {
        Audit {
            log: log.to_owned(),
            head: None,
        }
    }

    /// Where it stands.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.log
    }

    fn failed(&self, what: &str, error: &io::Error) -> Error {
        Error::failed(format!(
            "{what} the audit log {} or what is known of its last line ({HEAD}): {error}",
            self.log.display()
        ))
    }

    /// Opens the log for writing: what can't be recorded is not to be begun.
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

    /// The patches that are in force in the guest `uuid`, in the order they were applied; of a guest without a line
    /// none. Takes as long however many lines there are before its last one; what is changed in the log
    /// [`Audit::history`] says.
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
        // A run that ended between its two files left the line before the last there.
        last.reverse();
        match self.read_head() {
            Ok(None) if self.head.is_none() || last.is_empty() => {}
            Ok(None) => history.faults.push(format!(
                "{HEAD} is not there: whether lines are missing at the end can't be told"
            )),
            Ok(Some(head)) if last.iter().take(2).any(|line| *line == head) => {}
            Ok(Some(head)) => history.faults.push(format!(
                "the last line should be entry {} with hash {}, and is not there",
                head.seq, head.hash
            )),
            Err(error) => history.faults.push(format!("{HEAD}: {error}")),
        }
        Ok(history)
    }
}

impl History {
    /// Reads all lines; returns what their heads would be.
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

/// What is in force by the last line about the guest `uuid`, looked for from the end in steps of `block` bytes.
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
        // One that is longer is no entry.
        rest.truncate(BLOCK);
        end = start;
    }
    Ok(Vec::new())
}

/// A log that is open.
#[derive(Debug)]
pub struct Writer<'a> {
    audit: &'a Audit,
    file: File,
}

impl Writer<'_> {
    /// Appends a line, on disk when this returns.
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
            // No part of what is not recorded stays. If it can't be taken away, what is there is told of as a fault.
            let _ = self.file.set_len(len);
        }
        written
    }

    /// Writes a line, and where the last line is known from.
    fn write(&mut self, text: &str, head: &Head) -> io::Result<()> {
        self.file.write_all(text.as_bytes())?;
        fault::point("audit: sync")?;
        self.file.sync_data()?;
        let Some(at) = &self.audit.head else {
            return Ok(());
        };
        let fresh = at.with_extension("new");
        let mut file = File::create(&fresh)?;
        file.write_all(&serde_json::to_vec(head)?)?;
        file.sync_all()?;
        fault::point("audit: rename")?;
        fs::rename(&fresh, at)
    }

    /// The last line: of the log, else of one that was put away. A line that was cut short is ended,
    /// and stays as a fault.
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
        // One more than the head knows of is what a run left that ended in between.
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
mod tests {
    use super::*;

    /// A log in a folder of its own.
    fn log(name: &str) -> Audit {
        let folder =
            std::env::temp_dir().join(format!("locus-audit-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&folder);
        Audit {
            log: folder.join("log/audit.jsonl"),
            head: Some(folder.join("lib/head.json")),
        }
    }

    fn add(audit: &Audit, patch: &str) {
        let action = Action {
            patch: patch.into(),
            message: "said \",\"hash\":\"".into(),
            ..Action::default()
        };
        audit.open().unwrap().append(action).unwrap();
    }

    fn faults(audit: &Audit) -> Vec<String> {
        audit.history().unwrap().faults
    }

    /// Three lines, changed as text.
    fn changed(name: &str, change: impl FnOnce(&mut Vec<String>)) -> Vec<String> {
        let audit = log(name);
        for patch in ["one", "two", "three"] {
            add(&audit, patch);
        }
        assert_eq!(faults(&audit), Vec::<String>::new());
        let text = fs::read_to_string(&audit.log).unwrap();
        let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
        change(&mut lines);
        fs::write(&audit.log, lines.join("\n") + "\n").unwrap();
        faults(&audit)
    }

    #[test]
    fn lines_follow_each_other_and_are_read_back() {
        let audit = log("whole");
        assert!(audit.history().unwrap().lines.is_empty());
        assert_eq!(faults(&audit), Vec::<String>::new());
        for patch in ["one", "two"] {
            add(&audit, patch);
        }
        let history = audit.history().unwrap();
        let seen: Vec<(u64, &str)> = history
            .lines
            .iter()
            .map(|l| (l.seq, &*l.action.patch))
            .collect();
        assert_eq!(seen, [(1, "one"), (2, "two")]);
        assert_eq!(history.lines[0].prev, NONE);
        // It was put away: the next line goes on from the last one.
        fs::remove_file(&audit.log).unwrap();
        add(&audit, "three");
        let history = audit.history().unwrap();
        assert_eq!((history.lines[0].seq, history.faults), (3, Vec::new()));
    }

    #[test]
    fn every_change_of_the_log_is_noticed() {
        let one = |faults: Vec<String>, words: &str| {
            assert!(
                faults.iter().any(|f| f.contains(words)),
                "{words:?}: {faults:?}"
            );
        };
        let edit = |lines: &mut Vec<String>| lines[1] = lines[1].replace("two", "2wo");
        one(changed("edited", edit), "entry 2) is not what was written");
        one(changed("removed", |l| drop(l.remove(1))), "does not follow");
        one(changed("cut", |l| l.truncate(2)), "should be entry 3");
        one(changed("emptied", Vec::clear), "should be entry 3");
        one(changed("swapped", |l| l.swap(0, 1)), "does not follow");
        one(
            changed("garbage", |l| l.insert(1, "{}".into())),
            "line 2 is no entry",
        );
        one(
            changed("long", |l| l[1].push_str(&"x".repeat(1 << 17))),
            "is no entry",
        );
        // A line that fits what stands before it, but not what comes after.
        let forge = |lines: &mut Vec<String>| {
            let (hashed, _) = lines[1].rsplit_once(OWN).unwrap();
            let hashed = hashed.replace("two", "2wo");
            lines[1] = format!("{hashed}{OWN}{}\"}}", digest(&hashed));
        };
        one(changed("forged", forge), "entry 3) does not follow");
    }

    #[test]
    fn a_run_that_ended_while_it_wrote_breaks_nothing_that_comes_after() {
        let audit = log("torn");
        add(&audit, "one");
        let head = fs::read(audit.head.as_ref().unwrap()).unwrap();
        add(&audit, "two");
        // Between the two files.
        fs::write(audit.head.as_ref().unwrap(), head).unwrap();
        assert_eq!(faults(&audit), Vec::<String>::new());
        add(&audit, "three");
        assert_eq!(faults(&audit), Vec::<String>::new());
        // In the middle of a line: that one is told of, and those after it count.
        let mut file = OpenOptions::new().append(true).open(&audit.log).unwrap();
        file.write_all(b"{\"schema\":1,\"seq\":4,").unwrap();
        add(&audit, "four");
        let history = audit.history().unwrap();
        assert_eq!(history.faults, ["line 4 is no entry"]);
        assert_eq!(history.lines.last().unwrap().seq, 4);
    }

    #[test]
    fn of_a_line_that_could_not_be_recorded_nothing_stays() {
        let audit = log("unrecorded");
        add(&audit, "one");
        let before = fs::read(&audit.log).unwrap();
        // Where the last line is known from can't be written.
        let blocked = audit.head.as_ref().unwrap().with_extension("new");
        fs::create_dir(&blocked).unwrap();
        let mut writer = audit.open().unwrap();
        let error = writer.append(Action::default()).unwrap_err();
        assert!(error.to_string().contains("head.json"), "{error}");
        assert_eq!(fs::read(&audit.log).unwrap(), before);
        fs::remove_dir(&blocked).unwrap();
        add(&audit, "two");
        assert_eq!(faults(&audit), Vec::<String>::new());
        assert_eq!(audit.history().unwrap().lines.len(), 2);
    }

    #[test]
    fn what_is_in_force_in_a_guest_is_told_by_its_last_line_wherever_that_is() {
        let audit = log("in-force");
        assert_eq!(audit.in_force("a").unwrap(), []);
        let action = |uuid: &str, patch: &str, said: &str| Action {
            uuid: uuid.into(),
            op: "apply".into(),
            patch: patch.into(),
            result: "applied".into(),
            message: said.into(),
            ..Action::default()
        };
        let mut writer = audit.open().unwrap();
        writer.append(action("a", "one", "")).unwrap();
        writer.append(action("b", "two", "")).unwrap();
        writer.append(action("a", "three", "")).unwrap();
        // Lines of others, one of which speaks of it; and one that was cut short.
        writer
            .append(action("b", "four", "\"uuid\":\"a\""))
            .unwrap();
        let mut file = OpenOptions::new().append(true).open(&audit.log).unwrap();
        file.write_all(b"{\"uuid\":\"a\",").unwrap();
        writer.append(action("b", "five", "")).unwrap();
        let names =
            |all: Vec<InForce>| -> Vec<String> { all.into_iter().map(|p| p.name).collect() };
        let file = File::open(&audit.log).unwrap();
        let len = usize::try_from(file.metadata().unwrap().len()).unwrap();
        for block in 1..=len + 1 {
            let of = |uuid| names(last_in_force(&file, uuid, block).unwrap());
            assert_eq!(of("a"), ["one", "three"], "{block} bytes at once");
            assert_eq!(of("b"), ["two", "four", "five"], "{block} bytes at once");
            assert_eq!(of("c"), [""; 0], "{block} bytes at once");
        }
        // By the first line that can be read.
        let text = fs::read_to_string(&audit.log).unwrap();
        fs::write(&audit.log, text.replace("three", "\0")).unwrap();
        assert_eq!(names(last_in_force(&file, "a", 100).unwrap()), ["one"]);
    }

    #[test]
    fn what_can_not_be_recorded_is_refused_before_it_is_begun() {
        let audit = log("refused");
        fs::create_dir_all(&audit.log).unwrap();
        let error = audit.open().unwrap_err();
        assert_eq!(error.exit_code() as u8, 1, "{error}");
        assert!(error.to_string().contains("audit.jsonl"), "{error}");
        let audit = log("refused-head");
        add(&audit, "one");
        fs::write(audit.head.as_ref().unwrap(), "{").unwrap();
        let error = audit.open().unwrap_err();
        assert_eq!(error.exit_code() as u8, 1, "{error}");
    }
}
