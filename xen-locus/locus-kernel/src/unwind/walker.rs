//! Walks the stacks of one kernel.

use locus_guest::addr::Gva;
use locus_guest::Vcpu;

use super::code::CodeMap;
use super::walk::{Registers, WalkInProgress};
use super::{Stack, Unreliable, Walk, WalkEnd};
use crate::{Error, Kernel};

/// Where the members of the structures on a stack are: offsets and sizes in bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct StackLayout {
    /// Size of `pt_regs`, and members.
    pub regs: u64,
    pub ip: u64,
    pub cs: u64,
    pub sp: u64,
    pub ax: u64,
    pub dx: u64,
    pub di: u64,
    pub r10: u64,
    pub r13: u64,
    pub bp: u64,
    /// Size of `inactive_task_frame`, and members.
    pub inactive: u64,
    pub inactive_bp: u64,
    pub inactive_ret: u64,
}

impl StackLayout {
    fn of(kernel: &Kernel<'_>) -> Result<StackLayout, Error> {
        let btf = kernel.btf()?;
        let size = |name| Ok::<u64, Error>(btf.size_of(name)? as u64);
        let inactive =
            |name| Ok::<u64, Error>(btf.offset_of_sized("inactive_task_frame", name, 8)? as u64);
        let reg = |name| Ok::<u64, Error>(btf.offset_of_sized("pt_regs", name, 8)? as u64);
        let layout = StackLayout {
            regs: size("pt_regs")?,
            ip: reg("ip")?,
            // Two bytes have this name since FRED came (arch/x86/include/asm/ptrace.h, v6.9), eight before. Two count.
            cs: btf.offset_of("pt_regs", "cs")? as u64,
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
///
/// It remembers what it saw of code, so [`Walker::refresh`] must follow when modules may have come or gone.
#[derive(Debug)]
pub struct Walker<'k, 'm> {
    pub(super) code: CodeMap<'k, 'm>,
    pub(super) layout: StackLayout,
}

impl<'k, 'm> Walker<'k, 'm> {
    /// Reads the kernel's ORC table, about 4 MB, and lists its modules. The tables of modules are
    /// read at first use.
    ///
    /// # Errors
    /// [`Error::Missing`] if the kernel has no ORC table or lacks a type; [`Error::Odd`] if the
    /// table is not well-formed; [`Error::Memory`].
    pub fn new(kernel: &'k Kernel<'m>) -> Result<Walker<'k, 'm>, Error> {
        Ok(Walker {
            code: CodeMap::read(kernel)?,
            layout: StackLayout::of(kernel)?,
        })
    }

    /// Lists the modules again, and forgets what was seen of code.
    ///
    /// # Errors
    /// The list of modules can't be read.
    pub fn refresh(&mut self) -> Result<(), Error> {
        self.code.refresh()
    }

    /// Walks the stack of a task that is on no CPU. `sp` is its saved stack pointer (`thread.sp`),
    /// a guest virtual address at which there is a `struct inactive_task_frame`
    /// (arch/x86/include/asm/switch_to.h). `idle` says that it is the idle task of a CPU.
    #[must_use]
    pub fn sleeping(&self, sp: Gva, stack: Stack<'_>, idle: bool) -> Walk {
        let word = |offset: u64| stack.word(sp.plus(offset));
        let layout = &self.layout;
        let (Some(bp), Some(ip)) = (word(layout.inactive_bp), word(layout.inactive_ret)) else {
            return Walk::failed(Unreliable::OffStack);
        };
        let ip = Gva(ip);
        let stacks = [stack];
        let mut unwind = WalkInProgress {
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

    /// Walks from the registers of a CPU. `stacks` are those that it may be on: that of its task, and its own
    /// ([`CpuStacks`](super::stack::CpuStacks)). Registers and stacks must be of the same moment.
    #[must_use]
    pub fn running(&self, vcpu: &Vcpu, stacks: &[Stack<'_>], idle: bool) -> Walk {
        if vcpu.user {
            return Walk {
                frames: Vec::new(),
                end: Ok(WalkEnd::User),
            };
        }
        let mut unwind = WalkInProgress {
            ip: vcpu.rip,
            sp: vcpu.rsp,
            bp: vcpu.rbp,
            signal: true,
            regs: Some(Registers {
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
