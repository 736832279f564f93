//! The patches of a guest: what its memory shows, and by the audit log what it lost.

use std::fmt;

use locus_guest::addr::DomId;
use locus_kernel::Kernel;
use serde::Serialize;

use super::guest::Guest;
use crate::arena::record::Function;
use crate::arena::{Arena, Contents, Newer};
use crate::error::{Class, Error, Result};
use crate::plan::{self, Drained, PatchStack};
use crate::say;
use crate::storage::audit::in_force::InForce;
use crate::storage::audit::{Audit, Log};
use crate::target::modules_present;

/// The state of a patch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PatchState {
    /// It is in force.
    Applied,
    /// A redirect of it is not as it was written.
    Drifted,
    /// It is no longer in force, although it was not reverted.
    Gone(GoneReason),
    /// A newer xen-locus applied it, and may have reverted it: this one can't read its record.
    Unknown,
}

/// Why a patch is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum GoneReason {
    /// A module whose functions it replaces was unloaded.
    ModuleGone,
    /// The guest was rebooted.
    GuestRebooted,
    /// The guest hibernated, and came back with its redirects but without the memory that they lead to.
    MemoryLost,
}

impl PatchState {
    /// The word for it in JSON and XenStore.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            PatchState::Applied => "applied",
            PatchState::Drifted => "drifted",
            PatchState::Gone(_) => "gone",
            PatchState::Unknown => "unknown",
        }
    }

    /// Why it is gone, if it is.
    #[must_use]
    pub fn reason(self) -> Option<GoneReason> {
        match self {
            PatchState::Gone(reason) => Some(reason),
            PatchState::Applied | PatchState::Drifted | PatchState::Unknown => None,
        }
    }

    /// Whether it was lost in a reboot of the guest.
    #[must_use]
    pub fn is_lost(self) -> bool {
        self.reason() == Some(GoneReason::GuestRebooted)
    }
}

/// For people: a state that says what to do says it.
impl fmt::Display for PatchState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            PatchState::Gone(GoneReason::GuestRebooted) => "gone (guest rebooted)",
            PatchState::Gone(GoneReason::MemoryLost) => {
                "gone (the guest's text still leads there: reboot it now)"
            }
            PatchState::Unknown => "unknown (newer xen-locus)",
            state => state.name(),
        })
    }
}

/// One patch of a guest.
#[derive(Clone, Debug)]
pub struct Patch {
    /// Its name.
    pub name: String,
    /// Whether it is in force.
    pub state: PatchState,
    /// SHA-256 of its file, in hex.
    pub sha256: String,
    /// When it was applied, in seconds since 1970.
    pub applied_at: u64,
    /// Its place among the patches in force by the audit log, in the order they were applied; `None` if it is not there.
    pub place: Option<usize>,
    /// The CVEs that it mends, by its own account.
    pub cves: Vec<String>,
    /// The functions that it replaces.
    pub functions: Vec<Replaced>,
    /// Its place among the patches that are applied, the undermost first, if its payload says that threads may go on in what
    /// is below it.
    pub drains_at: Option<usize>,
}

impl Patch {
    /// Whether it was applied after `other`, or may have been. The clock of the host may have been set back in between, so it
    /// is asked only about patches that the log does not have.
    #[must_use]
    pub fn is_after(&self, other: &Patch) -> bool {
        match (self.place, other.place) {
            (Some(own), Some(other)) => own > other,
            _ => self.applied_at >= other.applied_at,
        }
    }
}

/// A function that a patch replaces.
#[derive(Clone, Debug)]
pub struct Replaced {
    /// Its entry in the patch's record.
    pub function: Function,
    /// The topmost patch, if its version runs instead.
    pub covered_by: Option<String>,
}

/// The patches of a guest.
#[derive(Clone, Debug)]
pub struct Status {
    /// Its domain id.
    pub domid: DomId,
    /// Its UUID.
    pub uuid: String,
    /// Its kernel's release.
    pub kernel: String,
    /// Its patches in the order they were applied. Of two that replace the same function, the later one runs.
    pub patches: Vec<Patch>,
}

