//! Cache of guests' kernels on disk: symbols and types that a run read, for the next run.
//!
//! One file for each guest and build-id, `UUID.BUILD-ID`. A file is used for its own guest alone, although many guests
//! run the same build. Only a reading of the whole symbol table proves that it belongs to the build-id, and a guest
//! that lies must mislead only about itself.
//!
//! A file is used only if no other user can have written it, its checksum is right, its symbols agree with the
//! anchors by which the kernel was found, and the guest shows the same release and build-id now. Any other file is
//! ignored. Addresses are stored as they were, and move with the text if the kernel is at another place (KASLR).

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Read as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use locus_guest::fetch;
use locus_kernel::{CachedKernel, KernelCache};
use locus_xen::{fault, uuid};

use super::durable::{self, Replacement, Step};
use crate::paths;

/// First bytes of a file; the last of them changes with the format.
const MAGIC: &[u8; 8] = b"xlocus\x00\x03";
/// Bytes before the body: magic number, CRC-32 of the body.
const HEAD: usize = 12;
/// Longest file believed, in bytes.
const FILE_MAX: u64 = 64 << 20;
/// Most files in the folder; the oldest are removed first.
const FILES_MAX: usize = 64;
/// How long a file stays at least. Where there are more guests than files, each guest would else take the place of another
/// one, and none would find its own.
const STAYS: Duration = Duration::from_secs(3600);

/// The cache of one guest's kernels.
#[derive(Clone, Debug, Default)]
pub struct Cache {
    dir: PathBuf,
    uuid: String,
}

impl Cache {
    /// The cache of the guest `uuid`, in folder `dir`.
    #[must_use]
    pub fn new(dir: &Path, uuid: &str) -> Cache {
        Cache {
            dir: dir.to_owned(),
            uuid: if uuid::is_unique(uuid) { uuid } else { "" }.to_owned(),
        }
    }

    /// A cache that stores nothing.
    #[must_use]
    pub fn none() -> Cache {
        Cache::default()
    }
}

impl KernelCache for Cache {
    fn is_wanted(&self) -> bool {
        !self.uuid.is_empty()
    }

    /// The newest first. Files that can't be used are skipped.
    fn load(&self) -> Box<dyn Iterator<Item = CachedKernel> + '_> {
        let mut files = Vec::new();
        if self.is_wanted() {
            files = names(&self.dir);
            files.retain(|name| name.starts_with(&format!("{}.", self.uuid)));
        }
        Box::new(
            files
                .into_iter()
                .filter_map(|name| parse(&read(&self.dir.join(name)).ok()?)),
        )
    }

    fn store(&self, kernel: &CachedKernel) -> io::Result<()> {
        if !self.is_wanted() || kernel.build_id.is_empty() {
            return Ok(());
        }
        fault::point("cache: store")?;
        let mut folder = DirBuilder::new();
        folder.recursive(true).mode(0o700).create(&self.dir)?;
        // What is put there would not be used, and the files there may be anybody's.
        paths::check_own(&self.dir)?;
        let name = format!("{}.{}", self.uuid, hex::encode(&kernel.build_id));
        let mut files = files(&self.dir);
        // It is replaced.
        files.retain(|(_, other)| *other != name);
        let room = files.get(FILES_MAX - 1..).unwrap_or_default();
        let is_new = |made: &SystemTime| made.elapsed().is_ok_and(|age| age < STAYS);
        if room.iter().any(|(made, _)| is_new(made)) {
            return Ok(());
        }
        for (_, old) in room {
            // Another process may be faster.
            durable::remove(&self.dir.join(old))?;
        }
        let file = Replacement {
            path: &self.dir.join(&name),
            // Several processes may store the same kernel at once.
            new: &self.dir.join(format!(".{name}.{}", std::process::id())),
            mode: 0o600,
            // A file that a power failure damages has a wrong checksum, and is read from the guest again.
            synced: false,
        };
        durable::replace(&file, &[&format(kernel)?], |step| match step {
            Step::Rename => fault::point("cache: rename"),
            _ => Ok(()),
        })
    }
}

/// Names of the cache's own files in `dir`, the newest first.
fn names(dir: &Path) -> Vec<String> {
    files(dir).into_iter().map(|(_, name)| name).collect()
}

