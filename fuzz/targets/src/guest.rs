//! A small guest with types, tasks and modules; the target `tasks`.

use locus_guest::addr::{Gva, PAGE_LEN};

use super::look;
use super::stage::Stage;
#[cfg(test)]
use locus_guest::mock::MockMemory;
use locus_kernel::btf::blob::Blob;
use locus_kernel::fixture::Fixture;

/// Address of its variables.
pub(crate) const DATA: Gva = Gva(0xffff_ffff_8800_0000);
/// Number of pages with variables.
const PAGES: usize = 4;

/// Size of a `struct task_struct`, in bytes.
const TASK: u64 = 0x200;
const SIGNALS: u64 = 0x1000;
const PER_CPU_OFFSET: u64 = 0x1400;
const CPUS: u64 = 0x1410;
pub(crate) const MODULES: u64 = 0x1420;
pub(crate) const E820: u64 = 0x1440;
const E820_TABLE: u64 = 0x1480;
const CPU_AREA: u64 = 0x2000;
const MODULE: u64 = 0x3000;
/// Offset of `idle_threads` in a CPU's area.
const IDLE: u64 = 0x100;

// Members of `struct task_struct`, and the head of the threads in `struct signal_struct`.
pub(crate) const TASKS_AT: u64 = 0x10;
pub(crate) const THREAD_AT: u64 = 0x20;
pub(crate) const SIGNAL_AT: u64 = 0x30;
const STACK_AT: u64 = 0x38;
const PID_AT: u64 = 0x40;
const CPU_AT: u64 = 0x44;
const COMM_AT: u64 = 0x48;
const START_AT: u64 = 0x58;
const SP_AT: u64 = 0x60;
pub(crate) const HEAD_AT: u64 = 0x10;

/// Types of the small guest, as BTF.
pub fn types() -> Vec<u8> {
    let mut types = Blob::new();
    let int = types.int("int", 4);
    let long = types.int("long", 8);
    let list = types.structure("list_head", 16, &[("next", long, 0), ("prev", long, 8)]);
    let thread = types.structure("thread_struct", 8, &[("sp", long, 0)]);
    let head = HEAD_AT as usize;
    types.structure(
        "signal_struct",
        0x80,
        &[("nr_threads", int, 0), ("thread_head", list, head)],
    );
    let names = types.array(int, 16);
    let members = [
        ("tasks", list, TASKS_AT),
        ("thread_node", list, THREAD_AT),
        ("signal", long, SIGNAL_AT),
        ("stack", long, STACK_AT),
        ("pid", int, PID_AT),
        ("on_cpu", int, CPU_AT),
        ("comm", names, COMM_AT),
        ("start_time", long, START_AT),
        ("thread", thread, SP_AT),
        ("tgid", int, SP_AT + 8),
        ("__state", int, SP_AT + 12),
        ("exit_state", int, SP_AT + 16),
        ("cpu", int, SP_AT + 20),
        ("nvcsw", long, SP_AT + 24),
        ("nivcsw", long, SP_AT + 32),
    ]
    .map(|(name, ty, at)| (name, ty, at as usize));
    // The members are in an anonymous structure, as with randomised layouts.
    let inner = types.structure("", TASK as usize, &members);
    types.structure("task_struct", TASK as usize, &[("", inner, 0)]);
    types.bytes()
}

