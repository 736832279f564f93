//! Carries out a plan: pause the guest, look where its threads are, write, verify, unpause.
//!
//! What can be done before the pause is done before it: the new code is in the arena, and every page to be written and every
//! stack is mapped. Pages to be written are mapped for an attempt, and not while a long wait passes between two. In the pause: registers, the last look, the writes.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use locus_guest as guest;
use locus_guest::space::Trail;
use locus_kernel::Kernel;
use locus_payload::Payload;
use sha2::{Digest, Sha256};

use crate::arena::record::{Slot, State};
use crate::arena::{self, Arena};
use crate::blocker::Blocker;
use crate::error::{Blocked, Error, Result};
use crate::guard::Spot;
use crate::machine::{Guard, Machine, Paused};
use crate::operation::Operation;
use crate::plan::{self, Mode, Plan, Prepared, Readiness, Stack};
use crate::quiesce::{GuestTasks, Ready, Verdict, Watch};
use crate::storage::journal::Change;

mod options;
mod report;
mod write;

pub use options::Options;
use report::Concerned;
pub use report::{nothing_to_do, Outcome, Report};
pub(crate) use report::{report, Done};
use write::{check_all, map_all, unmap_all, write_all, Target};

/// Attempts at which too many tasks ran between the scan and the pause. After these all tasks are asked
/// in the pause whether they ran.
const TOO_MANY_RAN_MAX: u32 = 8;
/// Most scans before a pause, while too many tasks run between the scan and what would be the pause.
const SCANS_MAX: u32 = 4;
/// Shortest wait between two attempts.
const WAIT_MIN: Duration = Duration::from_millis(1);
/// Longest wait between two attempts.
const WAIT_MAX: Duration = Duration::from_millis(500);

/// From this wait on the stacks of sleeping threads are unwound, because threads that leave by themselves have left by
/// then; and no page of the guest stays mapped to be written during the wait.
const WAIT_LONG: Duration = Duration::from_millis(64);

/// Applies a payload on top of the patches that are there, or in their place.
///
/// # Errors
/// See [`Error`]: the guest is then unchanged, or the message says otherwise.
pub fn apply(
    machine: &dyn Machine,
    kernel: &Kernel<'_>,
    payload: &Payload,
    mode: Mode,
    options: &Options,
) -> Result<Report> {
    kernel.check_runs()?;
    let mut arena = Arena::read(kernel)?;
    plan::resolve_interrupted(kernel, &mut arena)?;
    let ready = plan::prepare(kernel, &arena, payload, mode)?;
    let dry = Report::dry(payload, &ready);
    if let Readiness::Ready(ready) = &ready {
        watch_of(&ready.plan, options)?;
        let pages = (ready.first, ready.layout.rights.len());
        arena.check_memory(machine, kernel.kind, pages)?;
    }
    let ready = match ready {
        Readiness::Ready(ready) if !options.dry_run => ready,
        _ => return Ok(dry),
    };
    let superseded = ready.superseded.iter().map(|r| &r.record);
    let concerned = Concerned::of(superseded.chain([&ready.record]));
    let before = concerned.digest(kernel)?;
    let record = hex::encode(Sha256::digest(&ready.record_json));
    machine.begin(&Change {
        record: record.clone(),
        ..Change::new(kernel, Operation::Apply, &ready.record, &ready.plan)
    })?;
    let done = place(machine, kernel, &mut arena, &ready)
        .and_then(|()| carry_out(machine, kernel, &mut arena, &ready.plan, options));
    let done = ended(machine, kernel, done)?;
    let report = report(&payload.name, Outcome::Applied, dry.functions, done);
    Ok(Report {
        superseded: dry.superseded,
        sha256: dry.sha256,
        record,
        text: concerned.change(kernel, before),
        ..report
    })
}

