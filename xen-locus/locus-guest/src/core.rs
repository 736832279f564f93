//! A saved core: the file that `xl dump-core` writes.
//!
//! Format: Xen's docs/misc/dump-core-format.txt. An ELF file without program headers; its sections:
//!
//! - `.note.Xen`: what it is, number of vCPUs and pages;
//! - `.xen_prstatus`: one `vcpu_guest_context` for each vCPU (xen/include/public/arch-x86/xen.h);
//! - `.xen_pages`: the guest's pages, one after the other;
//! - `.xen_p2m` of a PV guest, `.xen_pfn` of any other: which page is which, in the order of the
//!   pages. Page tables of a PV guest hold machine frames, so its pages are found by those.
//!
//! Nothing in the file is trusted. Pages are read from it when they are wanted; what is kept in
//! memory is the index of frames, as runs of consecutive ones.

mod elf;
pub mod write;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{fetch, Error, GuestType, Memory, Vcpu, Window};
use crate::addr::{Frame, Gva, PAGE_LEN, PAGE_SIZE};
use elf::Section;

/// Magic number of a PV guest's core (`XC_CORE_MAGIC`).
const MAGIC_PV: u64 = 0xf00f_ebed;
/// Magic number of any other guest's core (`XC_CORE_MAGIC_HVM`).
const MAGIC_HVM: u64 = 0xf00f_ebee;
/// The only version of the format.
const VERSION: u64 = 1;
/// Types of notes (xen/include/public/elfnote.h, `XEN_ELFNOTE_DUMPCORE_*`).
const NOTE_NONE: u32 = 0x0200_0000;
const NOTE_HEADER: u32 = 0x0200_0001;
const NOTE_XEN_VERSION: u32 = 0x0200_0002;
const NOTE_FORMAT: u32 = 0x0200_0003;
/// A frame number that stands for none: the guest gave the page back while it was saved.
const NO_FRAME: u64 = u64::MAX;
/// Most vCPUs believed.
const VCPUS_MAX: u64 = 4096;
/// Longest believed section that is read as a whole, in bytes.
const SMALL: u64 = 64 << 10;
/// Most runs of consecutive frames believed: a guest of 16 GiB without two frames in a row has so many.
const RUNS_MAX: usize = 1 << 22;
/// Entries of the index of frames that are read in one go.
const AT_ONCE: u64 = 64 << 10;

/// A saved core that can be read.
#[derive(Debug)]
pub struct Core {
    path: PathBuf,
    file: Arc<File>,
    kind: GuestType,
    vcpus: Vec<Vcpu>,
    contexts: Vec<u8>,
    /// The note on the version of Xen, to be handed on.
    xen_version: Vec<u8>,
    runs: Vec<Run>,
    /// Where the first page stands in the file.
    pages_at: u64,
}

/// Consecutive frames whose pages stand one after the other in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    /// First frame, as page tables and [`Memory`] number it.
    frame: u64,
    /// First frame as the guest numbers its memory; the same except in PV guests.
    pfn: u64,
    /// Number of the first page in the file.
    page: u64,
    /// How many.
    count: u64,
}

impl Run {
    fn end(&self) -> u64 {
        self.frame.saturating_add(self.count)
    }
}

impl Core {
    /// Opens a core and reads its head.
    ///
    /// # Errors
    /// It can't be read or is no such file; the message says what was expected where, and what was
    /// found.
    pub fn open(path: &Path) -> Result<Core, Error> {
        let odd = |why: String| Error::Odd(format!("core {}: {why}", path.display()));
        let open = || -> std::io::Result<(File, u64)> {
            let file = File::open(path)?;
            let meta = file.metadata()?;
            if !meta.is_file() {
                return Err(std::io::Error::other("it is not a regular file"));
            }
            Ok((file, meta.len()))
        };
        let (file, len) = open().map_err(|e| odd(format!("cannot be opened: {e}")))?;
        Core::parse(path, file, len).map_err(odd)
    }

