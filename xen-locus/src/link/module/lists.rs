//! The guest's lists and its tree, in which a payload must be for the guest's kernel to know it as a module. The words are written
//! in the pause that brings the payload into force, all or none, and only if nothing moved since they were worked out.

use std::collections::HashSet;

use locus_guest::addr::{Gva, Range};
use locus_kernel::modules::{Module, ModuleReader};
use locus_kernel::Kernel;

use super::structure::TreeNode;
use super::unlocked;
use super::words::Words;
use super::{keys, tree, BuiltModule};
use crate::arena::record::MODULE;
use crate::error::{Error, Result};
use crate::quiesce::Watched;
use crate::target::kernel_locks;
use crate::write::{About, Lock, Write};

/// Most users of a module that are looked through.
const USERS_MAX: usize = 4096;
/// Most kinds of memory that a module is believed to have.
const KINDS_MAX: u64 = 64;

/// What takes a payload into the guest's lists, or out of them, and the code that no thread may be in meanwhile.
#[derive(Clone, Debug, Default)]
pub struct ListChange {
    /// The words to be written, and those that must not have changed. The first and the last write are the marks that
    /// [`known`] reads.
    pub writes: Vec<Write>,
    /// The functions that change the same lists without a lock.
    pub watched: Vec<Watched>,
}

/// Who may use a payload that is taken out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Users {
    /// Nobody.
    None,
    /// Whoever does, because they go first.
    Go,
}

/// What the guest knows of a payload's `struct module`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Known {
    /// It never knew it.
    Never,
    /// It is among the guest's modules.
    Listed,
    /// It was among them, and was taken out to be reclaimed. Something may still lead to it.
    Removed,
}

/// What the guest knows of the `struct module` at `module`, which a payload has in the arena. Two words before it
/// tell: one is written before the lists change, the other after them.
///
/// # Errors
/// [`Class::Uncertain`](crate::error::Class::Uncertain) when only one of them is: an earlier run was ended in between.
pub fn known(kernel: &Kernel<'_>, module: Gva) -> Result<Known> {
    let begun = Gva(module.0.wrapping_sub(MODULE));
    let space = kernel.space.fresh();
    match (space.read_u64(begun)?, space.read_u64(begun.plus(8))?) {
        (0, 0) => Ok(Known::Never),
        (1, 1) => Ok(Known::Listed),
        (REMOVED, REMOVED) => Ok(Known::Removed),
        _ => Err(Error::uncertain(format!(
            "the payload whose struct module is at {module} is neither wholly among the guest's \
             modules nor wholly absent: an earlier run was ended in between, or the guest changed it"
        ))),
    }
}

/// Works out the writes that take `built` into the guest's lists; its own writable bytes get theirs at once. `uses` are modules
/// that must not be unloaded while the payload is there.
///
/// # Errors
/// [`Cause::Passing`](crate::error::Cause::Passing) while the guest loads or unloads a module or changes a static key;
/// [`Class::NotApplicable`](crate::error::Class::NotApplicable): its lists are not as this tool knows them.
pub fn insert(kernel: &Kernel<'_>, built: &mut BuiltModule, uses: &[Gva]) -> Result<ListChange> {
    let space = kernel.space.fresh();
    let modules = ModuleReader::new(kernel)?.all()?;
    let mut rw = std::mem::take(&mut built.rw);
    let mut words = Words::new(&space, built.place.rw, &mut rw);
    let done = Inserter { kernel, built }.write_all(&mut words, &modules, uses);
    let writes = marked(built.place.rw, 0, words);
    built.rw = rw;
    done?;
    let watched = unlocked::code(kernel)?;
    Ok(ListChange { writes, watched })
}

/// The writes of `words` between those of the marks at `at`, which become one more than `from`.
fn marked(at: Gva, from: u64, words: Words<'_, '_>) -> Vec<Write> {
    let mark = |at| Write {
        at,
        expect: from.to_le_bytes().to_vec(),
        new: (from + 1).to_le_bytes().to_vec(),
        about: About::ModuleLists,
    };
    let mut writes = vec![mark(at)];
    writes.extend(words.into_writes());
    writes.push(mark(at.plus(8)));
    writes
}

/// What a mark says of a payload that was in the lists and was taken out again.
pub const REMOVED: u64 = 2;