/// Undoes the payload called `name`.
///
/// # Errors
/// As [`apply`]; [`Class::Failed`](crate::error::Class::Failed) when another patch lies on it.
pub fn revert(
    machine: &dyn Machine,
    kernel: &Kernel<'_>,
    name: &str,
    options: &Options,
) -> Result<Report> {
    let mut arena = Arena::read(kernel)?;
    let residents = plan::resolve_interrupted(kernel, &mut arena)?;
    let stack = Stack::new(&residents);
    let Some(resident) = stack.named(&residents, name)? else {
        return Ok(report(name, Outcome::Already, 0, Done::default()));
    };
    let functions = resident.record.functions.len();
    let plan = plan::undo(kernel, &stack, resident)?;
    watch_of(&plan, options)?;
    if options.dry_run {
        return Ok(report(
            name,
            Outcome::WouldRevert,
            functions,
            Done::default(),
        ));
    }
    let concerned = Concerned::of(std::iter::once(&resident.record));
    let before = concerned.digest(kernel)?;
    let mut slots = arena.directory.slots.clone();
    if let Some(slot) = slots.get_mut(resident.index) {
        slot.state = State::Reverting;
    }
    machine.begin(&Change::new(
        kernel,
        Operation::Revert,
        &resident.record,
        &plan,
    ))?;
    let done = arena
        .commit(machine, kernel, slots)
        .and_then(|()| carry_out(machine, kernel, &mut arena, &plan, options));
    let done = ended(machine, kernel, done)?;
    Ok(Report {
        sha256: resident.record.sha256.clone(),
        text: concerned.change(kernel, before),
        ..report(name, Outcome::Reverted, functions, done)
    })
}

/// Closes the journal, unless the guest's directory still shows a change as under way.
fn ended(machine: &dyn Machine, kernel: &Kernel<'_>, done: Result<Done>) -> Result<Done> {
    let is_decided = || {
        let arena = Arena::read(kernel)?;
        let under_way = |s: &Slot| matches!(s.state, State::Applying | State::Reverting);
        Ok::<_, Error>(!arena.directory.slots.iter().any(under_way))
    };
    // A directory that can't be read may show one.
    if done.is_ok() || is_decided().unwrap_or(false) {
        machine.ended();
    }
    done
}

/// Reverts all patches, the topmost first, until one can't be reverted or `tell` returns false. `tell` gets the result of each.
/// A dry run says of each what would happen once those on top are gone.
///
/// # Errors
/// The guest's arena can't be read. What goes wrong with a patch is passed to `tell`.
pub fn revert_all(
    machine: &dyn Machine,
    kernel: &Kernel<'_>,
    options: &Options,
    mut tell: impl FnMut(&str, Result<Report>) -> bool,
) -> Result<()> {
    let residents = plan::residents(kernel, &Arena::read(kernel)?)?;
    let stack = Stack::new(&residents);
    for resident in stack.applied().iter().rev() {
        let name = &resident.record.name;
        let result = if options.dry_run {
            let functions = resident.record.functions.len();
            stack
                .check_holds(kernel, resident)
                .map(|()| report(name, Outcome::WouldRevert, functions, Done::default()))
        } else {
            revert(machine, kernel, name, options)
        };
        let failed = result.is_err();
        if !tell(name, result) || failed {
            break;
        }
    }
    Ok(())
}

/// The threads that are in the way of a change: in one of the ranges of `watch`, at one moment for which the guest is paused.
///
/// # Errors
/// [`Class::TryAgain`](crate::error::Class::TryAgain): no look succeeded within the time allowed, or memory can't be read.
pub fn blocking(
    machine: &dyn Machine,
    kernel: &Kernel<'_>,
    watch: &Watch,
    options: &Options,
) -> Result<Vec<Blocker>> {
    let began = Instant::now();
    let guard = machine.guard(&[])?;
    let mut tasks = GuestTasks::new(kernel, watch)?;
    let mut wait = WAIT_MIN;
    while began.elapsed() < options.timeout && !options.interrupted.load(Ordering::SeqCst) {
        tasks.list()?.scan_off_cpu()?.clear_by_unwind()?;
        let (verdict, _ready, paused) = last_look(&*guard, &mut tasks, true, options)?;
        paused.end()?;
        if let Some(blockers) = verdict.blockers() {
            return Ok(blockers);
        }
        // Else a guest that can't be looked at would be paused all the time.
        std::thread::sleep(wait);
        wait = (wait * 2).min(WAIT_MAX);
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
        let counted = scanned.snapshot_counters(|| Ok(guard.vcpus()?))?;
        let tried = counted.try_look(&guard.vcpus()?, thorough)?;
        if scans == SCANS_MAX || !tried.is_in_vain() {
            return Ok(tried.ready());
        }
        tasks = tried.again();
    }
}

