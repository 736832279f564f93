//! The modules that are loaded: what `/proc/modules` says of each and more, from the list `modules`.
//!
//! Sources: kernel/module/main.c, kernel/module/procfs.c (`m_show`) and include/linux/module.h; all
//! of them were kernel/module.c in older kernels. A module may be loaded or go while its guest
//! runs: the list is read again when a reading fails.

mod layout;
#[cfg(any(test, feature = "testing"))]
pub mod sample;
mod symbols;
#[cfg(test)]
mod tests;

use std::cell::Cell;
use std::rc::Rc;

use locus_guest::addr::{Gva, Range};
use locus_guest::fetch;
use locus_guest::space::Space;

use crate::btf::{self, Btf};
use crate::notes::build_id_note;
use crate::{list, to_usize, Error, Kernel};
use layout::{ModuleLayout, PartsLayout};
pub use symbols::ModuleSymbol;

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
    /// Loaded.
    Live,
    /// Its init function runs, or is about to.
    Loading,
    /// It is about to go.
    Unloading,
}

impl ModuleState {
    /// As `/proc/modules` prints it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            ModuleState::Live => "Live",
            ModuleState::Loading => "Loading",
            ModuleState::Unloading => "Unloading",
        }
    }
}

/// Some memory of a module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModulePart {
    /// What it is for: `core`, `init`, or the kernel's type of it such as `text`.
    pub kind: String,
    /// Where.
    pub range: Range,
}

/// A loaded module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Module {
    /// Its `struct module`.
    pub addr: Gva,
    /// Its name.
    pub name: String,
    /// Where it is in its life.
    pub state: ModuleState,
    /// Bytes of memory, as `/proc/modules` counts them.
    pub size: u64,
    /// Where its text begins, as `/proc/modules` prints it.
    pub base: Gva,
    /// All its memory.
    pub parts: Vec<ModulePart>,
    /// References to it; `None` when the kernel can't unload modules.
    pub refcount: Option<i64>,
    /// Modules that use it, in the kernel's order.
    pub used_by: Vec<String>,
    /// It can't be unloaded: it has an init function and no exit function.
    pub permanent: bool,
    /// Why it taints the kernel, as letters; empty if it does not.
    pub taints: String,
    /// Build-id of its file.
    pub build_id: Option<Vec<u8>>,
    /// Tables of the places in it that the kernel rewrites while it runs.
    pub rewritten: Vec<Rewritten>,
    kallsyms: Gva,
    exports: (Gva, u64),
    gpl_exports: Option<(Gva, u64)>,
}

/// A table of places in text that the kernel rewrites while it runs. Each entry begins with the
/// place's distance from the entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rewritten {
    /// What stands at the places, in words.
    pub what: &'static str,
    /// The table.
    pub table: Range,
    /// Size of an entry, in bytes.
    pub entry: usize,
}

/// Reads modules; what it read of page tables is only good for a moment.
#[derive(Debug)]
pub struct ModuleReader<'k, 'm> {
    kernel: &'k Kernel<'m>,
    space: Space<'m>,
    layout: ModuleLayout,
    /// Bytes that may still be read.
    left: Cell<u64>,
}

impl<'k, 'm> ModuleReader<'k, 'm> {
    /// Learns the layout from the kernel's types.
    ///
    /// # Errors
    /// The kernel has no types, or a member is missing.
    pub fn new(kernel: &'k Kernel<'m>) -> Result<ModuleReader<'k, 'm>, Error> {
        Ok(ModuleReader {
            kernel,
            space: kernel.space.fresh(),
            layout: ModuleLayout::of(kernel)?,
            left: Cell::new(BYTES_MAX),
        })
    }

    /// All modules that `/proc/modules` shows, in its order.
    ///
    /// # Errors
    /// The list has no end within bounds, or memory can't be read.
    pub fn all(&mut self) -> Result<Vec<Module>, Error> {
        self.each(|_, module| Ok(module.clone()))
    }

    /// All modules, and what `of` makes of each; all again when a module goes meanwhile.
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

    /// Takes `n` bytes from what may be read.
    fn spend(&self, n: u64) -> Result<(), Error> {
        let left = self.left.get().checked_sub(n).ok_or_else(|| {
            Error::Odd(format!(
                "its modules have more than {BYTES_MAX} bytes of symbols and types"
            ))
        })?;
        self.left.set(left);
        Ok(())
    }

    /// Reads `len` bytes within what may be read.
    fn bytes(&self, at: Gva, len: u64) -> Result<Vec<u8>, Error> {
        self.spend(len)?;
        Ok(self.space.read_vec(at, to_usize(len)?)?)
    }

