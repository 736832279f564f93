//! Tables that have the kernel change code of `module_init`, or go on elsewhere: then it does not do what it says.

use super::{Place, Walk};
use crate::elf::{Reloc, Section};
use crate::role::Role;
use crate::symbol::SymSection;

/// Most bytes that a row changes which does not say how many: a jump or a call, with a condition.
const BRANCH: u64 = 6;
/// Length of the longest instruction.
const INSTRUCTION: u64 = 15;

impl Walk<'_> {
    /// Names the tables with rows that lead to code that was reached, or to what begins in front of it and reaches
    /// into it.
    ///
    /// Others are about this code, too, and change nothing of what it does: `.return_sites`, `.call_sites`,
    /// `__mcount_loc` and `.ibt_endbr_seal` say where calls, jumps and marks are that are looked at again, and
    /// `__bug_table` says which `ud2` is a warning.
    pub(super) fn tables(&mut self) {
        for table in &self.payload.sections {
            let changes = match table.role {
                // Its replacements are code.
                Role::Altinstructions => !table.flags.exec,
                Role::Parainstructions
                | Role::JumpTable
                | Role::StaticCalls
                | Role::ExTable
                | Role::RetpolineSites
                | Role::SmpLocks => true,
                _ => false,
            };
            if changes && table.relocs.iter().any(|r| self.leads_here(table, r)) {
                let reason =
                    "it changes what code of module_init does when the kernel loads the module";
                self.name(&*table.name, reason);
            }
        }
    }

    /// Whether a field of a table leads to code that was reached. Tables hold addresses, or distances from their own
    /// fields.
    fn leads_here(&self, table: &Section, reloc: &Reloc) -> bool {
        let Some(symbol) = self.payload.symbol(reloc.symbol) else {
            return false;
        };
        let SymSection::Section(section) = symbol.section else {
            return false;
        };
        match symbol.value.checked_add_signed(reloc.addend) {
            Some(offset) => self.touches((section, offset), changed(table, reloc)),
            // In front of the section; what is there is not known.
            None => true,
        }
    }

    /// Whether one of `len` bytes from a place on is in an instruction that was reached.
    fn touches(&self, from: Place, len: u64) -> bool {
        let end = from.1.saturating_add(len);
        let first = from.1.saturating_sub(INSTRUCTION);
        self.reached
            .range((from.0, first)..(from.0, end))
            .any(|(at, (_, len))| at.1.saturating_add(*len) > from.1)
    }
}

/// At most how many bytes a row changes, where `reloc` makes the field for their place.
///
/// `struct alt_instr` has the number at offset 10 or 12 (arch/x86/include/asm/alternative.h), and
/// `struct paravirt_patch_site` at 9.
fn changed(table: &Section, reloc: &Reloc) -> u64 {
    let byte = |field: usize| {
        let at = usize::try_from(reloc.offset).ok()?.checked_add(field)?;
        table.data.get(at).copied()
    };
    let largest = |fields: &[usize]| {
        let bytes = fields.iter().filter_map(|&field| byte(field));
        u64::from(bytes.max().unwrap_or(u8::MAX)).max(1)
    };
    match table.role {
        Role::Altinstructions => largest(&[10, 12]),
        Role::Parainstructions => largest(&[9]),
        Role::ExTable | Role::SmpLocks => 1,
        _ => BRANCH,
    }
}
