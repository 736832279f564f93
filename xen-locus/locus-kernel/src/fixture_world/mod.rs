//! A whole small guest in a mock's memory, for tests: the kernel of [`super::fixture`] with types,
//! tasks on their stacks, two CPUs, an arena's page table, and a function that can be patched. Every
//! read-only command works on it.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation
)] // part of tests only
#![allow(missing_debug_implementations)]

pub mod frames;
#[cfg(test)]
mod saved;

use locus_guest::addr::{Frame, Gva, PAGE_LEN};
use locus_guest::core::write::{self, CoreHead, CorePage};
use locus_guest::mock::{MockMemory, ROOT};
use locus_guest::{GuestType, Memory as _, MemoryMut as _, Vcpu};

use super::btf::blob::Blob;
use super::fixture::{Fixture, Tables, ENTRY, TABLES, TEXT};

/// Where its variables stand.
pub const DATA: Gva = Gva(TEXT.0 + (8 << 20));
/// Where the areas of its CPUs stand.
pub const PERCPU: [u64; 2] = [0xffff_8880_0100_0000, 0xffff_8880_0101_0000];
/// Where its stacks stand, [`STACK_LEN`] bytes each with a hole behind each.
pub const STACKS: Gva = Gva(0xffff_c900_0000_0000);
/// Size of a stack, in bytes.
pub const STACK_LEN: usize = 8 << 10;
/// The function that the test payload replaces.
pub const PATCHED: Gva = Gva(TEXT.0 + 0x1000);
/// Where its idle task waits.
pub const IDLE: Gva = Gva(TEXT.0 + 0x1100);
/// Addresses of per-CPU variables within an area.
const IDLE_THREADS: u64 = 0x1000;
const CURRENT_TASK: u64 = 0x1008;
const HARDIRQ_STACK: u64 = 0x1010;
const RUNQUEUES: u64 = 0x1018;
/// Size of its `task_struct`, and offsets of members.
const TASK_LEN: usize = 256;
/// Offset of `tasks` in `task_struct`.
pub const TASKS: usize = 16;
/// Offset of `thread_node` in `task_struct`.
pub const THREAD_NODE: usize = 32;
const SIGNAL: usize = 48;
const STACK: usize = 56;
const PID: usize = 64;
const ON_CPU: usize = 68;
const START_TIME: usize = 72;
const COMM: usize = 80;
const TGID: usize = 96;
const STATE: usize = 100;
const EXIT_STATE: usize = 104;
const CPU: usize = 108;
const SP: usize = 128 + 24;
const SWITCHES: usize = 160;
/// Offset of `restart_block.fn` in the mock guest's tasks.
pub const RESTART: usize = 176 + 8;
/// Offset of `thread_head` in its `signal_struct`.
const THREAD_HEAD: usize = 16;

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
    /// A guest that runs as `kind`.
    #[must_use]
    pub fn new(kind: GuestType) -> World {
        World::with(kind, |_| ())
    }

    /// The same with `more` in its kernel.
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
        // The vsyscall page; behind it, in the same table, is the arena.
        let vsyscall = memory.frame();
        memory.map_page(Gva(0xffff_ffff_ff60_0000), vsyscall, false, false);
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

    /// The same with a fifth level of page tables above.
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

    /// The same with page-table isolation: all its vCPUs are in user mode, on the user half of a
    /// pair of roots, which maps nothing of the kernel.
    #[must_use]
    pub fn with_isolation(mut self) -> World {
        let mut kernel_half = self.memory.frame();
        while kernel_half.0 % 2 == 1 {
            kernel_half = self.memory.frame();
        }
        let user_half = self.memory.frame();
        let mut root = vec![0; PAGE_LEN];
        let memory = &self.memory;
        let shared = self.vcpus[0].root;
        memory.map(&[shared]).unwrap().read(0, &mut root).unwrap();
        let window = memory.map_mut(&[kernel_half]).unwrap();
        window.write(0, &root).unwrap();
        memory.map_page(TABLES, kernel_half, true, false);
        for (vcpu, base) in self.vcpus.iter_mut().zip(PERCPU) {
            (vcpu.root, vcpu.user) = (user_half, true);
            (vcpu.gs_base, vcpu.gs_other) = (Gva(0), Gva(base));
        }
        self
    }

    /// Its pages, as a core lists them. A PV guest's own numbers differ from the machine's.
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

    /// Its core.
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

