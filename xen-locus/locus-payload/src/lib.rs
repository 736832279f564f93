//! Payload files: reads a livepatch module (`.ko`) and says what it changes.
//!
//! Nothing here knows a guest or Xen: a file goes in, a plain checked structure comes out.
//!
//! ```text
//! file -> ident    is it an ELF file for x86-64, and relocatable?
//!      -> elf      sections (role: what each is for) and relocations, all bounds checked
//!      -> symbol   symbols, livepatch symbols too
//!      -> modinfo  name, kernel, license, is it a livepatch?
//!      -> klp      struct klp_patch and what hangs off it (deref: pointers through relocations)
//!      or kpatch   the tables that kpatch-build writes in its place
//!      -> Payload, and of it a Summary for people
//! ```
//!
//! A file is garbage until proven otherwise: each count and size has a limit, arithmetic is
//! checked, and no input can cause a panic. Formats: `Documentation/livepatch/
//! module-elf-format.rst` and `include/linux/livepatch.h` of Linux, and the x86-64 ELF ABI.
#![forbid(unsafe_code)]
#![deny(clippy::print_stderr)]

use std::fs::File;
use std::io::Read;
use std::path::Path;

use sha2::{Digest, Sha256};

mod deref;
mod elf;
mod error;
mod ident;
mod klp;
mod kpatch;
mod modinfo;
mod role;
mod summary;
mod symbol;
#[cfg(any(test, feature = "testing"))]
pub mod testelf;
mod versions;

#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_hostile;

pub use elf::{Reloc, Section};
pub use error::{PayloadError, PayloadErrorKind};
pub use klp::{Klp, KlpFunc, KlpObject};
pub use modinfo::{is_module_name, Modinfo};
pub use role::{Role, SectionFlags};
pub use summary::{Concern, FunctionSummary, ObjectSummary, RoleSummary, Summary};
pub use symbol::{Binding, KlpSym, SymKind, SymSection, Symbol};

/// Largest payload file, and largest sum of the sizes of its loaded sections, in bytes.
pub const MAX_FILE: u64 = 64 << 20;
/// Most sections.
pub const MAX_SECTIONS: u64 = 4096;
/// Most symbols.
pub const MAX_SYMBOLS: u64 = 1 << 20;
/// Most relocations, not counting those of debug information.
pub const MAX_RELOCS: u64 = 1 << 20;
/// Longest name of a section, symbol, object or function, in bytes.
pub const MAX_NAME: u64 = 512;

/// A livepatch module, read and checked.
#[derive(Debug, Clone)]
pub struct Payload {
    /// Name: 1 to 55 of `A-Z a-z 0-9 _ -`.
    pub name: String,
    /// SHA-256 of the file.
    pub sha256: [u8; 32],
    /// Length of the file in bytes.
    pub file_len: u64,
    /// What the module says about itself.
    pub modinfo: Modinfo,
    /// All sections, by ELF index.
    pub sections: Vec<Section>,
    /// All symbols, by ELF index.
    pub symbols: Vec<Symbol>,
    /// What is replaced.
    pub klp: Klp,
    /// Build id of the payload itself (not of the kernel it is for).
    pub build_id: Option<Vec<u8>>,
}

impl Payload {
    /// Reads a payload file.
    ///
    /// # Errors
    ///
    /// If the file can't be read, is larger than [`MAX_FILE`], or is no livepatch module.
    pub fn read(path: &Path) -> Result<Self, PayloadError> {
        let file = path.display().to_string();
        let stem = path
            .file_stem()
            .map(|s| s.to_string_lossy().replace('-', "_"));
        load(path)
            .and_then(|bytes| read_payload(&bytes, stem.as_deref()))
            .map_err(|kind| PayloadError { file, kind })
    }

    /// Reads a payload from memory; `label` stands for its file in error messages.
    ///
    /// # Errors
    ///
    /// If this is no livepatch module, or larger than [`MAX_FILE`].
    pub fn parse(label: &str, bytes: &[u8]) -> Result<Self, PayloadError> {
        read_payload(bytes, None).map_err(|kind| PayloadError {
            file: label.to_owned(),
            kind,
        })
    }

    /// The section with an ELF index.
    #[must_use]
    pub fn section(&self, index: usize) -> Option<&Section> {
        self.sections.get(index)
    }

    /// The symbol with an ELF index.
    #[must_use]
    pub fn symbol(&self, index: usize) -> Option<&Symbol> {
        self.symbols.get(index)
    }

    /// Sections of code and data that replacement functions are made of and that are not empty.
    pub fn placed(&self) -> impl Iterator<Item = &Section> {
        self.sections
            .iter()
            .filter(|s| s.role.is_placed() && s.size > 0)
    }