/// Carries out a plan whose patches the directory shows as under way, and writes to the directory what became of them.
fn carry_out(
    machine: &dyn Machine,
    kernel: &Kernel<'_>,
    arena: &mut Arena,
    plan: &Plan,
    options: &Options,
) -> Result<Done> {
    match execute(machine, kernel, plan, options) {
        Ok(done) => {
            let mut slots = arena.directory.slots.clone();
            for slot in &mut slots {
                if slot.state == State::Applying {
                    slot.applied_at = arena::now();
                }
                slot.state = slot.state.after_change(true);
            }
            // If the directory can't be written: the redirects in the text say the same, and they decide.
            let _ = arena.commit(machine, kernel, slots);
            Ok(done)
        }
        Err(error) => {
            // Whatever went wrong, the guest's text tells whether the change took place. If it does not, the directory still
            // shows the change as under way.
            if plan::resolve_interrupted(kernel, arena).is_ok() {
                // Nothing refers to code that is not in force. It stays for the next attempt.
                let slots = arena.directory.slots.clone();
                arena.commit(machine, kernel, slots)?;
            }
            Err(error)
        }
    }
}

/// Writes a payload's code to the arena, and an entry for it to the end of the directory: as being applied. The payloads that
/// it supersedes are shown as being reverted. Nothing that the directory leads to is overwritten.
fn place(
    machine: &dyn Machine,
    kernel: &Kernel<'_>,
    arena: &mut Arena,
    ready: &Prepared,
) -> Result<()> {
    let mut slots = arena.directory.slots.clone();
    for superseded in &ready.superseded {
        if let Some(slot) = slots.get_mut(superseded.index) {
            slot.state = State::Reverting;
        }
    }
    if let Some(index) = ready.parked.filter(|&index| index < slots.len()) {
        slots.remove(index);
        if !ready.entered {
            // All of it is written anew. The guest does not know it, so its pages are nobody's without the entry.
            let mut others = arena.directory.slots.clone();
            others.remove(index);
            arena.commit(machine, kernel, others)?;
        }
    }
    arena.add(machine, kernel, ready.first, &ready.layout.rights)?;
    for part in &ready.fresh {
        let bytes = ready.image.bytes.get(part.clone()).ok_or_else(|| {
            Error::failed(format!(
                "bytes {part:?} are not in the payload's image: this is a defect of xen-locus"
            ))
        })?;
        let at = arena::page_address(ready.first).plus(part.start as u64);
        arena.write(machine, at, bytes)?;
    }
    let too_big = |_| Error::failed("the payload's place does not fit the directory");
    let slot = Slot {
        state: State::Applying,
        first: u16::try_from(ready.first).map_err(too_big)?,
        pages: u16::try_from(ready.layout.rights.len()).map_err(too_big)?,
        applied_at: arena::now(),
        record_offset: u32::try_from(ready.record_place.start).map_err(too_big)?,
        record_len: u32::try_from(ready.record_json.len()).map_err(too_big)?,
        record_sha256: Sha256::digest(&ready.record_json).into(),
    };
    slots.push(slot);
    arena.commit(machine, kernel, slots)
}