/// Where the first of the marks is, if `writes` take a payload into the guest's lists. The other one is behind it.
#[must_use]
pub fn marks_of(writes: &[Write]) -> Option<Gva> {
    let is_mark = |w: &&Write| w.expect == 0_u64.to_le_bytes() && w.new == 1_u64.to_le_bytes();
    let mut marks = writes.iter().filter(is_mark).map(|w| w.at);
    let all: HashSet<Gva> = marks.clone().collect();
    marks.find(|at| {
        at.0.checked_add(8)
            .is_some_and(|next| all.contains(&Gva(next)))
    })
}

/// Works out the writes that take the payload whose `struct module` is at `module` out of the guest's lists. Its pages
/// are `own`. Its own words stay as they are, for those who look through a list at that moment.
///
/// # Errors
/// As [`insert`]. [`Class::Failed`](crate::error::Class::Failed): a module or another payload uses it, or a static key
/// leads through it to one that came later.
pub fn remove(kernel: &Kernel<'_>, module: Gva, own: Range, users: Users) -> Result<ListChange> {
    let space = kernel.space.fresh();
    let modules = ModuleReader::new(kernel)?.all()?;
    let mut none = [];
    let mut words = Words::new(&space, Gva(0), &mut none);
    let remover = Remover {
        kernel,
        module,
        own,
        users,
    };
    if users == Users::None {
        remover.check_unused(&mut words, &modules)?;
    }
    remover.write_all(&mut words, &modules)?;
    let marks = Gva(module.0.wrapping_sub(MODULE));
    Ok(ListChange {
        writes: marked(marks, 1, words),
        watched: unlocked::code(kernel)?,
    })
}

struct Remover<'a, 'm> {
    kernel: &'a Kernel<'m>,
    module: Gva,
    own: Range,
    users: Users,
}

impl Remover<'_, '_> {
    fn write_all(&self, words: &mut Words<'_, '_>, modules: &[Module]) -> Result<()> {
        let member =
            |path| Ok::<Gva, Error>(self.module.plus(offset(self.kernel, "module", path)?));
        free(self.kernel, words, Lock::Modules)?;
        free(self.kernel, words, Lock::StaticKeys)?;
        list_del(words, member("list")?)?;
        list_del(words, member("bug_list")?)?;
        self.tree(words)?;
        self.uses(words, modules)?;
        keys::remove(self.kernel, (self.module, self.own), self.users, words)
    }

    fn tree(&self, words: &mut Words<'_, '_>) -> Result<()> {
        let tree = LatchTree::of(self.kernel)?;
        let nodes = tree.nodes_of(words, self.module, self.own)?;
        if nodes.is_empty() {
            return Err(Error::not_applicable(format!(
                "struct module at {} names none of the payload's memory; expected its text there, by which the guest's tree \
                 of module addresses leads to it",
                self.module
            )));
        }
        for node in nodes {
            for (root, nth) in tree.copies {
                tree::erase(words, tree.shape, root, node.plus(nth))?;
            }
        }
        tree.step(words)
    }

    /// Takes out of each module's list of users what says that the payload uses it. That it uses itself goes with it.
    fn uses(&self, words: &mut Words<'_, '_>, modules: &[Module]) -> Result<()> {
        for module in modules.iter().filter(|m| m.addr != self.module) {
            for node in self.users_of(words, module)? {
                if self.own.contains(node) {
                    list_del(words, node)?;
                }
            }
        }
        Ok(())
    }

    /// Refuses a payload that others use.
    fn check_unused(&self, words: &mut Words<'_, '_>, modules: &[Module]) -> Result<()> {
        let list = offset(self.kernel, "module_use", "source_list")?;
        let source = word_offset(self.kernel, "module_use", "source")?;
        for module in modules.iter().filter(|m| m.addr == self.module) {
            let users = self.users_of(words, module)?.into_iter();
            if let Some(node) = users.into_iter().find(|node| !self.own.contains(*node)) {
                let user = Gva(words.get(Gva(node.0.wrapping_sub(list)).plus(source))?);
                let name = modules.iter().find(|m| m.addr == user);
                return Err(Error::failed(format!(
                    "{} uses it: unload or reclaim that first",
                    name.map_or("another module", |m| &m.name)
                )));
            }
        }
        Ok(())
    }

