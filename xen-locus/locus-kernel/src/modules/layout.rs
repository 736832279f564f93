//! Where the members of `struct module` and its relatives are, from BTF.

use locus_guest::addr::Gva;

use super::ModuleState;
use super::JUMP_LABEL;
use crate::btf::Btf;
use crate::{Error, Kernel};

/// Largest `struct module` believed, in bytes.
const SIZE_MAX: usize = 64 << 10;
/// Longest believed array of a module's memory.
const PARTS_MAX: usize = 32;
/// Longest believed module and symbol names, in bytes.
const NAME_MAX: usize = 4096;
/// Number of taint flags believed: the mask has 64 bits.
const TAINTS_MAX: u64 = 64;

/// Offsets in `struct module` in bytes, unless they say otherwise.
#[derive(Debug)]
pub(super) struct ModuleLayout {
    pub size: usize,
    pub state: usize,
    pub list: usize,
    pub name: usize,
    pub name_len: usize,
    pub taints: usize,
    pub parts: PartsLayout,
    /// `None` without `CONFIG_MODULE_UNLOAD`.
    pub unload: Option<UnloadLayout>,
    pub build_id: Option<(usize, usize)>,
    pub notes: Option<NotesLayout>,
    pub kallsyms: usize,
    pub syms: usize,
    pub num_syms: usize,
    /// Exports for GPL modules, where they stand in a table of their own.
    pub gpl_syms: Option<(usize, usize)>,
    /// Tables of places that the kernel rewrites.
    pub rewritten: Vec<TableLayout>,
    pub symbols: SymbolTableLayout,
    pub types: Option<BtfListLayout>,
    pub taints_at: Option<TaintTable>,
    /// Values of `enum module_state`: live, coming, going, unformed.
    states: [i64; 4],
    /// The first of them, as the member has it.
    live: u32,
}

/// A table of places that the kernel rewrites.
#[derive(Debug)]
pub(super) struct TableLayout {
    /// What is at the places.
    pub what: &'static str,
    /// Offsets of the pointer to the table, and of its number of entries.
    pub at: usize,
    pub count: usize,
    /// Size of an entry, in bytes.
    pub entry: usize,
}

