//! The guardian: a second process that repairs a guest when the process that works on it (the run) dies.
//!
//! Xen does not release a pause when the tool dies, and a change takes several writes. So before a run pauses a guest for the
//! first time, it starts a guardian ([`worker`]). The guardian opens its own connection to Xen, maps the places to be changed,
//! locks itself in memory, and waits ([`guardian`]). The run marks each step in a page that both share. If the run dies, the
//! guardian looks at the bytes in the guest: a change that is complete stays, any other is undone. Then it unpauses the guest
//! ([`take_over`]). For that it needs no memory and no file.
//!
//! The page is at the start of a file below [`DIR`]; what must be known of the change follows it. Both processes hold the file's
//! lock. If the lock is free, the guardian has died too, and `recover` does its work. A reboot of dom0 removes these files, and
//! ends the guests.

pub mod guardian;
pub mod take_over;
pub mod worker;

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use locus_guest::addr::{DomId, Frame, PAGE_LEN};
use locus_guest::{MemoryMut, WindowMut};
use locus_xen::uuid;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::say;
use take_over::TakeOver;

/// The folder of the guards' files. A reboot of dom0 empties it, and ends the guests.
pub const DIR: &str = crate::paths::GUARDIANS;
/// Longest description of a run that is written to such a file or read from it, in bytes.
const RUN_MAX: u64 = 16 << 20;

/// Bytes of one frame that a run may change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spot {
    /// Number of the frame, as foreign mapping takes it: an MFN of a PV guest, else a GFN.
    pub frame: u64,
    /// Offset in the frame, in bytes.
    pub offset: usize,
    /// The bytes before the change.
    #[serde(with = "serde_bytes")]
    pub old: Vec<u8>,
    /// The bytes after it, as many.
    #[serde(with = "serde_bytes")]
    pub new: Vec<u8>,
}

impl Spot {
    /// The parts, one for each frame, of a change of `old` to `new` at `offset` in the first of `frames`. Both are equally
    /// long. If they are not, the guardian refuses the parts (`WatchedRun::read`), and nothing is changed.
    #[must_use]
    pub fn split(frames: &[Frame], offset: usize, old: &[u8], new: &[u8]) -> Vec<Spot> {
        let mut spots = Vec::new();
        let (mut at, mut done) = (offset, 0);
        for frame in frames {
            let len = (PAGE_LEN - at.min(PAGE_LEN)).min(old.len() - done);
            let part = |bytes: &[u8]| bytes.get(done..done + len).unwrap_or_default().to_vec();
            if len > 0 {
                spots.push(Spot {
                    frame: frame.0,
                    offset: at,
                    old: part(old),
                    new: part(new),
                });
            }
            (at, done) = (0, done + len);
        }
        spots
    }
}

/// The frames of `spots`, each once, in ascending order.
#[must_use]
pub fn frames(spots: &[Spot]) -> Vec<Frame> {
    let mut frames: Vec<Frame> = spots.iter().map(|s| Frame(s.frame)).collect();
    frames.sort_unstable();
    frames.dedup();
    frames
}

/// What a guardian must know of the run that it watches.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WatchedRun {
    /// Number of the domain.
    pub domid: u16,
    /// UUID of the domain.
    pub uuid: String,
    /// Process id of the run.
    pub pid: u32,
    /// What the run is about to change, in that order. Empty if it only looks.
    pub spots: Vec<Spot>,
}

impl WatchedRun {
    /// The domain.
    #[must_use]
    pub fn domain(&self) -> DomId {
        DomId(self.domid)
    }

