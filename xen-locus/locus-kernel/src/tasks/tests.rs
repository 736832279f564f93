use locus_guest::mock::MockMemory;

use super::details::letter;
use super::*;
use crate::btf::blob::Blob;
use crate::btf::TypeKind;
use crate::fixture::{vcpus, Fixture, KIND, TEXT};

mod crowd;

#[test]
fn letters_are_those_of_proc() {
    for (state, exit, wanted) in [
        (0, 0, 'R'),
        (0x1, 0, 'S'),
        (0x2, 0, 'D'),
        // TASK_KILLABLE
        (0x102, 0, 'D'),
        // TASK_STOPPED, with and without the bit that lets a signal kill it
        (0x104, 0, 'T'),
        (0x4, 0, 'T'),
        (0x8, 0, 't'),
        // TASK_DEAD with each of its exit states
        (0x80, 0x10, 'X'),
        (0x80, 0x20, 'Z'),
        (0x40, 0, 'P'),
        // TASK_IDLE, and TASK_FREEZABLE beside it
        (0x402, 0, 'I'),
        (0x2402, 0, 'I'),
        (0x2001, 0, 'S'),
        // TASK_FROZEN, whatever it was before
        (0x8000, 0, 'D'),
        (0x1000, 0, 'D'),
        // TASK_WAKING and TASK_NEW are no states that are reported
        (0x200, 0, 'R'),
        (0x800, 0, 'R'),
    ] {
        assert_eq!(letter(state, exit), wanted, "{state:#x} {exit:#x}");
    }
    for bit in 0..32 {
        let _ = (
            letter(1 << bit, 0),
            letter(0, 1 << bit),
            letter(u32::MAX, 1 << bit),
        );
    }
}

const TASKS: Gva = Gva(TEXT.0 + (32 << 20));
const SIZE: u64 = 256;

/// Members of a small `task_struct`: name, type, offset in bytes. `newer`: with `__state` and the
/// CPU in `thread_info`.
fn btf(newer: bool) -> Vec<u8> {
    let mut types = Blob::with_integers();
    let info = types.fields(
        TypeKind::Struct,
        "thread_info",
        16,
        &[("flags", 4, 0, 0), ("cpu", 3, 64, 0)],
    );
    let thread = types.fields(TypeKind::Struct, "thread_struct", 8, &[("sp", 4, 0, 0)]);
    types.fields(
        TypeKind::Struct,
        "signal_struct",
        16,
        &[("thread_head", 4, 0, 0)],
    );
    let bytes = |n: u32| 8 * n;
    let mut members = vec![
        ("tasks", 4, bytes(32), 0),
        ("thread_node", 4, bytes(48), 0),
        ("signal", 4, bytes(64), 0),
        ("stack", 4, bytes(72), 0),
        ("thread", thread, bytes(80), 0),
        ("pid", 3, bytes(88), 0),
        ("tgid", 3, bytes(92), 0),
        ("comm", 4, bytes(96), 0),
        ("on_cpu", 3, bytes(112), 0),
        ("exit_state", 3, bytes(116), 0),
        ("start_time", 4, bytes(120), 0),
        ("nvcsw", 4, bytes(128), 0),
        ("nivcsw", 4, bytes(136), 0),
    ];
    if newer {
        members.extend([("thread_info", info, 0, 0), ("__state", 3, bytes(16), 0)]);
    } else {
        members.extend([("cpu", 3, bytes(24), 0), ("state", 4, bytes(16), 0)]);
    }
    types.fields(TypeKind::Struct, "task_struct", 256, &members);
    types.bytes()
}

/// Where task number `n` stands; number 0 is the idle task.
fn task(n: u64) -> u64 {
    TASKS.0 + SIZE * n
}

