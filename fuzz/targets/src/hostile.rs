//! Guests that lie, each in one way. Each is read as `info` does, in a process of its own. It must be read or
//! refused, within the time that a budget may take and within 64 MiB.

use std::process::Command;

use locus_guest::addr::{Frame, Gva, PAGE_LEN, PAGE_SIZE};
use locus_guest::mock::{ChangingMemory, MockMemory, ROOT};
use locus_guest::space::{Space, PTE_NX, PTE_PRESENT, PTE_WRITE};
use locus_guest::Memory;
use locus_kernel::fixture::{kallsyms, vcpus, Fixture, Tables, ENTRY, KIND, RODATA, TEXT};
use locus_kernel::locate::KERNEL_MAP;
use locus_kernel::tasks::TaskLayout;
use locus_kernel::Kernel;
use xen_locus::arena::Arena;
use xen_locus::error::{Cause, Class};
use xen_locus::ops;

use super::arena;
use super::guest::{self, DATA, HEAD_AT, MODULES, SIGNAL_AT, TASKS_AT};
use super::mutate::{cpu_time, patience};

/// Most memory that reading a guest may take, in KiB.
const MEMORY: u64 = 64 << 10;
/// Environment variable of the processes that read one guest.
const ALONE: &str = "XEN_LOCUS_TEST_ALONE";

/// A figure of this process from /proc, in KiB.
fn memory(what: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|l| l.starts_with(what)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// Reads the guest that `make` makes. This must end with an error that contains `expected`, or without one if
/// `expected` is empty. `tables` is the size of what is kept of the guest, in KiB.
#[track_caller]
fn refused<M: Memory>(name: &str, expected: &str, tables: u64, make: impl FnOnce() -> M) {
    if std::env::var_os(ALONE).is_none() {
        let me = std::env::current_exe().unwrap();
        let test = format!("hostile::{name}");
        let out = Command::new(me)
            .args(["--exact", &test, "--nocapture"])
            .env(ALONE, "1")
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&out.stdout);
        assert!(
            said.contains("1 passed") || !out.status.success(),
            "no test {test}"
        );
        let why = String::from_utf8_lossy(&out.stderr);
        assert!(out.status.success(), "{said}{why}");
        print!("{said}");
        return;
    }
    let guest = make();
    // Resets the peak of memory to what is used now (proc(5)).
    std::fs::write("/proc/self/clear_refs", "5").unwrap();
    let (before, began) = (memory("VmRSS"), cpu_time());
    let said = look(&guest).err().unwrap_or_default();
    let (peak, took) = (memory("VmHWM") - before, cpu_time() - began);
    println!("{name}: {took:?} of {:?}, {peak} KiB: {said}", patience());
    assert!(
        if expected.is_empty() {
            said.is_empty()
        } else {
            said.contains(expected)
        },
        "expected {expected:?}, found {said:?}"
    );
    assert!(took < patience(), "it took {took:?} of {:?}", patience());
    assert!(peak < MEMORY + tables, "it took {peak} KiB");
}

/// Reads what `info` reads.
fn look(memory: &dyn Memory) -> Result<(), String> {
    let kernel = Kernel::read(memory, KIND, &vcpus()).map_err(|e| e.to_string())?;
    kernel.symbols.addr("init_task").ok_or("no init_task")?;
    kernel
        .symbols
        .covering(ENTRY)
        .ok_or("nothing covers the entry")?;
    let layout = TaskLayout::of(&kernel).map_err(|e| e.to_string())?;
    layout
        .all(&kernel, &kernel.space.fresh())
        .map_err(|e| e.to_string())?;
    kernel.module_count().map_err(|e| e.to_string())?;
    match Arena::read(&kernel) {
        Ok(_) => ops::patches_and_drained("", &kernel, None).map(|_| ()),
        // The guest has no place for an arena, which is no lie.
        Err(e)
            if matches!(
                (e.class(), e.cause()),
                (Class::NotApplicable, Cause::Said(_))
            ) =>
        {
            Ok(())
        }
        Err(e) => Err(e),
    }
    .map_err(|e| e.to_string())
}

/// The small guest with words of its variables changed.
fn with(words: &[(u64, u64)]) -> MockMemory {
    let mut data = guest::variables();
    for &(at, word) in words {
        data[at as usize..at as usize + 8].copy_from_slice(&word.to_le_bytes());
    }
    guest::build(&data, guest::types())
}

