//! Where the values in registers come from, as far as it matters for the patch that kpatch's hook makes.

use iced_x86::{Instruction, InstructionInfoFactory, Mnemonic, OpKind, Register};

use super::instruction::{bit, is_read, is_write};
use super::state::{ARGUMENTS, SAVED};
use super::Place;

/// Offsets of `replace` in `struct klp_patch` that the hook of kpatch-build is searched for, in bytes: since Linux 5.5, and
/// in 5.1 to 5.4 (include/linux/livepatch.h).
pub const HOOK_REPLACE: [u64; 2] = [24, 16];
const RAX: usize = 0;
/// The first argument of a function.
const RDI: usize = 7;

/// All sources that have no bit of their own.
pub(super) const OTHERS: u64 = 1 << 63;

/// Where a value comes from. A source has a bit. What has none can't lead to the patch, unless its address was put
/// elsewhere, which [`super::replace`] looks for.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Origin {
    /// The sources that it may have.
    pub(super) may: u64,
    /// It is what the source had, unchanged.
    pub(super) whole: bool,
}

impl Origin {
    /// What a source has.
    pub(super) fn of(source: u64) -> Self {
        Self {
            may: source,
            whole: source.is_power_of_two() && source != OTHERS,
        }
    }

    /// Whether it surely is one of these sources.
    pub(super) fn is_one_of(self, sources: u64) -> bool {
        self.whole && self.may & sources != 0
    }

    fn or(self, other: Self) -> Self {
        Self {
            may: self.may | other.may,
            whole: self.whole && self == other,
        }
    }
}

/// The origins of the general registers where an instruction begins.
#[derive(Clone, Default, PartialEq, Eq)]
pub(super) struct Origins {
    registers: [Origin; 16],
    /// Where the function begins that this is in, if it is one.
    pub(super) function: Option<Place>,
    /// A constant was surely put where `replace` is, by a register.
    pub(super) sets_replace: bool,
}

impl Origins {
    /// Where the value of a register comes from.
    pub(super) fn get(&self, register: Register) -> Origin {
        let full = register.full_register();
        let at = if full.is_gpr64() { full.number() } else { 16 };
        self.registers.get(at).copied().unwrap_or_default()
    }

    /// That of a function's first argument.
    pub(super) fn argument(&self) -> Origin {
        self.registers[RDI]
    }

    /// That of what a function returns.
    pub(super) fn returned(&self) -> Origin {
        self.registers[RAX]
    }

    /// On both of two ways to one place.
    pub(super) fn joined(&self, other: &Self) -> Self {
        let mut both = self.clone();
        let pairs = both.registers.iter_mut().zip(&other.registers);
        pairs.for_each(|(here, there)| *here = here.or(*there));
        both.function = both.function.filter(|_| both.function == other.function);
        both.sets_replace &= other.sets_replace;
        both
    }

    /// Where a function of the payload begins that is called here.
    pub(super) fn of_called(&self, function: Place) -> Self {
        let mut called = self.only(ARGUMENTS);
        called.function = Some(function);
        called
    }

    /// Behind a call of a function that returns a value of this origin.
    pub(super) fn after_call(&self, returned: Origin) -> Self {
        let mut after = self.only(SAVED);
        after.registers[RAX] = returned;
        after
    }

    fn only(&self, kept: u16) -> Self {
        let mut after = self.clone();
        for (number, register) in after.registers.iter_mut().enumerate() {
            if kept & 1 << number == 0 {
                *register = Origin::default();
            }
        }
        after
    }

    /// Behind an instruction that does not branch. What it reads of a variable of the payload has this source.
    pub(super) fn after(&mut self, instruction: &Instruction, variable: u64) {
        let before = self.clone();
        self.sets_replace |= replace_set_by(instruction).is_some();
        let mut factory = InstructionInfoFactory::new();
        let info = factory.info(instruction);
        let copies =
            instruction.mnemonic() == Mnemonic::Mov && instruction.op0_register().is_gpr64();
        let origin = if copies && instruction.op1_kind() == OpKind::Register {
            before.get(instruction.op1_register())
        } else if copies && instruction.op1_kind() == OpKind::Memory {
            Origin::of(variable)
        } else {
            let memory = is_of_memory(instruction);
            let operand = |r: Register| {
                (0..instruction.op_count()).any(|n| {
                    let is = instruction.op_kind(n) == OpKind::Register;
                    is && bit(instruction.op_register(n)) == bit(r) && is_read(info.op_access(n))
                })
            };
            let base = |r: Register| {
                [instruction.memory_base(), instruction.memory_index()]
                    .iter()
                    .any(|b| bit(*b) == bit(r))
            };
            let reads = info.used_registers().iter().filter(|used| {
                let r = used.register();
                is_read(used.access()) && (!memory || operand(r) || !base(r))
            });
            let may = reads.fold(variable, |may, used| may | before.get(used.register()).may);
            Origin { may, whole: false }
        };
        for used in info
            .used_registers()
            .iter()
            .filter(|u| is_write(u.access()))
        {
            let register = used.register().full_register();
            let changed = self.registers.get_mut(register.number());
            let Some(changed) = changed.filter(|_| register.is_gpr64()) else {
                continue;
            };
            // The rest of the register stays as it is, or it may.
            let part = used.register().size() <= 2 || used.access() != iced_x86::OpAccess::Write;
            let kept = if part { changed.may } else { 0 };
            *changed = Origin {
                may: origin.may | kept,
                whole: origin.whole && !part,
            };
        }
    }
}

/// Whether an instruction has an operand in memory, and not only its address.
pub(super) fn is_of_memory(instruction: &Instruction) -> bool {
    let address_only = matches!(instruction.mnemonic(), Mnemonic::Lea | Mnemonic::Nop);
    let kinds = || (0..instruction.op_count()).map(|n| instruction.op_kind(n));
    !address_only && kinds().any(|kind| kind == OpKind::Memory)
}

/// What an instruction sets `replace` to, if it puts a constant of a byte where that field is, behind an address in a
/// register.
pub(super) fn replace_set_by(instruction: &Instruction) -> Option<u8> {
    let constant = instruction.mnemonic() == Mnemonic::Mov
        && instruction.op0_kind() == OpKind::Memory
        && instruction.op1_kind() == OpKind::Immediate8;
    let plain = constant
        && bit(instruction.memory_base()) != 0
        && instruction.memory_index() == Register::None
        && HOOK_REPLACE.contains(&instruction.memory_displacement64());
    plain.then(|| instruction.immediate8())
}
