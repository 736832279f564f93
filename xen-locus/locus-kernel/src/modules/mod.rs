//! The loaded modules: what `/proc/modules` says of each and more, from the kernel's list `modules`.
//!
//! Sources: kernel/module/main.c and kernel/module/procfs.c (`m_show`), which were kernel/module.c
//! in older kernels, and include/linux/module.h. A module may come or go while its guest runs. So
//! the list is read again if reading fails.

mod layout;
mod raw;
#[cfg(any(test, feature = "testing"))]
pub mod sample;
mod symbols;
#[cfg(test)]
mod tests;

use std::cell::Cell;
use std::rc::Rc;

use locus_guest::addr::{Gva, Range};
use locus_guest::space::Space;

use self::layout::{ModuleLayout, NotesLayout, PartsLayout, TableLayout, UnloadLayout};
use self::raw::RawModule;
pub use self::symbols::ModuleSymbol;
use crate::btf::{self, Btf};
use crate::notes::build_id_note;
use crate::{list, to_usize, Error, Kernel};

/// Most modules believed.
pub const MODULES_MAX: usize = 4096;
/// Most uses of modules by others believed, all modules together.
const USES_MAX: usize = 1 << 15;
/// Most bytes of symbols, strings and types read for one listing of all modules.
const BYTES_MAX: u64 = 96 << 20;
/// Most notes of one module looked at.
const NOTES_MAX: usize = 16;
/// Longest note looked at, in bytes.
const NOTE_LEN: u64 = 4096;
/// Times the list is read before a failure is believed.
const TRIES: u32 = 3;

/// Where a module is in its life (`enum module_state`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ModuleState {
    /// It is loaded and in use.
    Live,
    /// Its init function runs, or is about to.
    Loading,
    /// It is being unloaded, or is about to be.
    Unloading,
}

impl ModuleState {
    /// The word that `/proc/modules` prints.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            ModuleState::Live => "Live",
            ModuleState::Loading => "Loading",
            ModuleState::Unloading => "Unloading",
        }
    }
}

/// A contiguous part of a module's memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModulePart {
    /// What it is for: `core`, `init`, `data`, or in kernels with `enum mod_mem_type` its name
    /// there, such as `text`.
    pub kind: String,
    /// Where it is, in guest virtual addresses.
    pub range: Range,
}

/// A loaded module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Module {
    /// Guest virtual address of its `struct module`.
    pub addr: Gva,
    /// Its name, with control characters replaced.
    pub name: String,
    /// Where it is in its life.
    pub state: ModuleState,
    /// All its memory, in bytes, as `/proc/modules` counts it.
    pub size: u64,
    /// Guest virtual address of its first part, which is text, as `/proc/modules` prints it.
    pub base: Gva,
    /// The parts of its memory that are not empty.
    pub parts: Vec<ModulePart>,
    /// References to it, without the kernel's own; `None` if the kernel can't unload modules.
    pub refcount: Option<i64>,
    /// Names of the modules that use it, in the kernel's order.
    pub used_by: Vec<String>,
    /// It can't be unloaded: it has an init function and no exit function.
    pub permanent: bool,
    /// Why it taints the kernel, as letters (Documentation/admin-guide/tainted-kernels.rst); empty
    /// if it does not.
    pub taints: String,
    /// Build-id of its file, as raw bytes.
    pub build_id: Option<Vec<u8>>,
    /// Tables of the places in it that the kernel rewrites while it runs.
    pub rewritten: Vec<Rewritten>,
    kallsyms: Gva,
    exports: (Gva, u64),
    gpl_exports: Option<(Gva, u64)>,
}

/// What [`Rewritten`] calls the branches of static keys (`struct jump_entry`, include/linux/jump_label.h).
pub const JUMP_LABEL: &str = "jump label";

/// A table of places in text that the kernel rewrites while it runs. Each entry begins with a
/// 32-bit signed distance from the entry to the place, in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rewritten {
    /// What is at the places: [`JUMP_LABEL`] or `static call`.
    pub what: &'static str,
    /// Where the table is, in guest virtual addresses.
    pub table: Range,
    /// Size of an entry, in bytes.
    pub entry: usize,
}

