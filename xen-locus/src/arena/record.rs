//! The directory of the arena and the payloads' records, both in guest memory. With them a second run, another
//! tool or a freshly installed dom0 can list and revert the applied patches.
//!
//! Page 0 of the arena holds the directory in two copies. The valid copy with the higher generation counts. An
//! update overwrites the other one, so that a torn write loses nothing. An entry names the pages of one payload,
//! its state, and the place, length and digest of its record: JSON in the payload's own read-only pages. A record is
//! never overwritten while the directory leads to it. A payload has two places for its record: when it is applied again,
//! the new one goes to the other place, and the directory's update switches state and record at once.
//!
//! All of it is read from a guest that may have changed it: lengths are bounded, digests are
//! checked, and addresses are believed only inside the arena and the kernel's text.

use locus_guest::addr::Gva;
use locus_guest::fetch;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::arena::digests::CodeDigests;
use crate::error::Error;

mod check;
mod draft;

pub use check::HEAD_MAX;
pub use draft::{Draft, DraftFunction, NewFunction, Placement};

/// First bytes of each copy of the directory.
pub const MAGIC: &[u8; 8] = b"XENLOCUS";
const VERSION: u32 = 1;
/// Size of one of the two copies, in bytes.
pub const COPY: usize = 2048;
const HEAD: usize = 64;
const ENTRY: usize = 64;
/// Bytes of an entry that are about its payload. In what is left of the first ones stands [`Directory::frames`], a word
/// in each, whether they have a payload or not.
const OF_PAYLOAD: usize = 56;
/// Words of [`Directory::frames`].
pub const FRAME_WORDS: usize = 4;
/// Most payloads a directory holds.
pub const ENTRIES_MAX: usize = (COPY - HEAD) / ENTRY;
/// Offset of a payload's `struct module` in its writable part, in bytes; two words before it say whether the guest
/// knows the entry.
pub const MODULE: u64 = 64;
/// Longest record believed, in bytes.
pub const RECORD_MAX: usize = 1 << 20;

/// Where a payload stands in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[repr(u32)]
pub enum State {
    /// Its code is in the arena and about to be redirected to.
    Applying = 1,
    /// In force.
    Applied = 2,
    /// About to be undone.
    Reverting = 3,
    /// Reverted; its code stays in the arena, because threads may still come back to it.
    Parked = 4,
}

impl State {
    /// The state after the change that is under way, if this payload is part of one: `done` says whether the change
    /// took place.
    #[must_use]
    pub fn after_change(self, done: bool) -> State {
        match (self, done) {
            (State::Applying, true) | (State::Reverting, false) => State::Applied,
            (State::Applying, false) | (State::Reverting, true) => State::Parked,
            (rest, _) => rest,
        }
    }

    fn from(word: u32) -> Option<State> {
        [
            State::Applying,
            State::Applied,
            State::Reverting,
            State::Parked,
        ]
        .into_iter()
        .find(|&s| s as u32 == word)
    }
}

/// One payload in the directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slot {
    /// Where it stands.
    pub state: State,
    /// Its first arena page.
    pub first: u16,
    /// How many pages it has.
    pub pages: u16,
    /// When it was last applied, in seconds since 1970.
    pub applied_at: u64,
    /// Byte offset of its record from its first page.
    pub record_offset: u32,
    /// Length of its record, in bytes.
    pub record_len: u32,
    /// SHA-256 of its record.
    pub record_sha256: [u8; 32],
}

/// The directory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Directory {
    /// Counts its updates.
    pub generation: u64,
    /// Payloads in the order they were last applied: of two that replace the same function, the later
    /// lies on top. At most one change is under way: one payload reverting, or one applying and those
    /// that it supersedes reverting.
    pub slots: Vec<Slot>,
    /// Guest frames of the arena's pages when it was written: a bit for each frame of the first window, from its start
    /// on ([`memory`](super::memory)). All zero from an earlier build, and in a PV guest.
    pub frames: [u64; FRAME_WORDS],
}

