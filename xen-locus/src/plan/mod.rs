//! What is to be written, and when that is safe. It is decided here and carried out by [`crate::apply`].
//!
//! [`prepare`] goes through five phases. Each has a file and a type of its own for its result:
//!
//! ```text
//! Payload
//!   |  preconditions  does it fit this guest?               -> Fitted
//!   |  resolve        what do its names mean here?          -> Resolved
//!   |  lay_out        how large is it, what goes where?     -> LaidOut
//!   |  place          which pages, linked for them          -> Placed
//!   v  finish         its record, and the writes in order   -> Prepared
//! ```
//!
//! [`patch_stack`] knows which patches lie on which, [`interrupted`] what became of a change that a run left under way.

use std::thread;
use std::time::Duration;

use locus_kernel::Kernel;
use locus_payload::Payload;

use self::preconditions::Candidate;
use crate::arena::record::{ModuleAt, Record, State};
use crate::arena::{Arena, Contents, Newer, Resident};
use crate::error::{Error, Result};
use crate::link::image::Image;
use crate::link::layout::ImageLayout;
use crate::quiesce::Watch;
use crate::target::modules_present;
use crate::write::{About, Write};

pub mod conditions;
mod finish;
pub mod interrupted;
mod lay_out;
pub mod patch_stack;
mod place;
mod preconditions;
mod resolve;

pub use conditions::Proposal;
pub use patch_stack::drained::Drained;
pub use patch_stack::{Layers, Mode, PatchStack};

/// A change of the guest's text and data that takes effect as a whole.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Name of the payload.
    pub patch: String,
    /// The writes.
    pub writes: Vec<Write>,
    /// Where no thread may be when the writes are made.
    pub watch: Watch,
    /// The same if threads may go on in the versions that are replaced: the bytes that are written. `None` unless the
    /// payload says that they may.
    pub entry_only: Option<Watch>,
}

/// A payload made ready for one guest. Nothing of it is written yet.
#[derive(Debug)]
pub struct Prepared {
    /// Where its parts are in the image, and the rights of each page.
    pub layout: ImageLayout,
    /// Number of its first arena page.
    pub first: usize,
    /// Its bytes, with the record.
    pub image: Image,
    /// Its record.
    pub record: Record,
    /// The record as it is in the image.
    pub record_json: Vec<u8>,
    /// Where the record goes: a range of the image's bytes. No record that the directory leads to is there.
    pub record_place: std::ops::Range<usize>,
    /// Number of the directory entry that it takes over, if its code is parked in the arena already.
    pub parked: Option<usize>,
    /// The guest knows its module entry already.
    pub listed: bool,
    /// The parts of the image that are to be written: ranges of bytes.
    pub fresh: Vec<std::ops::Range<usize>>,
    /// The patches that it supersedes, the undermost first.
    pub superseded: Vec<Resident>,
    /// The change of the guest's text and data.
    pub plan: Plan,
    /// Modules whose functions it replaces or whose symbols it uses, payloads applied before among them. None of them may
    /// be unloaded while it is applied.
    pub depends: Vec<ModuleAt>,
}

/// What [`prepare`] found.
#[derive(Debug)]
pub enum Readiness {
    /// It is in force already.
    Already(Box<Resident>),
    /// It can be applied.
    Ready(Box<Prepared>),
}

/// Payloads in the arena, in the order in which they were last applied. If a run was ended in the middle of a change, the
/// states are those that follow from the redirects themselves.
///
/// # Errors
/// [`Cause::Torn`](crate::error::Cause::Torn): such a change took place in part.
/// [`Class::Uncertain`](crate::error::Class::Uncertain): the arena is damaged.
/// [`Cause::NewerFormat`](crate::error::Cause::NewerFormat): a payload has a record of a newer version.
pub fn residents(kernel: &Kernel<'_>, arena: &Arena) -> Result<Vec<Resident>> {
    let mut all = arena.residents(kernel)?;
    interrupted::resolve(kernel, &mut all)?;
    Ok(all)
}

/// The same as [`residents`], for callers that only show them: with the payloads whose record has a newer version.
///
/// # Errors
/// As [`residents`], but [`Cause::NewerFormat`](crate::error::Cause::NewerFormat) only while such a payload is being applied
/// or reverted.
pub fn contents(kernel: &Kernel<'_>, arena: &Arena) -> Result<Contents> {
    match contents_once(kernel, arena) {
        // Who only shows them holds no lock: another run may be in its pause.
        Err(error) if error.torn().is_some() => {
            thread::sleep(LONGER);
            contents_once(kernel, arena)
        }
        done => done,
    }
}

/// Longer than a change is torn while its run is alive.
const LONGER: Duration = Duration::from_millis(20);

fn contents_once(kernel: &Kernel<'_>, arena: &Arena) -> Result<Contents> {
    let mut all = arena.contents(kernel)?;
    // What became of the others in that change can't be told without it.
    let is_changing = |n: &&Newer| matches!(n.slot.state, State::Applying | State::Reverting);
    if let Some(newer) = all.newer.iter().find(is_changing) {
        return Err(newer.refusal());
    }
    interrupted::resolve(kernel, &mut all.residents)?;
    Ok(all)
}

