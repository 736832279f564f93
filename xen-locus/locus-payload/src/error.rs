//! What can be wrong with a payload file. Each message says what was expected, what was found, and what to
//! do.

use std::path::PathBuf;

/// Result of reading one part of a payload.
pub(super) type Result<T> = std::result::Result<T, PayloadErrorKind>;

/// The error that a payload can't be used, with the name of its file.
#[derive(Debug, thiserror::Error)]
#[error("{file}: {kind}")]
pub struct PayloadError {
    /// The file's path, or the label that [`Payload::parse`](super::Payload::parse) was given.
    pub file: String,
    /// What is wrong with it.
    #[source]
    pub kind: PayloadErrorKind,
}

/// What is wrong with a payload file. The message says what was expected, what was found, where, and what to
/// do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PayloadErrorKind {
    /// The file could not be opened or read.
    #[error("can't read the payload: {source}; check the path and its permissions")]
    Io {
        /// The path that was tried.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The path names a directory, a device, a pipe or a socket.
    #[error("not a regular file; give the path of a livepatch module (.ko)")]
    NotAFile,
    /// More of something than any real payload has.
    #[error("too big: {what} is {found}, at most {max} is accepted; is this a livepatch module?")]
    TooBig {
        /// What was counted.
        what: &'static str,
        /// Number or size in bytes that was found.
        found: u64,
        /// Largest number or size that is accepted.
        max: u64,
    },
    /// The file does not begin with the magic bytes of ELF.
    #[error("not an ELF file: expected 7f 45 4c 46 at its beginning, found {found}; {advice}")]
    NotElf {
        /// What the first bytes are, and what they look like.
        found: String,
        /// What to do about it.
        advice: &'static str,
    },
    /// The file ends before something that its headers refer to.
    #[error("truncated: {what} needs {need} bytes, the file has {have}; copy or build it again")]
    Truncated {
        /// What lies beyond the end of the file.
        what: String,
        /// Length of a file that would hold it, in bytes.
        need: u64,
        /// Length of the file, in bytes.
        have: u64,
    },
    /// 32-bit or unknown ELF class, or big-endian.
    #[error(
        "wrong ELF class or byte order: expected 64-bit little-endian, found {found}; \
         build the payload for the guest's x86-64 kernel"
    )]
    WrongClass {
        /// What the identification bytes say.
        found: &'static str,
    },
    /// Not for x86-64.
    #[error(
        "wrong machine: expected x86-64 (62), found {name} ({found}); \
         build the payload for the guest's x86-64 kernel"
    )]
    WrongMachine {
        /// `e_machine`.
        found: u16,
        /// Its usual name.
        name: &'static str,
    },
    /// An executable, a shared library or a core dump.
    #[error(
        "not a relocatable object: expected ELF type 1, found {name} ({found}); \
         give the module (.ko) that kbuild makes"
    )]
    NotRelocatable {
        /// `e_type`.
        found: u16,
        /// Its usual name.
        name: &'static str,
    },
    /// A field of the ELF structures can't be right.
    #[error("malformed ELF: {place}: {problem}; the file is damaged or not made by kbuild")]
    Malformed {
        /// Section, symbol or table.
        place: String,
        /// What was expected and what was found.
        problem: String,
    },
    /// No `.modinfo` section: an object file, not a module.
    #[error(
        "not a kernel module: no .modinfo section; give the finished module (.ko), not an object \
         file (.o)"
    )]
    NoModinfo,
    /// `.modinfo` is there, but an entry is missing or can't be right.
    #[error("bad .modinfo: {problem}; build the module again with kbuild")]
    BadModinfo {
        /// What was expected and what was found.
        problem: String,
    },
    /// A module that is not a livepatch.
    #[error(
        "not a livepatch: module {module} {found}; a livepatch has MODULE_INFO(livepatch, \"Y\") \
         and a struct klp_patch"
    )]
    NotLivepatch {
        /// The module's name.
        module: String,
        /// Which sign of a livepatch is missing.
        found: &'static str,
    },
    /// A livepatch, as `.modinfo` says, without a readable `struct klp_patch`.
    #[error(
        "module {module} says livepatch, but no struct klp_patch can be read in it: {reasons}"
    )]
    NoKlpPatch {
        /// The module's name.
        module: String,
        /// Why each candidate was not one.
        reasons: String,
    },
    /// Two structures could be the `struct klp_patch`.
    #[error(
        "ambiguous: the structures at {first} and {second} both look like struct klp_patch; \
         a payload has exactly one"
    )]
    AmbiguousKlpPatch {
        /// Section and offset of the first.
        first: String,
        /// Section and offset of the second.
        second: String,
    },
    /// Both in the form of kernel sources and in that of kpatch-build.
    #[error(
        "module {module} has a struct klp_patch and the tables of kpatch-build (.kpatch.funcs): which of \
         them it enables can't be told; leave one of them out"
    )]
    TwoForms {
        /// The module's name.
        module: String,
    },
    /// Built by kpatch-build for kpatch's own module.
    #[error(
        "made for kpatch's own module kpatch.ko, not for livepatch (section .kpatch.dynrelas); \
         build it with kpatch-build for a kernel with CONFIG_LIVEPATCH"
    )]
    KpatchCore,
    /// A structure of livepatch or kpatch was found, and can't be right.
    #[error("bad {structure} at {place}: {problem}")]
    Klp {
        /// `struct klp_patch`, `struct klp_object` or `struct klp_func`.
        structure: &'static str,
        /// Section and offset.
        place: String,
        /// What was expected and what was found, and what to do.
        problem: String,
    },
}

impl PayloadErrorKind {
    /// True if the file can't be read or is damaged. All other kinds are whole files of the wrong sort.
    #[must_use]
    pub fn is_damage(&self) -> bool {
        matches!(
            self,
            Self::Io { .. }
                | Self::NotAFile
                | Self::TooBig { .. }
                | Self::NotElf { .. }
                | Self::Truncated { .. }
                | Self::Malformed { .. }
                | Self::BadModinfo { .. }
        )
    }

    /// Shorthand for [`PayloadErrorKind::Malformed`].
    pub(super) fn malformed(place: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Malformed {
            place: place.into(),
            problem: problem.into(),
        }
    }

    /// Shorthand for [`PayloadErrorKind::BadModinfo`].
    pub(super) fn modinfo(problem: impl Into<String>) -> Self {
        Self::BadModinfo {
            problem: problem.into(),
        }
    }
}

/// Checks a count or a size against its limit.
pub(super) fn limit(what: &'static str, found: u64, max: u64) -> Result<()> {
    if found > max {
        return Err(PayloadErrorKind::TooBig { what, found, max });
    }
    Ok(())
}
