//! Scans the stacks of all tasks that are off their CPU, while the guest runs.

use locus_guest::addr::Gva;

use super::counters::SwitchCounters;
use super::list::{Added, GuestTasks, Listed};
use super::stack_scan::StackScan;
use super::task::{Finding, MappedTask};
use super::verdict::Verdict;
use crate::error::Result;

/// Proof that the stacks of all listed tasks were scanned, as far as the tasks were off their CPU.
pub struct Scanned<'t, 'k, 'm> {
    pub(super) tasks: &'t mut GuestTasks<'k, 'm>,
    pub(super) baseline: Baseline,
    pub(super) verdict: Verdict,
}

impl std::fmt::Debug for Scanned<'_, '_, '_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Scanned")
            .field("verdict", &self.verdict)
            .finish_non_exhaustive()
    }
}

/// What the look in the pause compares with. One without content makes it ask all tasks.
#[derive(Default)]
pub(super) struct Baseline {
    /// What the CPUs' counters of switches (`rq->nr_switches`) showed before the scan.
    pub(super) cpu_switches: Vec<u64>,
    /// The tasks that the scan did not find clear, and those born since.
    pub(super) not_cleared: Vec<Gva>,
    /// The counters at one moment after the scan, if there was such a moment.
    pub(super) counters: Option<SwitchCounters>,
}

impl Baseline {
    /// Adds the tasks that were born since the list was read, to the list and here.
    pub(super) fn catch_up(&mut self, tasks: &mut GuestTasks<'_, '_>) -> Result<()> {
        let added = tasks.add_births();
        let Ok(Added::Tasks(added)) = added else {
            *self = Baseline::default();
            return added.map(drop);
        };
        let born: Vec<Gva> = added.iter().map(|(task, _)| *task).collect();
        self.not_cleared.extend(&born);
        // What another task had counted at that address is not known any more.
        let counters = self.counters.take();
        let counters = counters.filter(|_| added.iter().all(|(_, is_first)| *is_first));
        self.counters = counters.and_then(|counters| counters.with_newborn(&born));
        Ok(())
    }
}

impl<'t, 'k, 'm> Listed<'t, 'k, 'm> {
    /// Scans, while the guest runs, the stacks of those tasks that are off their CPU. A task that was
    /// found clear before, and did not run since, is not scanned again.
    ///
    /// # Errors
    /// Memory can't be read.
    pub fn scan_off_cpu(self) -> Result<Scanned<'t, 'k, 'm>> {
        let tasks = self.tasks;
        // Before the scan: what is switched during it counts as switched since.
        let cpu_switches = tasks.cpus.count_switches()?;
        tasks.scans = tasks.scans.wrapping_add(1);
        let mut scan = StackScan::new(tasks);
        let mut not_cleared = Vec::new();
        for known in tasks.known.values() {
            // Read before what was found is believed, because that asks whether the task ran since.
            let now = known.switches()?;
            if !matches!(known.switches_at_scan.replace(now), before if before == 0 || before == now)
            {
                known.last_ran.set(tasks.scans);
            }
            if !scan_if_off_cpu(known, &mut scan)? {
                not_cleared.push(known.task.addr);
            }
        }
        let verdict = scan.verdict();
        Ok(Scanned {
            tasks,
            baseline: Baseline {
                cpu_switches,
                not_cleared,
                counters: None,
            },
            verdict,
        })
    }
}

impl Scanned<'_, '_, '_> {
    /// What the scan found: [`Verdict::Quiet`] or [`Verdict::Blocked`]. It says nothing of the tasks
    /// that were on a CPU.
    #[must_use]
    pub fn verdict(&self) -> &Verdict {
        &self.verdict
    }

    /// What the scan found, when its proof is not needed any more.
    #[must_use]
    pub fn into_verdict(self) -> Verdict {
        self.verdict
    }
}

/// Scans the stack of a task that is off its CPU, if it is not known or the task ran since; says
/// whether its stack is known to be clear.
pub(super) fn scan_if_off_cpu(
    known: &MappedTask,
    scan: &mut StackScan<'_, '_, '_>,
) -> Result<bool> {
    let finding = known.finding()?;
    if finding == Some(Finding::Clear) {
        return Ok(true);
    }
    let before = known.both_switches()?;
    known.note(None);
    // The order counts: a task that begins to run after this shows it below.
    let found = if known.is_on_cpu()? {
        None
    } else if scan.task(known, None)? {
        Some(Finding::Clear)
    } else {
        Some(finding.unwrap_or(Finding::Suspect))
    };
    let held = found.is_some() && !known.is_on_cpu()? && known.both_switches()? == before;
    if let Some(found) = found.filter(|_| held) {
        known.note(Some((before, found)));
    }
    Ok(held && found == Some(Finding::Clear))
}