/// The cache's own files in `dir`: when each was made, and its name; the newest first. The folder is the user's choice, so
/// there may be others, with such names too: a file is the cache's if it is this user's, and begins as one of any format.
fn files(dir: &Path) -> Vec<(SystemTime, String)> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let mut found: Vec<(SystemTime, String)> = entries
        .filter_map(|e| {
            let name = e.file_name().into_string().ok()?;
            // Of a symbolic link this is about the link.
            let meta = e.metadata().ok()?;
            let is_own = meta.is_file() && is_name(&name) && begins_as_own(&e.path());
            is_own.then_some((meta.modified().ok()?, name))
        })
        .collect();
    found.sort();
    found.reverse();
    found
}

/// Whether a file is this user's, and empty, or begins as the cache's files do, in this format or another one. A run that was
/// killed leaves an empty one.
fn begins_as_own(path: &Path) -> bool {
    let Ok((file, meta)) = open(path) else {
        return false;
    };
    let [expected @ .., _] = MAGIC;
    let mut head = Vec::new();
    let read = file.take(expected.len() as u64).read_to_end(&mut head);
    let is_user = paths::own_uid().is_ok_and(|me| me == meta.uid());
    read.is_ok() && is_user && (head.is_empty() || head == expected)
}

/// Opens a file that is no link.
fn open(path: &Path) -> io::Result<(fs::File, fs::Metadata)> {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path)?;
    let meta = file.metadata()?;
    Ok((file, meta))
}

/// Whether a file of the cache has such a name: `UUID.BUILD-ID`, or `.UUID.BUILD-ID.PID` while it is written.
fn is_name(name: &str) -> bool {
    let parts: Vec<&str> = name.split('.').collect();
    let (uuid, build_id) = match *parts.as_slice() {
        [uuid, build_id] => (uuid, build_id),
        ["", uuid, build_id, pid] if pid.parse::<u32>().is_ok() => (uuid, build_id),
        _ => return false,
    };
    uuid::is_unique(uuid) && hex::decode(build_id).is_ok_and(|bytes| !bytes.is_empty())
}

/// The content of a file for `kept`.
///
/// # Errors
/// It can't be encoded.
pub fn format(kept: &CachedKernel) -> io::Result<Vec<u8>> {
    let bytes = postcard::to_extend(kept, vec![0; HEAD]).map_err(io::Error::other)?;
    Ok(with_header(bytes))
}

/// Fills in the first bytes of a file: magic number and checksum of the rest.
pub fn with_header(mut bytes: Vec<u8>) -> Vec<u8> {
    let sum = crc32fast::hash(bytes.get(HEAD..).unwrap_or_default());
    if let Some((head, _)) = bytes.split_at_mut_checked(HEAD) {
        let (magic, place) = head.split_at_mut(MAGIC.len());
        magic.copy_from_slice(MAGIC);
        place.copy_from_slice(&sum.to_le_bytes());
    }
    bytes
}

/// The kernel in a file, if the file is undamaged.
#[must_use]
pub fn parse(bytes: &[u8]) -> Option<CachedKernel> {
    let body = bytes.get(HEAD..)?;
    let sum = fetch::u32(bytes, MAGIC.len())?;
    if !bytes.starts_with(MAGIC) || crc32fast::hash(body) != sum {
        return None;
    }
    postcard::from_bytes(body).ok()
}