    /// Symbols of the kernel or of modules that placed code and data refer to, by ELF index.
    #[must_use]
    pub fn needed_symbols(&self) -> Vec<usize> {
        let mut needed: Vec<usize> = self
            .sections
            .iter()
            .filter(|section| match section.role {
                Role::KlpRela { target, .. } => {
                    self.section(target).is_some_and(|t| t.role.is_placed())
                }
                _ => section.role.is_placed(),
            })
            .flat_map(|section| section.relocs.iter())
            .filter(|reloc| {
                self.symbol(reloc.symbol).is_some_and(|s| {
                    matches!(s.section, SymSection::Undefined | SymSection::Livepatch)
                })
            })
            .map(|reloc| reloc.symbol)
            .filter(|symbol| *symbol != 0)
            .collect();
        needed.sort_unstable();
        needed.dedup();
        needed
    }
}

fn load(path: &Path) -> error::Result<Vec<u8>> {
    let io = |source| PayloadErrorKind::Io {
        path: path.to_owned(),
        source,
    };
    // Asked before opening: opening a pipe would wait for its other end.
    let metadata = std::fs::metadata(path).map_err(io)?;
    if !metadata.is_file() {
        return Err(PayloadErrorKind::NotAFile);
    }
    error::limit("the file", metadata.len(), MAX_FILE)?;
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(io)?;
    let read = file
        .take(MAX_FILE.saturating_add(1))
        .read_to_end(&mut bytes)
        .map_err(io)?;
    error::limit("the file", read as u64, MAX_FILE)?;
    Ok(bytes)
}

fn read_payload(bytes: &[u8], stem: Option<&str>) -> error::Result<Payload> {
    error::limit("the file", bytes.len() as u64, MAX_FILE)?;
    let (sections, symbols) = elf::parse(bytes)?;
    let mut infos = sections.iter().filter(|s| s.role == Role::Modinfo);
    let modinfo = match (infos.next(), infos.next()) {
        (Some(section), None) => Modinfo::parse(&section.data)?,
        (None, _) => return Err(PayloadErrorKind::NoModinfo),
        _ => return Err(PayloadErrorKind::modinfo("there are several such sections")),
    };
    let name = module_name(&modinfo, &sections, stem)?;
    let kpatch = kpatch::find(&sections, &symbols)?;
    if !modinfo.livepatch {
        let found = if symbols.iter().any(|s| s.name == "klp_enable_patch") {
            "calls klp_enable_patch but has no livepatch entry in .modinfo"
        } else {
            "has no livepatch entry in .modinfo"
        };
        return Err(PayloadErrorKind::NotLivepatch {
            module: name,
            found,
        });
    }
    if !sections.iter().any(|s| s.role == Role::ThisModule) {
        let found = "has no section .gnu.linkonce.this_module";
        return Err(PayloadErrorKind::NotLivepatch {
            module: name,
            found,
        });
    }
    let klp = match kpatch {
        Some(klp) => klp,
        None => klp::find(&sections, &symbols, &name)?,
    };
    Ok(Payload {
        name,
        sha256: Sha256::digest(bytes).into(),
        file_len: bytes.len() as u64,
        modinfo,
        build_id: build_id(&sections),
        sections,
        symbols,
        klp,
    })
}

/// The module's name: from `.modinfo`, else from its `struct module`, else from the file's name.
fn module_name(
    modinfo: &Modinfo,
    sections: &[Section],
    stem: Option<&str>,
) -> error::Result<String> {
    if let Some(name) = &modinfo.name {
        return Ok(name.clone());
    }
    // struct module starts with an enum and a list head, then the name.
    let inside = sections
        .iter()
        .find(|s| s.role == Role::ThisModule)
        .and_then(|s| s.data.get(24..80))
        .and_then(|field| field.split(|b| *b == 0).next())
        .and_then(|name| std::str::from_utf8(name).ok())
        .filter(|name| modinfo::is_module_name(name));
    match inside.or(stem) {
        Some(name) => modinfo::check_name(name).map(|()| name.to_owned()),
        None => Err(PayloadErrorKind::modinfo(
            "no name, and none in struct module",
        )),
    }
}

/// The build id in `.note.gnu.build-id`: a note of owner `GNU` and type 3.
fn build_id(sections: &[Section]) -> Option<Vec<u8>> {
    let section = sections
        .iter()
        .find(|s| s.role == Role::Note && s.name == ".note.gnu.build-id")?;
    let word = |at: usize| {
        let bytes = section.data.get(at..at.checked_add(4)?)?;
        Some(u32::from_le_bytes(bytes.try_into().ok()?))
    };
    if word(0)? != 4 || word(8)? != 3 || section.data.get(12..16)? != b"GNU\0" {
        return None;
    }
    let len = usize::try_from(word(4)?)
        .ok()
        .filter(|len| (1..=64).contains(len))?;
    section
        .data
        .get(16..16usize.checked_add(len)?)
        .map(<[u8]>::to_vec)
}
