//! What single instructions do.

use iced_x86::{ConditionCode, Instruction, Mnemonic, OpAccess, OpKind, Register};

/// Whether an access of this kind may change what it is made to.
pub(super) fn is_write(access: OpAccess) -> bool {
    matches!(
        access,
        OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite
    )
}

/// Whether an access of this kind may take over what it is made to.
pub(super) fn is_read(access: OpAccess) -> bool {
    matches!(
        access,
        OpAccess::Read | OpAccess::CondRead | OpAccess::ReadWrite | OpAccess::ReadCondWrite
    )
}

/// Whether an instruction only computes in registers, or moves words between them, memory and the stack.
pub(super) fn is_plain(instruction: &Instruction) -> bool {
    let registers = (0..instruction.op_count())
        .filter(|&n| instruction.op_kind(n) == OpKind::Register)
        .all(|n| instruction.op_register(n).is_gpr());
    let known = matches!(
        instruction.mnemonic(),
        Mnemonic::Add
            | Mnemonic::And
            | Mnemonic::Cdq
            | Mnemonic::Cdqe
            | Mnemonic::Cmp
            | Mnemonic::Cqo
            | Mnemonic::Dec
            | Mnemonic::Endbr64
            | Mnemonic::Imul
            | Mnemonic::Inc
            | Mnemonic::Lea
            | Mnemonic::Leave
            | Mnemonic::Mov
            | Mnemonic::Movsx
            | Mnemonic::Movsxd
            | Mnemonic::Movzx
            | Mnemonic::Mul
            | Mnemonic::Neg
            | Mnemonic::Nop
            | Mnemonic::Not
            | Mnemonic::Or
            | Mnemonic::Pop
            | Mnemonic::Push
            | Mnemonic::Sar
            | Mnemonic::Shl
            | Mnemonic::Shr
            | Mnemonic::Sub
            | Mnemonic::Test
            | Mnemonic::Xor
    );
    // setcc and cmovcc
    registers && (known || instruction.condition_code() != ConditionCode::None)
}

/// Whether an instruction copies or fills memory that registers give the address of.
pub(super) fn copies_memory(instruction: &Instruction) -> bool {
    let known = matches!(
        instruction.mnemonic(),
        Mnemonic::Movsb
            | Mnemonic::Movsd
            | Mnemonic::Movsq
            | Mnemonic::Movsw
            | Mnemonic::Stosb
            | Mnemonic::Stosd
            | Mnemonic::Stosq
            | Mnemonic::Stosw
    );
    known && instruction.is_string_instruction() && instruction.segment_prefix() == Register::None
}

/// Where the canary of the stack is in the memory of a CPU (`fixed_percpu_data`, arch/x86/include/asm/processor.h).
const CANARY: u64 = 0x28;

/// Whether the operand in memory is the canary of the stack.
pub(super) fn is_canary(instruction: &Instruction) -> bool {
    instruction.segment_prefix() == Register::GS
        && instruction.memory_base() == Register::None
        && instruction.memory_index() == Register::None
        && instruction.memory_displacement64() == CANARY
}

/// The bit that stands for a general register; 0 for others.
pub(super) fn bit(register: Register) -> u16 {
    let full = register.full_register();
    if full.is_gpr64() {
        1 << full.number()
    } else {
        0
    }
}
