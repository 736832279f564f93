//! What is known of the registers and of the stack where an instruction begins.
//!
//! A function of a compiler gives the stack and the registers that its caller keeps values in back as they were, and
//! returns to its caller. Whether that is so follows from what it pushes and pops.

use iced_x86::{Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind, Register};

use super::instruction::{bit, is_read, is_write};
use super::origins::{Origin, Origins};
use super::registers::{known_after, Fields};
use super::Place;

/// Most words that a function has on the stack. The hook of kpatch has less than a dozen.
const WORDS_MAX: usize = 128;
/// Registers that a function leaves as they were: rbx, rbp, r12 to r15.
pub(super) const SAVED: u16 = 1 << 3 | 1 << 5 | 0xf << 12;
/// Registers that arguments are passed in: rdi, rsi, rdx, rcx, r8, r9.
pub(super) const ARGUMENTS: u16 = 1 << 7 | 1 << 6 | 1 << 2 | 1 << 1 | 3 << 8;
const RAX: u16 = 1;
const RBP: u16 = 1 << 5;

/// A word of the stack.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Slot {
    /// What the caller had in this register, one bit.
    Kept(u16),
    /// Bytes that the code itself has put there, one bit each.
    Bytes(u8),
}

/// What is known where an instruction begins. Registers are one bit each.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct State {
    /// Registers that surely hold the address of `struct klp_patch`.
    pub(super) known: u16,
    /// Registers whose value the code itself has made since its function was called.
    made: u16,
    /// The same of their lowest 8 or 16 bits.
    low: u16,
    /// Of [`SAVED`]: those that hold what the caller had there.
    kept: u16,
    /// What was pushed since the function was called, the last on top.
    stack: Vec<Slot>,
    /// How many words were pushed when rbp was set to the top of them, as long as it is there.
    frame: Option<usize>,
    /// Where the values in registers come from; of kpatch's hook only.
    pub(super) origins: Origins,
}

impl State {
    /// Where a function is entered from outside, which begins at `function`.
    pub(super) fn entry(function: Place) -> Self {
        Self {
            known: 0,
            made: 0,
            low: 0,
            kept: SAVED,
            stack: Vec::new(),
            frame: None,
            origins: Origins::default().of_called(function),
        }
    }

    /// Where a function is entered that is called here, and begins at `function`.
    pub(super) fn called(&self, function: Place) -> Self {
        Self {
            known: self.known & ARGUMENTS,
            made: self.made & ARGUMENTS,
            low: self.low & ARGUMENTS,
            origins: self.origins.of_called(function),
            ..Self::entry(function)
        }
    }

    /// Behind a call of a function that returns a value of this origin.
    pub(super) fn after_call(&self, returned: Origin) -> Self {
        Self {
            known: self.known & SAVED,
            made: self.made & SAVED | RAX,
            low: self.low & SAVED | RAX,
            origins: self.origins.after_call(returned),
            ..self.clone()
        }
    }

    /// Whether a return leads to the caller, which finds its registers as they were.
    pub(super) fn returns(&self) -> bool {
        self.stack.is_empty() && self.kept == SAVED
    }

    /// What is known on both of two ways to one place. `None` if they have different stacks.
    pub(super) fn joined(&self, other: &Self) -> Option<Self> {
        let same = self.stack.len() == other.stack.len() && self.frame == other.frame;
        let slots = self.stack.iter().zip(&other.stack);
        let slot = |pair: (&Slot, &Slot)| match pair {
            (a, b) if a == b => *a,
            (Slot::Bytes(a), Slot::Bytes(b)) => Slot::Bytes(a & b),
            _ => Slot::Bytes(0),
        };
        same.then(|| Self {
            known: self.known & other.known,
            made: self.made & other.made,
            low: self.low & other.low,
            kept: self.kept & other.kept,
            stack: slots.map(slot).collect(),
            frame: self.frame,
            origins: self.origins.joined(&other.origins),
        })
    }