/// Three tasks: the idle one, and two threads of process 10.
fn kernel_with<T>(newer: bool, last: u64, look: impl FnOnce(&Kernel<'_>) -> T) -> T {
    let mut fixture = Fixture::new();
    fixture.constants.push(("__start_BTF", btf(newer)));
    fixture.constants.push(("__stop_BTF", Vec::new()));
    let vars = task(8);
    for (name, at) in [
        ("init_task", task(0)),
        ("__start_init_task", task(16)),
        ("__end_init_task", task(16) + 0x4000),
        ("nr_cpu_ids", vars),
        ("__per_cpu_offset", vars + 8),
    ] {
        fixture.symbols.push((at, 'D', name.to_owned()));
    }
    fixture
        .symbols
        .push((0x100, 'A', "idle_threads".to_owned()));
    let memory: MockMemory = fixture.build();
    let mut page = vec![0; 4096];
    let mut put = |at: u64, bytes: &[u8]| {
        let at = usize::try_from(at - TASKS.0).unwrap();
        page[at..at + bytes.len()].copy_from_slice(bytes);
    };
    let mut word = |at: u64, value: u64| put(at, &value.to_le_bytes());
    let signal = task(4);
    // The list of processes has one beside its head, which is the idle task.
    word(task(0) + 32, task(1) + 32);
    word(task(1) + 32, task(0) + 32);
    word(task(0) + 40, task(1) + 32);
    word(task(1) + 40, task(0) + 32);
    word(signal + 8, task(2) + 48);
    word(task(2) + 56, task(1) + 48);
    word(task(1) + 56, signal);
    for (n, next) in [(1, task(2) + 48), (2, last)] {
        word(task(n) + 48, next);
        word(task(n) + 64, signal);
        word(task(n) + 72, 0xffff_c900_0000_0000 + (n << 16));
        word(task(n) + 88, (10 << 32) | (9 + n));
        word(task(n) + 96, u64::from_le_bytes(*b"na\x1b\n\0xyz"));
        if newer {
            word(task(n) + 8, n + 2);
            word(task(n) + 16, 0xffff_ffff_0000_0402);
        } else {
            word(task(n) + 24, n + 2);
            word(task(n) + 16, 1);
        }
    }
    word(signal, task(1) + 48);
    word(vars, 1);
    word(vars + 8, task(9));
    word(task(9) + 0x100, task(0));
    memory.map_bytes(TASKS, &page, true, false);
    look(&Kernel::read(&memory, KIND, &vcpus()).unwrap())
}

#[test]
fn threads_and_the_idle_task_are_listed_with_their_details() {
    for (newer, state) in [(true, 'I'), (false, 'S')] {
        kernel_with(newer, task(4), |kernel| {
            let details = DetailLayout::of(kernel).unwrap();
            let found = snapshot(kernel, |space, tasks| {
                let with = |task: Task| Ok((details.read(space, task.addr)?, task));
                tasks.into_iter().map(with).collect::<Result<Vec<_>, _>>()
            })
            .unwrap();
            let all: Vec<_> = found
                .iter()
                .map(|(d, t)| (t.pid, d.tgid, d.state, d.cpu, t.idle))
                .collect();
            assert_eq!(count(kernel).unwrap(), 3);
            let wanted = [
                (10, 10, state, 3, false),
                (11, 10, state, 4, false),
                (0, 0, 'R', 0, true),
            ];
            assert_eq!(all, wanted, "newer: {newer}");
            assert_eq!(found[0].1.comm, "na??");
            assert_eq!(found[1].1.stack.start, Gva(0xffff_c900_0002_0000));
        });
    }
}

#[test]
fn a_list_of_threads_that_never_ends_or_leaves_memory_is_an_error() {
    for last in [task(2) + 48, 0x1000, u64::MAX] {
        kernel_with(true, last, |kernel| {
            assert!(TaskLayout::of(kernel)
                .unwrap()
                .all(kernel, &kernel.space)
                .is_err());
            assert!(count(kernel).is_err());
        });
    }
}

#[test]
fn what_the_reader_of_a_task_says_is_the_answer_of_the_last_try() {
    kernel_with(true, task(4), |kernel| {
        let tries = std::cell::Cell::new(0);
        let read = snapshot(kernel, |_, _| {
            tries.set(tries.get() + 1);
            Err::<(), _>(Error::Odd("as the caller says".into()))
        });
        assert!((3..=20).contains(&tries.get()));
        assert_eq!(
            read.unwrap_err().to_string(),
            "the guest's kernel data is not as it must be: as the caller says"
        );
    });
}
