//! Payload files: reads a livepatch module (`.ko`) of Linux and says what it changes.
//!
//! This crate knows neither a guest nor Xen. A file goes in, and a checked structure without pointers
//! comes out.
//!
//! ```no_run
//! use std::path::Path;
//!
//! use locus_payload::{Payload, PayloadError};
//!
//! fn print_functions(path: &Path) -> Result<(), PayloadError> {
//!     let payload = Payload::read(path)?;
//!     for object in &payload.klp.objects {
//!         let object_name = object.name.as_deref().unwrap_or("vmlinux");
//!         for func in &object.funcs {
//!             println!("{object_name}:{} ({} bytes)", func.old_name, func.new_size);
//!         }
//!     }
//!     // What a loader must handle, or else refuse the payload.
//!     for concern in payload.concerns() {
//!         println!("{}: {}", concern.subject, concern.reason);
//!     }
//!     Ok(())
//! }
//! ```
//!
//! Files, in the order of the data:
//!
//! ```text
//! file -> ident        is it an ELF file for x86-64, and relocatable?
//!      -> elf          sections (role: what each is for) and relocations, all bounds checked
//!      -> symbol       symbols, livepatch symbols too
//!      -> modinfo      name, kernel, license, is it a livepatch?
//!      -> klp          struct klp_patch and what it points at (pointers: through relocations)
//!      or kpatch       the tables that kpatch-build writes instead
//!      -> lib          Payload
//!      -> init         what module_init does besides
//!      -> modversions  CRCs of the kernel's exported symbols
//!      -> summary      Summary for people and JSON, and what a loader must handle
//! error                what can be wrong, and what to do
//! testelf              payloads for tests (feature `testing`)
//! ```
//!
//! A file is garbage until proven otherwise: each count and size has a limit, arithmetic is checked, and
//! no input can cause a panic. Formats: `Documentation/livepatch/module-elf-format.rst` and
//! `include/linux/livepatch.h` of Linux, and the x86-64 ELF ABI.
#![forbid(unsafe_code)]
#![deny(clippy::print_stderr)]

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use object::elf::{FileHeader64, NT_GNU_BUILD_ID};
use object::read::elf::NoteIterator;
use object::LittleEndian;
use sha2::{Digest, Sha256};

mod elf;
mod error;
mod ident;
mod init;
mod klp;
mod kpatch;
mod modinfo;
mod modversions;
mod pointers;
mod role;
mod summary;
mod symbol;
#[cfg(any(test, feature = "testing"))]
pub mod testelf;

#[cfg(test)]
mod tests;

pub use elf::{Reloc, Section};
pub use error::{PayloadError, PayloadErrorKind};
pub use init::HOOK_REPLACE;
pub use klp::{Klp, KlpFunc, KlpObject};
pub use modinfo::{is_module_name, Modinfo};
pub use role::{Role, SectionFlags};
pub use summary::{Concern, FunctionSummary, ObjectSummary, RoleSummary, Summary};
pub use symbol::{Binding, ElfSymbol, KlpSym, SymKind, SymSection};

/// Largest payload file, and largest sum of the sizes of its loaded sections, in bytes. Contents that are kept, and
/// names of symbols, are together no more than the file has each.
pub const MAX_FILE: u64 = 64 << 20;
/// Most sections of a file.
pub const MAX_SECTIONS: u64 = 4096;
/// Most symbols of a file.
pub const MAX_SYMBOLS: u64 = 1 << 20;
/// Most relocations of a file, without those of debug information.
pub const MAX_RELOCS: u64 = 1 << 20;
/// Longest name of a section, symbol, object or function, in bytes.
pub const MAX_NAME: u64 = 512;
/// Longest build id of a payload, in bytes; linkers make 20.
const MAX_BUILD_ID: usize = 64;

/// A livepatch module, read and checked. Indexes in it are of sections and symbols that exist.
#[derive(Debug, Clone)]
pub struct Payload {
    /// Name of the module: 1 to 55 of `A-Z a-z 0-9 _ -`.
    pub name: String,
    /// SHA-256 of the whole file.
    pub sha256: [u8; 32],
    /// Length of the file in bytes.
    pub file_len: u64,
    /// What the module says about itself in `.modinfo`.
    pub modinfo: Modinfo,
    /// All sections; the place of each is its ELF index.
    pub sections: Vec<Section>,
    /// All symbols; the place of each is its ELF index.
    pub symbols: Vec<ElfSymbol>,
    /// The functions that it replaces.
    pub klp: Klp,
    /// Build id of the payload itself (not of the kernel it is for).
    pub build_id: Option<Vec<u8>>,
}

impl Payload {
    /// Reads the payload file at `path`.
    ///
    /// # Errors
    ///
    /// The file can't be read, is larger than [`MAX_FILE`], or is not a livepatch module that can be read.
    /// The error names the file.
    pub fn read(path: &Path) -> Result<Self, PayloadError> {
        let file = path.display().to_string();
        let stem = path
            .file_stem()
            .map(|s| s.to_string_lossy().replace('-', "_"));
        load(path)
            .and_then(|bytes| read_payload(&bytes, stem.as_deref()))
            .map_err(|kind| PayloadError { file, kind })
    }