    fn parse(path: &Path, file: File, len: u64) -> Result<Core, String> {
        let sections = elf::sections(&file, len)?;
        let notes = Notes::parse(&elf::whole(&file, find(&sections, ".note.Xen")?, SMALL)?)?;
        let (kind, index_name, entry) = match notes.magic {
            MAGIC_PV => (GuestType::Pv, ".xen_p2m", 16),
            MAGIC_HVM => (GuestType::Hvm, ".xen_pfn", 8),
            other => {
                return Err(format!(
                    "the header note in .note.Xen has the magic number {other:#x}; expected \
                     {MAGIC_PV:#x} (PV) or {MAGIC_HVM:#x} (HVM, PVH)"
                ))
            }
        };
        let state = find(&sections, ".xen_prstatus")?;
        let most = VCPUS_MAX * write::CONTEXT_LEN as u64;
        let contexts = elf::whole(&file, state, most)?;
        if notes.vcpus == 0 || contexts.len() as u64 != notes.vcpus.saturating_mul(context_len()) {
            return Err(format!(
                "section .xen_prstatus has {} bytes; expected {} bytes for each of the {} vCPUs \
                 that the header note counts",
                contexts.len(),
                write::CONTEXT_LEN,
                notes.vcpus
            ));
        }
        let vcpus = (0..)
            .zip(contexts.chunks_exact(write::CONTEXT_LEN))
            .map(|(id, context)| vcpu(id, context, kind).ok_or("a vCPU's context is cut short"))
            .collect::<Result<_, _>>()?;
        let pages = find(&sections, ".xen_pages")?;
        let index = find(&sections, index_name)?;
        let count = pages.size / PAGE_SIZE;
        if pages.size % PAGE_SIZE != 0 || index.size != count.saturating_mul(entry) {
            return Err(format!(
                "section .xen_pages has {} bytes and {index_name} has {}; expected pages of {PAGE_SIZE} \
                 bytes and an entry of {entry} bytes for each",
                pages.size, index.size
            ));
        }
        Ok(Core {
            path: path.to_owned(),
            runs: runs(&file, index, entry, index_name)?,
            file: Arc::new(file),
            kind,
            vcpus,
            contexts,
            xen_version: notes.xen_version,
            pages_at: pages.offset,
        })
    }

    /// Where it was read from.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// How the guest ran, as far as the file says: [`GuestType::Hvm`] stands for PVH too.
    #[must_use]
    pub fn kind(&self) -> GuestType {
        self.kind
    }

    /// The registers of its virtual CPUs. In a core of an HVM or PVH guest no entry point is known.
    #[must_use]
    pub fn vcpus(&self) -> &[Vcpu] {
        &self.vcpus
    }

    /// How many pages it holds.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.runs.iter().map(|r| r.count).sum()
    }

    /// Number of `frame` as the guest numbers its memory, if the core holds it.
    #[must_use]
    pub fn pfn(&self, frame: Frame) -> Option<u64> {
        let run = self.run(frame)?;
        run.pfn.checked_add(frame.0 - run.frame)
    }

    /// What a smaller core of the same guest begins with.
    #[must_use]
    pub fn head(&self) -> write::Head {
        write::Head {
            kind: self.kind,
            contexts: self.contexts.clone(),
            xen_version: self.xen_version.clone(),
        }
    }

    fn run(&self, frame: Frame) -> Option<&Run> {
        let after = self.runs.partition_point(|r| r.frame <= frame.0);
        let run = self.runs.get(after.checked_sub(1)?)?;
        (frame.0 < run.end()).then_some(run)
    }
}

fn context_len() -> u64 {
    write::CONTEXT_LEN as u64
}

impl Memory for Core {
    fn map(&self, frames: &[Frame]) -> Result<Box<dyn Window>, Error> {
        let place = |&frame: &Frame| {
            let run = self.run(frame).ok_or_else(|| Error::Frame {
                frame,
                why: format!(
                    "it is not in the core {}; xl dump-core has been seen to leave out the highest \
                     frames of a PVH guest, where patches are kept",
                    self.path.display()
                ),
            })?;
            // In bounds: the section lies in the file, and the page in the section.
            Ok(self.pages_at + (run.page + (frame.0 - run.frame)) * PAGE_SIZE)
        };
        Ok(Box::new(Pages {
            file: Arc::clone(&self.file),
            places: frames.iter().map(place).collect::<Result<_, Error>>()?,
        }))
    }
}

