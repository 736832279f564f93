//! The directory of the arena and the payloads' records, both in guest memory. With them a second run, another
//! tool or a freshly installed dom0 can list and revert the applied patches.
//!
//! Page 0 of the arena holds the directory in two copies. The valid copy with the higher generation counts. An
//! update overwrites the other one, so that a torn write loses nothing. An entry names the pages of one payload,
//! its state, and the place, length and digest of its record: JSON in the payload's own read-only pages. A record is
//! never overwritten while the directory leads to it. A payload has two places for its record: when it is applied again,
//! the new one goes to the other place, and the directory's update switches state and record at once.
//!
//! A newer version may add states, or have another layout. In all versions each copy keeps its length, and its magic, version,
//! generation and digest keep their places and their meaning: see [`Directory::decode`]. A record stays JSON with a number
//! `schema`. So a newer format is told from a torn or damaged one, and is never written.
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
    /// on (`arena/memory.rs`). All zero from an earlier build, and in a PV guest.
    pub frames: [u64; FRAME_WORDS],
}

fn digest(copy: &[u8]) -> [u8; 32] {
    // A copy is longer than its head: `chunks_exact` and `encode` make it so.
    Sha256::digest(copy.get(HEAD - 32..).unwrap_or_default()).into()
}

impl Directory {
    /// Reads the directory from page 0: of its whole copies, the one with the higher generation.
    ///
    /// A copy begins with a head of 64 bytes. In all versions it has the magic at 0, the version at 8, the first half of the
    /// SHA-256 of all from byte 32 on at 16, and the generation at 32. A copy whose magic and digest are right is whole,
    /// whatever its version. This version has the number of slots at 40, and the slots behind the head.
    ///
    /// # Errors
    /// [`Cause::NewerFormat`](crate::error::Cause::NewerFormat): that copy has another version, or something in it that this
    /// version does not know. [`Class::Uncertain`](crate::error::Class::Uncertain): neither copy is whole.
    pub fn decode(page: &[u8]) -> Result<Directory, Error> {
        let copies = page.chunks_exact(COPY).filter_map(Directory::decode_copy);
        // Two of one generation were never written. The one that is not understood counts then.
        let newest = copies.max_by_key(|(generation, known)| (*generation, known.is_none()));
        let (generation, known) = newest.ok_or_else(|| {
            Error::uncertain(format!(
                "the arena's directory at {} is damaged: neither of its copies is whole; the guest or another tool changed it",
                super::BASE
            ))
        })?;
        known.ok_or_else(|| {
            Error::newer_format(format_args!(
                "the arena's directory at {}, generation {generation}, has a format that this version does not know",
                super::BASE
            ))
        })
    }

    /// Generation of a copy, if it is whole, and what it says, if this version knows that.
    fn decode_copy(copy: &[u8]) -> Option<(u64, Option<Directory>)> {
        let version = fetch::u32(copy, 8)?;
        let is_whole = copy.get(16..32)? == digest(copy).get(..16)?;
        // No version before the first one was ever written.
        if copy.get(..8)? != MAGIC || version < VERSION || !is_whole {
            return None;
        }
        let known = match version {
            VERSION => Directory::decode_known(copy),
            _ => None,
        };
        Some((fetch::u64(copy, 32)?, known))
    }

    fn decode_known(copy: &[u8]) -> Option<Directory> {
        let mut frames = [0; FRAME_WORDS];
        for (word, at) in frames.iter_mut().zip(Directory::frame_words()) {
            *word = fetch::u64(copy, at)?;
        }
        Some(Directory {
            generation: fetch::u64(copy, 32)?,
            slots: Directory::decode_slots(copy)?,
            frames,
        })
    }

    /// Where in a copy the words of [`Directory::frames`] stand, as byte offsets.
    fn frame_words() -> impl Iterator<Item = usize> {
        (0..FRAME_WORDS).map(|n| HEAD + n * ENTRY + OF_PAYLOAD)
    }

    fn decode_slots(copy: &[u8]) -> Option<Vec<Slot>> {
        let count = fetch::u32(copy, 40)? as usize;
        if count > ENTRIES_MAX {
            return None;
        }
        let entries = copy.get(HEAD..)?.chunks_exact(ENTRY).take(count);
        entries
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
            .collect()
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

/// Version of [`Record`] that this tool writes, and the only one that it reads. Of a newer one it reads the [`Head`].
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
    /// See [`Unread`].
    pub fn decode(bytes: &[u8], slot: &Slot) -> Result<Record, Unread> {
        let found: [u8; 32] = Sha256::digest(bytes).into();
        if found != slot.record_sha256 {
            return Err(Unread::Damaged(format!(
                "the record of the payload at arena page {} has another digest than the directory \
                 says: the guest's memory was changed",
                slot.first
            )));
        }
        let bad = |why: String| {
            Unread::Damaged(format!(
                "the record of the payload at arena page {} can't be read: {why}",
                slot.first
            ))
        };
        let head: Head = serde_json::from_slice(bytes).map_err(|e| bad(e.to_string()))?;
        if head.schema > SCHEMA {
            return Err(Unread::Newer(head.with_names(bytes)));
        }
        if head.schema != SCHEMA {
            return Err(bad(format!(
                "expected version {SCHEMA}, found {}: an earlier version of xen-locus applied it; \
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

/// Why a record is not read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unread {
    /// It is not as any tool wrote it. The sentence says what is wrong.
    #[error("{0}")]
    Damaged(String),
    /// It is whole, and a newer xen-locus wrote it.
    #[error("a newer xen-locus wrote it: its version is {}", .0.schema)]
    Newer(Head),
}

/// What is read of a record of any version.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Head {
    /// Its version, which all versions have.
    pub schema: u32,
    /// Its payload's name, if it is one and is where this version has it.
    #[serde(skip)]
    pub name: Option<String>,
    /// SHA-256 of the payload's file, in hex, if it is one and is where this version has it.
    #[serde(skip)]
    pub sha256: Option<String>,
}

impl Head {
    /// The same with what else can be read of the record `bytes`. It is shown to people and becomes part of paths in XenStore.
    fn with_names(self, bytes: &[u8]) -> Head {
        let all: serde_json::Value = serde_json::from_slice(bytes).unwrap_or_default();
        let word = |key: &str| all.get(key)?.as_str().map(str::to_owned);
        let is_digest = |w: &String| w.len() == 64 && w.bytes().all(|b| b.is_ascii_hexdigit());
        Head {
            name: word("name").filter(|name| locus_payload::is_module_name(name)),
            sha256: word("sha256").filter(is_digest),
            ..self
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
