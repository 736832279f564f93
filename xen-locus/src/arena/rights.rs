//! The rights of an arena page, and how its page-table entry says them.

use std::fmt;

use locus_guest::addr::Frame;
use locus_guest::space::{
    PTE_ACCESSED, PTE_DIRTY, PTE_FRAME, PTE_NX, PTE_PRESENT, PTE_USER, PTE_WRITE,
};
use locus_guest::GuestType;

/// Xen's mark of a PV guest's entries that are for its kernel alone; all of them are for user mode as
/// the processor sees it (`_PAGE_GUEST_KERNEL`, xen/arch/x86/include/asm/x86_64/page.h).
const XEN_KERNEL: u64 = 1 << 52;

/// What the guest may do with a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rights {
    /// Read and execute.
    Text,
    /// Read.
    RoData,
    /// Read and write.
    Data,
}

impl Rights {
    fn bits(self) -> u64 {
        match self {
            Rights::Text => 0,
            Rights::RoData => PTE_NX,
            Rights::Data => PTE_NX | PTE_WRITE | PTE_DIRTY,
        }
    }

    /// The rights of the page that `entry` leads to, if there is one.
    pub(super) fn of_page(entry: u64) -> Option<Rights> {
        frame_of(entry).and_then(|_| Rights::of(entry))
    }

    /// The rights of `entry`; `None` for one that allows both writing and execution, as no page of the arena does.
    pub(super) fn of(entry: u64) -> Option<Rights> {
        match (entry & PTE_NX != 0, entry & PTE_WRITE != 0) {
            (false, true) => None,
            (false, false) => Some(Rights::Text),
            (true, false) => Some(Rights::RoData),
            (true, true) => Some(Rights::Data),
        }
    }
}

impl fmt::Display for Rights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Rights::Text => "code",
            Rights::RoData => "read only",
            Rights::Data => "writable",
        })
    }
}

/// The page-table entry of a page in `frame` with these rights, as xen-locus makes it.
pub(super) fn entry_for(frame: Frame, rights: Rights) -> u64 {
    (frame.0 << 12) | PTE_PRESENT | PTE_ACCESSED | rights.bits()
}

/// The frame that `entry` leads to; `None` if it leads nowhere.
pub(super) fn frame_of(entry: u64) -> Option<Frame> {
    (entry & PTE_PRESENT != 0).then_some(Frame((entry & PTE_FRAME) >> 12))
}

/// How a page-table entry differs from one that xen-locus makes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EntryDifference {
    /// The rights that it should have.
    pub expected: String,
    /// What it is.
    pub found: String,
}

/// How `entry` differs from one for `rights`; `None` if it does not. That the guest used the page is no
/// difference.
pub(super) fn compare(kind: GuestType, entry: u64, rights: Rights) -> Option<EntryDifference> {
    let differs = |found: &str| {
        Some(EntryDifference {
            expected: rights.to_string(),
            found: format!("{found} (entry {entry:#x})"),
        })
    };
    if entry & PTE_PRESENT == 0 {
        return differs("no page");
    }
    let user = entry & PTE_USER != 0 && !(kind == GuestType::Pv && entry & XEN_KERNEL != 0);
    match Rights::of(entry) {
        _ if user => differs("for user mode too"),
        None => differs("writable code"),
        Some(found) if found != rights => differs(&found.to_string()),
        Some(_) => None,
    }
}
