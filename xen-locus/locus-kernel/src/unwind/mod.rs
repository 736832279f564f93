//! Who is where on a kernel stack, proven by the kernel's own ORC data.
//!
//! A stack is unwound as the kernel unwinds it (arch/x86/kernel/unwind_orc.c), and is *reliable* as
//! livepatch means it (`arch_stack_walk_reliable`, arch/x86/kernel/stacktrace.c): the walk ended
//! where a stack must end, at the registers of user mode or at a row that says so, and all on the
//! way was understood. More is asked here than there: every return address must stand right behind
//! a `call`, registers of user mode must be where they belong, and a return address that was
//! exchanged for a trampoline ends the walk.
//!
//! Of the guest's memory only the stacks and the code change what is said; nothing is believed that
//! was not looked up, and every walk is bounded.

mod code;
pub mod frame_names;
pub mod stack;
pub mod task_stacks;
#[cfg(test)]
mod tests;

use crate::orc::{CallerBp, FrameKind, OrcRow, SpBase};
use crate::{Error, Kernel};
use code::CodeMap;
pub use code::{ends_call, hiding};
use locus_guest::addr::Gva;
use locus_guest::Vcpu;
pub use stack::{Stack, StackKind};

/// Most frames of one walk. The kernel's own limit for those who ask is far lower.
const FRAMES_MAX: usize = 1024;
/// Unused bytes at the top of a task's stack where the kernel knows FRED
/// (`TOP_OF_KERNEL_STACK_PADDING`, arch/x86/include/asm/thread_info.h), and elsewhere.
pub const PADDINGS: [u64; 2] = [16, 0];
/// First address that is not user mode's.
const USER_END: u64 = 1 << 47;

/// A place on a stack where somebody goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StackFrame {
    /// Address of the instruction to go on with.
    pub address: Gva,
    /// It was interrupted there, or is there now; else it is a return address, and the instruction
    /// before it is the `call`.
    pub interrupted: bool,
}

/// How a walk that can be relied on ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WalkEnd {
    /// At the registers of user mode.
    User,
    /// At the end of a stack below which nobody ever was in user mode, or not yet: kernel threads,
    /// idle tasks, tasks that never ran, the kernel's entry code.
    Kernel,
    /// There is no stack: the task is dead, and its stack was given back or will be.
    Gone,
}

/// Why a walk can't be relied on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unreliable {
    /// No ORC row is for this address.
    NoRow,
    /// The row says that the kernel doesn't know the stack there.
    Undefined,
    /// It is no return address: there is no `call` before it.
    NoCall,
    /// The return address was exchanged: the caller is on a list of the kernel's.
    Hidden(&'static str),
    /// The frame is based on a register that isn't known there.
    NoRegister,
    /// The stack pointer is on none of the stacks that it may be on.
    OffStack,
    /// The stack pointer went down, or back to a stack that it had left.
    Backwards,
    /// A word of the stack can't be read.
    Unreadable,
    /// The stack ends elsewhere than where it must.
    EndElsewhere,
    /// There are too many frames.
    TooLong,
    /// It is on a CPU whose registers of that moment are not known.
    Runs,
    /// It ran, each time its stack was read.
    Restless,
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
            Unreliable::Restless => "it ran while its stack was read",
        })
    }
}

/// What a walk showed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Walk {
    /// From the innermost outwards. If the walk failed, the last is where it did.
    pub frames: Vec<StackFrame>,
    /// How it ended, or why it failed.
    pub end: Result<WalkEnd, Unreliable>,
}

