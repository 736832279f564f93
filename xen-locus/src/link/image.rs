//! Relocates a payload's sections for their addresses.
//!
//! What the kernel's module loader does (`apply_relocate_add`, arch/x86/kernel/module.c; ftrace; and
//! [`fixups`]), done from outside. What can't be done yet is refused by name.
//!
//! Tables of places in the code are relocated too, for addresses behind what is placed. Nothing of them is
//! ever written there, but so they can be read as the kernel reads them.

use locus_guest::addr::{Gva, Range, PAGE_LEN};
use locus_kernel::Kernel;
use locus_payload::{Binding, ElfSymbol, Payload, Reloc, Role, Section, SymSection};

use super::layout::{index, is_bug_table, is_table, rights_of, ImageLayout};
use super::split::SplitFunctions;
use crate::arena::record::NewFunction;
use crate::arena::Rights;
use crate::error::{Error, Result};
use crate::link::fixups::{self, FixupTable, FixupTables, JumpLabel, KeyCount, LinkedCode, Runs};
use crate::link::module::{BuiltModule, ModuleDraft};
use crate::link::reloc;
use crate::target::redirect::Returns;
use crate::target::symbols::GuestSymbols;
use crate::x86;

/// A payload relocated for its place.
#[derive(Debug)]
pub struct Image {
    /// Its bytes, from its first page on; the rooms of the record and of the module's tables are zero.
    pub bytes: Vec<u8>,
    /// The new functions, in the order of the payload's objects and functions.
    pub functions: Vec<NewFunction>,
    /// Jump labels, sorted by key and then by place. The guest's kernel has to know them.
    pub jumps: Vec<JumpLabel>,
    /// Static keys of the kernel and its modules that the jump labels follow, sorted by address.
    pub keys: Vec<KeyCount>,
}

impl Image {
    /// Puts the module's tables into their room.
    ///
    /// # Errors
    /// [`Class::Failed`](crate::error::Class::Failed): they don't fit.
    /// [`Class::NotApplicable`](crate::error::Class::NotApplicable): a static key of the payload is not whole
    /// among its variables.
    pub fn put_module(&mut self, layout: &ImageLayout, module: &BuiltModule) -> Result<()> {
        for word in &module.own_keys {
            let start = index(word.at.0.wrapping_sub(module.place.text.start.0));
            let room = self.bytes.get_mut(start..start.saturating_add(8));
            let Some([first, rest @ ..]) = room else {
                return Err(Error::not_applicable(format!(
                    "a static key of the payload leaves its variables: its branches are to be named \
                     at {}",
                    word.at
                )));
            };
            let value = word.value.0.to_le_bytes();
            // the bit that says how the key begins stays
            let [low, high @ ..] = value;
            *first = low | (*first & 1);
            rest.copy_from_slice(&high);
        }
        let parts = [
            (layout.module_ro, &module.ro),
            (layout.module_rw, &module.rw),
        ];
        for (offset, bytes) in parts {
            let start = index(offset);
            self.bytes
                .get_mut(start..start.saturating_add(bytes.len()))
                .ok_or_else(|| Error::failed("the module's tables do not fit their room"))?
                .copy_from_slice(bytes);
        }
        Ok(())
    }
}

/// Refuses what this loader can't do yet.
///
/// # Errors
/// [`Class::NotApplicable`](crate::error::Class::NotApplicable) that names all of it.
pub fn check_supported(payload: &Payload) -> Result<()> {
    let concerns: Vec<String> = payload
        .concerns()
        .into_iter()
        .map(|c| format!("{}: {}", c.subject, c.reason))
        .collect();
    if concerns.is_empty() {
        return Ok(());
    }
    Err(Error::not_applicable(format!(
        "payload {} needs what is not supported yet ({}); build it without that",
        payload.name,
        concerns.join("; ")
    )))
}

