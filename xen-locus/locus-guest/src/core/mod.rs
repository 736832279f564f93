//! A saved core: the file that `xl dump-core` writes.
//!
//! Format: Xen's docs/misc/dump-core-format.txt. It is an ELF file without program headers. Its
//! sections:
//!
//! - `.note.Xen`: type of guest, number of vCPUs, size of pages;
//! - `.xen_prstatus`: one `vcpu_guest_context` for each vCPU (xen/include/public/arch-x86/xen.h);
//! - `.xen_pages`: the guest's pages, one after the other;
//! - `.xen_p2m` of a PV guest, `.xen_pfn` of any other: the index, which names the frame of each page
//!   in the order of the pages. Page tables of a PV guest hold machine frames, so its pages are found
//!   by those.
//!
//! Nothing in the file is trusted. Pages are read from the file when they are needed. Only the index is
//! kept in memory, as runs of consecutive frames.
//!
//! Files, in the order of the data: `elf.rs` (sections), `mod.rs` (notes, vCPUs, index, pages), and
//! `write.rs` for the other direction.

mod elf;
pub mod write;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use object::elf::FileHeader64;
use object::read::elf::NoteIterator;
use object::LittleEndian as Le;

use super::{fetch, Error, GuestType, Memory, Vcpu, Window};
use crate::addr::{Frame, Gva, PAGE_LEN, PAGE_SIZE};
use elf::CoreSection;

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
/// A frame number that means "none": the guest gave the page back while it was saved.
const NO_FRAME: u64 = u64::MAX;
/// Most vCPUs that a core may have.
const VCPUS_MAX: u64 = 4096;
/// Longest `.note.Xen`, in bytes.
const NOTES_MAX: u64 = 64 << 10;
/// Most runs of consecutive frames. A guest of 16 GiB without two consecutive frames has that many.
const RUNS_MAX: usize = 1 << 22;
/// Entries of the index that one call reads.
const AT_ONCE: u64 = 64 << 10;

/// A saved core, opened for reading. It is the [`Memory`] of the guest as it was saved.
#[derive(Debug)]
pub struct Core {
    path: PathBuf,
    file: Arc<File>,
    kind: GuestType,
    vcpus: Vec<Vcpu>,
    contexts: Vec<u8>,
    /// Contents of the note on the version of Xen, for [`Core::head`].
    xen_version: Vec<u8>,
    runs: Vec<Run>,
    /// Offset of the first page in the file, in bytes.
    pages_at: u64,
}

/// Consecutive frames whose pages are consecutive in the file too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    /// First frame, as page tables and [`Memory`] number it.
    frame: u64,
    /// First frame as the guest numbers its memory; the same except in PV guests.
    pfn: u64,
    /// Number of the first page in the file.
    page: u64,
    /// Number of frames.
    count: u64,
}

impl Run {
    fn end(&self) -> u64 {
        self.frame.saturating_add(self.count)
    }
}

impl Core {
    /// Opens the core at `path` and reads all of it but the pages.
    ///
    /// # Errors
    /// [`Error::Odd`] if it can't be read or is not a core; the message says what was expected, what was
    /// found, and where.
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
        let notes = CoreNotes::parse(&elf::whole(
            &file,
            find(&sections, ".note.Xen")?,
            NOTES_MAX,
        )?)?;
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
        let context_len = write::CONTEXT_LEN as u64;
        let contexts = elf::whole(&file, state, VCPUS_MAX * context_len)?;
        if notes.vcpus == 0 || contexts.len() as u64 != notes.vcpus.saturating_mul(context_len) {
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

    /// The path that it was opened by.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// How the guest ran. The format does not tell PVH from HVM: both are [`GuestType::Hvm`].
    #[must_use]
    pub fn kind(&self) -> GuestType {
        self.kind
    }

    /// The registers of its vCPUs, by their number. [`Vcpu::entry`] is `None` in a core of an HVM or PVH
    /// guest, because the format does not hold it.
    #[must_use]
    pub fn vcpus(&self) -> &[Vcpu] {
        &self.vcpus
    }

    /// Number of pages that it holds.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.runs.iter().map(|r| r.count).sum()
    }

