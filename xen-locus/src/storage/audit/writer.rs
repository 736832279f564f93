//! Appends a line to the log: the line, then its number and hash to the file beside it, then what is in force to the
//! guest's file. A run may die between any two of these.

use std::collections::HashMap;
use std::fs::{self, File, TryLockError};
use std::io::{self, BufReader, Write as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::thread;
use std::time::{Duration, Instant};

use super::{
    digest, for_each_line, in_force, kept, rotation, Action, Append, Audit, Beside, Head, InForce,
    Line, LINE_MAX, LOST, OWN, ROTATED,
};
use crate::error::Result;
use crate::say;
use crate::storage::durable::{self, Replacement, Step};

/// Longest message in a line, in bytes.
const MESSAGE_MAX: usize = 4096;
/// Bytes of a line after what its hash is made of.
const TAIL: usize = OWN.len() + 64 + "\"}\n".len();
/// Longest wait for an earlier version of xen-locus that writes.
const EARLIER: Duration = Duration::from_secs(2);
/// Length below which no text is cut to make a line fit.
const CUT_MIN: usize = 64;

/// A log that is open.
#[derive(Debug)]
pub struct Writer<'a> {
    audit: &'a Audit,
    beside: &'a Beside,
    lock: File,
    file: File,
}

/// What comes before a new line.
struct Before {
    /// The line before it; `first` is that of the new line's file.
    head: Head,
    /// Why its file begins with it, if it does and is not the first file.
    begins: &'static str,
}

impl Append for Writer<'_> {
    fn append(&mut self, action: Action) -> Result<()> {
        Writer::append(self, action)
    }
}