impl Walk {
    /// Whether there can't be other frames than these.
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

/// The registers on which frames are based.
#[derive(Clone, Copy, Debug, Default)]
struct Regs {
    ax: u64,
    dx: u64,
    di: u64,
    r10: u64,
    r13: u64,
    bp: u64,
}

/// Where the members of the structures on a stack stand, in bytes.
#[derive(Clone, Copy, Debug)]
struct StackLayout {
    /// Size of `pt_regs`, and members.
    regs: u64,
    ip: u64,
    cs: u64,
    sp: u64,
    ax: u64,
    dx: u64,
    di: u64,
    r10: u64,
    r13: u64,
    bp: u64,
    /// Size of `inactive_task_frame`, and members.
    inactive: u64,
    inactive_bp: u64,
    inactive_ret: u64,
}

impl StackLayout {
    fn of(kernel: &Kernel<'_>) -> Result<StackLayout, Error> {
        let btf = kernel.btf()?;
        let size = |name| Ok::<u64, Error>(btf.size_of(name)? as u64);
        let inactive = |name| Ok::<u64, Error>(btf.offset_of("inactive_task_frame", name)? as u64);
        let reg = |name| Ok::<u64, Error>(btf.offset_of("pt_regs", name)? as u64);
        let layout = StackLayout {
            regs: size("pt_regs")?,
            ip: reg("ip")?,
            cs: reg("cs")?,
            sp: reg("sp")?,
            ax: reg("ax")?,
            dx: reg("dx")?,
            di: reg("di")?,
            r10: reg("r10")?,
            r13: reg("r13")?,
            bp: reg("bp")?,
            inactive: size("inactive_task_frame")?,
            inactive_bp: inactive("bp")?,
            inactive_ret: inactive("ret_addr")?,
        };
        // An interrupt frame is the end of pt_regs: five words, which the processor pushes.
        let frame = layout.regs.checked_sub(40);
        if frame != Some(layout.ip) || layout.cs != layout.ip + 8 || layout.sp != layout.ip + 24 {
            return Err(Error::Odd(format!(
                "struct pt_regs has {} bytes, ip at {}, cs at {}, sp at {}; expected an interrupt \
                 frame at its end",
                layout.regs, layout.ip, layout.cs, layout.sp
            )));
        }
        Ok(layout)
    }
}

/// Walks the stacks of one kernel.
#[derive(Debug)]
pub struct Walker<'k, 'm> {
    code: CodeMap<'k, 'm>,
    layout: StackLayout,
}

impl<'k, 'm> Walker<'k, 'm> {
    /// Reads the kernel's ORC table, about 4 MB, and lists its modules. Tables of modules are read
    /// when they are wanted.
    ///
    /// # Errors
    /// The kernel has no ORC table or lacks a type, or memory can't be read.
    pub fn new(kernel: &'k Kernel<'m>) -> Result<Walker<'k, 'm>, Error> {
        Ok(Walker {
            code: CodeMap::read(kernel)?,
            layout: StackLayout::of(kernel)?,
        })
    }

    /// Lists the modules anew, and forgets what was seen of code: a module may have come or gone.
    ///
    /// # Errors
    /// The list can't be read.
    pub fn refresh(&mut self) -> Result<(), Error> {
        self.code.refresh()
    }

    /// Walks the stack of a task that is on no CPU. `sp` is its saved stack pointer
    /// (`thread.sp`), which points at a `struct inactive_task_frame`; `idle` says that it is the
    /// idle task of a CPU.
    #[must_use]
    pub fn sleeping(&self, sp: Gva, stack: Stack<'_>, idle: bool) -> Walk {
        let word = |offset: u64| stack.word(sp.plus(offset));
        let layout = &self.layout;
        let (Some(bp), Some(ip)) = (word(layout.inactive_bp), word(layout.inactive_ret)) else {
            return Walk::failed(Unreliable::OffStack);
        };
        let ip = Gva(ip);
        let stacks = [stack];
        let mut unwind = Unwind {
            ip,
            sp: sp.plus(layout.inactive),
            bp,
            signal: self.code.is_first(ip),
            regs: None,
            at: None,
            visited: 0,
            first: false,
            idle,
            stacks: &stacks,
            walker: self,
        };
        unwind.run()
    }

    /// Walks what a CPU is at. `stacks` are those it may be on: its task's, and its own (see
    /// [`stack::of_cpu`]). The registers must be of the same moment as the stacks.
    #[must_use]
    pub fn running(&self, vcpu: &Vcpu, stacks: &[Stack<'_>], idle: bool) -> Walk {
        if vcpu.user {
            return Walk {
                frames: Vec::new(),
                end: Ok(WalkEnd::User),
            };
        }
        let mut unwind = Unwind {
            ip: vcpu.rip,
            sp: vcpu.rsp,
            bp: vcpu.rbp,
            signal: true,
            regs: Some(Regs {
                ax: vcpu.rax,
                dx: vcpu.rdx,
                di: vcpu.rdi,
                r10: vcpu.r10,
                r13: vcpu.r13,
                bp: vcpu.rbp,
            }),
            at: None,
            visited: 0,
            first: true,
            idle,
            stacks,
            walker: self,
        };
        unwind.run()
    }
}

/// A walk under way.
struct Unwind<'s, 'w, 'k, 'm> {
    walker: &'w Walker<'k, 'm>,
    stacks: &'s [Stack<'s>],
    idle: bool,
    /// Nothing was stepped over yet.
    first: bool,
    ip: Gva,
    sp: Gva,
    bp: u64,
    /// `ip` was interrupted there.
    signal: bool,
    /// Registers as they were at `ip`, where that is known.
    regs: Option<Regs>,
    /// The stack that `sp` is on, by its number.
    at: Option<usize>,
    /// The stacks that were walked, a bit for each.
    visited: u64,
}

impl Unwind<'_, '_, '_, '_> {
    fn run(&mut self) -> Walk {
        let mut frames = Vec::new();
        let end = loop {
            if frames.len() >= FRAMES_MAX {
                break Err(Unreliable::TooLong);
            }
            frames.push(StackFrame {
                address: self.ip,
                interrupted: self.signal,
            });
            match self.step() {
                Ok(None) => self.first = false,
                Ok(Some(end)) => break Ok(end),
                Err(why) => break Err(why),
            }
        };
        Walk { frames, end }
    }

