//! Finds a symbol of a saved guest's kernel, or says what covers an address:
//!
//! ```text
//! cargo run -p locus-kernel --example symbols CORE NAME
//! cargo run -p locus-kernel --example symbols CORE 0xffffffff81001005
//! ```

use std::error::Error;
use std::fmt::Write as _;
use std::path::Path;

use locus_guest::addr::Gva;
use locus_guest::core::Core;
use locus_kernel::Kernel;

/// What the core at `path` has for `wanted`: a symbol's name, or an address in hexadecimal.
pub fn show(path: &Path, wanted: &str) -> Result<String, Box<dyn Error>> {
    let core = Core::open(path)?;
    let kernel = Kernel::of_saved(&core, core.kind(), core.vcpus())?;
    let symbols = &kernel.symbols;
    let mut out = String::new();
    if let Some(digits) = wanted.strip_prefix("0x") {
        let at = Gva(u64::from_str_radix(digits, 16)?);
        match symbols.covering(at) {
            Some((name, offset)) => writeln!(out, "{at} is {name}+{offset:#x}")?,
            None => writeln!(out, "{at} is below all symbols")?,
        }
        return Ok(out);
    }
    // A name may stand for several functions.
    for symbol in symbols.all(wanted) {
        let room = symbols.room(symbol.addr);
        let room = room.map_or("no symbol behind it".into(), |n| {
            format!("{n} bytes to the next")
        });
        writeln!(out, "{} {} {wanted} ({room})", symbol.addr, symbol.kind)?;
    }
    if out.is_empty() {
        writeln!(out, "{} has no symbol {wanted}", kernel.release)?;
    }
    Ok(out)
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [core, wanted] = arguments.as_slice() else {
        return Err("usage: symbols CORE NAME|0xADDRESS".into());
    };
    print!("{}", show(Path::new(core), wanted)?);
    Ok(())
}
