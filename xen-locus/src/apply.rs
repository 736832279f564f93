//! Carries out a plan: look while the guest is paused, write, verify, unpause.
//!
//! All that can be done before the pause is done before it: the new code stands in the arena, every
//! page to be written and every stack is mapped. Inside it: registers, the last look, the writes.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::addr::Gva;
use crate::error::{Error, Result};
use crate::guard::Spot;
use crate::guest::space::Trail;
use crate::guest::{Guard, Machine, Paused, WindowMut};
use crate::journal::{Change, Op};
use crate::kernel::Kernel;
use crate::link::arena::{self, Arena};
use crate::link::record::{Slot, State};
use crate::patch::Payload;
use crate::plan::{self, Mode, Plan, Prepared, Readiness, Stack};
use crate::quiesce::{Blocker, Prescan, Verdict, Watch};
use sha2::{Digest, Sha256};

mod report;

use report::{report, Concerned, Done};
pub use report::{Outcome, Report};

/// Attempts to find a moment at which no task has run since the rehearsal, before all tasks are asked
/// for it while the guest is paused.
const HASTY: u32 = 8;
/// Shortest wait between two attempts.
const WAIT_MIN: Duration = Duration::from_millis(1);
/// Longest wait between two attempts.
const WAIT_MAX: Duration = Duration::from_millis(500);

/// The wait from which on a sleeper's stack is walked: those who leave by themselves have left.
const WAIT_LONG: Duration = Duration::from_millis(64);

/// How patient to be.
#[derive(Clone, Debug)]
pub struct Options {
    /// Time for all attempts together.
    pub timeout: Duration,
    /// Longest pause of the guest; an attempt that would take longer is given up.
    pub max_pause: Duration,
    /// Threads may go on in the versions that are replaced, if the payload says that they may: nobody
    /// is waited for who is in them, but only for who stands on the bytes that are written.
    pub entry_only: bool,
    /// Check and link, but write nothing.
    pub dry_run: bool,
    /// Set from outside to give up between two attempts.
    pub interrupted: Arc<AtomicBool>,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            timeout: Duration::from_secs(30),
            max_pause: Duration::from_millis(10),
            entry_only: false,
            dry_run: false,
            interrupted: Arc::default(),
        }
    }
}

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
    plan::settle(kernel, &mut arena)?;
    let ready = plan::prepare(kernel, &arena, payload, mode)?;
    let dry = Report::dry(payload, &ready);
    if let Readiness::Ready(ready) = &ready {
        watch_of(&ready.plan, options)?;
    }
    let ready = match ready {
        Readiness::Ready(ready) if !options.dry_run => ready,
        _ => return Ok(dry),
    };
    let superseded = ready.superseded.iter().map(|r| &r.record);
    let concerned = Concerned::of(superseded.chain([&ready.record]));
    let before = concerned.digest(kernel)?;
    machine.begin(&Change::new(kernel, Op::Apply, &ready.record, &ready.plan))?;
    let done = place(machine, kernel, &mut arena, &ready)
        .and_then(|()| carry_out(machine, kernel, &mut arena, &ready.plan, options));
    let done = ended(machine, kernel, done)?;
    let report = report(&payload.name, Outcome::Applied, dry.functions, done);
    Ok(Report {
        superseded: dry.superseded,
        sha256: dry.sha256,
        text: concerned.change(kernel, before),
        ..report
    })
}

/// Undoes the payload called `name`.
///
/// # Errors
/// As [`apply`]; [`Error::Failed`] when another patch lies on it.
pub fn revert(
    machine: &dyn Machine,
    kernel: &Kernel<'_>,
    name: &str,
    options: &Options,
) -> Result<Report> {
    let mut arena = Arena::read(kernel)?;
    let residents = plan::settle(kernel, &mut arena)?;
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
    machine.begin(&Change::new(kernel, Op::Revert, &resident.record, &plan))?;
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

/// What is reported of a patch that is as it should be.
#[must_use]
pub fn nothing_to_do(patch: &str) -> Report {
    report(patch, Outcome::Already, 0, Done::default())
}

/// Notes that the run has ended, unless the guest's directory shows a change as under way still.
fn ended(machine: &dyn Machine, kernel: &Kernel<'_>, done: Result<Done>) -> Result<Done> {
    let settled = || {
        let arena = Arena::read(kernel)?;
        let under_way = |s: &Slot| matches!(s.state, State::Applying | State::Reverting);
        Ok::<_, Error>(!arena.directory.slots.iter().any(under_way))
    };
    if done.is_ok() || settled().unwrap_or(false) {
        machine.ended();
    }
    done
}

/// Carries out a plan that puts back what a run wrote that ended in between.
///
/// # Errors
/// As [`apply`].
pub fn put_back(
    machine: &dyn Machine,
    kernel: &Kernel<'_>,
    plan: &Plan,
    options: &Options,
) -> Result<()> {
    execute(machine, kernel, plan, options).map(|_| ())
}

/// Undoes all patches, the topmost first, until one can't be undone. A dry run says of each what
/// would come of it once those on top are gone.
///
/// # Errors
/// The guest's arena can't be read; what goes wrong with a patch is said of that patch.
pub fn revert_all(
    machine: &dyn Machine,
    kernel: &Kernel<'_>,
    options: &Options,
) -> Result<Vec<(String, Result<Report>)>> {
    let residents = plan::residents(kernel, &Arena::read(kernel)?)?;
    let stack = Stack::new(&residents);
    let mut results = Vec::new();
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
        results.push((name.clone(), result));
        if failed {
            break;
        }
    }
    Ok(results)
}

