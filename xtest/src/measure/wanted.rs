//! What a run of `xtest bench` is to measure, and on which machines.

use std::fmt;
use std::time::Duration;

use clap::ValueEnum;
use serde::Serialize;

use crate::guest::Kind;
use crate::profile::{Profile, PV, PVH, PVH_COUNTED, PV_COUNTED};

/// The name of what is measured besides the points: calls of a function, and the guest's own livepatch.
pub const CALLS: &str = "calls";

/// The clock of the machine that is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Clock {
    /// The host's time, including all that delays the emulator.
    Host,
    /// A count of instructions, 2 ns each.
    Instructions,
}

impl fmt::Display for Clock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Clock::Host => "by the host's clock",
            Clock::Instructions => "by a clock that counts instructions, 2 ns each",
        })
    }
}

/// How many seconds the host may take for a second of a clock that counts instructions.
const COUNTED_SECOND: u32 = 6;

/// What to measure.
#[derive(Debug, Clone)]
pub struct Wanted {
    /// Applies, and as many reverts, at the base point; other points have half as many.
    pub rounds: u32,
    /// Measure fewer points.
    pub quick: bool,
    /// Measure only guests of this type.
    pub kind: Option<Kind>,
    /// Measure only these points (`calls` is the cost of a call); if empty, all.
    pub only: Vec<String>,
    /// Measure only what reading costs, which is otherwise left out.
    pub reading: bool,
    /// Time limit for one point, by the machine's clock.
    pub limit: Duration,
    /// The clock of the machine.
    pub clock: Clock,
}

impl Wanted {
    /// The machines, and the type of guest in each.
    pub fn machines(&self) -> Vec<(&'static Profile, Kind)> {
        let all = match self.clock {
            Clock::Host => [(&PV, Kind::Pv), (&PVH, Kind::Pvh)],
            Clock::Instructions => [(&PV_COUNTED, Kind::Pv), (&PVH_COUNTED, Kind::Pvh)],
        };
        let mut all = Vec::from(all);
        all.retain(|&(_, kind)| self.kind.is_none_or(|only| only == kind));
        all
    }

    /// How long the host may take for this time by the machine's clock.
    pub fn patience(&self, limit: Duration) -> Duration {
        match self.clock {
            Clock::Host => limit,
            Clock::Instructions => limit * COUNTED_SECOND,
        }
    }
}
