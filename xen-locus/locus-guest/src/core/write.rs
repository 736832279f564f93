//! Writes cores in the format of `xl dump-core`: small ones made of large ones, and those of tests.
//!
//! The ELF part is 50 lines written by hand. `object::write` would not make it shorter: its `Object`
//! makes relocatable files only, and its `elf::Writer` wants every section reserved in one pass and
//! written in a second one. The pages of a core are written as a stream, and are not in memory.

use std::io::{self, Write};

use object::elf::{SectionType, SHT_NOTE, SHT_PROGBITS, SHT_STRTAB};

use super::{MAGIC_HVM, MAGIC_PV, NOTE_FORMAT, NOTE_HEADER, NOTE_NONE, NOTE_XEN_VERSION, VERSION};
use crate::addr::{PAGE_LEN, PAGE_SIZE};
use crate::{GuestType, Vcpu};

/// Size of a `vcpu_guest_context` of x86-64, in bytes.
pub(super) const CONTEXT_LEN: usize = 5168;
/// Byte offsets of its members. `flags` comes behind the FPU's 512 bytes.
pub(super) const FLAGS: usize = 512;
/// `user_regs.r13`.
pub(super) const R13: usize = 520 + 16;
/// `user_regs.rbp`.
pub(super) const RBP: usize = 520 + 32;
/// `user_regs.r10`.
pub(super) const R10: usize = 520 + 56;
/// `user_regs.rax`.
pub(super) const RAX: usize = 520 + 80;
/// `user_regs.rdx`.
pub(super) const RDX: usize = 520 + 96;
/// `user_regs.rdi`.
pub(super) const RDI: usize = 520 + 112;
/// `user_regs.rip`.
pub(super) const RIP: usize = 520 + 128;
/// `user_regs.cs`.
pub(super) const CS: usize = 520 + 136;
/// `user_regs.rsp`.
pub(super) const RSP: usize = 520 + 152;
/// `ctrlreg[0]`.
pub(super) const CONTROL: usize = 4984;
/// `event_callback_eip`.
pub(super) const EVENT_CALLBACK: usize = 5112;
/// `gs_base_kernel`.
pub(super) const GS_KERNEL: usize = 5152;
/// `gs_base_user`.
pub(super) const GS_USER: usize = 5160;
/// `VGCF_in_kernel`.
pub(super) const IN_KERNEL: u64 = 1 << 2;
/// `VGCF_online`.
pub(super) const ONLINE: u64 = 1 << 5;
/// `CR0.PG`.
pub(super) const CR0_PAGING: u64 = 1 << 31;
/// `CR4.PAE`.
pub(super) const CR4_PAE: u64 = 1 << 5;
/// `CR4.LA57`.
pub(super) const CR4_LA57: u64 = 1 << 12;

/// What a core says of its guest, besides the pages.
#[derive(Clone, Debug)]
pub struct CoreHead {
    /// How the guest ran; the format does not tell PVH from HVM.
    pub kind: GuestType,
    /// One `vcpu_guest_context` of 5168 bytes for each vCPU, one after the other.
    pub contexts: Vec<u8>,
    /// Contents of the note on the version of Xen; without one if empty.
    pub xen_version: Vec<u8>,
}

impl CoreHead {
    /// The head for a guest whose vCPUs have the registers `vcpus`.
    #[must_use]
    pub fn new(kind: GuestType, vcpus: &[Vcpu]) -> CoreHead {
        CoreHead {
            kind,
            contexts: vcpus.iter().flat_map(|v| context(v, kind)).collect(),
            xen_version: Vec::new(),
        }
    }
}

/// The two numbers of one page of a core.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CorePage {
    /// The guest's own number of the page (PFN).
    pub pfn: u64,
    /// The number that page tables hold: a machine frame (MFN) in a PV guest, else the same as `pfn`.
    pub frame: u64,
}

