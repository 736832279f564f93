//! The moment of a change: repeats the steps until no thread is in the way, and makes the writes in the pause.

use std::time::{Duration, Instant};

use locus_guest as guest;
use locus_guest::space::Trail;
use locus_kernel::Kernel;

use super::options::Options;
use super::patience::{Patience, Wait};
use super::report::Done;
use super::write::{check_all, check_trail, map_all, unmap_all, write_all, MappedWrite};
use crate::blocker::Blocker;
use crate::error::{Blocked, Class, Error, Result};
use crate::guard::Spot;
use crate::machine::{Guard, Machine, Paused};
use crate::plan::Plan;
use crate::quiesce::{GuestTasks, Ready, Verdict, Watch};
use crate::say;
use crate::target::kprobes;

/// Attempts at which too many tasks ran between the scan and the pause. After these all tasks are asked
/// in the pause whether they ran.
const TOO_MANY_RAN_MAX: u32 = 8;
/// Most scans before a pause, while too many tasks run between the scan and what would be the pause.
const SCANS_MAX: u32 = 4;
/// From this wait on the stacks of sleeping threads are unwound, because threads that leave by themselves have left by
/// then.
const WAIT_LONG: Duration = Duration::from_millis(64);

/// Where no thread may be when `plan` is carried out.
pub(super) fn watch_of<'p>(plan: &'p Plan, options: &Options) -> Result<&'p Watch> {
    if !options.entry_only {
        return Ok(&plan.watch);
    }
    plan.entry_only.as_ref().ok_or_else(|| {
        Error::not_applicable(format!(
            "{}: --entry-only is for a payload whose author says, by MODULE_INFO(entry_only, \"Y\"), \
             that old and new versions of its functions may run at the same time, and that supersedes \
             no other; this one does not, so leave --entry-only out",
            plan.patch
        ))
    })
}

/// Carries out a plan as soon as no thread is in the way.
///
/// # Errors
/// [`Cause::Passing`](crate::error::Cause::Passing): a condition of the plan does not hold any more.
pub(crate) fn execute(
    machine: &dyn Machine,
    kernel: &Kernel<'_>,
    plan: &Plan,
    patience: &Patience<'_>,
) -> Result<Done> {
    let options = patience.options;
    let watch = watch_of(plan, options)?.with(kprobes::copies(kernel)?);
    let mut mapped = Vec::with_capacity(plan.writes.len());
    let mut spots = Vec::new();
    // A fresh view: what the page tables say now.
    let (space, mut trail) = (kernel.space.fresh(), Trail::default());
    for write in &plan.writes {
        let at = write.at;
        let frames = space.trace(at, write.new.len() as u64, &mut trail)?;
        if write.changes() {
            spots.extend(Spot::split(&frames, at.offset(), &write.expect, &write.new));
        }
        mapped.push(MappedWrite {
            write,
            frames,
            window: None,
            offset: at.offset(),
        });
    }
    let guard = machine.guard(&spots)?;
    let mut tasks = GuestTasks::new(kernel, &watch)?;
    let mut too_many_ran = 0;
    let mut wait = Wait::default();
    // Of the last attempt that could tell which threads were in the way, else of the last one.
    let mut last = Verdict::Quiet;
    loop {
        options.check_interrupted()?;
        let listed = match last {
            // Tasks that died meanwhile do not matter.
            Verdict::TasksChanged | Verdict::TooManyRan => tasks.catch_up()?,
            _ => tasks.list()?,
        };
        patience.count();
        // While the guest runs: a sleeper in the way is found without costing the guest a pause.
        let mut pause = Duration::ZERO;
        let mut scanned = listed.scan_off_cpu()?;
        if wait.0 >= WAIT_LONG && scanned.verdict().is_sleepers() {
            scanned = scanned.clear_by_unwind()?.scan_off_cpu()?;
        }
        let mut verdict = scanned.into_verdict();
        if !verdict.is_sleepers() {
            // Only what the page tables still lead to is mapped. The guardian may take a while, so it comes first.
            check_trail(&trail)?;
            guard.hold()?;
            map_all(machine, &mut mapped, &trail)?;
            // Called before the pause too, because what is used for the first time is slow.
            check_all(&mapped, &trail)?;
            let thorough = too_many_ran >= TOO_MANY_RAN_MAX;
            let (found, _ready, paused) = last_look(&*guard, &mut tasks, thorough, options)?;
            verdict = found;
            if verdict == Verdict::Quiet {
                let written = write_all(&mapped, &trail, || Ok(paused.writing()?));
                if let Err(error) = written {
                    return Err(undone(error, paused.end()));
                }
                let pause = paused.end().map_err(|e| stuck(plan, &e))?;
                let attempts = patience.attempts();
                return Ok(Done { pause, attempts });
            }
            pause = paused.end()?;
        }
        let at_once = verdict == Verdict::TooManyRan;
        let is_blocked = |v: &Verdict| matches!(v, Verdict::Blocked(_));
        if is_blocked(&verdict) || !is_blocked(&last) {
            last = verdict;
        }
        if patience.is_over(&wait) {
            return Err(gave_up(plan, kernel, last, patience, pause));
        }
        if at_once {
            too_many_ran += 1;
            continue;
        }
        // Not during a wait, however short: this process may be stopped in it.
        unmap_all(&mut mapped);
        guard.let_go();
        wait.pass();
    }
}

/// The change was not made; the pause `ended`. If the guest ran in the middle of it, nobody knows what that did.
fn undone(error: Error, ended: std::result::Result<Duration, guest::Error>) -> Error {
    match ended {
        Err(end) if error.class() == Class::RolledBack => Error::uncertain(format!(
            "{error}. But the pause did not end as it must: {end}. Run `xen-locus recover`"
        )),
        _ => error,
    }
}

