//! The look: is a thread in the way at this moment? It maps nothing. Its answer holds if the guest is
//! paused.

use locus_guest::Vcpu;

use super::counters::{SwitchCounters, ASKED_MAX};
use super::list::GuestTasks;
use super::scan::Baseline;
use super::snapshot::Snapshotted;
use super::stack_scan::{Live, Running, StackScan};
use super::task::MappedTask;
use super::verdict::Verdict;
use crate::error::Result;

/// Tasks between two questions whether the time is over.
const CLOCK_EVERY: u32 = 64;

/// Proof that a look was made while the guest ran, and that the tasks born until then are listed.
pub struct Tried<'t, 'k, 'm> {
    pub(super) tasks: &'t mut GuestTasks<'k, 'm>,
    pub(super) baseline: Baseline,
    verdict: Verdict,
}

/// All that the look in the pause needs. It only shares the list, so nothing can be listed or mapped
/// as long as it exists.
pub struct Ready<'t, 'k, 'm> {
    tasks: &'t GuestTasks<'k, 'm>,
    baseline: Baseline,
}

impl std::fmt::Debug for Tried<'_, '_, '_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tried")
            .field("verdict", &self.verdict)
            .finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Ready<'_, '_, '_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Ready").field(&self.tasks).finish()
    }
}

impl<'t, 'k, 'm> Snapshotted<'t, 'k, 'm> {
    /// Looks while the guest still runs, with the registers of `vcpus`, and then catches up with births.
    /// Code and memory that are used for the first time are slow. After this, the pause does not use
    /// them for the first time.
    ///
    /// # Errors
    /// Memory can't be read.
    pub fn try_look(self, vcpus: &[Vcpu], thorough: bool) -> Result<Tried<'t, 'k, 'm>> {
        let Snapshotted {
            tasks,
            mut baseline,
        } = self;
        let verdict = look(tasks, &baseline, vcpus, thorough, &|| false)?;
        baseline.catch_up(tasks)?;
        Ok(Tried {
            tasks,
            baseline,
            verdict,
        })
    }
}

impl<'t, 'k, 'm> Tried<'t, 'k, 'm> {
    /// Whether a pause would probably be in vain, because too many tasks ran or were born. The rest of
    /// what the look found is worth nothing, because the guest runs.
    #[must_use]
    pub fn is_in_vain(&self) -> bool {
        matches!(self.verdict, Verdict::TooManyRan | Verdict::TasksChanged)
    }

    /// Gives the list back, to begin again.
    #[must_use]
    pub fn again(self) -> &'t mut GuestTasks<'k, 'm> {
        self.tasks
    }

    /// Goes on to the pause.
    #[must_use]
    pub fn ready(self) -> Ready<'t, 'k, 'm> {
        Ready {
            tasks: self.tasks,
            baseline: self.baseline,
        }
    }
}

impl Ready<'_, '_, '_> {
    /// Looks, in the pause, at everything that may have changed since the scan. `vcpus` are the
    /// registers of the paused guest.
    ///
    /// Unless it is `thorough`, it gives up with [`Verdict::TooManyRan`] if it had to ask many tasks
    /// whether they ran. It gives up with [`Verdict::TooLong`] when `too_long` says so.
    ///
    /// # Errors
    /// Memory can't be read.
    pub fn look(
        &self,
        vcpus: &[Vcpu],
        thorough: bool,
        too_long: &dyn Fn() -> bool,
    ) -> Result<Verdict> {
        look(self.tasks, &self.baseline, vcpus, thorough, too_long)
    }
}

/// The tasks off their CPU that a look has to ask or to scan.
enum Scope<'b> {
    /// No CPU switched: only those that the scan did not find clear.
    NotCleared,
    /// The tasks that ran recently explain all switches: only these, and only so many of them ran.
    RanRecently(&'b SwitchCounters, usize),
    /// Any task may have run.
    All,
}

impl Scope<'_> {
    /// What has to be asked, now that the CPUs count `switches`; `None` if it is too much.
    fn of<'b>(
        tasks: &GuestTasks<'_, '_>,
        baseline: &'b Baseline,
        switches: &[u64],
        thorough: bool,
    ) -> Result<Option<Scope<'b>>> {
        // What a CPU without a counter did is not known.
        let known = !switches.is_empty() && tasks.cpus.all_count_switches();
        if known && switches == baseline.cpu_switches {
            return Ok(Some(Scope::NotCleared));
        }
        if let Some(counters) = &baseline.counters {
            if let Some(asked) = counters.explain(tasks, switches)? {
                return Ok(Some(Scope::RanRecently(counters, asked)));
            }
        }
        let too_many = !thorough && tasks.known.len() > ASKED_MAX;
        Ok((!too_many).then_some(Scope::All))
    }
}