/// The guest while it is drawn up.
struct Draft {
    fixture: Fixture,
    data: Vec<u8>,
    percpu: [Vec<u8>; 2],
    stacks: Vec<Vec<u8>>,
    kind: GuestType,
}

impl Draft {
    fn new(kind: GuestType) -> Draft {
        let mut fixture = Fixture::new();
        fixture.tables = Tables::OldWithSequence;
        Draft {
            fixture,
            data: Vec::new(),
            percpu: [vec![0; PAGE_LEN], vec![0; PAGE_LEN]],
            stacks: Vec::new(),
            kind,
        }
    }

    /// Adds a variable, and a symbol if it has a name.
    fn variable(&mut self, name: &str, bytes: &[u8]) -> Gva {
        self.data.resize(self.data.len().next_multiple_of(8), 0);
        let at = DATA.plus(self.data.len() as u64);
        self.data.extend(bytes);
        if !name.is_empty() {
            self.fixture.symbols.push((at.0, 'D', name.to_owned()));
        }
        at
    }

    fn put(&mut self, at: Gva, bytes: &[u8]) {
        let start = (at.0 - DATA.0) as usize;
        self.data[start..start + bytes.len()].copy_from_slice(bytes);
    }

    fn put_u64(&mut self, at: Gva, value: u64) {
        self.put(at, &value.to_le_bytes());
    }

    /// Makes a circular list of `head` and `elements`.
    fn link(&mut self, head: Gva, elements: &[Gva]) {
        let ring: Vec<Gva> = std::iter::once(head)
            .chain(elements.iter().copied())
            .collect();
        for (i, &at) in ring.iter().enumerate() {
            let next = ring[(i + 1) % ring.len()];
            self.put_u64(at, next.0);
            self.put_u64(next.plus(8), at.0);
        }
    }

    fn task(&mut self, name: &str, pid: u32, comm: &str, on_cpu: bool) -> Gva {
        let at = self.variable(name, &[0; TASK_LEN]);
        let stack = stack_at(self.stacks.len());
        self.stacks.push(vec![0; STACK_LEN]);
        self.put_u64(at.plus(STACK as u64), stack.0);
        self.put_u64(at.plus(SP as u64), stack.0 + 0x1e00);
        self.put(at.plus(PID as u64), &pid.to_le_bytes());
        self.put(at.plus(ON_CPU as u64), &u32::from(on_cpu).to_le_bytes());
        self.put_u64(at.plus(START_TIME as u64), 1000 + u64::from(pid));
        self.put(at.plus(COMM as u64), comm.as_bytes());
        // Asleep and interruptible, or running.
        let state = u32::from(!on_cpu && pid != 0);
        self.put(at.plus(STATE as u64), &state.to_le_bytes());
        at
    }

    /// A process whose `threads` come after its leader.
    fn process(&mut self, threads: &[Gva]) {
        let signal = self.variable("", &[0; 64]);
        let nodes: Vec<Gva> = threads.iter().map(|t| t.plus(THREAD_NODE as u64)).collect();
        self.link(signal.plus(THREAD_HEAD as u64), &nodes);
        let leader = (threads[0].0 - DATA.0) as usize + PID;
        let tgid: [u8; 4] = self.data[leader..leader + 4].try_into().unwrap();
        for thread in threads {
            self.put_u64(thread.plus(SIGNAL as u64), signal.0);
            self.put(thread.plus(TGID as u64), &tgid);
        }
    }

