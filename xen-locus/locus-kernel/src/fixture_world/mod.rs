//! A whole small guest in a mock's memory, for tests: the kernel of [`fixture`](crate::fixture)
//! with types, tasks on their stacks, two CPUs, the page table behind the vsyscall page, and a
//! function that can be patched.
//!
//! `types.rs` has its types as data, `draft.rs` and [`frames`] what is in its memory.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation
)] // part of tests only
#![allow(missing_debug_implementations)]

mod draft;
pub mod frames;
#[cfg(test)]
mod saved;
#[cfg(test)]
mod tests;
mod types;

use locus_guest::addr::{Frame, Gva, PAGE_LEN, PAGE_SIZE};
use locus_guest::core::write::{self, CoreHead, CorePage};
use locus_guest::mock::{MockMemory, ROOT};
use locus_guest::space::{Space, PTE_FRAME};
use locus_guest::{GuestType, Memory as _, Vcpu};

use self::draft::{Draft, IDLE_THREADS};
pub use self::types::{RESTART, TASKS, THREAD_NODE};
use crate::fixture::{Fixture, ENTRY, RODATA, TABLES, TEXT};

/// Guest virtual address of its variables.
pub const DATA: Gva = Gva(TEXT.0 + (8 << 20));
/// Bases of the per-CPU areas of its two CPUs.
pub const PERCPU: [u64; 2] = [0xffff_8880_0100_0000, 0xffff_8880_0101_0000];
/// Guest virtual address of its stacks: [`STACK_LEN`] bytes each, with a hole behind each.
pub const STACKS: Gva = Gva(0xffff_c900_0000_0000);
/// Size of a stack, in bytes.
pub const STACK_LEN: usize = 8 << 10;
/// Guest virtual address of the function that the test payload replaces.
pub const PATCHED: Gva = Gva(TEXT.0 + 0x1000);
/// Guest virtual address of the functions that change its list of modules with `BUG` sites.
pub const UNLOCKED: Gva = Gva(TEXT.0 + 0xe000);
/// Where its kernel sees the page table behind the vsyscall page.
pub const FIXMAP: Gva = Gva(TABLES.0 + (1 << 20));
/// The vsyscall page; behind it, in the same table, is the arena.
const VSYSCALL: Gva = Gva(0xffff_ffff_ff60_0000);
/// Guest virtual address of the function in which its idle tasks wait.
pub const IDLE: Gva = Gva(TEXT.0 + 0x1100);
/// What the user half of a pair of roots maps of the kernel.
#[derive(Clone, Copy)]
pub enum Cloned {
    /// The page with the entry point.
    EntryCode,
    /// All code and read-only data: a kernel on a processor without PCID.
    CodeAndConstants,
}

/// The guest, built.
pub struct World {
    /// Its memory.
    pub memory: MockMemory,
    /// Its virtual CPUs: one idle in the kernel, one in user mode.
    pub vcpus: Vec<Vcpu>,
    /// How it runs.
    pub kind: GuestType,
}

impl World {
    /// A guest of the type `kind`.
    #[must_use]
    pub fn new(kind: GuestType) -> World {
        World::with(kind, |_| ())
    }

    /// The same, with what `more` adds to its kernel.
    #[must_use]
    pub fn with(kind: GuestType, more: impl FnOnce(&mut Fixture)) -> World {
        let mut draft = Draft::new(kind);
        draft.fill();
        more(&mut draft.fixture);
        let memory = draft.fixture.build();
        memory.map_bytes(DATA, &draft.data, true, false);
        for (area, base) in draft.percpu.iter().zip(PERCPU) {
            memory.map_bytes(Gva(base + IDLE_THREADS), area, true, false);
        }
        for (n, stack) in draft.stacks.iter().enumerate() {
            memory.map_bytes(stack_at(n), stack, true, false);
        }
        memory.map_page(VSYSCALL, memory.frame(), false, false);
        let (table, ..) = Space::new(&memory, ROOT, 4)
            .entry_slot(VSYSCALL, 1)
            .unwrap();
        memory.map_page(FIXMAP, table, true, false);
        let vcpu = |id: u32| Vcpu {
            id,
            online: true,
            long_mode: true,
            root: ROOT,
            entry: Some(ENTRY),
            ..Vcpu::default()
        };
        World {
            memory,
            kind,
            vcpus: vec![
                Vcpu {
                    rip: IDLE.plus(1),
                    rsp: stack_at(0).plus(0x1f00),
                    gs_base: Gva(PERCPU[0]),
                    gs_other: Gva(0),
                    ..vcpu(0)
                },
                Vcpu {
                    rip: Gva(0x40_1000),
                    rsp: Gva(0x7fff_0000),
                    user: true,
                    gs_base: Gva(0),
                    gs_other: Gva(PERCPU[1]),
                    ..vcpu(1)
                },
            ],
        }
    }

