//! Eight-byte words of the guest, changed in a copy. Each word that was read is stored, so that each change
//! becomes a [`Write`] that is made only if nothing moved meanwhile.

use std::collections::BTreeMap;

use locus_guest::addr::{Gva, Range};
use locus_guest::fetch;
use locus_guest::space::Space;

use crate::error::{Error, Result};
use crate::write::{About, Write};

/// The guest's words, and those of our own image that is not there yet.
#[derive(Debug)]
pub struct Words<'a, 'm> {
    space: &'a Space<'m>,
    own: Range,
    bytes: &'a mut [u8],
    /// By address.
    seen: BTreeMap<u64, Word>,
    /// What the words are that are read from now on.
    pub about: About,
}

/// A word of the guest.
#[derive(Clone, Debug)]
struct Word {
    /// The value that was read.
    old: u64,
    /// The value to be written; the same one for a word that must not change.
    new: u64,
    about: About,
}

impl<'a, 'm> Words<'a, 'm> {
    /// Words of `space`; those at `at` are `bytes`.
    pub fn new(space: &'a Space<'m>, at: Gva, bytes: &'a mut [u8]) -> Words<'a, 'm> {
        Words {
            space,
            own: Range::new(at, bytes.len() as u64),
            bytes,
            seen: BTreeMap::new(),
            about: About::ModuleLists,
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
                "the guest's kernel has a list element or pointer at {at}; expected an address divisible by 8"
            )));
        }
        if let Some(offset) = self.own_at(at) {
            return fetch::u64(self.bytes, offset).ok_or_else(|| {
                Error::failed(format!("the word at {at} leaves the payload's tables"))
            });
        }
        if let Some(word) = self.seen.get(&at.0) {
            return Ok(word.new);
        }
        let old = self.space.read_u64(at)?;
        let about = self.about.clone();
        let word = Word {
            old,
            new: old,
            about,
        };
        self.seen.insert(at.0, word);
        Ok(old)
    }

    /// Changes the word at `at`.
    ///
    /// # Errors
    /// As [`Words::get`].
    pub fn set(&mut self, at: Gva, value: u64) -> Result<()> {
        self.get(at)?;
        if let Some(offset) = self.own_at(at) {
            // `get` read all eight bytes there.
            if let Some(room) = self.bytes.get_mut(offset..offset + 8) {
                room.copy_from_slice(&value.to_le_bytes());
            }
        } else if let Some(word) = self.seen.get_mut(&at.0) {
            word.new = value;
        }
        Ok(())
    }

    /// The words of the guest that were read, each as a write that expects what was read.
    #[must_use]
    pub fn into_writes(self) -> Vec<Write> {
        self.seen
            .into_iter()
            .map(|(at, Word { old, new, about })| Write {
                at: Gva(at),
                expect: old.to_le_bytes().to_vec(),
                new: new.to_le_bytes().to_vec(),
                about,
            })
            .collect()
    }
}