/// Reads a guest's status.
///
/// # Errors
/// Its arena can't be read.
pub(super) fn read<G: Guest>(guest: &G, kernel: &Kernel<'_>, log: &dyn Log) -> Result<Status> {
    let known = is_known_to_log(guest.check_uuid(), &guest.label())?;
    let patches = patches_by(kernel, log, known.then(|| guest.uuid()), |_| Ok(()));
    let patches = patches.inspect(|(_, nudge, ())| warn_of_nudge(&guest.label(), nudge.as_deref()));
    let patches = patches.map(|(patches, ..)| patches);
    let is_lost = match &patches {
        Ok(all) => all
            .iter()
            .any(|p| p.state == PatchState::Gone(GoneReason::MemoryLost)),
        Err(error) => error.is_arena_lost(),
    };
    // A domain that ends loses all of its memory.
    if is_lost && guest.is_gone() {
        let label = guest.label();
        return Err(Error::failed(format!(
            "domain {label} is gone: it ended while it was looked at"
        )));
    }
    Ok(Status {
        domid: guest.domid(),
        uuid: guest.uuid().to_owned(),
        kernel: kernel.release.clone(),
        patches: patches?,
    })
}

/// Says so if a nudge of the guest `label` is under way or was interrupted: what [`plan::nudge_left`] has of it.
pub fn warn_of_nudge(label: &str, left: Option<&str>) {
    if let Some(words) = left {
        say::warn(format_args!(
            "{label}: {words}; if none runs, run `xen-locus recover`"
        ));
    }
}

/// Whether the audit log speaks of the guest `label` and of no other, by what came of the check of its UUID. If not, that is
/// said: what the guest lost in a reboot can't be told then.
///
/// # Errors
/// It can't be told now.
pub fn is_known_to_log(checked: Result<()>, label: &str) -> Result<bool> {
    match checked {
        Ok(()) => Ok(true),
        Err(error) if error.class() == Class::NotApplicable => {
            say::warn(format_args!(
                "{label}: it can't be told which patches the guest lost in a reboot: {error}"
            ));
            Ok(false)
        }
        Err(error) => Err(error),
    }
}

/// The patches in a guest's memory, in the order they were applied. Before them come those that the guest `uuid` lost,
/// by the audit log of this host.
///
/// # Errors
/// Its arena can't be read.
pub fn patches(kernel: &Kernel<'_>, uuid: Option<&str>) -> Result<Vec<Patch>> {
    patches_by(kernel, &Audit::system(), uuid, |_| Ok(())).map(|(patches, ..)| patches)
}

/// As [`patches`], of the guest `label`, and with the code in which threads may be that entered it before. Says so if a nudge of
/// the guest is under way or was interrupted.
///
/// # Errors
/// As [`patches`]; the guest's budget is spent.
pub fn patches_and_drained(
    label: &str,
    kernel: &Kernel<'_>,
    uuid: Option<&str>,
) -> Result<(Vec<Patch>, Option<Drained>)> {
    let find = |stack: &PatchStack<'_>| Drained::find(kernel, stack);
    let (patches, nudge, drained) = patches_by(kernel, &Audit::system(), uuid, find)?;
    warn_of_nudge(label, nudge.as_deref());
    Ok((patches, drained))
}

