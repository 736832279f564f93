//! The links that make the guest's kernel know a payload as a module. They are written in the pause that
//! brings the payload into force, all or none, and only if nothing moved since they were worked out.

use locus_guest::addr::{Gva, Range};
use locus_kernel::modules::{Module, ModuleReader};
use locus_kernel::Kernel;

use super::structure::TreeNode;
use super::words::Words;
use super::{keys, tree, BuiltModule};
use crate::arena::record::MODULE;
use crate::error::{Error, Result};
use crate::quiesce::Watched;
use crate::target::kernel_locks;
use crate::write::{About, Lock, Write};

/// The functions that change the list of modules with `BUG` sites, which no lock protects
/// (lib/bug.c). They call nothing, so a thread that is in them was interrupted there.
const UNLOCKED: [&str; 2] = ["module_bug_finalize", "module_bug_cleanup"];

/// The links of a payload, and the code that no thread may be in when they are written.
#[derive(Clone, Debug, Default)]
pub struct ModuleLinks {
    /// The links, and the words that must not have changed. The first and the last write are the marks that
    /// [`is_entered`] reads.
    pub writes: Vec<Write>,
    /// The functions that change the same lists without a lock.
    pub watched: Vec<Watched>,
}

/// Whether the guest knows the `struct module` at `module`, which a payload has in the arena. Two words before it
/// tell: one is written before all links to it, the other after them.
///
/// # Errors
/// [`Class::Uncertain`](crate::error::Class::Uncertain) when only one of them is: an earlier run was ended in between.
pub fn is_entered(kernel: &Kernel<'_>, module: Gva) -> Result<bool> {
    let begun = Gva(module.0.wrapping_sub(MODULE));
    let space = kernel.space.fresh();
    match (space.read_u64(begun)?, space.read_u64(begun.plus(8))?) {
        (0, 0) => Ok(false),
        (1, 1) => Ok(true),
        _ => Err(Error::uncertain(format!(
            "the payload whose struct module is at {module} is neither wholly among the guest's \
             modules nor wholly absent: an earlier run was ended in between, or the guest changed it"
        ))),
    }
}

/// Works out the links for `built`, whose writable bytes get theirs. `uses` are modules that must not
/// be unloaded while the payload is there.
///
/// # Errors
/// [`Cause::Passing`](crate::error::Cause::Passing) while the guest loads or unloads a module or changes a static key;
/// [`Class::NotApplicable`](crate::error::Class::NotApplicable): its lists are not as this tool knows them.
pub fn enter(kernel: &Kernel<'_>, built: &mut BuiltModule, uses: &[Gva]) -> Result<ModuleLinks> {
    let space = kernel.space.fresh();
    let modules = ModuleReader::new(kernel)?.all()?;
    let mut rw = std::mem::take(&mut built.rw);
    let mut words = Words::new(&space, built.place.rw, &mut rw);
    let done = LinkWriter { kernel, built }.write_all(&mut words, &modules, uses);
    let mut writes = vec![mark(built.place.rw)];
    writes.extend(words.into_writes());
    writes.push(mark(built.place.rw.plus(8)));
    built.rw = rw;
    done?;
    let watched = UNLOCKED
        .iter()
        .filter_map(|name| {
            let at = kernel.symbols.addr(name)?;
            let len = kernel.symbols.room(at)?;
            Some(Watched {
                range: Range::new(at, len),
                name: (*name).to_owned(),
            })
        })
        .collect();
    Ok(ModuleLinks { writes, watched })
}

/// Sets a word of ours from 0 to 1.
fn mark(at: Gva) -> Write {
    Write {
        at,
        expect: vec![0; 8],
        new: 1u64.to_le_bytes().to_vec(),
        about: About::ModuleLists,
    }
}

struct LinkWriter<'a, 'm> {
    kernel: &'a Kernel<'m>,
    built: &'a BuiltModule,
}

impl LinkWriter<'_, '_> {
    fn write_all(&self, words: &mut Words<'_, '_>, modules: &[Module], uses: &[Gva]) -> Result<()> {
        let module = self.built.place.module();
        let member = |path| self.offset("module", path).map(|o| module.plus(o));
        self.free(words, Lock::Modules)?;
        if !self.built.keys.is_empty() {
            self.free(words, Lock::StaticKeys)?;
        }
        let head = self.kernel.symbols.need("modules")?;
        hang_in(words, head, member("list")?)?;
        let head = self.kernel.symbols.need("module_bug_list")?;
        hang_in(words, head, member("bug_list")?)?;
        self.tree(words)?;
        self.uses(words, uses)?;
        keys::link(self.kernel, self.built, words, &|key| {
            self.owner(modules, key)
        })
    }

    fn offset(&self, ty: &str, path: &str) -> Result<u64> {
        Ok(self.kernel.btf()?.offset_of(ty, path)? as u64)
    }