/// Address of what a lie needs besides the variables.
const MORE: Gva = Gva(0xffff_8880_1000_0000);

/// Maps `words` at [`MORE`].
fn more(memory: &MockMemory, words: impl IntoIterator<Item = u64>) {
    let bytes: Vec<u8> = words.into_iter().flat_map(u64::to_le_bytes).collect();
    memory.map_bytes(MORE, &bytes, true, false);
}

#[test]
fn an_honest_guest_is_read() {
    refused("an_honest_guest_is_read", "", 0, || with(&[]));
}

#[test]
fn a_task_list_that_leads_back_to_its_middle_is_given_up() {
    refused(
        "a_task_list_that_leads_back_to_its_middle_is_given_up",
        "the list of tasks changed",
        0,
        || with(&[(0x200 + TASKS_AT + 8, DATA.0 + 0x400 + TASKS_AT)]),
    );
}

#[test]
fn a_module_list_that_leads_to_itself_is_given_up() {
    refused(
        "a_module_list_that_leads_to_itself_is_given_up",
        "does not come back to its head",
        0,
        || with(&[(0x3008, DATA.0 + 0x3008), (MODULES, DATA.0 + 0x3008)]),
    );
}

/// A circular list of `count` elements at [`MORE`], with `word` after each.
fn long_ring(memory: &MockMemory, count: u64, word: u64) {
    let at = |i: u64| MORE.0 + i % count * 24;
    let elements = (0..count).flat_map(|i| [at(i + 1), at(i + count - 1), word]);
    // What lies around the list is read as tasks.
    more(memory, elements.chain((0..512).map(|_| 0)));
    memory.map_bytes(Gva(MORE.0 - PAGE_SIZE), &[0; PAGE_LEN], true, false);
}

#[test]
fn processes_by_the_million_are_given_up() {
    refused(
        "processes_by_the_million_are_given_up",
        "more than 131072 tasks",
        0,
        || {
            let memory = with(&[
                (TASKS_AT, MORE.0 + 24),
                (TASKS_AT + 8, MORE.0 + 24 * 999_999),
            ]);
            long_ring(&memory, 1_000_000, 0);
            // The first task in place of the ring's first element.
            let head = (DATA.0 + TASKS_AT).to_le_bytes();
            let place = |at: Gva| {
                let space = Space::new(&memory, ROOT, 4);
                memory.fill(space.walk(at.page()).unwrap().frame, at.offset(), &head);
            };
            place(MORE.plus(24 + 8));
            place(MORE.plus(24 * 999_999));
            memory
        },
    );
}

#[test]
fn a_thread_list_of_a_million_is_given_up() {
    refused(
        "a_thread_list_of_a_million_is_given_up",
        "more than 131072 tasks",
        0,
        || {
            let signal = MORE.0 - HEAD_AT;
            let memory = with(&[(0x200 + SIGNAL_AT, signal)]);
            long_ring(&memory, 1_000_000, signal);
            memory
        },
    );
}

#[test]
fn a_thread_of_another_process_is_not_followed() {
    refused(
        "a_thread_of_another_process_is_not_followed",
        "the list of tasks changed",
        0,
        || {
            let memory = with(&[(0x200 + SIGNAL_AT, MORE.0 - HEAD_AT)]);
            long_ring(&memory, 3, MORE.0);
            memory
        },
    );
}

#[test]
fn four_thousand_million_processors_are_not_believed() {
    refused(
        "four_thousand_million_processors_are_not_believed",
        "nr_cpu_ids",
        0,
        || with(&[(0x1410, u64::MAX)]),
    );
}

