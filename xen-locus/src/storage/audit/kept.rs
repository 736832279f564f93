//! What is in force in each guest after its last line: one file for each guest in which something is, `UUID`.
//!
//! These files are written after the line and after the head. If a run dies in between, the file of one guest is older than
//! the last line, which has the same list. So the reader takes what is newer of the two, and the next run that writes brings
//! the file up to date before it does anything else.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::InForce;
use crate::paths;
use crate::say;
use crate::storage::durable::{self, Replacement};

/// Version of [`Kept`].
const SCHEMA: u32 = 1;

/// What is in force in a guest.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Kept {
    schema: u32,
    /// Number of the line.
    pub(super) seq: u64,
    /// In the order they were applied.
    pub(super) in_force: Vec<InForce>,
}

/// What all versions of [`Kept`] have.
#[derive(Deserialize)]
struct Version {
    schema: u32,
}

/// The file of the guest `uuid`; `None` if that is no name of a file.
fn path(folder: &Path, uuid: &str) -> Option<PathBuf> {
    let is_name = !uuid.is_empty() && uuid.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
    is_name.then(|| folder.join(uuid))
}

/// What is kept of the guest `uuid`, if anything.
///
/// # Errors
/// It can't be read; it is of a later version ([`io::ErrorKind::Unsupported`]); it is damaged
/// ([`io::ErrorKind::InvalidData`]).
pub(super) fn read(folder: &Path, uuid: &str) -> io::Result<Option<Kept>> {
    let Some(path) = path(folder, uuid) else {
        return Ok(None);
    };
    let odd = |why: String| io::Error::other(format!("{}: {why}", path.display()));
    let bytes = match fs::read(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(odd(error.to_string())),
    };
    let damaged = |error: serde_json::Error| {
        io::Error::new(
            io::ErrorKind::InvalidData,
            format!("{} is damaged ({error})", path.display()),
        )
    };
    // A later version may have other members.
    let version: Version = serde_json::from_slice(&bytes).map_err(damaged)?;
    if version.schema != SCHEMA {
        let why = format!(
            "{} is of version {}, and this xen-locus knows {SCHEMA}: a later one wrote it, so use that one for this guest",
            path.display(),
            version.schema
        );
        return Err(io::Error::new(io::ErrorKind::Unsupported, why));
    }
    serde_json::from_slice(&bytes).map(Some).map_err(damaged)
}

/// Keeps what is in force in the guest `uuid` after line `seq`, unless something newer is kept. A file that is damaged is set
/// aside: the line has all that it should say.
///
/// # Errors
/// It can't be written, or a later version wrote it: what was kept before stays.
pub(super) fn update(folder: &Path, uuid: &str, seq: u64, in_force: &[InForce]) -> io::Result<()> {
    match read(folder, uuid) {
        Ok(Some(old)) if old.seq >= seq => Ok(()),
        Ok(_) => write(folder, uuid, seq, in_force),
        Err(error) if error.kind() == io::ErrorKind::InvalidData => {
            set_aside(folder, uuid, &error)?;
            write(folder, uuid, seq, in_force)
        }
        Err(error) => Err(error),
    }
}

/// Gives the damaged file of the guest `uuid` another name.
fn set_aside(folder: &Path, uuid: &str, why: &io::Error) -> io::Result<()> {
    let Some(path) = path(folder, uuid) else {
        return Ok(());
    };
    let aside = path.with_extension("damaged");
    fs::rename(&path, &aside)?;
    say::warn(format_args!(
        "{why}; it is {} now, and the log has what it should say",
        aside.display()
    ));
    durable::sync_folder(folder)
}

/// Keeps what is in force in the guest `uuid` after line `seq`, which was made of what was kept before. That may have a greater
/// number: after the log and its head were lost, the lines are numbered from 1 again.
///
/// # Errors
/// It can't be written: what was kept before stays.
pub(super) fn write(folder: &Path, uuid: &str, seq: u64, in_force: &[InForce]) -> io::Result<()> {
    let Some(path) = path(folder, uuid) else {
        return Ok(());
    };
    if in_force.is_empty() {
        return match durable::remove(&path)? {
            true => durable::sync_folder(folder),
            false => Ok(()),
        };
    }
    paths::own_folder(folder)?;
    let kept = Kept {
        schema: SCHEMA,
        seq,
        in_force: in_force.to_vec(),
    };
    let file = Replacement {
        path: &path,
        new: &path.with_extension("new"),
        mode: 0o600,
        synced: true,
    };
    durable::replace(&file, &[&serde_json::to_vec(&kept)?], |_| Ok(()))?;
    durable::sync_folder(folder)
}
