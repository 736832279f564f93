//! `locus-copy DOMAIN KIB`: what it costs to map and copy so much of a guest's memory and do nothing
//! with it: the reference beside the cost of `xen-locus info`.
//!
//! Prints, as JSON, microseconds of opening the guest, as every command must, and of mapping and
//! copying KIB KiB of the kernel's image, in mappings as long as the ones that xen-locus makes for
//! long reads. To find out which frames those are is not counted.

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
