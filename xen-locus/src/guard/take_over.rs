//! Finishes or undoes the change of a run that died, and unpauses the guest.
//!
//! As long as nothing fails, this allocates no memory and waits for nothing except Xen.

use locus_guest::addr::DomId;
use locus_xen::{self as xen, Control, PauseState, PauseStep, SharedPage};
use serde::Serialize;

use super::Places;
use crate::error::Result;
use crate::write::WRITE_MAX;

/// How often Xen is asked for the guest's state.
const TRIES: u32 = 3;

/// What became of the change and of the guest.
///
/// Its words do not say whether the guest runs: others may have paused it since, and `recover` may say them much later. They
/// say what is written, and that the run's own pause is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[repr(u32)]
pub enum TakeOver {
    /// The run was in the middle of no write: it had written nothing, or all of a change, or did not hold the guest.
    Running = 1,
    /// All was written: the change is in force.
    Finished = 2,
    /// The old bytes are back and verified.
    Undone = 3,
    /// The old bytes could not be put back; the guest is not held any more.
    Torn = 4,
    /// The run died while it took or released a pause, and others paused the guest too, or had time to. It can't be known
    /// whether the run's own pause is among them, so all are left as they are.
    PausedByOthers = 5,
    /// The domain is gone.
    Gone = 6,
    /// The guest could not be unpaused, or Xen did not say whether it is paused.
    Stuck = 7,
    /// Somebody let the guest run after it was written in part. A guest that is not held is not written.
    LetRun = 8,
}

impl TakeOver {
    /// The outcome with this number. `None` if there is none.
    #[must_use]
    pub fn of(word: u32) -> Option<TakeOver> {
        use TakeOver::{Finished, Gone, LetRun, PausedByOthers, Running, Stuck, Torn, Undone};
        [
            Running,
            Finished,
            Undone,
            Torn,
            PausedByOthers,
            Gone,
            Stuck,
            LetRun,
        ]
        .into_iter()
        .find(|&outcome| outcome as u32 == word)
    }
}

impl std::fmt::Display for TakeOver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            TakeOver::Running => {
                "it was in the middle of no write; that run does not hold the guest any more"
            }
            TakeOver::Finished => {
                "all had been written, and the change is in force; that run does not hold the guest any more"
            }
            TakeOver::Undone => {
                "what had been written is undone; that run does not hold the guest any more"
            }
            TakeOver::Torn => {
                "what had been written could not be undone, and is there in part; that run does not hold the guest any more"
            }
            TakeOver::PausedByOthers => {
                "the guest was paused then, and it can't be known whether by the run that died or only by another \
                 tool: if it stays paused when it should run, `xl unpause` it"
            }
            TakeOver::Gone => "the guest is gone",
            TakeOver::Stuck => "the guest could not be unpaused: `xl unpause` it",
            TakeOver::LetRun => {
                "somebody took the pause of that run away when the guest had been written in part, and it is left so: run \
                 `xen-locus recover` at once"
            }
        })
    }
}

/// Xen's pause counter of one domain.
pub trait Counter {
    /// Which domain it is and whether it is paused. `None` if it is gone.
    ///
    /// # Errors
    /// The hypercall failed.
    fn pause_state(&self) -> std::result::Result<Option<PauseState>, xen::Error>;
    /// Releases one pause.
    ///
    /// # Errors
    /// The hypercall failed.
    fn unpause(&self) -> std::result::Result<(), xen::Error>;
}

impl Counter for (&Control, DomId) {
    fn pause_state(&self) -> std::result::Result<Option<PauseState>, xen::Error> {
        self.0.pause_state(self.1)
    }

    fn unpause(&self) -> std::result::Result<(), xen::Error> {
        self.0.unpause(self.1)
    }
}

/// When a run that died is cleaned up after.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Since {
    /// Its guardian saw it die.
    Now,
    /// Its guardian died too, and any time has passed: somebody may have paused the guest meanwhile.
    Earlier,
}

/// As [`take_over`], for a run whose guardian died too. The places of its change are mapped only if it was at its writes: for
/// every other step they are not needed, and the guest may use their pages for something else by now.
///
/// # Errors
/// [`Class::Failed`](crate::error::Class::Failed): the guest is still held, in the middle of the writes, and a frame can't be
/// mapped. If it is not held, nothing would be written, and it is [`TakeOver::LetRun`].
pub fn take_over_later(
    page: &SharedPage,
    counter: &dyn Counter,
    uuid: [u8; 16],
    mut places: Places<'_>,
) -> Result<TakeOver> {
    if page.step() == Some(PauseStep::Writing) {
        if let Err(error) = places.set_mapped(true) {
            let may_be_held = match state_of(counter) {
                Some(Some(state)) => state.uuid == uuid && is_held(page, &state),
                Some(None) => false,
                None => true,
            };
            if may_be_held {
                return Err(error);
            }
        }
    }
    Ok(take_over(page, counter, uuid, &places, Since::Earlier))
}