fn digest(copy: &[u8]) -> [u8; 32] {
    // A copy is longer than its head: `chunks_exact` and `encode` make it so.
    Sha256::digest(copy.get(HEAD - 32..).unwrap_or_default()).into()
}

impl Directory {
    /// Reads the directory from page 0. `None` when neither copy is whole.
    #[must_use]
    pub fn decode(page: &[u8]) -> Option<Directory> {
        page.chunks_exact(COPY)
            .filter_map(Directory::decode_copy)
            .max_by_key(|d| d.generation)
    }

    // Head: magic 0..8, version 8..12, half a SHA-256 of all from byte 32 on 16..32, generation
    // 32..40, count 40..44.
    fn decode_copy(copy: &[u8]) -> Option<Directory> {
        if copy.get(..8)? != MAGIC || fetch::u32(copy, 8)? != VERSION {
            return None;
        }
        let count = fetch::u32(copy, 40)? as usize;
        if count > ENTRIES_MAX || copy.get(16..32)? != digest(copy).get(..16)? {
            return None;
        }
        let slots = copy
            .get(HEAD..)?
            .chunks_exact(ENTRY)
            .take(count)
            .map(|e| {
                Some(Slot {
                    state: State::from(fetch::u32(e, 0)?)?,
                    first: fetch::u16(e, 4)?,
                    pages: fetch::u16(e, 6)?,
                    applied_at: fetch::u64(e, 8)?,
                    record_offset: fetch::u32(e, 16)?,
                    record_len: fetch::u32(e, 20)?,
                    record_sha256: fetch::array(e, 24)?,
                })
            })
            .collect::<Option<Vec<Slot>>>()?;
        let mut frames = [0; FRAME_WORDS];
        for (word, at) in frames.iter_mut().zip(Directory::frame_words()) {
            *word = fetch::u64(copy, at)?;
        }
        Some(Directory {
            generation: fetch::u64(copy, 32)?,
            slots,
            frames,
        })
    }

    /// Where in a copy the words of [`Directory::frames`] stand, as byte offsets.
    fn frame_words() -> impl Iterator<Item = usize> {
        (0..FRAME_WORDS).map(|n| HEAD + n * ENTRY + OF_PAYLOAD)
    }

    /// The bytes of this directory and which half of the page they go to.
    #[must_use]
    pub fn encode(&self) -> (usize, Vec<u8>) {
        let mut body = Vec::with_capacity(COPY);
        body.extend(self.generation.to_le_bytes());
        // At most ENTRIES_MAX, so the number fits.
        let count = u32::try_from(self.slots.len().min(ENTRIES_MAX)).unwrap_or_default();
        body.extend(count.to_le_bytes());
        body.resize(HEAD - 32, 0);
        for slot in self.slots.iter().take(ENTRIES_MAX) {
            body.extend((slot.state as u32).to_le_bytes());
            body.extend(slot.first.to_le_bytes());
            body.extend(slot.pages.to_le_bytes());
            body.extend(slot.applied_at.to_le_bytes());
            body.extend(slot.record_offset.to_le_bytes());
            body.extend(slot.record_len.to_le_bytes());
            body.extend(slot.record_sha256);
            body.extend([0; ENTRY - OF_PAYLOAD]);
        }
        body.resize(COPY - 32, 0);
        for (word, at) in self.frames.iter().zip(Directory::frame_words()) {
            if let Some(place) = body.get_mut(at - 32..at - 24) {
                place.copy_from_slice(&word.to_le_bytes());
            }
        }
        let mut copy = Vec::with_capacity(COPY);
        copy.extend(MAGIC);
        copy.extend(VERSION.to_le_bytes());
        copy.extend([0; 4]);
        copy.extend(Sha256::digest(&body).iter().take(16));
        copy.extend(body);
        let half = if self.generation.is_multiple_of(2) {
            0
        } else {
            COPY
        };
        (half, copy)
    }
}

