//! The kernel's symbol table (kallsyms).

use locus_guest::addr::{Range, PAGE_LEN};
use locus_guest::mock::{MockMemory, ROOT};
use locus_guest::space::Space;
use locus_kernel::fixture::{kallsyms, Tables, ENTRY, RODATA, TEXT};
use locus_kernel::kallsyms::{read, Anchors, SecondAnchor};
use locus_kernel::split_functions::PARTS_MAX;

/// Most bytes of an input that are used, because the time of the search grows with them.
const LONGEST: usize = 256 << 10;

/// `data` is the kernel's read-only data, which is searched for the table.
pub fn run(data: &[u8]) {
    let memory = MockMemory::new();
    let data = data.get(..LONGEST).unwrap_or(data);
    memory.map_bytes(RODATA, data, false, false);
    let space = Space::new(&memory, ROOT, 4);
    let len = data.len().next_multiple_of(PAGE_LEN) as u64;
    let regions = space.regions(Range::new(RODATA, len));
    let anchors = Anchors {
        text_base: TEXT,
        second: SecondAnchor::Entry(ENTRY),
    };
    if let Ok(symbols) = read(&space, &regions, anchors) {
        for symbol in symbols.iter() {
            assert!(symbols.addr(&symbol.name).is_some());
            let _ = symbols.covering(symbol.addr);
            // As it is paid for when a guest's function is examined.
            if space.budget().spend(symbols.cold_parts_cost()).is_ok() {
                if let Ok(parts) = symbols.cold_parts(symbol.addr) {
                    assert!(parts.len() <= PARTS_MAX);
                }
            }
        }
        let _ = symbols.room(ENTRY);
    }
}

/// One table of each kind.
pub fn seeds() -> Vec<Vec<u8>> {
    let mut symbols = vec![
        (TEXT.0, 'T', "_text".to_owned()),
        (ENTRY.0, 'T', "entry".to_owned()),
        (TEXT.0 + 0x180, 't', "a_long_name_".repeat(12)),
    ];
    // Many names of one function, and many parts of it.
    symbols.extend((0..40).map(|i| (TEXT.0 + 0x1a0, 't', format!("f{}", i % 20))));
    symbols.extend((0..40).map(|i| (TEXT.0 + 0x1a0 + i, 't', format!("f{}.cold", i % 20))));
    symbols.extend((0..1030).map(|i| (TEXT.0 + 0x200 + i, 't', format!("s{}", i % 256))));
    Tables::ALL
        .into_iter()
        .map(|tables| kallsyms(RODATA, &symbols, tables))
        .collect()
}
