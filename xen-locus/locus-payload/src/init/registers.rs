//! Which registers hold the address of `struct klp_patch`.

use iced_x86::{Instruction, InstructionInfoFactory, Mnemonic, OpKind};
use object::elf;

use super::instruction::{bit, is_write};
use super::{ElfSymbol, Place};

/// Where a relocation in code leads.
#[derive(Clone, Copy)]
pub(super) enum Target<'p> {
    /// To a symbol of the kernel or of a module, and so many bytes behind it.
    Other(&'p ElfSymbol, i64),
    /// Into the payload itself.
    Own(Place),
    /// Nobody knows.
    Unknown,
}

/// What the relocations in an instruction lead to.
#[derive(Default)]
pub(super) struct Fields<'p> {
    pub(super) displacement: Option<(Target<'p>, u32)>,
    pub(super) immediate: Option<(Target<'p>, u32)>,
}

/// Whether a relocation makes a distance from its place, and not an address.
pub(super) fn is_relative(rtype: u32) -> bool {
    matches!(
        elf::RelocationType(rtype),
        elf::R_X86_64_PC32 | elf::R_X86_64_PLT32
    )
}

/// The registers that surely hold the address `patch` behind an instruction; `known` are those before it.
pub(super) fn known_after(
    instruction: &Instruction,
    fields: &Fields<'_>,
    known: u16,
    patch: Option<Place>,
) -> u16 {
    let mut factory = InstructionInfoFactory::new();
    let used = factory.info(instruction).used_registers().iter();
    let written = used.filter(|r| is_write(r.access()));
    let after = written.fold(known, |known, r| known & !bit(r.register()));
    let register = instruction.op0_register();
    if instruction.op0_kind() != OpKind::Register || !register.is_gpr64() {
        return after;
    }
    let is_patch = |target: Target<'_>| matches!(target, Target::Own(at) if Some(at) == patch);
    let holds = match instruction.mnemonic() {
        Mnemonic::Mov if instruction.op1_kind() == OpKind::Register => {
            known & bit(instruction.op1_register()) != 0 && instruction.op1_register().is_gpr64()
        }
        // An immediate of 32 bits is extended by its sign, as addresses of the kernel are.
        Mnemonic::Mov => fields.immediate.is_some_and(|(target, rtype)| {
            is_patch(target) && rtype != elf::R_X86_64_32.0 && !is_relative(rtype)
        }),
        Mnemonic::Lea if instruction.is_ip_rel_memory_operand() => fields
            .displacement
            .is_some_and(|(target, rtype)| is_patch(target) && is_relative(rtype)),
        _ => false,
    };
    if holds {
        after | bit(register)
    } else {
        after
    }
}