    /// The stack that holds `at`, if the walk may be there.
    fn stack_of(&self, at: Gva) -> Option<usize> {
        let holds = |stack: &Stack<'_>| stack.range.contains(at);
        let found = self.stacks.iter().position(holds)?;
        let open = self.at == Some(found) || self.visited & bit(found) == 0;
        open.then_some(found)
    }

    fn word(&self, at: u64) -> Result<u64, Unreliable> {
        let at = Gva(at);
        let stack = self.stack_of(at).and_then(|n| self.stacks.get(n));
        let stack = stack.ok_or(Unreliable::OffStack)?;
        stack.word(at).ok_or(Unreliable::Unreadable)
    }

    fn row(&self) -> Result<OrcRow, Unreliable> {
        let code = &self.walker.code;
        let ip = self.ip;
        if let Some(name) = code.hiding(ip) {
            return Err(Unreliable::Hidden(name));
        }
        // The call may be the last instruction of its function.
        let at = if self.signal {
            ip
        } else {
            Gva(ip.0.wrapping_sub(1))
        };
        if self.idle && !self.signal {
            // What called is gone, and nothing is to be seen of it.
            if let Some(row) = code.row_discarded(at) {
                return Ok(row);
            }
        }
        let row = code.row(at).ok_or(Unreliable::NoRow)?;
        // The first code of a CPU puts its own address there, and returns to C (arch/x86/kernel/head_64.S).
        let is_last = row.kind == FrameKind::EndOfStack;
        if !self.signal && !is_last && !code.is_after_call(ip) {
            return Err(Unreliable::NoCall);
        }
        Ok(row)
    }

    /// Goes to the caller, or says that there is none.
    fn step(&mut self) -> Result<Option<WalkEnd>, Unreliable> {
        let row = self.row()?;
        match row.kind {
            FrameKind::Undefined => return Err(Unreliable::Undefined),
            FrameKind::EndOfStack => return self.end_of_stack().map(Some),
            FrameKind::Call | FrameKind::Regs | FrameKind::RegsPartial => {}
        }
        if self.at.is_none() {
            self.enter(self.sp, true)?;
        }
        let from = self.sp;
        let sp = self.caller_sp(row)?;
        let layout = &self.walker.layout;
        let crosses = row.kind != FrameKind::Call || row.sp.base != SpBase::Sp;
        match row.kind {
            FrameKind::Regs | FrameKind::RegsPartial => {
                // An interrupt frame is the end of full registers.
                let regs = if row.kind == FrameKind::Regs {
                    sp
                } else {
                    sp.wrapping_sub(layout.ip)
                };
                let member = |offset: u64| self.word(regs.wrapping_add(offset));
                let (ip, cs, next) = (member(layout.ip)?, member(layout.cs)?, member(layout.sp)?);
                // Xen takes the ring out of what it saves of a PV kernel, which runs in user mode's.
                if cs & 3 != 0 {
                    return self.user(regs).map(Some);
                }
                if row.kind == FrameKind::Regs {
                    self.regs = Some(Regs {
                        ax: member(layout.ax)?,
                        dx: member(layout.dx)?,
                        di: member(layout.di)?,
                        r10: member(layout.r10)?,
                        r13: member(layout.r13)?,
                        bp: member(layout.bp)?,
                    });
                }
                self.ip = Gva(ip);
                self.sp = Gva(next);
            }
            _ => {
                self.ip = Gva(self.word(sp.wrapping_sub(8))?);
                self.sp = Gva(sp);
                self.regs = None;
            }
        }
        self.bp = match row.bp {
            CallerBp::Kept => self.regs.map_or(self.bp, |regs| regs.bp),
            CallerBp::FromPrevSp(offset) => self.word(sp.wrapping_add_signed(offset.into()))?,
            CallerBp::FromBp(offset) => self.word(self.bp.wrapping_add_signed(offset.into()))?,
        };
        self.signal = row.signal;
        let before = self.at;
        self.enter(self.sp, crosses)?;
        if self.at == before && self.sp <= from {
            return Err(Unreliable::Backwards);
        }
        Ok(None)
    }

