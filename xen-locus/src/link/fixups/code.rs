//! Code that isn't in the guest yet, by the addresses it will have there.

use locus_guest::addr::{Gva, Range};
use locus_guest::fetch;

use crate::error::{Error, Result};

/// Relocated code, and the addresses that belong to it.
#[derive(Clone, Debug)]
pub struct LinkedCode {
    /// Name of the payload, for messages.
    pub name: String,
    /// Address of the first byte.
    pub base: Gva,
    /// The bytes: all that is placed, and what only the tables refer to.
    pub bytes: Vec<u8>,
    /// Code that runs, or that is copied to where it runs.
    pub live: Runs,
    /// Code that never runs: that of `module_init` and `module_exit`.
    pub dead: Runs,
    /// The payload's own variables.
    pub own: Range,
    /// All addresses that the payload takes, those of what is never placed too.
    pub all: Range,
}

/// Runs of code that do not overlap, such as the sections of a payload. There may be thousands of them, and a
/// table asks for each of its rows.
#[derive(Clone, Debug, Default)]
pub struct Runs(Vec<Range>);

impl Runs {
    /// These runs, in any order; empty ones count for nothing.
    #[must_use]
    pub fn new(mut runs: Vec<Range>) -> Runs {
        runs.retain(|r| r.len() > 0);
        runs.sort_unstable_by_key(|r| r.start);
        Runs(runs)
    }

    /// Whether one of them has all of `start..end`.
    fn has(&self, start: Gva, end: Gva) -> bool {
        let after = self.0.partition_point(|r| r.start <= start);
        let run = after.checked_sub(1).and_then(|last| self.0.get(last));
        run.is_some_and(|r| start < r.end && end <= r.end)
    }
}

/// A table, by the address that its relocations were done for.
#[derive(Clone, Debug)]
pub struct FixupTable {
    /// Address of its first byte.
    pub at: Gva,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

impl LinkedCode {
    /// An error that names the payload.
    #[must_use]
    pub fn no(&self, why: &str) -> Error {
        Error::not_applicable(format!("payload {}: {why}", self.name))
    }

    fn offset(&self, at: Gva) -> Option<usize> {
        usize::try_from(at.0.checked_sub(self.base.0)?).ok()
    }

    /// The `len` bytes at `at`, if they are here.
    #[must_use]
    pub fn get(&self, at: Gva, len: usize) -> Option<&[u8]> {
        let start = self.offset(at)?;
        self.bytes.get(start..start.checked_add(len)?)
    }

    /// Puts `new` at `at`.
    ///
    /// # Errors
    /// [`Class::NotApplicable`](crate::error::Class::NotApplicable) when that is not inside of a run of live code.
    pub fn put(&mut self, at: Gva, new: &[u8]) -> Result<()> {
        let end = at.plus(new.len() as u64);
        let live = self.live.has(at, end);
        let start = self.offset(at).filter(|_| live);
        let room = start.and_then(|start| self.bytes.get_mut(start..start.checked_add(new.len())?));
        match room {
            Some(room) => {
                room.copy_from_slice(new);
                Ok(())
            }
            None => Err(self.no(&format!("{} bytes at {at} are not code of it", new.len()))),
        }
    }

    /// Whether code at `at` runs; `false` for code of `module_init` and `module_exit`.
    ///
    /// # Errors
    /// [`Class::NotApplicable`](crate::error::Class::NotApplicable) when no code is there; `table` is the table that names it.
    pub fn runs(&self, at: Gva, table: &str) -> Result<bool> {
        let within = |runs: &Runs| runs.has(at, at);
        if within(&self.live) {
            Ok(true)
        } else if within(&self.dead) {
            Ok(false)
        } else {
            Err(self.no(&format!(
                "an entry of {table} names {at}, where no code of it is"
            )))
        }
    }

