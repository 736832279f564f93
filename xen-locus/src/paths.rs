//! Files and folders of this tool in dom0. `xtest` and the manuals name them too.

use std::fs::{self, DirBuilder, File, Permissions};
use std::io;
use std::os::unix::fs::{
    DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _,
};
use std::path::Path;

/// Folder of what is void after a reboot of dom0, because the guests are gone then: locks of guests, `UUID.lock`.
pub const RUN: &str = "/run/xen-locus";
/// Lock of the daemon: there is one daemon at a time.
pub const DAEMON_LOCK: &str = "/run/xen-locus/daemon.lock";
/// Folder of the guardians' files, `UUID.PID`.
pub const GUARDIANS: &str = "/run/xen-locus/guard";
/// Folder of the journals, one file for each guest, `UUID`.
pub const JOURNALS: &str = "/var/lib/xen-locus/journal";
/// The audit log.
pub const AUDIT_LOG: &str = "/var/log/xen-locus/audit.jsonl";
/// Number and hash of the audit log's last line.
pub const AUDIT_HEAD: &str = "/var/lib/xen-locus/audit-head.json";
/// Lock of the audit log and of what belongs to it.
pub const AUDIT_LOCK: &str = "/run/xen-locus/audit.lock";
/// Folder of what is in force in each guest by the audit log, one file for each guest, `UUID`.
pub const IN_FORCE: &str = "/var/lib/xen-locus/in-force";
/// Folder of the payloads that requests to the daemon name, unless it is told another.
pub const PAYLOADS: &str = "/var/lib/xen-locus/payloads";
/// Folder of the cache of guests' kernels, unless a command is told another.
pub const CACHE: &str = "/var/cache/xen-locus";

/// Makes a folder that no other user can enter, if there is none. One that is there must be this user's, and no other user
/// may be able to write it.
///
/// # Errors
/// It is a link, another user's, or others can write it; or it can't be made.
pub fn own_folder(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)?;
    let found = fs::symlink_metadata(path)?;
    if !found.is_dir() {
        let why = format!(
            "{} is no folder: expected a folder, not a link to one",
            path.display()
        );
        return Err(io::Error::other(why));
    }
    check_own(path)
}

/// Opens the file of a lock, in a folder that no other user can enter. Both are made if they are missing. Who can open such a
/// file can hold the lock, and nobody else would be served.
///
/// # Errors
/// The folder or the file is a link, or another user's; or it can't be made.
pub fn open_lock(path: &Path) -> io::Result<File> {
    let folder = path.parent().unwrap_or(Path::new("/"));
    own_folder(folder)?;
    // An earlier version let all users in.
    if fs::symlink_metadata(folder)?.mode() & 0o077 != 0 {
        fs::set_permissions(folder, Permissions::from_mode(0o700))?;
    }
    File::options()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)
}

/// Checks that only this user can have written the file or folder at `path`. A link is followed.
///
/// # Errors
/// Another user could write it; or it can't be looked at.
pub fn check_own(path: &Path) -> io::Result<()> {
    let found = fs::metadata(path)?;
    let own = own_uid()?;
    if found.uid() == own && found.mode() & 0o022 == 0 {
        return Ok(());
    }
    Err(io::Error::other(format!(
        "{} belongs to uid {} with mode {:04o}, so another user may have written it: it must belong to uid {own}, and only \
         its owner may write it",
        path.display(),
        found.uid(),
        found.mode() & 0o7777
    )))
}

/// The user that this process runs as.
///
/// # Errors
/// `/proc` can't be read.
pub fn own_uid() -> io::Result<u32> {
    Ok(fs::metadata("/proc/self")?.uid())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_other_user_can_open_a_lock() {
        let base = std::env::temp_dir().join(format!("xen-locus-locks-{}", std::process::id()));
        let _ = fs::remove_dir_all(&base);
        let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o777;
        let new = base.join("new/a.lock");
        open_lock(&new).unwrap();
        assert_eq!((mode(&base.join("new")), mode(&new)), (0o700, 0o600));
        // As an earlier version left it.
        let old = base.join("old/a.lock");
        fs::create_dir(base.join("old")).unwrap();
        fs::set_permissions(base.join("old"), Permissions::from_mode(0o755)).unwrap();
        fs::write(&old, "kept").unwrap();
        open_lock(&old).unwrap();
        assert_eq!(mode(&base.join("old")), 0o700);
        assert_eq!(fs::read(&old).unwrap(), b"kept");
        // No link is followed, and no folder that is one.
        std::os::unix::fs::symlink(&old, base.join("new/b.lock")).unwrap();
        assert!(open_lock(&base.join("new/b.lock")).is_err());
        std::os::unix::fs::symlink("old", base.join("link")).unwrap();
        assert!(open_lock(&base.join("link/a.lock")).is_err());
        fs::remove_dir_all(&base).unwrap();
    }

    #[test]
    fn no_other_user_can_enter_or_write_an_own_folder() {
        let base = std::env::temp_dir().join(format!("xen-locus-folder-{}", std::process::id()));
        let _ = fs::remove_dir_all(&base);
        let new = base.join("of/xen-locus");
        own_folder(&new).unwrap();
        assert_eq!(fs::metadata(&new).unwrap().mode() & 0o777, 0o700);
        // An administrator may let a group read it.
        for (mode, is_own) in [(0o750, true), (0o755, true), (0o770, false), (0o777, false)] {
            fs::set_permissions(&new, Permissions::from_mode(mode)).unwrap();
            assert_eq!(own_folder(&new).is_ok(), is_own, "{mode:o}");
        }
        std::os::unix::fs::symlink(base.join("of"), base.join("link")).unwrap();
        assert!(own_folder(&base.join("link")).is_err());
        fs::remove_dir_all(&base).unwrap();
    }

    #[test]
    fn what_another_user_could_have_written_is_told() {
        let base = std::env::temp_dir().join(format!("xen-locus-own-{}", std::process::id()));
        let _ = fs::remove_dir_all(&base);
        fs::create_dir_all(&base).unwrap();
        let file = base.join("fix.ko");
        fs::write(&file, "").unwrap();
        for (mode, is_own) in [(0o644, true), (0o600, true), (0o664, false), (0o646, false)] {
            for path in [&base, &file] {
                fs::set_permissions(path, Permissions::from_mode(mode | 0o100)).unwrap();
                let checked = check_own(path);
                assert_eq!(checked.is_ok(), is_own, "{mode:o}: {checked:?}");
            }
        }
        assert!(check_own(&base.join("none")).is_err());
        fs::remove_dir_all(&base).unwrap();
    }
}