    fn fill(&mut self) {
        // Text: nop of ftrace, a call of __schedule, `ret`.
        let code = [0x0f, 0x1f, 0x44, 0, 0, 0xe8, 0xf6, 0x31, 0, 0, 0xc3];
        self.fixture.function(PATCHED.0, "cmdline_proc_show", &code);
        self.fixture
            .function(PATCHED.0 + 0x10, "__fentry__", &[0xc3]);
        self.fixture.function(IDLE.0, "default_idle", &[0xf4, 0xc3]);
        // Constants.
        let mut types = types();
        types.resize(types.len().next_multiple_of(8), 0);
        let note = b"\x04\0\0\0\x08\0\0\0\x03\0\0\0GNU\0\x01\x23\x45\x67\x89\xab\xcd\xef";
        self.fixture.constants.extend([
            ("vermagic", b"6.1.0-56-amd64 SMP preempt \0".to_vec()),
            ("__start_BTF", types),
            ("__stop_BTF", vec![0; 8]),
            ("__start_notes", note.to_vec()),
            ("__stop_notes", vec![0; 8]),
        ]);
        // Variables.
        self.code();
        self.variable("total_forks", &77u64.to_le_bytes());
        self.variable("nr_cpu_ids", &2u32.to_le_bytes());
        let bases: Vec<u8> = PERCPU.iter().flat_map(|b| b.to_le_bytes()).collect();
        self.variable("__per_cpu_offset", &bases);
        let modules = self.variable("modules", &[0; 16]);
        self.link(modules, &[]);
        let bugs = self.variable("module_bug_list", &[0; 16]);
        self.link(bugs, &[]);
        self.variable("module_mutex", &[0; 32]);
        self.variable("jump_label_mutex", &[0; 32]);
        let bounds = [0, 0, 0, u64::MAX, 0].map(u64::to_le_bytes).concat();
        self.variable("mod_tree", &bounds);
        self.variable("xen_pvh", &[u8::from(self.kind == GuestType::Pvh)]);
        for (name, at) in [
            ("idle_threads", IDLE_THREADS),
            ("current_task", CURRENT_TASK),
            ("hardirq_stack_ptr", HARDIRQ_STACK),
            ("runqueues", RUNQUEUES),
        ] {
            self.fixture.symbols.push((at, 'A', name.to_owned()));
        }
        let start = stack_at(0).0;
        for (at, name) in [
            (start, "__start_init_stack"),
            (start + STACK_LEN as u64, "__end_init_stack"),
        ] {
            // Not where the kernel's stacks are here; only their distance counts.
            let at = DATA.0 + (1 << 20) + (at - start);
            self.fixture.symbols.push((at, 'D', name.to_owned()));
        }
        self.tasks();
    }

    fn tasks(&mut self) {
        let idle = [
            self.task("init_task", 0, "swapper/0", true),
            self.task("", 0, "swapper/1", false),
        ];
        let init = self.task("", 1, "init", false);
        let sleeper = self.task("", 42, "sleeper", false);
        let busy = self.task("", 43, "busy", true);
        self.process(&[init]);
        self.process(&[sleeper, busy]);
        let node = |task: Gva| task.plus(TASKS as u64);
        self.link(node(idle[0]), &[node(init), node(sleeper)]);
        // The sleeper is in the function that the payload replaces.
        self.frames();
        for on_second in [idle[1], busy] {
            self.put(on_second.plus(CPU as u64), &1u32.to_le_bytes());
        }
        for (cpu, current) in [(0, idle[0]), (1, busy)] {
            let area = &mut self.percpu[cpu];
            area[..8].copy_from_slice(&idle[cpu].0.to_le_bytes());
            area[8..16].copy_from_slice(&current.0.to_le_bytes());
        }
    }
}

