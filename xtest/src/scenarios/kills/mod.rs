//! The tool is killed at any moment. The guest runs on, and is wholly old or wholly new.

mod actions;
mod around;
mod both_die;
mod injected;
mod random;
mod scarce;
mod subject;

use crate::guest::Kind;
use crate::profile::{PV, PV1, PV4, PVH};
use crate::scenario::{Ctx, Scenario};
use crate::scenarios::steps::beside::with_xl;
use crate::verdict::Verdict;
use actions::{Action, ACTIONS, APPLY, REPLACE, REVERT};
use around::Around;
use both_die::{both_die, recover_dies};
use injected::{injected, injected_with, Injection};
use random::random;
use scarce::{no_journal, no_memory};

/// Scenarios that are short enough for a usual run.
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
            "killed at every 61st of its calls after the journal, it leaves the guest old or new",
        profile: &PV1,
        run: |ctx| injected(ctx, Kind::Pv, "kill", 61, &ACTIONS),
    },
    Scenario {
        name: "both-die-pv",
        summary: "if the guardian is killed too, the guest stays paused until recover resolves the change",
        profile: &PV,
        run: |ctx| both_die(ctx, Kind::Pv),
    },
    Scenario {
        name: "no-pidfd-pv",
        summary: "where the kernel has no handles of processes, a run that is stopped in its pause is killed all \
                  the same",
        profile: &PV,
        run: no_pidfd,
    },
    Scenario {
        name: "faults-recover-pv",
        summary: "if recover is killed as well, at every 37th of its calls, the next one resolves the change",
        profile: &PV1,
        run: |ctx| recover_dies(ctx, Kind::Pv, 37),
    },
    Scenario {
        name: "no-journal-pv",
        summary: "no room for the journal or the guardian's file: exit 1, nothing done; for the log: the \
                  next run logs it",
        profile: &PV1,
        run: |ctx| no_journal(ctx, Kind::Pv),
    },
    Scenario {
        name: "no-memory-pv",
        summary: "with any amount of memory that is too little, it says so, and the guest is old or new",
        profile: &PV1,
        run: |ctx| no_memory(ctx, Kind::Pv),
    },
];

