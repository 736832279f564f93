//! Eight-byte words of the guest, changed on paper: what was read stays known, so that each change
//! becomes a [`Write`] that is only made if nothing moved meanwhile.

use std::collections::BTreeMap;

use locus_guest::addr::{Gva, Range};
use locus_guest::fetch;
use locus_guest::space::Space;

use crate::error::{Error, Result};
use crate::write::Write;

/// The guest's words, and those of our own image that is not there yet.
#[derive(Debug)]
pub struct Words<'a, 'm> {
    space: &'a Space<'m>,
    own: Range,
    bytes: &'a mut [u8],
    /// By address: what stands there, and what is to stand there.
    seen: BTreeMap<u64, (u64, u64)>,
}

impl<'a, 'm> Words<'a, 'm> {
    /// Words of `space`; those at `at` are `bytes`.
    pub fn new(space: &'a Space<'m>, at: Gva, bytes: &'a mut [u8]) -> Words<'a, 'm> {
        Words {
            space,
            own: Range::new(at, bytes.len() as u64),
            bytes,
            seen: BTreeMap::new(),
        }
    }

    fn own_at(&self, at: Gva) -> Option<usize> {
        let within = self.own.contains(at) && self.own.contains(at.plus(7));
        within
            .then(|| usize::try_from(at.0 - self.own.start.0).ok())
            .flatten()
    }

    /// The word at `at`, changes included.
    ///
    /// # Errors
    /// `at` is not aligned, or memory can't be read.
    pub fn get(&mut self, at: Gva) -> Result<u64> {
        if !at.0.is_multiple_of(8) {
            return Err(Error::not_applicable(format!(
                "the guest's kernel has a link at {at}; expected an address divisible by 8"
            )));
        }
        if let Some(offset) = self.own_at(at) {
            return Ok(fetch::u64(self.bytes, offset).unwrap_or(0));
        }
        if let Some(&(_, now)) = self.seen.get(&at.0) {
            return Ok(now);
        }
        let word = self.space.read_u64(at)?;
        self.seen.insert(at.0, (word, word));
        Ok(word)
    }

    /// Changes the word at `at`.
    ///
    /// # Errors
    /// As [`Words::get`].
    pub fn set(&mut self, at: Gva, value: u64) -> Result<()> {
        self.get(at)?;
        if let Some(offset) = self.own_at(at) {
            if let Some(room) = self.bytes.get_mut(offset..offset + 8) {
                room.copy_from_slice(&value.to_le_bytes());
            }
        } else if let Some(seen) = self.seen.get_mut(&at.0) {
            seen.1 = value;
        }
        Ok(())
    }

    /// All that was read of the guest: to be found unchanged, and the changes to be made.
    #[must_use]
    pub fn into_writes(self) -> Vec<Write> {
        self.seen
            .into_iter()
            .map(|(at, (old, new))| Write {
                at: Gva(at),
                expect: old.to_le_bytes().to_vec(),
                new: new.to_le_bytes().to_vec(),
            })
            .collect()
    }
}
