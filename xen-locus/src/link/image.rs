//! Lays out a payload's sections, and relocates them for their addresses.
//!
//! What the kernel's module loader does (`apply_relocate_add`, arch/x86/kernel/module.c; ftrace; and
//! [`sites`]), done from outside. What can't be done yet is refused by name.
//!
//! Tables of places in the code are relocated too, for addresses behind what is placed, where nothing
//! of them is ever written: so they can be read as the kernel reads them.

use locus_guest::addr::{Gva, Range, PAGE_LEN, PAGE_SIZE};
use locus_kernel::Kernel;
use locus_payload::{Binding, ElfSymbol, Payload, Reloc, Role, Section, SymSection};

use super::split;
use crate::arena::Rights;
use crate::error::{Error, Result};
use crate::link::fixups::{self, Code, JumpSite, Table, Tables};
use crate::link::module::{Built, Entry, Place, Size};
use crate::link::reloc::{self, R_X86_64_NONE};
use crate::target::redirect::Returns;
use crate::target::symbols::Objects;
use crate::x86;

/// Sections by their rights, each run beginning on a page.
#[derive(Debug)]
pub struct Layout {
    /// Rights of each page.
    pub rights: Vec<Rights>,
    /// Offset of each section that is placed or looked at, and of the table of `BUG` and `WARN` sites
    /// as part of the module entry, by section number.
    offsets: Vec<Option<u64>>,
    /// Offset behind all of them; what is only looked at stands behind all pages.
    end: usize,
    /// Offset and room of the record.
    pub record: (u64, usize),
    /// Offsets of the read-only and of the writable part of the module entry.
    pub entry: (u64, u64),
    /// Length of the code, which begins at offset 0, in bytes.
    pub text_len: u64,
}

/// A payload relocated for its place.
#[derive(Debug)]
pub struct Image {
    /// Its bytes, from its first page on; the rooms of the record and of the module entry are zero.
    pub bytes: Vec<u8>,
    /// Addresses of the new functions and of the parts of each that stand elsewhere, in the order of the payload's
    /// objects and functions.
    pub functions: Vec<(Gva, Vec<Gva>)>,
    /// Jump labels, sorted by key and then by place. The guest's kernel has to know them.
    pub jumps: Vec<JumpSite>,
    /// Static keys of the kernel and its modules that jump labels follow, and the count of each that
    /// they were set for.
    pub keys: Vec<(Gva, i32)>,
}

impl Image {
    /// Puts the module entry, links and all, into its room.
    ///
    /// # Errors
    /// It does not fit.
    pub fn put_entry(&mut self, layout: &Layout, entry: &Built) -> Result<()> {
        for (at, word) in &entry.own_keys {
            let at = at.0.wrapping_sub(entry.place.text.start.0);
            let at = usize::try_from(at).unwrap_or(usize::MAX);
            if let Some(room) = self.bytes.get_mut(at..at.saturating_add(8)) {
                // the bit that says how the key begins stays
                let first = room.first().copied().unwrap_or(0) & 1;
                room.copy_from_slice(&(word.0 | u64::from(first)).to_le_bytes());
            }
        }
        for (at, bytes) in [(layout.entry.0, &entry.ro), (layout.entry.1, &entry.rw)] {
            let at = usize::try_from(at).unwrap_or(usize::MAX);
            self.bytes
                .get_mut(at..at.saturating_add(bytes.len()))
                .ok_or_else(|| Error::failed("the module entry does not fit its room"))?
                .copy_from_slice(bytes);
        }
        Ok(())
    }
}

fn rights_of(section: &Section) -> Option<Rights> {
    match section.role {
        Role::Text => Some(Rights::Text),
        Role::RoData => Some(Rights::RoData),
        Role::Data | Role::Bss | Role::DynamicDebug => Some(Rights::Data),
        _ => None,
    }
}

/// Sections that are no part of the code, but say how it is to be settled.
fn is_table(role: &Role) -> bool {
    matches!(
        role,
        Role::Altinstructions
            | Role::Parainstructions
            | Role::RetpolineSites
            | Role::CallSites
            | Role::JumpTable
            | Role::StaticCalls
    )
}

