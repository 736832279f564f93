//! The guardian's own program: `xen-locus` started under the name [`NAME`].

use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::AsFd as _;
use std::process::ExitCode;
use std::time::Duration;

use locus_xen::{self as xen, Control, ForeignMemory, PauseStep, Process, SharedPage, WaitOutcome};

use super::settle::{settle, Counter as _, Outcome};
use super::{Places, Task};
use crate::error::{Error, Result};
use crate::say;

/// What the process is called.
pub const NAME: &str = "xen-locus-guardian";
/// Between two looks whether the run is stopped.
const TICK: Duration = Duration::from_millis(40);
/// What it says when it is prepared.
pub const READY: &[u8] = b"ready\n";

/// Whether this process is meant to be a guardian.
#[must_use]
pub fn is_meant() -> bool {
    std::env::args_os().next().is_some_and(|name| name == NAME)
}

/// The program: stdin is the guard's file, stdout tells the working process that all is prepared, or why
/// not.
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

/// Waits until the run ends. One that is stopped while it holds the guest is killed: it may never go on.
fn wait(page: &SharedPage, worker: &Process) -> Result<WaitOutcome> {
    let mut held = false;
    loop {
        if let Some(end) = page.wait(TICK)? {
            return Ok(end);
        }
        let holds = page.step() != Some(PauseStep::Idle);
        if held && holds && worker.is_stopped() {
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
    let task = Task::read(&file)?;
    let page = SharedPage::open(&file)?;
    let control = Control::open()?;
    let foreign = ForeignMemory::open(task.domain())?;
    let places = Places::map(&foreign, &task.spots)?;
    let counter = (&control, task.domain());
    let worker = Process::open(task.pid)?;
    let Some(standing) = counter.standing()? else {
        return Err(Error::failed(format!("domain {} is gone", task.domid)));
    };
    places.rehearse();
    // What it did so far was not urgent. From here on it comes before the run even where that holds the guest: a
    // process that dies takes its memory apart at the rank it had, which takes longer than all that is left to do.
    xen::set_realtime_priority(2);
    io::stdout()
        .write_all(READY)
        .and_then(|()| io::stdout().flush())
        .map_err(|e| Error::failed(format!("the guardian is not heard: {e}")))?;
    if wait(&page, &worker)? == WaitOutcome::Released {
        return Ok(());
    }
    let outcome = settle(&page, &counter, standing.uuid, &places);
    page.set_outcome(outcome as u32);
    // From here on nothing is urgent any more, and nobody may be there to hear it.
    say::warn(format_args!(
        "process {} died at work on domain {}: {outcome}",
        task.pid, task.domid
    ));
    if outcome == Outcome::Running && task.spots.is_empty() {
        // There is nothing that `recover` could tell.
        let _ = std::fs::remove_file(task.path());
    }
    Ok(())
}
