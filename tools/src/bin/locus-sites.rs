//! `locus-sites DOMAIN|CORE VMLINUX`: applies the fixups of payloads to the code of the guest's kernel as built, and
//! compares each place with what the guest's kernel made of it when it booted.
//!
//! VMLINUX is the ELF file of the guest's kernel. It has the code as built and the tables of fixups, which the
//! guest has discarded. Nops of other lengths and branches of other forms count as equal. Jump labels must be
//! equal byte for byte.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{bail, Context as _, Result};
use clap::Parser;
use iced_x86::{Decoder, DecoderOptions, Instruction, Mnemonic};
use locus_guest::addr::{Gva, Range};
use locus_guest::core::Core;
use locus_kernel::Kernel;
use object::{Object as _, ObjectSection as _, SectionFlags};
use xen_locus::link::fixups::{self, FixupPlace, FixupTable, FixupTables, LinkedCode, Runs};
use xen_locus::machine::kernel_of;
use xen_locus::ops::host::Host;

/// Most differences that are shown.
const SHOWN: usize = 40;
/// What follows the jump of a trampoline of a static call (arch/x86/kernel/static_call.c).
const TRAMPOLINE: [u8; 3] = [0x0f, 0xb9, 0xcc];

/// Compare the patched code of a guest's kernel with what xen-locus would make of it
#[derive(Parser)]
struct Args {
    /// Name or id, or a core's file
    domain: String,
    /// The guest's kernel, as an ELF file
    vmlinux: PathBuf,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let file = std::fs::read(&args.vmlinux)?;
    if std::path::Path::new(&args.domain).is_file() {
        let core = Core::open(std::path::Path::new(&args.domain))?;
        return compare(&Kernel::of_saved(&core, core.kind(), core.vcpus())?, &file);
    }
    let host = Host::open(None)?;
    let domain = host.guest(&args.domain)?;
    compare(&kernel_of(&domain)?, &file)
}

fn compare(kernel: &Kernel<'_>, file: &[u8]) -> Result<()> {
    let elf = object::File::parse(file)?;
    let built = Built::of(kernel, &elf)?;
    let mut code = built.code.clone();
    let mut places = fixups::apply_fixups(kernel, &mut code, &built.tables, None)?.places;
    places.extend(built.calls(kernel)?);
    let mut counts: BTreeMap<&str, (usize, usize, usize, usize)> = BTreeMap::new();
    let mut shown = 0;
    let symbol = |name| kernel.symbols.addr(name);
    let gone = match (symbol("__init_begin"), symbol("__init_end")) {
        (Some(start), Some(end)) => Range { start, end },
        _ => Range::new(Gva(0), 0),
    };
    for place in &places {
        // The code that was copied from here counts where it was copied to.
        if gone.contains(place.range.start) {
            continue;
        }
        let len = usize::try_from(place.range.len())?;
        let ours = code
            .get(place.range.start, len)
            .context("a place outside")?;
        let theirs = kernel.space.read_vec(place.range.start, len)?;
        let count = counts.entry(place.table).or_default();
        count.0 += 1;
        if inlined(kernel, place, ours) {
            count.2 += 1;
            continue;
        }
        // Jumps through a pointer stay.
        let stays = place.table == ".parainstructions" && ours.starts_with(&[0xff, 0x25]);
        if stays {
            count.3 += 1;
            continue;
        }
        if same(kernel, place, ours, &theirs) || built.later_changed(kernel, place, &places, &code)
        {
            continue;
        }
        count.1 += 1;
        shown += 1;
        if shown <= SHOWN {
            let at = place.range.start;
            let (name, offset) = kernel.symbols.covering(at).unwrap_or(("?".into(), 0));
            let old = built.code.get(at, len).unwrap_or_default();
            println!(
                "{} {at} {name}+{offset:#x}: built {} ours {} guest {}",
                place.table,
                hex::encode(old),
                hex::encode(ours),
                hex::encode(&theirs)
            );
        }
    }
    let mut wrong = 0;
    for (table, (all, differ, inlined, spared)) in &counts {
        println!(
            "{table}: {} of {all} places equal, {inlined} calls inlined by the kernel, {spared} \
             jumps through pointers left, {differ} different",
            all - differ - inlined - spared
        );
        wrong += differ;
    }
    println!("changed by us: {} bytes", changed(&built.code, &code));
    let compared: Vec<&str> = counts.keys().copied().collect();
    let missing = not_compared(&|name| kernel.symbols.addr(name), &compared);
    if !missing.is_empty() {
        bail!(
            "the guest's kernel has tables of which no place was compared: {}",
            missing.join(", ")
        );
    }
    if wrong > 0 {
        bail!("{wrong} places differ");
    }
    Ok(())
}