/// The guest's types.
fn types() -> Vec<u8> {
    let mut btf = Blob::new();
    let int = btf.int("int", 4);
    let long = btf.int("long unsigned int", 8);
    let char = btf.int("char", 1);
    let comm = btf.array(char, 16);
    let list = btf.structure("list_head", 16, &[("next", long, 0), ("prev", long, 8)]);
    let restart = btf.structure(
        "restart_block",
        48,
        &[("arch_data", long, 0), ("fn", long, 8)],
    );
    let thread = btf.structure("thread_struct", 64, &[("sp", long, 24)]);
    btf.structure(
        "task_struct",
        TASK_LEN,
        &[
            ("tasks", list, TASKS),
            ("thread_node", list, THREAD_NODE),
            ("signal", long, SIGNAL),
            ("stack", long, STACK),
            ("pid", int, PID),
            ("on_cpu", int, ON_CPU),
            ("start_time", long, START_TIME),
            ("comm", comm, COMM),
            ("tgid", int, TGID),
            ("__state", int, STATE),
            ("exit_state", int, EXIT_STATE),
            ("cpu", int, CPU),
            ("thread", thread, SP - 24),
            ("nvcsw", long, SWITCHES),
            ("nivcsw", long, SWITCHES + 8),
            ("restart_block", restart, RESTART - 8),
        ],
    );
    btf.structure(
        "rq",
        16,
        &[("nr_running", int, 0), ("nr_switches", long, 8)],
    );
    btf.structure("signal_struct", 64, &[("thread_head", list, THREAD_HEAD)]);
    modules(&mut btf, [int, long, char, list]);
    frames::types(&mut btf, [int, long, char]);
    btf.bytes()
}

