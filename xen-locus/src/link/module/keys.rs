//! Static keys: the payload's branches as `struct jump_entry`, and their links to the keys
//! (kernel/jump_label.c: `jump_label_add_module`).

use locus_guest::addr::Gva;
use locus_kernel::Kernel;

use super::buffer::Buffer;
use super::words::Words;
use super::{BuiltModule, JUMP_LEN};
use crate::error::{Error, Result};
use crate::link::fixups::JumpLabel;
use crate::write::About;

/// Bits of `static_key.type`: the value at first, and that the rest is a list of `static_key_mod`.
const TRUE: u64 = 1;
const LINKED: u64 = 2;
const BITS: u64 = 3;

/// A static key, and the payload's branches that follow it.
#[derive(Clone, Copy, Debug)]
pub(super) struct KeyBranches {
    /// Address of the `struct static_key`.
    pub key: Gva,
    /// Address of the first `jump_entry`; those of one key follow each other.
    pub first: Gva,
    /// The key is a variable of the payload itself.
    pub is_own: bool,
}

/// Writes the `jump_entry`s, which `jumps` gives in order of key and code; returns the keys in that order.
pub(super) fn entries(
    ro: &mut Buffer,
    mut offset: u64,
    jumps: &[JumpLabel],
) -> Result<Vec<KeyBranches>> {
    let mut keys: Vec<KeyBranches> = Vec::new();
    for jump in jumps {
        let at = ro.at.plus(offset);
        let near = |to: Gva, from: Gva| {
            i32::try_from(to.0.wrapping_sub(from.0).cast_signed())
                .map(i32::to_le_bytes)
                .map_err(|_| Error::not_applicable(format!("{to} is out of reach of {from}")))
        };
        let key = jump.key.0.wrapping_sub(at.plus(8).0) | u64::from(jump.branch);
        ro.put(offset, &near(jump.code, at)?)?;
        ro.put(offset + 4, &near(jump.target, at.plus(4))?)?;
        ro.put(offset + 8, &key.to_le_bytes())?;
        if keys.last().is_none_or(|last| last.key != jump.key) {
            keys.push(KeyBranches {
                key: jump.key,
                first: at,
                is_own: jump.key_is_own,
            });
        }
        offset += JUMP_LEN as u64;
    }
    Ok(keys)
}

/// Links each key of the kernel and its modules to the payload's branches. `owner` tells the `struct
/// module` that a key belongs to, 0 for the kernel.
pub(super) fn link(
    kernel: &Kernel<'_>,
    built: &BuiltModule,
    words: &mut Words<'_, '_>,
    owner: &dyn Fn(Gva) -> Result<Gva>,
) -> Result<()> {
    let mut node = built.nodes;
    let foreign: Vec<_> = built.keys.iter().filter(|k| !k.is_own).collect();
    if foreign.is_empty() {
        return Ok(());
    }
    let btf = kernel.btf()?;
    let links = btf.offset_of("static_key", "type")? as u64;
    let size = btf.size_of("static_key_mod")? as u64;
    let member = |path| Ok::<u64, Error>(btf.offset_of("static_key_mod", path)? as u64);
    let (next, entries, of) = (member("next")?, member("entries")?, member("mod")?);
    for &&KeyBranches { key, first, .. } in &foreign {
        // the count is in the first word: it must not have changed when the links are written
        words.about = About::StaticKey;
        words.get(key)?;
        words.about = About::ModuleLists;
        let word = words.get(key.plus(links))?;
        let list = word & !BITS;
        if word & LINKED != 0 && list == 0 {
            // sealed after init: it never changes again
            continue;
        }
        let mut below = list;
        if word & LINKED == 0 {
            words.set(node.plus(of), owner(key)?.0)?;
            words.set(node.plus(entries), list)?;
            words.set(node.plus(next), 0)?;
            below = node.0;
            node = node.plus(size);
        }
        words.set(node.plus(of), built.place.module().0)?;
        words.set(node.plus(entries), first.0)?;
        words.set(node.plus(next), below)?;
        words.set(key.plus(links), node.0 | LINKED | (word & TRUE))?;
        node = node.plus(size);
    }
    Ok(())
}
