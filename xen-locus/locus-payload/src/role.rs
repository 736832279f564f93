//! What each section of a module is for, told by its name and flags.
//!
//! The names are those of the kernel's module loader: `kernel/module/main.c`,
//! `arch/x86/kernel/module.c` and `scripts/module.lds.S` of Linux.

use object::elf::{self, SectionType};
use serde::Serialize;

/// What a section is for, and thus what a loader does with it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Role {
    /// Section 0 of every ELF file.
    Null,
    /// Code that is placed in the guest.
    Text,
    /// Constants that are placed in the guest.
    RoData,
    /// Initialised variables that are placed in the guest, also those that become read-only after init.
    Data,
    /// Zeroed variables that are placed in the guest.
    Bss,
    /// Code of `module_init`; never placed.
    InitText,
    /// Data of `module_init`; never placed.
    InitData,
    /// Code of `module_exit`; never placed.
    ExitText,
    /// Data of `module_exit`; never placed.
    ExitData,
    /// `.modinfo`: `key=value` strings.
    Modinfo,
    /// `__versions`, `__version_ext_*`: CRCs of the exported symbols that are used.
    Versions,
    /// `.gnu.linkonce.this_module`: the `struct module`.
    ThisModule,
    /// `__mcount_loc` or `__patchable_function_entries`: where `__fentry__` is called.
    Mcount,
    /// `.return_sites`: jumps to `__x86_return_thunk`.
    ReturnSites,
    /// `.retpoline_sites`: indirect branches through a thunk.
    RetpolineSites,
    /// `.call_sites`: calls that call-depth tracking instruments.
    CallSites,
    /// `.ibt_endbr_seal`: `endbr64` instructions that may be removed.
    IbtSeal,
    /// `.cfi_sites`, `__cfi`: kernel control-flow integrity.
    CfiSites,
    /// `.altinstructions`, `.altinstr_replacement`.
    Altinstructions,
    /// `.parainstructions`: paravirt call sites.
    Parainstructions,
    /// `.smp_locks`: `lock` prefixes, for a machine with one CPU.
    SmpLocks,
    /// `__ex_table`: exception fixups.
    ExTable,
    /// `__bug_table`: `BUG` and `WARN` sites.
    BugTable,
    /// `__jump_table`: static key branches.
    JumpTable,
    /// `.static_call_sites`: static calls.
    StaticCalls,
    /// `.static_call.text`, `.static_call_tramp_key`: trampolines of the module's own static calls.
    StaticCallTramp,
    /// `.orc_unwind` and `.orc_header`: unwind data.
    OrcUnwind,
    /// `.orc_unwind_ip`: addresses for the unwind data.
    OrcUnwindIp,
    /// `__tracepoints*`, `_ftrace_events`, `__bpf_raw_tp_map`, …: tracepoints of the module's own.
    Tracepoints,
    /// `.data..percpu`: per-CPU variables of the module's own.
    Percpu,
    /// `__ksymtab*`, `__kcrctab*`: symbols that the module exports.
    Ksymtab,
    /// `__param`: module parameters.
    Param,
    /// `.ctors`, `.init_array`: constructors, run when the module is loaded.
    Constructors,
    /// `__dyndbg`: dynamic debug messages, which the code refers to. They are placed, but the kernel does
    /// not know them, so they can't be switched on.
    DynamicDebug,
    /// `.printk_index`, `.BTF`, `.BTF_ids`, …: read by tools and tracers, not by the code.
    Index,
    /// `.klp.rela.OBJ.SEC`: relocations that are done when OBJ is loaded.
    KlpRela {
        /// The kernel object that the symbols come from: `vmlinux` or a module's name.
        object: String,
        /// ELF index of the section that is relocated.
        target: usize,
    },
    /// `.klp.arch.*`: late alternatives and paravirt sites of kernels before 5.8.
    KlpArch,
    /// ELF notes, such as the build-id.
    Note,
    /// ELF's own tables: symbols, strings, ordinary relocations, groups.
    Table,
    /// Debug information, comments and everything else that is not loaded. Contents are not kept.
    NonAlloc,
    /// Loaded, and of unknown purpose; or of a known name, with a type or flags that no such section has.
    Unknown,
}