    /// What is known behind an instruction that does not branch. `patch` is where `struct klp_patch` is, unless this is
    /// the hook of kpatch, which may use memory, by registers that it has set itself. What it reads of a variable of the
    /// payload has the source `variable`.
    ///
    /// # Errors
    /// What it does that is not understood.
    pub(super) fn after(
        &self,
        instruction: &Instruction,
        fields: &Fields<'_>,
        patch: Option<Place>,
        variable: u64,
    ) -> Result<Self, &'static str> {
        let mut factory = InstructionInfoFactory::new();
        let used = factory.info(instruction).used_registers().to_vec();
        let memory = (0..instruction.op_count()).any(|n| instruction.op_kind(n) == OpKind::Memory);
        self.check_stack_address(instruction)?;
        if patch.is_none() && instruction.mnemonic() != Mnemonic::Leave {
            let on_frame = memory && instruction.memory_base() == Register::RBP;
            for r in used.iter().filter(|r| is_read(r.access())) {
                let set = match r.register().size() {
                    1 | 2 => self.made | self.low,
                    _ => self.made,
                };
                let register = bit(r.register());
                let stack = r.register().full_register() == Register::RSP
                    || register == RBP && on_frame && self.frame.is_some();
                let saves = instruction.mnemonic() == Mnemonic::Push && !memory;
                if register & !set != 0 && !stack && !saves && !sets_all(instruction) {
                    return Err("uses a register that it has not set");
                }
            }
        }
        let mut after = self.clone();
        after.known = known_after(instruction, fields, self.known, patch);
        if patch.is_none() {
            after.origins.after(instruction, variable);
        }
        if patch.is_none() && memory && instruction.mnemonic() != Mnemonic::Lea {
            after.stack_memory(instruction, &mut factory)?;
        }
        match instruction.mnemonic() {
            Mnemonic::Push => after.push(instruction, memory)?,
            Mnemonic::Pop => after.pop(instruction.op0_register(), instruction, 8)?,
            Mnemonic::Leave => {
                let frame = self.frame.ok_or("moves the stack")?;
                after.stack.truncate(frame);
                after.pop(Register::RBP, instruction, 0)?;
            }
            _ if is_stack(instruction.op0_kind(), instruction.op0_register()) => {
                after.shift(instruction, fields)?;
            }
            Mnemonic::Nop => {}
            _ => {
                for r in used.iter().filter(|r| is_write(r.access())) {
                    after.write(r.register(), r.access());
                }
                let base = instruction.mnemonic() == Mnemonic::Mov
                    && is_stack(instruction.op1_kind(), instruction.op1_register());
                if base {
                    // mov %rsp,%rbp
                    after.forget(RBP);
                    after.frame = Some(after.stack.len());
                }
            }
        }
        Ok(after)
    }

    /// Refuses an instruction that has an address of the stack elsewhere than in rsp, and in rbp as compilers have it.
    fn check_stack_address(&self, instruction: &Instruction) -> Result<(), &'static str> {
        let compares = matches!(instruction.mnemonic(), Mnemonic::Cmp | Mnemonic::Test);
        let frame = instruction.mnemonic() == Mnemonic::Mov
            && instruction.op0_kind() == OpKind::Register
            && instruction.op0_register() == Register::RBP
            && instruction.op1_register() == Register::RSP;
        let operand = (1..instruction.op_count())
            .any(|n| is_stack(instruction.op_kind(n), instruction.op_register(n)));
        let base = instruction.memory_base().full_register();
        let address = instruction.mnemonic() == Mnemonic::Lea
            && (base == Register::RSP || base == Register::RBP && self.frame.is_some());
        if operand && !compares && !frame || address {
            return Err("takes an address of the stack");
        }
        Ok(())
    }

    /// Nothing is known of a register any more.
    fn forget(&mut self, register: u16) {
        self.made &= !register;
        self.low &= !register;
        self.kept &= !register;
        if register & RBP != 0 {
            self.frame = None;
        }
    }

    fn write(&mut self, register: Register, access: OpAccess) {
        let (number, before) = (bit(register), (self.made, self.low));
        self.forget(number);
        let surely = matches!(access, OpAccess::Write | OpAccess::ReadWrite);
        match register.size() {
            // The rest of the register stays as it is; of 32 bits, it becomes zero.
            1 | 2 => {
                self.made |= before.0 & number;
                self.low |= if surely { number } else { before.1 & number };
            }
            _ if surely => {
                self.made |= number;
                self.low |= number;
            }
            _ => {
                self.made |= before.0 & number;
                self.low |= before.1 & number;
            }
        }
    }

    fn push(&mut self, instruction: &Instruction, memory: bool) -> Result<(), &'static str> {
        let register = match instruction.op0_kind() {
            OpKind::Register => bit(instruction.op0_register()),
            _ => 0,
        };
        if instruction.stack_pointer_increment() != -8 || self.stack.len() >= WORDS_MAX {
            return Err("moves the stack");
        }
        let made = memory || register == 0 || self.made & register != 0;
        self.stack.push(match made {
            _ if self.kept & register != 0 => Slot::Kept(register),
            true => Slot::Bytes(0xff),
            false => Slot::Bytes(0),
        });
        Ok(())
    }

    fn pop(
        &mut self,
        to: Register,
        instruction: &Instruction,
        increment: i32,
    ) -> Result<(), &'static str> {
        let moved = instruction.stack_pointer_increment();
        if !to.is_gpr64() || to == Register::RSP || increment != 0 && moved != increment {
            return Err("moves the stack");
        }
        let slot = self
            .stack
            .pop()
            .ok_or("takes its return address from the stack")?;
        let register = bit(to);
        self.forget(register);
        match slot {
            Slot::Kept(kept) if kept == register => self.kept |= register,
            Slot::Bytes(0xff) => {
                self.made |= register;
                self.low |= register;
            }
            Slot::Kept(_) | Slot::Bytes(_) => {}
        }
        Ok(())
    }

    /// Makes room on the stack or gives it back: `add` and `sub` of a number of words. Comparing changes nothing.
    fn shift(
        &mut self,
        instruction: &Instruction,
        fields: &Fields<'_>,
    ) -> Result<(), &'static str> {
        let mnemonic = instruction.mnemonic();
        if matches!(mnemonic, Mnemonic::Cmp | Mnemonic::Test) {
            return Ok(());
        }
        let number = matches!(
            instruction.op1_kind(),
            OpKind::Immediate8to64 | OpKind::Immediate32to64
        );
        let whole = instruction.op0_register() == Register::RSP && number;
        let plain = whole && fields.immediate.is_none();
        let by = if plain {
            instruction.immediate(1).cast_signed()
        } else {
            1
        };
        let room = match mnemonic {
            Mnemonic::Sub => by,
            Mnemonic::Add => by.saturating_neg(),
            _ => 1,
        };
        let len = usize::try_from(room / 8)
            .map(|words| self.stack.len().saturating_add(words))
            .or_else(|_| {
                let words = usize::try_from(room.saturating_neg() / 8).unwrap_or(usize::MAX);
                self.stack.len().checked_sub(words).ok_or(())
            });
        match len {
            Ok(len) if room % 8 == 0 && len <= WORDS_MAX => {
                self.stack.resize(len, Slot::Bytes(0));
                Ok(())
            }
            _ => Err("moves the stack"),
        }
    }

    /// What an instruction of the hook of kpatch does to the stack by its operand in memory.
    fn stack_memory(
        &mut self,
        instruction: &Instruction,
        factory: &mut InstructionInfoFactory,
    ) -> Result<(), &'static str> {
        let words = self.stack.len();
        let below = match (instruction.memory_base(), self.frame) {
            (Register::RSP, _) => 0,
            (Register::RBP, Some(frame)) => words.saturating_sub(frame),
            _ => return Ok(()),
        };
        let outside = "uses the stack of its caller";
        let displacement = instruction.memory_displacement64().cast_signed();
        let first = i64::try_from(below.saturating_mul(8))
            .ok()
            .and_then(|below| below.checked_add(displacement))
            .and_then(|first| usize::try_from(first).ok())
            .ok_or(outside)?;
        let size = instruction.memory_size().size();
        let end = first.checked_add(size).ok_or(outside)?;
        if size == 0
            || end > words.saturating_mul(8)
            || instruction.memory_index() != Register::None
        {
            return Err(outside);
        }
        let info = factory.info(instruction);
        let (mut reads, mut writes) = (false, false);
        for used in info.used_memory() {
            reads |= is_read(used.access());
            writes |= is_write(used.access());
        }
        for at in first..end {
            // The last word is on top.
            let word = words.saturating_sub(1).saturating_sub(at / 8);
            let byte = 1u8 << (at % 8);
            let slot = self.stack.get_mut(word).ok_or(outside)?;
            let made = match *slot {
                Slot::Bytes(made) => made,
                Slot::Kept(_) => 0,
            };
            if reads && made & byte == 0 {
                return Err("reads of the stack what it has not put there");
            }
            if writes {
                *slot = Slot::Bytes(made | byte);
            }
        }
        Ok(())
    }
}

/// Whether an instruction sets all bits of a register, whatever it held: `or $-1,%eax`.
fn sets_all(instruction: &Instruction) -> bool {
    instruction.mnemonic() == Mnemonic::Or
        && instruction.op0_kind() == OpKind::Register
        && !matches!(instruction.op1_kind(), OpKind::Register | OpKind::Memory)
        && instruction.immediate(1) == u64::MAX
}

/// Whether an operand is the stack pointer, or a part of it.
fn is_stack(kind: OpKind, register: Register) -> bool {
    kind == OpKind::Register && register.full_register() == Register::RSP
}
