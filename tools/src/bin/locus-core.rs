//! `locus-core trim IN OUT PAYLOAD…`: makes a small core from a big one.
//!
//! The small core has only the pages that the read-only commands of xen-locus read, so these commands print the
//! same for both. It is meant for tests and for bug reports.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, BufWriter, Write as _};
use std::path::PathBuf;

use anyhow::{Context as _, Result};
use clap::{Parser, Subcommand};
use locus_guest::addr::{Frame, PAGE_LEN};
use locus_guest::core::write::{self, CorePage};
use locus_guest::core::Core;
use locus_guest::{self, Memory, Window};
use locus_kernel::cpu::Cpu;
use locus_kernel::modules::ModuleReader;
use locus_kernel::orc::OrcTable;
use locus_kernel::tasks::{self, DetailLayout};
use locus_kernel::vmcoreinfo::VmcoreInfo;
use locus_kernel::Kernel;
use locus_payload::Payload;
use xen_locus::arena::Arena;
use xen_locus::cli::check;
use xen_locus::ops;

/// Work on saved cores
#[derive(Parser)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Keep only the pages that the read-only commands touch
    Trim {
        /// A core that `xl dump-core` wrote
        input: PathBuf,
        /// The file to be written
        output: PathBuf,
        /// Payloads whose `check` must work on the small core too
        payloads: Vec<PathBuf>,
    },
}

/// Memory that records which frames are read.
struct Recorder<'c> {
    inner: &'c Core,
    seen: RefCell<BTreeSet<Frame>>,
}

impl Memory for Recorder<'_> {
    fn map(&self, frames: &[Frame]) -> Result<Box<dyn Window>, locus_guest::Error> {
        self.seen.borrow_mut().extend(frames);
        self.inner.map(frames)
    }
}

fn main() -> Result<()> {
    let Command::Trim {
        input,
        output,
        payloads,
    } = Args::parse().command;
    let core = Core::open(&input)?;
    let memory = Recorder {
        inner: &core,
        seen: RefCell::default(),
    };
    touch(&memory, &core, &payloads)?;
    let pages: Vec<CorePage> = memory
        .seen
        .borrow()
        .iter()
        .filter_map(|&frame| {
            Some(CorePage {
                pfn: core.pfn(frame)?,
                frame: frame.0,
            })
        })
        .collect();
    let file = File::create(&output).with_context(|| format!("{}", output.display()))?;
    let mut file = BufWriter::new(file);
    write::write(&mut file, &core.head(), &pages, |page| {
        let mut bytes = [0; PAGE_LEN];
        core.map(&[Frame(page.frame)])
            .and_then(|window| window.read(0, &mut bytes))
            .map_err(io::Error::other)?;
        Ok(bytes)
    })?;
    file.flush()?;
    for (path, pages) in [(&input, core.pages()), (&output, pages.len() as u64)] {
        let bytes = std::fs::metadata(path)?.len();
        println!("{}: {pages} pages, {bytes} bytes", path.display());
    }
    Ok(())
}

/// Reads what `list`, `info`, `status` and `check` read. If a new view of `info` reads more, add it here.
fn touch(memory: &dyn Memory, core: &Core, payloads: &[PathBuf]) -> Result<()> {
    let kernel = Kernel::of_saved(memory, core.kind(), core.vcpus())?;
    kernel.btf()?;
    let details = DetailLayout::of(&kernel)?;
    tasks::snapshot(&kernel, |space, tasks| {
        tasks
            .iter()
            .try_for_each(|task| details.read(space, task.addr).map(|_| ()))
    })?;
    ModuleReader::new(&kernel)?.each(|reader, module| {
        // If one module can't be read, the others are still needed.
        let _ = reader.symbols(module);
        Ok(())
    })?;
    // A kernel need not have these; `info` says so.
    let _ = OrcTable::of(&kernel);
    let _ = Cpu::read(&kernel);
    if let Some(info) = VmcoreInfo::read(&kernel)? {
        info.check(&kernel)?;
    }
    Arena::read(&kernel)?;
    ops::patches(&kernel, None)?;
    for path in payloads {
        // A payload that does not fit is useful for tests too.
        if let Err(error) = check::examine(&kernel, core, &Payload::read(path)?) {
            println!("{}: {error}", path.display());
        }
    }
    Ok(())
}