/// A guest whose whole kernel map leads to frames with `fill`, read-only, except for a table of text and one of
/// variables.
fn everywhere(fill: &[u8], executable_entry: bool) -> MockMemory {
    let memory = MockMemory::new();
    let table = |next: Frame, bits: u64| {
        let frame = memory.frame();
        (0..512).for_each(|slot| memory.set_entry(frame, slot, next.0 << 12 | PTE_PRESENT | bits));
        frame
    };
    let leaves = memory.frame();
    let pages: Vec<Frame> = fill
        .chunks(PAGE_LEN)
        .map(|page| {
            let frame = memory.frame();
            memory.fill(frame, 0, page);
            frame
        })
        .collect();
    for slot in 0..512 {
        let page = pages[slot % pages.len()];
        memory.set_entry(leaves, slot, page.0 << 12 | PTE_PRESENT | PTE_NX);
    }
    let middle = table(leaves, 0);
    let top = table(middle, 0);
    memory.set_entry(ROOT, 511, top.0 << 12 | PTE_PRESENT | PTE_WRITE);
    if executable_entry {
        let text = table(pages[0], 0);
        let middle_of_text = memory.frame();
        for slot in 0..512 {
            memory.set_entry(middle_of_text, slot, leaves.0 << 12 | PTE_PRESENT);
        }
        let slot = (ENTRY.0 >> 21 & 511) as usize;
        memory.set_entry(middle_of_text, slot, text.0 << 12 | PTE_PRESENT);
        let variables = table(pages[0], PTE_WRITE | PTE_NX).0 << 12;
        memory.set_entry(middle_of_text, 511, variables | PTE_PRESENT | PTE_WRITE);
        let slot = (KERNEL_MAP.0 >> 30 & 511) as usize;
        memory.set_entry(top, slot, middle_of_text.0 << 12 | PTE_PRESENT | PTE_WRITE);
    }
    memory
}

#[test]
fn a_root_that_holds_itself_everywhere_is_no_kernel() {
    refused(
        "a_root_that_holds_itself_everywhere_is_no_kernel",
        "can be written and executed",
        0,
        || {
            let memory = MockMemory::new();
            let entry = ROOT.0 << 12 | PTE_PRESENT | PTE_WRITE;
            (0..512).for_each(|slot| memory.set_entry(ROOT, slot, entry));
            memory
        },
    );
}

#[test]
fn a_root_that_holds_itself_with_every_right_is_given_up() {
    refused(
        "a_root_that_holds_itself_with_every_right_is_given_up",
        "given up",
        0,
        || {
            let memory = MockMemory::new();
            for slot in 0..512 {
                let nx = if slot % 2 == 1 && slot < 500 {
                    PTE_NX
                } else {
                    0
                };
                memory.set_entry(ROOT, slot, ROOT.0 << 12 | PTE_PRESENT | nx);
            }
            memory
        },
    );
}

#[test]
fn a_gibibyte_of_one_page_is_no_kernel() {
    refused(
        "a_gibibyte_of_one_page_is_no_kernel",
        "no kallsyms table",
        0,
        || everywhere(&[0; PAGE_LEN], true),
    );
}

#[test]
fn a_gibibyte_of_what_begins_a_token_table_is_given_up() {
    refused(
        "a_gibibyte_of_what_begins_a_token_table_is_given_up",
        "given up",
        0,
        || {
            let digits = b"0\x001\x002\x003\x004\x005\x006\x007\x008\x009\x00";
            everywhere(&digits.repeat(205)[..PAGE_LEN], true)
        },
    );
}

/// A symbol table that is correct except for its addresses, which fit no kernel.
fn strange_table(count: u64) -> Vec<u8> {
    let symbols: Vec<_> = (0..count)
        .map(|i| (TEXT.0 + i, 't', "s".to_owned()))
        .collect();
    kallsyms(RODATA, &symbols, Tables::New)
}

#[test]
fn a_gibibyte_of_symbol_tables_is_given_up() {
    refused(
        "a_gibibyte_of_symbol_tables_is_given_up",
        "given up",
        0,
        || {
            let mut table = strange_table(1030);
            table.resize(table.len().next_multiple_of(PAGE_LEN), 0);
            everywhere(&table, true)
        },
    );
}

#[test]
fn page_tables_that_are_not_there_are_no_kernel() {
    refused(
        "page_tables_that_are_not_there_are_no_kernel",
        "no read-only data",
        0,
        || {
            let memory = MockMemory::new();
            let table = memory.frame();
            memory.set_entry(ROOT, 511, table.0 << 12 | PTE_PRESENT);
            (0..512).for_each(|slot| memory.set_entry(table, slot, 0xf_ffff_f000 | PTE_PRESENT));
            memory
        },
    );
}

/// The fixture with `count` more symbols, all called `name`.
fn many_symbols(count: u64) -> MockMemory {
    let mut fixture = Fixture::new();
    // Not too many have the same name.
    let names = (b';'..=b'z').map(|c| char::from(c).to_string()).cycle();
    let more = (0..count).map(|i| TEXT.0 + 0x1000 + i % 4096);
    let more = more.zip(names).map(|(at, name)| (at, 't', name));
    fixture.symbols.extend(more);
    fixture.build()
}

