//! Code of the small guest, its ORC table, and the frames on its tasks' stacks.

use locus_guest::addr::Gva;

use super::draft::Draft;
use super::{IDLE, PATCHED, STACK_LEN};
use crate::fixture::{ENTRY, TEXT, TEXT_LEN};
use crate::orc::sample::{frame, kinds, numbers, pack};
use crate::orc::{OrcFormat, FORMAT_HASHES};

/// The format of its ORC rows.
pub const FORMAT: OrcFormat = OrcFormat::Typed;
/// `__schedule`: it and the following functions have a call at their first byte.
pub const SCHEDULE: Gva = Gva(TEXT.0 + 0x4200);
/// The entry of system calls.
pub const SYSCALL: Gva = Gva(TEXT.0 + 0x4300);
/// `ret_from_fork`, where new tasks begin.
pub const FORK: Gva = Gva(TEXT.0 + 0x4400);
/// `kthread`, which all kernel threads are in.
pub const KTHREAD: Gva = Gva(TEXT.0 + 0x4500);
/// `do_idle`, which all idle tasks are in.
pub const DO_IDLE: Gva = Gva(TEXT.0 + 0x4600);
/// `cpu_startup_entry`, which calls `do_idle`.
pub const STARTUP: Gva = Gva(TEXT.0 + 0x4700);
/// `secondary_startup_64`, which brings up a CPU.
pub const SECONDARY: Gva = Gva(TEXT.0 + 0x4800);
/// The code of an interrupt that has switched to the CPU's own stack.
pub const ON_IRQ_STACK: Gva = Gva(TEXT.0 + 0x4900);
/// The code of an interrupt that has saved all registers.
pub const INTERRUPT: Gva = Gva(TEXT.0 + 0x4a00);
/// The trampoline that kretprobes exchange return addresses for.
pub const RETHOOK: Gva = Gva(TEXT.0 + 0x4b00);
/// The code of an exception with only the processor's frame on the stack.
pub const EXCEPTION: Gva = Gva(TEXT.0 + 0x4c00);
/// A function that bases its frame on R10.
pub const REALIGNED: Gva = Gva(TEXT.0 + 0x4d00);
/// A function that has its frame pointer in RBP.
pub const FRAMED: Gva = Gva(TEXT.0 + 0x4e00);
/// The end of the code that has rows.
const END: u64 = TEXT.0 + 0x4f00;
/// The page of hypercalls, with one hypercall in it as a PV guest has it.
pub const HYPERCALLS: Gva = Gva(TEXT.0 + 0x6000);
/// `push %rcx`, `push %r11`, `mov $29, %eax`, `syscall`, `pop %r11`, `pop %rcx`, `ret`.
const HYPERCALL: [u8; 14] = [
    0x51, 0x41, 0x53, 0xb8, 29, 0, 0, 0, 0x0f, 5, 0x41, 0x5b, 0x59, 0xc3,
];
/// Size of its `pt_regs`, in bytes.
pub const REGS: u64 = 168;
/// Size of its `inactive_task_frame`, in bytes.
pub const INACTIVE: u64 = 56;
/// Offset of RIP in `pt_regs`, in bytes.
pub const RIP: u64 = 128;
/// Offset of CS in `pt_regs`, in bytes.
pub const CS: u64 = 136;
/// Offset of RSP in `pt_regs`, in bytes.
pub const RSP: u64 = 152;

/// Where the call at the first byte of `function` returns to. In [`PATCHED`] the call is behind
/// five bytes for ftrace.
#[must_use]
pub fn after(function: Gva) -> u64 {
    let at = if function == PATCHED { 5 } else { 0 };
    function.0 + at + 5
}

