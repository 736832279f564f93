//! Where a gate is, and what leads to it. It is in the arena's directory before anything leads to it, so that the guest's memory
//! alone tells of it: on another host, or where the journal is lost.
//!
//! Its entry is like that of a payload that is being reverted, with a record that has one function. An earlier build that
//! finds it takes it for a patch of the name [`NAME`], and can revert that.

use locus_guest::addr::{Gva, Range, PAGE_LEN, PAGE_SIZE};
use locus_kernel::Kernel;
use sha2::{Digest as _, Sha256};

use super::gate::FUNCTION;
use crate::arena::digests::{self, CodeDigests};
use crate::arena::record::{Function, Record, Slot, State, SCHEMA};
use crate::arena::{self, Resident};
use crate::error::{Error, Result};
use crate::operation::Operation;
use crate::plan::conditions::Entry;
use crate::quiesce::{Watch, Watched};
use crate::storage::journal::Change;
use crate::write::{About, Write};
use crate::x86::{self, JUMP};

/// The name in its record. No module has it: kbuild makes `_` of each `-` in a name.
pub const NAME: &str = "xen-locus-nudge";
/// Offset of the gate's code in its page, in bytes. The first byte of a watched range may be a return address that is not in it
/// (see [`Watch::hit`]), so the code does not begin where its page does.
pub const INTO: usize = 16;
/// Fills the page around the code.
pub const INT3: u8 = 0xcc;
/// Its pages: code with the record, and data.
pub const PAGES: usize = 2;
/// Offset in its data of where a payload has its `struct module`. The words before it are zero: the guest never knew it as a
/// module.
const MODULE: u64 = PAGE_SIZE - 64;

/// What is done with a gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// The handler is redirected through it.
    Up,
    /// The handler gets its own bytes back.
    Down,
}

/// Where a gate is, and what leads to it.
#[derive(Clone, Debug)]
pub struct Place {
    /// Name of the patch in whose way threads are woken.
    pub patch: String,
    /// The gate's code, from the start of its page.
    pub text: Range,
    /// Address of the redirect in the handler.
    pub site: Gva,
    /// The bytes there before, and the redirect.
    pub bytes: [[u8; JUMP]; 2],
}

impl Place {
    /// The redirect of the handler, or the way back.
    #[must_use]
    pub fn write(&self, turn: Turn) -> Write {
        let [old, new] = self.bytes;
        let (expect, new) = match turn {
            Turn::Up => (old, new),
            Turn::Down => (new, old),
        };
        Write {
            at: self.site,
            expect: expect.to_vec(),
            new: new.to_vec(),
            about: About::Text,
        }
    }

    /// Where no thread may be at that moment.
    #[must_use]
    pub fn watched(&self, turn: Turn) -> Vec<Watched> {
        let redirect = Watched::new(Range::new(self.site, JUMP as u64), FUNCTION);
        match turn {
            Turn::Up => vec![redirect],
            Turn::Down => vec![redirect, Watched::new(self.text, "the gate")],
        }
    }

    /// What the journal says while the gate is in place. `recover` takes the gate down by it.
    ///
    /// # Errors
    /// The guest's budget is spent.
    pub fn change(&self, kernel: &Kernel<'_>) -> Result<Change> {
        let watched = Watch::new(kernel, self.watched(Turn::Down))?;
        let watched = watched.ranges().map(|(range, name)| (*range, name));
        let writes = [self.write(Turn::Up)];
        let (op, patch) = (Operation::Nudge, &self.patch);
        Ok(Change::of(kernel, op, patch, &writes, watched))
    }

