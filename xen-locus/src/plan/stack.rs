//! Patches that replace the same function lie on each other in the order they were applied.
//!
//! The version of a function that runs is the one of the topmost patch, or the kernel's own. A patch
//! can be reverted when nothing lies on any of its functions. One that supersedes all others takes
//! the place of the whole stack in one step, and gives back the functions that it does not replace.

use std::collections::{HashMap, HashSet};

use locus_guest::addr::{Gva, Range};
use locus_kernel::Kernel;
use locus_payload::Payload;

use crate::arena::record::{Function, Record, State};
use crate::arena::Resident;
use crate::error::{Error, Result};
use crate::link::module::links;
use crate::quiesce::Watched;
use crate::target::redirect::{self, Standing};
use crate::write::Write;
use crate::x86::JUMP;

/// What becomes of the patches that are applied already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// They stay, below the new one; unless the payload itself says that it supersedes them.
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

    /// The redirect that stands in the function.
    #[must_use]
    pub fn standing(&self) -> Standing<'r> {
        Standing {
            patch: self.owner(),
            at: self.top.1.site,
            jump: self.top.1.new_bytes,
            original: self.bottom.old_bytes,
        }
    }

    /// Where nobody may be when the function's redirect changes: the version that runs now, and the
    /// bytes of the redirect.
    fn watched(&self) -> impl Iterator<Item = Watched> + 'r {
        let top = std::slice::from_ref(self.top.1);
        new_version(self.top.1).chain(redirects(top))
    }
}

/// Applied patches, the undermost first.
#[derive(Debug, Default)]
pub struct Stack<'r> {
    applied: Vec<&'r Resident>,
    /// Those that were taken back, perhaps while threads were in them: they say that they may.
    left: Vec<&'r Resident>,
    /// By the address of the old function.
    layers: HashMap<Gva, Layers<'r>>,
}

impl<'r> Stack<'r> {
    /// Of those `residents` that are applied.
    #[must_use]
    pub fn new(residents: &'r [Resident]) -> Stack<'r> {
        let in_state = |state| residents.iter().filter(move |r| r.slot.state == state);
        let left = in_state(State::Parked).filter(|r| r.record.entry_only);
        Stack {
            left: left.collect(),
            ..Stack::of(in_state(State::Applied))
        }
    }

    fn of(patches: impl Iterator<Item = &'r Resident>) -> Stack<'r> {
        let mut stack = Stack::default();
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

    /// The patches.
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
        Err(Error::failed(format!(
            "no patch {name:?} is applied to this guest; applied: {}",
            if applied.is_empty() {
                "none".into()
            } else {
                applied.join(", ")
            }
        )))
    }

    /// The patches on the function at `old`.
    #[must_use]
    pub fn layers(&self, old: Gva) -> Option<&Layers<'r>> {
        self.layers.get(&old)
    }

    /// Who replaces `function` of `patch` on top of it, if anybody.
    #[must_use]
    pub fn covering(&self, patch: &Resident, function: &Function) -> Option<&'r str> {
        self.layers(function.old)
            .filter(|layers| layers.top.0.index != patch.index)
            .map(Layers::owner)
    }

    /// Refuses to revert `patch` while another lies on it, and says which to revert first.
    ///
    /// # Errors
    /// [`Class::Failed`](crate::error::Class::Failed).
    pub fn check_on_top(&self, patch: &Resident) -> Result<()> {
        let functions = &patch.record.functions;
        let Some((function, by)) = functions
            .iter()
            .find_map(|f| Some((&f.name, self.covering(patch, f)?)))
        else {
            return Ok(());
        };
        let above: Vec<&str> = self.above(patch).map(|r| r.record.name.as_str()).collect();
        Err(Error::failed(format!(
            "patch {} can't be reverted while another lies on it: {by} replaces {function} too, and \
             was applied later; revert {} first",
            patch.record.name,
            above.join(", then ")
        )))
    }