    /// The caller's stack pointer, or where its registers are, as `row` has it.
    fn caller_sp(&self, row: OrcRow) -> Result<u64, Unreliable> {
        let offset = i64::from(row.sp.offset);
        let register = |of: fn(Regs) -> u64| self.regs.map(of).ok_or(Unreliable::NoRegister);
        Ok(match row.sp.base {
            SpBase::Undefined => return Err(Unreliable::Undefined),
            SpBase::Sp => {
                let pushed = self
                    .walker
                    .code
                    .pushed(self.ip)
                    .ok_or(Unreliable::Undefined)?;
                self.sp.0.wrapping_add(pushed).wrapping_add_signed(offset)
            }
            SpBase::Bp => self.bp.wrapping_add_signed(offset),
            SpBase::SpIndirect => self.word(self.sp.0)?.wrapping_add_signed(offset),
            SpBase::BpIndirect => self.word(self.bp.wrapping_add_signed(offset))?,
            SpBase::Ax => register(|r| r.ax)?,
            SpBase::Dx => register(|r| r.dx)?,
            SpBase::Di => register(|r| r.di)?,
            SpBase::R10 => register(|r| r.r10)?,
            SpBase::R13 => register(|r| r.r13)?,
        })
    }

    /// The stack pointer is at `sp` now. It leaves a stack only if it `may`, and does not come back.
    fn enter(&mut self, sp: Gva, may: bool) -> Result<(), Unreliable> {
        let on = |n: usize| self.stacks.get(n).map(|stack| stack.range);
        if let Some(range) = self.at.and_then(on) {
            // An empty stack's pointer is right behind it.
            if range.contains(sp) || range.end == sp {
                return Ok(());
            }
        }
        if !may {
            return Err(Unreliable::OffStack);
        }
        let found = self.stacks.iter().position(|s| s.range.contains(sp));
        let found = found.ok_or(Unreliable::OffStack)?;
        if self.visited & bit(found) != 0 {
            return Err(Unreliable::Backwards);
        }
        self.visited |= bit(found);
        self.at = Some(found);
        Ok(())
    }

    /// Registers of user mode at `regs` end the walk, where they belong: at the top of the stack.
    fn user(&self, regs: u64) -> Result<WalkEnd, Unreliable> {
        let end = Gva(regs.wrapping_add(self.walker.layout.regs));
        let last = Gva(end.0.wrapping_sub(8));
        let stack = self.stack_of(last).and_then(|n| self.stacks.get(n));
        let stack = stack.ok_or(Unreliable::OffStack)?;
        let above = stack.range.end.0.saturating_sub(end.0);
        let belongs = match stack.kind {
            StackKind::Task => PADDINGS.contains(&above),
            StackKind::Entry | StackKind::Exception => above == 0,
            StackKind::Irq => false,
        };
        if belongs {
            Ok(WalkEnd::User)
        } else {
            Err(Unreliable::EndElsewhere)
        }
    }

    /// The row says that the stack ends here; it must be a place where that can be.
    fn end_of_stack(&self) -> Result<WalkEnd, Unreliable> {
        let layout = &self.walker.layout;
        let sp = self.sp;
        let holds = |stack: &&Stack<'_>| stack.range.contains(sp) || stack.range.end == sp;
        let Some(stack) = self.stacks.iter().find(holds) else {
            // In a system call's first or last instructions the stack is still or again user mode's.
            return if self.first && sp.0 < USER_END {
                Ok(WalkEnd::Kernel)
            } else {
                Err(Unreliable::OffStack)
            };
        };
        let left = stack.range.end.0 - sp.0;
        let belongs = match stack.kind {
            StackKind::Task => PADDINGS.iter().any(|padding| {
                // Below the place of user mode's registers begins what a thread does; an idle task
                // that was brought up on its first frame begins below that.
                let start = padding + layout.regs;
                left == start
                    || (self.first && left < start)
                    || (self.idle && left == start + layout.inactive)
            }),
            StackKind::Entry => self.first,
            StackKind::Irq | StackKind::Exception => false,
        };
        if belongs {
            Ok(WalkEnd::Kernel)
        } else {
            Err(Unreliable::EndElsewhere)
        }
    }
}

fn bit(stack: usize) -> u64 {
    u32::try_from(stack)
        .ok()
        .and_then(|n| 1u64.checked_shl(n))
        .unwrap_or(0)
}
