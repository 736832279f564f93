//! Room for the module's tables: offsets before they have an address, and bytes once they have one.

use std::cell::Cell;

use locus_guest::addr::Gva;

use crate::error::{Error, Result};

/// Alignment of each of the tables, in bytes.
const ALIGN: u64 = 64;

/// Hands out room, each piece aligned.
#[derive(Debug, Default)]
pub(super) struct Room(Cell<u64>);

impl Room {
    /// Room that begins at this offset.
    pub(super) fn from(offset: u64) -> Room {
        Room(Cell::new(offset))
    }

    /// Offset of the next `len` bytes.
    pub(super) fn take(&self, len: usize) -> u64 {
        let at = self.0.get().next_multiple_of(ALIGN);
        self.0.set(at.saturating_add(len as u64));
        at
    }
}

/// Bytes for an address.
#[derive(Debug)]
pub(super) struct Buffer {
    /// Address of the first byte.
    pub at: Gva,
    /// The bytes.
    pub bytes: Vec<u8>,
}

impl Buffer {
    /// Zeroes.
    ///
    /// # Errors
    /// There are more than this host can address.
    pub(super) fn new(at: Gva, len: u64) -> Result<Buffer> {
        let len = usize::try_from(len).map_err(|_| does_not_fit())?;
        Ok(Buffer {
            at,
            bytes: vec![0; len],
        })
    }

    /// Overwrites bytes from `offset` on.
    ///
    /// # Errors
    /// [`Class::Failed`](crate::error::Class::Failed): they are not all within.
    pub(super) fn put(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        let room = usize::try_from(offset).ok().and_then(|start| {
            let end = start.checked_add(bytes.len())?;
            self.bytes.get_mut(start..end)
        });
        room.ok_or_else(does_not_fit)?.copy_from_slice(bytes);
        Ok(())
    }
}

fn does_not_fit() -> Error {
    Error::failed("a part of the payload's module does not fit its room")
}
