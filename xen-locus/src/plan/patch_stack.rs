//! The patch stack: patches to the same function, in the order in which they were applied. (A stack alone is a call stack.)
//!
//! The version of a function that runs is that of the topmost patch, or the kernel's own. A patch can be reverted when no other
//! lies on any of its functions. A patch that supersedes all others takes the place of all in one step, and gives
//! back the functions that it does not replace.

pub mod drained;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use locus_guest::addr::{Gva, Range};
use locus_kernel::modules::ModuleReader;
use locus_kernel::Kernel;
use locus_payload::Payload;

use super::conditions;
use crate::arena::record::{Function, Record, State};
use crate::arena::{Newer, Resident};
use crate::error::{Error, Result};
use crate::link::module::lists::{self, Known};
use crate::quiesce::Watched;
use crate::target::redirect::{self, InstalledRedirect};
use crate::write::{About, Write};
use crate::x86::JUMP;

/// What becomes of the patches that are applied already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// They stay below the new one, unless the payload itself says that it supersedes them.
    Apply,
    /// They are superseded.
    Replace,
}

impl Mode {
    /// Whether `payload` supersedes the patches that are there.
    #[must_use]
    pub fn supersedes(self, payload: &Payload) -> bool {
        self == Mode::Replace || payload.klp.replace == Some(true)
    }
}

/// The patches on one function.
#[derive(Clone, Copy, Debug)]
pub struct Layers<'r> {
    /// The undermost patch's entry for it.
    bottom: &'r Function,
    /// The topmost patch, and its entry.
    top: (&'r Resident, &'r Function),
}

impl<'r> Layers<'r> {
    /// Name of the topmost patch.
    #[must_use]
    pub fn owner(&self) -> &'r str {
        &self.top.0.record.name
    }

    /// The redirect that is in the function now.
    #[must_use]
    pub fn installed(&self) -> InstalledRedirect<'r> {
        InstalledRedirect {
            patch: self.owner(),
            at: self.top.1.site,
            jump: self.top.1.new_bytes,
            original: self.bottom.old_bytes,
        }
    }

    /// Where no thread may be when the function's redirect changes: the version that runs now, and the bytes of the redirect.
    fn watched(&self) -> impl Iterator<Item = Watched> + 'r {
        let top = std::slice::from_ref(self.top.1);
        new_version(self.top.1).chain(redirects(top))
    }
}

/// Applied patches, the undermost first.
#[derive(Debug, Default)]
pub struct PatchStack<'r> {
    applied: Vec<&'r Resident>,
    /// Patches that were reverted, perhaps while threads were in them: their payloads say that threads may.
    left: Vec<&'r Resident>,
    /// By the address of the old function.
    layers: HashMap<Gva, Layers<'r>>,
}

/// The name of the module in a file, if `name` looks like one: the kernel's build makes `_` of `-`.
fn file_stem(name: &str) -> Option<String> {
    let file = name.rsplit('/').next().unwrap_or(name);
    let stem = file.strip_suffix(".ko").unwrap_or(file);
    (stem != name).then(|| stem.replace('-', "_"))
}

impl<'r> PatchStack<'r> {
    /// The patch stack of those `residents` that are applied.
    #[must_use]
    pub fn new(residents: &'r [Resident]) -> PatchStack<'r> {
        let in_state = |state| residents.iter().filter(move |r| r.slot.state == state);
        let left = in_state(State::Parked).filter(|r| r.record.entry_only);
        PatchStack {
            left: left.collect(),
            ..PatchStack::of(in_state(State::Applied))
        }
    }

    /// Of these `patches`, the undermost first, whatever their state.
    pub(super) fn of(patches: impl Iterator<Item = &'r Resident>) -> PatchStack<'r> {
        let mut stack = PatchStack::default();
        for patch in patches {
            stack.applied.push(patch);
            for function in &patch.record.functions {
                stack
                    .layers
                    .entry(function.old)
                    .and_modify(|layers| layers.top = (patch, function))
                    .or_insert(Layers {
                        bottom: function,
                        top: (patch, function),
                    });
            }
        }
        stack
    }

    /// The applied patches, the undermost first.
    #[must_use]
    pub fn applied(&self) -> &[&'r Resident] {
        &self.applied
    }

    /// The patch called `name`; `None` when it is one of `residents` and undone.
    ///
    /// # Errors
    /// [`Class::Failed`](crate::error::Class::Failed) when there is none.
    pub fn named(&self, residents: &[Resident], name: &str) -> Result<Option<&'r Resident>> {
        if let Some(found) = self.applied.iter().find(|r| r.record.name == name) {
            return Ok(Some(found));
        }
        if residents.iter().any(|r| r.record.name == name) {
            return Ok(None);
        }
        let applied: Vec<&str> = self.applied.iter().map(|r| &*r.record.name).collect();
        let all = match applied.is_empty() {
            true => "none".into(),
            false => applied.join(", "),
        };
        let advice = match (file_stem(name), applied.is_empty()) {
            (Some(stem), _) if applied.contains(&&*stem) => {
                format!(". Give the name of the patch, not a file: {stem}")
            }
            (Some(_), false) => ". Give the name of the patch, not a file".to_owned(),
            _ => String::new(),
        };
        Err(Error::failed(format!(
            "no patch {name:?} is applied to this guest; applied: {all}{advice}"
        )))
    }

    /// The patches on the function at `old`.
    #[must_use]
    pub fn layers(&self, old: Gva) -> Option<&Layers<'r>> {
        self.layers.get(&old)
    }