/// What a reader of modules asks for; none is loaded.
fn modules(btf: &mut Blob, [int, long, char, list]: [u32; 4]) {
    btf.enumeration(
        "module_state",
        &[
            ("MODULE_STATE_LIVE", 0),
            ("MODULE_STATE_COMING", 1),
            ("MODULE_STATE_GOING", 2),
            ("MODULE_STATE_UNFORMED", 3),
        ],
    );
    let name = btf.array(char, 56);
    let rb = btf.structure(
        "rb_node",
        24,
        &[
            ("__rb_parent_color", long, 0),
            ("rb_right", long, 8),
            ("rb_left", long, 16),
        ],
    );
    let root = btf.structure("rb_root", 8, &[("rb_node", long, 0)]);
    let two = [btf.array(rb, 2), btf.array(root, 2)];
    let latch = btf.structure("latch_tree_node", 48, &[("node", two[0], 0)]);
    let top = btf.structure(
        "latch_tree_root",
        24,
        &[("seq", int, 0), ("tree", two[1], 8)],
    );
    btf.structure(
        "mod_tree_root",
        40,
        &[
            ("root", top, 0),
            ("addr_min", long, 24),
            ("addr_max", long, 32),
        ],
    );
    let node = btf.structure("mod_tree_node", 56, &[("mod", long, 0), ("node", latch, 8)]);
    let part = btf.structure(
        "module_layout",
        80,
        &[
            ("base", long, 0),
            ("size", int, 8),
            ("text_size", int, 12),
            ("ro_size", int, 16),
            ("ro_after_init_size", int, 20),
            ("mtn", node, 24),
        ],
    );
    let orc = btf.structure(
        "mod_arch_specific",
        24,
        &[
            ("num_orcs", int, 0),
            ("orc_unwind_ip", long, 8),
            ("orc_unwind", long, 16),
        ],
    );
    btf.structure("mutex", 32, &[("owner", long, 0)]);
    btf.structure("exception_table_entry", 12, &[("insn", int, 0)]);
    btf.structure("bug_entry", 12, &[("bug_addr_disp", int, 0)]);
    btf.structure(
        "module_use",
        48,
        &[
            ("source_list", list, 0),
            ("target_list", list, 16),
            ("source", long, 32),
            ("target", long, 40),
        ],
    );
    btf.structure(
        "module",
        448,
        &[
            ("state", int, 0),
            ("list", list, 8),
            ("name", name, 24),
            ("taints", long, 80),
            ("core_layout", part, 88),
            ("init_layout", part, 168),
            ("kallsyms", long, 248),
            ("syms", long, 256),
            ("num_syms", int, 264),
            ("num_exentries", int, 268),
            ("extable", long, 272),
            ("arch", orc, 280),
            ("num_bugs", int, 304),
            ("bug_list", list, 312),
            ("bug_table", long, 328),
            ("jump_entries", long, 336),
            ("num_jump_entries", int, 344),
            ("source_list", list, 352),
            ("target_list", list, 368),
            ("refcnt", int, 384),
            ("init", long, 392),
            ("exit", long, 400),
        ],
    );
    btf.structure(
        "mod_kallsyms",
        32,
        &[
            ("symtab", long, 0),
            ("num_symtab", int, 8),
            ("strtab", long, 16),
            ("typetab", long, 24),
        ],
    );
    btf.structure(
        "kernel_symbol",
        12,
        &[
            ("value_offset", int, 0),
            ("name_offset", int, 4),
            ("namespace_offset", int, 8),
        ],
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tasks::TaskLayout;
    use crate::{Error, Kernel};

    #[test]
    fn the_kernel_is_found_with_four_and_five_levels_and_isolation() {
        let worlds = [
            World::new(GuestType::Pvh),
            World::new(GuestType::Pvh).with_five_levels(),
            World::new(GuestType::Pvh).with_isolation(),
            World::new(GuestType::Pvh)
                .with_five_levels()
                .with_isolation(),
        ];
        for (n, world) in worlds.into_iter().enumerate() {
            let mut no_entry = world.vcpus.clone();
            no_entry.iter_mut().for_each(|v| v.entry = None);
            let live = Kernel::read(&world.memory, GuestType::Pvh, &world.vcpus).unwrap();
            let saved = Kernel::of_saved(&world.memory, GuestType::Hvm, &no_entry).unwrap();
            for kernel in [&live, &saved] {
                assert_eq!(kernel.text_base, TEXT, "{n}");
                assert_eq!(kernel.kind, GuestType::Pvh, "{n}");
                let tasks = TaskLayout::of(kernel).unwrap();
                let tasks = tasks.all(kernel, &kernel.space).unwrap();
                let names: Vec<&str> = tasks.iter().map(|t| t.comm.as_str()).collect();
                assert_eq!(names, ["init", "sleeper", "busy", "swapper/0", "swapper/1"]);
            }
        }
    }

    #[test]
    fn a_live_guest_without_an_entry_point_is_not_guessed_at() {
        let mut world = World::new(GuestType::Pvh);
        world.vcpus.iter_mut().for_each(|v| v.entry = None);
        let error = Kernel::read(&world.memory, world.kind, &world.vcpus).unwrap_err();
        assert!(matches!(error, Error::NotReady(_)), "{error}");
    }

    /// What is made of a saved guest after `change`.
    fn saved(change: impl FnOnce(&mut World)) -> Result<(), Error> {
        let mut world = World::new(GuestType::Hvm);
        world.vcpus.iter_mut().for_each(|v| v.entry = None);
        change(&mut world);
        let kernel = Kernel::of_saved(&world.memory, world.kind, &world.vcpus)?;
        assert_eq!(kernel.kind, GuestType::Hvm);
        Ok(())
    }

    fn no_percpu(world: &mut World) {
        for vcpu in &mut world.vcpus {
            (vcpu.gs_base, vcpu.gs_other) = (Gva(0), Gva(PERCPU[0] + 8));
        }
    }

    /// `init_top_pgt` is another page than a root.
    fn no_root(world: &mut World) {
        let page = world.memory.frame();
        world.memory.map_page(TABLES, page, true, false);
    }

    #[test]
    fn a_saved_kernel_needs_one_more_anchor_than_its_text() {
        saved(|_| ()).unwrap();
        saved(no_percpu).unwrap();
        let error = saved(|world| {
            no_percpu(world);
            no_root(world);
        });
        assert!(matches!(error, Err(Error::NotLinux(_))), "{error:?}");
    }

    #[test]
    fn a_run_without_symbols_before_the_kernel_is_passed_over() {
        saved(|world| {
            let before = Gva(TEXT.0 - (4 << 20));
            world.memory.map_bytes(before, &[0x90; 64], false, true);
            world
                .memory
                .map_bytes(before.plus(4096), &[7; 64], false, false);
        })
        .unwrap();
    }
}