impl Role {
    /// True for code and data of replacement functions, which are placed in the guest.
    #[must_use]
    pub fn is_placed(&self) -> bool {
        matches!(
            self,
            Self::Text | Self::RoData | Self::Data | Self::Bss | Self::DynamicDebug
        )
    }

    /// True for tables about code that is placed, which a loader reads and which may name what the code does not: a static
    /// key's symbol occurs in `__jump_table` alone.
    #[must_use]
    pub fn is_table_of_code(&self) -> bool {
        matches!(
            self,
            Self::JumpTable
                | Self::ExTable
                | Self::BugTable
                | Self::Altinstructions
                | Self::StaticCalls
        )
    }

    /// True for tables of which the kernel takes one of each name, the first or the last.
    pub(super) fn is_single(&self) -> bool {
        matches!(
            self,
            Self::Versions
                | Self::Mcount
                | Self::ReturnSites
                | Self::RetpolineSites
                | Self::CallSites
                | Self::IbtSeal
                | Self::CfiSites
                | Self::Altinstructions
                | Self::Parainstructions
                | Self::SmpLocks
                | Self::ExTable
                | Self::BugTable
                | Self::JumpTable
                | Self::StaticCalls
                | Self::OrcUnwind
                | Self::OrcUnwindIp
                | Self::DynamicDebug
        )
    }

    /// True for code and data that only `module_init` and `module_exit` use. They are never placed.
    #[must_use]
    pub fn is_init_or_exit(&self) -> bool {
        matches!(
            self,
            Self::InitText | Self::InitData | Self::ExitText | Self::ExitData
        )
    }

    /// Name of the role, as in JSON.
    #[must_use]
    pub fn label(&self) -> &'static str {
        match self {
            Self::Null => "null",
            Self::Text => "text",
            Self::RoData => "ro_data",
            Self::Data => "data",
            Self::Bss => "bss",
            Self::InitText => "init_text",
            Self::InitData => "init_data",
            Self::ExitText => "exit_text",
            Self::ExitData => "exit_data",
            Self::Modinfo => "modinfo",
            Self::Versions => "versions",
            Self::ThisModule => "this_module",
            Self::Mcount => "mcount",
            Self::ReturnSites => "return_sites",
            Self::RetpolineSites => "retpoline_sites",
            Self::CallSites => "call_sites",
            Self::IbtSeal => "ibt_seal",
            Self::CfiSites => "cfi_sites",
            Self::Altinstructions => "altinstructions",
            Self::Parainstructions => "parainstructions",
            Self::SmpLocks => "smp_locks",
            Self::ExTable => "ex_table",
            Self::BugTable => "bug_table",
            Self::JumpTable => "jump_table",
            Self::StaticCalls => "static_calls",
            Self::StaticCallTramp => "static_call_tramp",
            Self::OrcUnwind => "orc_unwind",
            Self::OrcUnwindIp => "orc_unwind_ip",
            Self::Tracepoints => "tracepoints",
            Self::Percpu => "percpu",
            Self::Ksymtab => "ksymtab",
            Self::Param => "param",
            Self::Constructors => "constructors",
            Self::DynamicDebug => "dynamic_debug",
            Self::Index => "index",
            Self::KlpRela { .. } => "klp_rela",
            Self::KlpArch => "klp_arch",
            Self::Note => "note",
            Self::Table => "table",
            Self::NonAlloc => "non_alloc",
            Self::Unknown => "unknown",
        }
    }

    /// For a section that the kernel's module loader acts on: what has to be done, in a few words. A loader
    /// that does not do the same must refuse the payload.
    #[must_use]
    pub fn needs(&self) -> Option<&'static str> {
        Some(match self {
            Self::StaticCallTramp => "static calls of its own have to be registered",
            Self::Tracepoints => "tracepoints have to be registered with the kernel",
            Self::Percpu => "per-CPU variables have to be allocated in the guest",
            Self::Ksymtab => "exported symbols have to be registered with the kernel",
            Self::Param => "module parameters need a loaded module",
            Self::Constructors => "constructors have to be run in the guest",
            Self::CfiSites => "control-flow integrity sites have to be patched",
            Self::KlpArch => "late alternatives are a format of kernels before 5.8",
            Self::Unknown => {
                "what the kernel would do with a section of this name, type and flags is not known"
            }
            _ => return None,
        })
    }
}

