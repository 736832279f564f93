//! The tool is killed, at any moment: the guest runs on, wholly old or wholly new.

mod actions;
mod both_die;
mod injected;
mod random;
mod scarce;
mod subject;

use crate::guest::Kind;
use crate::profile::{PV, PVH};
use crate::scenario::Scenario;
use actions::{ACTIONS, APPLY, REPLACE, REVERT};
use both_die::{both_die, recover_dies};
use injected::injected;
use random::random;
use scarce::{no_journal, no_memory};

/// See the names.
pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "kills-pv",
        summary: "killed 25 times at random moments, the tool leaves the guest running, old or new",
        profile: &PV,
        run: |ctx| random(ctx, Kind::Pv, 25),
    },
    Scenario {
        name: "faults-pv",
        summary:
            "killed at every 13th of its calls from the journal on, it leaves the guest old or new",
        profile: &PV,
        run: |ctx| injected(ctx, Kind::Pv, "kill", 13, &ACTIONS),
    },
    Scenario {
        name: "both-die-pv",
        summary: "where the guardian is killed too the guest stays paused until recover settles it",
        profile: &PV,
        run: |ctx| both_die(ctx, Kind::Pv),
    },
    Scenario {
        name: "faults-recover-pv",
        summary: "where recover is killed as well, at every 37th of its calls, the next one settles it",
        profile: &PV,
        run: |ctx| recover_dies(ctx, Kind::Pv, 37),
    },
    Scenario {
        name: "no-journal-pv",
        summary: "a journal that can't be written, and no room for a guardian's file: exit 1, nothing done; a full log: the next run records it",
        profile: &PV,
        run: |ctx| no_journal(ctx, Kind::Pv),
    },
    Scenario {
        name: "no-memory-pv",
        summary: "with too little memory for itself, however much that is, it says so, and the guest is old or new",
        profile: &PV,
        run: |ctx| no_memory(ctx, Kind::Pv),
    },
];

/// What takes too long for a usual run.
pub const MATRIX: &[Scenario] = &[
    Scenario {
        name: "kills-200-pv",
        summary: "killed 200 times at random moments",
        profile: &PV,
        run: |ctx| random(ctx, Kind::Pv, 200),
    },
    Scenario {
        name: "faults-all-apply-pv",
        summary: "apply is killed at each of its calls from the journal on",
        profile: &PV,
        run: |ctx| injected(ctx, Kind::Pv, "kill", 1, &[APPLY]),
    },
    Scenario {
        name: "faults-all-revert-pv",
        summary: "revert is killed at each of its calls from the journal on",
        profile: &PV,
        run: |ctx| injected(ctx, Kind::Pv, "kill", 1, &[REVERT]),
    },
    Scenario {
        name: "faults-all-replace-pv",
        summary: "replace is killed at each of its calls from the journal on",
        profile: &PV,
        run: |ctx| injected(ctx, Kind::Pv, "kill", 1, &[REPLACE]),
    },
    Scenario {
        name: "faults-recover-all-pv",
        summary: "killed at each of its calls, recover leaves what the next one settles",
        profile: &PV,
        run: |ctx| recover_dies(ctx, Kind::Pv, 1),
    },
    Scenario {
        name: "fails-all-pv",
        summary: "each of its calls from the journal on fails once: exit code and guest agree",
        profile: &PV,
        run: |ctx| injected(ctx, Kind::Pv, "fail", 1, &ACTIONS),
    },
    Scenario {
        name: "stops-pv",
        summary: "stopped at every 7th of its calls from the journal on, it is killed where it holds the guest",
        profile: &PV,
        run: |ctx| injected(ctx, Kind::Pv, "stop", 7, &ACTIONS),
    },
    Scenario {
        name: "kills-pvh",
        summary: "killed 60 times at random moments at work on a PVH guest",
        profile: &PVH,
        run: |ctx| random(ctx, Kind::Pvh, 60),
    },
];
