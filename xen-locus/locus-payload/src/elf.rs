//! Sections and relocations of a relocatable x86-64 ELF file, checked and copied out.
//!
//! Everything that later code relies on is checked here: every index is one of something that exists,
//! symbols lie in their sections, relocations lie in theirs and do not overlap, sizes and names are
//! bounded. Debug information is skipped.

use std::collections::HashMap;

use object::elf;
use object::endian::LittleEndian;
use object::read::elf::{FileHeader, Rela, SectionHeader};
use serde::Serialize;

use super::error::{limit, PayloadErrorKind, Result};
use super::role::{classify, Role, SectionFlags};
use super::symbol::{self, ElfSymbol, SymSection};
use super::{MAX_FILE, MAX_NAME, MAX_RELOCS, MAX_SECTIONS};

type Header = elf::FileHeader64<LittleEndian>;
pub(super) type Shdr = elf::SectionHeader64<LittleEndian>;

pub(super) const LE: LittleEndian = LittleEndian;

/// `SHF_RELA_LIVEPATCH` of `include/uapi/linux/elf.h`.
const SHF_RELA_LIVEPATCH: u64 = 0x0010_0000;

/// A section of the payload. Its index in [`Payload::sections`](super::Payload::sections) is its ELF
/// index.
#[derive(Debug, Clone)]
pub struct Section {
    /// ELF section index.
    pub index: usize,
    /// Name, of printable characters; may be empty.
    pub name: String,
    /// What a loader does with it, as its name and flags say.
    pub role: Role,
    /// `sh_flags`, as far as they say how it is loaded.
    pub flags: SectionFlags,
    /// Alignment in bytes, a power of two, at least 1.
    pub align: u64,
    /// Size in bytes when loaded.
    pub size: u64,
    /// Contents: `size` bytes. Empty for [`Role::Bss`] and others without contents, and for
    /// [`Role::Table`], [`Role::KlpRela`] and [`Role::NonAlloc`], whose bytes are not needed.
    pub data: Vec<u8>,
    /// Relocations of this section, by rising offset, each of which changes something (none is
    /// `R_X86_64_NONE`), not overlapping, nor with livepatch relocations of it. Those of a [`Role::KlpRela`] section
    /// are listed with that section itself; their offsets are in its target.
    pub relocs: Vec<Reloc>,
}

impl Section {
    /// ELF index of the section that [`Section::relocs`] change: its own, but for livepatch relocations.
    pub(super) fn home(&self) -> usize {
        match self.role {
            Role::KlpRela { target, .. } => target,
            _ => self.index,
        }
    }
}

/// One relocation (`Elf64_Rela`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Reloc {
    /// Offset of what it changes, in bytes from the start of the relocated section.
    pub offset: u64,
    /// Type, a number `R_X86_64_*` of the x86-64 ELF ABI.
    pub rtype: u32,
    /// Index in [`Payload::symbols`](super::Payload::symbols), at least 1.
    pub symbol: usize,
    /// Constant to add to the value of the symbol.
    pub addend: i64,
}

/// Reads the file's sections and symbols.
pub(super) fn parse(bytes: &[u8]) -> Result<(Vec<Section>, Vec<ElfSymbol>)> {
    super::ident::check(bytes)?;
    let header = Header::parse(bytes).map_err(|e| bad("file header", &e))?;
    let count = header
        .shnum(LE, bytes)
        .map_err(|e| bad("section count", &e))?;
    limit("the number of sections", u64::from(count), MAX_SECTIONS)?;
    let end = u64::from(count)
        .checked_mul(64)
        .and_then(|len| header.e_shoff(LE).checked_add(len))
        .ok_or_else(|| PayloadErrorKind::malformed("section table", "its end overflows"))?;
    fits(bytes, "the section table", end)?;
    let headers = header
        .section_headers(LE, bytes)
        .map_err(|e| bad("section table", &e))?;
    let strings = header
        .section_strings(LE, bytes, headers)
        .map_err(|e| bad("section names", &e))?;

    let mut sections: Vec<Section> = Vec::with_capacity(headers.len());
    let mut room = Room::of(bytes);
    for (index, shdr) in headers.iter().enumerate() {
        let place = || format!("section {index}");
        let name = shdr.name(LE, strings).map_err(|e| bad(place(), &e))?;
        let name = text(name, &place)?;
        let section = read_section(bytes, index, name, shdr, &mut room)?;
        sections.push(section);
    }
    let symtab = symbol::single_table(headers)?;
    let symbols = symbol::read(bytes, headers, symtab, &sections)?;
    read_relocs(bytes, headers, symtab, &mut sections, symbols.len())?;
    check_late(&sections, &symbols)?;
    Ok((sections, symbols))
}