/// Pages in the file, by the offset of each.
struct Pages {
    file: Arc<File>,
    places: Vec<u64>,
}

impl Window for Pages {
    fn read(&self, offset: usize, buf: &mut [u8]) -> Result<(), Error> {
        let bounds = Error::Bounds {
            offset,
            len: buf.len(),
            size: self.places.len() * PAGE_LEN,
        };
        let mut offset = offset;
        let mut rest = buf;
        while !rest.is_empty() {
            let first = offset / PAGE_LEN;
            let within = offset % PAGE_LEN;
            let places = self.places.get(first..).unwrap_or_default();
            let Some(&place) = places.first() else {
                return Err(bounds);
            };
            // Pages that stand one after the other in the file are read by one call.
            let together = places
                .windows(2)
                .take_while(|pair| matches!(pair, [a, b] if a.checked_add(PAGE_SIZE) == Some(*b)))
                .count();
            let n = rest.len().min((together + 1) * PAGE_LEN - within);
            let (now, later) = rest.split_at_mut(n);
            self.file
                .read_exact_at(now, place + within as u64)
                .map_err(|e| {
                    Error::Odd(format!(
                        "reading {n} bytes at offset {:#x} of the core: {e}",
                        place + within as u64
                    ))
                })?;
            offset += n;
            rest = later;
        }
        Ok(())
    }
}

fn find<'s>(sections: &'s [Section], name: &str) -> Result<&'s Section, String> {
    let mut of_that_name = sections.iter().filter(|s| s.name == name);
    match (of_that_name.next(), of_that_name.next()) {
        (Some(one), None) => Ok(one),
        (Some(_), Some(_)) => Err(format!("it has several sections {name}; expected one")),
        (None, _) => Err(format!(
            "it has no section {name}: it is not a core that `xl dump-core` wrote"
        )),
    }
}

/// What `.note.Xen` says.
#[derive(Debug, Default)]
struct Notes {
    magic: u64,
    vcpus: u64,
    xen_version: Vec<u8>,
}

impl Notes {
    fn parse(bytes: &[u8]) -> Result<Notes, String> {
        let mut header = None;
        let mut found = Notes::default();
        let mut at = 0usize;
        while at < bytes.len() {
            let cut = || format!("the note at offset {at:#x} of .note.Xen is cut short");
            let word = |n: usize| fetch::u32(bytes, at + 4 * n).ok_or_else(cut);
            let (name_len, desc_len, kind) = (word(0)? as usize, word(1)? as usize, word(2)?);
            let name_at = at + 12;
            let desc_at = name_at + name_len.next_multiple_of(4);
            let name = bytes.get(name_at..name_at + name_len).ok_or_else(cut)?;
            let desc = bytes.get(desc_at..desc_at + desc_len).ok_or_else(cut)?;
            if name == b"Xen\0" {
                match kind {
                    NOTE_HEADER => header = Some(desc),
                    NOTE_XEN_VERSION => found.xen_version = desc.to_vec(),
                    NOTE_FORMAT if fetch::u64(desc, 0) != Some(VERSION) => {
                        return Err(format!(
                            "the format note in .note.Xen reads {desc:02x?}; expected version \
                             {VERSION}"
                        ))
                    }
                    _ => {}
                }
            }
            at = desc_at + desc_len.next_multiple_of(4);
        }
        let header = header.ok_or("no header note (XEN_ELFNOTE_DUMPCORE_HEADER) in .note.Xen")?;
        let word = |n: usize| {
            fetch::u64(header, 8 * n)
                .ok_or_else(|| format!("the header note in .note.Xen has {} bytes", header.len()))
        };
        let size = word(3)?;
        if size != PAGE_SIZE {
            return Err(format!(
                "the header note in .note.Xen says that pages have {size} bytes; expected {PAGE_SIZE}"
            ));
        }
        (found.magic, found.vcpus) = (word(0)?, word(1)?);
        Ok(found)
    }
}

