//! The payloads that a guest's arena holds: those whose record this version reads, and those of a newer one.

use locus_guest::addr::{Frame, Gva, Range, PAGE_SIZE};
use locus_guest::Window;
use locus_kernel::Kernel;

use super::record::{self, Record, Slot, Unread};
use super::{page_address, Arena, BASE};
use crate::error::{Error, Result};
use crate::x86::{self, JUMP};

/// An applied or parked payload, or a gate: its place in the directory and its record.
#[derive(Clone, Debug)]
pub struct Resident {
    /// Number in the directory.
    pub index: usize,
    /// Its directory entry.
    pub slot: Slot,
    /// Its record.
    pub record: Record,
}

/// A payload whose record a newer xen-locus wrote. It is listed, and nothing is written while it is there: what it needs is
/// not known.
#[derive(Clone, Debug)]
pub struct Newer {
    /// Its directory entry.
    pub slot: Slot,
    /// Its name, if the record has it where this version has it; else a name made of its first page.
    pub name: String,
    /// SHA-256 of its file, in hex, if the record has it where this version has it; else empty.
    pub sha256: String,
    /// Version of its record.
    pub schema: u32,
}

/// All payloads of an arena, in the order of the directory.
#[derive(Clone, Debug, Default)]
pub struct Contents {
    /// Those whose record this version reads.
    pub residents: Vec<Resident>,
    /// The gates of nudges that are under way or were interrupted. There is one at most, if no other tool changed the guest.
    pub gates: Vec<Resident>,
    /// Those of a newer version.
    pub newer: Vec<Newer>,
}

impl Newer {
    /// The error of a caller that would have to read it.
    #[must_use]
    pub fn refusal(&self) -> Error {
        Error::newer_format(format_args!(
            "the record of payload {} at arena page {} has version {}, and this xen-locus reads version {}",
            self.name,
            self.slot.first,
            self.schema,
            record::SCHEMA
        ))
    }

    /// Whether it is the one of which somebody knows the digest of the record, in hex, and the name.
    #[must_use]
    pub fn is(&self, record_sha256: &str, name: &str) -> bool {
        hex::encode(self.slot.record_sha256) == record_sha256 || self.name == name
    }

    /// Whether `at` is in its pages.
    #[must_use]
    pub fn contains(&self, at: Gva) -> bool {
        own_pages(&self.slot).contains(at)
    }

    /// The one of `newer` to which the jump with these `bytes` at `site` leads. `None` if they are no such jump.
    #[must_use]
    pub fn behind(newer: &[Newer], site: Gva, bytes: [u8; JUMP]) -> Option<&Newer> {
        let to = x86::jump_target(site, bytes)?;
        newer.iter().find(|n| n.contains(to))
    }
}

impl Contents {
    /// Refuses an arena with a payload of a newer version.
    ///
    /// # Errors
    /// [`Cause::NewerFormat`](crate::error::Cause::NewerFormat): there is one.
    pub fn known(self) -> Result<Contents> {
        match self.newer.first() {
            Some(newer) => Err(newer.refusal()),
            None => Ok(self),
        }
    }
}

/// The addresses of a payload's pages.
fn own_pages(slot: &Slot) -> Range {
    let room = u64::from(slot.pages) * PAGE_SIZE;
    Range::new(page_address(slot.first.into()), room)
}

/// Maps pages of the arena that had memory: a directory that leads to others, and what a directory lists.
///
/// # Errors
/// [`Cause::ArenaLost`](crate::error::Cause::ArenaLost): by Xen, one of them has no memory. Or it can't be mapped.
pub(super) fn map(kernel: &Kernel<'_>, frames: &[Frame]) -> Result<Box<dyn Window>> {
    kernel.space.map(frames).map_err(|error| match error {
        locus_guest::Error::NoMemory { frame } => Error::arena_lost(BASE, frame),
        other => other.into(),
    })
}

impl Arena {
    /// All payloads in the arena, with their records. Who changes anything needs all of them.
    ///
    /// # Errors
    /// As [`Arena::contents`] and [`Contents::known`].
    pub fn residents(&self, kernel: &Kernel<'_>) -> Result<Vec<Resident>> {
        Ok(self.contents(kernel)?.known()?.residents)
    }

    /// The gates of nudges, for callers that take one away.
    ///
    /// # Errors
    /// As [`Arena::residents`].
    pub fn gates(&self, kernel: &Kernel<'_>) -> Result<Vec<Resident>> {
        Ok(self.contents(kernel)?.known()?.gates)
    }

    /// All payloads in the arena, those of a newer version too.
    ///
    /// # Errors
    /// [`Class::Uncertain`](crate::error::Class::Uncertain): a record was changed. Or it can't be read.
    pub fn contents(&self, kernel: &Kernel<'_>) -> Result<Contents> {
        let mut contents = Contents::default();
        for (index, slot) in self.directory.slots.iter().enumerate() {
            let len = slot.record_len as usize;
            let own = own_pages(slot);
            if len > record::RECORD_MAX || u64::from(slot.record_offset) + len as u64 > own.len() {
                return Err(Error::uncertain(format!(
                    "the arena's directory is damaged: record {index} does not fit its pages"
                )));
            }
            let at = own.start.plus(slot.record_offset.into());
            let mut bytes = vec![0; len];
            self.window(kernel, Range::new(at, len as u64))?
                .read(at.offset(), &mut bytes)?;
            let record = match Record::decode(&bytes, slot) {
                Ok(record) => record,
                Err(Unread::Damaged(why)) => return Err(Error::uncertain(why)),
                Err(Unread::Newer(head)) => {
                    let unnamed = || format!("payload-at-page-{}", slot.first);
                    contents.newer.push(Newer {
                        slot: slot.clone(),
                        name: head.name.unwrap_or_else(unnamed),
                        sha256: head.sha256.unwrap_or_default(),
                        schema: head.schema,
                    });
                    continue;
                }
            };
            let module = record.module;
            // two words stand before it, and are read to tell whether the guest knows it
            if !own.contains(module) || module.0 - own.start.0 < record::MODULE {
                return Err(Error::uncertain(format!(
                    "the record of payload {} has its struct module at {module}, outside of its own \
                     pages: the guest's memory was changed",
                    record.name
                )));
            }
            let kind = match record.nudge {
                None => &mut contents.residents,
                Some(_) => &mut contents.gates,
            };
            kind.push(Resident {
                index,
                slot: slot.clone(),
                record,
            });
        }
        Ok(contents)
    }

    fn window(&self, kernel: &Kernel<'_>, range: Range) -> Result<Box<dyn Window>> {
        map(kernel, &self.frames(range)?)
    }
}