/// A `vcpu_guest_context` with what [`Vcpu`] knows, and zeroes in all else.
fn context(vcpu: &Vcpu, kind: GuestType) -> Vec<u8> {
    let mut bytes = vec![0; CONTEXT_LEN];
    let mut put = |at: usize, value: u64| {
        // Always there: every offset above is at least 8 bytes below CONTEXT_LEN.
        let rest = bytes.get_mut(at..).unwrap_or_default();
        if let Some(place) = rest.first_chunk_mut() {
            *place = value.to_le_bytes();
        }
    };
    let pv = kind == GuestType::Pv;
    let flag = |on: bool, bit| if on { bit } else { 0 };
    put(
        FLAGS,
        flag(vcpu.online, ONLINE) | flag(pv && !vcpu.user, IN_KERNEL),
    );
    put(RIP, vcpu.rip.0);
    // PV kernels run in ring 3 too.
    put(CS, if vcpu.user || pv { 0x33 } else { 0x10 });
    put(RSP, vcpu.rsp.0);
    for (at, value) in [
        (R13, vcpu.r13),
        (RBP, vcpu.rbp),
        (R10, vcpu.r10),
        (RAX, vcpu.rax),
        (RDX, vcpu.rdx),
        (RDI, vcpu.rdi),
    ] {
        put(at, value);
    }
    put(CONTROL, flag(vcpu.long_mode, CR0_PAGING));
    put(CONTROL + 24, vcpu.root.0 << 12);
    put(
        CONTROL + 32,
        flag(vcpu.long_mode, CR4_PAE) | flag(vcpu.la57, CR4_LA57),
    );
    put(
        EVENT_CALLBACK,
        vcpu.entry.filter(|_| pv).map_or(0, |at| at.0),
    );
    let (user, kernel) = if vcpu.user {
        (vcpu.gs_base, vcpu.gs_other)
    } else {
        (vcpu.gs_other, vcpu.gs_base)
    };
    put(GS_KERNEL, kernel.0);
    put(GS_USER, user.0);
    bytes
}

/// One section of the file.
struct NewSection {
    name: &'static str,
    /// `sh_type`.
    kind: u32,
    /// Contents; empty for the pages, which are written behind all else.
    bytes: Vec<u8>,
    /// `sh_entsize`: bytes of an entry, 0 if it has none of equal size.
    entry: u64,
}

/// Adds a note of owner `Xen` to `out`.
fn note(out: &mut Vec<u8>, kind: u32, desc: &[u8]) -> io::Result<()> {
    let len = u32::try_from(desc.len()).map_err(io::Error::other)?;
    for word in [4, len, kind] {
        out.extend(word.to_le_bytes());
    }
    out.extend(b"Xen\0");
    out.extend(desc);
    out.resize(out.len().next_multiple_of(4), 0);
    Ok(())
}

/// The contents of `.note.Xen`.
fn notes(head: &CoreHead, pages: u64) -> io::Result<Vec<u8>> {
    let mut notes = Vec::new();
    note(&mut notes, NOTE_NONE, &[])?;
    let magic = match head.kind {
        GuestType::Pv => MAGIC_PV,
        GuestType::Pvh | GuestType::Hvm => MAGIC_HVM,
    };
    let vcpus = (head.contexts.len() / CONTEXT_LEN) as u64;
    let header = words(&[magic, vcpus, pages, PAGE_SIZE]);
    note(&mut notes, NOTE_HEADER, &header)?;
    if !head.xen_version.is_empty() {
        note(&mut notes, NOTE_XEN_VERSION, &head.xen_version)?;
    }
    note(&mut notes, NOTE_FORMAT, &words(&[VERSION]))?;
    Ok(notes)
}

/// The little-endian bytes of `all`.
fn words(all: &[u64]) -> Vec<u8> {
    all.iter().flat_map(|w| w.to_le_bytes()).collect()
}