    /// The guest's own number (PFN) of `frame`; `None` if the core does not hold that frame.
    #[must_use]
    pub fn pfn(&self, frame: Frame) -> Option<u64> {
        let run = self.run(frame)?;
        run.pfn.checked_add(frame.0 - run.frame)
    }

    /// What [`write::write`] needs for a smaller core of the same guest.
    #[must_use]
    pub fn head(&self) -> write::CoreHead {
        write::CoreHead {
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

impl Memory for Core {
    fn map(&self, frames: &[Frame]) -> Result<Box<dyn Window>, Error> {
        let place = |&frame: &Frame| {
            let run = self.run(frame).ok_or_else(|| Error::Frame {
                frame,
                why: format!(
                    "it is not in the core {}; xl dump-core is known to leave out the highest frames \
                     of a PVH guest, which hold the patches",
                    self.path.display()
                ),
            })?;
            // In bounds: the section lies in the file, and the page in the section.
            Ok(self.pages_at + (run.page + (frame.0 - run.frame)) * PAGE_SIZE)
        };
        Ok(Box::new(PagesInFile {
            file: Arc::clone(&self.file),
            places: frames.iter().map(place).collect::<Result<_, Error>>()?,
        }))
    }
}

/// A window onto pages of the file.
struct PagesInFile {
    file: Arc<File>,
    /// Offset of each page in the file, in bytes.
    places: Vec<u64>,
}

impl Window for PagesInFile {
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
            // Behind the last page there is none, and that is an error below.
            let places = self.places.get(first..).unwrap_or_default();
            let Some(&place) = places.first() else {
                return Err(bounds);
            };
            // One call reads pages that are consecutive in the file.
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

/// The one section of that name.
fn find<'s>(sections: &'s [CoreSection], name: &str) -> Result<&'s CoreSection, String> {
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
struct CoreNotes {
    magic: u64,
    vcpus: u64,
    xen_version: Vec<u8>,
}

impl CoreNotes {
    fn parse(bytes: &[u8]) -> Result<CoreNotes, String> {
        let mut header = None;
        let mut found = CoreNotes::default();
        let notes = NoteIterator::<FileHeader64<Le>>::new(Le, 4, bytes)
            .map_err(|e| format!(".note.Xen: {e}"))?;
        for (number, note) in notes.enumerate() {
            let note = note.map_err(|e| format!("note {number} of .note.Xen is cut short: {e}"))?;
            if note.name_bytes() != b"Xen\0" {
                continue;
            }
            match note.n_type(Le).0 {
                NOTE_HEADER => header = Some(note.desc()),
                NOTE_XEN_VERSION => found.xen_version = note.desc().to_vec(),
                NOTE_FORMAT if fetch::u64(note.desc(), 0) != Some(VERSION) => {
                    return Err(format!(
                        "the format note in .note.Xen reads {:02x?}; expected version {VERSION}",
                        note.desc()
                    ))
                }
                _ => {}
            }
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

/// Reads the index of frames, which has entries of `entry` bytes: 8 for a PFN, 16 for a PFN and an MFN.
/// Returns its runs, by rising frame.
fn runs(file: &File, index: &CoreSection, entry: u64, name: &str) -> Result<Vec<Run>, String> {
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
        let (words, _) = bytes.as_chunks::<8>();
        for entry in words.chunks_exact(if entry == 8 { 1 } else { 2 }) {
            // The only word of an entry is both. No entry is empty.
            let word = |word: Option<&[u8; 8]>| word.map_or(NO_FRAME, |w| u64::from_le_bytes(*w));
            let (pfn, frame) = (word(entry.first()), word(entry.last()));
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

/// What a `vcpu_guest_context` says; the offsets are in [`write`]. `None` if `context` is cut short.
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