    /// What lies on `patch`, directly or on what lies on it, the topmost first.
    fn above(&self, patch: &Resident) -> impl Iterator<Item = &'r Resident> {
        let entries = |r: &Resident| -> Vec<Gva> {
            let functions = &r.record.functions;
            functions.iter().map(|f| f.old).collect()
        };
        let mut below: HashSet<Gva> = entries(patch).into_iter().collect();
        let later = self.applied.iter().skip_while(|r| r.index != patch.index);
        let mut above = Vec::new();
        for &other in later.skip(1) {
            let functions = entries(other);
            if functions.iter().any(|f| below.contains(f)) {
                below.extend(functions);
                above.push(other);
            }
        }
        above.into_iter().rev()
    }

    /// The redirect that should stand in a function of `patch`, its own or the topmost one, and does
    /// not: who should have it there, and the entry of that patch.
    ///
    /// # Errors
    /// Memory can't be read.
    pub fn displaced(
        &self,
        kernel: &Kernel<'_>,
        patch: &Resident,
    ) -> Result<Option<(&'r str, &'r Function)>> {
        for function in &patch.record.functions {
            if let Some(layers) = self.layers(function.old) {
                let (owner, top) = layers.top;
                if bytes_at(kernel, top.site)? != top.new_bytes {
                    return Ok(Some((&owner.record.name, top)));
                }
            }
        }
        Ok(None)
    }

    /// Refuses to change anything about `patch` when a redirect of it is not as it should be.
    ///
    /// # Errors
    /// [`Class::Failed`](crate::error::Class::Failed), or memory can't be read.
    pub fn check_holds(&self, kernel: &Kernel<'_>, patch: &Resident) -> Result<()> {
        match self.displaced(kernel, patch)? {
            Some((owner, f)) => Err(redirect::displaced(&f.name, f.site, owner)),
            None => Ok(()),
        }
    }

    /// The versions of the functions of `patch` in which threads may be that entered them before it was applied.
    #[must_use]
    pub fn below(&self, patch: &Resident) -> Vec<Watched> {
        let earlier = self.applied.iter().take_while(|r| r.index != patch.index);
        let earlier: Vec<&Function> = earlier.flat_map(|r| &r.record.functions).collect();
        let mut below = Vec::new();
        for function in &patch.record.functions {
            below.extend(old_version(function));
            let versions = earlier.iter().filter(|f| f.old == function.old);
            below.extend(versions.flat_map(|f| new_version(f)));
        }
        below.extend(self.left(&patch.record.functions));
        below
    }

    /// The versions of `functions` that were taken back, perhaps while threads were in them.
    fn left<'s>(&'s self, functions: &'s [Function]) -> impl Iterator<Item = Watched> + 's {
        let all = self.left.iter().flat_map(|r| &r.record.functions);
        all.filter(|f| functions.iter().any(|own| own.old == f.old))
            .flat_map(new_version)
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
        });
        let given_back = self
            .given_back(functions)
            .filter(|_| supersedes)
            .map(|layers| Write {
                at: layers.top.1.site,
                expect: layers.top.1.new_bytes.to_vec(),
                new: layers.bottom.old_bytes.to_vec(),
            });
        own.chain(given_back).collect()
    }

    /// Where nobody may be at that moment.
    #[must_use]
    pub fn watched(&self, functions: &[Function], supersedes: bool) -> Vec<Watched> {
        let mut all = Vec::new();
        // Threads may still be in what those replaced that let them.
        for patch in self.applied.iter().filter(|r| r.record.entry_only) {
            let mut shared = patch.record.functions.iter();
            if supersedes || shared.any(|f| functions.iter().any(|own| own.old == f.old)) {
                all.extend(self.below(patch));
            }
        }
        all.extend(self.left(functions));
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

/// The bytes of the redirects of `functions`, by the names of those.
pub fn redirects(functions: &[Function]) -> impl Iterator<Item = Watched> + '_ {
    let redirect = |f: &Function| watched((f.site, JUMP as u64), f.name.clone());
    functions.iter().map(redirect)
}

/// Where the version is that a function's patch replaces, if that is the kernel's own.
fn old_version(function: &Function) -> impl Iterator<Item = Watched> + '_ {
    version(
        (function.old, function.old_size),
        &function.old_cold,
        &function.name,
    )
}

/// Where a patch's version of a function is.
fn new_version(function: &Function) -> impl Iterator<Item = Watched> + '_ {
    version(
        (function.new, function.new_size),
        &function.new_cold,
        &function.name,
    )
}

/// A version of the function `name`: address and size, and those of its parts that stand elsewhere.
fn version<'f>(
    whole: (Gva, u64),
    cold: &'f [(Gva, u64)],
    name: &'f str,
) -> impl Iterator<Item = Watched> + 'f {
    let cold = cold
        .iter()
        .map(move |&part| watched(part, format!("{name}.cold")));
    std::iter::once(watched(whole, name.to_owned())).chain(cold)
}

fn watched((at, len): (Gva, u64), name: String) -> Watched {
    Watched {
        range: Range::new(at, len),
        name,
    }
}

/// A patch's code: the replacements by name, and all of it, for what only they call.
#[must_use]
pub fn code_of(record: &Record) -> Vec<Watched> {
    let replacements = record.functions.iter().flat_map(new_version);
    replacements
        .chain([watched(record.text, record.name.clone())])
        .collect()
}

/// Decides, by what stands in the guest's text, whether the change that an earlier run left under
/// way took place, and gives each of `residents` the state that follows.
///
/// # Errors
/// [`Class::Uncertain`](crate::error::Class::Uncertain): it took place in part.
pub fn settle(kernel: &Kernel<'_>, residents: &mut [Resident]) -> Result<()> {
    let in_state = |state| residents.iter().filter(move |r| r.slot.state == state);
    let mut applying = in_state(State::Applying);
    let (patch, writes) = match (applying.next(), applying.next()) {
        (Some(_), Some(_)) => return Err(Error::uncertain(
            "the arena's directory says that two payloads are being applied at once: the guest \
                 or another tool changed it",
        )),
        (Some(patch), None) => {
            let superseded = Stack::of(in_state(State::Reverting));
            (patch, superseded.writes(&patch.record.functions, true))
        }
        (None, _) => {
            let Some(patch) = in_state(State::Reverting).next() else {
                return Ok(());
            };
            let reverting = Stack::of(in_state(State::Reverting));
            (patch, reverting.writes(&[], true))
        }
    };
    links::is_entered(kernel, patch.record.module)?;
    let (mut before, mut after) = (true, true);
    for write in &writes {
        let found = bytes_at(kernel, write.at)?;
        before &= write.expect == found;
        after &= write.new == found;
    }
    if before == after {
        return Err(Error::uncertain(format!(
            "payload {} is neither wholly applied nor wholly undone: an earlier run was ended in \
             between",
            patch.record.name
        )));
    }
    for resident in residents {
        resident.slot.state = resident.slot.state.settled(after);
    }
    Ok(())
}

fn bytes_at(kernel: &Kernel<'_>, site: Gva) -> Result<[u8; JUMP]> {
    let mut bytes = [0; JUMP];
    kernel.space.read(site, &mut bytes)?;
    Ok(bytes)
}
