//! The read-only data in which the tables are searched for.

use locus_guest::addr::{Gva, Range};
use locus_guest::space::Space;

use super::names::NamesTable;
use super::tokens::{TokenTable, INDEX_LEN};
use super::TablePlaces;
use crate::Error;

/// Bytes read in one go when searching.
pub(super) const CHUNK: usize = 1 << 20;
/// Most read-only data looked through, in bytes: Debian's kernels have the tables within 12 MiB.
pub(super) const DATA_MAX: usize = 48 << 20;

/// Read-only data, from its start as far as it has been needed. Each byte is read once. Places in
/// it are offsets from its start, in bytes.
pub(super) struct ReadOnlyData<'s, 'm> {
    pub space: &'s Space<'m>,
    /// Guest virtual address of its start.
    pub start: Gva,
    /// All there is, or all that may be read.
    pub len: usize,
    /// Room for all of it, zeroed: memory is taken as it is filled. So it is `len` bytes long.
    pub bytes: Vec<u8>,
    /// How many of them have been read; at most `len`.
    pub have: usize,
}

impl<'s, 'm> ReadOnlyData<'s, 'm> {
    /// The data in `range`, of which at most `most` bytes are ever read.
    pub fn new(space: &'s Space<'m>, range: Range, most: usize) -> ReadOnlyData<'s, 'm> {
        // A length that this machine can't have is more than `most`.
        let len = usize::try_from(range.len()).unwrap_or(most).min(most);
        ReadOnlyData {
            space,
            start: range.start,
            len,
            bytes: vec![0; len],
            have: 0,
        }
    }

    /// What has been read.
    pub fn bytes(&self) -> &[u8] {
        // `have` is never above the length.
        self.bytes.get(..self.have).unwrap_or_default()
    }

    /// Guest virtual addresses of the tables, by the kernel's names.
    pub fn places(
        &self,
        names: &NamesTable,
        tokens: &TokenTable,
        more: &[(&str, usize)],
    ) -> TablePlaces {
        let known = [
            ("kallsyms_num_syms", names.num_at),
            ("kallsyms_names", names.at),
            ("kallsyms_token_table", tokens.at),
            ("kallsyms_token_index", tokens.end - INDEX_LEN),
        ];
        let all = known.iter().chain(more);
        all.map(|&(name, at)| (name.to_owned(), self.start.plus(at as u64)))
            .collect()
    }

    /// Reads on until `end` bytes are there; false when there are not so many.
    pub fn reach(&mut self, end: usize) -> Result<bool, Error> {
        let have = self.have;
        if end > self.len {
            return Ok(false);
        }
        if end > have {
            let want = end.next_multiple_of(CHUNK).min(self.len);
            let Some(fresh) = self.bytes.get_mut(have..want) else {
                return Ok(false);
            };
            self.space.read(self.start.plus(have as u64), fresh)?;
            self.have = want;
        }
        Ok(true)
    }
}