/// One replaced function.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Function {
    /// Its name in the kernel or module.
    pub name: String,
    /// `vmlinux`, or the module's name.
    pub object: String,
    /// Address of the old function.
    pub old: Gva,
    /// Its size: bytes up to the next symbol.
    pub old_size: u64,
    /// Parts of it that stand elsewhere because they seldom run (GCC's `NAME.cold`): address and size.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub old_cold: Vec<(Gva, u64)>,
    /// Address of the new function.
    pub new: Gva,
    /// Its size, in bytes.
    pub new_size: u64,
    /// Such parts of it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub new_cold: Vec<(Gva, u64)>,
    /// Address of the redirect.
    pub site: Gva,
    /// The bytes that stood there: the kernel's own, or the redirect of the patch below.
    pub found: [u8; 5],
    /// The bytes that are put back when it is reverted: those found, but of a patch that superseded
    /// others the kernel's own.
    pub old_bytes: [u8; 5],
    /// The bytes of the redirect.
    pub new_bytes: [u8; 5],
}

/// Version of [`Record`] that this tool writes, and the only one that it reads.
pub const SCHEMA: u32 = 3;

/// What is known of an applied payload.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Version of this structure: [`SCHEMA`].
    pub schema: u32,
    /// Name of the payload.
    pub name: String,
    /// SHA-256 of its file, in hex.
    pub sha256: String,
    /// What it says it is.
    pub description: String,
    /// What it says it mends.
    pub cves: Vec<String>,
    /// Functions it replaces.
    pub functions: Vec<Function>,
    /// Its code: address and length in bytes.
    pub text: (Gva, u64),
    /// What its code was when it was placed.
    pub code: CodeDigests,
    /// Length of the pages behind its code that are read only, in bytes.
    pub rodata_len: u64,
    /// SHA-256 of them, in hex, with zeroes for this record.
    pub rodata_sha256: String,
    /// Address of its `struct module`.
    pub module: Gva,
    /// Modules whose functions it replaces.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub objects: Vec<ModuleAt>,
    /// It says that old and new versions of its functions may run at the same time.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub entry_only: bool,
    /// The room of its two records, one behind the other: offset from its first page, and length, in bytes. `None`: an
    /// earlier build placed it, with room for one record.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub record_room: Option<(u64, u64)>,
    /// The payloads whose symbols it uses: addresses of their `struct module`. `None`: an earlier build placed it, and
    /// did not record them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uses: Option<Vec<Gva>>,
    /// This is no payload, but the gate of a nudge: the name of the patch in whose way threads are woken. An earlier build
    /// takes it for a patch of its own name, which it can revert.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nudge: Option<String>,
}

/// Where a module was when its functions were replaced.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModuleAt {
    /// Its name.
    pub name: String,
    /// Address of its `struct module`.
    pub at: Gva,
    /// Address of its text.
    pub base: Gva,
}

impl Record {
    /// The record as it is stored in the guest: JSON.
    ///
    /// # Errors
    /// [`Class::Failed`](crate::error::Class::Failed): it can't be encoded.
    pub fn encode(&self) -> Result<Vec<u8>, Error> {
        serde_json::to_vec(self)
            .map_err(|e| Error::failed(format!("the payload's record can't be encoded: {e}")))
    }

