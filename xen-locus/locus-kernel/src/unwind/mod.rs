//! Stack traces that are proven to be complete, by the kernel's own ORC data.
//!
//! A stack is unwound as the kernel unwinds it (arch/x86/kernel/unwind_orc.c). It is *reliable* in
//! the sense of livepatch (`arch_stack_walk_reliable`, arch/x86/kernel/stacktrace.c): the walk
//! ended where a stack must end, at the registers of user mode or at a row that says so, and
//! everything on the way was understood. Three more things are required here: every return address
//! is right behind a `call`; registers of user mode are where they belong; and a return address
//! that was exchanged for a trampoline ends the walk as not reliable.
//!
//! The result depends on the guest's stacks, code and ORC rows alone, each of which is checked.
//! Every walk is bounded.
//!
//! - [`Walker`] (`walker.rs`) walks one stack that the caller has copied.
//! - [`task_stacks`] walks the stacks of all tasks; [`stack`] has the kinds of stacks.
//! - [`frame_names`] names the function that a frame is in.

mod code;
pub mod frame_names;
pub mod stack;
pub mod task_stacks;
#[cfg(test)]
mod tests;
mod walk;
mod walker;

use locus_guest::addr::Gva;

pub use self::code::{ends_call, hiding, unknown_hider};
pub use self::stack::{Stack, StackKind};
pub use self::walker::Walker;

/// Most frames of one walk. The kernel's own limit for those that ask is far lower.
const FRAMES_MAX: usize = 1024;
/// Unused bytes at the top of a task's stack: in kernels that know FRED, and in others
/// (`TOP_OF_KERNEL_STACK_PADDING`, arch/x86/include/asm/thread_info.h).
pub const PADDINGS: [u64; 2] = [16, 0];

/// A frame of a stack: where a function goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StackFrame {
    /// Guest virtual address of the instruction that it goes on with.
    pub address: Gva,
    /// Whether it was interrupted there, or is there now. If not, the address is a return address,
    /// and the instruction before it is the `call`.
    pub interrupted: bool,
}

/// How a reliable walk ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WalkEnd {
    /// At the registers of user mode.
    User,
    /// At the end of a stack that does not lead to user mode: of a kernel thread, an idle task, a
    /// task that never ran, or in the kernel's entry code.
    Kernel,
    /// At once, because there is no stack: the task is dead, and its stack was freed or will be.
    Gone,
}

/// Why a walk is not reliable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unreliable {
    /// No ORC row applies to this address.
    NoRow,
    /// The row says that the kernel can't unwind there.
    Undefined,
    /// It is no return address: there is no `call` before it.
    NoCall,
    /// The return address was exchanged for the trampoline of this name. The real one is in a list
    /// of the kernel.
    Hidden(&'static str),
    /// The frame is based on a register whose value isn't known there.
    NoRegister,
    /// The stack pointer is on none of the stacks that the walk was given.
    OffStack,
    /// The stack pointer went down, or back to a stack that it had left.
    Backwards,
    /// A word of the stack can't be read.
    Unreadable,
    /// The stack ends at another place than where it must.
    EndElsewhere,
    /// There are more than 1024 frames.
    TooLong,
    /// The task is on a CPU, and the registers of that moment are not known.
    Runs,
    /// The task ran each time its stack was read.
    RanMeanwhile,
}

impl std::fmt::Display for Unreliable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Unreliable::NoRow => "no ORC row",
            Unreliable::Undefined => "ORC has no caller",
            Unreliable::NoCall => "not behind a call",
            Unreliable::Hidden(name) => return write!(f, "caller hidden by {name}"),
            Unreliable::NoRegister => "register not known",
            Unreliable::OffStack => "off its stacks",
            Unreliable::Backwards => "stack pointer goes back",
            Unreliable::Unreadable => "stack can't be read",
            Unreliable::EndElsewhere => "ends in the middle of the stack",
            Unreliable::TooLong => "too many frames",
            Unreliable::Runs => "it runs",
            Unreliable::RanMeanwhile => "it ran while its stack was read",
        })
    }
}

/// The frames of a stack.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Walk {
    /// From the innermost outwards. If the walk failed, it did so at the last of them.
    pub frames: Vec<StackFrame>,
    /// How it ended, or why it failed.
    pub end: Result<WalkEnd, Unreliable>,
}

impl Walk {
    /// Whether these are proven to be all frames.
    #[must_use]
    pub fn is_reliable(&self) -> bool {
        self.end.is_ok()
    }

    fn failed(why: Unreliable) -> Walk {
        Walk {
            frames: Vec::new(),
            end: Err(why),
        }
    }
}