    /// The elements of the list of users of `module`.
    fn users_of(&self, words: &mut Words<'_, '_>, module: &Module) -> Result<Vec<Gva>> {
        let head = module
            .addr
            .plus(offset(self.kernel, "module", "source_list")?);
        let mut users = Vec::new();
        let mut node = Gva(words.get(head)?);
        while node != head {
            if users.len() >= USERS_MAX {
                return Err(Error::not_applicable(format!(
                    "the list of what uses module {} has no end",
                    module.name
                )));
            }
            users.push(node);
            node = Gva(words.get(node)?);
        }
        Ok(users)
    }
}

fn offset(kernel: &Kernel<'_>, ty: &str, path: &str) -> Result<u64> {
    Ok(kernel.btf()?.offset_of(ty, path)? as u64)
}

/// Offset of a member of 64 bits.
fn word_offset(kernel: &Kernel<'_>, ty: &str, path: &str) -> Result<u64> {
    Ok(kernel.btf()?.offset_of_sized(ty, path, 8)? as u64)
}

/// Notes that a mutex is free, to be found free again in the pause.
fn free(kernel: &Kernel<'_>, words: &mut Words<'_, '_>, lock: Lock) -> Result<()> {
    words.about = About::Lock(lock);
    let owner = words.get(kernel_locks::owner(kernel, lock)?);
    words.about = About::ModuleLists;
    match owner? {
        0 => Ok(()),
        _ => Err(Error::passing(lock.held())),
    }
}

/// The two copies of the tree by which the kernel finds the module of an address: lookups use one copy while the other
/// changes (kernel/module/tree_lookup.c, include/linux/rbtree_latch.h).
struct LatchTree {
    /// Root pointer of each copy, and how far its node is behind the first one of a `latch_tree_node`.
    copies: [(Gva, u64); 2],
    shape: tree::Shape,
    seq: Gva,
    /// Offset of `base` in what holds a node, and of the node.
    base: u64,
    inner: u64,
    /// Offsets in `struct module` of what may hold a node.
    holders: Vec<u64>,
    /// Where the bounds of all addresses are, the lowest and the highest.
    bounds: [Gva; 2],
}

impl LatchTree {
    fn of(kernel: &Kernel<'_>) -> Result<LatchTree> {
        let btf = kernel.btf()?;
        let tree = kernel.symbols.need("mod_tree")?;
        let root = |path| offset(kernel, "mod_tree_root", path).map(|o| tree.plus(o));
        let bound = |path| word_offset(kernel, "mod_tree_root", path).map(|o| tree.plus(o));
        let node = |path| word_offset(kernel, "rb_node", path);
        let shape = tree::Shape {
            parent: node("__rb_parent_color")?,
            left: node("rb_left")?,
            right: node("rb_right")?,
        };
        let (holder, holders) = match btf.has("module", "mem") {
            true => {
                let first = offset(kernel, "module", "mem")?;
                let stride = btf.size_of("module_memory")? as u64;
                let kinds = btf.array_len("module", "mem")? as u64;
                if kinds == 0 || kinds > KINDS_MAX {
                    let found =
                        format!("the guest's struct module has {kinds} kinds of memory (mem[])");
                    return Err(Error::not_applicable(format!(
                        "{found}; expected 1 to {KINDS_MAX}"
                    )));
                }
                let all = (0..kinds).map(|n| first + n * stride);
                ("module_memory", all.collect())
            }
            false => (
                "module_layout",
                vec![offset(kernel, "module", "core_layout")?],
            ),
        };
        let top = root("root.tree")?;
        Ok(LatchTree {
            copies: [
                (top, 0),
                (
                    top.plus(btf.size_of("rb_root")? as u64),
                    btf.size_of("rb_node")? as u64,
                ),
            ],
            shape,
            seq: root("root.seq")?,
            base: word_offset(kernel, holder, "base")?,
            inner: offset(kernel, holder, "mtn.node")?,
            holders,
            bounds: [bound("addr_min")?, bound("addr_max")?],
        })
    }

    /// The nodes by which the payload with the `struct module` at `module` is in the tree.
    fn nodes_of(&self, words: &mut Words<'_, '_>, module: Gva, own: Range) -> Result<Vec<Gva>> {
        let mut nodes = Vec::new();
        for holder in &self.holders {
            let at = module.plus(*holder);
            if own.contains(Gva(words.get(at.plus(self.base))?)) {
                nodes.push(at.plus(self.inner));
            }
        }
        Ok(nodes)
    }