/// Relocates `payload`, laid out as `layout`, for the address `base`.
///
/// # Errors
/// [`Class::NotApplicable`](crate::error::Class::NotApplicable): a symbol the kernel doesn't have or has several times, a relocation of
/// an unknown type or out of range, a reference into a part that is never placed.
pub fn link(
    payload: &Payload,
    kernel: &Kernel<'_>,
    objects: &GuestSymbols<'_, '_>,
    layout: &ImageLayout,
    base: Gva,
    returns: Option<Returns>,
) -> Result<Image> {
    let mut linker = Linker {
        payload,
        objects,
        layout,
        base,
        bytes: vec![0; layout.end],
    };
    let relocated = |s: &Section| s.size > 0 && (s.role.is_placed() || is_table(&s.role));
    for section in payload.sections.iter().filter(|s| relocated(s)) {
        linker.copy(section)?;
    }
    for section in &payload.sections {
        match section.role {
            Role::KlpRela { target, .. } => {
                if let Some(target) = payload.section(target).filter(|t| relocated(t)) {
                    linker.relocate(target, &section.relocs)?;
                }
            }
            _ if relocated(section) => linker.relocate(section, &section.relocs)?,
            _ => {}
        }
    }
    let (mut code, tables) = linker.tables()?;
    let done = fixups::apply_fixups(kernel, &mut code, &tables, returns)?;
    linker.bytes = code.bytes;
    linker.bytes.truncate(layout.rights.len() * PAGE_LEN);
    let parts = SplitFunctions::of(payload)?;
    let functions = payload
        .klp
        .objects
        .iter()
        .flat_map(|object| &object.funcs)
        .map(|func| {
            let place = |(section, offset)| {
                let start = layout.offset(section).ok_or_else(|| {
                    linker.no(format!(
                        "the new {} is in no section that is placed",
                        func.old_name
                    ))
                })?;
                Ok::<_, Error>(base.plus(start).plus(offset))
            };
            let cold = parts.of_function(func).iter();
            let cold = cold.map(|part| place((part.section, part.offset)));
            let cold = cold.collect::<Result<_>>()?;
            Ok(NewFunction {
                at: place((func.new_section, func.new_offset))?,
                cold,
            })
        })
        .collect::<Result<Vec<_>>>()?;
    Ok(Image {
        bytes: linker.bytes,
        functions,
        jumps: done.jumps,
        keys: done.keys,
    })
}

/// Builds the module's tables of a payload whose `image` is linked for the address `base`.
///
/// # Errors
/// As [`link`] and [`ModuleDraft::build`].
pub fn build_module(
    draft: &ModuleDraft<'_>,
    payload: &Payload,
    kernel: &Kernel<'_>,
    objects: &GuestSymbols<'_, '_>,
    layout: &ImageLayout,
    (base, image): (Gva, &Image),
) -> Result<BuiltModule> {
    let linker = Linker {
        payload,
        objects,
        layout,
        base,
        bytes: Vec::new(),
    };
    draft.build(
        kernel,
        layout.place(base),
        &|reloc| linker.value(reloc),
        &|section| layout.offset(section).map(|at| base.plus(at).0),
        &image.jumps,
    )
}

/// Whether a symbol is the kernel's own of this name. One that the payload defines is not, whatever its name.
fn is_of_kernel(symbol: &ElfSymbol, name: &str) -> bool {
    symbol.section == SymSection::Undefined && symbol.name == name
}

struct Linker<'a, 'k, 'm> {
    payload: &'a Payload,
    objects: &'a GuestSymbols<'k, 'm>,
    layout: &'a ImageLayout,
    base: Gva,
    bytes: Vec<u8>,
}

