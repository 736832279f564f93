//! `CONDITIONS`: what must be true when anything is written to the guest's text, by any command: `apply`, `replace`,
//! `revert`, the way back that `recover` takes, both redirects of a `nudge`, and `reclaim`. Each of them makes its [`Plan`] here.
//!
//! Each condition is looked at when the plan is made, and its error says what is in the way. What it saw becomes words that
//! are compared in the pause, right before the first write ([`Write::condition`]). If one of them has changed, the plan is
//! made anew, as long as there is time ([`crate::apply`]): so the reason that is given in the end is the one that holds.
//!
//! To add a condition, write a function here and add it to the list. What also belongs to them is found elsewhere: the bytes to
//! be replaced are those expected, and the page tables still lead to them ([`crate::apply`]); the guest is neither suspended
//! nor has it shut down, and Xen does not log what the guest writes while it does not see what we write
//! ([`Paused::writing`](crate::machine::Paused::writing)); no thread is in code that a kprobe copied
//! ([`copies`](crate::target::kprobes::copies)).
//!
//! The guest's ftrace, BPF programs and livepatches own the nop at a function's entry, in front of the redirect. A payload is
//! not put behind one that they use, because it would not run, or not as they expect. For the way back that is no matter: it
//! leaves the nop as it is, and what is attached there sees the function as before.

use std::sync::Arc;

use locus_guest::addr::{Gva, Range};
use locus_kernel::Kernel;

use super::{patch_stack, Plan};
use crate::arena::record::{Function, ModuleAt, Record};
use crate::error::{Error, Result};
use crate::link::fixups::KeyCount;
use crate::quiesce::{Watch, Watched};
use crate::target::kprobes::Kprobes;
use crate::target::{lkrg, modules_present, redirect};
use crate::write::{About, Write, WRITE_MAX};
use crate::x86::JUMP;

/// A change of the guest as it is decided. It becomes a [`Plan`] once all conditions hold.
#[derive(Debug, Default)]
pub struct Proposal<'a> {
    /// Name of the payload.
    pub patch: &'a str,
    /// Modules whose functions are changed, or whose symbols the payload uses: they must be there and live.
    pub modules: Vec<ModuleAt>,
    /// Static keys that the payload was linked for, with their counts.
    pub keys: &'a [KeyCount],
    /// Functions that nobody may trace or livepatch.
    pub untraced: Vec<Entry>,
    /// Code in which no kprobe may stand: what is written, and what stops or begins to run by it.
    pub unprobed: Vec<Watched>,
    /// Writes to the guest's data that come first, and words of it that must not change.
    pub data: Vec<Write>,
    /// Writes to its text.
    pub redirects: Vec<Write>,
    /// Where no thread may be.
    pub watched: Vec<Watched>,
    /// The same if threads may go on in the versions that are replaced.
    pub entry_only: Option<Vec<Watched>>,
}

/// What a function has in front of its redirect.
#[derive(Clone, Debug)]
pub struct Entry {
    /// The function's first byte.
    pub at: Gva,
    /// The first byte of its redirect.
    pub site: Gva,
    /// Its name.
    pub name: String,
}

type Condition = fn(&Kernel<'_>, &Proposal<'_>) -> Result<Vec<Write>>;

/// All conditions, in the order in which they are checked.
const CONDITIONS: &[Condition] = &[
    modules_are_live,
    static_keys_are_as_linked,
    nobody_traces,
    no_kprobe_stands_there,
];

impl Plan {
    /// The same as [`Plan::new`], for a change that begins something: it is not made in a guest that panics when its code
    /// changes, and no module may come or go until it is made, because it could be such a one. What takes back a change that
    /// is half done does not ask for that.
    ///
    /// # Errors
    /// As [`lkrg::check_absent`] and [`Plan::new`].
    pub fn to_begin(kernel: &Kernel<'_>, mut proposal: Proposal<'_>) -> Result<Plan> {
        if let Some(at) = kernel.symbols.addr("modules") {
            // Read before the modules are: one that comes later changes it.
            let head = kernel.space.fresh().read_vec(at, 8)?;
            let condition = Write::condition(at, head, About::ModuleLists);
            proposal.data.insert(0, condition);
        }
        lkrg::check_absent(kernel)?;
        Plan::new(kernel, proposal)
    }

    /// The plan for `proposal`, whose first writes are the conditions that hold now.
    ///
    /// # Errors
    /// That of the first condition that does not hold.
    pub fn new(kernel: &Kernel<'_>, proposal: Proposal<'_>) -> Result<Plan> {
        let mut writes = Vec::new();
        for condition in CONDITIONS {
            writes.extend(condition(kernel, &proposal)?);
        }
        writes.extend(proposal.data);
        writes.extend(proposal.redirects);
        Ok(Plan {
            patch: proposal.patch.to_owned(),
            writes,
            watch: Watch::new(kernel, proposal.watched)?,
            entry_only: proposal
                .entry_only
                .map(|ranges| Watch::new(kernel, ranges))
                .transpose()?,
        })
    }
}