    /// Name of the topmost patch that replaces `function` of `patch` too, if that is another one.
    #[must_use]
    pub fn covering(&self, patch: &Resident, function: &Function) -> Option<&'r str> {
        self.layers(function.old)
            .filter(|layers| layers.top.0.index != patch.index)
            .map(Layers::owner)
    }

    /// Refuses to revert `patch` while another lies on it or uses its symbols, and says which to revert first.
    ///
    /// # Errors
    /// [`Class::Failed`](crate::error::Class::Failed). Or the guest's modules can't be read.
    pub fn check_on_top(&self, kernel: &Kernel<'_>, patch: &Resident) -> Result<()> {
        let functions = &patch.record.functions;
        let covered = functions
            .iter()
            .find_map(|f| Some((&f.name, self.covering(patch, f)?)));
        let mut others = self.applied.iter().filter(|r| r.index != patch.index);
        let why = match covered {
            Some((function, by)) => {
                format!("another lies on it: {by} replaces {function} too, and was applied later")
            }
            None => {
                let users = users(kernel, patch, &self.applied)?;
                match others.find(|r| users.contains(&r.index)) {
                    None => return Ok(()),
                    Some(by) => {
                        format!("another uses it: {} refers to its symbols", by.record.name)
                    }
                }
            }
        };
        let above = self.above(kernel, patch)?;
        let above: Vec<&str> = above.iter().map(|r| r.record.name.as_str()).collect();
        Err(Error::failed(format!(
            "patch {} can't be reverted while {why}; revert {} first",
            patch.record.name,
            above.join(", then ")
        )))
    }

    /// The patches that lie on `patch` or use it, or that do so to one of those, the topmost first.
    fn above(&self, kernel: &Kernel<'_>, patch: &Resident) -> Result<Vec<&'r Resident>> {
        let entries = |r: &Resident| -> Vec<Gva> {
            let functions = &r.record.functions;
            functions.iter().map(|f| f.old).collect()
        };
        let mut below: HashSet<Gva> = entries(patch).into_iter().collect();
        let mut users_of_below = users(kernel, patch, &self.applied)?;
        let mut above = Vec::new();
        let position = self.applied.iter().position(|r| r.index == patch.index);
        for (at, &other) in self.applied.iter().enumerate() {
            let functions = entries(other);
            let lies_on = Some(at) > position && functions.iter().any(|f| below.contains(f));
            let is_other = other.index != patch.index;
            if is_other && (lies_on || users_of_below.contains(&other.index)) {
                below.extend(functions);
                users_of_below.extend(users(kernel, other, &self.applied)?);
                above.push(other);
            }
        }
        above.reverse();
        Ok(above)
    }

    /// The one of the payloads `newer`, of which only the pages are known, to which the redirect in `function` leads.
    ///
    /// # Errors
    /// Memory can't be read.
    pub fn newer_above<'n>(
        &self,
        kernel: &Kernel<'_>,
        function: &Function,
        newer: &'n [Newer],
    ) -> Result<Option<&'n Newer>> {
        if newer.is_empty() {
            return Ok(None);
        }
        let bytes = bytes_at(kernel, function.site)?;
        Ok(Newer::behind(newer, function.site, bytes))
    }

    /// The first function of `patch` whose redirect, its own or that of the topmost patch, is not as it was written, and does
    /// not lead to one of `newer`. Returns the name of the patch that wrote it, and that patch's entry for the function.
    ///
    /// # Errors
    /// Memory can't be read.
    pub fn displaced(
        &self,
        kernel: &Kernel<'_>,
        patch: &Resident,
        newer: &[Newer],
    ) -> Result<Option<(&'r str, &'r Function)>> {
        for function in &patch.record.functions {
            if let Some(layers) = self.layers(function.old) {
                let (owner, top) = layers.top;
                if bytes_at(kernel, top.site)? != top.new_bytes
                    && self.newer_above(kernel, top, newer)?.is_none()
                {
                    return Ok(Some((&owner.record.name, top)));
                }
            }
        }
        Ok(None)
    }

    /// Refuses to change anything about `patch` when a redirect in its functions is not as it was written.
    ///
    /// # Errors
    /// [`Class::Failed`](crate::error::Class::Failed), or memory can't be read.
    pub fn check_holds(&self, kernel: &Kernel<'_>, patch: &Resident) -> Result<()> {
        match self.displaced(kernel, patch, &[])? {
            Some((owner, f)) => Err(redirect::displaced(&f.name, f.site, owner)),
            None => Ok(()),
        }
    }

    /// The versions below `patches` of their functions. Threads may be there that entered them before these were applied.
    #[must_use]
    pub fn below(&self, patches: &[&Resident]) -> Vec<Watched> {
        let position = |patch: &Resident| self.applied.iter().position(|r| r.index == patch.index);
        // By the address of the old function: which applied patches are below.
        let mut levels: HashMap<Gva, usize> = HashMap::new();
        let mut below = Vec::new();
        for patch in patches {
            let own = position(patch).unwrap_or(self.applied.len());
            for function in &patch.record.functions {
                let level = levels.entry(function.old).or_default();
                *level = own.max(*level);
                below.extend(old_version(function));
            }
        }
        // Each function is looked at once, because there may be many.
        for (own, patch) in self.applied.iter().enumerate() {
            let functions = patch.record.functions.iter();
            let is_below = |f: &&Function| levels.get(&f.old).is_some_and(|&level| own < level);
            below.extend(functions.filter(is_below).flat_map(new_version));
        }
        below.extend(self.left(|old| levels.contains_key(&old)));
        below
    }

    /// The versions of functions that were reverted, perhaps while threads were in them: those whose old function's address
    /// `is_asked`.
    fn left<'s>(
        &'s self,
        is_asked: impl Fn(Gva) -> bool + 's,
    ) -> impl Iterator<Item = Watched> + 's {
        let all = self.left.iter().flat_map(|r| &r.record.functions);
        all.filter(move |f| is_asked(f.old)).flat_map(new_version)
    }

    /// The functions that a patch which replaces `kept` gives back when it supersedes all.
    fn given_back<'s>(&'s self, kept: &[Function]) -> impl Iterator<Item = &'s Layers<'r>> {
        let kept: HashSet<Gva> = kept.iter().map(|f| f.old).collect();
        let mut given: Vec<&Layers<'r>> = self
            .layers
            .iter()
            .filter(|(old, _)| !kept.contains(*old))
            .map(|(_, layers)| layers)
            .collect();
        given.sort_by_key(|layers| layers.top.1.site);
        given.into_iter()
    }

    /// The writes that put a patch with these `functions` in force, in place of all others if it
    /// `supersedes` them.
    #[must_use]
    pub fn writes(&self, functions: &[Function], supersedes: bool) -> Vec<Write> {
        let own = functions.iter().map(|f| Write {
            at: f.site,
            expect: f.found.to_vec(),
            new: f.new_bytes.to_vec(),
            about: About::Text,
        });
        let given_back = self
            .given_back(functions)
            .filter(|_| supersedes)
            .map(|layers| Write {
                at: layers.top.1.site,
                expect: layers.top.1.new_bytes.to_vec(),
                new: layers.bottom.old_bytes.to_vec(),
                about: About::Text,
            });
        own.chain(given_back).collect()
    }

    /// Where no thread may be when these writes are made.
    #[must_use]
    pub fn watched(&self, functions: &[Function], supersedes: bool) -> Vec<Watched> {
        let asked: HashSet<Gva> = functions.iter().map(|f| f.old).collect();
        // Some patches let threads go on in what they replaced. Threads may still be there.
        let shares = |r: &&&Resident| {
            let mut own = r.record.functions.iter();
            r.record.entry_only && (supersedes || own.any(|f| asked.contains(&f.old)))
        };
        let draining: Vec<&Resident> = self.applied.iter().filter(shares).copied().collect();
        let mut all = self.below(&draining);
        all.extend(self.left(|old| asked.contains(&old)));
        for function in functions {
            match self.layers(function.old) {
                Some(layers) => all.extend(layers.watched()),
                None => all.extend(old_version(function)),
            }
        }
        if supersedes {
            all.extend(self.given_back(functions).flat_map(Layers::watched));
            let code = self.applied.iter().chain(&self.left);
            all.extend(code.flat_map(|r| code_of(&r.record)));
        }
        all
    }
}

