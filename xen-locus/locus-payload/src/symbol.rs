//! The symbol table of a relocatable ELF file.

use object::elf;
use object::endian::LittleEndian;
use object::read::elf::{SectionHeader, Sym};
use serde::Serialize;

use super::elf::{bad, text, Section, Shdr, LE};
use super::error::{limit, PayloadErrorKind, Result};
use super::MAX_SYMBOLS;

/// `SHN_LIVEPATCH` of `include/uapi/linux/elf.h`.
const SHN_LIVEPATCH: u16 = 0xff20;

/// A symbol (`Elf64_Sym`). Its index in [`Payload::symbols`](super::Payload::symbols) is its ELF index.
#[derive(Debug, Clone)]
pub struct ElfSymbol {
    /// ELF symbol index.
    pub index: usize,
    /// Name, of printable characters; that of the section for a section's symbol.
    pub name: String,
    /// Offset in its section in bytes, or the value of an absolute symbol, or the alignment of a common
    /// one in bytes.
    pub value: u64,
    /// Size in bytes, 0 if unknown.
    pub size: u64,
    /// Where it is defined (`st_shndx`).
    pub section: SymSection,
    /// Whether other files see it (`st_info`).
    pub binding: Binding,
    /// What it is the name of (`st_info`).
    pub kind: SymKind,
    /// For [`SymSection::Livepatch`], and only then: the symbol that its name asks for.
    pub klp: Option<KlpSym>,
}

/// Where a symbol is defined: the section index of its entry, `st_shndx`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum SymSection {
    /// In the kernel or another module.
    Undefined,
    /// In the section with this ELF index.
    Section(usize),
    /// In no section: its value is the address.
    Absolute,
    /// Uninitialised and not yet allocated (`SHN_COMMON`); kernel modules don't have these.
    Common,
    /// `SHN_LIVEPATCH`: in the object that [`ElfSymbol::klp`] names.
    Livepatch,
}

/// Binding of a symbol: whether other files see it. Source: the ELF specification, `STB_*`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Binding {
    /// Seen in this file only.
    Local,
    /// Seen in all files.
    Global,
    /// As global; if it stays undefined, its value is 0.
    Weak,
    /// Any other value.
    Other(u8),
}

/// Type of a symbol: what it is the name of. Source: the ELF specification, `STT_*`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum SymKind {
    /// Not given, as for undefined symbols.
    NoType,
    /// A variable.
    Object,
    /// A function.
    Func,
    /// A section itself.
    Section,
    /// A source file.
    File,
    /// Any other value.
    Other(u8),
}

/// What a symbol named `.klp.sym.OBJECT.SYMBOL,POS` asks for.
///
/// Source: `Documentation/livepatch/module-elf-format.rst` of Linux.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct KlpSym {
    /// `vmlinux` or a module's name.
    pub object: String,
    /// Name of the symbol in that object.
    pub symbol: String,
    /// 0 if the name is unique in the object, else the number of its occurrence, from 1.
    pub sympos: u64,
}

/// The index of the one symbol table.
pub(super) fn single_table(headers: &[Shdr]) -> Result<usize> {
    let mut found = headers
        .iter()
        .enumerate()
        .filter(|(_, s)| s.sh_type(LE) == elf::SHT_SYMTAB);
    match (found.next(), found.next()) {
        (Some((index, _)), None) => Ok(index),
        (None, _) => Err(PayloadErrorKind::malformed(
            "symbol table",
            "there is none; don't strip a module of more than its debug information",
        )),
        _ => Err(PayloadErrorKind::malformed(
            "symbol table",
            "there are several, expected one",
        )),
    }
}

