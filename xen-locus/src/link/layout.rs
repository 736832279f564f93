//! Lays out a payload's sections and its module's tables, page by page, before the payload has an address.
//!
//! Code comes first, then constants, then variables: each group begins on a page, because a page has one
//! set of rights.

use locus_guest::addr::{Gva, Range, PAGE_SIZE};
use locus_payload::{Payload, Role, Section};

use crate::arena::{Rights, PAGES};
use crate::error::{Error, Result};
use crate::link::module::{ModuleSize, PayloadAddresses};

/// Where each part of a payload's image is, as offsets from its first page.
#[derive(Debug)]
pub struct ImageLayout {
    /// Rights of each page.
    pub rights: Vec<Rights>,
    /// Offset of each section that is placed or only read, and of the table of `BUG` and `WARN` sites
    /// as part of the module's tables, by section number.
    offsets: Vec<Option<u64>>,
    /// Offset behind all of them, in bytes. What is only read is behind all pages.
    pub(super) end: usize,
    /// The room for the records.
    pub record: RecordRoom,
    /// Offset of the read-only part of the module's tables.
    pub(super) module_ro: u64,
    /// Offset of the writable part of the module's tables.
    pub(super) module_rw: u64,
    /// Length of the code, which begins at offset 0, in bytes.
    pub text_len: u64,
}

/// The part of an image that holds the payload's record: two places, one behind the other. One of them holds the record,
/// and the next one goes to the other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RecordRoom {
    /// Offset of the first place from the image's first byte.
    pub offset: u64,
    /// Length of each place in bytes: a record is at most as long.
    pub len: usize,
}

impl RecordRoom {
    /// The two places, as indices into the bytes of an image.
    #[must_use]
    pub fn places(self) -> [std::ops::Range<usize>; 2] {
        let [start, middle, end] = [0, 1, 2].map(|n: usize| {
            let behind = self.len.saturating_mul(n);
            index(self.offset).saturating_add(behind)
        });
        [start..middle, middle..end]
    }

    /// Both together.
    #[must_use]
    pub fn range(self) -> std::ops::Range<usize> {
        let [first, second] = self.places();
        first.start..second.end
    }

    /// The place for the record that follows the one at `offset`; `None` if no record of this layout is there.
    #[must_use]
    pub fn after(self, offset: u32) -> Option<std::ops::Range<usize>> {
        let [first, second] = self.places();
        match usize::try_from(offset).ok()? {
            at if at == first.start => Some(second),
            at if at == second.start => Some(first),
            _ => None,
        }
    }

    /// Offset and length of both together, as the record says them.
    #[must_use]
    pub fn recorded(self) -> (u64, u64) {
        (self.offset, 2 * self.len as u64)
    }
}

/// An offset as an index into the bytes of an image. An image that is laid out has at most [`PAGES`] pages, so
/// its offsets always fit; any other one leads out of every image.
pub(super) fn index(offset: u64) -> usize {
    usize::try_from(offset).unwrap_or(usize::MAX)
}

/// The rights of the pages for a section; `None` for one that is not placed.
pub(super) fn rights_of(section: &Section) -> Option<Rights> {
    match section.role {
        Role::Text => Some(Rights::Text),
        Role::RoData => Some(Rights::RoData),
        Role::Data | Role::Bss | Role::DynamicDebug => Some(Rights::Data),
        _ => None,
    }
}

/// Whether a section is no part of the code, but a table that says how the code is to be patched.
pub(super) fn is_table(role: &Role) -> bool {
    matches!(
        role,
        Role::Altinstructions
            | Role::Parainstructions
            | Role::RetpolineSites
            | Role::CallSites
            | Role::JumpTable
            | Role::StaticCalls
    )
}

/// Whether a section is a table, or tables refer to it.
fn is_only_read(section: &Section) -> bool {
    is_table(&section.role) || section.role.is_init_or_exit()
}

/// Whether a section is the table of `BUG` and `WARN` sites, of which there is one at most
/// ([`ModuleDraft::of`](crate::link::module::ModuleDraft::of)). `WARN` with a message hands its row to
/// `__WARN_trap`, so code refers to it: Linux kernel commit 5b472b6e5bd9 ("x86_64/bug: Implement
/// `__WARN_printf()`") (in v6.19).
pub(super) fn is_bug_table(section: &Section) -> bool {
    section.role == Role::BugTable && section.size > 0
}