/// Sections that tables refer to or that are tables.
fn is_looked_at(section: &Section) -> bool {
    is_table(&section.role) || section.role.is_init_or_exit()
}

/// The table of `BUG` and `WARN` sites, of which there is one at most ([`Entry::of`]). `WARN` with a
/// message hands its row to `__WARN_trap`, so code refers to it: Linux kernel commit 5b472b6e5bd9
/// ("x86_64/bug: Implement `__WARN_printf()`") (in v6.19).
fn is_bug_table(section: &Section) -> bool {
    section.role == Role::BugTable && section.size > 0
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

impl Layout {
    /// Places the sections, code first, then constants, a record of `record_len` bytes and what of the
    /// module entry is read only, then variables, and on pages of its own the rest of the entry: the
    /// payload's variables begin anew when it is applied again, the entry goes on.
    ///
    /// # Errors
    /// The payload is larger than any arena.
    pub fn new(payload: &Payload, record_len: usize, entry: Size) -> Result<Layout> {
        let too_big = || {
            Error::not_applicable(format!(
                "payload {} needs more than the arena's {} pages",
                payload.name,
                crate::arena::PAGES
            ))
        };
        let mut offsets = vec![None; payload.sections.len()];
        let mut rights = Vec::new();
        let mut at = 0u64;
        let mut text_len = 0;
        let mut record = (0, record_len);
        let (mut entry_ro, mut entry_rw) = (0, 0);
        for group in [Rights::Text, Rights::RoData, Rights::Data] {
            let start = at;
            for section in payload.placed().filter(|s| rights_of(s) == Some(group)) {
                let align = section.align.clamp(1, PAGE_SIZE);
                at = at.checked_next_multiple_of(align).ok_or_else(too_big)?;
                if let Some(offset) = offsets.get_mut(section.index) {
                    *offset = Some(at);
                }
                at = at.checked_add(section.size).ok_or_else(too_big)?;
            }
            if group == Rights::Text {
                text_len = at;
            }
            if group == Rights::RoData {
                at = at.checked_next_multiple_of(8).ok_or_else(too_big)?;
                record.0 = at;
                at = at.checked_add(record_len as u64).ok_or_else(too_big)?;
                at = at.checked_next_multiple_of(64).ok_or_else(too_big)?;
                entry_ro = at;
                at = at.checked_add(entry.ro).ok_or_else(too_big)?;
            }
            if group == Rights::Data {
                at = at.checked_next_multiple_of(PAGE_SIZE).ok_or_else(too_big)?;
                entry_rw = at;
                at = at.checked_add(entry.rw).ok_or_else(too_big)?;
            }
            at = at.checked_next_multiple_of(PAGE_SIZE).ok_or_else(too_big)?;
            let pages = usize::try_from((at - start) / PAGE_SIZE).unwrap_or(usize::MAX);
            if rights.len().saturating_add(pages) > crate::arena::PAGES {
                return Err(too_big());
            }
            rights.extend(std::iter::repeat_n(group, pages));
        }
        let bugs = payload.sections.iter().find(|s| is_bug_table(s));
        if let Some(offset) = bugs.and_then(|s| offsets.get_mut(s.index)) {
            *offset = Some(entry_rw.checked_add(entry.bugs).ok_or_else(too_big)?);
        }
        for section in payload.sections.iter().filter(|s| is_looked_at(s)) {
            let align = section.align.clamp(1, PAGE_SIZE);
            at = at.checked_next_multiple_of(align).ok_or_else(too_big)?;
            if let Some(offset) = offsets.get_mut(section.index) {
                *offset = Some(at);
            }
            at = at.checked_add(section.size).ok_or_else(too_big)?;
        }
        Ok(Layout {
            rights,
            offsets,
            end: usize::try_from(at).map_err(|_| too_big())?,
            record,
            entry: (entry_ro, entry_rw),
            text_len,
        })
    }

    /// What is written when the payload is applied again: the record, and the variables but for the
    /// module entry. They keep their values if threads may be in its code all the time.
    #[must_use]
    pub fn rewritten(&self, entry_only: bool) -> Vec<std::ops::Range<usize>> {
        let (record, room) = self.record;
        let record = usize::try_from(record).unwrap_or(usize::MAX);
        let record = record..record.saturating_add(room);
        if entry_only {
            return vec![record];
        }
        let data = self.rights.iter().take_while(|&&r| r != Rights::Data);
        let data = data.count() * PAGE_LEN;
        let entry = usize::try_from(self.entry.1).unwrap_or(usize::MAX);
        vec![record, data..entry.max(data)]
    }

    /// Where all of it stands when the first page is at `base`.
    #[must_use]
    pub fn place(&self, base: Gva) -> Place {
        let pages = |which: Rights| {
            let first = self.rights.iter().position(|&r| r == which).unwrap_or(0) as u64;
            let count = self.rights.iter().filter(|&&r| r == which).count() as u64;
            Range::new(base.plus(first * PAGE_SIZE), count * PAGE_SIZE)
        };
        Place {
            text: pages(Rights::Text),
            rodata: pages(Rights::RoData),
            data: pages(Rights::Data),
            ro: base.plus(self.entry.0),
            rw: base.plus(self.entry.1),
        }
    }

    fn offset(&self, section: usize) -> Option<u64> {
        self.offsets.get(section).copied().flatten()
    }
}

/// Relocates `payload`, laid out as `layout`, for the address `base`.
///
/// # Errors
/// [`Class::NotApplicable`](crate::error::Class::NotApplicable): a symbol the kernel doesn't have or has several times, a relocation of
/// an unknown type or out of range, a reference into a part that is never placed.
pub fn link(
    payload: &Payload,
    kernel: &Kernel<'_>,
    objects: &Objects<'_, '_>,
    layout: &Layout,
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
    let (mut code, tables) = linker.tables();
    let settled = fixups::settle(kernel, &mut code, &tables, returns)?;
    linker.bytes = code.bytes;
    linker.bytes.truncate(layout.rights.len() * PAGE_LEN);
    let functions = payload
        .klp
        .objects
        .iter()
        .flat_map(|object| &object.funcs)
        .map(|func| {
            let place = |section, offset| {
                let start = layout.offset(section).ok_or_else(|| {
                    linker.no(format!(
                        "the new {} is in no section that is placed",
                        func.old_name
                    ))
                })?;
                Ok::<_, Error>(base.plus(start).plus(offset))
            };
            let cold = split::parts(payload, func).map(|part| place(part.section, part.offset));
            let cold = cold.collect::<Result<_>>()?;
            Ok((place(func.new_section, func.new_offset)?, cold))
        })
        .collect::<Result<Vec<_>>>()?;
    Ok(Image {
        bytes: linker.bytes,
        functions,
        jumps: settled.jumps,
        keys: settled.keys,
    })
}

/// Builds the module entry of a payload that is linked for the address `base`.
///
/// # Errors
/// As [`link`] and [`Entry::build`].
pub fn entry(
    entry: &Entry<'_>,
    payload: &Payload,
    kernel: &Kernel<'_>,
    objects: &Objects<'_, '_>,
    layout: &Layout,
    (base, image): (Gva, &Image),
) -> Result<Built> {
    let linker = Linker {
        payload,
        objects,
        layout,
        base,
        bytes: Vec::new(),
    };
    entry.build(
        kernel,
        layout.place(base),
        &|reloc| linker.value(reloc),
        &|section| layout.offset(section).map(|at| base.plus(at).0),
        &image.jumps,
    )
}

struct Linker<'a, 'k, 'm> {
    payload: &'a Payload,
    objects: &'a Objects<'k, 'm>,
    layout: &'a Layout,
    base: Gva,
    bytes: Vec<u8>,
}