/// Who is in the way of a change: in one of the ranges of `watch`, at one moment for which the guest
/// is paused.
///
/// # Errors
/// [`Error::TryAgain`] when there is no such moment within the time allowed; memory can't be read.
pub fn blocking(
    machine: &dyn Machine,
    kernel: &Kernel<'_>,
    watch: &Watch,
    options: &Options,
) -> Result<Vec<Blocker>> {
    let began = Instant::now();
    let guard = machine.guard(&[])?;
    let mut prescan = Prescan::new(kernel, watch)?;
    let mut wait = WAIT_MIN;
    while began.elapsed() < options.timeout && !options.interrupted.load(Ordering::SeqCst) {
        prescan.refresh()?;
        prescan.rehearse()?;
        prescan.acquit()?;
        let (verdict, paused) = last_look(machine, &*guard, &mut prescan, true, options)?;
        paused.end()?;
        if let Some(blockers) = verdict.blockers() {
            return Ok(blockers);
        }
        // Else a guest that can't be looked at would be paused all the time.
        std::thread::sleep(wait);
        wait = (wait * 2).min(WAIT_MAX);
    }
    Err(Error::TryAgain(format!(
        "the guest's tasks could not be looked at in {} ms with pauses of at most {} ms: it starts \
         new ones all the time, or has too many; nothing was changed",
        began.elapsed().as_millis(),
        options.max_pause.as_millis()
    )))
}

/// Pauses the guest for the last look, and says what it showed while the guest is still paused.
fn last_look<'g>(
    machine: &dyn Machine,
    guard: &'g dyn Guard,
    prescan: &mut Prescan<'_, '_>,
    thorough: bool,
    options: &Options,
) -> Result<(Verdict, Box<dyn Paused + 'g>)> {
    // A busy guest has new tasks by now; listing those alone is quick, and so is looking at those that
    // ran meanwhile.
    if prescan.moved()? {
        prescan.refresh()?;
    }
    prescan.rehearse()?;
    // What follows is done once before: what is used for the first time is slow, and what was used a
    // moment ago is quick, after a rehearsal that went through all tasks.
    prescan.look(&machine.vcpus()?, true, &|| false)?;
    let paused = guard.pause()?;
    let too_long = || paused.elapsed() > options.max_pause;
    let verdict = prescan.look(&machine.vcpus()?, thorough, &too_long)?;
    Ok((verdict, paused))
}

/// Carries out a plan whose patches the directory shows as under way, and makes it say what came of
/// it.
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
                slot.state = slot.state.settled(true);
            }
            // Should the directory not take it: what stands in the text says the same, and is asked.
            let _ = arena.commit(machine, kernel, slots);
            Ok(done)
        }
        Err(error) => {
            // Whatever went wrong, the guest's text tells whether the change took place; where it
            // doesn't, the directory goes on showing it as under way.
            if plan::settle(kernel, arena).is_ok() {
                // Nothing refers to code that is not in force: it stays for the next attempt.
                let slots = arena.directory.slots.clone();
                arena.commit(machine, kernel, slots)?;
            }
            Err(error)
        }
    }
}

