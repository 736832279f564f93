//! What a guest that says much makes a look cost.

use std::cell::Cell;

use locus_kernel::fixture::TEXT;
use locus_kernel::fixture_world::STACK_LEN;
use locus_kernel::kallsyms::Symbols;

use super::*;

/// Where many CPUs have their areas of 64 bytes, and where their tasks of 256 bytes are.
const AREAS: u64 = 0xffff_8880_2000_0000;
const RUNNING: u64 = 0xffff_8880_3000_0000;
/// Where the bases of the areas are, and the number of CPUs.
const BASES: u64 = TEXT.0 + (14 << 20);
const COUNT: u64 = TEXT.0 + (13 << 20);
/// The stack that all those tasks share.
const STACK: u64 = 0xffff_c900_8000_0000;
const STACK_BYTES: usize = STACK_LEN;

/// A guest that says that it has so many CPUs, each with a task of its own on it, whose stack is full of an address in the
/// function.
fn with_cpus(cpus: u64, test: impl FnOnce(&World, &mut Kernel<'_>)) {
    let world = World::with(GuestType::Pvh, |f| {
        for (at, _, name) in &mut f.symbols {
            match name.as_str() {
                "__per_cpu_offset" => *at = BASES,
                "nr_cpu_ids" => *at = COUNT,
                _ => {}
            }
        }
    });
    let map = |at: u64, words: &[u64]| {
        let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        world.memory.map_bytes(Gva(at), &bytes, true, false);
    };
    let kernel = Kernel::read(&world.memory, world.kind, &world.vcpus).unwrap();
    let layout = TaskLayout::of(&kernel).unwrap();
    let btf = kernel.btf().unwrap();
    let offset = |path| btf.offset_of("task_struct", path).unwrap();
    let idle = kernel.symbols.addr("idle_threads").unwrap().0;
    let current = tasks::current_symbol(&kernel).unwrap().0;
    let (mut areas, mut bases) = (vec![0; 8 * cpus as usize], Vec::new());
    let mut all = vec![0u8; 256 * cpus as usize];
    for cpu in 0..cpus {
        let at = RUNNING + 256 * cpu;
        bases.push((AREAS + 64 * cpu).wrapping_sub(idle.min(current)));
        for symbol in [idle, current] {
            areas[(8 * cpu + (symbol - idle.min(current)) / 8) as usize] = at;
        }
        let mut put = |offset: usize, bytes: &[u8]| {
            let start = 256 * cpu as usize + offset;
            all[start..start + bytes.len()].copy_from_slice(bytes);
        };
        put(offset("stack"), &STACK.to_le_bytes());
        put(offset("pid"), &(1000 + cpu as u32).to_le_bytes());
        put(layout.on_cpu, &1u32.to_le_bytes());
        put(layout.start_time, &(5000 + cpu).to_le_bytes());
    }
    map(COUNT, &[cpus]);
    map(BASES, &bases);
    map(AREAS, &areas);
    map(STACK, &vec![INSIDE; STACK_BYTES / 8]);
    world.memory.map_bytes(Gva(RUNNING), &all, true, false);
    let mut kernel = Kernel::read(&world.memory, world.kind, &world.vcpus).unwrap();
    test(&world, &mut kernel);
}

/// How often a look asks whether the time is over, if it is over after so many times.
fn asked(kernel: &Kernel<'_>, vcpus: &[Vcpu], over: u32) -> (u32, Verdict) {
    let watch = watch();
    let mut steps = Steps {
        tasks: &mut GuestTasks::new(kernel, &watch).unwrap(),
        baseline: Baseline::default(),
    };
    steps.list().unwrap();
    steps.scan_off_cpu().unwrap();
    let asked = Cell::new(0);
    let too_long = || {
        asked.set(asked.get() + 1);
        asked.get() >= over
    };
    let verdict = steps.look(vcpus, true, &too_long).unwrap();
    (asked.get(), verdict)
}

#[test]
fn a_look_at_what_runs_ends_when_the_time_is_over() {
    with_cpus(300, |world, kernel| {
        for over in [1, 2, 5, 300] {
            assert_eq!(asked(kernel, &world.vcpus, over), (over, Verdict::TooLong));
        }
        // Once for each 4 KiB: no stack is looked at whole without a question.
        let (asked, verdict) = asked(kernel, &[], u32::MAX);
        assert!(matches!(verdict, Verdict::Blocked(_)));
        assert!(asked > 300 * 2, "{asked}");
    });
}

#[test]
fn no_more_cpus_are_looked_at_than_xen_has() {
    with_cpus(300, |_, kernel| {
        kernel.cpus_max = 3;
        let (_, verdict) = asked(kernel, &[], u32::MAX);
        let pids: Vec<u32> = blocked(verdict);
        assert_eq!(pids, [42, 1000, 1001, 1002]);
    });
}

#[test]
fn a_look_names_no_symbols() {
    with_guest(|guest, steps| {
        steps.scan_off_cpu().unwrap();
        let mut vcpus = guest.world.vcpus.clone();
        for vcpu in &mut vcpus {
            (vcpu.user, vcpu.gs_base, vcpu.gs_other) = (false, Gva(1), Gva(1));
        }
        let verdict = steps.look(&vcpus, true, &|| false).unwrap();
        let Verdict::Blocked(found) = &verdict else {
            panic!("{verdict:?}");
        };
        assert!(found.iter().any(|t| t.place == Place::At(vcpus[0].rip)));
        let symbols: &Symbols = &guest.kernel.symbols;
        let (name, offset) = symbols.covering(vcpus[0].rip).unwrap();
        let named = verdict.blockers(guest.kernel).unwrap();
        assert!(named
            .iter()
            .any(|b| (&b.function, b.offset) == (&name, offset)));
    });
}