/// Reads the index of frames: sorted runs.
fn runs(file: &File, index: &Section, entry: u64, name: &str) -> Result<Vec<Run>, String> {
    let twice = |frame: u64, first: u64, second: u64| {
        format!(
            "section {name} has {} twice (entries {first} and {second}); expected each frame once",
            Frame(frame)
        )
    };
    let mut runs: Vec<Run> = Vec::new();
    let count = index.size / entry;
    let mut page = 0;
    while page < count {
        let n = (count - page).min(AT_ONCE);
        let bytes = elf::part(file, index, page * entry, n * entry)?;
        for entry in bytes.chunks_exact(usize::try_from(entry).unwrap_or(1)) {
            let pfn = fetch::u64(entry, 0).unwrap_or(NO_FRAME);
            let frame = fetch::u64(entry, 8).unwrap_or(pfn);
            if frame != NO_FRAME && pfn != NO_FRAME {
                // The holes of a sparse file read as zeroes, so such an index may be endless.
                if let Some(last) = runs.last().filter(|r| r.end() == frame.saturating_add(1)) {
                    return Err(twice(frame, last.page + (last.count - 1), page));
                }
                push(&mut runs, pfn, frame, page);
            }
            if runs.len() > RUNS_MAX {
                return Err(format!(
                    "section {name} has more than {RUNS_MAX} runs of consecutive frames in {page} of \
                     {count} entries; expected at most that many in all"
                ));
            }
            page += 1;
        }
    }
    runs.sort_unstable_by_key(|r| r.frame);
    for pair in runs.windows(2) {
        if let [a, b] = pair {
            if b.frame < a.end() {
                return Err(twice(b.frame, a.page + (b.frame - a.frame), b.page));
            }
        }
    }
    Ok(runs)
}

fn push(runs: &mut Vec<Run>, pfn: u64, frame: u64, page: u64) {
    if let Some(last) = runs.last_mut() {
        let follows = |start: u64, now: u64| start.checked_add(last.count) == Some(now);
        if follows(last.frame, frame) && follows(last.pfn, pfn) && follows(last.page, page) {
            last.count += 1;
            return;
        }
    }
    runs.push(Run {
        frame,
        pfn,
        page,
        count: 1,
    });
}

/// What a `vcpu_guest_context` says; see [`write`] for the places.
fn vcpu(id: u32, context: &[u8], kind: GuestType) -> Option<Vcpu> {
    let word = |at: usize| fetch::u64(context, at);
    let flags = word(write::FLAGS)?;
    let pv = kind == GuestType::Pv;
    // Xen sets the flag for PV guests only (`arch_get_info_guest`, xen/arch/x86/domctl.c).
    let user = if pv {
        flags & write::IN_KERNEL == 0
    } else {
        fetch::u16(context, write::CS)? & 3 == 3
    };
    let (kernel_gs, user_gs) = (word(write::GS_KERNEL)?, word(write::GS_USER)?);
    let (gs_base, gs_other) = if user {
        (user_gs, kernel_gs)
    } else {
        (kernel_gs, user_gs)
    };
    let control = |n: usize| word(write::CONTROL + 8 * n);
    let (cr0, cr3, cr4) = (control(0)?, control(3)?, control(4)?);
    Some(Vcpu {
        id,
        online: flags & write::ONLINE != 0,
        rip: Gva(word(write::RIP)?),
        rsp: Gva(word(write::RSP)?),
        rbp: word(write::RBP)?,
        rax: word(write::RAX)?,
        rdx: word(write::RDX)?,
        rdi: word(write::RDI)?,
        r10: word(write::R10)?,
        r13: word(write::R13)?,
        user,
        // EFER is not saved: a 32-bit kernel with PAE passes, and is not found by its tables.
        long_mode: pv || (cr0 & write::CR0_PAGING != 0 && cr4 & write::CR4_PAE != 0),
        root: Frame(if pv {
            cr3 >> 12
        } else {
            (cr3 & super::space::PTE_FRAME) >> 12
        }),
        la57: !pv && cr4 & write::CR4_LA57 != 0,
        gs_base: Gva(gs_base),
        gs_other: Gva(gs_other),
        entry: Some(Gva(word(write::EVENT_CALLBACK)?)).filter(|at| pv && at.0 != 0),
    })
}

#[cfg(test)]
mod tests;
