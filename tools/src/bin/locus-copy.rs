//! `locus-copy DOMAIN KIB`: measures mapping and copying guest memory, without doing anything with it.
//!
//! The result is the reference for the cost of `xen-locus info`. The tool prints two times in microseconds, as JSON:
//! that of opening the guest, which every command needs, and that of mapping and copying KIB KiB of the
//! kernel's image. Its mappings are as long as those of xen-locus for long reads. The search for the frames of
//! the image is not counted.

use std::time::Instant;

use anyhow::{ensure, Result};
use clap::Parser;
use locus_guest::addr::{Frame, PAGE_LEN};
use locus_guest::space::BATCH;
use locus_guest::{Live as _, Memory as _};
use serde_json::json;
use xen_locus::machine::kernel_of;
use xen_locus::ops::host::Host;

/// Measure mapping and copying guest memory
#[derive(Parser)]
struct Args {
    /// Name or id
    domain: String,
    /// How much, in KiB
    kib: usize,
}

fn main() -> Result<()> {
    let began = Instant::now();
    let args = Args::parse();
    let host = Host::open(None)?;
    let domain = host.guest(&args.domain)?;
    domain.vcpus()?;
    let open = began.elapsed().as_micros();
    let kernel = kernel_of(&domain)?;
    let mut image: Vec<Frame> = Vec::new();
    for region in &kernel.regions {
        image.extend(
            kernel
                .space
                .frames(region.range.start, region.range.len())?,
        );
    }
    ensure!(!image.is_empty(), "the guest's kernel has no image");
    let pages = args.kib.div_ceil(PAGE_LEN / 1024);
    let frames: Vec<Frame> = image.into_iter().cycle().take(pages).collect();
    let began = Instant::now();
    let mut copy = vec![0; pages * PAGE_LEN];
    for (batch, part) in frames.chunks(BATCH).zip(copy.chunks_mut(BATCH * PAGE_LEN)) {
        domain.map(batch)?.read(0, part)?;
    }
    println!(
        "{}",
        json!({
            "schema": 1,
            "kib": pages * PAGE_LEN / 1024,
            "open_us": open,
            "copy_us": began.elapsed().as_micros(),
        })
    );
    Ok(())
}