/// Reads a file that no other user can have written.
fn read(path: &Path) -> io::Result<Vec<u8>> {
    let me = paths::own_uid()?;
    let ours = |meta: &fs::Metadata| meta.uid() == me && meta.mode() & 0o022 == 0;
    let folder = path.parent().unwrap_or(Path::new("/"));
    let (file, meta) = open(path)?;
    if !ours(&fs::metadata(folder)?) || !ours(&meta) || !meta.is_file() || meta.len() > FILE_MAX {
        return Err(io::Error::other("others can write it, or it is too long"));
    }
    let mut bytes = Vec::new();
    file.take(FILE_MAX).read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;
    use locus_guest::budget::Budget;
    use locus_kernel::fixture::{vcpus, Fixture, ENTRY, KIND, TEXT};
    use locus_kernel::Kernel;

    const UUID: &str = "0c0a8f2e-1111-2222-3333-444455556666";

    /// What a file of another format begins with.
    const OLD: &[u8] = b"xlocus\x00\x01old";

    /// A folder of this test alone, gone afterwards.
    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Folder {
            let path =
                std::env::temp_dir().join(format!("xen-locus-{name}-{}", std::process::id()));
            let _ = fs::remove_dir_all(&path);
            Folder(path)
        }

        fn only_file(&self) -> PathBuf {
            let names = names(&self.0);
            assert_eq!(names.len(), 1, "{names:?}");
            self.0.join(&names[0])
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    /// A kernel with a build-id and a function to tell it by.
    fn fixture(build_id: u8, marker: &str) -> Fixture {
        let mut fixture = Fixture::new();
        let mut note = [4u32, 20, 3]
            .iter()
            .flat_map(|w| w.to_le_bytes())
            .collect::<Vec<u8>>();
        note.extend(b"GNU\0");
        note.extend([build_id; 20]);
        fixture.constants.push(("__start_notes", note));
        fixture.constants.push(("__stop_notes", vec![0]));
        fixture.function(TEXT.0 + 0x200, marker, &[0xc3]);
        fixture
    }

    /// Which of the two marker functions the kernel has when read through the cache.
    fn marker(fixture: Fixture, cache: &Cache) -> &'static str {
        let memory = fixture.build();
        let kernel = Kernel::read_with(&memory, KIND, &vcpus(), cache, &Budget::default()).unwrap();
        assert_eq!(kernel.symbols.addr("entry"), Some(ENTRY));
        match (kernel.symbols.addr("first"), kernel.symbols.addr("second")) {
            (Some(_), None) => "first",
            (None, Some(_)) => "second",
            both => panic!("{both:?}"),
        }
    }

    #[test]
    fn a_known_build_of_a_known_guest_is_not_read_again() {
        let folder = Folder::new("known");
        let cache = Cache::new(&folder.0, UUID);
        assert_eq!(marker(fixture(1, "first"), &cache), "first");
        folder.only_file();
        // Same guest, same build-id: what is kept is believed, so the other marker is not seen.
        assert_eq!(marker(fixture(1, "second"), &cache), "first");
        assert_eq!(marker(fixture(1, "second"), &Cache::none()), "second");
    }

    #[test]
    fn another_guest_or_another_build_is_read() {
        let folder = Folder::new("other");
        let cache = Cache::new(&folder.0, UUID);
        assert_eq!(marker(fixture(1, "first"), &cache), "first");
        assert_eq!(marker(fixture(2, "second"), &cache), "second");
        let other = Cache::new(&folder.0, &UUID.replace('0', "1"));
        assert_eq!(marker(fixture(1, "second"), &other), "second");
        let nobody = Cache::new(&folder.0, "00000000-0000-0000-0000-000000000000");
        assert!(!nobody.is_wanted());
    }

    #[test]
    fn the_oldest_files_of_the_cache_go_and_no_other_file() {
        let folder = Folder::new("others");
        fs::create_dir_all(&folder.0).unwrap();
        fs::set_permissions(&folder.0, fs::Permissions::from_mode(0o700)).unwrap();
        let others = [
            "notes.txt",
            "disk.img",
            ".profile",
            "0c0a8f2e.00ff",
            &format!("{UUID}.key"),
            // An image of the first of January.
            &format!("{UUID}.20240101"),
            &format!("{UUID}.00ff.gz"),
            &format!(".{UUID}.00ff.swp"),
        ]
        .map(str::to_owned);
        let many = (0..2 * FILES_MAX).map(|n| format!("file-{n}"));
        let others: Vec<String> = others.into_iter().chain(many).collect();
        for name in &others {
            let path = folder.0.join(name);
            fs::write(&path, "somebody's").unwrap();
            // Older than all of the cache's.
            let file = fs::File::options().write(true).open(&path).unwrap();
            file.set_modified(SystemTime::UNIX_EPOCH).unwrap();
        }
        std::os::unix::fs::symlink("notes.txt", folder.0.join(format!("{UUID}.11"))).unwrap();
        fs::create_dir(folder.0.join(format!("{UUID}.22"))).unwrap();
        for n in 0..FILES_MAX + 9 {
            let path = folder.0.join(format!("{UUID}.{n:04x}"));
            fs::write(&path, OLD).unwrap();
            let made = SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1000 + n as u64);
            let file = fs::File::options().write(true).open(&path).unwrap();
            file.set_modified(made).unwrap();
        }
        fs::write(folder.0.join(format!(".{UUID}.00ff.77")), "").unwrap();
        let cache = Cache::new(&folder.0, UUID);
        assert_eq!(marker(fixture(1, "first"), &cache), "first");
        assert_eq!(names(&folder.0).len(), FILES_MAX);
        assert_eq!(cache.load().count(), 1, "the new one is there");
        assert!(!folder.0.join(format!("{UUID}.0000")).exists(), "oldest");
        let last = format!("{UUID}.{:04x}", FILES_MAX + 8);
        assert!(folder.0.join(last).exists(), "the newest of the old ones");
        for name in others.iter().map(String::as_str) {
            assert!(folder.0.join(name).exists(), "{name}");
        }
        assert!(folder.0.join(format!("{UUID}.11")).is_symlink());
        assert!(folder.0.join(format!("{UUID}.22")).is_dir());
    }

    #[test]
    fn more_guests_than_files_do_not_take_each_others_place() {
        let folder = Folder::new("many");
        fs::create_dir_all(&folder.0).unwrap();
        fs::set_permissions(&folder.0, fs::Permissions::from_mode(0o700)).unwrap();
        for n in 0..FILES_MAX {
            fs::write(folder.0.join(format!("{UUID}.{n:04x}")), OLD).unwrap();
        }
        let before = names(&folder.0);
        let other = Cache::new(&folder.0, &UUID.replace('0', "1"));
        assert_eq!(marker(fixture(1, "first"), &other), "first");
        assert_eq!(names(&folder.0), before);
        // A guest that has a file replaces that one.
        let own = folder.0.join(format!("{UUID}.{}", hex::encode([1; 20])));
        fs::rename(folder.0.join(format!("{UUID}.0000")), &own).unwrap();
        assert_eq!(
            marker(fixture(1, "first"), &Cache::new(&folder.0, UUID)),
            "first"
        );
        assert!(fs::metadata(&own).unwrap().len() > OLD.len() as u64);
        assert_eq!(names(&folder.0).len(), FILES_MAX);
        // One that is old makes room.
        let file = fs::File::options().write(true).open(&own).unwrap();
        file.set_modified(SystemTime::now() - 2 * STAYS).unwrap();
        assert_eq!(marker(fixture(1, "first"), &other), "first");
        assert!(!own.exists() && names(&folder.0).len() == FILES_MAX);
    }

    #[test]
    fn a_file_that_is_damaged_or_that_others_can_write_is_as_good_as_none() {
        let folder = Folder::new("damaged");
        let cache = Cache::new(&folder.0, UUID);
        marker(fixture(1, "first"), &cache);
        let file = folder.only_file();
        let good = fs::read(&file).unwrap();
        for at in (0..good.len()).step_by(good.len() / 50) {
            let mut bad = good.clone();
            bad[at] ^= 0x10;
            fs::write(&file, &bad).unwrap();
            assert_eq!(cache.load().count(), 0, "byte {at}");
            fs::write(&file, &good[..at]).unwrap();
            assert_eq!(cache.load().count(), 0, "cut at {at}");
        }
        fs::write(&file, &good).unwrap();
        assert_eq!(cache.load().count(), 1);
        fs::set_permissions(&file, fs::Permissions::from_mode(0o622)).unwrap();
        assert_eq!(cache.load().count(), 0);
        assert_eq!(marker(fixture(1, "second"), &cache), "second");
        assert_eq!(marker(fixture(1, "first"), &cache), "second", "rewritten");
        fs::set_permissions(&folder.0, fs::Permissions::from_mode(0o777)).unwrap();
        assert_eq!(cache.load().count(), 0);
        // Nothing is put there either.
        let before = fs::read(&file).unwrap();
        assert_eq!(marker(fixture(1, "first"), &cache), "first");
        assert_eq!(fs::read(&file).unwrap(), before);
        assert_eq!(marker(fixture(2, "first"), &cache), "first");
        folder.only_file();
    }

    #[test]
    fn a_file_with_a_right_checksum_and_wrong_content_is_harmless() {
        let folder = Folder::new("content");
        let cache = Cache::new(&folder.0, UUID);
        marker(fixture(1, "first"), &cache);
        let file = folder.only_file();
        let good = fs::read(&file).unwrap();
        let memory = fixture(1, "first").build();
        for step in 0..40 {
            let mut bad = good.clone();
            let at = HEAD + step * 79_193 % (good.len() - HEAD);
            bad[at] = bad[at].wrapping_add(1 << (step % 8));
            let sum = crc32fast::hash(&bad[HEAD..]);
            bad[MAGIC.len()..HEAD].copy_from_slice(&sum.to_le_bytes());
            fs::write(&file, &bad).unwrap();
            let kernel =
                Kernel::read_with(&memory, KIND, &vcpus(), &cache, &Budget::default()).unwrap();
            assert_eq!(kernel.release, "6.1.0-test");
        }
    }
}
