//! Replaces a file as a whole: whenever this process or dom0 dies, the file has its old content or its new content.
//!
//! The content is written to another file in the same folder, synced and renamed. That other file has a fixed name,
//! so the next run replaces what a dead run left, and the folder needs no sweep. This is why the crate
//! `tempfile`, whose names are random, is not used.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

/// How a file is replaced.
#[derive(Clone, Copy, Debug)]
pub struct Replacement<'a> {
    /// The file.
    pub path: &'a Path,
    /// Where its new content is written first: in the same folder, and used by one process at a time.
    pub new: &'a Path,
    /// Permission bits of the new file, before the umask.
    pub mode: u32,
    /// Whether the content is on disk before the rename. What has a checksum and can be read again does without: a
    /// sync takes as long as the disk likes.
    pub synced: bool,
}

/// What is done next to the new file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// It is created.
    Open,
    /// Its part of this number is written, from 0.
    Write(usize),
    /// It is synced.
    Sync,
    /// It is renamed.
    Rename,
}

/// Replaces a file by one that holds `parts`. `before` comes before each step, and its error ends the work: a place
/// for faults.
///
/// # Errors
/// Any step failed. The file is as it was, and the new one is removed.
pub fn replace(
    replacement: &Replacement<'_>,
    parts: &[&[u8]],
    before: impl Fn(Step) -> io::Result<()>,
) -> io::Result<()> {
    before(Step::Open)?;
    // Left by a run that died. If it can't be removed, the next call fails and says why.
    let _ = fs::remove_file(replacement.new);
    // O_EXCL: in a folder that others can write, no link of theirs is followed.
    let mut file = File::options()
        .write(true)
        .create_new(true)
        .mode(replacement.mode)
        .open(replacement.new)?;
    let mut write = || {
        for (number, part) in parts.iter().enumerate() {
            before(Step::Write(number))?;
            file.write_all(part)?;
        }
        if replacement.synced {
            before(Step::Sync)?;
            file.sync_all()?;
        }
        before(Step::Rename)?;
        fs::rename(replacement.new, replacement.path)
    };
    write().inspect_err(|_| {
        let _ = fs::remove_file(replacement.new);
    })
}

/// Removes a file, and says whether there was one. It is not durable before [`sync_folder`].
///
/// # Errors
/// It can't be removed.
pub fn remove(path: &Path) -> io::Result<bool> {
    match fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(e),
    }
}

/// Makes durable which files are in `folder`, and under which names.
///
/// # Errors
/// The folder can't be opened or synced.
pub fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn whichever_step_fails_the_file_has_its_old_content_and_nothing_else_stays() {
        let folder = std::env::temp_dir().join(format!("locus-durable-{}", std::process::id()));
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder).unwrap();
        let (path, new) = (folder.join("file"), folder.join("file.new"));
        let file = Replacement {
            path: &path,
            new: &new,
            mode: 0o600,
            synced: true,
        };
        fs::write(&path, "old").unwrap();
        let steps = [
            Step::Open,
            Step::Write(0),
            Step::Write(1),
            Step::Sync,
            Step::Rename,
        ];
        for fails in steps {
            let before = |step| match step == fails {
                true => Err(io::Error::other("failed")),
                false => Ok(()),
            };
            replace(&file, &[b"n", b"ew"], before).unwrap_err();
            assert_eq!(fs::read(&path).unwrap(), b"old", "{fails:?}");
            assert!(!new.exists(), "{fails:?}");
        }
        // A run that died left this.
        fs::write(&new, "half of it").unwrap();
        replace(&file, &[b"n", b"ew"], |_| Ok(())).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        sync_folder(&folder).unwrap();
        fs::remove_dir_all(&folder).unwrap();
    }
}