/// The tables, and the symbols at their start and end (arch/x86/kernel/vmlinux.lds.S).
const TABLES: [(&str, &str, &str); 6] = [
    (
        ".altinstructions",
        "__alt_instructions",
        "__alt_instructions_end",
    ),
    (
        ".parainstructions",
        "__parainstructions",
        "__parainstructions_end",
    ),
    (
        ".retpoline_sites",
        "__retpoline_sites",
        "__retpoline_sites_end",
    ),
    (".return_sites", "__return_sites", "__return_sites_end"),
    (".call_sites", "__call_sites", "__call_sites_end"),
    (
        "__jump_table",
        "__start___jump_table",
        "__stop___jump_table",
    ),
];

/// The tables that the guest's kernel has and that are not empty, of which no place was compared.
fn not_compared(symbol: &dyn Fn(&str) -> Option<Gva>, compared: &[&str]) -> Vec<&'static str> {
    let there = TABLES.iter().filter(|(_, start, end)| {
        let (start, end) = (symbol(start), symbol(end));
        start.zip(end).is_some_and(|(start, end)| start < end)
    });
    there
        .map(|(table, ..)| *table)
        .filter(|table| !compared.contains(table))
        .collect()
}

fn changed(a: &LinkedCode, b: &LinkedCode) -> usize {
    a.bytes.iter().zip(&b.bytes).filter(|(x, y)| x != y).count()
}

/// The paravirt table holds addresses, which the guest's boot code slid.
fn slide_paravirt(tables: &mut [FixupTable], slide: u64) {
    for table in tables {
        for field in table.bytes.chunks_exact_mut(16) {
            if let Some((address, _)) = field.split_first_chunk_mut::<8>() {
                *address = u64::from_le_bytes(*address)
                    .wrapping_add(slide)
                    .to_le_bytes();
            }
        }
    }
}

/// The kernel as it was built, at the addresses it has in the guest.
struct Built {
    code: LinkedCode,
    tables: FixupTables,
}