    /// The page with the gate's `code` and its record, and its entry in the directory. `handler` is the function with the
    /// addresses `room`.
    ///
    /// # Errors
    /// [`Class::Failed`](crate::error::Class::Failed): they do not fit, or would not be believed.
    pub fn entry(&self, code: &[u8], handler: &Entry, room: Range) -> Result<(Vec<u8>, Slot)> {
        let too_big = |_| Error::failed("the gate does not fit its pages");
        let own = self.text.start;
        let [old, jump] = self.bytes;
        let into = INTO as u64;
        let function = Function {
            name: FUNCTION.to_owned(),
            object: "vmlinux".to_owned(),
            old: handler.at,
            old_size: room.len(),
            old_cold: Vec::new(),
            new: own.plus(into),
            new_size: self.text.len().saturating_sub(into),
            new_cold: Vec::new(),
            site: self.site,
            found: old,
            old_bytes: old,
            new_bytes: jump,
        };
        let record = Record {
            schema: SCHEMA,
            name: NAME.to_owned(),
            sha256: digests::digest(code),
            description: format!("wakes threads in the way of {}", self.patch),
            cves: Vec::new(),
            functions: vec![function],
            text: (own, self.text.len()),
            code: CodeDigests::of(code.to_vec(), Vec::new()),
            rodata_len: 0,
            rodata_sha256: digests::digest(&[]),
            module: own.plus(PAGE_SIZE + MODULE),
            objects: Vec::new(),
            entry_only: false,
            record_room: None,
            uses: Some(Vec::new()),
            nudge: Some(self.patch.clone()),
        };
        let json = record.encode()?;
        let mut page = code.to_vec();
        page.resize(page.len().next_multiple_of(INTO), INT3);
        let offset = page.len();
        page.extend(&json);
        let fits = page.len() <= PAGE_LEN;
        let first = own.0.wrapping_sub(arena::BASE.0) / PAGE_SIZE;
        let slot = Slot {
            state: State::Reverting,
            first: u16::try_from(first).map_err(too_big)?,
            pages: u16::try_from(PAGES).map_err(too_big)?,
            applied_at: arena::now(),
            record_offset: u32::try_from(offset).map_err(too_big)?,
            record_len: u32::try_from(json.len()).map_err(too_big)?,
            record_sha256: Sha256::digest(&json).into(),
        };
        if !fits {
            return Err(Error::failed(format!(
                "the gate and its record have {} bytes; expected at most {PAGE_LEN}",
                page.len()
            )));
        }
        // What could not be read must not be written.
        let read = Record::decode(&json, &slot);
        read.map_err(|why| Error::failed(format!("the gate would not be believed: {why}")))?;
        Ok((page, slot))
    }

    /// Of the gate that `found` is in the arena's directory. A guest can write such an entry too, so it is believed only if this
    /// tool could have written it.
    ///
    /// # Errors
    /// [`Class::Uncertain`](crate::error::Class::Uncertain): it could not.
    pub fn of(kernel: &Kernel<'_>, found: &Resident) -> Result<Place> {
        let first = arena::page_address(found.slot.first.into());
        let own = Range::new(first, u64::from(found.slot.pages) * PAGE_SIZE);
        let odd = |what: String| {
            Error::uncertain(format!(
                "the arena's directory has the gate of a nudge at page {}, and {what}: the guest or another tool changed it",
                found.slot.first
            ))
        };
        let record = &found.record;
        let [function] = &record.functions[..] else {
            let count = record.functions.len();
            return Err(odd(format!(
                "expected one function that leads to it, found {count}"
            )));
        };
        let handler = kernel.function(FUNCTION, 0)?;
        if function.old != handler {
            return Err(odd(format!(
                "expected that {FUNCTION} at {handler} leads to it, found {} at {}",
                function.name, function.old
            )));
        }
        let (start, len) = record.text;
        let text = Range::new(start, len);
        if start != first || text.end > own.end || !text.contains(function.new) {
            return Err(odd(format!(
                "expected its code there, found {len} bytes at {start}, entered at {}",
                function.new
            )));
        }
        if x86::jump(function.site, function.new) != Some(function.new_bytes) {
            return Err(odd(format!(
                "expected a jump to it as the redirect, found {}",
                hex::encode(function.new_bytes)
            )));
        }
        Ok(Place {
            patch: record.nudge.clone().unwrap_or_default(),
            text,
            site: function.site,
            bytes: [function.old_bytes, function.new_bytes],
        })
    }
}
