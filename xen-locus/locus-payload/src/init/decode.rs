//! Instructions as they stand in the file, with what relocations make of their fields.

use iced_x86::{Decoder, DecoderOptions, Instruction};
use object::elf;

use super::registers::{Fields, Target};
use super::{Place, Walk};
use crate::elf::{reloc_width, Reloc};
use crate::symbol::SymSection;

impl<'p> Walk<'p> {
    /// The instruction at a place.
    ///
    /// # Errors
    /// What is not understood about its bytes.
    pub(super) fn decode(&mut self, at: Place) -> Result<(Instruction, Fields<'p>), &'static str> {
        let start = usize::try_from(at.1).unwrap_or(usize::MAX);
        let code = self.payload.section(at.0).and_then(|s| s.data.get(start..));
        let mut decoder =
            Decoder::with_ip(64, code.unwrap_or_default(), at.1, DecoderOptions::NONE);
        let instruction = decoder.decode();
        let constants = decoder.get_constant_offsets(&instruction);
        let end = instruction.next_ip();
        if instruction.is_invalid() {
            return Err("has bytes that are no instruction");
        }
        let mut fields = Fields::default();
        for reloc in self.relocs(at.0, at.1.saturating_sub(7), end) {
            let target = (self.target(&reloc, end), reloc.rtype);
            let field = reloc.offset.checked_sub(at.1);
            let is = |offset: usize| field == Some(offset as u64);
            let room = if constants.has_displacement() && is(constants.displacement_offset()) {
                &mut fields.displacement
            } else if constants.has_immediate() && is(constants.immediate_offset()) {
                &mut fields.immediate
            } else if reloc.offset.saturating_add(reloc_width(reloc.rtype)) <= at.1 {
                continue;
            } else {
                return Err("is changed by a relocation that fits no operand");
            };
            if room.replace(target).is_some() {
                return Err("is changed by two relocations at one place");
            }
        }
        Ok((instruction, fields))
    }

    /// Relocations of a section, late ones too, that start at offsets `from..to`.
    pub(super) fn relocs(&mut self, section: usize, from: u64, to: u64) -> Vec<Reloc> {
        let payload = self.payload;
        let late = self.late.get(&section).into_iter().flatten();
        let all = self.relocs.entry(section).or_insert_with(|| {
            let late = late.filter_map(|&late| payload.section(late));
            let own = payload.section(section).into_iter();
            let mut all: Vec<Reloc> = own.chain(late).flat_map(|s| s.relocs.clone()).collect();
            all.sort_by_key(|r| r.offset);
            all
        });
        let first = all.partition_point(|r| r.offset < from);
        let rest = all.get(first..).unwrap_or_default().iter();
        rest.take_while(|r| r.offset < to).copied().collect()
    }

    /// Where `reloc` leads; `end` is the end of its instruction.
    pub(super) fn target(&self, reloc: &Reloc, end: u64) -> Target<'p> {
        let Some(symbol) = self.payload.symbol(reloc.symbol) else {
            return Target::Unknown;
        };
        let from = match elf::RelocationType(reloc.rtype) {
            elf::R_X86_64_PC32 | elf::R_X86_64_PLT32 => end.saturating_sub(reloc.offset),
            elf::R_X86_64_64 | elf::R_X86_64_32 | elf::R_X86_64_32S => 0,
            _ => return Target::Unknown,
        };
        let bias = reloc.addend.checked_add_unsigned(from);
        match symbol.section {
            SymSection::Undefined | SymSection::Livepatch => {
                bias.map_or(Target::Unknown, |bias| Target::Other(symbol, bias))
            }
            SymSection::Section(section) => bias
                .and_then(|bias| symbol.value.checked_add_signed(bias))
                .map_or(Target::Unknown, |offset| Target::Own((section, offset))),
            SymSection::Absolute | SymSection::Common => Target::Unknown,
        }
    }
}
