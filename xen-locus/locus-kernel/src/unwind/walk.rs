//! One walk of a stack, frame by frame.

use locus_guest::addr::Gva;

use super::walker::Walker;
use super::{Stack, StackFrame, StackKind, Unreliable, Walk, WalkEnd, FRAMES_MAX, PADDINGS};
use crate::orc::{CallerBp, FrameKind, OrcRow, SpBase};

/// First address that is not user mode's.
const USER_END: u64 = 1 << 47;

/// The registers on which frames are based.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Registers {
    pub ax: u64,
    pub dx: u64,
    pub di: u64,
    pub r10: u64,
    pub r13: u64,
    pub bp: u64,
}

/// A walk under way.
pub(super) struct WalkInProgress<'s, 'w, 'k, 'm> {
    pub walker: &'w Walker<'k, 'm>,
    pub stacks: &'s [Stack<'s>],
    /// The task is the idle task of a CPU.
    pub idle: bool,
    /// No frame was stepped over yet.
    pub first: bool,
    pub ip: Gva,
    pub sp: Gva,
    pub bp: u64,
    /// The frame was interrupted at `ip`.
    pub signal: bool,
    /// Registers as they were at `ip`, where that is known.
    pub regs: Option<Registers>,
    /// The stack that `sp` is on, by its number.
    pub at: Option<usize>,
    /// The stacks that were walked, a bit for each: see [`bit`].
    pub visited: u64,
}

impl WalkInProgress<'_, '_, '_, '_> {
    /// Walks to the end of the stack, or to where it fails.
    pub fn run(&mut self) -> Walk {
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
        let open = self.at == Some(found) || self.visited & bit(found)? == 0;
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
            // The code that called is gone, so whether it had a `call` there can't be checked.
            if let Some(row) = code.row_discarded(at) {
                return Ok(row);
            }
        }
        let row = code.row(at).ok_or(Unreliable::NoRow)?;
        // The first code of a CPU pushes its own address, and returns to C (arch/x86/kernel/head_64.S).
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
                // A PV kernel runs in the ring of user mode. Xen clears the ring in what it saves
                // of such a kernel.
                if cs & 3 != 0 {
                    return self.user(regs).map(Some);
                }
                if row.kind == FrameKind::Regs {
                    self.regs = Some(Registers {
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

    /// The caller's stack pointer, or where its registers are, by `row`.
    fn caller_sp(&self, row: OrcRow) -> Result<u64, Unreliable> {
        let offset = i64::from(row.sp.offset);
        let register = |of: fn(Registers) -> u64| self.regs.map(of).ok_or(Unreliable::NoRegister);
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

    /// Notes that the stack pointer is at `sp` now. It may leave its stack only if `may` is set,
    /// and never come back.
    fn enter(&mut self, sp: Gva, may: bool) -> Result<(), Unreliable> {
        let on = |n: usize| self.stacks.get(n).map(|stack| stack.range);
        if let Some(range) = self.at.and_then(on) {
            // The pointer of an empty stack is right behind it.
            if range.contains(sp) || range.end == sp {
                return Ok(());
            }
        }
        if !may {
            return Err(Unreliable::OffStack);
        }
        let found = self.stacks.iter().position(|s| s.range.contains(sp));
        let found = found.ok_or(Unreliable::OffStack)?;
        let bit = bit(found).ok_or(Unreliable::OffStack)?;
        if self.visited & bit != 0 {
            return Err(Unreliable::Backwards);
        }
        self.visited |= bit;
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
            // In the first and last instructions of a system call the stack is that of user mode.
            return if self.first && sp.0 < USER_END {
                Ok(WalkEnd::Kernel)
            } else {
                Err(Unreliable::OffStack)
            };
        };
        let left = stack.range.end.0 - sp.0;
        let belongs = match stack.kind {
            StackKind::Task => PADDINGS.iter().any(|padding| {
                // A thread begins below the place of user mode's registers. An idle task that was
                // brought up on its first frame begins one frame lower.
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

/// The bit of the stack number `stack`. A caller has at most nine stacks: a task's, and those of
/// [`CpuStacks::of_cpu`](super::stack::CpuStacks::of_cpu). There are 64 bits; a walk doesn't enter a stack without one.
fn bit(stack: usize) -> Option<u64> {
    1u64.checked_shl(u32::try_from(stack).ok()?)
}
