//! Symbols of modules, as `/proc/kallsyms` shows them behind the kernel's own.
//!
//! Sources: kernel/module/kallsyms.c (`module_get_kallsym`), which was part of kernel/module.c in
//! older kernels, and kernel/kallsyms.c (`s_show`). The type is an upper-case letter if the
//! module's table `syms` has the symbol with the same value. Kernels with a table of their own for
//! GPL exports, `gpl_syms`, don't search it, so those stay lower-case.

use std::collections::HashSet;

use locus_guest::addr::Gva;
use locus_guest::fetch;

use super::{Error, Module, ModuleReader};

/// Size of an `Elf64_Sym`, in bytes.
const ELF_SYM: usize = 24;
/// Most symbols of one module believed.
const SYMBOLS_MAX: u64 = 1 << 18;
/// Most exports of one module believed.
const EXPORTS_MAX: u64 = 1 << 16;
/// Longest string table of one module believed, in bytes.
const STRINGS_MAX: u64 = 32 << 20;

/// A symbol of a module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModuleSymbol {
    /// Its name, of printable ASCII; each other character is replaced by `?`.
    pub name: String,
    /// Its type as `/proc/kallsyms` prints it: upper case if the module exports it.
    pub kind: char,
    /// Its guest virtual address.
    pub addr: Gva,
    /// Whether its ELF binding is global or weak, which means not local to one source file.
    pub global: bool,
}

impl ModuleReader<'_, '_> {
    /// The symbols of `module` that `/proc/kallsyms` shows, in its order.
    ///
    /// # Errors
    /// [`Error::Odd`] if a table exceeds its bound, [`Error::Memory`].
    pub fn symbols(&self, module: &Module) -> Result<Vec<ModuleSymbol>, Error> {
        let layout = &self.layout.symbols;
        if module.kallsyms.0 == 0 {
            return Ok(Vec::new());
        }
        let head = |offset: usize| module.kallsyms.plus(offset as u64);
        let count = u64::from(self.space.read_u32(head(layout.num_symtab))?);
        believable(module, "symbols", count, SYMBOLS_MAX)?;
        if count == 0 {
            return Ok(Vec::new());
        }
        let pointer = |offset: usize| self.space.read_u64(head(offset)).map(Gva);
        let table = self.bytes(pointer(layout.symtab)?, count * ELF_SYM as u64)?;
        let types = self.bytes(pointer(layout.typetab)?, count)?;
        let strings = self.strings(module, pointer(layout.strtab)?, &table)?;
        let exports = self.exports(module, module.exports)?;
        let mut found = Vec::new();
        for (entry, &kind) in table.chunks_exact(ELF_SYM).zip(&types) {
            let (Some(name), Some(&info), Some(value)) =
                (fetch::u32(entry, 0), entry.get(4), fetch::u64(entry, 8))
            else {
                continue;
            };
            // A name behind the end of the strings is empty, and passed over.
            let name = strings.get(name as usize..).unwrap_or_default();
            let name = symbol_name(name, layout.name_len - 1);
            if name.is_empty() {
                continue;
            }
            // Many names may begin in one long string.
            self.spend(name.len() as u64)?;
            let key = (value, name);
            let kind = if exports.contains(&key) {
                kind.to_ascii_uppercase()
            } else {
                kind.to_ascii_lowercase()
            };
            found.push(ModuleSymbol {
                name: key.1,
                kind: char::from(kind),
                addr: Gva(value),
                global: info >> 4 != 0,
            });
        }
        Ok(found)
    }

    /// What `module` exports, to all modules or to those under the GPL: names and guest virtual
    /// addresses, sorted by name.
    ///
    /// # Errors
    /// As [`ModuleReader::symbols`].
    pub fn exported(&self, module: &Module) -> Result<Vec<(String, Gva)>, Error> {
        let mut all = self.exports(module, module.exports)?;
        if let Some(table) = module.gpl_exports {
            all.extend(self.exports(module, table)?);
        }
        let mut all: Vec<_> = all.into_iter().map(|(at, name)| (name, Gva(at))).collect();
        all.sort();
        Ok(all)
    }

    /// The string table as far as `symbols` refer to it. The kernel does not store its length.
    fn strings(&self, module: &Module, at: Gva, symbols: &[u8]) -> Result<Vec<u8>, Error> {
        let last = symbols
            .chunks_exact(ELF_SYM)
            .filter_map(|entry| fetch::u32(entry, 0))
            .max()
            .unwrap_or(0); // no symbols refer to nothing
        believable(module, "bytes of symbol names", last.into(), STRINGS_MAX)?;
        let mut strings = self.bytes(at, last.into())?;
        let most = self.layout.symbols.name_len;
        let mut at = at.plus(last.into());
        // The last name may end right before a page that is not there.
        for _ in 0..most {
            let n = (64 - at.0 % 64).min(most as u64);
            let part = self.bytes(at, n)?;
            let end = part.contains(&0);
            strings.extend(part);
            if end || strings.len() > last as usize + most {
                break;
            }
            at = at.plus(n);
        }
        Ok(strings)
    }

    /// Value and name of what a table of exports lists: its address, and how many.
    fn exports(
        &self,
        module: &Module,
        (at, count): (Gva, u64),
    ) -> Result<HashSet<(u64, String)>, Error> {
        let layout = &self.layout.symbols;
        believable(module, "exports", count, EXPORTS_MAX)?;
        let size = layout.export_size;
        let table = self.bytes(at, count * size as u64)?;
        let mut found = HashSet::new();
        for (i, entry) in table.chunks_exact(size).enumerate() {
            let place = at.plus((i * size) as u64);
            let target = |offset: usize| {
                if layout.export_relative {
                    let distance = fetch::u32(entry, offset)?.cast_signed();
                    let place = place.plus(offset as u64);
                    Some(place.0.wrapping_add_signed(distance.into()))
                } else {
                    fetch::u64(entry, offset)
                }
            };
            let (Some(value), Some(name)) =
                (target(layout.export_value), target(layout.export_name))
            else {
                continue;
            };
            self.spend(layout.name_len as u64)?;
            let name = self.space.read_cstr(Gva(name), 2 * layout.name_len)?;
            found.insert((value, symbol_name(name.as_bytes(), layout.name_len - 1)));
        }
        Ok(found)
    }
}

/// The name in the first `most` bytes. Those of symbols are printable ASCII.
fn symbol_name(bytes: &[u8], most: usize) -> String {
    super::text(bytes, most).replace(|c: char| !c.is_ascii_graphic(), "?")
}

fn believable(module: &Module, what: &str, count: u64, most: u64) -> Result<(), Error> {
    if count > most {
        return Err(Error::Odd(format!(
            "module {} has {count} {what}; expected at most {most}",
            module.name
        )));
    }
    Ok(())
}
