//! Writes cores in the format that `xl dump-core` writes, for small ones made of big ones and for
//! tests.

use std::io::{self, Write};

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

/// What a core begins with.
#[derive(Clone, Debug)]
pub struct Head {
    /// How the guest ran.
    pub kind: GuestType,
    /// The `vcpu_guest_context` of each vCPU.
    pub contexts: Vec<u8>,
    /// The note on the version of Xen; none if empty.
    pub xen_version: Vec<u8>,
}

impl Head {
    /// The head for a guest in the states `vcpus`.
    #[must_use]
    pub fn new(kind: GuestType, vcpus: &[Vcpu]) -> Head {
        Head {
            kind,
            contexts: vcpus.iter().flat_map(|v| context(v, kind)).collect(),
            xen_version: Vec::new(),
        }
    }
}

/// A page of a core: the number the guest gives it, and the number page tables give it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Page {
    /// Guest's page frame number.
    pub pfn: u64,
    /// Machine frame of a PV guest; else the same.
    pub frame: u64,
}

/// A `vcpu_guest_context` with what [`Vcpu`] knows.
fn context(vcpu: &Vcpu, kind: GuestType) -> Vec<u8> {
    let mut bytes = vec![0; CONTEXT_LEN];
    let mut put = |at: usize, value: u64| {
        if let Some(place) = bytes.get_mut(at..at + 8) {
            place.copy_from_slice(&value.to_le_bytes());
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

fn note(out: &mut Vec<u8>, kind: u32, desc: &[u8]) {
    let len = u32::try_from(desc.len()).unwrap_or(0);
    for word in [4, len, kind] {
        out.extend(word.to_le_bytes());
    }
    out.extend(b"Xen\0");
    out.extend(desc);
    out.resize(out.len().next_multiple_of(4), 0);
}

fn words(all: &[u64]) -> Vec<u8> {
    all.iter().flat_map(|w| w.to_le_bytes()).collect()
}

/// Writes a core of `pages` to `out`; `content` gives the bytes of each.
///
/// # Errors
/// `out` or `content` fails.
pub fn write(
    out: &mut impl Write,
    head: &Head,
    pages: &[Page],
    mut content: impl FnMut(Page) -> io::Result<[u8; PAGE_LEN]>,
) -> io::Result<()> {
    let pv = head.kind == GuestType::Pv;
    let mut notes = Vec::new();
    note(&mut notes, NOTE_NONE, &[]);
    let magic = if pv { MAGIC_PV } else { MAGIC_HVM };
    let vcpus = (head.contexts.len() / CONTEXT_LEN) as u64;
    let header = words(&[magic, vcpus, pages.len() as u64, PAGE_SIZE]);
    note(&mut notes, NOTE_HEADER, &header);
    if !head.xen_version.is_empty() {
        note(&mut notes, NOTE_XEN_VERSION, &head.xen_version);
    }
    note(&mut notes, NOTE_FORMAT, &words(&[VERSION]));
    let index: Vec<u64> = pages
        .iter()
        .flat_map(|p| [Some(p.pfn), pv.then_some(p.frame)])
        .flatten()
        .collect();
    let index_name = if pv { ".xen_p2m" } else { ".xen_pfn" };
    let bytes_of_pages = pages.len() as u64 * PAGE_SIZE;
    // Types: SHT_STRTAB 3, SHT_NOTE 7, SHT_PROGBITS 1.
    let mut names = vec![0];
    let mut sections: Vec<(u32, u32, Vec<u8>, u64)> = Vec::new();
    for (name, kind, bytes, entry) in [
        (".shstrtab", 3u32, Vec::new(), 0),
        (".note.Xen", 7, notes, 0),
        (
            ".xen_prstatus",
            1,
            head.contexts.clone(),
            CONTEXT_LEN as u64,
        ),
        (index_name, 1, words(&index), if pv { 16 } else { 8 }),
        (".xen_pages", 1, Vec::new(), PAGE_SIZE),
    ] {
        let at = u32::try_from(names.len()).unwrap_or(0);
        names.extend(name.bytes());
        names.push(0);
        sections.push((at, kind, bytes, entry));
    }
    if let Some((_, _, bytes, _)) = sections.first_mut() {
        *bytes = names;
    }
    let table_len = (sections.len() as u64 + 1) * 64;
    let mut at = 64 + table_len;
    let mut table = vec![0; 64];
    let last = sections.len() - 1;
    for (i, (name, kind, bytes, entry)) in sections.iter().enumerate() {
        let align = if i == last { PAGE_SIZE } else { 8 };
        at = at.next_multiple_of(align);
        let size = if i == last {
            bytes_of_pages
        } else {
            bytes.len() as u64
        };
        table.extend(name.to_le_bytes());
        table.extend(kind.to_le_bytes());
        table.extend(words(&[0, 0, at, size, 0, align, *entry]));
        at += size;
    }
    let mut file = vec![0x7f, b'E', b'L', b'F', 2, 1, 1];
    file.resize(16, 0);
    // ET_CORE, EM_X86_64, version; no entry point, no program headers; section headers behind.
    file.extend([4, 0, 62, 0, 1, 0, 0, 0]);
    file.extend(words(&[0, 0, 64]));
    let count = u8::try_from(sections.len() + 1).unwrap_or(0);
    file.extend([0, 0, 0, 0, 64, 0, 0, 0, 0, 0, 64, 0, count, 0, 1, 0]);
    file.extend(table);
    for (i, (_, _, bytes, _)) in sections.iter().enumerate() {
        let align = if i == last { PAGE_LEN } else { 8 };
        file.resize(file.len().next_multiple_of(align), 0);
        file.extend(bytes);
    }
    out.write_all(&file)?;
    for &page in pages {
        out.write_all(&content(page)?)?;
    }
    Ok(())
}