    /// The guard's file of this run.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        Path::new(DIR).join(format!("{}.{}", self.uuid, self.pid))
    }

    /// Says what became of it after its process died.
    pub(crate) fn say(&self, outcome: TakeOver) {
        say::warn(format_args!(
            "process {} died at work on domain {}: {outcome}",
            self.pid, self.domid
        ));
    }

    fn write(&self, file: &File) -> std::io::Result<()> {
        let bytes = postcard::to_stdvec(self).map_err(|e| std::io::Error::other(e.to_string()))?;
        // What the guardian and `recover` could not read must not be begun.
        let len = bytes.len() as u64;
        if len > RUN_MAX {
            return Err(std::io::Error::other(format!(
                "the change takes {len} bytes to describe, and {RUN_MAX} are the most"
            )));
        }
        let blank = [0; PAGE_LEN];
        file.write_all_at(&blank, 0)
            .and_then(|()| file.write_all_at(&bytes, PAGE_LEN as u64))
    }

    pub(crate) fn read(file: &File) -> Result<WatchedRun> {
        let failed = |e: std::io::Error| bad(&e.to_string());
        let len = file.metadata().map_err(failed)?.len();
        let len = len.saturating_sub(PAGE_LEN as u64);
        if len > RUN_MAX {
            return Err(bad("it is too long"));
        }
        let len = usize::try_from(len).map_err(|_| bad("it is too long"))?;
        let mut bytes = vec![0; len];
        file.read_exact_at(&mut bytes, PAGE_LEN as u64)
            .map_err(failed)?;
        let run: WatchedRun = postcard::from_bytes(&bytes).map_err(|e| bad(&e.to_string()))?;
        let fits = |s: &Spot| s.old.len() == s.new.len() && s.offset + s.old.len() <= PAGE_LEN;
        if !run.spots.iter().all(fits) {
            return Err(bad("a change in it leaves its page"));
        }
        Ok(run)
    }
}

fn bad(why: &str) -> Error {
    Error::failed(format!("a guard's file below {DIR} can't be used: {why}"))
}

/// The places of a change, mapped into this process.
pub struct Places<'t> {
    spots: Vec<(&'t Spot, usize)>,
    window: Option<Box<dyn WindowMut>>,
    memory: &'t dyn MemoryMut,
    frames: Vec<Frame>,
}

impl std::fmt::Debug for Places<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Places").field(&self.spots).finish()
    }
}

impl<'t> Places<'t> {
    /// Maps the frames of `spots`, each once.
    ///
    /// # Errors
    /// [`Class::Failed`](crate::error::Class::Failed): a frame can't be mapped.
    pub fn map(memory: &'t dyn MemoryMut, spots: &'t [Spot]) -> Result<Places<'t>> {
        let mut places = Places::unmapped(memory, spots);
        places.set_mapped(true)?;
        Ok(places)
    }

    /// The same, with no frame mapped yet.
    #[must_use]
    pub fn unmapped(memory: &'t dyn MemoryMut, spots: &'t [Spot]) -> Places<'t> {
        let frames = frames(spots);
        let place = |spot: &'t Spot| {
            let page = frames.partition_point(|f| f.0 < spot.frame);
            (spot, page * PAGE_LEN + spot.offset)
        };
        Places {
            spots: spots.iter().map(place).collect(),
            window: None,
            memory,
            frames,
        }
    }

    /// Maps the frames, or unmaps them. A page of a PV guest that is mapped to be written can't become a page table, so
    /// none stays mapped while the run waits.
    ///
    /// # Errors
    /// [`Class::Failed`](crate::error::Class::Failed): a frame can't be mapped.
    pub fn set_mapped(&mut self, mapped: bool) -> Result<()> {
        self.window = match mapped && !self.frames.is_empty() {
            true => Some(self.memory.map_mut(&self.frames)?),
            false => None,
        };
        Ok(())
    }
}

/// Paths of the guards' files for the guest `uuid`, or for all guests.
///
/// # Errors
/// [`Class::Failed`](crate::error::Class::Failed): the folder can't be read.
pub fn files(uuid: Option<&str>) -> Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(DIR) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(Error::failed(format!("cannot read {DIR}: {e}"))),
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry
            .map_err(|e| Error::failed(format!("cannot read {DIR}: {e}")))?
            .path();
        if uuid_of(&path).is_some_and(|own| uuid.is_none_or(|wanted| wanted == own)) {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

/// Removes the incomplete files of runs that died early. Such a run had not touched its guest.
pub fn sweep() {
    sweep_in(Path::new(DIR));
}

fn sweep_in(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        let whole = path.with_extension("");
        let begun = path.extension().is_some_and(|e| e == "new") && uuid_of(&whole).is_some();
        // Without a number this is `/proc/` itself, so the file stays.
        let pid = whole.extension().unwrap_or_default();
        if begun && !Path::new("/proc").join(pid).exists() {
            let _ = fs::remove_file(path);
        }
    }
}

