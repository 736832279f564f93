//! The kernel's own symbol table, found by its structure in read-only data.
//!
//! The build writes it by scripts/kallsyms.c. `kallsyms_names` has the compressed names of all
//! symbols, each byte an index into 256 tokens. The token table is found first. Its fingerprint is
//! the ten digits, one after the other, each a token of its own. The proof is
//! `kallsyms_token_index` behind it, which lists the offset of every token. The other tables are
//! around it in one of two orders:
//!
//! - offsets, relative base, count, names, markers, [sequence of names,] token table, token index;
//! - count, names, markers, token table, token index, offsets, relative base, …: since Linux kernel
//!   commit 404bad70fcf7 ("scripts/kallsyms: change the output order").
//!
//! The sequence of names came with Linux kernel commit 60443c88f3a8 ("kallsyms: Improve the
//! performance of kallsyms_lookup_name()") (in v6.2, and in stable kernels before it).
//!
//! The tables are aligned to eight bytes or, where addresses are relative to their own place, to
//! four (`packed.rs`).
//!
//! Addresses come in several encodings (`decode.rs`). Each is tried, and only one that agrees with
//! the caller's anchors is believed. A new order or encoding goes into `decode.rs`, a new layout of
//! names into `names.rs`.

mod compressed;
mod data;
mod decode;
mod names;
mod packed;
mod symbols;
#[cfg(test)]
mod tests;
mod tokens;

use locus_guest::addr::Gva;
use locus_guest::space::{Region, Space};

use self::data::{ReadOnlyData, CHUNK, DATA_MAX};
use self::decode::decode;
pub use self::symbols::{Symbol, Symbols, TablePlaces};
use self::tokens::{find_digits, tokens_around, DIGITS, TOKEN_MAX};
use crate::Error;

/// What a symbol table must agree with before it is believed: two facts that are not from the table.
#[derive(Clone, Copy, Debug)]
pub struct Anchors<'a> {
    /// Guest virtual address of `_text`, from the page tables.
    pub text_base: Gva,
    /// Another fact, independent of the first.
    pub second: SecondAnchor<'a>,
}

/// The second fact that a symbol table must agree with.
#[derive(Clone, Copy)]
pub enum SecondAnchor<'a> {
    /// The entry point that the kernel told Xen or the CPU: some text symbol must have exactly this
    /// guest virtual address.
    Entry(Gva),
    /// Whether the symbols agree with the guest's state, where no entry point is known.
    State(&'a dyn Fn(&Symbols) -> bool),
}

impl std::fmt::Debug for SecondAnchor<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            SecondAnchor::Entry(at) => write!(f, "Entry({at})"),
            SecondAnchor::State(_) => f.write_str("State"),
        }
    }
}

/// Finds and decodes the symbol table within `regions`, the mapped runs of the kernel's image. Only
/// read-only ones that are not executable are searched, at most 48 MiB of them.
///
/// # Errors
/// [`Error::NotLinux`] if no table is found, or none agrees with the anchors; [`Error::Memory`].
pub fn read(space: &Space<'_>, regions: &[Region], anchors: Anchors<'_>) -> Result<Symbols, Error> {
    let mut budget = DATA_MAX;
    for region in regions.iter().filter(|r| !r.writable && !r.executable) {
        let mut data = ReadOnlyData::new(space, region.range, budget);
        let found = search(&mut data, anchors)?;
        budget -= data.have.min(budget);
        data.bytes.truncate(data.have);
        space.recycle(data.bytes);
        if let Some(symbols) = found {
            return Ok(symbols);
        }
    }
    Err(Error::NotLinux(
        "no kallsyms table that agrees with the kernel's text address was found in its read-only \
         data: not a Linux kernel with CONFIG_KALLSYMS, or one of an unknown layout; if the guest is still \
         booting, try again"
            .into(),
    ))
}

fn search(data: &mut ReadOnlyData<'_, '_>, anchors: Anchors<'_>) -> Result<Option<Symbols>, Error> {
    let budget = data.space.budget();
    let mut from = 0;
    while data.reach((from + CHUNK).min(data.len))? {
        let searched = data.have;
        budget.scan(searched - from)?;
        for hit in find_digits(data.bytes(), from) {
            budget.scan(304 * TOKEN_MAX)?;
            data.reach((hit + 256 * TOKEN_MAX + 1024).min(data.len))?;
            let Some(tokens) = tokens_around(data.bytes(), hit) else {
                continue;
            };
            if let Some(symbols) = decode(data, &tokens, anchors)? {
                return Ok(Some(symbols));
            }
        }
        if searched == data.len {
            break;
        }
        from = searched - DIGITS.len();
    }
    Ok(None)
}
