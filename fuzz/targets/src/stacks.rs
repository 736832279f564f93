//! Stacks, and the registers of the thread that uses them.

use locus_guest::addr::{Gva, Range};
use locus_guest::budget::Budget;
use locus_guest::{self as guest, fetch, GuestType, Vcpu, Window};
use locus_kernel::fixture_world::frames::{
    after, CS, EXCEPTION, FORK, INACTIVE, INTERRUPT, KTHREAD, ON_IRQ_STACK, REGS, RIP, RSP,
    SCHEDULE, SYSCALL,
};
use locus_kernel::fixture_world::{World, IDLE, PATCHED, STACKS};
use locus_kernel::unwind::{Stack, StackKind, Walk, Walker};
use locus_kernel::Kernel;

/// Size of a stack, in bytes.
const LEN: u64 = 0x1000;
/// The three stacks of an input: of a task, of a CPU for interrupts, of a CPU for an exception.
const KINDS: [StackKind; 3] = [StackKind::Task, StackKind::Irq, StackKind::Exception];
/// Number of words with registers in front of the stacks.
const HEAD: usize = 8;
/// Offset of the registers of user mode in a stack.
const TOP: u64 = LEN - REGS;

struct StackBytes(Vec<u8>);

impl Window for StackBytes {
    fn read(&self, offset: usize, buf: &mut [u8]) -> Result<(), guest::Error> {
        let (len, size) = (buf.len(), self.0.len());
        let end = offset.saturating_add(len);
        let bytes = self.0.get(offset..end);
        buf.copy_from_slice(bytes.ok_or(guest::Error::Bounds { offset, len, size })?);
        Ok(())
    }
}

fn start(stack: usize) -> u64 {
    STACKS.0 + ((stack as u64 + 1) << 20)
}

thread_local! {
    static WALKER: (Walker<'static, 'static>, Budget) = {
        let world = Box::leak(Box::new(World::new(GuestType::Pv)));
        let kernel = Kernel::read(&world.memory, world.kind, &world.vcpus).unwrap();
        let budget = kernel.space.budget().clone();
        (Walker::new(Box::leak(Box::new(kernel))).unwrap(), budget)
    };
}

/// Walks the three stacks in `data` from the registers at its start, once as those of a running CPU, and once
/// from the saved stack pointer of a sleeping task.
fn walks(data: &[u8], idle: bool) -> [Walk; 2] {
    let word = |n: usize| fetch::u64(data, 8 * n).unwrap_or(0);
    let memory = [0, 1, 2].map(|n| {
        let part = data.get(8 * HEAD + n * LEN as usize..).unwrap_or_default();
        let mut bytes = part[..part.len().min(LEN as usize)].to_vec();
        bytes.resize(LEN as usize, 0);
        StackBytes(bytes)
    });
    let stacks = [0, 1, 2].map(|n| Stack {
        kind: KINDS[n],
        range: Range::new(Gva(start(n)), LEN),
        memory: &memory[n],
    });
    let vcpu = Vcpu {
        online: true,
        rip: Gva(word(0)),
        rsp: Gva(word(1)),
        rbp: word(2),
        rax: word(3),
        rdx: word(4),
        rdi: word(5),
        r10: word(6),
        r13: word(7),
        ..Vcpu::default()
    };
    WALKER.with(|(walker, budget)| {
        budget.renew();
        [
            walker.running(&vcpu, &stacks, idle),
            walker.sleeping(vcpu.rsp, stacks[0], idle),
        ]
    })
}

/// `data` is registers, and then three stacks.
pub fn run(data: &[u8]) {
    for idle in [false, true] {
        for walk in walks(data, idle) {
            // A walk without a frame must say why it ended.
            assert!(!walk.frames.is_empty() || walk.end.is_err());
        }
    }
}

/// A system call that sleeps, and an interrupt of a kernel thread.
pub fn seeds() -> Vec<Vec<u8>> {
    let [task, irq, nmi] = [0, 1, 2].map(start);
    let asleep = task + TOP - 0xd0 - 0x50 - INACTIVE;
    let regs = task + TOP - 0x400;
    vec![
        input(
            (SCHEDULE.0 + 1, asleep),
            &[
                (asleep + INACTIVE - 8, after(SCHEDULE)),
                (task + TOP - 0xd8, after(PATCHED)),
                (task + TOP - 8, after(SYSCALL)),
                (task + TOP + RIP, 0x40_1000),
                (task + TOP + CS, 0x33),
                (task + TOP + RSP, 0x7fff_0000),
            ],
        ),
        input(
            (EXCEPTION.0, nmi + 0x800),
            &[
                (nmi + 0x808, IDLE.0),
                (nmi + 0x810, 0x10),
                (nmi + 0x820, irq + 0x800),
                (irq + 0x800, after(ON_IRQ_STACK)),
                (irq + 0x808, regs - 8),
                (regs - 8, after(INTERRUPT)),
                (regs + RIP, KTHREAD.0 + 1),
                (regs + CS, 0x10),
                (regs + RSP, task + TOP - 0xd0),
                (task + TOP - 8, after(FORK)),
            ],
        ),
    ]
}

fn input((rip, rsp): (u64, u64), words: &[(u64, u64)]) -> Vec<u8> {
    let mut data = vec![0; 8 * HEAD + KINDS.len() * LEN as usize];
    data[..8].copy_from_slice(&rip.to_le_bytes());
    data[8..16].copy_from_slice(&rsp.to_le_bytes());
    for &(at, value) in words {
        let n = (0..KINDS.len()).find(|&n| at >= start(n) && at < start(n) + LEN);
        let n = n.unwrap();
        let at = 8 * HEAD + n * LEN as usize + (at - start(n)) as usize;
        data[at..at + 8].copy_from_slice(&value.to_le_bytes());
    }
    data
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_seeds_are_walked_to_their_ends() {
        let [asleep, interrupted] = [0, 1].map(|n| walks(&seeds()[n], false));
        assert!(asleep[1].is_reliable(), "{asleep:?}");
        assert_eq!(asleep[1].frames.len(), 3);
        assert!(interrupted[0].is_reliable(), "{interrupted:?}");
        assert_eq!(interrupted[0].frames.len(), 6);
    }
}
