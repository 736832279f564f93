//! Sections of a core, which is an ELF file.
//!
//! Only the headers are read, because a core may be larger than this machine's memory. `object` reads
//! a whole file or a cache of it, so only its structures are used here.

use std::fs::File;
use std::os::unix::fs::FileExt;

use object::elf::{FileHeader64, SectionHeader64, ELFCLASS64, ELFDATA2LSB, EM_X86_64};
use object::{pod, LittleEndian as Le};

/// Most sections that a core may have; `xl dump-core` writes seven.
const SECTIONS_MAX: u16 = 64;
/// Longest table of section names, in bytes.
const NAMES_MAX: u64 = 4096;

/// A section that lies within the file. Its name is empty if the table of names has none for it.
#[derive(Clone, Debug)]
pub(super) struct CoreSection {
    pub name: String,
    /// Offset in the file, in bytes.
    pub offset: u64,
    /// Size in bytes.
    pub size: u64,
}

/// The file's own header, checked: a 64-bit little-endian ELF file for x86-64 with a few sections.
fn header(file: &File, len: u64) -> Result<FileHeader64<Le>, String> {
    let head_len = size_of::<FileHeader64<Le>>() as u64;
    if len < head_len {
        return Err(format!("it has {len} bytes; expected an ELF file"));
    }
    let bytes = read(file, 0, head_len)?;
    let (head, _) = pod::from_bytes::<FileHeader64<Le>>(&bytes).map_err(|()| "no ELF header")?;
    let ident = &head.e_ident;
    if ident.magic != [0x7f, b'E', b'L', b'F'] {
        return Err(format!(
            "it begins with {:02x?}; expected an ELF file",
            ident.magic
        ));
    }
    let machine = head.e_machine.get(Le);
    if ident.class != ELFCLASS64 || ident.data != ELFDATA2LSB || machine != EM_X86_64 {
        return Err(format!(
            "ELF class {:?}, byte order {:?}, machine {machine:?}; expected {ELFCLASS64:?}, \
             {ELFDATA2LSB:?}, {EM_X86_64:?}: a core of a 64-bit x86 guest",
            ident.class, ident.data
        ));
    }
    let count = head.e_shnum.get(Le);
    let size = size_of::<SectionHeader64<Le>>();
    if count == 0 || count > SECTIONS_MAX || usize::from(head.e_shentsize.get(Le)) != size {
        return Err(format!(
            "{count} sections with headers of {} bytes; expected 1 to {SECTIONS_MAX} with {size}",
            head.e_shentsize.get(Le)
        ));
    }
    Ok(*head)
}

/// All sections of a file of `len` bytes. They lie in the file and do not overlap.
pub(super) fn sections(file: &File, len: u64) -> Result<Vec<CoreSection>, String> {
    let head = header(file, len)?;
    let count = head.e_shnum.get(Le);
    let table = CoreSection {
        name: "headers".into(),
        offset: head.e_shoff.get(Le),
        size: u64::from(count) * size_of::<SectionHeader64<Le>>() as u64,
    };
    check(&table, len)?;
    let bytes = read(file, table.offset, table.size)?;
    let (headers, _) = pod::slice_from_bytes::<SectionHeader64<Le>>(&bytes, count.into())
        .map_err(|()| "the section headers are cut short")?;
    let place = |h: &SectionHeader64<Le>| CoreSection {
        name: String::new(),
        offset: h.sh_offset.get(Le),
        size: h.sh_size.get(Le),
    };
    let strings = headers
        .get(usize::from(head.e_shstrndx.get(Le).0))
        .map(place)
        .ok_or("no section with the names of sections")?;
    check(&strings, len)?;
    let names = whole(file, &strings, NAMES_MAX)?;
    let mut found = Vec::new();
    // The first header belongs to no section.
    for header in headers.iter().skip(1) {
        let rest = usize::try_from(header.sh_name.get(Le))
            .ok()
            .and_then(|at| names.get(at..))
            .unwrap_or_default();
        let name = rest.split(|&b| b == 0).next().unwrap_or_default();
        let section = CoreSection {
            name: String::from_utf8_lossy(name).into_owned(),
            ..place(header)
        };
        check(&section, len)?;
        found.push(section);
    }
    no_overlap(&found)?;
    Ok(found)
}

/// Checks that no two of `sections`, which lie in the file, share a byte.
fn no_overlap(sections: &[CoreSection]) -> Result<(), String> {
    let mut by_place: Vec<&CoreSection> = sections.iter().filter(|s| s.size > 0).collect();
    by_place.sort_by_key(|s| s.offset);
    for pair in by_place.windows(2) {
        if let [a, b] = pair {
            // No overflow: both lie in the file.
            if a.offset + a.size > b.offset {
                return Err(format!(
                    "sections {} ({:#x} bytes at {:#x}) and {} (at {:#x}) overlap",
                    a.name, a.size, a.offset, b.name, b.offset
                ));
            }
        }
    }
    Ok(())
}

/// Checks that a section lies in the file of `len` bytes.
fn check(section: &CoreSection, len: u64) -> Result<(), String> {
    match section.offset.checked_add(section.size) {
        Some(end) if end <= len => Ok(()),
        _ => Err(format!(
            "section {:?} is said to have {:#x} bytes at {:#x}, but the file has {len:#x} bytes: it \
             is cut short or damaged",
            section.name, section.size, section.offset
        )),
    }
}

/// The bytes of a section; an error if there are more than `most`.
pub(super) fn whole(file: &File, section: &CoreSection, most: u64) -> Result<Vec<u8>, String> {
    if section.size > most {
        return Err(format!(
            "section {:?} has {} bytes; expected at most {most}",
            section.name, section.size
        ));
    }
    read(file, section.offset, section.size)
}

/// The `len` bytes at offset `at` of a section.
pub(super) fn part(
    file: &File,
    section: &CoreSection,
    at: u64,
    len: u64,
) -> Result<Vec<u8>, String> {
    read(file, section.offset.saturating_add(at), len)
}

fn read(file: &File, at: u64, len: u64) -> Result<Vec<u8>, String> {
    let failed = |e: &dyn std::fmt::Display| format!("reading {len} bytes at offset {at:#x}: {e}");
    let mut bytes = vec![0; usize::try_from(len).map_err(|e| failed(&e))?];
    file.read_exact_at(&mut bytes, at).map_err(|e| failed(&e))?;
    Ok(bytes)
}
