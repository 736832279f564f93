//! Static keys: the payload's branches as `struct jump_entry`, and how they are put into the lists of the keys
//! (kernel/jump_label.c: `jump_label_add_module`).

use std::collections::BTreeSet;

use locus_guest::addr::{Gva, Range};
use locus_guest::fetch;
use locus_kernel::Kernel;

use super::buffer::Buffer;
use super::lists::Users;
use super::words::Words;
use super::{BuiltModule, JUMP_LEN};
use crate::error::{Error, Result};
use crate::link::fixups::JumpLabel;
use crate::write::About;

/// Bits of `static_key.type`: the value at first, and that the rest is a list of `static_key_mod`.
const TRUE: u64 = 1;
const LINKED: u64 = 2;
const BITS: u64 = 3;
/// Longest list of a static key that is followed.
const NODES_MAX: usize = 4096;

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

/// Puts the payload's branches into the lists of the keys of the kernel and its modules. `owner` tells the `struct
/// module` that a key belongs to, 0 for the kernel.
pub(super) fn insert(
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
    let list_at = btf.offset_of_sized("static_key", "type", 8)? as u64;
    let size = btf.size_of("static_key_mod")? as u64;
    let member = |path| Ok::<u64, Error>(btf.offset_of_sized("static_key_mod", path, 8)? as u64);
    let (next, entries, of) = (member("next")?, member("entries")?, member("mod")?);
    for &&KeyBranches { key, first, .. } in &foreign {
        // the count is in the first word: it must not have changed when the lists are written
        words.about = About::StaticKey;
        words.get(key)?;
        words.about = About::ModuleLists;
        let word = words.get(key.plus(list_at))?;
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
        words.set(key.plus(list_at), node.0 | LINKED | (word & TRUE))?;
        node = node.plus(size);
    }
    Ok(())
}

/// Takes the branches of the payload whose `struct module` is at `module` out of the lists of the static keys that they
/// follow (kernel/jump_label.c: `jump_label_del_module`). The payload's pages are `own`.
pub(super) fn remove(
    kernel: &Kernel<'_>,
    (module, own): (Gva, Range),
    users: Users,
    words: &mut Words<'_, '_>,
) -> Result<()> {
    let keys = followed(kernel, module, own)?;
    if keys.is_empty() {
        return Ok(());
    }
    let btf = kernel.btf()?;
    let list_at = btf.offset_of_sized("static_key", "type", 8)? as u64;
    let member = |path| Ok::<u64, Error>(btf.offset_of_sized("static_key_mod", path, 8)? as u64);
    let (next, entries, of) = (member("next")?, member("entries")?, member("mod")?);
    for key in keys {
        let at = key.plus(list_at);
        let word = words.get(at)?;
        if word & LINKED == 0 || word & !BITS == 0 {
            // sealed after init: it was never in its list
            continue;
        }
        // Where each node is named, and the node.
        let mut nodes = vec![(at, Gva(word & !BITS))];
        while let Some(&(_, node)) = nodes.last() {
            let below = Gva(words.get(node.plus(next))?);
            if below == Gva(0) {
                break;
            }
            if nodes.len() > NODES_MAX {
                return Err(odd(key, "its list has no end"));
            }
            nodes.push((node.plus(next), below));
        }
        let mut ours = None;
        for (n, (_, node)) in nodes.iter().enumerate() {
            if words.get(node.plus(of))? == module.0 {
                ours = Some(n);
            }
        }
        let Some(ours) = ours else {
            return Err(odd(key, "the payload is not in its list"));
        };
        let (named, _) = nodes.remove(ours);
        let rest = nodes.get(ours).map_or(0, |(_, node)| node.0);
        let bits = if named == at { word & BITS } else { 0 };
        words.set(named, rest | bits)?;
        // The node of the key's owner was made with ours. Without ours the key names its owner's branches itself.
        match &nodes[..] {
            [] => return Err(odd(key, "its owner is not in its list")),
            [(_, owner)] if own.contains(*owner) => {
                let branches = words.get(owner.plus(entries))?;
                words.set(at, branches | (word & TRUE))?;
            }
            others if !others.iter().any(|(_, node)| own.contains(*node)) => {}
            // As if the others were gone.
            _ if users == Users::Go => words.set(at, word & TRUE)?,
            _ => {
                return Err(Error::failed(format!(
                    "the static key at {key} is followed by a module or payload that came later, and its list goes \
                     through this payload: unload or reclaim that first"
                )))
            }
        }
    }
    Ok(())
}

/// The static keys, outside of the payload, that its branches follow.
fn followed(kernel: &Kernel<'_>, module: Gva, own: Range) -> Result<BTreeSet<Gva>> {
    let btf = kernel.btf()?;
    let space = kernel.space.fresh();
    let member = |path, bytes| {
        Ok::<Gva, Error>(module.plus(btf.offset_of_sized("module", path, bytes)? as u64))
    };
    if !btf.has("module", "jump_entries") {
        return Ok(BTreeSet::new());
    }
    let count = u64::from(space.read_u32(member("num_jump_entries", 4)?)?);
    let len = count * JUMP_LEN as u64;
    if len == 0 {
        return Ok(BTreeSet::new());
    }
    let table = Gva(space.read_u64(member("jump_entries", 8)?)?);
    if !own.contains(table) || len > own.end.0 - table.0 {
        return Err(odd(module, "the table of branches leaves the payload"));
    }
    let bytes = space.read_vec(table, usize::try_from(len).unwrap_or(0))?;
    let mut keys = BTreeSet::new();
    for (entry, at) in bytes
        .chunks_exact(JUMP_LEN)
        .zip((table.0..).step_by(JUMP_LEN))
    {
        let distance = fetch::u64(entry, 8).unwrap_or(0) & !BITS;
        let key = Gva(at.wrapping_add(8).wrapping_add(distance));
        if !own.contains(key) {
            keys.insert(key);
        }
    }
    Ok(keys)
}