    /// The module at `addr`; `None` if it is not formed yet.
    fn module(&self, addr: Gva, uses: &mut usize) -> Result<Option<Module>, Error> {
        let layout = &self.layout;
        let bytes = self.space.read_vec(addr, layout.size)?;
        let short = || {
            Error::Odd(format!(
                "struct module at {addr} is shorter than its members"
            ))
        };
        let word = |at| fetch::u64(&bytes, at).ok_or_else(short);
        let half = |at| fetch::u32(&bytes, at).ok_or_else(short);
        let state = match layout.state_of(half(layout.state)?, addr)? {
            Some(state) => state,
            None => return Ok(None),
        };
        let name = text(
            bytes.get(layout.name..).unwrap_or_default(),
            layout.name_len,
        );
        let parts = match &layout.parts {
            PartsLayout::Layouts(all) => all
                .iter()
                .map(|(kind, base, size)| {
                    let range = Range::new(Gva(word(*base)?), half(*size)?.into());
                    Ok((*kind).to_owned()).map(|kind| ModulePart { kind, range })
                })
                .collect::<Result<Vec<_>, Error>>()?,
            PartsLayout::Memory {
                at,
                stride,
                base,
                size,
                kinds,
            } => kinds
                .iter()
                .enumerate()
                .map(|(i, kind)| {
                    let at = at + i * stride;
                    let range = Range::new(Gva(word(at + base)?), half(at + size)?.into());
                    let kind = kind.clone();
                    Ok(ModulePart { kind, range })
                })
                .collect::<Result<Vec<_>, Error>>()?,
        };
        let base = parts.first().map_or(Gva(0), |p| p.range.start);
        let size = parts.iter().map(|p| p.range.len()).sum();
        let mut refcount = None;
        let mut used_by = Vec::new();
        let mut permanent = false;
        if let Some(unload) = &layout.unload {
            // One reference is the module's own (MODULE_REF_BASE).
            refcount = Some(i64::from(half(unload.refcnt)?.cast_signed()) - 1);
            let head = addr.plus(unload.source_list as u64);
            for user in list(&self.space, head, *uses)? {
                *uses = uses.saturating_sub(1);
                let source = user
                    .plus(unload.source as u64)
                    .0
                    .wrapping_sub(unload.use_list as u64);
                let source = Gva(self.space.read_u64(Gva(source))?);
                used_by.push(self.name(source)?);
            }
            permanent = word(unload.init)? != 0 && word(unload.exit)? == 0;
        }
        let build_id = match layout.build_id {
            Some((at, len)) => bytes
                .get(at..at.saturating_add(len))
                .filter(|id| id.iter().any(|&b| b != 0))
                .map(<[u8]>::to_vec),
            None => None,
        };
        let build_id = match (build_id, layout.notes.as_ref()) {
            (None, Some(notes)) => self.build_id(notes, Gva(word(notes.attrs)?))?,
            (found, _) => found,
        };
        let table = |&(what, at, count, entry): &(&'static str, usize, usize, usize)| {
            let len = u64::from(half(count)?).saturating_mul(entry as u64);
            let table = Range::new(Gva(word(at)?), len);
            Ok(Rewritten { what, table, entry })
        };
        let rewritten = layout.rewritten.iter().map(table);
        let rewritten = rewritten.collect::<Result<Vec<_>, Error>>()?;
        let gpl_exports = match layout.gpl_syms {
            Some((at, count)) => Some((Gva(word(at)?), half(count)?.into())),
            None => None,
        };
        Ok(Some(Module {
            addr,
            name,
            state,
            size,
            base,
            parts: parts.into_iter().filter(|p| p.range.len() != 0).collect(),
            refcount,
            used_by,
            permanent,
            taints: self.taints(word(layout.taints)?)?,
            build_id,
            kallsyms: Gva(word(layout.kallsyms)?),
            exports: (Gva(word(layout.syms)?), half(layout.num_syms)?.into()),
            gpl_exports,
            rewritten,
        }))
    }

    /// Bytes of the `struct module` of a live module that change before it goes, or if another takes
    /// its place: its state, its name, and where its text begins. Each is at most 64 bytes.
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
            let byte = |at: usize| entry.get(at).copied().unwrap_or(0);
            // Later kernels show all flags of a module, and the table says nothing about that.
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

    /// The build-id among the notes that `/sys/module/NAME/notes` shows (kernel/module/sysfs.c).
    fn build_id(&self, notes: &layout::NotesLayout, attrs: Gva) -> Result<Option<Vec<u8>>, Error> {
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

    /// The module's own BTF as `/sys/kernel/btf/NAME` shows it; `None` if it has none.
    ///
    /// # Errors
    /// The list `btf_modules` (kernel/bpf/btf.c) or the blob can't be read.
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

    /// The module's own types, on top of the kernel's.
    ///
    /// # Errors
    /// As [`ModuleReader::btf_bytes`], or they are not well-formed.
    pub fn btf(&self, module: &Module) -> Result<Option<Btf>, Error> {
        let Some(bytes) = self.btf_bytes(module)? else {
            return Ok(None);
        };
        let base = self.kernel.btf_shared()?;
        Btf::split(Rc::clone(base), bytes).map(Some)
    }
}

/// The text before the first NUL of the first `most` bytes; what a terminal could take for a command
/// is replaced.
pub(super) fn text(bytes: &[u8], most: usize) -> String {
    let bytes = bytes.get(..most).unwrap_or(bytes);
    let name = bytes.split(|&b| b == 0).next().unwrap_or_default();
    String::from_utf8_lossy(name)
        .chars()
        .map(|c| if c.is_control() { '?' } else { c })
        .collect()
}