/// Writes a core of `pages` to `out`, in the order given. `content` returns the bytes of each page.
///
/// # Errors
/// `out` or `content` fails, or a note is longer than 4 GiB.
pub fn write(
    out: &mut impl Write,
    head: &CoreHead,
    pages: &[CorePage],
    mut content: impl FnMut(CorePage) -> io::Result<[u8; PAGE_LEN]>,
) -> io::Result<()> {
    let pv = head.kind == GuestType::Pv;
    let index: Vec<u64> = pages
        .iter()
        .flat_map(|p| [Some(p.pfn), pv.then_some(p.frame)])
        .flatten()
        .collect();
    let section = |name, kind: SectionType, bytes, entry| NewSection {
        name,
        kind: kind.0,
        bytes,
        entry,
    };
    let (index_name, index_entry) = if pv {
        (".xen_p2m", 16)
    } else {
        (".xen_pfn", 8)
    };
    let count = pages.len() as u64;
    let sections = [
        section(".note.Xen", SHT_NOTE, notes(head, count)?, 0),
        section(
            ".xen_prstatus",
            SHT_PROGBITS,
            head.contexts.clone(),
            CONTEXT_LEN as u64,
        ),
        section(index_name, SHT_PROGBITS, words(&index), index_entry),
        section(".xen_pages", SHT_PROGBITS, Vec::new(), PAGE_SIZE),
    ];
    out.write_all(&before_pages(sections, count * PAGE_SIZE)?)?;
    for &page in pages {
        out.write_all(&content(page)?)?;
    }
    Ok(())
}

/// The file up to its pages: ELF header, section headers, contents of all sections but the last. The
/// last one is the pages, of `bytes_of_pages` bytes.
fn before_pages<const N: usize>(
    sections: [NewSection; N],
    bytes_of_pages: u64,
) -> io::Result<Vec<u8>> {
    const HEADER: u64 = 64;
    let mut names = b"\0.shstrtab\0".to_vec();
    // In front of the sections: the empty header, and that of the names.
    let mut headers = Vec::new();
    for section in sections {
        let name = u32::try_from(names.len()).map_err(io::Error::other)?;
        names.extend(section.name.bytes());
        names.push(0);
        headers.push((name, section));
    }
    let of_names = NewSection {
        name: ".shstrtab",
        kind: SHT_STRTAB.0,
        bytes: names,
        entry: 0,
    };
    headers.insert(0, (1, of_names));
    let count = u16::try_from(headers.len() + 1).map_err(io::Error::other)?;
    let mut table = vec![0; 64];
    let mut contents = Vec::new();
    let first = HEADER + HEADER * u64::from(count);
    let last = headers.len() - 1;
    for (i, (name, section)) in headers.into_iter().enumerate() {
        let align = if i == last { PAGE_SIZE } else { 8 };
        let at = (first + contents.len() as u64).next_multiple_of(align);
        let padding = at - first - contents.len() as u64;
        contents.extend((0..padding).map(|_| 0));
        let size = if i == last {
            bytes_of_pages
        } else {
            section.bytes.len() as u64
        };
        table.extend(name.to_le_bytes());
        table.extend(section.kind.to_le_bytes());
        table.extend(words(&[0, 0, at, size, 0, align, section.entry]));
        contents.extend(section.bytes);
    }
    let mut file = vec![0x7f, b'E', b'L', b'F', 2, 1, 1];
    file.resize(16, 0);
    // ET_CORE, EM_X86_64, version; no entry point, no program headers; section headers follow.
    file.extend([4, 0, 62, 0, 1, 0, 0, 0]);
    file.extend(words(&[0, 0, HEADER]));
    file.extend([0, 0, 0, 0, 64, 0, 0, 0, 0, 0, 64, 0]);
    file.extend(count.to_le_bytes());
    // Number of the section with the names.
    file.extend(1u16.to_le_bytes());
    file.extend(table);
    file.extend(contents);
    Ok(file)
}