/// As [`patches`], by another log, with what there is to say of a nudge, and with what `more` says of the stack.
pub(super) fn patches_by<T: Default>(
    kernel: &Kernel<'_>,
    log: &dyn Log,
    uuid: Option<&str>,
    more: impl FnOnce(&PatchStack<'_>) -> Result<T>,
) -> Result<(Vec<Patch>, Option<String>, T)> {
    let contents = Arena::read(kernel).and_then(|arena| plan::contents(kernel, &arena));
    let in_force = uuid.map_or_else(Vec::new, |uuid| by_log(log, uuid));
    let Contents {
        residents,
        gates,
        newer,
    } = match contents {
        Ok(contents) => contents,
        // Only the log can say which patches these were.
        Err(error) if error.is_arena_lost() && !in_force.is_empty() => {
            say::warn(format_args!("{error}"));
            let lost = lost(&in_force, GoneReason::MemoryLost, |_| false);
            return Ok((lost, None, T::default()));
        }
        Err(error) => return Err(error),
    };
    let stack = PatchStack::new(&residents);
    let has = |told: &InForce| told.is_among(&residents, &newer);
    let place = |sha256: &str| in_force.iter().rposition(|p| p.sha256 == sha256);
    let mut patches = lost(&in_force, GoneReason::GuestRebooted, has);
    for (level, resident) in stack.applied().iter().enumerate() {
        let record = &resident.record;
        let mut functions = Vec::new();
        for function in &record.functions {
            // Without a module that is gone, its memory may be unmapped.
            let above = stack.newer_above(kernel, function, &newer).ok().flatten();
            let covering = stack.covering(resident, function).map(str::to_owned);
            functions.push(Replaced {
                function: function.clone(),
                covered_by: above.map(|n| n.name.clone()).or(covering),
            });
        }
        patches.push(Patch {
            name: record.name.clone(),
            // The module first: its memory may be unmapped, or have another use.
            state: if modules_present::gone(kernel, record)?.is_some() {
                PatchState::Gone(GoneReason::ModuleGone)
            } else if stack.displaced(kernel, resident, &newer)?.is_some() {
                PatchState::Drifted
            } else {
                PatchState::Applied
            },
            sha256: record.sha256.clone(),
            applied_at: resident.slot.applied_at,
            place: place(&record.sha256),
            cves: record.cves.clone(),
            functions,
            drains_at: record.entry_only.then_some(level),
        });
    }
    patches.extend(newer.into_iter().map(|newer| unknown(newer, place)));
    Ok((patches, plan::nudge_left(&gates), more(&stack)?))
}

/// A payload of a newer xen-locus, whatever that did with it: it is in the way of every change.
fn unknown(newer: Newer, place: impl Fn(&str) -> Option<usize>) -> Patch {
    Patch {
        place: place(&newer.sha256),
        name: newer.name,
        state: PatchState::Unknown,
        sha256: newer.sha256,
        applied_at: newer.slot.applied_at,
        cves: Vec::new(),
        functions: Vec::new(),
        drains_at: None,
    }
}

/// The patches in force in the guest `uuid` by the log. If the log can't be read, that is said, because it is no reason to
/// hide the patches in the guest's memory.
fn by_log(log: &dyn Log, uuid: &str) -> Vec<InForce> {
    log.in_force(uuid).unwrap_or_else(|error| {
        say::warn(format_args!(
            "it can't be told which patches the guest lost in a reboot: {error}"
        ));
        Vec::new()
    })
}

/// The patches that a guest lost: `in_force` by the log, and not in its memory.
fn lost(
    in_force: &[InForce],
    reason: GoneReason,
    is_there: impl Fn(&InForce) -> bool,
) -> Vec<Patch> {
    let lost = (0..).zip(in_force).filter(|(_, p)| !is_there(p));
    lost.map(|(place, lost)| Patch {
        name: lost.name.clone(),
        state: PatchState::Gone(reason),
        sha256: lost.sha256.clone(),
        applied_at: lost.applied_at,
        place: Some(place),
        cves: Vec::new(),
        functions: Vec::new(),
        drains_at: None,
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_says_which_patch_came_last_and_where_it_does_not_the_clock_is_asked() {
        let patch = |applied_at, place| {
            let in_force = InForce {
                name: "fix".into(),
                sha256: "00".into(),
                applied_at,
                record: String::new(),
            };
            let mut patch = lost(&[in_force], GoneReason::GuestRebooted, |_| false).remove(0);
            patch.place = place;
            patch
        };
        // The clock was set back between them, or both are of one second.
        for (first, second) in [(900, 100), (500, 500), (100, 900)] {
            let (first, second) = (patch(first, Some(0)), patch(second, Some(1)));
            assert!(second.is_after(&first) && !first.is_after(&second));
        }
        let unknown = patch(500, None);
        assert!(unknown.is_after(&patch(500, Some(0))) && unknown.is_after(&patch(499, None)));
        assert!(!unknown.is_after(&patch(501, Some(0))));
    }

    #[test]
    fn words_are_those_of_json_and_xenstore() {
        let module = PatchState::Gone(GoneReason::ModuleGone);
        let lost = PatchState::Gone(GoneReason::GuestRebooted);
        let memory = PatchState::Gone(GoneReason::MemoryLost);
        for (state, name, reason) in [
            (PatchState::Applied, "applied", "null"),
            (PatchState::Drifted, "drifted", "null"),
            (module, "gone", "\"module-gone\""),
            (lost, "gone", "\"guest-rebooted\""),
            (memory, "gone", "\"memory-lost\""),
            (PatchState::Unknown, "unknown", "null"),
        ] {
            assert_eq!(state.name(), name);
            assert_eq!(serde_json::to_string(&state.reason()).unwrap(), reason);
            assert_eq!(state.is_lost(), state == lost);
        }
    }
}