impl Linker<'_, '_, '_> {
    fn no(&self, why: String) -> Error {
        Error::not_applicable(format!("payload {}: {why}", self.payload.name))
    }

    fn nobody_has(&self, symbol: &str) -> String {
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
        let start = self.layout.offset(section.index).unwrap_or(u64::MAX);
        let start = usize::try_from(start).unwrap_or(usize::MAX);
        let room = start
            .checked_add(section.data.len())
            .and_then(|end| self.bytes.get_mut(start..end));
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
            // Nobody asks the patch which module it is of.
            if self.payload.klp.place == Some((section.index, reloc.offset)) {
                continue;
            }
            if symbol.name == "__fentry__" && self.fentry(section, reloc.offset)? {
                continue;
            }
            if reloc.rtype == R_X86_64_NONE {
                continue;
            }
            let target = self.address(symbol, section, reloc.offset)?;
            self.patch(section, reloc, target, symbol)?;
        }
        Ok(())
    }

    /// Turns a call of `__fentry__` into the nop the kernel's ftrace would make of it.
    fn fentry(&mut self, section: &Section, offset: u64) -> Result<bool> {
        let Some(at) = offset.checked_sub(1) else {
            return Ok(false);
        };
        let is_call = self.slice(section, at, 1)?.first() == Some(&0xe8);
        if is_call {
            self.slice(section, at, 5)?.copy_from_slice(&x86::NOP5);
        }
        Ok(is_call)
    }

    /// The relocated code, and the tables about it.
    fn tables(&mut self) -> (Code, Tables) {
        let payload = self.payload;
        let range = |s: &Section| {
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
        let code = Code {
            name: payload.name.clone(),
            base: self.base,
            bytes: self.bytes.clone(),
            live: which(&live),
            dead: which(&|s| s.role.is_init_or_exit()),
            all: Range::new(self.base, self.layout.end as u64),
            own: Range {
                start: own.iter().map(|r| r.start).min().unwrap_or(self.base),
                end: own.iter().map(|r| r.end).max().unwrap_or(self.base),
            },
        };
        let table = |role: Role| {
            let found = which(&|s| s.role == role && !s.flags.exec).into_iter();
            let table = |r: Range| {
                let len = usize::try_from(r.len()).unwrap_or(usize::MAX);
                let bytes = code.get(r.start, len).unwrap_or_default().to_vec();
                Table { at: r.start, bytes }
            };
            found.map(table).collect()
        };
        let thunk = |symbol: &ElfSymbol| symbol.name == "__x86_return_thunk";
        let returns = payload.sections.iter().filter(|s| live(s)).flat_map(|s| {
            let to_thunk = |r: &&Reloc| payload.symbol(r.symbol).is_some_and(thunk);
            let sites = s.relocs.iter().filter(to_thunk);
            sites.filter_map(move |r| Some(range(s).start.plus(r.offset.checked_sub(1)?)))
        });
        let tables = Tables {
            alternatives: table(Role::Altinstructions),
            paravirt: table(Role::Parainstructions),
            retpolines: table(Role::RetpolineSites),
            returns: returns.collect(),
            calls: table(Role::CallSites),
            static_calls: table(Role::StaticCalls),
            jumps: table(Role::JumpTable),
        };
        (code, tables)
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
            .and_then(|start| usize::try_from(start).ok());
        match start {
            Some(start) if inside => self.bytes.get_mut(start..start + len).ok_or(no),
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

    /// Tables may refer to what is only looked at, but nothing that is placed may.
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
                let found = self.objects.undefined(&symbol.name);
                match found.map_err(|e| self.of(e))? {
                    Some(at) => Ok(at),
                    // As the kernel's loader has it (simplify_symbols, kernel/module/main.c).
                    None if symbol.binding == Binding::Weak => Ok(Gva(0)),
                    None => Err(self.no(self.nobody_has(&symbol.name))),
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
        let (bytes, len) =
            reloc::value(reloc.rtype, target, reloc.addend, place).map_err(|why| {
                self.no(format!(
                    "{}+{:#x}, {}: {why}",
                    section.name, reloc.offset, symbol.name
                ))
            })?;
        let room = self.slice(section, reloc.offset, len)?;
        let before = room.to_vec();
        room.copy_from_slice(bytes.get(..len).unwrap_or_default());
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