impl Draft {
    /// Functions that call at their first byte, and an ORC row for each.
    pub(super) fn code(&mut self) {
        let call = [0xe8, 0, 0, 0, 0, 0x90, 0xc3];
        for (at, name) in [
            (SCHEDULE, "__schedule"),
            (SYSCALL, "entry_SYSCALL_64_after_hwframe"),
            (FORK, "ret_from_fork"),
            (KTHREAD, "kthread"),
            (DO_IDLE, "do_idle"),
            (STARTUP, "cpu_startup_entry"),
            (ON_IRQ_STACK, "asm_call_on_stack"),
            (INTERRUPT, "asm_sysvec_reboot"),
            (RETHOOK, "arch_rethook_trampoline"),
            (EXCEPTION, "asm_exc_page_fault"),
            (REALIGNED, "realigned"),
            (FRAMED, "framed"),
        ] {
            self.fixture.function(at.0, name, &call);
        }
        // It does not call, but returns to where it has put there itself: `lretq`.
        let starts = [0x6a, 0x10, 0x50, 0x48, 0xcb, 0x0f, 0x0b];
        self.fixture
            .function(SECONDARY.0, "secondary_startup_64", &starts);
        self.fixture
            .function(HYPERCALLS.0, "hypercall_page", &HYPERCALL);
        let [stack, base, prev, _, stack_at, _] = numbers(FORMAT);
        let [call, regs, partial] = kinds(FORMAT);
        let row = |sp, bp, kind, signal| pack(FORMAT, sp, bp, kind, signal);
        let end = row((0, 0), (0, 0), 1, 0);
        let rows = [
            (TEXT.0, row((0, 0), (0, 0), 0, 0)),
            (ENTRY.0, end.clone()),
            (PATCHED.0, frame(FORMAT, 0xd0)),
            (IDLE.0, frame(FORMAT, 8)),
            (SCHEDULE.0, frame(FORMAT, 0x50)),
            (SYSCALL.0, row((stack, 0), (0, 0), regs, 1)),
            (FORK.0, end.clone()),
            (KTHREAD.0, frame(FORMAT, 0xd0)),
            (DO_IDLE.0, frame(FORMAT, 0x80)),
            (STARTUP.0, frame(FORMAT, 0x50)),
            (SECONDARY.0, end),
            // The stack pointer before is the last word of the stack.
            (ON_IRQ_STACK.0, row((stack_at, 8), (0, 0), call, 0)),
            (INTERRUPT.0, row((stack, 0), (0, 0), regs, 1)),
            (RETHOOK.0, row((0, 0), (0, 0), 0, 0)),
            (EXCEPTION.0, row((stack, 8), (0, 0), partial, 1)),
            // R10 is number 6.
            (REALIGNED.0, row((6, 0), (0, 0), call, 0)),
            (FRAMED.0, row((base, 16), (prev, -16), call, 0)),
            (END, row((0, 0), (0, 0), 0, 0)),
            (HYPERCALLS.0, frame(FORMAT, 8)),
            (HYPERCALLS.0 + 0x1000, row((0, 0), (0, 0), 0, 0)),
        ];
        self.data.resize(self.data.len().next_multiple_of(8), 0);
        let place = super::DATA.plus(self.data.len() as u64);
        let ips: Vec<u8> = (0..)
            .zip(&rows)
            .flat_map(|(i, (ip, _))| (ip.wrapping_sub(place.0 + 4 * i) as u32).to_le_bytes())
            .collect();
        let rows: Vec<u8> = rows.iter().flat_map(|(_, row)| row.clone()).collect();
        let hash = FORMAT_HASHES.iter().find(|(format, _)| *format == FORMAT);
        let hash = hash.map(|(_, hash)| hash.to_vec()).unwrap_or_default();
        for (name, bytes) in [
            ("orc_unwind_ip", ips),
            ("orc_unwind", rows),
            ("orc_header", hash),
        ] {
            let start = self.variable(&format!("__start_{name}"), &bytes);
            let stop = start.plus(bytes.len() as u64);
            let stop = (stop.0, 'D', format!("__stop_{name}"));
            self.fixture.symbols.push(stop);
        }
        let etext = (TEXT.0 + TEXT_LEN as u64, 'T', "_etext".to_owned());
        self.fixture.symbols.push(etext);
    }

    /// Return addresses on the stacks, in the order of the tasks; see the rows for the distances.
    pub(super) fn frames(&mut self) {
        let word = |stack: &mut Vec<u8>, at: usize, value: u64| {
            stack[at..at + 8].copy_from_slice(&value.to_le_bytes());
        };
        let user = |stack: &mut Vec<u8>| {
            let regs = STACK_LEN - REGS as usize;
            word(stack, regs + RIP as usize, 0x40_1000);
            word(stack, regs + CS as usize, 0x33);
            word(stack, regs + RSP as usize, 0x7fff_0000);
        };
        for stack in &mut self.stacks {
            word(stack, 0x1e30, after(SCHEDULE));
        }
        for idle in &mut self.stacks[..2] {
            word(idle, 0x1e80, after(DO_IDLE));
            word(idle, 0x1f00, after(STARTUP));
            word(idle, 0x1f50, after(SECONDARY));
        }
        for (n, caller) in [(2, KTHREAD), (3, PATCHED), (4, KTHREAD)] {
            let stack = &mut self.stacks[n];
            let in_kernel = caller == KTHREAD;
            word(stack, 0x1e80, after(caller));
            word(stack, 0x1f50, after(if in_kernel { FORK } else { SYSCALL }));
            if !in_kernel {
                user(stack);
            }
        }
    }
}