/// Puts a payload's code into the arena and into its directory, where it comes last, as being
/// applied; those it supersedes are shown as being reverted.
fn place(
    machine: &dyn Machine,
    kernel: &Kernel<'_>,
    arena: &mut Arena,
    ready: &Prepared,
) -> Result<()> {
    arena.add(machine, kernel, ready.first, &ready.layout.rights)?;
    for part in &ready.fresh {
        let bytes = ready.image.bytes.get(part.clone()).unwrap_or_default();
        let at = arena::page_address(ready.first).plus(part.start as u64);
        arena.write(machine, at, bytes)?;
    }
    let too_big = |_| Error::Failed("the payload's place does not fit the directory".into());
    let slot = Slot {
        state: State::Applying,
        first: u16::try_from(ready.first).map_err(too_big)?,
        pages: u16::try_from(ready.layout.rights.len()).map_err(too_big)?,
        applied_at: arena::now(),
        record_offset: u32::try_from(ready.layout.record.0).map_err(too_big)?,
        record_len: u32::try_from(ready.record_json.len()).map_err(too_big)?,
        record_sha256: Sha256::digest(&ready.record_json).into(),
    };
    let mut slots = arena.directory.slots.clone();
    for superseded in &ready.superseded {
        if let Some(slot) = slots.get_mut(superseded.index) {
            slot.state = State::Reverting;
        }
    }
    if let Some(index) = ready.parked.filter(|&index| index < slots.len()) {
        slots.remove(index);
    }
    slots.push(slot);
    arena.commit(machine, kernel, slots)
}

/// A write with its page mapped.
struct Target<'p> {
    write: &'p plan::Write,
    window: Box<dyn WindowMut>,
    offset: usize,
}

impl Target<'_> {
    fn holds(&self, bytes: &[u8]) -> Result<bool> {
        let mut found = [0; plan::WRITE_MAX];
        let found = found.get_mut(..bytes.len()).ok_or_else(|| {
            Error::Failed(format!("a write of more than {} bytes", plan::WRITE_MAX))
        })?;
        self.window.read(self.offset, found)?;
        Ok(found == bytes)
    }

    fn put(&self, bytes: &[u8]) -> Result<()> {
        Ok(self.window.write(self.offset, bytes)?)
    }
}

/// Where nobody may be.
fn watch_of<'p>(plan: &'p Plan, options: &Options) -> Result<&'p Watch> {
    if !options.entry_only {
        return Ok(&plan.watch);
    }
    plan.entry_only.as_ref().ok_or_else(|| {
        Error::NotApplicable(format!(
            "{}: --entry-only is for a payload whose author says, by MODULE_INFO(entry_only, \"Y\"), \
             that old and new versions of its functions may run at the same time, and that supersedes \
             no other; this one does not, so leave --entry-only out",
            plan.patch
        ))
    })
}

fn execute(
    machine: &dyn Machine,
    kernel: &Kernel<'_>,
    plan: &Plan,
    options: &Options,
) -> Result<Done> {
    let began = Instant::now();
    let mut targets = Vec::with_capacity(plan.writes.len());
    let mut spots = Vec::new();
    // Nothing remembered: what leads there now.
    let (space, mut trail) = (kernel.space.fresh(), Trail::default());
    let mut changed = Vec::new();
    for write in &plan.writes {
        let at = Gva(write.at);
        let frames = space.trace(at, write.new.len() as u64, &mut trail)?;
        if write.new != write.expect {
            spots.extend(Spot::split(&frames, at.offset(), &write.expect, &write.new));
            changed.extend_from_slice(&frames);
        }
        targets.push(Target {
            write,
            window: machine.map_mut(&frames)?,
            offset: at.offset(),
        });
    }
    changed.sort_unstable();
    changed.dedup();
    let guard = machine.guard(&spots)?;
    let mut prescan = Prescan::new(kernel, watch_of(plan, options)?)?;
    let mut attempts = 0;
    let mut stirred = 0;
    let mut wait = WAIT_MIN;
    // Of the last attempt that could tell who was in the way, else of the last one.
    let mut last = Verdict::Quiet;
    loop {
        if options.interrupted.load(Ordering::SeqCst) {
            return Err(Error::Failed("interrupted; nothing was changed".into()));
        }
        prescan.refresh()?;
        attempts += 1;
        // While the guest runs: who sleeps in the way is known without costing it a pause.
        let mut pause = Duration::ZERO;
        let mut verdict = prescan.rehearse()?;
        if wait >= WAIT_LONG && verdict.is_sleepers() {
            prescan.acquit()?;
            verdict = prescan.rehearse()?;
        }
        if !verdict.is_sleepers() {
            check_all(&targets, &trail)?;
            let thorough = stirred >= HASTY;
            let (found, paused) = last_look(machine, &*guard, &mut prescan, thorough, options)?;
            verdict = found;
            if verdict == Verdict::Quiet {
                let written = write_all(&targets, &trail, || Ok(paused.writing()?));
                // What was put back was written too. While it is paused the guest can't be suspended, so
                // none of this is missed.
                let told = machine.written(&changed);
                written?;
                let pause = paused.end()?;
                if let Err(error) = told {
                    eprintln!(
                        "xen-locus: if the guest is being moved as it runs, stop that: {error}"
                    );
                }
                return Ok(Done { pause, attempts });
            }
            pause = paused.end()?;
        }
        let at_once = verdict == Verdict::Stirred;
        let is_blocked = |v: &Verdict| matches!(v, Verdict::Blocked(_));
        if is_blocked(&verdict) || !is_blocked(&last) {
            last = verdict;
        }
        if began.elapsed() + wait >= options.timeout {
            return Err(gave_up(plan, last, attempts, began.elapsed(), pause));
        }
        if at_once {
            stirred += 1;
            continue;
        }
        std::thread::sleep(wait);
        wait = (wait * 2).min(WAIT_MAX);
    }
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
            return Error::TryAgain(format!(
            "{}: the guest would have to be paused for longer than --max-pause allows (the last \
                 attempt was given up after {} us); nothing was changed",
            plan.patch,
            pause.as_micros()
        ))
        }
        Verdict::Moved | Verdict::Stirred | Verdict::Quiet => {
            return Error::TryAgain(format!(
                "{}: in {attempts} attempts in {waited_ms} ms the guest always started or ran \
                 tasks between the listing of tasks and the pause; nothing was changed",
                plan.patch
            ))
        }
    };
    Error::Blocked {
        what: plan.patch.clone(),
        attempts,
        waited_ms,
        blockers,
    }
}

