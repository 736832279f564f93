//! Differences between a guest's memory and the records of its patches, as values.

use locus_guest::addr::Gva;

/// The part of a patch that is not as recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DriftKind {
    /// The redirect: the five bytes in a function that lead to its replacement.
    Redirect,
    /// The bytes before the redirect: ftrace's nop.
    Entry,
    /// A payload's code.
    Code,
    /// A payload's constants.
    Constants,
    /// A page-table entry of the arena.
    Page,
    /// The payload among the guest's modules.
    Module,
    /// The record itself, compared with the audit log.
    Record,
}

/// The cause of a difference, as far as the guest's own tables show it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DriftCause {
    /// A tracer of the guest.
    Ftrace,
    /// A kprobe of the guest.
    Kprobe,
    /// A livepatch of the guest's own.
    Livepatch,
    /// A BPF program of the guest.
    Bpf,
    /// Not known: the guest, or a process in the control domain with access to its memory.
    Unknown,
}

impl DriftKind {
    /// Its name in JSON.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            DriftKind::Redirect => "redirect",
            DriftKind::Entry => "entry",
            DriftKind::Code => "code",
            DriftKind::Constants => "constants",
            DriftKind::Page => "page",
            DriftKind::Module => "module",
            DriftKind::Record => "record",
        }
    }
}

impl DriftCause {
    /// Its name in JSON.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            DriftCause::Ftrace => "ftrace",
            DriftCause::Kprobe => "kprobe",
            DriftCause::Livepatch => "livepatch",
            DriftCause::Bpf => "bpf",
            DriftCause::Unknown => "unknown",
        }
    }
}

/// A difference between a guest's memory and the records of its patches.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Drift {
    /// Name of the patch.
    pub patch: String,
    /// The part that differs.
    pub what: DriftKind,
    /// Address of its first byte in the guest's kernel.
    pub at: Gva,
    /// Name of the function, for a difference in one.
    pub function: Option<String>,
    /// The recorded value, for people.
    pub expected: String,
    /// The value in the guest's memory, for people.
    pub found: String,
    /// The cause.
    pub by: DriftCause,
}