fn odd(key: Gva, what: &str) -> Error {
    Error::not_applicable(format!(
        "the guest's static key at {key} is not as it must be: {what}"
    ))
}

#[cfg(test)]
mod tests {
    use locus_kernel::btf::blob::Blob;
    use locus_kernel::fixture::{vcpus, Fixture, KIND, TEXT};

    use super::*;
    use crate::error::Class;

    /// The payload's pages: its `struct module`, a branch, and nodes.
    const OWN: Gva = Gva(0xffff_ffff_ff60_2000);
    const BRANCH: Gva = Gva(OWN.0 + 0x100);
    const OURS: Gva = Gva(OWN.0 + 0x200);
    const OWNER: Gva = Gva(OWN.0 + 0x240);
    /// The kernel's key, its own branches, and the node of another module.
    const KEY: Gva = Gva(TEXT.0 + (8 << 20));
    const BRANCHES: u64 = KEY.0 + 0x800;
    const OTHERS: Gva = Gva(KEY.0 + 0x100);

    /// What becomes of the key's list, whose head is `head` and whose nodes are at these addresses, each with what
    /// follows it and whose it is.
    fn removed(head: Gva, nodes: &[(Gva, u64, u64)]) -> Result<Vec<(u64, u64)>> {
        let mut types = Blob::new();
        let (int, long) = (types.int("int", 4), types.int("long", 8));
        let module = [("jump_entries", long, 16), ("num_jump_entries", int, 24)];
        types.structure("module", 32, &module);
        types.structure("static_key", 16, &[("enabled", int, 0), ("type", long, 8)]);
        let node = [("next", long, 0), ("entries", long, 8), ("mod", long, 16)];
        types.structure("static_key_mod", 24, &node);
        let mut fixture = Fixture::new();
        fixture.constants.push(("__start_BTF", types.bytes()));
        fixture.constants.push(("__stop_BTF", Vec::new()));
        let memory = fixture.build();
        let mut pages = [(OWN, vec![0; 0x400]), (KEY, vec![0; 0x400])];
        let mut put = |at: Gva, value: u64| {
            let page = pages
                .iter_mut()
                .find(|(start, _)| *start == at.page())
                .unwrap();
            page.1[at.offset()..at.offset() + 8].copy_from_slice(&value.to_le_bytes());
        };
        put(OWN.plus(16), BRANCH.0);
        put(OWN.plus(24), 1);
        put(BRANCH.plus(8), KEY.0.wrapping_sub(BRANCH.0 + 8));
        put(KEY.plus(8), head.0 | LINKED | TRUE);
        for &(at, next, owner) in nodes {
            put(at, next);
            put(at.plus(8), BRANCHES);
            put(at.plus(16), owner);
        }
        for (start, bytes) in &pages {
            memory.map_bytes(*start, bytes, true, false);
        }
        let kernel = Kernel::read(&memory, KIND, &vcpus()).unwrap();
        let mut none = [];
        let mut words = Words::new(&kernel.space, Gva(0), &mut none);
        remove(
            &kernel,
            (OWN, Range::new(OWN, 0x1000)),
            Users::None,
            &mut words,
        )?;
        let changed = words
            .into_writes()
            .into_iter()
            .filter(|w| w.new != w.expect);
        let word = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().unwrap());
        Ok(changed.map(|w| (w.at.0, word(&w.new))).collect())
    }

    #[test]
    fn a_key_that_nobody_else_follows_names_its_owners_branches_again() {
        let alone = [(OURS, OWNER.0, OWN.0), (OWNER, 0, 0)];
        let done = removed(OURS, &alone).unwrap();
        assert_eq!(done, [(KEY.0 + 8, BRANCHES | TRUE)]);
    }

    #[test]
    fn others_stay_in_the_list_if_it_does_not_lead_through_the_payload() {
        let first = [(OURS, OTHERS.0, OWN.0), (OTHERS, 0, 0)];
        let done = removed(OURS, &first).unwrap();
        assert_eq!(done, [(KEY.0 + 8, OTHERS.0 | LINKED | TRUE)]);
        let last = [(OTHERS, OURS.0, 0), (OURS, 0, OWN.0)];
        assert_eq!(removed(OTHERS, &last).unwrap(), [(OTHERS.0, 0)]);
        // The owner's node is the payload's, and someone who came later needs it.
        let through = [(OTHERS, OURS.0, 7), (OURS, OWNER.0, OWN.0), (OWNER, 0, 0)];
        let error = removed(OTHERS, &through).unwrap_err();
        assert_eq!(error.class(), Class::Failed, "{error}");
        assert!(error.to_string().contains("came later"), "{error}");
    }

    #[test]
    fn a_list_without_the_payload_or_without_an_end_is_refused() {
        for nodes in [
            [(OTHERS, OWNER.0, 0), (OWNER, 0, 7)],
            [(OTHERS, OWNER.0, 0), (OWNER, OTHERS.0, OWN.0)],
        ] {
            let error = removed(OTHERS, &nodes).unwrap_err();
            assert_eq!(error.class(), Class::NotApplicable, "{error}");
        }
    }
}
