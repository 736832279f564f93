//! Sections of the ELF file that a core is.

use std::fs::File;
use std::os::unix::fs::FileExt;

use object::elf::{FileHeader64, SectionHeader64, ELFCLASS64, ELFDATA2LSB, EM_X86_64};
use object::{pod, LittleEndian as Le};

/// Most sections believed: `xl dump-core` writes seven.
const SECTIONS_MAX: u16 = 64;
/// Most bytes of section names believed.
const NAMES_MAX: u64 = 4096;

/// A section that lies within the file.
#[derive(Clone, Debug)]
pub(super) struct Section {
    pub name: String,
    /// Offset in the file, in bytes.
    pub offset: u64,
    /// Size in bytes.
    pub size: u64,
}

/// All sections of a file of `len` bytes. They lie in the file and do not overlap.
pub(super) fn sections(file: &File, len: u64) -> Result<Vec<Section>, String> {
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
    let table = Section {
        name: "headers".into(),
        offset: head.e_shoff.get(Le),
        size: u64::from(count) * size as u64,
    };
    check(&table, len)?;
    let bytes = read(file, table.offset, table.size)?;
    let (headers, _) = pod::slice_from_bytes::<SectionHeader64<Le>>(&bytes, count.into())
        .map_err(|()| "the section headers are cut short")?;
    let place = |h: &SectionHeader64<Le>| Section {
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
    // The first header stands for no section.
    for header in headers.iter().skip(1) {
        let rest = usize::try_from(header.sh_name.get(Le))
            .ok()
            .and_then(|at| names.get(at..))
            .unwrap_or_default();
        let name = rest.split(|&b| b == 0).next().unwrap_or_default();
        let section = Section {
            name: String::from_utf8_lossy(name).into_owned(),
            ..place(header)
        };
        check(&section, len)?;
        found.push(section);
    }
    let mut by_place: Vec<&Section> = found.iter().filter(|s| s.size > 0).collect();
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
    Ok(found)
}

fn check(section: &Section, len: u64) -> Result<(), String> {
    match section.offset.checked_add(section.size) {
        Some(end) if end <= len => Ok(()),
        _ => Err(format!(
            "section {:?} is said to have {:#x} bytes at {:#x}, and the file has {len:#x} bytes: it \
             is cut short or damaged",
            section.name, section.size, section.offset
        )),
    }
}

/// The bytes of a section, which must be at most `most`.
pub(super) fn whole(file: &File, section: &Section, most: u64) -> Result<Vec<u8>, String> {
    if section.size > most {
        return Err(format!(
            "section {:?} has {} bytes; expected at most {most}",
            section.name, section.size
        ));
    }
    read(file, section.offset, section.size)
}

/// `len` bytes at `at` of a section.
pub(super) fn part(file: &File, section: &Section, at: u64, len: u64) -> Result<Vec<u8>, String> {
    read(file, section.offset.saturating_add(at), len)
}

fn read(file: &File, at: u64, len: u64) -> Result<Vec<u8>, String> {
    let mut bytes = vec![0; usize::try_from(len).unwrap_or(usize::MAX)];
    file.read_exact_at(&mut bytes, at)
        .map_err(|e| format!("reading {len} bytes at offset {at:#x}: {e}"))?;
    Ok(bytes)
}