/// Numbers of those of `patches` that use symbols of `patch`, by their records. A record of an earlier build does not say
/// it. For those the guest's own list of who uses the module counts.
///
/// # Errors
/// The guest's modules can't be read.
pub fn users(
    kernel: &Kernel<'_>,
    patch: &Resident,
    patches: &[&Resident],
) -> Result<HashSet<usize>> {
    let module = patch.record.module;
    let others = || patches.iter().filter(|r| r.index != patch.index);
    let mut users = HashSet::new();
    for other in others() {
        let uses = other.record.uses.as_ref();
        if uses.is_some_and(|uses| uses.contains(&module)) {
            users.insert(other.index);
        }
    }
    if others().any(|r| r.record.uses.is_none()) {
        let modules = ModuleReader::new(kernel)?.all()?;
        let used_by = modules.iter().filter(|m| m.addr == module);
        let used_by: Vec<&String> = used_by.flat_map(|m| &m.used_by).collect();
        for other in others().filter(|r| r.record.uses.is_none()) {
            // One that was taken out of the list does not say any more whom it uses.
            let is_out = lists::known(kernel, other.record.module)? == Known::Removed;
            if is_out || used_by.contains(&&other.record.name) {
                users.insert(other.index);
            }
        }
    }
    Ok(users)
}