/// The change was made, and then the guest could not be unpaused, or had run meanwhile.
fn stuck(plan: &Plan, error: &guest::Error) -> Error {
    Error::uncertain(format!(
        "{}: all was written, but the pause did not end as it must: {error}. `xl list` shows whether it is \
         paused; run `xen-locus recover`",
        plan.patch
    ))
}

fn gave_up(
    plan: &Plan,
    kernel: &Kernel<'_>,
    verdict: Verdict,
    patience: &Patience<'_>,
    pause: Duration,
) -> Error {
    let attempts = patience.attempts();
    let waited_ms = u64::try_from(patience.elapsed().as_millis()).unwrap_or(u64::MAX);
    let blockers = match verdict {
        blocked @ Verdict::Blocked(_) => blocked.blockers(kernel).unwrap_or_default(),
        Verdict::TooLong => {
            return Error::try_again(format!(
            "{}: the guest would have to be paused for longer than --max-pause allows (the last \
                 attempt was given up after {} us); nothing was changed",
            plan.patch,
            pause.as_micros()
        ))
        }
        Verdict::TasksChanged | Verdict::TooManyRan | Verdict::Quiet => {
            return Error::try_again(format!(
                "{}: in {} in {waited_ms} ms the guest always started or ran \
                 tasks between the listing of tasks and the pause; nothing was changed",
                plan.patch,
                say::count(attempts, "attempt", "attempts")
            ))
        }
    };
    Blocked {
        what: plan.patch.clone(),
        attempts,
        waited_ms,
        blockers,
    }
    .into()
}

/// The threads that are in the way of a change: in one of the ranges of `watch`, at one moment for which the guest is paused.
///
/// # Errors
/// [`Class::TryAgain`](crate::error::Class::TryAgain): no look succeeded within the time allowed. It was interrupted, or memory
/// can't be read.
pub fn blocking(
    machine: &dyn Machine,
    kernel: &Kernel<'_>,
    watch: &Watch,
    options: &Options,
) -> Result<Vec<Blocker>> {
    let began = Instant::now();
    let guard = machine.guard(&[])?;
    let mut tasks = GuestTasks::new(kernel, watch)?;
    let mut wait = Wait::default();
    loop {
        options.check_interrupted()?;
        tasks.list()?.scan_off_cpu()?.clear_by_unwind()?;
        guard.hold()?;
        let (verdict, _ready, paused) = last_look(&*guard, &mut tasks, true, options)?;
        paused.end()?;
        if let Some(blockers) = verdict.blockers(kernel) {
            return Ok(blockers);
        }
        if began.elapsed() + wait.0 >= options.timeout {
            break;
        }
        // Else a guest that can't be looked at would be paused all the time.
        wait.pass();
    }
    Err(Error::try_again(format!(
        "the guest's tasks could not be looked at in {} ms with pauses of at most {} ms: it starts \
         new ones all the time, or has too many; nothing was changed",
        began.elapsed().as_millis(),
        options.max_pause.as_millis()
    )))
}

/// Pauses the guest for the last look, and says what it showed while the guest is still paused. What
/// the look compared with is returned too, before the pause, so that it is freed after the pause.
fn last_look<'g, 't, 'k, 'm>(
    guard: &'g dyn Guard,
    tasks: &'t mut GuestTasks<'k, 'm>,
    thorough: bool,
    options: &Options,
) -> Result<(Verdict, Ready<'t, 'k, 'm>, Box<dyn Paused + 'g>)> {
    guard.wait_for_guardian_tick();
    let ready = get_ready(guard, tasks, thorough)?;
    let paused = guard.pause()?;
    let too_long = || paused.elapsed() > options.max_pause;
    // On a busy host the call that pauses may take long by itself, and the guest stands still meanwhile.
    let verdict = match too_long() {
        true => Verdict::TooLong,
        false => ready.look(&paused.vcpus()?, thorough, &too_long)?,
    };
    Ok((verdict, ready, paused))
}

/// Prepares the look in the pause: lists new tasks, scans, reads the counters and tries the look. Repeats
/// that while too many tasks run, or are born, in between.
fn get_ready<'t, 'k, 'm>(
    guard: &dyn Guard,
    mut tasks: &'t mut GuestTasks<'k, 'm>,
    thorough: bool,
) -> Result<Ready<'t, 'k, 'm>> {
    let mut scans = 0;
    loop {
        scans += 1;
        let scanned = tasks.catch_up()?.scan_off_cpu()?;
        let counted = scanned.snapshot_counters()?;
        let tried = counted.try_look(&guard.vcpus()?, thorough)?;
        if scans == SCANS_MAX || !tried.is_in_vain() {
            return Ok(tried.ready());
        }
        tasks = tried.again();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_rolled_back_is_uncertain_if_the_guest_ran_meanwhile() {
        let ran = || guest::Error::Unsupported("somebody else let it run".into());
        let rolled_back = || Error::rolled_back("writing failed midway");
        let said = undone(rolled_back(), Err(ran()));
        assert_eq!(said.class(), Class::Uncertain);
        assert!(said.to_string().contains("somebody else"), "{said}");
        let ended = undone(rolled_back(), Ok(Duration::ZERO));
        assert_eq!(ended.class(), Class::RolledBack);
        // Nothing was written.
        let early = undone(Error::try_again("it is traced"), Err(ran()));
        assert_eq!(early.class(), Class::TryAgain);
    }
}