    /// Reads a payload from memory. Errors name `label` as its file.
    ///
    /// # Errors
    ///
    /// `bytes` are not a livepatch module that can be read, or are more than [`MAX_FILE`].
    pub fn parse(label: &str, bytes: &[u8]) -> Result<Self, PayloadError> {
        read_payload(bytes, None).map_err(|kind| PayloadError {
            file: label.to_owned(),
            kind,
        })
    }

    /// The section with the ELF index `index`.
    #[must_use]
    pub fn section(&self, index: usize) -> Option<&Section> {
        self.sections.get(index)
    }

    /// The symbol with the ELF index `index`.
    #[must_use]
    pub fn symbol(&self, index: usize) -> Option<&ElfSymbol> {
        self.symbols.get(index)
    }

    /// The sections that are placed in the guest: code and data of replacement functions, not empty.
    pub fn placed(&self) -> impl Iterator<Item = &Section> {
        self.sections
            .iter()
            .filter(|s| s.role.is_placed() && s.size > 0)
    }

    /// ELF indexes of the symbols of the kernel or of modules that placed code and data refer to, or tables about them, sorted.
    #[must_use]
    pub fn needed_symbols(&self) -> Vec<usize> {
        let refers = |role: &Role| role.is_placed() || role.is_table_of_code();
        let mut needed: Vec<usize> = self
            .sections
            .iter()
            .filter(|section| match section.role {
                Role::KlpRela { target, .. } => {
                    self.section(target).is_some_and(|t| refers(&t.role))
                }
                _ => refers(&section.role),
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

/// The bytes of the file at `path`, at most [`MAX_FILE`].
fn load(path: &Path) -> error::Result<Vec<u8>> {
    let io = |source| PayloadErrorKind::Io {
        path: path.to_owned(),
        source,
    };
    // Of a pipe, an ordinary open would wait for its other end.
    let file = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .map_err(io)?;
    let metadata = file.metadata().map_err(io)?;
    if !metadata.is_file() {
        return Err(PayloadErrorKind::NotAFile);
    }
    error::limit("the file", metadata.len(), MAX_FILE)?;
    let mut bytes = Vec::new();
    let read = file
        .take(MAX_FILE.saturating_add(1))
        .read_to_end(&mut bytes)
        .map_err(io)?;
    error::limit("the file", read as u64, MAX_FILE)?;
    Ok(bytes)
}

/// Reads a whole payload. `stem` is its file name, for a module that names itself nowhere.
fn read_payload(bytes: &[u8], stem: Option<&str>) -> error::Result<Payload> {
    error::limit("the file", bytes.len() as u64, MAX_FILE)?;
    let (sections, symbols) = elf::parse(bytes)?;
    let modinfo = sections.iter().find(|s| s.role == Role::Modinfo);
    let modinfo = Modinfo::parse(&modinfo.ok_or(PayloadErrorKind::NoModinfo)?.data)?;
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
    let modules = sections.iter().filter(|s| s.role == Role::ThisModule);
    let found = match modules.count() {
        1 => None,
        0 => Some("has no section .gnu.linkonce.this_module"),
        _ => Some("has several sections .gnu.linkonce.this_module, of which the kernel takes one"),
    };
    if let Some(found) = found {
        return Err(PayloadErrorKind::NotLivepatch {
            module: name,
            found,
        });
    }
    let klp = match (kpatch, klp::find(&sections, &symbols, &name)) {
        (None, found) => found?,
        (Some(klp), Err(PayloadErrorKind::NoKlpPatch { .. })) => klp,
        (Some(_), _) => return Err(PayloadErrorKind::TwoForms { module: name }),
    };
    let mut payload = Payload {
        name,
        sha256: Sha256::digest(bytes).into(),
        file_len: bytes.len() as u64,
        modinfo,
        build_id: build_id(&sections),
        sections,
        symbols,
        klp,
    };
    if payload.klp.place.is_none() {
        payload.klp.replace = init::replace(&payload);
    }
    Ok(payload)
}

/// Name of the module: from `.modinfo`, else from its `struct module`, else from the name of the file.
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

/// The build id in `.note.gnu.build-id`: its first note, of owner `GNU` and type 3.
fn build_id(sections: &[Section]) -> Option<Vec<u8>> {
    let section = sections
        .iter()
        .find(|s| s.role == Role::Note && s.name == ".note.gnu.build-id")?;
    let mut notes =
        NoteIterator::<FileHeader64<LittleEndian>>::new(elf::LE, 4, &section.data).ok()?;
    let note = notes.next().ok()??;
    let is_build_id = note.name_bytes() == b"GNU\0" && note.n_type(elf::LE) == NT_GNU_BUILD_ID;
    (is_build_id && (1..=MAX_BUILD_ID).contains(&note.desc().len())).then(|| note.desc().to_vec())
}
