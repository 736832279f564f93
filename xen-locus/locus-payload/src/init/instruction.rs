//! What single instructions do.

use iced_x86::{ConditionCode, Instruction, Mnemonic, OpAccess, OpKind, Register};

/// Whether an access of this kind may change what it is made to.
pub(super) fn is_write(access: OpAccess) -> bool {
    matches!(
        access,
        OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite
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

/// Whether an instruction gives the stack another place than `push`, `pop` and room for variables do.
pub(super) fn moves_stack(instruction: &Instruction) -> bool {
    let reads = [Mnemonic::Push, Mnemonic::Test, Mnemonic::Cmp];
    let makes_room = matches!(instruction.mnemonic(), Mnemonic::Add | Mnemonic::Sub)
        && instruction.op1_kind() != OpKind::Register
        && instruction.op1_kind() != OpKind::Memory;
    instruction.op0_kind() == OpKind::Register
        && instruction.op0_register().full_register() == Register::RSP
        && !reads.contains(&instruction.mnemonic())
        && !makes_room
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