    /// Notes that a mutex is free, to be found free again in the pause.
    fn free(&self, words: &mut Words<'_, '_>, lock: Lock) -> Result<()> {
        words.about = About::Lock(lock);
        let owner = words.get(kernel_locks::owner(self.kernel, lock)?);
        words.about = About::ModuleLists;
        match owner? {
            0 => Ok(()),
            _ => Err(Error::passing(lock.held())),
        }
    }

    /// Inserts the payload's nodes into both copies of the tree by which the kernel finds the module of an
    /// address: lookups use one copy while the other changes (kernel/module/tree_lookup.c,
    /// include/linux/rbtree_latch.h).
    fn tree(&self, words: &mut Words<'_, '_>) -> Result<()> {
        let btf = self.kernel.btf()?;
        let tree = self.kernel.symbols.need("mod_tree")?;
        let root = |path| self.offset("mod_tree_root", path).map(|o| tree.plus(o));
        let node = |path| self.offset("rb_node", path);
        let shape = tree::Shape {
            parent: node("__rb_parent_color")?,
            left: node("rb_left")?,
            right: node("rb_right")?,
        };
        let holder = if btf.has("module", "mem") {
            "module_memory"
        } else {
            "module_layout"
        };
        let base = self.offset(holder, "base")?;
        let inner = self.offset(holder, "mtn.node")?;
        let copies = [
            (root("root.tree")?, 0),
            (
                root("root.tree")?.plus(btf.size_of("rb_root")? as u64),
                btf.size_of("rb_node")? as u64,
            ),
        ];
        for node in &self.built.tree {
            for (top, nth) in copies {
                let key_of = |words: &mut Words<'_, '_>, node: Gva| {
                    let holder = node.0.wrapping_sub(nth).wrapping_sub(inner);
                    words.get(Gva(holder).plus(base))
                };
                let copy = TreeNode {
                    at: node.at.plus(nth),
                    key: node.key,
                };
                tree::insert(words, shape, top, copy, key_of)?;
            }
        }
        // a lookup that was interrupted on its way down begins again
        let seq = root("root.seq")?;
        let word = words.get(seq)?;
        let next = (word & u64::from(u32::MAX)).wrapping_add(2) & u64::from(u32::MAX);
        if word & 1 != 0 {
            return Err(Error::passing(
                "the guest changes its tree of module addresses right now",
            ));
        }
        words.set(seq, word & !u64::from(u32::MAX) | next)?;
        let place = &self.built.place;
        let (min, max) = (root("addr_min")?, root("addr_max")?);
        if words.get(min)? > place.text.start.0 {
            words.set(min, place.text.start.0)?;
        }
        if words.get(max)? < place.data.end.0 {
            words.set(max, place.data.end.0)?;
        }
        Ok(())
    }

    /// Says that the payload is used, by itself, and that it uses the modules `uses`: none of them can
    /// be unloaded (`struct module_use`; `delete_module` refuses a module that others use).
    fn uses(&self, words: &mut Words<'_, '_>, uses: &[Gva]) -> Result<()> {
        let own = self.built.place.module();
        let size = self.kernel.btf()?.size_of("module_use")? as u64;
        let field = |path| self.offset("module_use", path);
        let (source, target) = (field("source")?, field("target")?);
        let (by_target, by_source) = (field("source_list")?, field("target_list")?);
        let used = self.offset("module", "source_list")?;
        let mut node = self.built.users;
        for &module in std::iter::once(&own).chain(uses) {
            words.set(node.plus(source), own.0)?;
            words.set(node.plus(target), module.0)?;
            // our own list of what we use stays empty: nothing reads it but our unloading
            words.set(node.plus(by_source), node.plus(by_source).0)?;
            words.set(node.plus(by_source).plus(8), node.plus(by_source).0)?;
            hang_in(words, module.plus(used), node.plus(by_target))?;
            node = node.plus(size);
        }
        Ok(())
    }

    /// The `struct module` that a static key belongs to, 0 for the kernel itself.
    fn owner(&self, modules: &[Module], key: Gva) -> Result<Gva> {
        if self.kernel.regions.iter().any(|r| r.range.contains(key)) {
            return Ok(Gva(0));
        }
        let holds = |m: &&Module| m.parts.iter().any(|p| p.range.contains(key));
        modules.iter().find(holds).map(|m| m.addr).ok_or_else(|| {
            Error::not_applicable(format!(
                "the static key at {key} is neither the kernel's nor a module's"
            ))
        })
    }
}

/// Hangs `node` in behind `head` (`list_add_rcu`).
fn hang_in(words: &mut Words<'_, '_>, head: Gva, node: Gva) -> Result<()> {
    let first = Gva(words.get(head)?);
    let back = words.get(first.plus(8))?;
    if back != head.0 {
        return Err(Error::passing(format!(
            "the list at {head} is not whole: its first element {first} points back to {back:#x}; \
             the guest changes it right now"
        )));
    }
    words.set(node, first.0)?;
    words.set(node.plus(8), head.0)?;
    words.set(first.plus(8), node.0)?;
    words.set(head, node.0)
}
