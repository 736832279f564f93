//! Tests of reading cores.

use std::fs::{self, OpenOptions};

use super::write::{self, CoreHead, CorePage};
use super::*;

/// A core of a few pages whose first bytes are their numbers in the file.
fn small(kind: GuestType, pages: &[(u64, u64)]) -> Vec<u8> {
    let pages: Vec<CorePage> = pages
        .iter()
        .map(|&(pfn, frame)| CorePage { pfn, frame })
        .collect();
    let vcpus = [Vcpu::default()];
    let mut out = Vec::new();
    let mut n = 0;
    write::write(&mut out, &CoreHead::new(kind, &vcpus), &pages, |_| {
        n += 1;
        Ok([n; PAGE_LEN])
    })
    .unwrap();
    out
}

/// A file without a name that holds `bytes`.
fn file(bytes: &[u8]) -> File {
    use std::sync::atomic::{AtomicU32, Ordering};
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let n = COUNT.fetch_add(1, Ordering::Relaxed);
    let name = format!("xen-locus-core-test-{}-{n}", std::process::id());
    let path = std::env::temp_dir().join(name);
    fs::write(&path, bytes).unwrap();
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&path)
        .unwrap();
    fs::remove_file(&path).unwrap();
    file
}

fn parse(bytes: &[u8]) -> Result<Core, String> {
    Core::parse(Path::new("test.core"), file(bytes), bytes.len() as u64)
}

/// Offset of the header of section `index`, from 1.
fn header(index: usize) -> usize {
    64 + 64 * index
}

const NOTES: usize = 2;
const STATE: usize = 3;
const INDEX: usize = 4;
const PAGES: usize = 5;
/// Of a section header: offset and size.
const OFFSET: usize = 24;
const SIZE: usize = 32;

fn put(bytes: &mut [u8], at: usize, value: u64) {
    bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
}

fn get(bytes: &[u8], at: usize) -> usize {
    usize::try_from(fetch::u64(bytes, at).unwrap()).unwrap()
}

#[test]
fn what_was_saved_is_read_back_whatever_the_order_of_frames() {
    let core = parse(&small(
        GuestType::Pv,
        &[
            (0, 77),
            (1, 78),
            (2, 9),
            (3, NO_FRAME),
            (4, 8),
            (NO_FRAME, 5),
        ],
    ))
    .unwrap();
    assert_eq!(core.kind(), GuestType::Pv);
    assert_eq!(core.pages(), 4);
    assert_eq!(core.runs.len(), 3);
    assert_eq!(core.pfn(Frame(78)), Some(1));
    let window = core.map(&[78, 77, 8, 9, 77, 78].map(Frame)).unwrap();
    let mut bytes = vec![0; 6 * PAGE_LEN];
    window.read(0, &mut bytes).unwrap();
    let firsts: Vec<u8> = bytes.chunks(PAGE_LEN).map(|page| page[0]).collect();
    assert_eq!(firsts, [2, 1, 5, 3, 1, 2]);
    let mut across = [0; 4];
    window.read(PAGE_LEN - 2, &mut across).unwrap();
    assert_eq!(across, [2, 2, 1, 1]);
    assert!(window.read(6 * PAGE_LEN - 3, &mut across).is_err());
    for absent in [0, 5, 7, 10, 76, 79, NO_FRAME] {
        let error = core.map(&[Frame(absent)]).err().unwrap().to_string();
        assert!(error.contains("not in the core"), "{error}");
    }
}

#[test]
fn an_index_of_frames_that_never_ends_is_refused_before_it_fills_the_memory() {
    let entries = RUNS_MAX as u64 + 10;
    let index = CoreSection {
        name: ".xen_pfn".into(),
        offset: 0,
        size: 8 * entries,
    };
    // All of it a hole.
    let sparse = file(&[]);
    sparse.set_len(index.size).unwrap();
    let error = runs(&sparse, &index, 8, &index.name).unwrap_err();
    assert!(error.contains("twice (entries 0 and 1)"), "{error}");
    // No frame follows the one before it.
    let scattered: Vec<u8> = (0..entries).flat_map(|n| (2 * n).to_le_bytes()).collect();
    let error = runs(&file(&scattered), &index, 8, &index.name).unwrap_err();
    assert!(error.contains("more than 4194304 runs"), "{error}");
}

#[test]
fn a_damaged_head_is_refused_with_what_was_expected_and_found() {
    let good = small(GuestType::Hvm, &[(1, 1), (2, 2), (3, 3)]);
    parse(&good).unwrap();
    let notes = get(&good, header(NOTES) + OFFSET);
    let index = get(&good, header(INDEX) + OFFSET);
    // The header note follows the empty one of 16 bytes, and has a head of 16 bytes itself.
    let note = notes + 32;
    let far = u64::MAX - 100;
    for (at, value, expected) in [
        (0, 0, "expected an ELF file"),
        (16, 0x0000_0001_0003_0004, "64-bit x86"),
        (40, far, "\"headers\" is said to have"),
        (header(PAGES) + OFFSET, far, "cut short or damaged"),
        (header(PAGES) + SIZE, far, "cut short or damaged"),
        (header(PAGES) + SIZE, 5000, "pages of 4096 bytes"),
        (header(PAGES) + SIZE, 4096, "an entry of 8 bytes for each"),
        (header(PAGES) + OFFSET, index as u64, "overlap"),
        (
            header(STATE) + SIZE,
            17,
            "5168 bytes for each of the 1 vCPUs",
        ),
        (header(NOTES) + SIZE, 20, "is cut short"),
        (header(NOTES), 0, "no section .note.Xen"),
        (note, MAGIC_PV, "no section .xen_p2m"),
        (note, 5, "magic number 0x5"),
        (note + 8, 0, "of the 0 vCPUs"),
        (note + 8, u64::MAX, "vCPUs that the header note counts"),
        (note + 24, 8192, "pages have 8192 bytes"),
        (index + 8, 3, "frame 0x3 twice (entries 1 and 2)"),
        (notes, u64::MAX, "cut short"),
    ] {
        let mut bad = good.clone();
        put(&mut bad, at, value);
        let error = parse(&bad).unwrap_err();
        assert!(error.contains(expected), "{at}: {expected:?}: {error}");
    }
    let mut many = good.clone();
    many[60..62].copy_from_slice(&u16::MAX.to_le_bytes());
    assert!(parse(&many).unwrap_err().contains("65535 sections"));
}

#[test]
fn a_core_that_is_cut_short_anywhere_is_refused() {
    let good = small(GuestType::Pv, &[(1, 4), (2, 3)]);
    for len in (0..good.len()).step_by(97) {
        assert!(parse(&good[..len]).is_err(), "{len}");
    }
}

#[test]
fn any_changed_byte_of_the_head_is_refused_or_harmless() {
    let good = small(GuestType::Pv, &[(1, 4), (2, 3)]);
    let file = file(&good);
    let state = get(&good, header(STATE) + OFFSET);
    for at in (0..state).chain(get(&good, header(INDEX) + OFFSET)..good.len() - 2 * PAGE_LEN) {
        for value in [0, 1, 0x7f, 0xff] {
            file.write_all_at(&[value], at as u64).unwrap();
            let again = file.try_clone().unwrap();
            if let Ok(core) = Core::parse(Path::new("x"), again, good.len() as u64) {
                for frame in 0..5 {
                    if let Ok(window) = core.map(&[Frame(frame)]) {
                        let _ = window.read(0, &mut [0; PAGE_LEN]);
                    }
                }
            }
        }
        file.write_all_at(&good[at..=at], at as u64).unwrap();
    }
}
