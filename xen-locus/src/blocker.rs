//! A thread that blocks a change, and the reason.

use std::collections::HashSet;

use serde::Serialize;

/// Why a thread blocks a change, in the kernel's vocabulary (kernel/livepatch/transition.c).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reason {
    /// On a CPU, inside the function.
    Running,
    /// Off the CPU, with the function on its stack.
    SleepingOn,
    /// A signal cut its system call short, which will go on in the function (`restart_block`).
    RestartBlock,
    /// Its stack can't be judged at this moment.
    UnreliableStack,
}

impl std::fmt::Display for Reason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Reason::Running => "running",
            Reason::SleepingOn => "sleeping-on",
            Reason::RestartBlock => "restart-block",
            Reason::UnreliableStack => "unreliable-stack",
        })
    }
}

/// A thread that blocks a change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Blocker {
    /// Thread id; 0 for an idle task or a vCPU whose task isn't known.
    pub pid: u32,
    /// Name of the thread, as in `/proc/PID/comm`.
    pub comm: String,
    /// The reason.
    pub reason: Reason,
    /// The function it is in, where known.
    pub function: String,
    /// Offset of the address found, from the function's start.
    pub offset: u64,
}

/// Number of threads: one thread may be in several functions.
#[must_use]
pub fn threads(blockers: &[Blocker]) -> usize {
    let ids: HashSet<_> = blockers.iter().map(|b| (b.pid, &b.comm)).collect();
    ids.len()
}
