//! `locus-forge DOMAIN WHAT`: writes into a guest's memory what the guest's own root could have written there, to make
//! work for who reads it.
//!
//! It is meant for tests. The guest is of no use afterwards but to be looked at:
//!
//! - `layers`: an arena full of payloads that replace the same functions, each in as many parts as are believed
//! - `functions`: an arena full of payloads that replace as many functions as fit, each on a page of its own
//! - `names`: thousands of symbols that stand at the address of `cmdline_proc_show`
//! - `types`: thousands of structures called `file`
//!
//! The bytes at each redirect are the ones that the record names, so all of a forged record is looked at.

use anyhow::{ensure, Context as _, Result};
use clap::{Parser, ValueEnum};
use locus_guest::addr::{Gva, PAGE_LEN, PAGE_SIZE};
use locus_guest::{fetch, Live as _, MemoryMut as _};
use locus_kernel::split_functions::PARTS_MAX;
use locus_kernel::Kernel;
use sha2::{Digest, Sha256};
use xen_locus::arena::digests::CodeDigests;
use xen_locus::arena::record::{Function, Record, Slot, State, ENTRIES_MAX, MODULE, SCHEMA};
use xen_locus::arena::{now, page_address, Arena, Rights};
use xen_locus::domain::Domain;
use xen_locus::machine::kernel_of;
use xen_locus::ops::host::Host;

/// The function whose address and names are forged.
const TARGET: &str = "cmdline_proc_show";
/// Symbols that are moved to its address.
const NAMESAKES: usize = 20_000;
/// The name that structures get.
const TYPE: &str = "file";
/// Pages of each forged payload: the directory has room for so many that the arena is full.
const PAGES: usize = 3;