/// UUID of the guest that a guard's file is about, from the file's name: `UUID.PID`.
#[must_use]
pub fn uuid_of(path: &Path) -> Option<&str> {
    let (uuid, rest) = path.file_name()?.to_str()?.split_once('.')?;
    let whole = !rest.is_empty() && rest.bytes().all(|b| b.is_ascii_digit());
    (uuid::is_text(uuid) && whole).then_some(uuid)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_across_pages_has_a_part_in_each() {
        let frames = [Frame(7), Frame(3)];
        let spots = Spot::split(&frames, PAGE_LEN - 2, &[1, 2, 3, 4, 5], &[6, 7, 8, 9, 10]);
        assert_eq!(spots.len(), 2);
        assert_eq!((spots[0].frame, spots[0].offset), (7, PAGE_LEN - 2));
        assert_eq!(
            (&spots[0].old[..], &spots[0].new[..]),
            (&[1, 2][..], &[6, 7][..])
        );
        assert_eq!((spots[1].frame, spots[1].offset), (3, 0));
        assert_eq!(spots[1].old, [3, 4, 5]);
    }

    #[test]
    fn what_a_guardian_could_not_read_is_not_written() {
        let path = std::env::temp_dir().join(format!("locus-task-{}", std::process::id()));
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(&path)
            .unwrap();
        let spot = Spot {
            frame: 1,
            offset: 0,
            old: vec![1; PAGE_LEN],
            new: vec![2; PAGE_LEN],
        };
        let of = |count| WatchedRun {
            domid: 1,
            uuid: "00000000-0000-0000-0000-000000000001".into(),
            pid: 1,
            spots: vec![spot.clone(); count],
        };
        let most = usize::try_from(RUN_MAX).unwrap() / (2 * PAGE_LEN);
        let error = of(most).write(&file).unwrap_err().to_string();
        assert!(error.contains("are the most"), "{error}");
        assert_eq!(file.metadata().unwrap().len(), 0);
        of(most - 2).write(&file).unwrap();
        assert_eq!(WatchedRun::read(&file).unwrap(), of(most - 2));
        fs::remove_file(path).unwrap();
    }

    #[test]
    fn what_dead_runs_began_is_removed_and_nothing_else() {
        let folder = std::env::temp_dir().join(format!("locus-guard-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let uuid = "00000000-0000-0000-0000-000000000001";
        // No process has a number that high (PID_MAX_LIMIT, include/linux/threads.h).
        let names = [
            format!("{uuid}.99999999.new"),
            format!("{uuid}.99999999"),
            format!("{uuid}.{}.new", std::process::id()),
            "other.99999999.new".to_owned(),
        ];
        for name in &names {
            fs::write(folder.join(name), "").unwrap();
        }
        sweep_in(&folder);
        let left = names.each_ref().map(|name| folder.join(name).exists());
        fs::remove_dir_all(&folder).unwrap();
        assert_eq!(left, [false, true, true, true]);
    }

    #[test]
    fn a_file_is_told_by_its_name() {
        let uuid = "00000000-0000-0000-0000-000000000001";
        let own = |name: &str| uuid_of(Path::new(name)).map(str::to_owned);
        assert_eq!(own(&format!("/x/{uuid}.12")), Some(uuid.into()));
        for other in [
            uuid.to_owned(),
            format!("{uuid}."),
            format!("{uuid}.12.new"),
            "a.1".into(),
        ] {
            assert_eq!(own(&other), None, "{other}");
        }
    }
}