/// Each module is in the guest's list, at its place, and live.
fn modules_are_live(kernel: &Kernel<'_>, proposal: &Proposal<'_>) -> Result<Vec<Write>> {
    modules_present::conditions(kernel, &proposal.modules)
}

/// The static keys have the counts that the payload's branches were linked for.
fn static_keys_are_as_linked(_: &Kernel<'_>, proposal: &Proposal<'_>) -> Result<Vec<Write>> {
    let condition = |KeyCount { key, count }: &KeyCount| {
        Write::condition(*key, count.to_le_bytes().to_vec(), About::StaticKey)
    };
    Ok(proposal.keys.iter().map(condition).collect())
}

/// Ftrace's nop is at the entry of each function.
fn nobody_traces(kernel: &Kernel<'_>, proposal: &Proposal<'_>) -> Result<Vec<Write>> {
    let space = kernel.space.fresh();
    let mut found = Vec::new();
    for Entry { at, site, name } in &proposal.untraced {
        let len = usize::try_from(site.0.saturating_sub(at.0)).unwrap_or(usize::MAX);
        if len > WRITE_MAX {
            return Err(Error::failed(format!(
                "the redirect of {name} at {site} is {len} bytes behind its entry; expected at most {WRITE_MAX}"
            )));
        }
        let mut head = space.read_vec(*at, len + JUMP)?;
        // It was there when the function was examined.
        if redirect::fentry_end(&head, *at).ok() != Some(len) {
            return Err(Error::passing(About::Entry(name.clone()).to_string()));
        }
        head.truncate(len);
        found.push(Write::condition(*at, head, About::Entry(name.clone())));
    }
    Ok(found)
}

/// No kprobe of the guest's is registered there, and none is about to be.
fn no_kprobe_stands_there(kernel: &Kernel<'_>, proposal: &Proposal<'_>) -> Result<Vec<Write>> {
    check_unprobed(kernel, proposal.patch, &proposal.unprobed)?.conditions(kernel)
}

/// Refuses a change while a kprobe of the guest's stands in `unprobed`, and returns all kprobes.
///
/// # Errors
/// [`Class::TryAgain`](crate::error::Class::TryAgain), or the kprobes can't be read.
pub fn check_unprobed(kernel: &Kernel<'_>, patch: &str, unprobed: &[Watched]) -> Result<Kprobes> {
    let kprobes = Kprobes::read(kernel)?;
    check_none_in(&kprobes, patch, unprobed)?;
    Ok(kprobes)
}

/// The same by the `kprobes` of the guest.
///
/// # Errors
/// [`Class::TryAgain`](crate::error::Class::TryAgain).
pub fn check_none_in(kprobes: &Kprobes, patch: &str, unprobed: &[Watched]) -> Result<()> {
    let mut all = unprobed.iter();
    match all.find_map(|w| Some((kprobes.in_range(w.range)?, &w.name))) {
        Some((at, function)) => Err(Error::try_again(format!(
            "{patch}: a kprobe of the guest's own stands at {at}, in {function}. It has a copy of the code there, even \
             while it is disabled. Nothing was changed; remove it in the guest and try again"
        ))),
        None => Ok(()),
    }
}

/// What the redirects of `functions` stand in front of, from the redirect on. In front of it only ftrace's nop is left, and a
/// kprobe there is a matter of ftrace.
pub fn behind_redirects(functions: &[Function]) -> impl Iterator<Item = Watched> + '_ {
    functions.iter().flat_map(|f| {
        let end = f.old.plus(f.old_size).max(f.site.plus(JUMP as u64));
        let body = std::iter::once((f.site, end.0 - f.site.0));
        let parts = body.chain(f.old_cold.iter().copied());
        let name: Arc<str> = f.name.as_str().into();
        parts.map(move |(at, len)| Watched::new(Range::new(at, len), Arc::clone(&name)))
    })
}

/// The entries of `functions`.
pub fn entries(functions: &[Function]) -> impl Iterator<Item = Entry> + '_ {
    functions.iter().map(|f| Entry {
        at: f.old,
        site: f.site,
        name: f.name.clone(),
    })
}

/// Where no kprobe may stand when the redirects of `record` are taken away: in its code, which stops to run, and in what runs
/// again.
#[must_use]
pub fn unprobed_of(record: &Record) -> Vec<Watched> {
    let mut all = patch_stack::code_of(record);
    all.extend(behind_redirects(&record.functions));
    all
}