/// Forge what a guest's memory says
#[derive(Parser)]
struct Args {
    /// Name or id
    domain: String,
    /// What to forge
    what: What,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum What {
    Layers,
    Functions,
    Names,
    Types,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let host = Host::open(None)?;
    let domain = host.guest(&args.domain)?;
    let kernel = kernel_of(&domain)?;
    let done = match args.what {
        What::Layers => fill(&domain, &kernel, PARTS_MAX)?,
        What::Functions => fill(&domain, &kernel, 0)?,
        What::Names => names(&domain, &kernel)?,
        What::Types => types(&domain, &kernel)?,
    };
    println!("{done}");
    Ok(())
}

/// Writes `bytes` at `at`.
fn write(domain: &Domain<'_>, kernel: &Kernel<'_>, at: Gva, bytes: &[u8]) -> Result<()> {
    let mut at = at;
    for piece in bytes.chunks(16 * PAGE_LEN) {
        let frames = kernel.space.frames(at, piece.len() as u64)?;
        domain.map_mut(&frames)?.write(at.offset(), piece)?;
        domain.written(&frames)?;
        at = at.plus(piece.len() as u64);
    }
    Ok(())
}

/// Fills the arena with payloads. Each function has so many old and new `parts`.
fn fill(domain: &Domain<'_>, kernel: &Kernel<'_>, parts: usize) -> Result<String> {
    let mut arena = Arena::read(kernel)?;
    ensure!(arena.directory.slots.is_empty(), "the arena is in use");
    let (room, _) = arena.room(domain.kind());
    let count = (room / PAGES).min(ENTRIES_MAX);
    let text = kernel.symbols.need("_stext")?.page().plus(PAGE_SIZE);
    let (mut slots, mut functions) = (Vec::new(), 0);
    for payload in 0..count {
        let first = 1 + payload * PAGES;
        arena.add(domain, kernel, first, &[Rights::RoData; PAGES])?;
        let mut record = record(payload, first);
        // Two words stand before its `struct module`, which say that the guest does not know it.
        let room = PAGES * PAGE_LEN - usize::try_from(MODULE)?;
        let mut json = record.encode()?;
        for n in 0.. {
            let old = text.plus(n * PAGE_SIZE);
            let found = fetch::array(&kernel.space.read_vec(old, 5)?, 0).context("five bytes")?;
            record.functions.push(function(n, old, found, first, parts));
            let longer = record.encode()?;
            if longer.len() > room {
                break;
            }
            json = longer;
            functions += 1;
        }
        arena.write(domain, page_address(first).plus(MODULE), &json)?;
        slots.push(Slot {
            state: State::Applied,
            first: u16::try_from(first)?,
            pages: u16::try_from(PAGES)?,
            applied_at: now(),
            record_offset: u32::try_from(MODULE)?,
            record_len: u32::try_from(json.len())?,
            record_sha256: Sha256::digest(&json).into(),
        });
    }
    arena.commit(domain, kernel, slots)?;
    Ok(format!("{count} payloads of {functions} functions"))
}

fn record(payload: usize, first: usize) -> Record {
    Record {
        schema: SCHEMA,
        name: format!("p{payload}"),
        sha256: "0".repeat(64),
        description: String::new(),
        cves: Vec::new(),
        functions: Vec::new(),
        text: (page_address(first), PAGE_SIZE),
        module: page_address(first).plus(MODULE),
        code: CodeDigests::default(),
        rodata_len: PAGE_SIZE,
        rodata_sha256: String::new(),
        objects: Vec::new(),
        entry_only: true,
        record_room: None,
        uses: Some(Vec::new()),
        nudge: None,
    }
}

fn function(n: u64, old: Gva, found: [u8; 5], first: usize, parts: usize) -> Function {
    Function {
        name: format!("f{n}"),
        object: "vmlinux".into(),
        old,
        old_size: 64,
        old_cold: vec![(Gva(1), 1); parts],
        new: page_address(first),
        new_size: 64,
        new_cold: vec![(Gva(1), 1); parts],
        site: old,
        found,
        old_bytes: found,
        new_bytes: found,
    }
}

/// Moves the symbols behind [`TARGET`] to its address, in the table of offsets: scripts/kallsyms.c, with
/// CONFIG_KALLSYMS_ABSOLUTE_PERCPU, writes the negated distance from the base, less one.
fn names(domain: &Domain<'_>, kernel: &Kernel<'_>) -> Result<String> {
    let symbols: Vec<_> = kernel.symbols.iter().collect();
    let at = symbols.iter().position(|s| s.name == TARGET);
    let at = at.context("no such symbol")?;
    let offset = |addr: Gva| -> Result<[u8; 4]> {
        let distance = i32::try_from(addr.0 - kernel.text_base.0)?;
        Ok((-1 - distance).to_le_bytes())
    };
    let needle: Vec<[u8; 4]> = (symbols.get(at..).into_iter().flatten().take(16))
        .map(|s| offset(s.addr))
        .collect::<Result<_>>()?;
    let needle = needle.concat();
    let (start, end) = (
        kernel.symbols.need("__start_rodata")?,
        kernel.symbols.need("__end_rodata")?,
    );
    let len = usize::try_from(end.0 - start.0)?;
    let data = kernel.space.read_vec(start, len)?;
    let found = data.windows(needle.len()).position(|w| w == needle);
    let found = found.context("the table of offsets was not found")? as u64;
    let target = symbols.get(at).context("it is there")?;
    // None that is needed to know the kernel is behind it: those are variables, or come before.
    let text_end = kernel.symbols.need("_etext")?;
    let behind = symbols.iter().skip(at).take(NAMESAKES);
    let count = behind.take_while(|s| s.addr < text_end).count();
    let forged = offset(target.addr)?.repeat(count);
    write(domain, kernel, start.plus(found), &forged)?;
    Ok(format!("{count} symbols"))
}

/// Calls structures [`TYPE`], from the middle of the types on: those that are needed to know the kernel come before.
fn types(domain: &Domain<'_>, kernel: &Kernel<'_>) -> Result<String> {
    let start = kernel.symbols.need("__start_BTF")?;
    let mut blob = kernel.btf()?.bytes().to_vec();
    // Documentation/bpf/btf.rst: a header, then types, then names.
    let word = |blob: &[u8], at: usize| fetch::u32(blob, at).map(|w| w as usize);
    let header = |n: usize| word(&blob, 4 + 4 * n).context("its header");
    let head = header(0)?;
    let (first, len, names) = (head + header(1)?, header(2)?, head + header(3)?);
    let text = blob.get(names..).context("its names")?;
    let wanted = format!("\0{TYPE}\0");
    let name = text
        .windows(wanted.len())
        .position(|w| w == wanted.as_bytes());
    let name = u32::try_from(name.context("no such name")? + 1)?.to_le_bytes();
    let (mut at, mut count) = (first, 0);
    while at < first + len {
        let info = word(&blob, at + 4).context("a type")?;
        let (kind, parts) = (info >> 24 & 0x1f, info & 0xffff);
        if kind == 4 && at > first + len / 2 {
            blob.get_mut(at..at + 4)
                .context("a name")?
                .copy_from_slice(&name);
            count += 1;
        }
        at += 12
            + match kind {
                1 | 14 | 17 => 4,
                3 => 12,
                4 | 5 | 15 | 19 => 12 * parts,
                6 | 13 => 8 * parts,
                _ => 0,
            };
    }
    write(domain, kernel, start, &blob)?;
    Ok(format!("{count} structures"))
}
