//! Reads the counters of switches at one moment, right before the pause and while the guest runs.

use locus_guest::addr::Gva;

use super::counters::{SwitchCounters, ASKED_MAX};
use super::list::GuestTasks;
use super::scan::{scan_if_off_cpu, Baseline, Scanned};
use super::stack_scan::StackScan;
use super::task::{Finding, MappedTask};
use crate::error::Result;

/// So many scans long a task that ran is thought to run again soon.
const RECENT_SCANS: u32 = 8;

/// Proof that all stacks were scanned, and that the counters of switches were read after that.
pub struct Snapshotted<'t, 'k, 'm> {
    pub(super) tasks: &'t mut GuestTasks<'k, 'm>,
    pub(super) baseline: Baseline,
}

impl std::fmt::Debug for Snapshotted<'_, '_, '_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Snapshotted")
            .field("counters", &self.baseline.counters.is_some())
            .finish_non_exhaustive()
    }
}

impl<'t, 'k, 'm> Scanned<'t, 'k, 'm> {
    /// Reads the counters of switches at one moment, while the guest runs. If there is no such moment, or too many tasks ran
    /// recently, the look has to ask all tasks.
    ///
    /// # Errors
    /// Memory can't be read.
    pub fn snapshot_counters(self) -> Result<Snapshotted<'t, 'k, 'm>> {
        let Scanned {
            tasks, baseline, ..
        } = self;
        let counters = snapshot(tasks)?;
        Ok(Snapshotted {
            tasks,
            baseline: Baseline {
                counters,
                ..baseline
            },
        })
    }
}

fn snapshot(tasks: &GuestTasks<'_, '_>) -> Result<Option<SwitchCounters>> {
    let recent = recently_ran(tasks);
    // If a CPU did not count, its tasks could explain what the tasks of another CPU left open.
    if recent.len() > ASKED_MAX || !tasks.cpus.all_count_switches() {
        return Ok(None);
    }
    let counters = SwitchCounters::at_one_moment(tasks, &recent)?;
    let mut others_ran = false;
    for (task, known) in &tasks.known {
        if known.switches_at_scan.get() != known.switches()? && !recent.contains(task) {
            known.last_ran.set(tasks.scans);
            others_ran = true;
        }
    }
    match counters.filter(|_| !others_ran) {
        Some(counters) => Ok(Some(move_forward(tasks, counters)?)),
        None => Ok(None),
    }
}

/// Scans those tasks again that ran since they were scanned, and moves the moment of the counters
/// behind that. It takes as long for fifty tasks as for ten thousand, so that few tasks run between that
/// moment and the pause. If it fails, the counters from before stay valid.
fn move_forward(tasks: &GuestTasks<'_, '_>, before: SwitchCounters) -> Result<SwitchCounters> {
    let recent: Vec<Gva> = before.tasks.iter().map(|counter| counter.task).collect();
    let mut scan = StackScan::new(tasks);
    for known in recent.iter().filter_map(|task| tasks.known.get(task)) {
        scan_if_off_cpu(known, &mut scan)?;
    }
    // What it found is noted with each task.
    scan.verdict();
    match SwitchCounters::at_one_moment(tasks, &recent)? {
        Some(after) if before.explain_all(tasks, &after)? => Ok(after),
        _ => Ok(before),
    }
}

/// The tasks that the last scan did not find clear, that were born since, or that ran recently. The one
/// that ran last comes first.
fn recently_ran(tasks: &GuestTasks<'_, '_>) -> Vec<Gva> {
    let is_recent = |known: &&MappedTask| {
        let last = known.last_ran.get();
        known.last_finding() != Some(Finding::Clear)
            || (last != 0 && last + RECENT_SCANS > tasks.scans)
    };
    let mut found: Vec<&MappedTask> = tasks.known.values().filter(is_recent).collect();
    found.sort_by_key(|known| std::cmp::Reverse(known.last_ran.get()));
    found.into_iter().map(|known| known.task.addr).collect()
}