/// Reads all symbols of the table in section `symtab`.
pub(super) fn read(
    bytes: &[u8],
    headers: &[Shdr],
    symtab: usize,
    sections: &[Section],
) -> Result<Vec<ElfSymbol>> {
    let shdr = headers
        .get(symtab)
        .ok_or_else(|| PayloadErrorKind::malformed("symbol table", "there is none"))?;
    if shdr.sh_entsize(LE) != 24 || shdr.sh_size(LE) % 24 != 0 {
        return Err(PayloadErrorKind::malformed(
            "symbol table",
            "its entries are not of 24 bytes",
        ));
    }
    limit("the number of symbols", shdr.sh_size(LE) / 24, MAX_SYMBOLS)?;
    let raw: &[elf::Sym64<LittleEndian>] = shdr
        .data_as_array(LE, bytes)
        .map_err(|e| bad("symbol table", &e))?;
    let strings = usize::try_from(shdr.sh_link(LE))
        .ok()
        .and_then(|index| headers.get(index))
        .filter(|s| s.sh_type(LE) == elf::SHT_STRTAB)
        .map(|s| s.strings(LE, bytes))
        .transpose()
        .map_err(|e| bad("symbol names", &e))?
        .flatten()
        .ok_or_else(|| PayloadErrorKind::malformed("symbol table", "it has no string table"))?;

    let mut symbols = Vec::with_capacity(raw.len());
    let mut names = 0u64;
    for (index, sym) in raw.iter().enumerate() {
        let place = || format!("symbol {index}");
        let name = sym.name(LE, strings).map_err(|e| bad(place(), &e))?;
        names = names.saturating_add(name.len() as u64);
        // Symbols may share names, but a file of their size holds all names of a real one.
        limit(
            "the total length of symbol names",
            names,
            bytes.len() as u64,
        )?;
        symbols.push(read_symbol(index, text(name, &place)?, sym, sections)?);
    }
    Ok(symbols)
}

/// Reads symbol number `index`, and checks that it lies in its section.
fn read_symbol(
    index: usize,
    name: String,
    sym: &elf::Sym64<LittleEndian>,
    sections: &[Section],
) -> Result<ElfSymbol> {
    let fail = |problem: String| {
        Err(PayloadErrorKind::malformed(
            format!("symbol {index} ({name})"),
            problem,
        ))
    };
    let (value, size) = (sym.st_value(LE), sym.st_size(LE));
    let kind = match sym.st_type() {
        elf::STT_NOTYPE => SymKind::NoType,
        elf::STT_OBJECT => SymKind::Object,
        elf::STT_FUNC => SymKind::Func,
        elf::STT_SECTION => SymKind::Section,
        elf::STT_FILE => SymKind::File,
        other => SymKind::Other(other.0),
    };
    let binding = match sym.st_bind() {
        elf::STB_LOCAL => Binding::Local,
        elf::STB_GLOBAL => Binding::Global,
        elf::STB_WEAK => Binding::Weak,
        other => Binding::Other(other.0),
    };
    let section = match sym.st_shndx(LE).0 {
        0 => SymSection::Undefined,
        0xfff1 => SymSection::Absolute,
        0xfff2 => SymSection::Common,
        SHN_LIVEPATCH => SymSection::Livepatch,
        shndx => match sections.get(usize::from(shndx)) {
            Some(section) if shndx < 0xff00 => {
                let end = value.checked_add(size);
                if section.flags.alloc && end.is_none_or(|end| end > section.size) {
                    return fail(format!(
                        "{size:#x} bytes at {value:#x} lie outside its section {} of {:#x} bytes",
                        section.name, section.size
                    ));
                }
                SymSection::Section(usize::from(shndx))
            }
            _ => {
                return fail(format!(
                    "section index {shndx:#x}, expected one of {} sections",
                    sections.len()
                ))
            }
        },
    };
    let klp = parse_klp_sym(&name);
    if (section == SymSection::Livepatch) != klp.is_some() {
        return fail(
            "livepatch symbols have the section index 0xff20 and a name .klp.sym.OBJECT.SYMBOL,POS; \
             this has only one of them"
                .into(),
        );
    }
    let of_section = match section {
        SymSection::Section(home) if kind == SymKind::Section => sections.get(home),
        _ => None,
    };
    let name = of_section.map_or(name, |s| s.name.clone());
    Ok(ElfSymbol {
        index,
        name,
        value,
        size,
        section,
        binding,
        kind,
        klp,
    })
}

/// What a name `.klp.sym.OBJECT.SYMBOL,POS` asks for; `None` for any other name.
fn parse_klp_sym(name: &str) -> Option<KlpSym> {
    let (object, rest) = name.strip_prefix(".klp.sym.")?.split_once('.')?;
    let (symbol, sympos) = rest.split_once(',')?;
    if object.is_empty() || symbol.is_empty() || !sympos.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    Some(KlpSym {
        object: object.into(),
        symbol: symbol.into(),
        sympos: sympos.parse().ok()?,
    })
}