#[test]
fn a_million_symbols_are_read_in_bounded_memory() {
    // The tables: 2 MiB of names in the guest, 20 MiB read.
    refused(
        "a_million_symbols_are_read_in_bounded_memory",
        "no init_task",
        22 << 10,
        || many_symbols((1 << 20) - 2000),
    );
}

#[test]
fn two_million_symbols_are_not_believed() {
    refused(
        "two_million_symbols_are_not_believed",
        "no kallsyms table",
        0,
        || many_symbols(1 << 21),
    );
}

#[test]
fn names_that_unpack_to_a_gibibyte_are_not_believed() {
    // 500,000 names of 4 tokens, each token 126 bytes long.
    refused(
        "names_that_unpack_to_a_gibibyte_are_not_believed",
        "no kallsyms table",
        0,
        || {
            let count = 500_000usize;
            let mut out = Vec::new();
            out.extend((count as u64).to_le_bytes());
            (0..count).for_each(|_| out.extend([4, b'a', b'a', b'a', b'a']));
            out.resize(out.len().next_multiple_of(8), 0);
            (0..count.div_ceil(256)).for_each(|i| out.extend((i as u32 * 256 * 5).to_le_bytes()));
            out.resize(out.len().next_multiple_of(8), 0);
            let (tokens, mut index) = (out.len(), Vec::new());
            for token in 0..=255u8 {
                index.extend(((out.len() - tokens) as u16).to_le_bytes());
                match token {
                    b'0'..=b'9' => out.push(token),
                    _ => out.extend([b'x'; 126]),
                }
                out.push(0);
            }
            out.resize(out.len().next_multiple_of(8), 0);
            out.extend(index);
            out.extend(vec![0; count * 4 + 8]);
            let memory = MockMemory::new();
            memory.map_bytes(TEXT, &vec![0xcc; (RODATA.0 - TEXT.0) as usize], false, true);
            memory.map_bytes(RODATA, &out, false, false);
            let variables = RODATA.plus((out.len() as u64).next_multiple_of(4096));
            memory.map_bytes(variables, &[0], true, false);
            memory
        },
    );
}

#[test]
fn a_million_types_are_searched_in_bounded_time() {
    // None of them is task_struct; they would be 12 MiB.
    refused(
        "a_million_types_are_searched_in_bounded_time",
        "task_struct",
        12 << 10,
        || {
            let count = (1u32 << 20) - 10;
            let mut btf = vec![0x9f, 0xeb, 1, 0];
            for word in [24, 0, count * 12, count * 12, 1] {
                btf.extend(word.to_le_bytes());
            }
            for _ in 0..count {
                btf.extend([0, 4 << 24, 0].iter().flat_map(|w: &u32| w.to_le_bytes()));
            }
            btf.push(0);
            guest::build(&guest::variables(), btf)
        },
    );
}

#[test]
fn memory_that_never_reads_the_same_is_refused_or_read() {
    for every in [3, 50, 1000, 20_000] {
        let memory = ChangingMemory {
            unchanged: with(&[]),
            every,
            words: std::rc::Rc::default(),
        };
        for _ in 0..4 {
            let _ = look(&memory);
        }
        assert!(memory.words.get() > 512, "nothing was read");
    }
}

/// The small guest with `count` payloads of `pages` arena pages each, all on the same functions.
fn with_payloads(count: usize, pages: usize) -> MockMemory {
    let memory = with(&[]);
    arena::put_full(&memory, count, pages);
    memory
}

#[test]
fn payloads_on_each_other_are_read() {
    refused("payloads_on_each_other_are_read", "", 0, || {
        with_payloads(3, 2)
    });
}

#[test]
fn an_arena_full_of_payloads_on_each_other_is_one_look() {
    // Two million ranges, if each payload watched all below it.
    refused(
        "an_arena_full_of_payloads_on_each_other_is_one_look",
        "",
        0,
        || with_payloads(31, 16),
    );
}

#[test]
fn a_page_mapped_everywhere_is_one_region_of_a_gibibyte() {
    let memory = everywhere(&[0; PAGE_LEN], false);
    let space = locus_guest::space::Space::new(&memory, ROOT, 4);
    let range = locus_guest::addr::Range::new(KERNEL_MAP, 1 << 30);
    let regions = space.regions(range);
    assert_eq!(regions.len(), 1);
    assert_eq!(regions[0].range, range);
    assert!(space.budget().spent() < (1 << 30) / PAGE_SIZE);
}