/// The flags of a section, `sh_flags`, that say how it is loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct SectionFlags {
    /// In memory when the module is loaded (`SHF_ALLOC`).
    pub alloc: bool,
    /// May be written (`SHF_WRITE`).
    pub write: bool,
    /// May be executed (`SHF_EXECINSTR`).
    pub exec: bool,
}

/// True for `base`, and for `base.anything`.
fn family(name: &str, base: &str) -> bool {
    name.strip_prefix(base)
        .is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}

/// What type and flags a section must have to be what its name says.
#[derive(Clone, Copy)]
enum Shape {
    /// Contents that are loaded and do not run.
    Table,
    /// Code that is loaded and is not written.
    Code,
    /// Variables, which may be without contents in the file.
    Variables,
    /// Contents that do not run, loaded or not.
    Notes,
    /// A name that is refused whatever the rest is.
    Any,
}

impl Shape {
    fn fits(self, kind: SectionType, flags: SectionFlags) -> bool {
        let contents = kind == elf::SHT_PROGBITS;
        match self {
            // Whether a table may be written differs between kernels, and changes nothing of what they do with it.
            Self::Table => contents && flags.alloc && !flags.exec,
            Self::Code => contents && flags.alloc && flags.exec && !flags.write,
            Self::Variables => (contents || kind == elf::SHT_NOBITS) && flags.alloc && !flags.exec,
            Self::Notes => contents && !flags.exec,
            Self::Any => true,
        }
    }
}

/// Tells the role of a section that has no livepatch relocations in it.
///
/// The name comes first, because the kernel's loader goes by names, mostly without a look at type and flags
/// (`find_sec`, kernel/module/main.c; `module_finalize`, arch/x86/kernel/module.c). Of a known name with a type or flags
/// that no such section has, it can't be told what that does: it is [`Role::Unknown`].
pub(super) fn classify(name: &str, kind: SectionType, flags: SectionFlags) -> Role {
    if let Some((role, shape)) = classify_known(name, flags) {
        return match shape.fits(kind, flags) {
            true => role,
            // The kernel passes over variables that are not to be loaded.
            false if !flags.alloc && matches!(shape, Shape::Variables) => Role::NonAlloc,
            false => Role::Unknown,
        };
    }
    let own_table = matches!(
        kind,
        elf::SHT_SYMTAB
            | elf::SHT_STRTAB
            | elf::SHT_RELA
            | elf::SHT_REL
            | elf::SHT_GROUP
            | elf::SHT_SYMTAB_SHNDX
    );
    if !flags.alloc {
        return match kind {
            elf::SHT_NULL => Role::Null,
            _ if own_table => Role::Table,
            _ => Role::NonAlloc,
        };
    }
    let variables = flags.write && !flags.exec && is_variables(name);
    let constants = family(name, ".rodata") || family(name, ".data.rel.ro");
    match kind {
        elf::SHT_PROGBITS if flags.exec && !flags.write && is_text(name) => Role::Text,
        elf::SHT_PROGBITS if variables => Role::Data,
        elf::SHT_NOBITS if variables => Role::Bss,
        elf::SHT_PROGBITS if constants && !flags.exec => Role::RoData,
        elf::SHT_NOTE if family(name, ".note") && !flags.exec && !flags.write => Role::Note,
        _ => Role::Unknown,
    }
}

fn is_text(name: &str) -> bool {
    let special = [
        ".noinstr.text",
        ".ref.text",
        ".sched.text",
        ".spinlock.text",
        ".cpuidle.text",
        ".kprobes.text",
        ".entry.text",
        ".irqentry.text",
        // Code of alternatives that is too long for its place.
        ".altinstr_aux",
        // Code that runs after a fault, until Linux kernel commit e5eefda5aa51 ("x86: Remove .fixup
        // section") (in v5.17).
        ".fixup",
        ".softirqentry.text",
    ];
    family(name, ".text") || special.contains(&name)
}