impl Built {
    fn of(kernel: &Kernel<'_>, elf: &object::File<'_>) -> Result<Built> {
        let text = elf.section_by_name(".text").context("no .text")?;
        let slide = kernel.text_base.0.wrapping_sub(text.address());
        let start = text.address();
        let mut bytes = Vec::new();
        let (mut live, mut dead) = (Vec::new(), Vec::new());
        for section in elf.sections() {
            let SectionFlags::Elf { sh_flags, .. } = section.flags() else {
                continue;
            };
            let (allocated, executed) = (sh_flags.0 & 2 != 0, sh_flags.0 & 4 != 0);
            let name = section.name()?;
            if !allocated || section.address() < start || name.contains("percpu") {
                continue;
            }
            let data = section.data()?;
            if executed {
                let at = usize::try_from(section.address() - start)?;
                bytes.resize(bytes.len().max(at + data.len()), 0);
                bytes
                    .get_mut(at..at + data.len())
                    .context("sections overlap")?
                    .copy_from_slice(data);
                let at = Gva(section.address().wrapping_add(slide));
                let range = Range::new(at, data.len() as u64);
                match name {
                    n if n.starts_with(".init.") || n.starts_with(".exit.") => dead.push(range),
                    _ => live.push(range),
                }
            }
        }
        let code = LinkedCode {
            name: "vmlinux".into(),
            base: kernel.text_base,
            bytes,
            live: Runs::new(live),
            dead: Runs::new(dead),
            own: Range::new(Gva(0), 0),
            all: Range::new(Gva(0), 0),
        };
        let table = |name: &str| -> Result<Vec<FixupTable>> {
            let Some(section) = elf.section_by_name(name) else {
                return Ok(Vec::new());
            };
            let at = Gva(section.address().wrapping_add(slide));
            let bytes = section.data()?.to_vec();
            Ok(vec![FixupTable { at, bytes }])
        };
        let mut returns = Vec::new();
        for table in table(".return_sites")? {
            for (entry, bytes) in table.entries(&code, ".return_sites", 4)? {
                let at = fixups::code::relative(entry, bytes, 0).context("short")?;
                // Trampolines of static calls may have been changed before, and follow their keys.
                if code.get(at.plus(5), 3) != Some(&TRAMPOLINE) {
                    returns.push(at);
                }
            }
        }
        let mut tables = FixupTables {
            alternatives: table(".altinstructions")?,
            paravirt: table(".parainstructions")?,
            retpolines: table(".retpoline_sites")?,
            returns,
            jumps: Vec::new(),
            calls: table(".call_sites")?,
            static_calls: Vec::new(),
        };
        slide_paravirt(&mut tables.paravirt, slide);
        // Jump labels stay in the guest, sorted by it.
        let symbol = |name| kernel.symbols.addr(name);
        if let (Some(start), Some(stop)) = (
            symbol("__start___jump_table"),
            symbol("__stop___jump_table"),
        ) {
            let len = usize::try_from(stop.0.saturating_sub(start.0))?;
            let bytes = kernel.space.read_vec(start, len)?;
            tables.jumps.push(FixupTable { at: start, bytes });
        }
        Ok(Built { code, tables })
    }

    /// The direct calls of which the kernel has a table, except those of ftrace and static calls. They are left as built where
    /// the depth of calls is not tracked.
    fn calls(&self, kernel: &Kernel<'_>) -> Result<Vec<FixupPlace>> {
        const CALL_LEN: u64 = 5;
        let fentry = kernel.symbols.addr("__fentry__");
        let mut calls = Vec::new();
        for table in &self.tables.calls {
            for (entry, bytes) in table.entries(&self.code, ".call_sites", 4)? {
                let at = fixups::relative(entry, bytes, 0).context("an entry is cut short")?;
                let call = self.code.get(at, usize::try_from(CALL_LEN)?);
                let to = call.and_then(|bytes| fixups::target(at, bytes));
                let trampoline =
                    to.and_then(|to| self.code.get(to.plus(CALL_LEN), TRAMPOLINE.len()));
                let is_static = trampoline == Some(&TRAMPOLINE);
                let is_traced = to.is_some() && to == fentry;
                if !is_static && !is_traced && self.code.runs(at, ".call_sites")? {
                    calls.push(FixupPlace {
                        range: Range::new(at, CALL_LEN),
                        table: ".call_sites",
                    });
                }
            }
        }
        Ok(calls)
    }

    /// Whether something else was written over a place after its own table: what an alternative that was applied
    /// holds, the others don't. `code` is what we made of all.
    fn later_changed(
        &self,
        kernel: &Kernel<'_>,
        place: &FixupPlace,
        all: &[FixupPlace],
        code: &LinkedCode,
    ) -> bool {
        let applied = |p: &FixupPlace| {
            let len = usize::try_from(p.range.len()).unwrap_or_default();
            let (built, made) = (
                self.code.get(p.range.start, len),
                code.get(p.range.start, len),
            );
            // Padding that became longer nops is no other alternative.
            built
                .zip(made)
                .is_some_and(|(built, made)| meaning(kernel, p, built) != meaning(kernel, p, made))
        };
        place.table != ".altinstructions"
            && all.iter().any(|p| {
                p.table == ".altinstructions"
                    && p.range.start < place.range.end
                    && place.range.start < p.range.end
                    && applied(p)
            })
    }
}