/// The look itself; see [`Ready::look`].
pub(super) fn look(
    tasks: &GuestTasks<'_, '_>,
    baseline: &Baseline,
    vcpus: &[Vcpu],
    thorough: bool,
    too_long: &dyn Fn() -> bool,
) -> Result<Verdict> {
    if tasks.changed()? {
        return Ok(Verdict::TasksChanged);
    }
    let switches = tasks.cpus.count_switches()?;
    let Some(scope) = Scope::of(tasks, baseline, &switches, thorough)? else {
        return Ok(Verdict::TooManyRan);
    };
    let mut scan = StackScan::within(tasks, too_long);
    let running = on_cpus(tasks, vcpus, &mut scan)?;
    let mut off_cpus = OffCpus {
        scan: &mut scan,
        running: &running,
        done: 0,
    };
    off_cpus.scan(tasks, baseline, &scope)?;
    Ok(scan.verdict())
}

/// Scans what is on a CPU, and says which tasks those are. The guest says much of what is there, so each step asks whether the
/// time is over.
fn on_cpus(
    tasks: &GuestTasks<'_, '_>,
    vcpus: &[Vcpu],
    scan: &mut StackScan<'_, '_, '_>,
) -> Result<Running> {
    let mut running = Running::default();
    for vcpu in vcpus.iter().filter(|v| v.online) {
        if scan.is_late() {
            return Ok(running);
        }
        scan.vcpu(vcpu, &mut running)?;
    }
    for (addr, live) in running.iter() {
        if scan.is_late() {
            break;
        }
        if let Some(known) = tasks.known.get(&addr) {
            scan.task(known, Some(live))?;
        }
    }
    // A CPU that is down keeps the task in which it went down. No counter says that this task was switched to. CPUs that
    // never were up have one such task in common.
    for known in tasks.cpus.all.iter().filter_map(|cpu| tasks.current(cpu)) {
        if !running.contains(known.task.addr) {
            if scan.is_late() {
                return Ok(running);
            }
            scan.task(known, None)?;
            running.add(known.task.addr, Live::Nothing);
        }
    }
    Ok(running)
}

/// Scans tasks that are off their CPU.
struct OffCpus<'a, 's, 'k, 'm> {
    scan: &'a mut StackScan<'s, 'k, 'm>,
    running: &'a Running,
    done: u32,
}

impl OffCpus<'_, '_, '_, '_> {
    /// Scans those of `scope`, as long as there is time.
    fn scan(
        &mut self,
        tasks: &GuestTasks<'_, '_>,
        baseline: &Baseline,
        scope: &Scope<'_>,
    ) -> Result<()> {
        match scope {
            Scope::NotCleared => {
                let known = baseline.not_cleared.iter();
                for known in known.filter_map(|task| tasks.known.get(task)) {
                    if !self.task(known, false)? {
                        break;
                    }
                }
            }
            Scope::RanRecently(counters, asked) => {
                for (n, counter) in counters.tasks.iter().enumerate() {
                    let Some(known) = tasks.known.get(&counter.task) else {
                        continue;
                    };
                    if counter.is_clear(known, n < *asked)? {
                        continue;
                    }
                    // It may have been scanned since.
                    let is_clear = known.is_clear()?;
                    if !self.task(known, is_clear)? {
                        break;
                    }
                }
            }
            Scope::All => {
                for known in tasks.known.values() {
                    let is_clear = known.is_clear()?;
                    if !self.task(known, is_clear)? {
                        break;
                    }
                }
            }
        }
        Ok(())
    }

    /// Scans a task unless it is clear; says whether there is time for more.
    fn task(&mut self, known: &MappedTask, is_clear: bool) -> Result<bool> {
        if !is_clear && !self.running.contains(known.task.addr) {
            self.scan.task(known, None)?;
        }
        self.done += 1;
        let ask = self.done.is_multiple_of(CLOCK_EVERY) || self.scan.was_late();
        Ok(!(ask && self.scan.is_late()))
    }
}