/// Variables of the small guest: three processes of two threads, an idle task, two modules.
pub fn variables() -> Vec<u8> {
    let mut data = vec![0; PAGES * PAGE_LEN];
    let mut put = |at: u64, value: u64| {
        data[at as usize..at as usize + 8].copy_from_slice(&value.to_le_bytes());
    };
    let address = |offset: u64| DATA.0 + offset;
    let mut ring = |nodes: &[u64]| {
        for (i, &node) in nodes.iter().enumerate() {
            let next = nodes[(i + 1) % nodes.len()];
            put(node, address(next));
            put(next + 8, address(node));
        }
    };
    // Tasks 0 to 2 lead, 3 to 5 follow, 6 is idle.
    ring(&[0, 1, 2].map(|i| i * TASK + TASKS_AT));
    for i in 0..3 {
        let head = SIGNALS + i * 0x80 + HEAD_AT;
        ring(&[head, i * TASK + THREAD_AT, (i + 3) * TASK + THREAD_AT]);
    }
    ring(&[MODULES, MODULE + 8, MODULE + 0x400 + 8]);
    for i in 0..7 {
        let task = i * TASK;
        put(task + SIGNAL_AT, address(SIGNALS + i % 3 * 0x80));
        put(task + STACK_AT, 0xffff_c900_0000_0000 + i * 0x8000);
        put(task + PID_AT, i);
        put(task + COMM_AT, u64::from_le_bytes(*b"init\0\0\0\0"));
        put(task + START_AT, i * 1000);
        put(task + SP_AT, 0xffff_c900_0000_3f00 + i * 0x8000);
    }
    put(PER_CPU_OFFSET, address(CPU_AREA));
    put(CPUS, 1);
    put(CPU_AREA + IDLE, address(6 * TASK));
    put(MODULE + 24, u64::from_le_bytes(*b"ext4\0\0\0\0"));
    put(MODULE + 0x400 + 24, u64::from_le_bytes(*b"xen\0\0\0\0\0"));
    put(E820, address(E820_TABLE));
    put(E820_TABLE, 1);
    put(E820_TABLE + 12, 0x4000_0000);
    data
}

/// Where the kernel sees its page table of the arena.
pub const FIXMAP: Gva = Gva(DATA.0 + (1 << 20));

fn fixture(btf: Vec<u8>) -> Fixture {
    let mut fixture = Fixture::new();
    let mut variable = |name: &str, at: u64| {
        fixture.symbols.push((at, 'D', name.to_owned()));
    };
    variable("init_task", DATA.0);
    variable("__per_cpu_offset", DATA.0 + PER_CPU_OFFSET);
    variable("nr_cpu_ids", DATA.0 + CPUS);
    variable("modules", DATA.0 + MODULES);
    variable("e820_table", DATA.0 + E820);
    variable("__start_init_stack", DATA.0 + 0x10000);
    variable("__end_init_stack", DATA.0 + 0x14000);
    variable("idle_threads", IDLE);
    // It is one page long.
    variable("level1_fixmap_pgt", FIXMAP.0);
    variable("behind_the_table", FIXMAP.0 + PAGE_LEN as u64);
    fixture.constants.push(("__start_BTF", btf));
    fixture.constants.push(("__stop_BTF", vec![0; 8]));
    fixture
}

/// The guest, with `data` as its variables and `btf` as its types.
#[cfg(test)]
pub fn build(data: &[u8], btf: Vec<u8>) -> MockMemory {
    let memory = fixture(btf).build();
    let mut data = data.to_vec();
    data.resize(PAGES * PAGE_LEN, 0);
    memory.map_bytes(DATA, &data, true, false);
    memory
}

/// The small guest, whose variables are the input.
pub fn stage() -> Stage {
    Stage::new(fixture(types()), DATA, PAGES)
}

thread_local! {
    static STAGE: Stage = stage();
}

/// `data` is the guest's variables, and then its types. All its tasks are listed.
pub fn tasks(data: &[u8]) {
    STAGE.with(|stage| stage.kernel(data).iter().for_each(look::tasks));
}

/// The variables, with the types of the fixture, and with types in the input.
pub fn seeds() -> Vec<Vec<u8>> {
    vec![variables(), [variables(), types()].concat()]
}

#[cfg(test)]
mod tests {
    use super::*;
    use locus_kernel::tasks::{DetailLayout, TaskLayout};

    #[test]
    fn the_small_guest_has_its_tasks_and_modules() {
        for seed in seeds() {
            let kernel = stage().kernel(&seed).unwrap();
            let tasks = TaskLayout::of(&kernel)
                .unwrap()
                .all(&kernel, &kernel.space)
                .unwrap();
            let pids: Vec<u32> = tasks.iter().map(|t| t.pid).collect();
            assert_eq!(pids, [1, 4, 2, 5, 6]);
            assert!(DetailLayout::of(&kernel).is_ok());
            assert_eq!(kernel.module_count().unwrap(), 2);
        }
    }
}
