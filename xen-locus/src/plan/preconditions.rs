//! [`PRECONDITIONS`]: what must be true of the payload, of the guest's kernel and of the patches that are there. What is seen
//! only later is checked by the phases after this one; whether the guest has started and is not going down, by
//! [`crate::apply::apply`].
//!
//! To add a precondition, write a function here and add it to the list. It reads, and writes nothing. Its error says what
//! was expected, what was found, and what to do. What can only be checked of one function is checked in
//! [`crate::target::redirect`]. What must still be true in the pause, or for a revert too, is one of
//! [`super::conditions`].

use std::ops::Deref;

use locus_guest::addr::Range;
use locus_kernel::Kernel;
use locus_payload::Payload;

use super::conditions;
use super::patch_stack::{self, Mode, PatchStack};
use crate::arena::Resident;
use crate::error::{Error, Result};
use crate::link::image;
use crate::quiesce;
use crate::target::compat;
use crate::target::kprobes::{self, Kprobes};
use crate::target::lkrg;
use crate::target::modules_present;
use crate::target::redirect::REPAIR;
use crate::target::symbols::GuestSymbols;

/// A payload that is to be applied, and the guest that it is for.
#[derive(Debug)]
pub struct Candidate<'a, 'm> {
    /// The guest's kernel.
    pub kernel: &'a Kernel<'m>,
    /// The payload.
    pub payload: &'a Payload,
    /// The patches that are applied.
    pub stack: &'a PatchStack<'a>,
    /// Whether it supersedes them.
    pub supersedes: bool,
    /// What it can refer to by name: the kernel, its modules, and the payloads that are applied.
    pub objects: GuestSymbols<'a, 'm>,
}

/// A candidate for which every precondition holds.
#[derive(Debug)]
pub struct Fitted<'a, 'm>(Candidate<'a, 'm>);

impl<'a, 'm> Deref for Fitted<'a, 'm> {
    type Target = Candidate<'a, 'm>;

    fn deref(&self) -> &Candidate<'a, 'm> {
        &self.0
    }
}

type Precondition = fn(&Candidate<'_, '_>) -> Result<()>;

/// All preconditions, in the order in which they are checked. The first one that does not hold is reported.
const PRECONDITIONS: &[Precondition] = &[
    is_built_for_this_release,
    is_built_for_this_build_id,
    no_integrity_checker_is_there,
    its_kprobes_can_be_found,
    no_caller_is_hidden,
    has_this_kernels_klp_structures,
    uses_supported_features,
    superseded_patches_hold,
    symbol_versions_match,
];

impl<'a, 'm> Candidate<'a, 'm> {
    /// `payload` as it is to be applied on top of the patches in `stack`, or in their place.
    #[must_use]
    pub fn new(
        kernel: &'a Kernel<'m>,
        payload: &'a Payload,
        stack: &'a PatchStack<'a>,
        mode: Mode,
    ) -> Candidate<'a, 'm> {
        let newest_first = stack.applied().iter().rev();
        let modules = newest_first.map(|r| r.record.module).collect();
        Candidate {
            kernel,
            payload,
            stack,
            supersedes: mode.supersedes(payload),
            objects: GuestSymbols::new(kernel, modules),
        }
    }

    /// Checks all [`PRECONDITIONS`].
    ///
    /// # Errors
    /// That of the first one that does not hold.
    pub fn check(self) -> Result<Fitted<'a, 'm>> {
        PRECONDITIONS.iter().try_for_each(|holds| holds(&self))?;
        Ok(Fitted(self))
    }
}

/// The payload itself, if it is applied already. This comes before the preconditions, because a payload that is in force
/// needs none of them.
///
/// # Errors
/// [`Class::Failed`](crate::error::Class::Failed): another payload of this name is applied; or this one, but a module that
/// it changed is gone, its redirects are not as they were written, or it would have to supersede itself.
pub fn applied_already(
    kernel: &Kernel<'_>,
    stack: &PatchStack<'_>,
    payload: &Payload,
    mode: Mode,
) -> Result<Option<Resident>> {
    let mut applied = stack.applied().iter();
    let Some(same) = applied.find(|r| r.record.name == payload.name) else {
        return Ok(None);
    };
    if let Some(why) = modules_present::gone(kernel, &same.record)? {
        return Err(Error::failed(format!(
            "payload {} was applied, and is not in force any more: {why}. It can be neither reverted nor applied again \
             until the guest reboots",
            payload.name
        )));
    }
    let sha256 = hex::encode(payload.sha256);
    if same.record.sha256 != sha256 {
        return Err(Error::failed(format!(
            "another payload of the name {} is applied: this file has SHA-256 {sha256}, the one applied {}; revert that \
             one first",
            payload.name, same.record.sha256
        )));
    }
    if mode == Mode::Replace && stack.applied().len() > 1 {
        return Err(Error::failed(format!(
            "payload {} is applied already, and not alone: it can't supersede itself; revert the others, as `status` \
             lists them, the last one first",
            payload.name
        )));
    }
    has_not_drifted(kernel, stack, same)?;
    Ok(Some((*same).clone()))
}