/// Checks that the guest's memory holds what is to be replaced, and that its page tables still lead there.
fn check_all(targets: &[Target<'_>], trail: &Trail) -> Result<()> {
    if !trail.holds()? {
        return Err(Error::TryAgain(
            "the guest's page tables lead elsewhere than when the pages to be written were mapped (the \
             guest remaps its own code?); nothing was changed"
                .into(),
        ));
    }
    for target in targets {
        if !target.holds(&target.write.expect)? {
            return Err(Error::TryAgain(format!(
                "the bytes at {:#x} changed since they were checked (the guest traces or patches \
                 this function itself?); nothing was changed",
                target.write.at
            )));
        }
    }
    Ok(())
}

/// Writes all targets or none; calls `begin` when they are checked and before the first is written, which
/// says whether that may be.
fn write_all(
    targets: &[Target<'_>],
    trail: &Trail,
    begin: impl FnOnce() -> Result<bool>,
) -> Result<()> {
    check_all(targets, trail)?;
    if !begin()? {
        return Err(Error::TryAgain(
            "the guest has shut down or is suspended (is it being saved or moved?); nothing was changed"
                .into(),
        ));
    }
    let changed = || targets.iter().filter(|t| t.write.new != t.write.expect);
    let written = changed().try_for_each(|t| t.put(&t.write.new));
    // What can't be read back isn't known to be there.
    let is_there = |t: &Target<'_>, bytes: &[u8]| t.holds(bytes).unwrap_or(false);
    if written.is_ok() && targets.iter().all(|t| is_there(t, &t.write.new)) {
        return Ok(());
    }
    // The last one first: what is put back last is what was written first.
    for target in changed().rev() {
        // All are tried; what counts is what stands there in the end.
        let _ = target.put(&target.write.expect);
    }
    for target in targets {
        if !is_there(target, &target.write.expect) {
            return Err(Error::Uncertain(format!(
                "writing failed midway and the bytes at {:#x} could not be put back; run `xen-locus \
                 recover`",
                target.write.at
            )));
        }
    }
    Err(Error::RolledBack(
        "writing failed midway; all bytes are put back and verified".into(),
    ))
}

#[cfg(test)]
mod stack_tests;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::{Frame, PAGE_LEN};
    use crate::error::ExitCode;
    use crate::guest::mock::MockMemory;
    use crate::guest::{self, MemoryMut as _, Window};
    use std::cell::Cell;

    const OLD: [u8; 5] = [1; 5];
    const NEW: [u8; 5] = [2; 5];

    /// A window whose writes number `fails` and reads number `blind` fail, from 0.
    struct Failing {
        inner: Box<dyn WindowMut>,
        writes: Cell<u32>,
        fails: std::ops::Range<u32>,
        reads: Cell<u32>,
        blind: std::ops::Range<u32>,
    }

    impl Window for Failing {
        fn read(&self, offset: usize, buf: &mut [u8]) -> std::result::Result<(), guest::Error> {
            let n = self.reads.replace(self.reads.get() + 1);
            if self.blind.contains(&n) {
                return Err(guest::Error::Odd("the read failed".into()));
            }
            self.inner.read(offset, buf)
        }
    }

    impl WindowMut for Failing {
        fn write(&self, offset: usize, bytes: &[u8]) -> std::result::Result<(), guest::Error> {
            let n = self.writes.replace(self.writes.get() + 1);
            if self.fails.contains(&n) {
                // Torn: the first time two bytes get there, the second time one, then none.
                self.inner
                    .write(offset, &bytes[..2usize.saturating_sub(n as usize)])?;
                return Err(guest::Error::Odd("the write failed".into()));
            }
            self.inner.write(offset, bytes)
        }
    }

    /// Writes two redirects, of which the second fails at its writes `fails`; returns the outcome
    /// and what then stands at both places.
    fn written(first_byte: u8, fails: std::ops::Range<u32>) -> (Result<()>, [[u8; 5]; 2]) {
        written_blindly(first_byte, fails, 0..0)
    }

    /// The same, where it can't be read at its reads `blind`.
    fn written_blindly(
        first_byte: u8,
        fails: std::ops::Range<u32>,
        blind: std::ops::Range<u32>,
    ) -> (Result<()>, [[u8; 5]; 2]) {
        let memory = MockMemory::new();
        let frames: Vec<Frame> = (0..2).map(|_| memory.frame()).collect();
        let write = plan::Write {
            at: 0x1000,
            expect: OLD.to_vec(),
            new: NEW.to_vec(),
        };
        for &frame in &frames {
            memory.map_mut(&[frame]).unwrap().write(100, &OLD).unwrap();
        }
        memory
            .map_mut(&frames[1..])
            .unwrap()
            .write(100, &[first_byte])
            .unwrap();
        let targets: Vec<Target<'_>> = frames
            .iter()
            .zip([(0..0, 0..0), (fails, blind)])
            .map(|(&frame, (fails, blind))| {
                let inner = memory.map_mut(&[frame]).unwrap();
                let window = Box::new(Failing {
                    inner,
                    writes: Cell::new(0),
                    fails,
                    reads: Cell::new(0),
                    blind,
                });
                Target {
                    write: &write,
                    window,
                    offset: 100,
                }
            })
            .collect();
        let result = write_all(&targets, &Trail::default(), || Ok(true));
        let stands = [0, 1].map(|i| {
            let mut bytes = [0; 5];
            targets[i].window.read(100, &mut bytes).unwrap();
            bytes
        });
        assert!(targets
            .iter()
            .all(|t| t.window.read(PAGE_LEN - 8, &mut [0; 8]).is_ok()));
        (result, stands)
    }

    #[test]
    fn all_redirects_are_written_or_none() {
        let (result, stands) = written(1, 0..0);
        assert!(result.is_ok());
        assert_eq!(stands, [NEW, NEW]);
    }

    #[test]
    fn bytes_that_changed_since_they_were_checked_stop_the_write_before_it_begins() {
        let (result, stands) = written(9, 0..0);
        assert_eq!(result.unwrap_err().exit_code(), ExitCode::TryAgain);
        assert_eq!(stands, [OLD, [9, 1, 1, 1, 1]]);
    }

    #[test]
    fn a_write_that_fails_midway_is_rolled_back_and_verified() {
        let (result, stands) = written(1, 0..1);
        assert_eq!(result.unwrap_err().exit_code(), ExitCode::RolledBack);
        assert_eq!(stands, [OLD, OLD]);
    }

    #[test]
    fn what_cant_be_read_back_is_rolled_back() {
        // its reads: before the write, after it, after the old bytes were put back
        let (result, stands) = written_blindly(1, 0..0, 1..2);
        assert_eq!(result.unwrap_err().exit_code(), ExitCode::RolledBack);
        assert_eq!(stands, [OLD, OLD]);
        let (result, stands) = written_blindly(1, 0..0, 1..3);
        assert_eq!(result.unwrap_err().exit_code(), ExitCode::Uncertain);
        assert_eq!(stands, [OLD, OLD]);
    }

    #[test]
    fn a_rollback_that_fails_too_is_called_uncertain() {
        let (result, _) = written(1, 0..9);
        assert_eq!(result.unwrap_err().exit_code(), ExitCode::Uncertain);
    }
}