impl<'a> Writer<'a> {
    pub(super) fn new(audit: &'a Audit, beside: &'a Beside, lock: File, file: File) -> Writer<'a> {
        Writer {
            audit,
            beside,
            lock,
            file,
        }
    }

    /// Appends a line; it is on disk when this returns. If the log was rotated since it was opened, the line goes to the
    /// new file.
    ///
    /// # Errors
    /// [`Class::Failed`](crate::error::Class::Failed): the log is as it was before.
    pub fn append(&mut self, action: Action) -> Result<()> {
        let appended = self.lock.lock().and_then(|()| {
            let done = self.append_to_current(action);
            self.lock.unlock().and(done)
        });
        appended.map_err(|error| self.audit.failed("cannot write", &error))
    }

    fn append_to_current(&mut self, action: Action) -> io::Result<()> {
        self.audit.step("audit: append")?;
        let id = |m: &fs::Metadata| (m.dev(), m.ino());
        let own = id(&self.file.metadata()?);
        let named = fs::metadata(&self.audit.log);
        if !named.is_ok_and(|named| id(&named) == own) {
            self.file = self.audit.open_log()?;
        }
        // Earlier versions lock the log itself, for some milliseconds. Whoever may read the log can hold that lock.
        let began = Instant::now();
        while let Err(error) = self.file.try_lock() {
            match error {
                TryLockError::Error(error) => return Err(error),
                TryLockError::WouldBlock if began.elapsed() > EARLIER => break,
                TryLockError::WouldBlock => thread::sleep(Duration::from_millis(5)),
            }
        }
        let done = self.append_locked(action);
        self.file.unlock().and(done)
    }

    fn append_locked(&mut self, mut action: Action) -> io::Result<()> {
        let end = action.message.floor_char_boundary(MESSAGE_MAX);
        action.message.truncate(end);
        let before = self.before()?;
        let in_force = kept::read(&self.beside.kept, &action.uuid)?.unwrap_or_default();
        let mut line = Line {
            schema: 1,
            seq: before.head.seq.wrapping_add(1),
            first: before.head.first,
            begins: before.begins.to_owned(),
            in_force: in_force::after(in_force.in_force, &action),
            action,
            prev: before.head.hash,
        };
        let text = fitting(&mut line)?;
        let hashed = text.strip_suffix('}').unwrap_or(&text);
        let head = Head {
            seq: line.seq,
            hash: digest(hashed),
            first: line.first,
        };
        let len = self.file.metadata()?.len();
        let written = self.write(&format!("{hashed}{OWN}{}\"}}\n", head.hash), len, &head);
        if written.is_err() {
            // Nothing stays of a line that is not whole. If it can't be removed, `history` reports a fault.
            let taken_back = self.audit.step("audit: take back");
            let _ = taken_back.and_then(|()| self.file.set_len(len));
            return written;
        }
        if before.begins == LOST {
            say::warn(format_args!(
                "the audit log {} was emptied or removed, and not rotated: it begins with entry {} now",
                self.audit.log.display(),
                line.seq
            ));
        }
        // The line has it too, and the next run that writes begins with this.
        let _ = self.audit.step("audit: keep").and_then(|()| {
            kept::write(
                &self.beside.kept,
                &line.action.uuid,
                line.seq,
                &line.in_force,
            )
        });
        Ok(())
    }

    /// Writes a line behind `len` bytes, and then its number and hash to the other file.
    fn write(&mut self, text: &str, len: u64, head: &Head) -> io::Result<()> {
        self.audit.step("audit: write")?;
        self.file.write_all(text.as_bytes())?;
        self.audit.step("audit: sync")?;
        self.file.sync_data()?;
        if let Some(folder) = self.audit.log.parent().filter(|_| len == 0) {
            durable::sync_folder(folder)?;
        }
        let at = &self.beside.head;
        let file = Replacement {
            path: at,
            new: &at.with_extension("new"),
            mode: 0o644,
            synced: true,
        };
        durable::replace(&file, &[&serde_json::to_vec(head)?], |step| match step {
            Step::Rename => self.audit.step("audit: rename"),
            _ => Ok(()),
        })?;
        // An error here must not undo the line, because the head has it already. After a power failure the head may
        // then be some lines behind.
        let _ = at.parent().map(durable::sync_folder);
        Ok(())
    }

    fn keep(&self, uuid: &str, seq: u64, in_force: &[InForce]) -> io::Result<()> {
        self.audit.step("audit: keep")?;
        match kept::update(&self.beside.kept, uuid, seq, in_force) {
            // The file of one guest keeps no other from being logged.
            Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                say::warn(error);
                Ok(())
            }
            updated => updated,
        }
    }

    /// What comes before a new line, in this file or in the one to which it was rotated. What that says is in force in its
    /// guest is kept then. A line that was cut short gets its line break, and stays as a fault.
    fn before(&mut self) -> io::Result<Before> {
        let head = self.audit.read_head()?.unwrap_or_else(Head::none);
        let len = self.file.metadata()?.len();
        let mut last = [b'\n'];
        if len > 0 {
            self.file.read_exact_at(&mut last, len - 1)?;
        }
        if last != *b"\n" {
            self.file.write_all(b"\n")?;
        }
        let mut before = Before {
            head: head.clone(),
            begins: "",
        };
        let mut rotated = None;
        let line = match rotation::last_in(&self.file)? {
            Some((line, hash)) => {
                before.head.first = match line.first {
                    0 => self.first()?.unwrap_or(line.seq),
                    first => first,
                };
                // A run that died between the two files left one line more than the head has.
                if let Some(hash) = hash.filter(|_| line.seq >= head.seq) {
                    (before.head.seq, before.head.hash) = (line.seq, hash);
                    Some(line)
                } else {
                    None
                }
            }
            None => {
                rotated = rotation::find(&self.audit.log, &head);
                before.begins = match rotated {
                    _ if head.seq == 0 => "",
                    Some(_) => ROTATED,
                    None => LOST,
                };
                if let Some(found) = &rotated {
                    (before.head.seq, before.head.hash) = (found.line.seq, found.hash.clone());
                }
                before.head.first = before.head.seq.wrapping_add(1);
                rotated.as_ref().map(|found| found.line.clone())
            }
        };
        match line {
            // So far an earlier version wrote, which keeps nothing.
            _ if head.first == 0 => {
                self.keep_all(&self.file)?;
                let rotated = rotated.map(|found| File::open(found.path)).transpose()?;
                rotated.map_or(Ok(()), |file| self.keep_all(&file))?;
            }
            Some(line) => self.keep(&line.action.uuid, line.seq, &line.in_force)?,
            None => {}
        }
        Ok(before)
    }

    /// Number of the first entry in the file.
    fn first(&self) -> io::Result<Option<u64>> {
        let mut first = None;
        self.each_line(&self.file, |line| {
            first.get_or_insert(line.seq);
        })?;
        Ok(first)
    }

    /// Keeps what is in force in each guest of which `file` has a line.
    fn keep_all(&self, file: &File) -> io::Result<()> {
        let mut all: HashMap<String, (u64, Vec<InForce>)> = HashMap::new();
        self.each_line(file, |line| {
            all.insert(line.action.uuid, (line.seq, line.in_force));
        })?;
        let mut all = all.into_iter();
        all.try_for_each(|(uuid, (seq, in_force))| self.keep(&uuid, seq, &in_force))
    }

    fn each_line(&self, mut file: &File, mut each: impl FnMut(Line)) -> io::Result<()> {
        io::Seek::rewind(&mut file)?;
        for_each_line(BufReader::new(file), |_, parsed| {
            if let Some((line, _)) = parsed {
                each(line);
            }
            Ok(())
        })
    }
}

/// The text of a line, without its own hash, that is short enough to be read again. If it were too long, the longest of its
/// free texts are cut.
fn fitting(line: &mut Line) -> io::Result<String> {
    loop {
        // JSON leaves some of the characters that a terminal obeys as they are.
        let text = say::printable(&serde_json::to_string(line)?).into_owned();
        if (text.len() + TAIL) as u64 <= LINE_MAX {
            return Ok(text);
        }
        let action = &mut line.action;
        let free = [&mut action.message, &mut action.domain, &mut action.who];
        let longest = free.into_iter().max_by_key(|text| text.len());
        match longest.filter(|text| text.len() > CUT_MIN) {
            Some(text) => text.truncate(text.floor_char_boundary(text.len() / 2)),
            None => {
                return Err(io::Error::other(format!(
                    "the entry would have {} bytes, and {LINE_MAX} are the most",
                    text.len() + TAIL
                )))
            }
        }
    }
}