/// How the kernel describes a module's memory.
#[derive(Debug)]
pub(super) enum PartsLayout {
    /// `core_layout`, `init_layout`: what for, offsets of base and size.
    Layouts(Vec<(&'static str, usize, usize)>),
    /// `mem[]` since Linux kernel commit ac3b43283923 ("module: replace module_layout with
    /// module_memory") (in v6.4).
    Memory {
        at: usize,
        stride: usize,
        base: usize,
        size: usize,
        kinds: Vec<String>,
    },
}

#[derive(Debug)]
pub(super) struct UnloadLayout {
    pub refcnt: usize,
    pub source_list: usize,
    pub init: usize,
    pub exit: usize,
    /// In `module_use`: its link in `source_list`, and the module that uses.
    pub use_list: usize,
    pub source: usize,
}

/// `notes_attrs` and what it points at.
#[derive(Debug)]
pub(super) struct NotesLayout {
    pub attrs: usize,
    /// In `module_notes_attrs`: number of notes, first of them.
    pub count: usize,
    pub first: usize,
    /// In `module_notes_attrs`: pointer to a table of pointers to notes, in kernels that do not
    /// count them.
    pub group: Option<usize>,
    /// Of and in `bin_attribute`.
    pub stride: usize,
    pub size: usize,
    pub private: usize,
}

/// `mod_kallsyms` and `kernel_symbol`.
#[derive(Debug)]
pub(super) struct SymbolTableLayout {
    pub symtab: usize,
    pub num_symtab: usize,
    pub strtab: usize,
    pub typetab: usize,
    /// Longest name `/proc/kallsyms` shows, in bytes.
    pub name_len: usize,
    pub export_size: usize,
    pub export_value: usize,
    pub export_name: usize,
    /// The two are offsets from their own place.
    pub export_relative: bool,
}

/// `btf_module` and `btf`.
#[derive(Debug)]
pub(super) struct BtfListLayout {
    pub list: usize,
    pub module: usize,
    pub btf: usize,
    pub data: usize,
    pub data_size: usize,
}

/// The table `taint_flags`.
#[derive(Clone, Copy, Debug)]
pub(super) struct TaintTable {
    pub at: Gva,
    pub stride: usize,
    pub count: u8,
    pub letter: usize,
    pub module: Option<usize>,
}

impl ModuleLayout {
    pub fn of(kernel: &Kernel<'_>) -> Result<ModuleLayout, Error> {
        let btf = kernel.btf()?;
        let member = |path| btf.offset_of("module", path);
        let sized = |path, bytes| btf.offset_of_sized("module", path, bytes);
        let state = |name| {
            btf.enum_value("module_state", name)
                .ok_or_else(|| Error::Missing(format!("{name} in enum module_state in BTF")))
        };
        let live = state("MODULE_STATE_LIVE")?;
        Ok(ModuleLayout {
            live: u32::try_from(live).map_err(|_| {
                Error::Odd(format!("MODULE_STATE_LIVE is {live}; expected 32 bits"))
            })?,
            size: bounded(btf.size_of("module")?, "struct module", SIZE_MAX)?,
            state: sized("state", 4)?,
            list: member("list")?,
            name: member("name")?,
            name_len: bounded(btf.array_len("module", "name")?, "module.name", NAME_MAX)?,
            taints: sized("taints", 8)?,
            parts: parts(btf)?,
            unload: match btf.has("module", "source_list") {
                false => None,
                true => Some(UnloadLayout {
                    refcnt: sized("refcnt", 4)?,
                    source_list: member("source_list")?,
                    init: sized("init", 8)?,
                    exit: sized("exit", 8)?,
                    use_list: btf.offset_of("module_use", "source_list")?,
                    source: btf.offset_of_sized("module_use", "source", 8)?,
                }),
            },
            build_id: match btf.has("module", "build_id") {
                false => None,
                true => Some((member("build_id")?, btf.array_len("module", "build_id")?)),
            },
            notes: notes(btf).ok(),
            kallsyms: sized("kallsyms", 8)?,
            syms: sized("syms", 8)?,
            num_syms: sized("num_syms", 4)?,
            gpl_syms: match btf.has("module", "gpl_syms") {
                false => None,
                true => Some((sized("gpl_syms", 8)?, sized("num_gpl_syms", 4)?)),
            },
            rewritten: rewritten(btf)?,
            symbols: symbols(btf)?,
            types: types(btf).ok(),
            taints_at: taints(kernel, btf),
            states: [
                live,
                state("MODULE_STATE_COMING")?,
                state("MODULE_STATE_GOING")?,
                state("MODULE_STATE_UNFORMED")?,
            ],
        })
    }

    /// The value of the state of a live module.
    pub fn live(&self) -> u32 {
        self.live
    }

    /// The state of the module at `addr`; `None` while it is not formed.
    pub fn state_of(&self, value: u32, addr: Gva) -> Result<Option<ModuleState>, Error> {
        match self.states.iter().position(|&s| s == i64::from(value)) {
            Some(0) => Ok(Some(ModuleState::Live)),
            Some(1) => Ok(Some(ModuleState::Loading)),
            Some(2) => Ok(Some(ModuleState::Unloading)),
            Some(_) => Ok(None),
            None => Err(Error::Odd(format!(
                "the module at {addr} is in state {value}; expected one of {:?}",
                self.states
            ))),
        }
    }
}

fn bounded(found: usize, what: &str, most: usize) -> Result<usize, Error> {
    if found == 0 || found > most {
        return Err(Error::Odd(format!(
            "{what} has {found} bytes or elements; expected 1 to {most}"
        )));
    }
    Ok(found)
}

fn parts(btf: &Btf) -> Result<PartsLayout, Error> {
    if btf.has("module", "mem") {
        let count = bounded(btf.array_len("module", "mem")?, "module.mem", PARTS_MAX)?;
        let kinds = (0..).take(count).map(|i| {
            let name = btf.enum_name("mod_mem_type", i);
            let name = name.unwrap_or_else(|| i.to_string()).to_lowercase();
            name.strip_prefix("mod_").unwrap_or(&name).to_owned()
        });
        return Ok(PartsLayout::Memory {
            at: btf.offset_of("module", "mem")?,
            stride: bounded(btf.size_of("module_memory")?, "module_memory", SIZE_MAX)?,
            base: btf.offset_of_sized("module_memory", "base", 8)?,
            size: btf.offset_of_sized("module_memory", "size", 4)?,
            kinds: kinds.collect(),
        });
    }
    let mut all = Vec::new();
    for (kind, name) in [
        ("core", "core_layout"),
        ("init", "init_layout"),
        ("data", "data_layout"),
    ] {
        if kind == "data" && !btf.has("module", name) {
            continue;
        }
        let base = btf.offset_of_sized("module", &format!("{name}.base"), 8)?;
        let size = btf.offset_of_sized("module", &format!("{name}.size"), 4)?;
        all.push((kind, base, size));
    }
    Ok(PartsLayout::Layouts(all))
}

/// `jump_entries` and `static_call_sites` of `struct module`, where the kernel has them.
fn rewritten(btf: &Btf) -> Result<Vec<TableLayout>, Error> {
    let mut found = Vec::new();
    // Sizes of `struct jump_entry` and `struct static_call_site`.
    for (what, table, count, entry) in [
        (JUMP_LABEL, "jump_entries", "num_jump_entries", 16),
        (
            "static call",
            "static_call_sites",
            "num_static_call_sites",
            8,
        ),
    ] {
        if btf.has("module", table) {
            let (at, count) = (
                btf.offset_of_sized("module", table, 8)?,
                btf.offset_of_sized("module", count, 4)?,
            );
            found.push(TableLayout {
                what,
                at,
                count,
                entry,
            });
        }
    }
    Ok(found)
}

fn notes(btf: &Btf) -> Result<NotesLayout, Error> {
    let of = |path| btf.offset_of("module_notes_attrs", path);
    let counted = btf.has("module_notes_attrs", "notes");
    Ok(NotesLayout {
        attrs: btf.offset_of_sized("module", "notes_attrs", 8)?,
        count: if counted {
            btf.offset_of_sized("module_notes_attrs", "notes", 4)?
        } else {
            0
        },
        first: of("attrs")?,
        group: if counted {
            None
        } else {
            Some(btf.offset_of_sized("module_notes_attrs", "grp.bin_attrs", 8)?)
        },
        stride: bounded(btf.size_of("bin_attribute")?, "bin_attribute", SIZE_MAX)?,
        size: btf.offset_of_sized("bin_attribute", "size", 8)?,
        private: btf.offset_of_sized("bin_attribute", "private", 8)?,
    })
}

fn symbols(btf: &Btf) -> Result<SymbolTableLayout, Error> {
    let table = |path| btf.offset_of_sized("mod_kallsyms", path, 8);
    let relative = btf.has("kernel_symbol", "value_offset");
    let bytes = if relative { 4 } else { 8 };
    let export = |path| btf.offset_of_sized("kernel_symbol", path, bytes);
    // What /proc/kallsyms can hold of a name (kernel/kallsyms.c). Kernels without the type have at most this.
    let name_len = btf.array_len("kallsym_iter", "name").unwrap_or(512);
    Ok(SymbolTableLayout {
        symtab: table("symtab")?,
        num_symtab: btf.offset_of_sized("mod_kallsyms", "num_symtab", 4)?,
        strtab: table("strtab")?,
        typetab: table("typetab")?,
        name_len: bounded(name_len, "kallsym_iter.name", NAME_MAX)?,
        export_size: bounded(btf.size_of("kernel_symbol")?, "kernel_symbol", 64)?,
        export_value: export(if relative { "value_offset" } else { "value" })?,
        export_name: export(if relative { "name_offset" } else { "name" })?,
        export_relative: relative,
    })
}

fn types(btf: &Btf) -> Result<BtfListLayout, Error> {
    let of = |path| btf.offset_of_sized("btf_module", path, 8);
    Ok(BtfListLayout {
        list: btf.offset_of("btf_module", "list")?,
        module: of("module")?,
        btf: of("btf")?,
        data: btf.offset_of_sized("btf", "data", 8)?,
        data_size: btf.offset_of_sized("btf", "data_size", 4)?,
    })
}

fn taints(kernel: &Kernel<'_>, btf: &Btf) -> Option<TaintTable> {
    let at = kernel.symbols.addr("taint_flags")?;
    let stride = bounded(btf.size_of("taint_flag").ok()?, "taint_flag", 64).ok()?;
    let room = kernel.symbols.room(at)? / stride as u64;
    Some(TaintTable {
        at,
        stride,
        count: u8::try_from(room.min(TAINTS_MAX)).ok()?,
        letter: btf.offset_of_sized("taint_flag", "c_true", 1).ok()?,
        module: btf.offset_of_sized("taint_flag", "module", 1).ok(),
    })
}