/// Variables. `.rodata` too, because some compilers make constants with relocations writable.
fn is_variables(name: &str) -> bool {
    [".data", ".bss", ".rodata", ".ref.data"]
        .iter()
        .any(|base| family(name, base))
}

/// Sections that the kernel treats by name alone, and what they must be like.
fn classify_known(name: &str, flags: SectionFlags) -> Option<(Role, Shape)> {
    use Shape::{Any, Code, Notes, Table, Variables};
    Some(match name {
        ".modinfo" => (Role::Modinfo, Notes),
        "__versions" | "__version_ext_crcs" | "__version_ext_names" => (Role::Versions, Table),
        ".gnu.linkonce.this_module" => (Role::ThisModule, Table),
        "__mcount_loc" | "__patchable_function_entries" => (Role::Mcount, Table),
        ".return_sites" => (Role::ReturnSites, Table),
        ".retpoline_sites" => (Role::RetpolineSites, Table),
        ".call_sites" => (Role::CallSites, Table),
        ".ibt_endbr_seal" => (Role::IbtSeal, Table),
        ".cfi_sites" | "__cfi" | ".kcfi_traps" => (Role::CfiSites, Table),
        ".altinstructions" => (Role::Altinstructions, Table),
        ".altinstr_replacement" => (Role::Altinstructions, Code),
        ".parainstructions" => (Role::Parainstructions, Table),
        ".smp_locks" => (Role::SmpLocks, Table),
        "__ex_table" => (Role::ExTable, Table),
        "__bug_table" => (Role::BugTable, Table),
        "__jump_table" => (Role::JumpTable, Table),
        ".static_call_sites" => (Role::StaticCalls, Table),
        ".static_call.text" | ".static_call_tramp_key" => (Role::StaticCallTramp, Any),
        ".orc_unwind" | ".orc_header" => (Role::OrcUnwind, Table),
        ".orc_unwind_ip" => (Role::OrcUnwindIp, Table),
        "_ftrace_events"
        | "_ftrace_eval_map"
        | "__bpf_raw_tp_map"
        | "_error_injection_whitelist"
        | "_kprobe_blacklist"
        | "__trace_printk_fmt"
        | "__syscalls_metadata" => (Role::Tracepoints, Any),
        "__param" | "__modver" => (Role::Param, Any),
        ".ctors" => (Role::Constructors, Any),
        "__dyndbg" | "__dyndbg_classes" => (Role::DynamicDebug, Table),
        // The last one is read when a kernel is built: include/linux/tracepoint.h, TRACEPOINT_CHECK.
        ".printk_index" | ".BTF" | ".BTF_ids" | ".BTF.base" | "__tracepoint_check" => {
            (Role::Index, Notes)
        }
        n if n.starts_with("__tracepoints") => (Role::Tracepoints, Any),
        n if n.starts_with("__ksymtab") || n.starts_with("__kcrctab") => (Role::Ksymtab, Any),
        n if family(n, ".data..percpu") => (Role::Percpu, Any),
        n if family(n, ".init_array") => (Role::Constructors, Any),
        n if n.starts_with(".klp.arch.") => (Role::KlpArch, Any),
        // The tables of kpatch-build; code that it adds to the module refers to them.
        n if family(n, ".kpatch") && flags.alloc => match flags.write {
            true => (Role::Data, Table),
            false => (Role::RoData, Table),
        },
        n if family(n, ".init.text") || family(n, ".meminit.text") => (Role::InitText, Code),
        n if [".init.data", ".init.rodata", ".init.bss", ".init.setup"]
            .iter()
            .any(|base| family(n, base)) =>
        {
            (Role::InitData, Variables)
        }
        n if family(n, ".exit.text") => (Role::ExitText, Code),
        n if family(n, ".exit.data") || family(n, ".exit.rodata") => (Role::ExitData, Variables),
        _ => return None,
    })
}

#[cfg(test)]
mod tests;
