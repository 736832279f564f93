//! Guests whose status in XenStore may not be true: a run changed them, and has not published that.
//!
//! Each has an empty file in the folder of locks, `UUID.unpublished`. It is there before the journal goes that tells of the
//! change, and goes when the status is published. So it does not matter how a run ends, or whether xenstored answers it: the
//! daemon, or the next run, finds the file.

use std::fs;
use std::path::{Path, PathBuf};

use locus_xen::{uuid, DomainInfo};

use crate::error::{Error, Result};
use crate::paths;
use crate::say;
use crate::storage::durable;

const SUFFIX: &str = ".unpublished";

fn path(folder: &Path, uuid: &str) -> PathBuf {
    folder.join(format!("{uuid}{SUFFIX}"))
}

/// The caller has the guest's lock.
pub(super) fn note(uuid: &str) -> Result<()> {
    let path = path(Path::new(paths::RUN), uuid);
    paths::open_lock(&path).map(drop).map_err(|e| {
        Error::failed(format!(
            "cannot make {}, by which the daemon is told to publish the guest's status: {e}",
            path.display()
        ))
    })
}

pub(super) fn is_noted(uuid: &str) -> bool {
    path(Path::new(paths::RUN), uuid).exists()
}

/// The caller has the guest's lock. If the file can't be removed, the guest is published again.
pub(super) fn clear(uuid: &str) {
    let path = path(Path::new(paths::RUN), uuid);
    if let Err(error) = durable::remove(&path) {
        say::warn(format_args!("cannot remove {}: {error}", path.display()));
    }
}

/// UUIDs of the guests whose status may not be true.
#[must_use]
pub fn unpublished() -> Vec<String> {
    in_folder(Path::new(paths::RUN))
}

fn in_folder(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let of = |name: &str| name.strip_suffix(SUFFIX).map(str::to_owned);
    entries
        .filter_map(|entry| of(entry.file_name().to_str()?))
        .filter(|name| uuid::is_text(name))
        .collect()
}

/// Forgets the guests that are not among `domains`.
pub(super) fn sweep(domains: &[DomainInfo]) {
    for uuid in unpublished() {
        if domains.iter().all(|d| d.uuid != uuid) {
            clear(&uuid);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guests_that_are_noted_are_told_from_their_locks() {
        let folder = std::env::temp_dir().join(format!("xen-locus-notes-{}", std::process::id()));
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir(&folder).unwrap();
        let uuid = "00000000-0000-0000-0000-000000000001";
        let lock = folder.join(format!("{uuid}.lock"));
        for file in [path(&folder, uuid), lock, path(&folder, "daemon")] {
            paths::open_lock(&file).unwrap();
        }
        assert_eq!(in_folder(&folder), [uuid]);
        fs::remove_dir_all(&folder).unwrap();
        assert_eq!(in_folder(&folder), [""; 0]);
    }
}