/// Whether a kernel of v5.10 may put the instructions of a native paravirt operation in place of the
/// call of it (arch/x86/kernel/paravirt_patch.c).
fn inlined(kernel: &Kernel<'_>, place: &FixupPlace, ours: &[u8]) -> bool {
    let old = kernel.symbols.addr("native_patch").is_some() && place.table == ".parainstructions";
    let called = ours.get(..5).filter(|code| code.first() == Some(&0xe8));
    let to = called.and_then(|code| fixups::code::target(place.range.start, code));
    let name = to
        .and_then(|to| kernel.symbols.covering(to))
        .map_or_else(String::new, |(name, _)| name);
    old && (name.contains("native_") || name.contains("paravirt_ident"))
}

/// Whether two forms of a place do the same.
fn same(kernel: &Kernel<'_>, place: &FixupPlace, ours: &[u8], theirs: &[u8]) -> bool {
    if ours == theirs {
        return true;
    }
    place.table != "__jump_table" && meaning(kernel, place, ours) == meaning(kernel, place, theirs)
}

/// What instructions do: without nops, and without what follows an unconditional branch up to its
/// breakpoints; branches by their target.
fn meaning(kernel: &Kernel<'_>, place: &FixupPlace, code: &[u8]) -> Vec<(Mnemonic, u64, Vec<u8>)> {
    let mut out = Vec::new();
    let start = place.range.start.0;
    // On a CPU with ITS the kernel leaves plain returns in upper halves of cache lines, and we don't.
    let its = kernel.symbols.addr("its_return_thunk");
    let mut decoder = Decoder::with_ip(64, code, start, DecoderOptions::NONE);
    while decoder.can_decode() {
        let at = decoder.position();
        let i = decoder.decode();
        let bytes = code.get(at..at + i.len()).unwrap_or_default().to_vec();
        let rest = code.get(decoder.position()..).unwrap_or_default();
        let skipped = i.near_branch_target().checked_sub(i.next_ip());
        let skipped = skipped.and_then(|n| rest.get(..usize::try_from(n).ok()?));
        match i.mnemonic() {
            // How the kernel fills places: it jumps over what does nothing, which may be no byte.
            Mnemonic::Jmp if skipped.is_some_and(idle) => {}
            Mnemonic::Nop | Mnemonic::Int3 => {}
            Mnemonic::Ret => out.push((Mnemonic::Ret, 0, Vec::new())),
            Mnemonic::Jmp if relative(&i) && Some(Gva(i.near_branch_target())) == its => {
                out.push((Mnemonic::Ret, 0, Vec::new()));
            }
            m if relative(&i) => out.push((m, i.near_branch_target(), Vec::new())),
            // Newer kernels pad a call with prefixes that mean nothing, not with nops behind it.
            m => {
                let bytes = bytes.into_iter().skip_while(|&b| b == 0x2e).collect();
                out.push((m, 0, bytes));
            }
        }
    }
    out
}

/// Whether these are nops, breakpoints, and short jumps over such.
fn idle(code: &[u8]) -> bool {
    Decoder::new(64, code, DecoderOptions::NONE)
        .iter()
        .all(|i| matches!(i.mnemonic(), Mnemonic::Nop | Mnemonic::Int3) || i.is_jmp_short())
}

fn relative(i: &Instruction) -> bool {
    i.is_jmp_short_or_near() || i.is_jcc_short_or_near() || i.is_call_near()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_that_the_guest_has_must_be_compared() {
        let symbol = |name: &str| match name {
            "__alt_instructions" | "__call_sites" | "__call_sites_end" => Some(Gva(0x1000)),
            "__alt_instructions_end" => Some(Gva(0x2000)),
            _ => None,
        };
        assert_eq!(not_compared(&symbol, &[]), [".altinstructions"]);
        assert_eq!(not_compared(&symbol, &["__jump_table"]).len(), 1);
        assert_eq!(not_compared(&symbol, &[".altinstructions"]), [""; 0]);
    }
}
