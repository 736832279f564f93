//! Draws up the small guest: code, constants, variables, tasks, per-CPU areas, stacks.

use locus_guest::addr::{Gva, PAGE_LEN};
use locus_guest::GuestType;

use super::types::{
    self, COMM, CPU, INSN_PAGES, ON_CPU, PID, SIGNAL, SP, STACK, START_TIME, STATE, TASKS,
    TASK_LEN, TGID, THREAD_HEAD, THREAD_NODE,
};
use super::{stack_at, DATA, FIXMAP, IDLE, PATCHED, PERCPU, STACK_LEN, UNLOCKED};
use crate::fixture::{Fixture, Tables, RODATA};

/// First of the per-CPU variables below.
pub(super) const IDLE_THREADS: u64 = 0x1000;
/// Addresses of per-CPU variables in an area. The first two are set.
const CURRENT_TASK: u64 = 0x1008;
const HARDIRQ_STACK: u64 = 0x1010;
const RUNQUEUES: u64 = 0x1018;

/// Numbers of its processor's features.
const VMX: usize = 5;
const SVM: usize = 2;

/// The guest while it is drawn up.
pub(super) struct Draft {
    pub fixture: Fixture,
    /// Variables, from [`DATA`] on.
    pub data: Vec<u8>,
    /// The area of each CPU, from [`IDLE_THREADS`] on.
    pub percpu: [Vec<u8>; 2],
    /// The stack of each task.
    pub stacks: Vec<Vec<u8>>,
    kind: GuestType,
}

impl Draft {
    pub fn new(kind: GuestType) -> Draft {
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
    pub fn variable(&mut self, name: &str, bytes: &[u8]) -> Gva {
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
        // Other flags follow it (Linux 7.2.12).
        self.put(
            at.plus(ON_CPU as u64),
            &(u32::from(on_cpu) | 0x0001_0100).to_le_bytes(),
        );
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

    /// Adds all that the guest has.
    pub fn fill(&mut self) {
        self.patched_code();
        self.constants();
        self.code();
        self.variables();
        self.absolute_symbols();
        self.tasks();
    }

    /// The function that can be patched, and where the idle task waits.
    fn patched_code(&mut self) {
        // ftrace's nop, a call of __schedule, `ret`.
        let code = [0x0f, 0x1f, 0x44, 0, 0, 0xe8, 0xf6, 0x31, 0, 0, 0xc3];
        self.fixture.function(PATCHED.0, "cmdline_proc_show", &code);
        self.fixture
            .function(PATCHED.0 + 0x10, "__fentry__", &[0xc3]);
        self.fixture.function(IDLE.0, "default_idle", &[0xf4, 0xc3]);
        for (at, name) in [(0, "module_bug_finalize"), (0x10, "module_bug_cleanup")] {
            self.fixture.function(UNLOCKED.0 + at, name, &[0xc3]);
        }
    }

    fn constants(&mut self) {
        let mut types = types::blob();
        types.resize(types.len().next_multiple_of(8), 0);
        let note = b"\x04\0\0\0\x08\0\0\0\x03\0\0\0GNU\0\x01\x23\x45\x67\x89\xab\xcd\xef";
        self.fixture.constants.extend([
            ("vermagic", b"6.1.0-56-amd64 SMP preempt \0".to_vec()),
            ("__start_BTF", types),
            ("__stop_BTF", vec![0; 8]),
            ("__start_notes", note.to_vec()),
            ("__stop_notes", vec![0; 8]),
        ]);
        self.features();
    }

    /// The names of a word of features and of one of bugs. The processor has none of them.
    fn features(&mut self) {
        let before = self.fixture.constants.iter();
        let lens = before.map(|(_, bytes)| bytes.len().next_multiple_of(8));
        // The first constant stands 64 bytes into read-only data.
        let strings = RODATA.0 + 64 + lens.sum::<usize>() as u64;
        let mut names = [0u64; 32];
        (names[VMX], names[SVM]) = (strings, strings + 4);
        self.fixture.constants.extend([
            ("feature_names", b"vmx\0svm\0".to_vec()),
            ("x86_cap_flags", names.map(u64::to_le_bytes).concat()),
            ("x86_bug_flags", vec![0; 32 * 8]),
        ]);
        self.variable("boot_cpu_data", &[0; 16]);
    }

    fn variables(&mut self) {
        let fixmap = (FIXMAP.0, 'D', "level1_fixmap_pgt".to_owned());
        self.fixture.symbols.push(fixmap);
        self.variable("total_forks", &77u64.to_le_bytes());
        self.variable("nr_cpu_ids", &2u32.to_le_bytes());
        let bases: Vec<u8> = PERCPU.iter().flat_map(|b| b.to_le_bytes()).collect();
        self.variable("__per_cpu_offset", &bases);
        for list in ["modules", "module_bug_list"] {
            let head = self.variable(list, &[0; 16]);
            self.link(head, &[]);
        }
        for lock in ["module_mutex", "jump_label_mutex", "kprobe_mutex"] {
            self.variable(lock, &[0; 32]);
        }
        self.variable("kprobe_table", &[0; 64 * 8]);
        // Room for what a test adds to it.
        self.variable("some_kprobes", &[0; 512]);
        for cache in ["kprobe_insn_slots", "kprobe_optinsn_slots"] {
            let cache = self.variable(cache, &[0; 32]);
            self.link(cache.plus(INSN_PAGES as u64), &[]);
        }
        let bounds = [0, 0, 0, u64::MAX, 0].map(u64::to_le_bytes).concat();
        self.variable("mod_tree", &bounds);
        self.variable("xen_pvh", &[u8::from(self.kind == GuestType::Pvh)]);
    }

    /// Per-CPU variables, and how long a stack is.
    fn absolute_symbols(&mut self) {
        for (name, at) in [
            ("idle_threads", IDLE_THREADS),
            ("current_task", CURRENT_TASK),
            ("hardirq_stack_ptr", HARDIRQ_STACK),
            ("runqueues", RUNQUEUES),
        ] {
            self.fixture.symbols.push((at, 'A', name.to_owned()));
        }
        // The stacks are elsewhere; only the distance of these two counts.
        let start = DATA.0 + (1 << 20);
        for (at, name) in [
            (start, "__start_init_stack"),
            (start + STACK_LEN as u64, "__end_init_stack"),
        ] {
            self.fixture.symbols.push((at, 'D', name.to_owned()));
        }
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
