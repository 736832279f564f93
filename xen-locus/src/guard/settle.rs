//! What is done for a run that died: its change finished or undone, the guest running again.
//!
//! Nothing here allocates memory or waits for anything but Xen, as long as nothing fails.

use locus_guest::addr::DomId;
use locus_xen::{self as xen, Control, PauseState, PauseStep, SharedPage};
use serde::Serialize;

use super::Places;
use crate::write::WRITE_MAX;

/// What came of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[repr(u32)]
pub enum Outcome {
    /// The guest was not held, or nothing had been written yet: it runs, unchanged in that pause.
    Running = 1,
    /// All was written: the change is in force.
    Finished = 2,
    /// The old bytes are back and verified.
    Undone = 3,
    /// The old bytes could not be put back; the guest runs.
    Torn = 4,
    /// The run died while it took or gave back a pause beside that of somebody else: whether its own count
    /// is among them can't be known, and they are left as they are.
    PausedByOthers = 5,
    /// The domain is gone.
    Gone = 6,
    /// The guest could not be unpaused.
    Stuck = 7,
}

impl Outcome {
    /// The outcome of this number.
    #[must_use]
    pub fn of(word: u32) -> Option<Outcome> {
        use Outcome::{Finished, Gone, PausedByOthers, Running, Stuck, Torn, Undone};
        [Running, Finished, Undone, Torn, PausedByOthers, Gone, Stuck]
            .into_iter()
            .find(|&outcome| outcome as u32 == word)
    }
}

impl std::fmt::Display for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Outcome::Running => "nothing had been written in the pause it was in; the guest runs",
            Outcome::Finished => "all had been written; the guest runs with the change",
            Outcome::Undone => "what had been written is undone; the guest runs without the change",
            Outcome::Torn => "what had been written could not be undone; the guest runs",
            Outcome::PausedByOthers => {
                "somebody else has paused the guest too, and whether one more pause is left of that run \
                 can't be known: if the guest stays paused when it should run, `xl unpause` it"
            }
            Outcome::Gone => "the guest is gone",
            Outcome::Stuck => "the guest could not be unpaused: `xl unpause` it",
        })
    }
}

/// The pause of one domain, as Xen counts it.
pub trait Counter {
    /// How the domain stands.
    ///
    /// # Errors
    /// Xen can't be asked.
    fn standing(&self) -> Result<Option<PauseState>, xen::Error>;
    /// Gives one pause count back.
    ///
    /// # Errors
    /// Xen refused.
    fn unpause(&self) -> Result<(), xen::Error>;
}

impl Counter for (&Control, DomId) {
    fn standing(&self) -> Result<Option<PauseState>, xen::Error> {
        self.0.pause_state(self.1)
    }

    fn unpause(&self) -> Result<(), xen::Error> {
        self.0.unpause(self.1)
    }
}

/// Does what the run that left `page` can't do any more, on the domain with this UUID.
pub fn settle(
    page: &SharedPage,
    counter: &dyn Counter,
    uuid: [u8; 16],
    places: &Places<'_>,
) -> Outcome {
    let step = page.step().unwrap_or(PauseStep::Idle);
    if step == PauseStep::Idle {
        return Outcome::Running;
    }
    let paused = match counter.standing() {
        Ok(Some(standing)) if standing.uuid == uuid => standing.paused,
        Ok(_) => return Outcome::Gone,
        // It was paused when it was asked last.
        Err(_) => true,
    };
    let held = match step {
        PauseStep::Idle => false,
        PauseStep::Paused | PauseStep::Writing => true,
        // Nobody else held one before, so a pause is the run's own.
        PauseStep::Pausing | PauseStep::Unpausing if !page.paused_by_others() => paused,
        PauseStep::Pausing | PauseStep::Unpausing => {
            page.set_step(PauseStep::Idle);
            return Outcome::PausedByOthers;
        }
    };
    let outcome = match step {
        PauseStep::Writing => {
            let outcome = places.settle();
            places.tell();
            outcome
        }
        _ => Outcome::Running,
    };
    if held {
        // Whoever comes after this process has died too finds the change settled.
        page.set_step(PauseStep::Unpausing);
        if counter.unpause().is_err() {
            return Outcome::Stuck;
        }
    }
    page.set_step(PauseStep::Idle);
    outcome
}

impl Places<'_> {
    /// Leaves what is written in full, and puts back what isn't, the last one first. The guest is paused.
    fn settle(&self) -> Outcome {
        if self.all(|spot| &spot.new) {
            return Outcome::Finished;
        }
        for (spot, at) in self.spots.iter().rev() {
            // What is neither was not written by the run: somebody let the guest run, and it may have
            // another use for the page.
            if self.is_of_change(*at, spot) && !self.holds(*at, &spot.old) {
                if let Some(window) = &self.window {
                    // All are tried; what counts is what stands there in the end.
                    let _ = window.write(*at, &spot.old);
                }
            }
        }
        match self.all(|spot| &spot.old) {
            true => Outcome::Undone,
            false => Outcome::Torn,
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

    /// Says that all of it was written, by whomever. Of a PV guest there is nobody to tell.
    fn tell(&self) {
        let _ = self.memory.written(&self.frames);
    }

    /// Reads all places once, and opens what is to be told, so that nothing is done for the first time when
    /// it matters.
    pub fn rehearse(&self) {
        self.all(|spot| &spot.old);
        let _ = self.memory.written(&[]);
    }
}

#[cfg(test)]
mod tests;