/// The same as [`residents`], for callers that are about to change the guest. The directory in `arena` gets their states too, so
/// that the guest's copy shows them once it is written.
///
/// # Errors
/// As [`residents`] and [`check_no_nudge`].
pub fn resolve_interrupted(kernel: &Kernel<'_>, arena: &mut Arena) -> Result<Vec<Resident>> {
    check_no_nudge(kernel, arena)?;
    let all = residents(kernel, arena)?;
    for resident in &all {
        if let Some(slot) = arena.directory.slots.get_mut(resident.index) {
            slot.state = resident.slot.state;
        }
    }
    Ok(all)
}

/// What there is to say of a nudge that is under way, or was interrupted, by the `gates` in a guest's arena; `None` if there is
/// none.
#[must_use]
pub fn nudge_left(gates: &[Resident]) -> Option<String> {
    gates.first().map(|gate| {
        let through = gate.record.functions.first().map_or("", |f| &f.name);
        let patch = gate.record.nudge.as_deref().unwrap_or_default();
        format!(
            "a nudge of {patch} by xen-locus is under way or was interrupted: {through} may lead through arena page {}",
            gate.slot.first
        )
    })
}

/// Refuses a guest in which a nudge was interrupted. The caller holds the guest's lock, so none is under way.
///
/// # Errors
/// [`Class::Uncertain`](crate::error::Class::Uncertain): one was.
pub fn check_no_nudge(kernel: &Kernel<'_>, arena: &Arena) -> Result<()> {
    match nudge_left(&arena.contents(kernel)?.gates) {
        None => Ok(()),
        Some(words) => Err(Error::uncertain(format!(
            "{words}; nothing else is changed before `xen-locus recover` has taken that back"
        ))),
    }
}

/// Where threads may still be that entered functions of `resident`, one of those in `stack`, before it was applied. `None`
/// unless its payload says that they may.
///
/// # Errors
/// The guest's budget is spent.
pub fn old_versions(
    kernel: &Kernel<'_>,
    stack: &PatchStack<'_>,
    resident: &Resident,
) -> Result<Option<Watch>> {
    if !resident.record.entry_only {
        return Ok(None);
    }
    Watch::new(kernel, stack.below(&[resident])).map(Some)
}

/// Checks everything and links the payload for this guest. Writes nothing.
///
/// # Errors
/// Each phase has its own. None leaves anything behind.
pub fn prepare(
    kernel: &Kernel<'_>,
    arena: &Arena,
    payload: &Payload,
    mode: Mode,
) -> Result<Readiness> {
    let residents = residents(kernel, arena)?;
    let stack = PatchStack::new(&residents);
    if let Some(same) = preconditions::applied_already(kernel, &stack, payload, mode)? {
        return Ok(Readiness::Already(Box::new(same)));
    }
    let fitted = Candidate::new(kernel, payload, &stack, mode).check()?;
    let resolved = resolve::resolve(&fitted)?;
    let laid_out = lay_out::lay_out(&fitted, &resolved)?;
    let placed = place::place(&fitted, arena, &residents, &resolved, &laid_out)?;
    let prepared = finish::finish(&fitted, resolved, laid_out, placed)?;
    Ok(Readiness::Ready(Box::new(prepared)))
}

/// The plan that reverts `resident`, one of those in `stack`.
///
/// # Errors
/// [`Class::Failed`](crate::error::Class::Failed): another patch lies on it, a module that it changed is gone, or a redirect
/// is not as it was written. [`Class::TryAgain`](crate::error::Class::TryAgain): a condition of [`conditions`] does not hold.
/// [`Class::NotApplicable`](crate::error::Class::NotApplicable): a module of the guest would panic.
pub fn undo(kernel: &Kernel<'_>, stack: &PatchStack<'_>, resident: &Resident) -> Result<Plan> {
    stack.check_on_top(kernel, resident)?;
    undo_once_on_top(kernel, stack, resident)
}

/// The same as [`undo`], as if the patches that lie on `resident` or use it were gone.
///
/// # Errors
/// As [`undo`], but for those.
pub fn undo_once_on_top(
    kernel: &Kernel<'_>,
    stack: &PatchStack<'_>,
    resident: &Resident,
) -> Result<Plan> {
    let record = &resident.record;
    if let Some(why) = modules_present::gone(kernel, record)? {
        return Err(Error::failed(format!(
            "{why}: its redirects went with it, and nothing is written where they were"
        )));
    }
    let redirects = record.functions.iter().map(|f| Write {
        at: f.site,
        expect: f.new_bytes.to_vec(),
        new: f.old_bytes.to_vec(),
        about: About::Text,
    });
    let entry_only = || patch_stack::redirects(&record.functions).collect();
    let proposal = Proposal {
        patch: &record.name,
        modules: record.objects.clone(),
        unprobed: conditions::unprobed_of(record),
        redirects: redirects.collect(),
        // No thread may be in the payload's code: in a replacement, or in a function that only it calls.
        watched: patch_stack::code_of(record),
        entry_only: record.entry_only.then(entry_only),
        ..Proposal::default()
    };
    // A kprobe changes the first byte of a redirect while it is enabled, and is the better reason: so this comes last.
    let plan = Plan::to_begin(kernel, proposal)?;
    stack.check_holds(kernel, resident)?;
    Ok(plan)
}

#[cfg(test)]
mod tests;
