//! The lock of a guest: one change of a guest at a time.
//!
//! A lock is a locked file. The kernel releases it when the process ends, however it ends.

use std::fs::{self, File, TryLockError};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use locus_xen::{fault, uuid, DomainInfo};

use super::unpublished;
use crate::apply::Options;
use crate::error::{Error, Result};
use crate::paths;

/// Time between two tries.
const RETRY: Duration = Duration::from_millis(50);
/// Behind the UUID in the name of the lock that [`take_for_requests`] takes.
const REQUESTS: &str = ".requests";

/// Takes the lock of the guest `uuid`. The guest is locked while the file is open.
///
/// # Errors
/// [`Class::TryAgain`](crate::error::Class::TryAgain) when another run still holds it after `options.timeout`;
/// [`Class::Failed`](crate::error::Class::Failed) when there can be no such file.
pub(super) fn take(uuid: &str, options: &Options) -> Result<File> {
    take_named(&format!("{uuid}.lock"), options)
}

/// Takes the lock of the one worker of a daemon that serves requests for the guest `uuid`. Who holds it may be a worker of a
/// daemon that was killed, which still carries out its request.
///
/// # Errors
/// [`Class::TryAgain`](crate::error::Class::TryAgain) when another worker still holds it after `options.timeout`;
/// [`Class::Failed`](crate::error::Class::Failed) when there can be no such file.
pub fn take_for_requests(uuid: &str, options: &Options) -> Result<File> {
    take_named(&format!("{uuid}{REQUESTS}.lock"), options)
}

fn take_named(name: &str, options: &Options) -> Result<File> {
    let began = Instant::now();
    let path = Path::new(paths::RUN).join(name);
    let failed =
        |e: std::io::Error| Error::failed(format!("cannot take the lock {}: {e}", path.display()));
    fault::point("lock").map_err(failed)?;
    loop {
        options.check_interrupted()?;
        let file = paths::open_lock(&path).map_err(failed)?;
        match file.try_lock() {
            Ok(()) if is_at(&file, &path) => return Ok(file),
            // It was removed meanwhile, and another file may have its name.
            Ok(()) => {}
            Err(TryLockError::Error(e)) => return Err(failed(e)),
            Err(TryLockError::WouldBlock) if began.elapsed() >= options.timeout => {
                return Err(Error::try_again(format!(
                    "another run of xen-locus works on this guest (lock {}); try again",
                    path.display()
                )))
            }
            Err(TryLockError::WouldBlock) => std::thread::sleep(RETRY),
        }
    }
}

/// Whether `file` is the one at `path`.
fn is_at(file: &File, path: &Path) -> bool {
    let id = |m: &fs::Metadata| (m.dev(), m.ino());
    matches!((file.metadata(), fs::metadata(path)), (Ok(a), Ok(b)) if id(&a) == id(&b))
}

/// Removes the locks of guests that are not among `domains`, unless a run holds them, and what is noted of their status.
pub fn sweep(domains: &[DomainInfo]) {
    unpublished::sweep(domains);
    for entry in fs::read_dir(paths::RUN).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let uuid = name.to_str().and_then(|n| n.strip_suffix(".lock"));
        let uuid = uuid.map(|n| n.strip_suffix(REQUESTS).unwrap_or(n));
        // The daemon's own lock is in this folder too.
        let is_gone = |uuid: &str| uuid::is_text(uuid) && domains.iter().all(|d| d.uuid != uuid);
        if !uuid.is_some_and(is_gone) {
            continue;
        }
        let path = entry.path();
        let Ok(file) = File::open(&path) else {
            continue;
        };
        // Locked until it is removed: a run that waits for it finds that it has no name any more.
        if file.try_lock().is_ok() && is_at(&file, &path) {
            // If it can't be removed, an empty file stays.
            let _ = fs::remove_file(&path);
        }
    }
}