/// The error that `object` gives for what is at `place`.
pub(super) fn bad(place: impl Into<String>, error: &object::read::Error) -> PayloadErrorKind {
    PayloadErrorKind::malformed(place, error.to_string())
}

/// What may still be kept of a file. Sections of a real file do not share bytes, so no more is copied than
/// the file has, and memory follows from the size of the file.
struct Room {
    /// Length of the file in bytes.
    file: u64,
    /// Bytes of contents that were copied.
    copied: u64,
    /// Size of the sections that are loaded, in bytes, also of those without contents.
    loaded: u64,
    /// There was a `.modinfo`.
    modinfo: bool,
}

impl Room {
    fn of(bytes: &[u8]) -> Self {
        Self {
            file: bytes.len() as u64,
            copied: 0,
            loaded: 0,
            modinfo: false,
        }
    }

    /// Counts a section of `size` bytes that is loaded.
    fn load(&mut self, size: u64) -> Result<()> {
        limit("the size of a section", size, MAX_FILE)?;
        self.loaded = self.loaded.saturating_add(size);
        limit("the total size of sections", self.loaded, MAX_FILE)
    }

    /// Counts `len` bytes that are about to be copied.
    fn copy(&mut self, len: u64) -> Result<()> {
        self.copied = self.copied.saturating_add(len);
        limit(SHARED, self.copied, self.file)
    }
}

/// What is too much where sections share bytes of the file.
const SHARED: &str = "the contents of all sections together (some share bytes of the file)";

/// Checks that the file is at least `end` bytes long.
fn fits(bytes: &[u8], what: &str, end: u64) -> Result<()> {
    let have = bytes.len() as u64;
    if end > have {
        return Err(PayloadErrorKind::Truncated {
            what: what.into(),
            need: end,
            have,
        });
    }
    Ok(())
}

/// A name as text: short, UTF-8, without control characters, because names are printed.
pub(super) fn text(name: &[u8], place: &dyn Fn() -> String) -> Result<String> {
    limit("the length of a name", name.len() as u64, MAX_NAME)?;
    match std::str::from_utf8(name) {
        Ok(name) if !name.chars().any(char::is_control) => Ok(name.to_owned()),
        _ => Err(PayloadErrorKind::malformed(
            place(),
            format!(
                "the name {:?} is not printable text",
                String::from_utf8_lossy(name)
            ),
        )),
    }
}

/// Reads section number `index`, with its contents if they are needed.
fn read_section(
    bytes: &[u8],
    index: usize,
    name: String,
    shdr: &Shdr,
    room: &mut Room,
) -> Result<Section> {
    let place = || format!("section {index} ({name})");
    let raw_flags = shdr.sh_flags(LE).0;
    let has = |flag: elf::SectionFlags| raw_flags & flag.0 != 0;
    let flags = SectionFlags {
        alloc: has(elf::SHF_ALLOC),
        write: has(elf::SHF_WRITE),
        exec: has(elf::SHF_EXECINSTR),
    };
    let align = shdr.sh_addralign(LE).max(1);
    let sh_type = shdr.sh_type(LE);
    let nobits = sh_type == elf::SHT_NOBITS;
    // The kernel takes a section with this flag for livepatch relocations, whatever its type.
    let late = raw_flags & SHF_RELA_LIVEPATCH != 0 || name.starts_with(".klp.rela.");
    let role = match index {
        0 if sh_type == elf::SHT_NULL => Role::Null,
        _ if late => klp_rela(&name, raw_flags, shdr, &place)?,
        _ => classify(&name, sh_type, flags),
    };
    let size = if role == Role::Null {
        0
    } else {
        shdr.sh_size(LE)
    };
    if role == Role::Modinfo && std::mem::replace(&mut room.modinfo, true) {
        return Err(PayloadErrorKind::modinfo("there are several such sections"));
    }
    if flags.alloc {
        room.load(size)?;
    }
    let mut data = Vec::new();
    if !nobits && role != Role::Null {
        let end = shdr
            .sh_offset(LE)
            .checked_add(size)
            .ok_or_else(|| PayloadErrorKind::malformed(place(), "its end overflows"))?;
        fits(bytes, &place(), end)?;
        let keep = match role {
            Role::Table | Role::NonAlloc | Role::KlpRela { .. } => false,
            Role::Modinfo => true,
            _ => flags.alloc,
        };
        if keep {
            room.copy(size)?;
            data = shdr.data(LE, bytes).map_err(|e| bad(place(), &e))?.to_vec();
        }
    }
    if flags.alloc {
        if !align.is_power_of_two() || align > 1 << 21 {
            return Err(PayloadErrorKind::malformed(
                place(),
                format!("its alignment is {align}, expected a power of two up to 2 MiB"),
            ));
        }
        if has(elf::SHF_COMPRESSED) || has(elf::SHF_TLS) {
            return Err(PayloadErrorKind::malformed(
                place(),
                "it is loaded, and compressed or thread-local, which no kernel module is",
            ));
        }
    }
    Ok(Section {
        index,
        name,
        role,
        flags,
        align,
        size,
        data,
        relocs: Vec::new(),
    })
}