    /// The bytes of a live place.
    ///
    /// # Errors
    /// [`Class::NotApplicable`](crate::error::Class::NotApplicable) when they leave the code.
    pub fn live(&self, at: Gva, len: usize, table: &str) -> Result<&[u8]> {
        let end = at.plus(len as u64);
        let inside = self.live.has(at, end);
        self.get(at, len).filter(|_| inside).ok_or_else(|| {
            self.no(&format!(
                "an entry of {table} names {len} bytes at {at}, which leave its code"
            ))
        })
    }
}

impl FixupTable {
    /// The entries of `size` bytes, each with its address.
    ///
    /// # Errors
    /// [`Class::NotApplicable`](crate::error::Class::NotApplicable) when they don't fill the table.
    pub fn entries<'t>(
        &'t self,
        code: &LinkedCode,
        name: &str,
        size: usize,
    ) -> Result<impl Iterator<Item = (Gva, &'t [u8])> + 't> {
        if size == 0 || !self.bytes.len().is_multiple_of(size) {
            return Err(code.no(&format!(
                "{name} has {} bytes; expected a multiple of {size}, the size of an entry in the \
                 guest's kernel",
                self.bytes.len()
            )));
        }
        let at = self.at;
        let entry = move |(i, bytes)| (at.plus((i * size) as u64), bytes);
        Ok(self.bytes.chunks_exact(size).enumerate().map(entry))
    }
}

/// Whether the tables have no entries.
pub(super) fn are_empty(tables: &[FixupTable]) -> bool {
    tables.iter().all(|t| t.bytes.is_empty())
}

/// Where the signed 32-bit offset at byte `field` of the entry at `at` leads, counted from its own
/// address.
#[must_use]
pub fn relative(at: Gva, entry: &[u8], field: usize) -> Option<Gva> {
    let offset = i64::from(fetch::u32(entry, field)?.cast_signed());
    let from = at.plus(field as u64);
    Some(Gva(from.0.wrapping_add_signed(offset)))
}

/// Where a branch with a 32-bit offset at `at` leads, whose `bytes` end with that offset.
#[must_use]
pub fn target(at: Gva, bytes: &[u8]) -> Option<Gva> {
    let field = bytes.len().checked_sub(4)?;
    relative(at, bytes, field).map(|to| to.plus(4))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::link::fixups::testing::{code, BASE};
    use crate::x86::branch;

    #[test]
    fn only_live_code_is_written_and_whole() {
        let mut code = code(&[0x90; 16]);
        code.live = Runs::new(vec![Range::new(BASE, 8)]);
        code.dead = Runs::new(vec![Range::new(BASE.plus(8), 4)]);
        assert!(code.put(BASE.plus(4), &[1; 4]).is_ok());
        assert_eq!(code.get(BASE.plus(3), 2), Some(&[0x90, 1][..]));
        assert!(code.put(BASE.plus(5), &[1; 4]).is_err());
        assert!(code.put(Gva(0), &[1; 4]).is_err());
        assert!(code.runs(BASE, "t").unwrap());
        assert!(!code.runs(BASE.plus(8), "t").unwrap());
        let error = code.runs(BASE.plus(12), "t").unwrap_err().to_string();
        assert!(error.contains("entry of t names"), "{error}");
        assert!(code.live(BASE.plus(4), 5, "t").is_err());
        assert!(code.get(Gva(u64::MAX), usize::MAX).is_none());
    }

    #[test]
    fn runs_of_code_are_found_whatever_their_order() {
        let at = |n: u64, len| Range::new(BASE.plus(16 * n), len);
        let runs = Runs::new(vec![at(2, 8), at(0, 0), at(1, 16), at(5, 4), at(0, 4)]);
        let has = |from: u64, len: u64| runs.has(BASE.plus(from), BASE.plus(from + len));
        assert!(has(0, 4) && has(16, 16) && has(34, 6) && has(83, 1) && has(0, 0));
        // Behind the end of one, across two, before the first, behind the last.
        assert!(!has(4, 0) && !has(3, 2) && !has(16, 17) && !has(40, 1) && !has(84, 0));
        assert!(!runs.has(Gva(BASE.0 - 1), BASE) && !Runs::default().has(BASE, BASE));
    }

    #[test]
    fn a_table_is_made_of_whole_entries_and_offsets_count_from_themselves() {
        let code = code(&[]);
        let mut bytes = vec![0; 24];
        bytes[16..20].copy_from_slice(&(-4i32).to_le_bytes());
        let table = FixupTable { at: BASE, bytes };
        let (at, entry) = table.entries(&code, "t", 12).unwrap().nth(1).unwrap();
        assert_eq!(at, BASE.plus(12));
        assert_eq!(relative(at, entry, 4), Some(BASE.plus(12)));
        assert_eq!(relative(at, entry, 9), None);
        for size in [0, 7, 48] {
            let error = table.entries(&code, "t", size).map(|_| ()).unwrap_err();
            assert!(error.to_string().contains("t has 24 bytes"), "{error}");
        }
    }

    #[test]
    fn branches_lead_where_they_were_made_to_lead() {
        for to in [BASE, BASE.plus(1000), Gva(BASE.0 - 7)] {
            let bytes = branch(0xe8, BASE, to).unwrap();
            assert_eq!(target(BASE, &bytes), Some(to));
        }
        assert!(branch(0xe9, BASE, Gva(BASE.0 - (3 << 30))).is_none());
    }
}