/// Scenarios that take too long for a usual run.
pub const MATRIX: &[Scenario] = &[
    Scenario {
        name: "kills-200-pv",
        summary: "killed 200 times at random moments",
        profile: &PV,
        run: |ctx| random(ctx, Kind::Pv, 200),
    },
    Scenario {
        name: "faults-all-apply-pv",
        summary: "apply is killed at each of its calls after the journal",
        profile: &PV,
        run: |ctx| injected(ctx, Kind::Pv, "kill", 1, &[APPLY]),
    },
    Scenario {
        name: "faults-all-revert-pv",
        summary: "revert is killed at each of its calls after the journal",
        profile: &PV,
        run: |ctx| injected(ctx, Kind::Pv, "kill", 1, &[REVERT]),
    },
    Scenario {
        name: "faults-all-replace-pv",
        summary: "replace is killed at each of its calls after the journal",
        profile: &PV,
        run: |ctx| injected(ctx, Kind::Pv, "kill", 1, &[REPLACE]),
    },
    Scenario {
        name: "faults-recover-all-pv",
        summary: "recover is killed at each of its calls, and the next one resolves the change",
        profile: &PV,
        run: |ctx| recover_dies(ctx, Kind::Pv, 1),
    },
    Scenario {
        name: "fails-all-pv",
        summary: "each of its calls after the journal fails once: exit code and guest agree",
        profile: &PV,
        run: |ctx| injected(ctx, Kind::Pv, "fail", 1, &ACTIONS),
    },
    Scenario {
        name: "fails-all-pvh",
        summary: "each of its calls on a PVH guest fails once: exit code and guest agree",
        profile: &PVH,
        run: |ctx| injected(ctx, Kind::Pvh, "fail", 1, &ACTIONS),
    },
    Scenario {
        name: "no-memory-pvh",
        summary: "with too little memory for a PVH guest, it says so, and the guest is old or new",
        profile: &PVH,
        run: |ctx| no_memory(ctx, Kind::Pvh),
    },
    Scenario {
        name: "layers-apply-pv",
        summary: "apply, two times of four on another layer than before, is killed at each of its calls",
        profile: &PV,
        run: |ctx| killed_amid(ctx, Kind::Pv, Around::Layers, APPLY),
    },
    Scenario {
        name: "layers-revert-pv",
        summary: "revert, two times of four between two other patches, is killed at each of its calls",
        profile: &PV,
        run: |ctx| killed_amid(ctx, Kind::Pv, Around::Layers, REVERT),
    },
    Scenario {
        name: "layers-replace-pv",
        summary: "replace, two times of four of two patches, is killed at each of its calls",
        profile: &PV,
        run: |ctx| killed_amid(ctx, Kind::Pv, Around::Layers, REPLACE),
    },
    Scenario {
        name: "probes-apply-pv",
        summary: "apply is killed at each of its calls, and kprobes are registered before recover",
        profile: &PV,
        run: |ctx| killed_amid(ctx, Kind::Pv, Around::Probes, APPLY),
    },
    Scenario {
        name: "probes-revert-pv",
        summary: "revert is killed at each of its calls, and kprobes are registered before recover",
        profile: &PV,
        run: |ctx| killed_amid(ctx, Kind::Pv, Around::Probes, REVERT),
    },
    Scenario {
        name: "probes-apply-pvh",
        summary: "apply to a PVH guest is killed at each of its calls, and kprobes are registered before recover",
        profile: &PVH,
        run: |ctx| killed_amid(ctx, Kind::Pvh, Around::Probes, APPLY),
    },
    Scenario {
        name: "last-room-pv",
        summary: "a payload that has the last room of a PV guest is killed at each call of apply",
        profile: &PV,
        run: |ctx| killed_amid(ctx, Kind::Pv, Around::LastRoom, APPLY),
    },
    Scenario {
        name: "last-room-pvh",
        summary: "a payload that has the last room of a PVH guest is killed at each call of apply",
        profile: &PVH,
        run: |ctx| killed_amid(ctx, Kind::Pvh, Around::LastRoom, APPLY),
    },
    Scenario {
        name: "stops-pv",
        summary: "stopped at every 7th of its calls after the journal, it is killed if it holds the guest",
        profile: &PV,
        run: |ctx| injected(ctx, Kind::Pv, "stop", 7, &ACTIONS),
    },
    Scenario {
        name: "kills-pvh",
        summary: "killed 60 times at random moments while it changes a PVH guest",
        profile: &PVH,
        run: |ctx| random(ctx, Kind::Pvh, 60),
    },
    Scenario {
        name: "kills-200-pv4",
        summary: "killed 200 times at random moments, while its guardian and xl run on other CPUs",
        profile: &PV4,
        run: |ctx| with_xl(ctx, |ctx| random(ctx, Kind::Pv, 200)),
    },
    Scenario {
        name: "faults-all-apply-pv4",
        summary: "apply is killed at each of its calls, while its guardian and xl run on other CPUs",
        profile: &PV4,
        run: |ctx| with_xl(ctx, |ctx| injected(ctx, Kind::Pv, "kill", 1, &[APPLY])),
    },
    Scenario {
        name: "stops-pv4",
        summary: "stopped at every 7th of its calls, while its guardian and xl run on other CPUs",
        profile: &PV4,
        run: |ctx| with_xl(ctx, |ctx| injected(ctx, Kind::Pv, "stop", 7, &ACTIONS)),
    },
    Scenario {
        name: "both-die-pv4",
        summary: "run and guardian are killed on different CPUs, and recover resolves the change",
        profile: &PV4,
        run: |ctx| with_xl(ctx, |ctx| both_die(ctx, Kind::Pv)),
    },
];

/// Kills an action at each of its calls while something stands around it.
fn killed_amid(ctx: &mut Ctx, kind: Kind, around: Around, action: Action) -> Result<(), Verdict> {
    let injection = Injection {
        what: "kill",
        step: 1,
        around,
        variable: "",
    };
    injected_with(ctx, kind, injection, &[action])
}

fn no_pidfd(ctx: &mut Ctx) -> Result<(), Verdict> {
    let injection = Injection {
        what: "stop",
        step: 29,
        around: Around::Nothing,
        variable: "XEN_LOCUS_NO_PIDFD=1",
    };
    injected_with(ctx, Kind::Pv, injection, &[APPLY])
}