/// The role of a section of livepatch relocations. `read_relocs` checks its target.
fn klp_rela(name: &str, flags: u64, shdr: &Shdr, place: &dyn Fn() -> String) -> Result<Role> {
    let object = name
        .strip_prefix(".klp.rela.")
        .and_then(|rest| rest.split('.').next())
        .filter(|object| !object.is_empty() && flags & SHF_RELA_LIVEPATCH != 0)
        .filter(|_| shdr.sh_type(LE) == elf::SHT_RELA);
    match (object, usize::try_from(shdr.sh_info(LE))) {
        (Some(object), Ok(target)) => Ok(Role::KlpRela {
            object: object.to_owned(),
            target,
        }),
        _ => Err(PayloadErrorKind::malformed(
            place(),
            "livepatch relocations have the type SHT_RELA, the flag SHF_RELA_LIVEPATCH and a name \
             .klp.rela.OBJECT.SECTION; this has not all of them",
        )),
    }
}

/// Number of bytes that a relocation changes; 1 for a type that is not known here.
pub(super) fn reloc_width(rtype: u32) -> u64 {
    match rtype {
        0 => 0,                       // NONE
        1 | 24 | 25 | 27 | 29 => 8,   // 64, PC64, GOTOFF64, GOT64, GOTPC64
        2 | 3 | 4 | 9 | 10 | 11 => 4, // PC32, GOT32, PLT32, GOTPCREL, 32, 32S
        26 | 32 | 41 | 42 => 4,       // GOTPC32, SIZE32, GOTPCRELX, REX_GOTPCRELX
        12 | 13 => 2,                 // 16, PC16
        _ => 1,
    }
}

/// Reads the relocations of all sections that are loaded. `symbols` is the number of symbols.
fn read_relocs(
    bytes: &[u8],
    headers: &[Shdr],
    symtab: usize,
    sections: &mut [Section],
    symbols: usize,
) -> Result<()> {
    let mut total = 0u64;
    for (index, shdr) in headers.iter().enumerate() {
        let sh_type = shdr.sh_type(LE);
        if sh_type != elf::SHT_RELA && sh_type != elf::SHT_REL {
            continue;
        }
        let (name, klp) = match sections.get(index) {
            Some(own) => (own.name.clone(), matches!(own.role, Role::KlpRela { .. })),
            None => continue,
        };
        let place = format!("relocations {index} ({name})");
        let fail = |problem: &str| Err(PayloadErrorKind::malformed(place.clone(), problem));
        // Too large for an index is no section's index either.
        let target = usize::try_from(shdr.sh_info(LE)).unwrap_or(usize::MAX);
        let size = match sections.get(target) {
            Some(t) if matches!(t.role, Role::Null | Role::Table | Role::KlpRela { .. }) => {
                return fail("they are for a section that has no contents of its own");
            }
            Some(t) if !t.flags.alloc => continue,
            Some(t) => t.size,
            None => return fail("they are for a section that doesn't exist"),
        };
        if sh_type == elf::SHT_REL || shdr.sh_entsize(LE) != 24 || shdr.sh_size(LE) % 24 != 0 {
            return fail("expected entries of 24 bytes (SHT_RELA), as x86-64 has");
        }
        if usize::try_from(shdr.sh_link(LE)) != Ok(symtab) {
            return fail("they don't belong to the symbol table");
        }
        total = total.saturating_add(shdr.sh_size(LE) / 24);
        limit("the number of relocations", total, MAX_RELOCS)?;
        limit(SHARED, total.saturating_mul(24), bytes.len() as u64)?;
        let raw: &[elf::Rela64<LittleEndian>] = shdr
            .data_as_array(LE, bytes)
            .map_err(|e| bad(place.clone(), &e))?;
        let mut relocs = Vec::with_capacity(raw.len());
        for rela in raw {
            let reloc = read_reloc(rela, size, symbols, &place)?;
            // R_X86_64_NONE changes nothing, and any number of them may be at one place.
            if reloc_width(reloc.rtype) > 0 {
                relocs.push(reloc);
            }
        }
        if let Some(owner) = sections.get_mut(if klp { index } else { target }) {
            owner.relocs.append(&mut relocs);
        }
    }
    for section in sections.iter_mut() {
        section.relocs.sort_by_key(|r| r.offset);
    }
    check_overlaps(sections)
}