    /// Reads a record whose bytes a guest held, and checks that its digest is the directory's.
    ///
    /// # Errors
    /// A sentence that says what is wrong.
    pub fn decode(bytes: &[u8], slot: &Slot) -> Result<Record, String> {
        let found: [u8; 32] = Sha256::digest(bytes).into();
        if found != slot.record_sha256 {
            return Err(format!(
                "the record of the payload at arena page {} has another digest than the directory \
                 says: the guest's memory was changed",
                slot.first
            ));
        }
        /// What all versions have.
        #[derive(Deserialize)]
        struct Head {
            schema: u32,
        }
        let bad = |why: String| {
            format!(
                "the record of the payload at arena page {} can't be read: {why}",
                slot.first
            )
        };
        let head: Head = serde_json::from_slice(bytes).map_err(|e| bad(e.to_string()))?;
        if head.schema != SCHEMA {
            return Err(bad(format!(
                "expected version {SCHEMA}, found {}: another version of xen-locus applied it; \
                 revert it with that one",
                head.schema
            )));
        }
        let record: Record = serde_json::from_slice(bytes).map_err(|e| bad(e.to_string()))?;
        let changed = |why| bad(format!("{why}; the guest's memory was changed"));
        record.check().map_err(changed)?;
        Ok(record)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(generation: u64) -> Directory {
        let slot = Slot {
            state: State::Applied,
            first: 1,
            pages: 3,
            applied_at: 1_700_000_000,
            record_offset: 4096,
            record_len: 512,
            record_sha256: [7; 32],
        };
        Directory {
            generation,
            slots: vec![
                slot.clone(),
                Slot {
                    state: State::Parked,
                    ..slot
                },
            ],
            frames: [generation, 2, 3, 1 << 63],
        }
    }

    fn put(page: &mut [u8], d: &Directory) {
        let (at, bytes) = d.encode();
        page[at..at + COPY].copy_from_slice(&bytes);
    }

    #[test]
    fn the_newer_whole_copy_of_the_directory_counts() {
        let mut page = vec![0; 4096];
        assert_eq!(Directory::decode(&page), None);
        put(&mut page, &sample(1));
        put(&mut page, &sample(2));
        assert_eq!(Directory::decode(&page), Some(sample(2)));
        page[100] ^= 1; // tears generation 2, which stands in the first half
        assert_eq!(Directory::decode(&page), Some(sample(1)));
    }

    #[test]
    fn a_record_of_another_version_is_refused_by_its_number() {
        let read = |json: &[u8]| {
            let slot = Slot {
                record_sha256: Sha256::digest(json).into(),
                ..sample(1).slots[0].clone()
            };
            Record::decode(json, &slot).unwrap_err()
        };
        let error = read(br#"{"schema": 1, "name": "x"}"#);
        assert!(error.contains("expected version 3, found 1"), "{error}");
        assert!(read(b"{}").contains("missing field `schema`"));
    }

    #[test]
    fn words_that_no_payload_has_are_refused() {
        let json = |name: &str, cve: &str| {
            format!(
                r#"{{"schema":3,"name":"{name}","sha256":"","description":"","cves":["{cve}"],
                "functions":[],"text":[0,0],"code":{{"sha256":"","blocks":"","labels":[]}},
                "rodata_len":0,"rodata_sha256":"","module":0}}"#
            )
        };
        let read = |json: &str| {
            let slot = Slot {
                record_sha256: Sha256::digest(json).into(),
                ..sample(1).slots[0].clone()
            };
            Record::decode(json.as_bytes(), &slot)
        };
        read(&json("locus_test", "CVE-2000-0001")).unwrap();
        for name in ["", "../../1", "a/b", "a b", "\\u001b[2J"] {
            let error = read(&json(name, "")).unwrap_err();
            assert!(error.contains("which no module has"), "{name}: {error}");
        }
        let error = read(&json("locus_test", "\\u001b[2J")).unwrap_err();
        assert!(error.contains("control characters"), "{error}");
    }

    #[test]
    fn no_flipped_bit_goes_unnoticed() {
        let mut page = vec![0; 4096];
        put(&mut page, &sample(2));
        for bit in 0..COPY * 8 {
            let mut bad = page.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            // Bytes 12..16 are padding.
            let seen = Directory::decode(&bad);
            assert!(seen.is_none() || (12..16).contains(&(bit / 8)), "bit {bit}");
        }
    }
}