    /// Makes a lookup that was interrupted on its way down begin again.
    fn step(&self, words: &mut Words<'_, '_>) -> Result<()> {
        let word = words.get(self.seq)?;
        let next = (word & u64::from(u32::MAX)).wrapping_add(2) & u64::from(u32::MAX);
        if word & 1 != 0 {
            return Err(Error::passing(
                "the guest changes its tree of module addresses right now",
            ));
        }
        words.set(self.seq, word & !u64::from(u32::MAX) | next)
    }
}

/// Where the bounds of all module addresses are, the lowest and the highest. They may equal an address of a payload that is
/// not there any more.
///
/// # Errors
/// The kernel has no such tree.
pub fn address_bounds(kernel: &Kernel<'_>) -> Result<[Gva; 2]> {
    Ok(LatchTree::of(kernel)?.bounds)
}

struct Inserter<'a, 'm> {
    kernel: &'a Kernel<'m>,
    built: &'a BuiltModule,
}

impl Inserter<'_, '_> {
    fn write_all(&self, words: &mut Words<'_, '_>, modules: &[Module], uses: &[Gva]) -> Result<()> {
        let module = self.built.place.module();
        let member = |path| self.offset("module", path).map(|o| module.plus(o));
        free(self.kernel, words, Lock::Modules)?;
        if !self.built.keys.is_empty() {
            free(self.kernel, words, Lock::StaticKeys)?;
        }
        let head = self.kernel.symbols.need("modules")?;
        list_add(words, head, member("list")?)?;
        let head = self.kernel.symbols.need("module_bug_list")?;
        list_add(words, head, member("bug_list")?)?;
        self.tree(words)?;
        self.uses(words, uses)?;
        keys::insert(self.kernel, self.built, words, &|key| {
            self.owner(modules, key)
        })
    }

    fn offset(&self, ty: &str, path: &str) -> Result<u64> {
        offset(self.kernel, ty, path)
    }

    /// Inserts the payload's nodes into both copies of the tree of module addresses.
    fn tree(&self, words: &mut Words<'_, '_>) -> Result<()> {
        let tree = LatchTree::of(self.kernel)?;
        for node in &self.built.tree {
            for (root, nth) in tree.copies {
                let key_of = |words: &mut Words<'_, '_>, node: Gva| {
                    let holder = node.0.wrapping_sub(nth).wrapping_sub(tree.inner);
                    words.get(Gva(holder).plus(tree.base))
                };
                let copy = TreeNode {
                    at: node.at.plus(nth),
                    key: node.key,
                };
                tree::insert(words, tree.shape, root, copy, key_of)?;
            }
        }
        tree.step(words)?;
        let place = &self.built.place;
        let [min, max] = tree.bounds;
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
        let field = |path| word_offset(self.kernel, "module_use", path);
        let list = |path| self.offset("module_use", path);
        let (source, target) = (field("source")?, field("target")?);
        let (by_target, by_source) = (list("source_list")?, list("target_list")?);
        let used = self.offset("module", "source_list")?;
        let mut node = self.built.users;
        for &module in std::iter::once(&own).chain(uses) {
            words.set(node.plus(source), own.0)?;
            words.set(node.plus(target), module.0)?;
            // our own list of what we use stays empty: nothing reads it but our unloading
            words.set(node.plus(by_source), node.plus(by_source).0)?;
            words.set(node.plus(by_source).plus(8), node.plus(by_source).0)?;
            list_add(words, module.plus(used), node.plus(by_target))?;
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

/// Puts `node` behind `head` (`list_add_rcu`).
fn list_add(words: &mut Words<'_, '_>, head: Gva, node: Gva) -> Result<()> {
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

/// Takes `node` out of its list (`list_del_rcu`). Its own words stay.
fn list_del(words: &mut Words<'_, '_>, node: Gva) -> Result<()> {
    let (next, back) = (Gva(words.get(node)?), Gva(words.get(node.plus(8))?));
    if words.get(back)? != node.0 || words.get(next.plus(8))? != node.0 {
        return Err(Error::passing(format!(
            "the list with the element {node} is not whole: its neighbours {back} and {next} don't lead to it; the guest \
             changes it right now"
        )));
    }
    words.set(back, next.0)?;
    words.set(next.plus(8), back.0)
}
