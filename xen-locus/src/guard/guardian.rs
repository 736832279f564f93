//! The guardian's program: `xen-locus` started under the name [`NAME`].

use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::AsFd as _;
use std::process::ExitCode;
use std::time::Duration;

use locus_xen::{self as xen, Control, ForeignMemory, PauseStep, Process, SharedPage, WaitOutcome};

use super::take_over::{take_over, Counter as _, Since, TakeOver};
use super::{Places, WatchedRun};
use crate::error::{Error, Result};

/// Name of the process.
pub const NAME: &str = "xen-locus-guardian";
/// Time between two checks whether the run is stopped.
const TICK: Duration = Duration::from_millis(40);
/// What it writes to stdout when it is ready.
pub const READY: &[u8] = b"ready\n";

/// Whether this process is meant to be a guardian.
#[must_use]
pub fn is_meant() -> bool {
    std::env::args_os().next().is_some_and(|name| name == NAME)
}

/// The program. stdin is the guard's file. On stdout it tells the run that it is ready, or why it is not.
#[must_use]
pub fn main() -> ExitCode {
    xen::detach();
    match watch() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = write!(io::stdout(), "{error}").and_then(|()| io::stdout().flush());
            ExitCode::FAILURE
        }
    }
}

/// Waits until the run ends, and maps and unmaps `places` as the run wishes. If the run is stopped (SIGSTOP) while the guest
/// is paused, it is killed, because it may never continue.
fn wait(page: &SharedPage, worker: &Process, places: &mut Places<'_>) -> Result<WaitOutcome> {
    let mut held = false;
    loop {
        if let Some(end) = page.wait(TICK)? {
            return Ok(end);
        }
        if let Some(mapped) = page.wish() {
            places.set_mapped(mapped)?;
            if mapped {
                page.set_mapped();
            }
        }
        let holds = page.step() != Some(PauseStep::Idle);
        if held && holds && worker.is_stopped() {
            // As long as it owns the mutex, its number is its own: the kernel passes the mutex on first.
            if worker.is_by_number() {
                if let Some(end) = page.wait(Duration::ZERO)? {
                    return Ok(end);
                }
            }
            worker.kill();
        }
        held = holds;
    }
}

fn watch() -> Result<()> {
    let file = io::stdin()
        .as_fd()
        .try_clone_to_owned()
        .map(File::from)
        .map_err(|e| Error::failed(format!("the guardian has no file: {e}")))?;
    let run = WatchedRun::read(&file)?;
    let page = SharedPage::open(&file)?;
    let control = Control::open()?;
    let foreign = ForeignMemory::open(run.domain())?;
    let mut places = Places::map(&foreign, &run.spots)?;
    let counter = (&control, run.domain());
    let worker = Process::open(run.pid)?;
    let Some(domain) = counter.pause_state()? else {
        return Err(Error::failed(format!("domain {} is gone", run.domid)));
    };
    places.warm_up();
    // So far nothing was urgent. From here on this process has a higher priority than the run, even while the guest is paused:
    // a process that dies frees its memory at its own priority, which takes longer than all that is left to do here.
    xen::set_realtime_priority(2);
    io::stdout()
        .write_all(READY)
        .and_then(|()| io::stdout().flush())
        .map_err(|e| Error::failed(format!("the guardian can't be heard: {e}")))?;
    if wait(&page, &worker, &mut places)? == WaitOutcome::Released {
        return Ok(());
    }
    let outcome = take_over(&page, &counter, domain.uuid, &places, Since::Now);
    // From here on nothing is urgent any more.
    run.say(outcome);
    if outcome == TakeOver::Running && run.spots.is_empty() {
        // `recover` would have nothing to report.
        let _ = std::fs::remove_file(run.path());
    }
    Ok(())
}