/// Reads modules.
///
/// It remembers what it read of page tables, and modules come and go: use a new one for each
/// listing. All that one of them reads of symbols and types is limited to 96 MiB.
#[derive(Debug)]
pub struct ModuleReader<'k, 'm> {
    kernel: &'k Kernel<'m>,
    space: Space<'m>,
    layout: ModuleLayout,
    /// Bytes that may still be read.
    left: Cell<u64>,
}

impl<'k, 'm> ModuleReader<'k, 'm> {
    /// Learns the layout of `struct module` from the kernel's types.
    ///
    /// # Errors
    /// [`Error::Missing`] if the kernel has no types, or a member is missing; [`Error::Odd`] if a
    /// size exceeds its bound.
    pub fn new(kernel: &'k Kernel<'m>) -> Result<ModuleReader<'k, 'm>, Error> {
        Ok(ModuleReader {
            kernel,
            space: kernel.space.fresh(),
            layout: ModuleLayout::of(kernel)?,
            left: Cell::new(BYTES_MAX),
        })
    }

    /// All modules that `/proc/modules` shows, in its order: the last that was loaded comes first.
    ///
    /// # Errors
    /// [`Error::Odd`] if a list has no end within bounds or a state is unknown; [`Error::Memory`]
    /// at the third try.
    pub fn all(&mut self) -> Result<Vec<Module>, Error> {
        self.each(|_, module| Ok(module.clone()))
    }

    /// What `of` makes of each module, in the order of [`ModuleReader::all`]. If memory can't be
    /// read, a module may have gone meanwhile: then all is done again, up to three times.
    ///
    /// # Errors
    /// As [`ModuleReader::all`], and those of `of`.
    pub fn each<T>(
        &mut self,
        of: impl Fn(&ModuleReader<'k, 'm>, &Module) -> Result<T, Error>,
    ) -> Result<Vec<T>, Error> {
        let mut tries = 1;
        loop {
            let read = self.list().and_then(|modules| {
                let each = modules.iter().map(|module| of(self, module));
                each.collect()
            });
            match read {
                Err(Error::Memory(_)) if tries < TRIES => tries += 1,
                read => return read,
            }
            self.space = self.kernel.space.fresh();
        }
    }

    fn list(&self) -> Result<Vec<Module>, Error> {
        let head = self.kernel.symbols.need("modules")?;
        let mut found = Vec::new();
        let mut uses = USES_MAX;
        for at in list(&self.space, head, MODULES_MAX)? {
            let addr = Gva(at.0.wrapping_sub(self.layout.list as u64));
            found.extend(self.module(addr, &mut uses)?);
        }
        Ok(found)
    }

    /// Takes `n` bytes from what may still be read.
    fn spend(&self, n: u64) -> Result<(), Error> {
        let left = self.left.get().checked_sub(n).ok_or_else(|| {
            Error::Odd(format!(
                "its modules have more than {BYTES_MAX} bytes of symbols and types"
            ))
        })?;
        self.left.set(left);
        Ok(())
    }

    /// Reads `len` bytes, if so many may still be read.
    fn bytes(&self, at: Gva, len: u64) -> Result<Vec<u8>, Error> {
        self.spend(len)?;
        Ok(self.space.read_vec(at, to_usize(len)?)?)
    }