impl Linker<'_, '_, '_> {
    fn no(&self, why: String) -> Error {
        Error::not_applicable(format!("payload {}: {why}", self.payload.name))
    }

    fn not_found(&self, symbol: &str) -> String {
        let depends = &self.payload.modinfo.depends;
        let hint = if depends.is_empty() {
            String::new()
        } else {
            format!(
                "; the payload says that it depends on {}: load that in the guest",
                depends.join(", ")
            )
        };
        format!(
            "the guest's kernel has no symbol {symbol}, and no module that is loaded exports it{hint}"
        )
    }

    /// The same error, with the payload's name.
    fn of(&self, error: Error) -> Error {
        error.context(format!("payload {}", self.payload.name))
    }

    fn copy(&mut self, section: &Section) -> Result<()> {
        let start = self.layout.offset(section.index).map(index);
        let room = start.and_then(|start| {
            let end = start.checked_add(section.data.len())?;
            self.bytes.get_mut(start..end)
        });
        match room {
            Some(room) => {
                room.copy_from_slice(&section.data);
                Ok(())
            }
            None => Err(self.no(format!("section {} does not fit its place", section.name))),
        }
    }

    fn relocate(&mut self, section: &Section, relocs: &[Reloc]) -> Result<()> {
        for reloc in relocs {
            let Some(symbol) = self.payload.symbol(reloc.symbol) else {
                return Err(self.no(format!("relocation against symbol {}", reloc.symbol)));
            };
            // The member `mod` of struct klp_patch: nothing reads it.
            if self.payload.klp.place == Some((section.index, reloc.offset)) {
                continue;
            }
            let fentry = is_of_kernel(symbol, "__fentry__") && section.flags.exec;
            if fentry && self.fentry(section, reloc)? {
                continue;
            }
            let target = self.address(symbol, section, reloc.offset)?;
            self.patch(section, reloc, target, symbol)?;
        }
        Ok(())
    }

    /// Turns a call of `__fentry__` into the nop the kernel's ftrace would make of it.
    fn fentry(&mut self, section: &Section, reloc: &Reloc) -> Result<bool> {
        let Some(at) = reloc.offset.checked_sub(1) else {
            return Ok(false);
        };
        let distance = [reloc::R_X86_64_PC32, reloc::R_X86_64_PLT32].contains(&reloc.rtype);
        let is_call = self.slice(section, at, 1)?.first() == Some(&0xe8);
        // No call of what is behind the beginning of __fentry__.
        let is_call = is_call && distance && reloc.addend == -4;
        if is_call {
            self.slice(section, at, 5)?.copy_from_slice(&x86::NOP5);
        }
        Ok(is_call)
    }

    /// The relocated code, and the tables about it.
    fn tables(&mut self) -> Result<(LinkedCode, FixupTables)> {
        let payload = self.payload;
        let range = |s: &Section| {
            // An empty section has no offset.
            let start = self.layout.offset(s.index).unwrap_or(0);
            Range::new(self.base.plus(start), s.size)
        };
        let which = |wanted: &dyn Fn(&Section) -> bool| {
            let sections = payload.sections.iter().filter(|s| wanted(s));
            sections.map(range).collect::<Vec<_>>()
        };
        let copied = |s: &Section| s.role == Role::Altinstructions && s.flags.exec;
        let live = |s: &Section| s.role == Role::Text || copied(s);
        let own = which(&|s| rights_of(s) == Some(Rights::Data));
        let code = LinkedCode {
            name: payload.name.clone(),
            base: self.base,
            bytes: self.bytes.clone(),
            live: Runs::new(which(&live)),
            dead: Runs::new(which(&|s| s.role.is_init_or_exit())),
            all: Range::new(self.base, self.layout.end as u64),
            own: Range {
                start: own.iter().map(|r| r.start).min().unwrap_or(self.base),
                end: own.iter().map(|r| r.end).max().unwrap_or(self.base),
            },
        };
        let table = |role: Role| -> Result<Vec<FixupTable>> {
            let found = which(&|s| s.role == role && !s.flags.exec).into_iter();
            let table = |r: Range| {
                let bytes = code
                    .get(r.start, index(r.len()))
                    .ok_or_else(|| self.no(format!("its table at {} leaves the image", r.start)))?;
                Ok(FixupTable {
                    at: r.start,
                    bytes: bytes.to_vec(),
                })
            };
            found.map(table).collect()
        };
        let thunk = |symbol: &ElfSymbol| is_of_kernel(symbol, "__x86_return_thunk");
        let returns = payload.sections.iter().filter(|s| live(s)).flat_map(|s| {
            let to_thunk = |r: &&Reloc| payload.symbol(r.symbol).is_some_and(thunk);
            let sites = s.relocs.iter().filter(to_thunk);
            sites.filter_map(move |r| Some(range(s).start.plus(r.offset.checked_sub(1)?)))
        });
        let tables = FixupTables {
            alternatives: table(Role::Altinstructions)?,
            paravirt: table(Role::Parainstructions)?,
            retpolines: table(Role::RetpolineSites)?,
            returns: returns.collect(),
            calls: table(Role::CallSites)?,
            static_calls: table(Role::StaticCalls)?,
            jumps: table(Role::JumpTable)?,
        };
        Ok((code, tables))
    }

    /// The bytes at `offset` of a placed section.
    fn slice(&mut self, section: &Section, offset: u64, len: usize) -> Result<&mut [u8]> {
        let no = self.no(format!(
            "a relocation of section {} leaves it",
            section.name
        ));
        let inside = offset
            .checked_add(len as u64)
            .is_some_and(|end| end <= section.size);
        let start = self
            .layout
            .offset(section.index)
            .and_then(|start| start.checked_add(offset))
            .map(index);
        match start {
            Some(start) if inside => self
                .bytes
                .get_mut(start..start.saturating_add(len))
                .ok_or(no),
            _ => Err(no),
        }
    }

    /// The value of a relocation's symbol, of a section that is not placed itself.
    fn value(&self, reloc: &Reloc) -> Result<Gva> {
        let found = self
            .payload
            .symbol(reloc.symbol)
            .and_then(|symbol| Some((symbol, self.payload.section(0)?)));
        match found {
            Some((symbol, none)) => self.address(symbol, none, reloc.offset),
            None => Err(self.no(format!("relocation against symbol {}", reloc.symbol))),
        }
    }

    /// Tables may refer to what is only read, but nothing that is placed may.
    fn may_refer(&self, from: &Section, to: usize) -> bool {
        let placed = |s: &Section| s.role.is_placed() || is_bug_table(s);
        !placed(from) || self.payload.section(to).is_some_and(placed)
    }

    /// The value of a symbol.
    fn address(&self, symbol: &ElfSymbol, section: &Section, offset: u64) -> Result<Gva> {
        let is_module = |s: &Section| s.role == Role::ThisModule;
        match symbol.section {
            // The module that the payload becomes.
            SymSection::Section(index) if self.payload.section(index).is_some_and(is_module) => {
                let module = self.layout.place(self.base).module();
                Ok(module.plus(symbol.value))
            }
            SymSection::Section(index) => match self.layout.offset(index) {
                Some(start) if self.may_refer(section, index) => {
                    Ok(self.base.plus(start).plus(symbol.value))
                }
                _ => Err(self.no(format!(
                    "{}+{offset:#x} refers to {} in section {}, which is never placed",
                    section.name,
                    symbol.name,
                    self.payload.section(index).map_or("?", |s| s.name.as_str())
                ))),
            },
            SymSection::Absolute => Ok(Gva(symbol.value)),
            SymSection::Livepatch => match &symbol.klp {
                Some(klp) => self
                    .objects
                    .reference(Some(&klp.object), &klp.symbol, klp.sympos)
                    .map_err(|e| self.of(e)),
                None => Err(self.no(format!("symbol {} is no .klp.sym", symbol.name))),
            },
            SymSection::Undefined => {
                let found = self.objects.unresolved(symbol);
                match found.map_err(|e| self.of(e))? {
                    Some(at) => Ok(at),
                    // As the kernel's loader has it (simplify_symbols, kernel/module/main.c).
                    None if symbol.binding == Binding::Weak => Ok(Gva(0)),
                    None => Err(self.no(self.not_found(&symbol.name))),
                }
            }
            _ => Err(self.no(format!("symbol {} has no place", symbol.name))),
        }
    }

    fn patch(
        &mut self,
        section: &Section,
        reloc: &Reloc,
        target: Gva,
        symbol: &ElfSymbol,
    ) -> Result<()> {
        let place = self
            .layout
            .offset(section.index)
            .map_or(self.base, |start| self.base.plus(start).plus(reloc.offset));
        let value = reloc::value(reloc.rtype, target, reloc.addend, place).map_err(|why| {
            self.no(format!(
                "{}+{:#x}, {}: {why}",
                section.name, reloc.offset, symbol.name
            ))
        })?;
        let bytes = value.bytes();
        let room = self.slice(section, reloc.offset, bytes.len())?;
        let before = room.to_vec();
        room.copy_from_slice(bytes);
        if before.iter().any(|&b| b != 0) {
            return Err(self.no(format!(
                "{}+{:#x}, {}: expected zeroes where a relocation goes, found {before:02x?}: it \
                 is relocated already, or damaged",
                section.name, reloc.offset, symbol.name
            )));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
