//! `locus-poke DOMAIN SYMBOL[+OFFSET]|ADDRESS [HEX]`: reads or writes bytes of a guest's kernel.
//!
//! It is meant for tests that need a guest whose kernel was changed by something else than xen-locus. It prints the
//! bytes that were there before.

use anyhow::{Context as _, Result};
use clap::Parser;
use locus_guest::addr::Gva;
use locus_guest::MemoryMut as _;
use xen_locus::guard::guardian;
use xen_locus::machine::{kernel_of, Machine as _};
use xen_locus::ops::host::Host;

/// Read or write bytes of a guest's kernel
#[derive(Parser)]
struct Args {
    /// Name or id
    domain: String,
    /// Where: a symbol and an offset in hex, or an address that begins with 0x
    place: String,
    /// Bytes to write, in hex; 16 bytes are only shown if not given
    bytes: Option<String>,
}

fn main() -> Result<()> {
    if guardian::is_meant() {
        let _ = guardian::main();
        return Ok(());
    }
    let args = Args::parse();
    let host = Host::open(None)?;
    let domain = host.guest(&args.domain)?;
    let kernel = kernel_of(&domain)?;
    let number = |hex: &str| u64::from_str_radix(hex.trim_start_matches("0x"), 16);
    let (symbol, offset) = args.place.split_once('+').unwrap_or((&args.place, "0"));
    let start = match symbol.starts_with("0x") {
        true => Gva(number(symbol).context("address")?),
        false => kernel.function(symbol, 0)?,
    };
    let at = start.plus(number(offset).context("offset")?);
    let bytes = args
        .bytes
        .as_deref()
        .map(hex::decode)
        .transpose()
        .context("BYTES is not hex")?;
    let len = bytes.as_ref().map_or(16, Vec::len);
    println!("{}", hex::encode(&kernel.space.read_vec(at, len)?));
    if let Some(bytes) = bytes {
        let frames = kernel.space.frames(at, bytes.len() as u64)?;
        let window = domain.map_mut(&frames)?;
        let guard = domain.guard(&[])?;
        let paused = guard.pause()?;
        window.write(at.offset(), &bytes)?;
        paused.end()?;
    }
    Ok(())
}