/// What Xen says of the domain; `None` if it does not answer.
fn state_of(counter: &dyn Counter) -> Option<Option<PauseState>> {
    (0..TRIES).find_map(|_| counter.pause_state().ok())
}

/// Whether the guest is still in the pause of the run that left `page`. If it has run since, somebody took that pause away.
/// Another one may be there now.
fn is_held(page: &SharedPage, state: &PauseState) -> bool {
    let then = page.cpu_time_ns();
    state.paused && then.is_none_or(|then| then == state.cpu_time_ns)
}

/// Does what the run that left `page` can't do any more, on the domain with this UUID.
pub fn take_over(
    page: &SharedPage,
    counter: &dyn Counter,
    uuid: [u8; 16],
    places: &Places<'_>,
    since: Since,
) -> TakeOver {
    // No run writes another number than that of a step.
    let step = page.step().unwrap_or(PauseStep::Idle);
    if step == PauseStep::Idle {
        return TakeOver::Running;
    }
    let state = match state_of(counter) {
        Some(Some(domain)) if domain.uuid == uuid => domain,
        Some(_) => return TakeOver::Gone,
        // The step stays marked, so `recover` comes back to it.
        None => return TakeOver::Stuck,
    };
    let held = is_held(page, &state);
    let in_call = matches!(step, PauseStep::Pausing | PauseStep::Unpausing);
    // For a run that died while it took its pause or gave it back, only that time shows whose a later pause is. (That the
    // guest was let run without running at all, and was paused again, would not be seen.)
    let others = page.paused_by_others() || since == Since::Earlier && page.cpu_time_ns().is_none();
    if held && in_call && others {
        return end(page, TakeOver::PausedByOthers);
    }
    let outcome = match step {
        PauseStep::Writing => {
            let outcome = places.undo_unless_complete(held);
            places.tell();
            outcome
        }
        _ => TakeOver::Running,
    };
    if held {
        // If this process dies too, `recover` finds that the change is finished or undone.
        page.set_step(PauseStep::Unpausing);
        if counter.unpause().is_err() {
            return TakeOver::Stuck;
        }
    }
    end(page, outcome)
}

/// Nothing is left to do. The outcome is noted first: if this process dies before it says it, `recover` does.
fn end(page: &SharedPage, outcome: TakeOver) -> TakeOver {
    page.set_outcome(outcome as u32);
    page.set_step(PauseStep::Idle);
    outcome
}

impl Places<'_> {
    /// Leaves a change that was written in full. Otherwise it puts back the old bytes, those of the last write first. If the guest is
    /// not `held`, nothing is written: a thread may be in these bytes. `recover` puts them back at a moment when none is.
    fn undo_unless_complete(&self, held: bool) -> TakeOver {
        if self.all(|spot| &spot.new) {
            return TakeOver::Finished;
        }
        if !held {
            return match self.all(|spot| &spot.old) {
                true => TakeOver::Undone,
                false => TakeOver::LetRun,
            };
        }
        for (spot, at) in self.spots.iter().rev() {
            // Bytes that are neither old nor new are not from the run: the guest was unpaused meanwhile, and may use the page
            // for something else.
            if self.is_of_change(*at, spot) && !self.holds(*at, &spot.old) {
                if let Some(window) = &self.window {
                    // All are tried. What counts is what is there in the end.
                    let _ = window.write(*at, &spot.old);
                }
            }
        }
        match self.all(|spot| &spot.old) {
            true => TakeOver::Undone,
            false => TakeOver::Torn,
        }
    }

    fn all(&self, wanted: impl Fn(&super::Spot) -> &Vec<u8>) -> bool {
        self.spots
            .iter()
            .all(|(spot, at)| self.holds(*at, wanted(spot)))
    }

    fn holds(&self, at: usize, bytes: &[u8]) -> bool {
        let mut found = [0; WRITE_MAX];
        match (found.get_mut(..bytes.len()), &self.window) {
            (Some(found), Some(window)) => window.read(at, found).is_ok() && found == bytes,
            _ => false,
        }
    }

    /// Whether each byte at a place is the old or the new one.
    fn is_of_change(&self, at: usize, spot: &super::Spot) -> bool {
        let mut found = [0; WRITE_MAX];
        let (Some(found), Some(window)) = (found.get_mut(..spot.old.len()), &self.window) else {
            return false;
        };
        let own = |((found, old), new): ((&u8, &u8), &u8)| found == old || found == new;
        window.read(at, found).is_ok() && found.iter().zip(&spot.old).zip(&spot.new).all(own)
    }

    /// Tells Xen that these frames were written, so that a live migration copies them. It is not possible for a PV guest.
    fn tell(&self) {
        let _ = self.memory.written(&self.frames);
    }

    /// Reads all places once and opens the channel to Xen, so that nothing is done for the first time when it is urgent.
    pub fn warm_up(&self) {
        self.all(|spot| &spot.old);
        let _ = self.memory.written(&[]);
    }
}

#[cfg(test)]
mod tests;