    /// The module at `addr`; `None` if it is not formed yet. `uses` is how many uses of modules may
    /// still be read.
    fn module(&self, addr: Gva, uses: &mut usize) -> Result<Option<Module>, Error> {
        let layout = &self.layout;
        let raw = RawModule {
            addr,
            bytes: self.space.read_vec(addr, layout.size)?,
        };
        let Some(state) = layout.state_of(raw.half(layout.state)?, addr)? else {
            return Ok(None);
        };
        let parts = raw.parts(&layout.parts)?;
        let (refcount, used_by, permanent) = match &layout.unload {
            Some(unload) => {
                // One reference is the module's own (MODULE_REF_BASE).
                let count = i64::from(raw.half(unload.refcnt)?.cast_signed()) - 1;
                let permanent = raw.word(unload.init)? != 0 && raw.word(unload.exit)? == 0;
                (Some(count), self.users(unload, addr, uses)?, permanent)
            }
            None => (None, Vec::new(), false),
        };
        let table = |&TableLayout {
                         what,
                         at,
                         count,
                         entry,
                     }: &TableLayout| {
            let len = u64::from(raw.half(count)?).saturating_mul(entry as u64);
            let table = Range::new(Gva(raw.word(at)?), len);
            Ok(Rewritten { what, table, entry })
        };
        let exports = |(at, count): (usize, usize)| {
            Ok::<_, Error>((Gva(raw.word(at)?), raw.half(count)?.into()))
        };
        Ok(Some(Module {
            addr,
            name: raw.name(layout),
            state,
            size: parts.iter().map(|p| p.range.len()).sum(),
            base: parts.first().map_or(Gva(0), |p| p.range.start),
            refcount,
            used_by,
            permanent,
            taints: self.taints(raw.word(layout.taints)?)?,
            build_id: self.build_id(&raw)?,
            kallsyms: Gva(raw.word(layout.kallsyms)?),
            exports: exports((layout.syms, layout.num_syms))?,
            gpl_exports: layout.gpl_syms.map(exports).transpose()?,
            rewritten: layout
                .rewritten
                .iter()
                .map(table)
                .collect::<Result<_, Error>>()?,
            parts: parts.into_iter().filter(|p| p.range.len() != 0).collect(),
        }))
    }

    /// Names of the modules that use the one at `addr`.
    fn users(
        &self,
        unload: &UnloadLayout,
        addr: Gva,
        uses: &mut usize,
    ) -> Result<Vec<String>, Error> {
        let head = addr.plus(unload.source_list as u64);
        let mut names = Vec::new();
        for user in list(&self.space, head, *uses)? {
            *uses = uses.saturating_sub(1);
            let usage = Gva(user.0.wrapping_sub(unload.use_list as u64));
            let source = Gva(self.space.read_u64(usage.plus(unload.source as u64))?);
            names.push(self.name(source)?);
        }
        Ok(names)
    }

    /// Guest virtual addresses and bytes of a live module's `struct module` that change before the
    /// module goes, or if another takes its place: state, name, and where its text begins. Each is
    /// at most 64 bytes long. As long as all of them are the same, the module is still there.
    #[must_use]
    pub fn identity(&self, module: &Module) -> Vec<(Gva, Vec<u8>)> {
        let layout = &self.layout;
        let base = match &layout.parts {
            PartsLayout::Layouts(all) => all.first().map(|&(_, base, _)| base),
            PartsLayout::Memory { at, base, .. } => Some(at + base),
        };
        let mut name = module.name.as_bytes().to_vec();
        name.push(0);
        name.truncate(layout.name_len.min(64));
        let place = |offset: usize| module.addr.plus(offset as u64);
        let mut all = vec![
            (place(layout.state), layout.live().to_le_bytes().to_vec()),
            (place(layout.name), name),
        ];
        all.extend(base.map(|base| (place(base), module.base.0.to_le_bytes().to_vec())));
        all
    }

    fn name(&self, module: Gva) -> Result<String, Error> {
        let at = module.plus(self.layout.name as u64);
        let bytes = self.space.read_vec(at, self.layout.name_len)?;
        Ok(text(&bytes, self.layout.name_len))
    }

    /// The letters of a taint mask, from the kernel's table `taint_flags` (kernel/panic.c).
    fn taints(&self, mask: u64) -> Result<String, Error> {
        let mut letters = String::new();
        if mask == 0 {
            return Ok(letters);
        }
        for bit in (0..64u8).filter(|bit| mask & (1 << bit) != 0) {
            let Some(flags) = self.layout.taints_at else {
                letters.push('?');
                continue;
            };
            if bit >= flags.count {
                letters.push('?');
                continue;
            }
            let at = flags.at.plus(u64::from(bit) * flags.stride as u64);
            let entry = self.space.read_vec(at, flags.stride)?;
            // A member behind the end of an entry counts as unset.
            let byte = |at: usize| entry.get(at).copied().unwrap_or(0);
            // Older kernels have a member that says which flags modules may have. Later ones show all flags.
            if flags.module.is_none_or(|at| byte(at) != 0) {
                let letter = char::from(byte(flags.letter));
                letters.push(if letter.is_ascii_graphic() {
                    letter
                } else {
                    '?'
                });
            }
        }
        Ok(letters)
    }