    /// The same, with a fifth level of page tables.
    #[must_use]
    pub fn with_five_levels(mut self) -> World {
        let top = self.memory.frame();
        self.memory.set_entry(top, 511, (ROOT.0 << 12) | 3);
        self.memory.map_page(TABLES, top, true, false);
        for vcpu in &mut self.vcpus {
            (vcpu.root, vcpu.la57) = (top, true);
        }
        self
    }

    /// The same, with page-table isolation: all its vCPUs are in user mode, on the user half of a
    /// pair of roots, and what the kernel freed of its image is not mapped.
    #[must_use]
    pub fn with_isolation(mut self, cloned: Cloned) -> World {
        let mut kernel_half = self.memory.frame();
        while kernel_half.0 % 2 == 1 {
            kernel_half = self.memory.frame();
        }
        let user_half = self.memory.frame();
        let shared = self.vcpus[0].root;
        let levels = if self.vcpus[0].la57 { 5 } else { 4 };
        self.unmap(Gva(RODATA.0 - PAGE_SIZE));
        self.copy_table(shared, kernel_half);
        let (mut own, mut theirs) = (user_half, shared);
        let lowest = match cloned {
            Cloned::EntryCode => 1,
            Cloned::CodeAndConstants => 2,
        };
        for level in (lowest + 1..=levels).rev() {
            let (_, slot, entry) = self.slot_of(theirs, level, ENTRY);
            let next = self.memory.frame();
            self.memory
                .set_entry(own, slot, (next.0 << 12) | entry & !PTE_FRAME);
            (own, theirs) = (next, Frame((entry & PTE_FRAME) >> 12));
        }
        let (_, slot, entry) = self.slot_of(theirs, lowest, ENTRY);
        self.memory.set_entry(own, slot, entry);
        self.memory.map_page(TABLES, kernel_half, true, false);
        for (vcpu, base) in self.vcpus.iter_mut().zip(PERCPU) {
            (vcpu.root, vcpu.user) = (user_half, true);
            (vcpu.gs_base, vcpu.gs_other) = (Gva(0), Gva(base));
        }
        self
    }

    /// The entry for `at` in a table of this level, and its number.
    fn slot_of(&self, table: Frame, level: u8, at: Gva) -> (Frame, usize, u64) {
        // A space whose root is this table has so many levels.
        let space = Space::new(&self.memory, table, level);
        space.entry_slot(at, level).unwrap()
    }

    /// Unmaps the page at `at`.
    pub fn unmap(&self, at: Gva) {
        let root = self.vcpus[0].root;
        let levels = if self.vcpus[0].la57 { 5 } else { 4 };
        let space = Space::new(&self.memory, root, levels);
        let (table, slot, _) = space.entry_slot(at, 1).unwrap();
        self.memory.set_entry(table, slot, 0);
    }

    /// Gives a root tables of its own on the way to `at`, as they are. Returns the last one, and the
    /// number of the entry in it.
    #[cfg(test)]
    fn own_tables(&self, root: Frame, at: Gva) -> (Frame, usize) {
        let mut own = root;
        for level in (2..=4).rev() {
            let (_, slot, entry) = self.slot_of(own, level, at);
            let next = self.memory.frame();
            self.copy_table(Frame((entry & PTE_FRAME) >> 12), next);
            let entry = (next.0 << 12) | entry & !PTE_FRAME;
            self.memory.set_entry(own, slot, entry);
            own = next;
        }
        let (_, slot, _) = self.slot_of(own, 1, at);
        (own, slot)
    }

    fn copy_table(&self, from: Frame, to: Frame) {
        let mut bytes = vec![0; PAGE_LEN];
        let window = self.memory.map(&[from]).unwrap();
        window.read(0, &mut bytes).unwrap();
        self.memory.fill(to, 0, &bytes);
    }

    /// Its pages, as a core lists them. A PV guest's page numbers (PFN) differ from the machine's
    /// frame numbers (MFN).
    #[must_use]
    pub fn pages(&self) -> Vec<CorePage> {
        let frames: Vec<u64> = (1..)
            .take_while(|&n| self.memory.map(&[Frame(n)]).is_ok())
            .collect();
        let pfn = |frame| match self.kind {
            GuestType::Pv => frames.len() as u64 - frame,
            _ => frame,
        };
        let page = |&frame: &u64| CorePage {
            pfn: pfn(frame),
            frame,
        };
        frames.iter().map(page).collect()
    }

    /// Its core, as the bytes of a file.
    #[must_use]
    pub fn core(&self) -> Vec<u8> {
        let mut out = Vec::new();
        let head = CoreHead::new(self.kind, &self.vcpus);
        write::write(&mut out, &head, &self.pages(), |page| {
            let mut bytes = [0; PAGE_LEN];
            let window = self.memory.map(&[Frame(page.frame)]).unwrap();
            window.read(0, &mut bytes).unwrap();
            Ok(bytes)
        })
        .unwrap();
        out
    }
}

fn stack_at(n: usize) -> Gva {
    STACKS.plus(n as u64 * 4 * STACK_LEN as u64)
}
