//! Address kinds as types, so that a frame number can't be taken for an address.

use std::fmt;

/// Size of a page and of a page-table page, in bytes.
pub const PAGE_SIZE: u64 = 4096;
/// [`PAGE_SIZE`] as a length.
pub const PAGE_LEN: usize = 4096;

/// Guest virtual address.
#[derive(
    Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, serde::Serialize, serde::Deserialize,
)]
#[serde(transparent)]
pub struct Gva(pub u64);

impl Gva {
    /// The page this address lies in.
    #[must_use]
    pub fn page(self) -> Gva {
        Gva(self.0 & !(PAGE_SIZE - 1))
    }

    /// Offset within its page, in bytes.
    #[must_use]
    #[allow(clippy::cast_possible_truncation)] // below 4096
    pub fn offset(self) -> usize {
        (self.0 & (PAGE_SIZE - 1)) as usize
    }

    /// Address `n` bytes on, wrapping like the hardware does.
    #[must_use]
    pub fn plus(self, n: u64) -> Gva {
        Gva(self.0.wrapping_add(n))
    }
}

impl fmt::Debug for Gva {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl fmt::Display for Gva {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#018x}", self.0)
    }
}

/// A frame number as foreign mapping takes it and as the guest's page tables hold it:
/// a machine frame ([`Mfn`]) for PV guests, a guest-physical frame ([`Gfn`]) for PVH and HVM.
/// Calls of Xen that are for one type of guest only take one of these.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Frame(pub u64);

impl fmt::Debug for Frame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl fmt::Display for Frame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "frame {:#x}", self.0)
    }
}

/// A machine frame: memory of the host. Page tables of PV guests hold these.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mfn(pub u64);

/// A guest-physical frame of a PVH or HVM guest, which Xen translates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Gfn(pub u64);

impl fmt::Display for Mfn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "machine frame {:#x}", self.0)
    }
}

impl fmt::Display for Gfn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "guest frame {:#x}", self.0)
    }
}

impl From<Mfn> for Frame {
    fn from(frame: Mfn) -> Frame {
        Frame(frame.0)
    }
}

impl From<Gfn> for Frame {
    fn from(frame: Gfn) -> Frame {
        Frame(frame.0)
    }
}

/// Xen domain id. Reused by Xen: tell guests apart by UUID.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DomId(pub u16);

impl fmt::Debug for DomId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "d{}", self.0)
    }
}

impl fmt::Display for DomId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// A half-open range of guest virtual addresses, `start..end`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Range {
    /// First address.
    pub start: Gva,
    /// One past the last address.
    pub end: Gva,
}

impl Range {
    /// The range of `len` bytes at `start`; the end saturates.
    #[must_use]
    pub fn new(start: Gva, len: u64) -> Range {
        Range {
            start,
            end: Gva(start.0.saturating_add(len)),
        }
    }

    /// Length in bytes.
    #[must_use]
    #[allow(clippy::len_without_is_empty)] // a length, not a collection
    pub fn len(&self) -> u64 {
        self.end.0.saturating_sub(self.start.0)
    }

    /// Whether `at` lies in `start..end`.
    #[must_use]
    pub fn contains(&self, at: Gva) -> bool {
        at >= self.start && at < self.end
    }
}
