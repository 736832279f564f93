//! The stacks that a thread of execution can be on: that of its task, and those of its CPU.

use locus_guest::addr::{Gva, Range, PAGE_SIZE};
use locus_guest::space::{if_mapped, Space};
use locus_guest::{self as guest, fetch, Window};

use crate::tasks::percpu;
use crate::{Error, Kernel};

/// Largest believed stack of a CPU, in bytes.
const LEN_MAX: u64 = 256 << 10;

/// What a stack is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StackKind {
    /// Of a task: for its system calls, and in PV guests for interrupts too.
    Task,
    /// Of a CPU, for interrupts (`hardirq_stack_ptr`).
    Irq,
    /// Of a CPU, for one of the exceptions that need a stack of their own: double fault, NMI, debug,
    /// machine check, VMM communication.
    Exception,
    /// Of a CPU, for the way from user mode to the task's stack and back.
    Entry,
}

/// A stack, and access to its bytes.
#[derive(Clone, Copy)]
pub struct Stack<'s> {
    /// What it is for.
    pub kind: StackKind,
    /// Where it is, in guest virtual addresses.
    pub range: Range,
    /// Its bytes. Offset 0 is the start of the range.
    pub memory: &'s dyn Window,
}

impl std::fmt::Debug for Stack<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stack")
            .field("kind", &self.kind)
            .field("range", &self.range)
            .finish_non_exhaustive()
    }
}

impl Stack<'_> {
    /// The word at `at`; `None` if it is not all on the stack, is not aligned, or can't be read.
    pub(super) fn word(&self, at: Gva) -> Option<u64> {
        if !at.0.is_multiple_of(8) || !self.range.contains(at) {
            return None;
        }
        let mut bytes = [0; 8];
        let offset = usize::try_from(at.0 - self.range.start.0).ok()?;
        self.memory.read(offset, &mut bytes).ok()?;
        fetch::u64(&bytes, 0)
    }
}

/// A copy of the live part of a stack.
#[derive(Debug)]
pub struct StackCopy {
    /// Offset of the first byte that was copied.
    from: usize,
    bytes: Vec<u8>,
}

impl StackCopy {
    /// Copies the stack `range` from the stack pointer `from` up, or all of it if `from` is not in
    /// it. Both are guest virtual addresses.
    ///
    /// # Errors
    /// As [`Space::read_vec`].
    pub fn read(space: &Space<'_>, range: Range, from: Gva) -> Result<StackCopy, guest::Error> {
        let from = if range.contains(from) {
            from
        } else {
            range.start
        };
        let length = |n: u64| {
            usize::try_from(n).map_err(|_| guest::Error::Odd(format!("{range:?} is no stack")))
        };
        Ok(StackCopy {
            from: length(from.0 - range.start.0)?,
            bytes: space.read_vec(from, length(range.end.0 - from.0)?)?,
        })
    }

    /// Copies all of the stack `range` by `read`, which fills a buffer of so many bytes from the
    /// start of the stack.
    ///
    /// # Errors
    /// Those of `read`.
    pub fn of<E>(
        range: Range,
        read: impl FnOnce(&mut [u8]) -> std::result::Result<(), E>,
    ) -> std::result::Result<StackCopy, E> {
        // A range that this machine can't hold gives an empty copy, of which every read fails.
        let mut bytes = vec![0; usize::try_from(range.len()).unwrap_or(0)];
        read(&mut bytes)?;
        Ok(StackCopy { from: 0, bytes })
    }

