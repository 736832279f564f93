//! The symbols of a payload as `struct mod_kallsyms` holds them: what `/proc/kallsyms`, back-traces
//! and `%pS` in the guest show (kernel/module/kallsyms.c).

use locus_payload::{Binding, Payload, Role, SymKind, SymSection};

use crate::error::{Error, Result};

/// Bytes of an `Elf64_Sym`.
pub const SYM_LEN: usize = 24;

/// A symbol of the table, before its section has an address.
#[derive(Clone, Debug)]
struct SymtabEntry {
    name: u32,
    info: u8,
    section: usize,
    value: u64,
    size: u64,
}

/// The tables.
#[derive(Clone, Debug)]
pub struct Symtab {
    entries: Vec<SymtabEntry>,
    /// Names, each ended by a zero; begins with an empty one.
    pub strings: Vec<u8>,
    /// A letter for each symbol, as `nm` has it.
    pub types: Vec<u8>,
}

impl Symtab {
    /// Those of the payload's symbols that stand in what is placed.
    ///
    /// # Errors
    /// Their names take more than 4 GiB.
    pub fn of(payload: &Payload) -> Result<Symtab> {
        // The kernel skips symbol 0, as ELF has it.
        let none = SymtabEntry {
            name: 0,
            info: 0,
            section: 0,
            value: 0,
            size: 0,
        };
        let mut table = Symtab {
            entries: vec![none],
            strings: vec![0],
            types: vec![b'u'],
        };
        for symbol in &payload.symbols {
            let SymSection::Section(index) = symbol.section else {
                continue;
            };
            let kind = match symbol.kind {
                SymKind::NoType => 0,
                SymKind::Object => 1,
                SymKind::Func => 2,
                _ => continue,
            };
            let letter = match payload.section(index).map(|s| &s.role) {
                Some(Role::Text) => b't',
                Some(Role::RoData) => b'r',
                Some(Role::Data) => b'd',
                Some(Role::Bss) => b'b',
                _ => continue,
            };
            if symbol.name.is_empty() || symbol.name.starts_with(".L") {
                continue;
            }
            let binding = match symbol.binding {
                Binding::Global => 1,
                Binding::Weak => 2,
                _ => 0,
            };
            let name = u32::try_from(table.strings.len())
                .map_err(|_| Error::not_applicable("its symbols' names are too long"))?;
            table
                .strings
                .extend(symbol.name.bytes().filter(|&b| b != 0));
            table.strings.push(0);
            table.types.push(letter);
            table.entries.push(SymtabEntry {
                name,
                info: binding << 4 | kind,
                section: index,
                value: symbol.value,
                size: symbol.size,
            });
        }
        Ok(table)
    }

    /// How many symbols there are, the empty one included.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// The `Elf64_Sym`s; `start_of` tells where a section is placed.
    #[must_use]
    pub fn encode(&self, start_of: impl Fn(usize) -> Option<u64>) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.entries.len() * SYM_LEN);
        for entry in &self.entries {
            // Section 0 and empty sections have no address.
            let start = start_of(entry.section).unwrap_or(0);
            let section = u16::try_from(entry.section).unwrap_or(u16::MAX);
            bytes.extend(entry.name.to_le_bytes());
            bytes.extend([entry.info, 0]);
            bytes.extend(section.to_le_bytes());
            bytes.extend(start.wrapping_add(entry.value).to_le_bytes());
            bytes.extend(entry.size.to_le_bytes());
        }
        bytes
    }
}