    /// The build-id in the member `build_id`, or among the module's notes.
    fn build_id(&self, raw: &RawModule) -> Result<Option<Vec<u8>>, Error> {
        if let Some((at, len)) = self.layout.build_id {
            let id = raw.bytes.get(at..at.saturating_add(len));
            if let Some(id) = id.filter(|id| id.iter().any(|&b| b != 0)) {
                return Ok(Some(id.to_vec()));
            }
        }
        match &self.layout.notes {
            Some(notes) => self.build_id_in_notes(notes, Gva(raw.word(notes.attrs)?)),
            None => Ok(None),
        }
    }

    /// The build-id among the notes that `/sys/module/NAME/notes` shows (kernel/module/sysfs.c).
    fn build_id_in_notes(&self, notes: &NotesLayout, attrs: Gva) -> Result<Option<Vec<u8>>, Error> {
        if attrs.0 == 0 {
            return Ok(None);
        }
        let mut found = Vec::new();
        match notes.group {
            None => {
                let count = self.space.read_u32(attrs.plus(notes.count as u64))? as usize;
                for i in 0..count.min(NOTES_MAX) {
                    let offset = notes.first.saturating_add(i * notes.stride);
                    found.push(attrs.plus(offset as u64));
                }
            }
            Some(group) => {
                let table = Gva(self.space.read_u64(attrs.plus(group as u64))?);
                for i in 0..NOTES_MAX as u64 {
                    let at = self.space.read_u64(table.plus(i * 8))?;
                    if at == 0 {
                        break;
                    }
                    found.push(Gva(at));
                }
            }
        }
        for attr in found {
            let size = self.space.read_u64(attr.plus(notes.size as u64))?;
            let data = Gva(self.space.read_u64(attr.plus(notes.private as u64))?);
            if size > NOTE_LEN {
                continue;
            }
            let id = build_id_note(&self.bytes(data, size)?);
            if id.is_some() {
                return Ok(id);
            }
        }
        Ok(None)
    }

    /// The module's own BTF, as `/sys/kernel/btf/NAME` shows it; `None` if it has none. Its types
    /// continue those of the kernel.
    ///
    /// # Errors
    /// [`Error::Odd`] if it is too long, or the list `btf_modules` (kernel/bpf/btf.c) has no end;
    /// [`Error::Memory`].
    pub fn btf_bytes(&self, module: &Module) -> Result<Option<Vec<u8>>, Error> {
        let (Some(types), Some(head)) =
            (&self.layout.types, self.kernel.symbols.addr("btf_modules"))
        else {
            return Ok(None);
        };
        for at in list(&self.space, head, MODULES_MAX)? {
            let word = |offset: usize| {
                self.space
                    .read_u64(Gva(at.0.wrapping_sub(types.list as u64)).plus(offset as u64))
            };
            if Gva(word(types.module)?) != module.addr {
                continue;
            }
            let btf = Gva(word(types.btf)?);
            let data = Gva(self.space.read_u64(btf.plus(types.data as u64))?);
            let len = self.space.read_u32(btf.plus(types.data_size as u64))?;
            if len as usize > btf::BYTES_MAX {
                return Err(Error::Odd(format!(
                    "the types of module {} are {len} bytes; expected at most {}",
                    module.name,
                    btf::BYTES_MAX
                )));
            }
            return Ok(Some(self.bytes(data, len.into())?));
        }
        Ok(None)
    }

    /// The module's own types, on top of the kernel's; `None` if it has none.
    ///
    /// # Errors
    /// As [`ModuleReader::btf_bytes`], and [`Error::Odd`] if they are not well-formed.
    pub fn btf(&self, module: &Module) -> Result<Option<Btf>, Error> {
        let Some(bytes) = self.btf_bytes(module)? else {
            return Ok(None);
        };
        let base = self.kernel.btf_shared()?;
        Btf::split(Rc::clone(base), bytes).map(Some)
    }
}

/// The text before the first NUL of the first `most` bytes. Control characters are replaced,
/// because a terminal could take them for a command.
pub(super) fn text(bytes: &[u8], most: usize) -> String {
    let bytes = bytes.get(..most).unwrap_or(bytes);
    // A split has one part at least.
    let name = bytes.split(|&b| b == 0).next().unwrap_or_default();
    String::from_utf8_lossy(name)
        .chars()
        .map(|c| if c.is_control() { '?' } else { c })
        .collect()
}