/// Refuses late relocations with other symbols than livepatch symbols, as the kernel does (`klp_resolve_symbols`,
/// kernel/livepatch/core.c), and livepatch symbols in others, where the kernel has no value for them.
fn check_late(sections: &[Section], symbols: &[ElfSymbol]) -> Result<()> {
    for section in sections {
        let late = matches!(section.role, Role::KlpRela { .. });
        let of_livepatch = |r: &&Reloc| {
            symbols
                .get(r.symbol)
                .is_some_and(|s| s.section == SymSection::Livepatch)
        };
        if let Some(reloc) = section.relocs.iter().find(|r| of_livepatch(r) != late) {
            let name = symbols.get(reloc.symbol).map_or("?", |s| &*s.name);
            return Err(PayloadErrorKind::malformed(
                format!("relocations of {}", section.name),
                format!(
                    "at offset {:#x} is the symbol {name}; expected livepatch symbols (.klp.sym.…) in \
                     .klp.rela.… and nowhere else",
                    reloc.offset
                ),
            ));
        }
    }
    Ok(())
}

/// Refuses relocations that change the same bytes, also where one of them is done late.
fn check_overlaps(sections: &[Section]) -> Result<()> {
    let mut homes: HashMap<usize, Vec<(u64, u64)>> = HashMap::new();
    for section in sections.iter().filter(|s| !s.relocs.is_empty()) {
        let width = |r: &Reloc| (r.offset, reloc_width(r.rtype));
        let places = homes.entry(section.home()).or_default();
        places.extend(section.relocs.iter().map(width));
    }
    for (home, mut places) in homes {
        places.sort_unstable();
        let mut end = 0;
        for (offset, width) in places {
            if offset < end {
                let name = sections.get(home).map_or("?", |s| &*s.name);
                return Err(PayloadErrorKind::malformed(
                    format!("relocations of {name}"),
                    format!("two overlap at offset {offset:#x}"),
                ));
            }
            end = offset.saturating_add(width);
        }
    }
    Ok(())
}

/// Reads one relocation of a section of `size` bytes, in a file with so many `symbols`.
fn read_reloc(
    rela: &elf::Rela64<LittleEndian>,
    size: u64,
    symbols: usize,
    place: &str,
) -> Result<Reloc> {
    let rtype = rela.r_type(LE, false).0;
    let offset = rela.r_offset(LE);
    // Too large for an index is no symbol's index either.
    let symbol = usize::try_from(rela.r_sym(LE, false)).unwrap_or(usize::MAX);
    let end = offset.checked_add(reloc_width(rtype));
    if end.is_none_or(|end| end > size) {
        return Err(PayloadErrorKind::malformed(
            place,
            format!(
                "offset {offset:#x} (type {rtype}) lies outside the section of {size:#x} bytes"
            ),
        ));
    }
    if symbol >= symbols || (symbol == 0 && rtype != 0) {
        return Err(PayloadErrorKind::malformed(
            place,
            format!(
                "offset {offset:#x}: symbol {symbol}, expected 1 to {}",
                symbols.saturating_sub(1)
            ),
        ));
    }
    Ok(Reloc {
        offset,
        rtype,
        symbol,
        addend: rela.r_addend(LE),
    })
}