impl PatchStack<'_> {
    /// Where no kprobe may stand when these writes are made: in what is written, and in what stops or begins to run.
    #[must_use]
    pub fn unprobed(&self, functions: &[Function], supersedes: bool) -> Vec<Watched> {
        let mut all = self.watched(functions, supersedes);
        all.extend(conditions::behind_redirects(functions));
        if supersedes {
            for layers in self.given_back(functions) {
                let bottom = std::slice::from_ref(layers.bottom);
                all.extend(conditions::behind_redirects(bottom));
            }
        }
        all
    }
}

/// The bytes of the redirects of `functions`, each with the name of its function.
pub fn redirects(functions: &[Function]) -> impl Iterator<Item = Watched> + '_ {
    let redirect = |f: &Function| Watched::new(Range::new(f.site, JUMP as u64), f.name.as_str());
    functions.iter().map(redirect)
}

/// The kernel's own version of a function.
fn old_version(function: &Function) -> impl Iterator<Item = Watched> + '_ {
    let whole = Range::new(function.old, function.old_size);
    let whole = Watched::new(whole, function.name.as_str());
    std::iter::once(whole).chain(elsewhere(&function.name, &function.old_cold))
}

/// A patch's version of a function. Its first byte counts: the redirect is in the kernel's own version.
fn new_version(function: &Function) -> impl Iterator<Item = Watched> + '_ {
    let whole = Range::new(function.new, function.new_size);
    let whole = Watched::whole(whole, function.name.as_str());
    std::iter::once(whole).chain(elsewhere(&function.name, &function.new_cold))
}

/// The parts of the function `name` that are located elsewhere, and are entered by jumps.
fn elsewhere<'f>(name: &str, parts: &'f [(Gva, u64)]) -> impl Iterator<Item = Watched> + 'f {
    let name: Arc<str> = match parts {
        [] => "".into(),
        _ => format!("{name}.cold").into(),
    };
    parts
        .iter()
        .map(move |&(at, len)| Watched::whole(Range::new(at, len), Arc::clone(&name)))
}

/// A patch's code: the new functions by name, and all of it, because they may call others in it.
#[must_use]
pub fn code_of(record: &Record) -> Vec<Watched> {
    let replacements = record.functions.iter().flat_map(new_version);
    replacements.chain([all_code_of(record)]).collect()
}

/// All of a patch's code as one range.
#[must_use]
pub fn all_code_of(record: &Record) -> Watched {
    let (start, len) = record.text;
    Watched::whole(Range::new(start, len), record.name.as_str())
}

/// The bytes at a redirect.
pub(crate) fn bytes_at(kernel: &Kernel<'_>, site: Gva) -> Result<[u8; JUMP]> {
    let mut bytes = [0; JUMP];
    kernel.space.read(site, &mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests;