/// The redirects of `patch`, or of those that lie on it, are as they were written. Else it can't be said that it is applied.
fn has_not_drifted(kernel: &Kernel<'_>, stack: &PatchStack<'_>, patch: &Resident) -> Result<()> {
    let Some((owner, function)) = stack.displaced(kernel, patch, &[])? else {
        return Ok(());
    };
    let (name, site) = (&function.name, function.site);
    let found = hex::encode(patch_stack::bytes_at(kernel, site)?);
    let expected = hex::encode(function.new_bytes);
    let drifted = format!(
        "payload {} was applied and has drifted: in {name} at {site} expected the redirect {expected} of {owner}, found \
         {found}",
        patch.record.name
    );
    let place = Range::new(site, function.new_bytes.len() as u64);
    Err(match Kprobes::read(kernel)?.in_range(place) {
        Some(at) => Error::try_again(format!(
            "{drifted}; a kprobe of the guest's own stands at {at}: remove it in the guest and try again"
        )),
        None => Error::failed(format!(
            "{drifted}; the guest or another tool changed it. {REPAIR}"
        )),
    })
}

/// Its vermagic is the kernel's: release, and options that change the layout of modules.
fn is_built_for_this_release(candidate: &Candidate<'_, '_>) -> Result<()> {
    let Candidate {
        kernel, payload, ..
    } = candidate;
    let running = kernel.vermagic()?;
    let wanted = payload.modinfo.vermagic.trim_end();
    if wanted == running {
        return Ok(());
    }
    Err(Error::not_applicable(format!(
        "payload {} is built for another kernel: its vermagic is {wanted:?}, the guest's is {running:?}; build it \
         against the guest's kernel ({})",
        payload.name, kernel.release
    )))
}

/// If it says for which build of the kernel it is made, the guest runs that build.
fn is_built_for_this_build_id(candidate: &Candidate<'_, '_>) -> Result<()> {
    let Some(wanted) = &candidate.payload.modinfo.target_build_id else {
        return Ok(());
    };
    let found = candidate.kernel.build_id.as_deref();
    if found == Some(&**wanted) {
        return Ok(());
    }
    Err(Error::not_applicable(format!(
        "payload {} was made for the kernel with build-id {}, and the guest's has {}: its text is another; make the \
         payload from the guest's own kernel",
        candidate.payload.name,
        hex::encode(wanted),
        found.map_or_else(|| "none".into(), hex::encode)
    )))
}

/// It can be known where the guest's kprobes are.
fn its_kprobes_can_be_found(candidate: &Candidate<'_, '_>) -> Result<()> {
    kprobes::check_table(candidate.kernel)
}

/// No trampoline of a name that is not known hides return addresses.
fn no_caller_is_hidden(candidate: &Candidate<'_, '_>) -> Result<()> {
    quiesce::check_trampolines(candidate.kernel)
}

/// No module of the guest panics when the kernel's code changes.
fn no_integrity_checker_is_there(candidate: &Candidate<'_, '_>) -> Result<()> {
    lkrg::check_absent(candidate.kernel)
}

/// Its `struct klp_patch` and the structures in it are laid out as the kernel's.
fn has_this_kernels_klp_structures(candidate: &Candidate<'_, '_>) -> Result<()> {
    compat::check_layout(candidate.kernel.btf()?, candidate.payload)
}

/// It needs nothing that xen-locus does not support.
fn uses_supported_features(candidate: &Candidate<'_, '_>) -> Result<()> {
    image::check_supported(candidate.payload)
}

/// The redirects of the patches that it supersedes, if it does, are as these patches wrote them.
fn superseded_patches_hold(candidate: &Candidate<'_, '_>) -> Result<()> {
    if !candidate.supersedes {
        return Ok(());
    }
    let kprobes = Kprobes::read(candidate.kernel)?;
    for patch in candidate.stack.applied() {
        if let Some(why) = modules_present::gone(candidate.kernel, &patch.record)? {
            return Err(Error::failed(format!(
                "{why}: so that payload can't be superseded, because nothing is written where its redirects were"
            )));
        }
        // It changes the first byte of a redirect while it is enabled: it is the better reason.
        let unprobed = conditions::unprobed_of(&patch.record);
        conditions::check_none_in(&kprobes, &patch.record.name, &unprobed)?;
        candidate.stack.check_holds(candidate.kernel, patch)?;
    }
    Ok(())
}

/// The kernel's exported symbols that it uses have the CRCs that it was built with, where the kernel has CRCs.
fn symbol_versions_match(candidate: &Candidate<'_, '_>) -> Result<()> {
    match candidate.objects.exported()? {
        Some(exports) => compat::check_versions(candidate.kernel, exports, candidate.payload),
        None => Ok(()),
    }
}