    /// What was copied: the end of the stack.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

impl Window for StackCopy {
    fn read(&self, offset: usize, buf: &mut [u8]) -> Result<(), guest::Error> {
        let part = offset.checked_sub(self.from).and_then(|start| {
            let end = start.checked_add(buf.len())?;
            self.bytes.get(start..end)
        });
        let part = part.ok_or(guest::Error::Bounds {
            offset,
            len: buf.len(),
            size: self.from.saturating_add(self.bytes.len()),
        })?;
        buf.copy_from_slice(part);
        Ok(())
    }
}

/// Where the kernel has the stacks of its CPUs. What does not depend on the CPU is looked up once.
///
/// Sources: `hardirq_stack_ptr` (arch/x86/kernel/irq_64.c), `cea_exception_stacks` and
/// `struct cpu_entry_area` (arch/x86/include/asm/cpu_entry_area.h).
#[derive(Debug)]
pub struct CpuStacks {
    /// The per-CPU pointer to the end of the stack for interrupts, and the length of that in bytes.
    irq: Option<(Gva, u64)>,
    /// The per-CPU pointer to the stacks for exceptions.
    exceptions: Option<Gva>,
    /// The stacks near those: how far each is from the first of them (wrapping), and its length, in bytes.
    near: Vec<(StackKind, u64, u64)>,
}

impl CpuStacks {
    /// Looks up what `kernel` has of them.
    ///
    /// # Errors
    /// [`Error::Missing`] if the kernel has no types.
    pub fn new(kernel: &Kernel<'_>) -> Result<CpuStacks, Error> {
        let btf = kernel.btf()?;
        let size = |name: &str| Some(btf.size_of(name).ok()? as u64);
        let irq = kernel.symbols.addr("hardirq_stack_ptr").or_else(|| {
            let offset = btf
                .offset_of_sized("pcpu_hot", "hardirq_stack_ptr", 8)
                .ok()?;
            Some(kernel.symbols.addr("pcpu_hot")?.plus(offset as u64))
        });
        let mut near = Vec::new();
        for name in ["DF", "NMI", "DB", "MCE", "VC", "VC2"] {
            let member = format!("{name}_stack");
            let place = btf.offset_of("cea_exception_stacks", &member);
            let len = btf.array_len("cea_exception_stacks", &member);
            if let (Ok(place), Ok(len)) = (place, len) {
                near.push((StackKind::Exception, place as u64, len as u64));
            }
        }
        // They are a part of the CPU's entry area. The entry stack is another.
        let member = |name| Some(btf.offset_of("cpu_entry_area", name).ok()? as u64);
        if let (Some(own), Some(entry), Some(len)) = (
            member("estacks"),
            member("entry_stack_page"),
            size("entry_stack"),
        ) {
            near.push((StackKind::Entry, entry.wrapping_sub(own), len));
        }
        Ok(CpuStacks {
            irq: irq.zip(size("irq_stack")),
            exceptions: kernel.symbols.addr("cea_exception_stacks"),
            near,
        })
    }

    /// The stacks of the CPU whose per-CPU area is at the guest virtual address `base`, as far as the
    /// kernel has them. A stack that can't be found is left out. PV guests take interrupts and
    /// exceptions on the stack that is in use.
    ///
    /// # Errors
    /// [`Error::Memory`]: the guest's budget is spent.
    pub fn of_cpu(&self, space: &Space<'_>, base: u64) -> Result<Vec<(StackKind, Range)>, Error> {
        let pointer = |symbol: Gva| {
            let at = if_mapped(space.read_u64(percpu(symbol, base)))?;
            Ok::<_, Error>(at.filter(|&at| at != 0))
        };
        let mut found = Vec::new();
        let mut add = |kind, start: u64, len: u64| {
            if (1..=LEN_MAX).contains(&len) {
                found.push((kind, Range::new(Gva(start), len)));
            }
        };
        if let Some((symbol, len)) = self.irq {
            // It points at the last word, or behind it.
            let end = pointer(symbol)?.and_then(|top| top.checked_add(8));
            let end = end.map(|end| end & !(PAGE_SIZE - 1));
            if let Some(start) = end.and_then(|end| end.checked_sub(len)) {
                add(StackKind::Irq, start, len);
            }
        }
        if let Some(symbol) = self.exceptions {
            if let Some(first) = pointer(symbol)? {
                for &(kind, place, len) in &self.near {
                    add(kind, first.wrapping_add(place), len);
                }
            }
        }
        Ok(found)
    }
}