/// Where no thread may be when `plan` is carried out.
fn watch_of<'p>(plan: &'p Plan, options: &Options) -> Result<&'p Watch> {
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
pub(crate) fn execute(
    machine: &dyn Machine,
    kernel: &Kernel<'_>,
    plan: &Plan,
    options: &Options,
) -> Result<Done> {
    let began = Instant::now();
    let mut targets = Vec::with_capacity(plan.writes.len());
    let mut spots = Vec::new();
    // A fresh view: what the page tables say now.
    let (space, mut trail) = (kernel.space.fresh(), Trail::default());
    for write in &plan.writes {
        let at = write.at;
        let frames = space.trace(at, write.new.len() as u64, &mut trail)?;
        if write.new != write.expect {
            spots.extend(Spot::split(&frames, at.offset(), &write.expect, &write.new));
        }
        targets.push(Target {
            write,
            frames,
            window: None,
            offset: at.offset(),
        });
    }
    let guard = machine.guard(&spots)?;
    let mut tasks = GuestTasks::new(kernel, watch_of(plan, options)?)?;
    let mut attempts = 0;
    let mut too_many_ran = 0;
    let mut wait = WAIT_MIN;
    // Of the last attempt that could tell who was in the way, else of the last one.
    let mut last = Verdict::Quiet;
    loop {
        options.check_interrupted()?;
        let listed = match last {
            // Tasks that died meanwhile do not matter.
            Verdict::TasksChanged | Verdict::TooManyRan => tasks.catch_up()?,
            _ => tasks.list()?,
        };
        attempts += 1;
        // While the guest runs: a sleeper in the way is found without costing the guest a pause.
        let mut pause = Duration::ZERO;
        let mut scanned = listed.scan_off_cpu()?;
        if wait >= WAIT_LONG && scanned.verdict().is_sleepers() {
            scanned = scanned.clear_by_unwind()?.scan_off_cpu()?;
        }
        let mut verdict = scanned.into_verdict();
        if !verdict.is_sleepers() {
            map_all(machine, &mut targets, &trail)?;
            guard.hold()?;
            // Called before the pause too, because what is used for the first time is slow.
            check_all(&targets, &trail)?;
            let thorough = too_many_ran >= TOO_MANY_RAN_MAX;
            let (found, _ready, paused) = last_look(&*guard, &mut tasks, thorough, options)?;
            verdict = found;
            if verdict == Verdict::Quiet {
                write_all(&targets, &trail, || Ok(paused.writing()?))?;
                let pause = paused.end().map_err(|e| stuck(plan, &e))?;
                return Ok(Done { pause, attempts });
            }
            pause = paused.end()?;
        }
        let at_once = verdict == Verdict::TooManyRan;
        let is_blocked = |v: &Verdict| matches!(v, Verdict::Blocked(_));
        if is_blocked(&verdict) || !is_blocked(&last) {
            last = verdict;
        }
        if began.elapsed() + wait >= options.timeout {
            return Err(gave_up(plan, last, attempts, began.elapsed(), pause));
        }
        if at_once {
            too_many_ran += 1;
            continue;
        }
        if wait >= WAIT_LONG {
            unmap_all(&mut targets);
            guard.let_go();
        }
        std::thread::sleep(wait);
        wait = (wait * 2).min(WAIT_MAX);
    }
}

/// The change was made, and then the guest could not be unpaused.
fn stuck(plan: &Plan, error: &guest::Error) -> Error {
    Error::uncertain(format!(
        "{}: all was written, but the guest could not be unpaused: {error}. `xl list` shows whether it is \
         paused; run `xen-locus recover`",
        plan.patch
    ))
}

fn gave_up(
    plan: &Plan,
    verdict: Verdict,
    attempts: u32,
    waited: Duration,
    pause: Duration,
) -> Error {
    let waited_ms = u64::try_from(waited.as_millis()).unwrap_or(u64::MAX);
    let blockers = match verdict {
        blocked @ Verdict::Blocked(_) => blocked.blockers().unwrap_or_default(),
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
                "{}: in {attempts} attempts in {waited_ms} ms the guest always started or ran \
                 tasks between the listing of tasks and the pause; nothing was changed",
                plan.patch
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

#[cfg(test)]
pub(crate) mod mock;
#[cfg(test)]
mod tests;
