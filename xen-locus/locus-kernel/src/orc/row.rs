//! What a row of an ORC table says, in the same words for every format.

/// What the caller's stack pointer is computed from (`ORC_REG_*`, arch/x86/include/asm/orc_types.h).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SpBase {
    /// Nothing: no caller can be found.
    Undefined,
    /// The stack pointer, plus the offset.
    Sp,
    /// The frame pointer, plus the offset.
    Bp,
    /// The word that the stack pointer points to, plus the offset. Before Linux kernel commit
    /// 87ccc826bf1c ("x86/unwind/orc: Change REG_SP_INDIRECT") the offset was added before the word
    /// was read; Debian's 5.10, which is older, has no such row.
    SpIndirect,
    /// The word at the frame pointer plus the offset.
    BpIndirect,
    /// RAX. Here and in the following the offset has no meaning.
    Ax,
    /// RDX.
    Dx,
    /// RDI.
    Di,
    /// R10.
    R10,
    /// R13.
    R13,
}

/// How to compute the caller's stack pointer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CallerSp {
    /// What it is computed from.
    pub base: SpBase,
    /// Offset, in bytes; [`SpBase`] says where it is added.
    pub offset: i16,
}

/// Where the caller's frame pointer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CallerBp {
    /// Still in RBP. If the frame is saved registers, in their `bp`.
    Kept,
    /// In memory, at the caller's stack pointer (the row's [`CallerSp`]) plus so many bytes.
    FromPrevSp(i16),
    /// In memory, at RBP plus so many bytes.
    FromBp(i16),
}

/// What is at the caller's stack pointer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrameKind {
    /// A return address in the word below it.
    Call,
    /// `struct pt_regs` begins there, with the caller's registers.
    Regs,
    /// An interrupt frame (RIP, CS, RFLAGS, RSP, SS) begins there.
    RegsPartial,
    /// Nothing: there is no caller, and a walk ends well.
    EndOfStack,
    /// Nothing known: the kernel can't unwind here, and a walk fails.
    Undefined,
}

/// How to step from an address to its caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OrcRow {
    /// The caller's stack pointer.
    pub sp: CallerSp,
    /// The caller's frame pointer.
    pub bp: CallerBp,
    /// What is at the caller's stack pointer.
    pub kind: FrameKind,
    /// Whether the caller was interrupted. If so, its address is the instruction that it goes on
    /// with, and its row is looked up there. If not, its address is a return address, and its row
    /// is looked up one byte before it.
    pub signal: bool,
}