/// Hands out room, one piece behind the other. `None` is more room than an address can name.
#[derive(Default)]
struct Cursor(u64);

impl Cursor {
    fn align(&mut self, align: u64) -> Option<u64> {
        self.0 = self.0.checked_next_multiple_of(align)?;
        Some(self.0)
    }

    /// Offset of `len` bytes.
    fn take(&mut self, align: u64, len: u64) -> Option<u64> {
        let at = self.align(align)?;
        self.0 = at.checked_add(len)?;
        Some(at)
    }

    fn section(&mut self, section: &Section) -> Option<u64> {
        self.take(section.align.clamp(1, PAGE_SIZE), section.size)
    }
}

impl ImageLayout {
    /// Places the sections: code first, then constants, room for two records of at most `record_len` bytes and the
    /// read-only part of the module's tables, then variables, and on pages of its own the writable part of the module's
    /// tables.
    ///
    /// # Errors
    /// [`Class::NotApplicable`](crate::error::Class::NotApplicable): the payload is larger than any arena.
    pub fn new(payload: &Payload, record_len: usize, module: ModuleSize) -> Result<ImageLayout> {
        ImageLayout::of(payload, record_len, module).ok_or_else(|| {
            Error::not_applicable(format!(
                "payload {} needs more than the arena's {PAGES} pages",
                payload.name
            ))
        })
    }

    /// The same; `None` when it is larger than any arena.
    fn of(payload: &Payload, record_len: usize, module: ModuleSize) -> Option<ImageLayout> {
        let mut layout = ImageLayout {
            rights: Vec::new(),
            offsets: vec![None; payload.sections.len()],
            end: 0,
            record: RecordRoom::default(),
            module_ro: 0,
            module_rw: 0,
            text_len: 0,
        };
        let mut cursor = Cursor::default();
        for group in [Rights::Text, Rights::RoData, Rights::Data] {
            let start = cursor.0;
            for section in payload.placed().filter(|s| rights_of(s) == Some(group)) {
                let at = cursor.section(section)?;
                layout.note(section, at);
            }
            match group {
                Rights::Text => layout.text_len = cursor.0,
                Rights::RoData => {
                    let len = record_len.checked_next_multiple_of(8)?;
                    layout.record = RecordRoom {
                        offset: cursor.take(8, (len as u64).checked_mul(2)?)?,
                        len,
                    };
                    layout.module_ro = cursor.take(64, module.ro)?;
                }
                Rights::Data => layout.module_rw = cursor.take(PAGE_SIZE, module.rw)?,
            }
            let pages = usize::try_from((cursor.align(PAGE_SIZE)? - start) / PAGE_SIZE).ok()?;
            if layout.rights.len().saturating_add(pages) > PAGES {
                return None;
            }
            layout.rights.extend(std::iter::repeat_n(group, pages));
        }
        if let Some(bugs) = payload.sections.iter().find(|s| is_bug_table(s)) {
            let at = layout.module_rw.checked_add(module.bugs)?;
            layout.note(bugs, at);
        }
        for section in payload.sections.iter().filter(|s| is_only_read(s)) {
            let at = cursor.section(section)?;
            layout.note(section, at);
        }
        layout.end = usize::try_from(cursor.0).ok()?;
        Some(layout)
    }

    fn note(&mut self, section: &Section, at: u64) {
        // Sections are numbered as they are listed, so there is an offset for each.
        if let Some(offset) = self.offsets.get_mut(section.index) {
            *offset = Some(at);
        }
    }

    /// The addresses of its parts when its first page is at `base`.
    #[must_use]
    pub fn place(&self, base: Gva) -> PayloadAddresses {
        let pages = |which: Rights| {
            // Without such pages: none, at `base`.
            let first = self.rights.iter().position(|&r| r == which).unwrap_or(0) as u64;
            let count = self.rights.iter().filter(|&&r| r == which).count() as u64;
            Range::new(base.plus(first * PAGE_SIZE), count * PAGE_SIZE)
        };
        PayloadAddresses {
            text: pages(Rights::Text),
            rodata: pages(Rights::RoData),
            data: pages(Rights::Data),
            ro: base.plus(self.module_ro),
            rw: base.plus(self.module_rw),
        }
    }

    /// Offset of section `section`; `None` for one that is neither placed nor read.
    pub(super) fn offset(&self, section: usize) -> Option<u64> {
        self.offsets.get(section).copied().flatten()
    }
}
