//! What a run of `xtest bench` is to measure, and on which machines.

use std::fmt;
use std::time::Duration;

use clap::ValueEnum;
use serde::Serialize;

use crate::guest::Kind;
use crate::profile::{Profile, PV, PV1, PVH};

/// What is measured beside the points: calls of a function, and the guest's own livepatch.
pub const CALLS: &str = "calls";

/// Clock of the machine that is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Clock {
    /// The host's, with all that delays the emulator.
    Host,
    /// Instructions, 2 ns each.
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

/// PV guests, where instructions are counted: by one CPU after the other, so there is one.
const PV_COUNTED: Profile = Profile {
    name: "pv-counted",
    counted: true,
    ..PV1
};

/// PVH guests, where instructions are counted.
const PVH_COUNTED: Profile = Profile {
    name: "pvh-counted",
    counted: true,
    ..PVH
};

/// The host may take longer for a second of a clock that counts instructions.
const COUNTED_SECOND: u32 = 6;

/// What to measure.
#[derive(Debug, Clone)]
pub struct Wanted {
    /// Changes of each kind at the base point; other points have half as many.
    pub rounds: u32,
    /// Fewer points.
    pub quick: bool,
    /// Only guests of this type.
    pub kind: Option<Kind>,
    /// Only these points, and [`CALLS`]; all where there is none.
    pub only: Vec<String>,
    /// Only what reading costs, which else is left out.
    pub reading: bool,
    /// Longest time for one point, by the machine's clock.
    pub limit: Duration,
    /// That clock.
    pub clock: Clock,
}

impl Wanted {
    /// The machines, and the guests that each has.
    pub fn machines(&self) -> Vec<(&'static Profile, Kind)> {
        let all = match self.clock {
            Clock::Host => [(&PV, Kind::Pv), (&PVH, Kind::Pvh)],
            Clock::Instructions => [(&PV_COUNTED, Kind::Pv), (&PVH_COUNTED, Kind::Pvh)],
        };
        let mut all = Vec::from(all);
        all.retain(|&(_, kind)| self.kind.is_none_or(|only| only == kind));
        all
    }

    /// How long the host may take for a time by the machine's clock.
    pub fn patience(&self, limit: Duration) -> Duration {
        match self.clock {
            Clock::Host => limit,
            Clock::Instructions => limit * COUNTED_SECOND,
        }
    }
}
