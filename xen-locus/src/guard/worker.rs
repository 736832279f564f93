//! The run's side: starts a guardian, pauses the guest while the guardian watches, and ends the guardian.

use std::cell::RefCell;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use locus_guest as guest;
use locus_guest::Vcpu;
use locus_xen::fault;
use locus_xen::{Pause, PauseCalls, SharedPage};

use super::{guardian, WatchedRun, DIR};
use crate::error::{Error, Result};
use crate::paths;

/// Time from the call of [`Guarded::wait_for_guardian_tick`] to the end of the pause that follows, if nothing takes long.
const MOMENTS: Duration = Duration::from_millis(8);
/// Most time that the guardian needs for one check, if nothing is wrong.
const LOOK: Duration = Duration::from_micros(500);
/// Longest wait until the guardian has mapped what it was told to map. It looks every 40 ms.
const ANSWER: Duration = Duration::from_secs(2);

/// A guardian that watches this process. Dropping this value ends it.
#[derive(Debug)]
pub struct Guarded<'c> {
    calls: PauseCalls<'c>,
    page: SharedPage,
    path: std::path::PathBuf,
    child: RefCell<Child>,
    // Holds the file's lock, as the guardian does.
    _file: File,
}

impl<'c> Guarded<'c> {
    /// Starts a guardian for these pauses and waits until it is ready.
    ///
    /// # Errors
    /// [`Class::Failed`](crate::error::Class::Failed): it can't be started. Nothing of the guest is touched then.
    pub fn start(calls: PauseCalls<'c>, run: &WatchedRun) -> Result<Guarded<'c>> {
        let path = run.path();
        let new = path.with_extension(format!("{}.new", run.pid));
        let failed = |e: std::io::Error| {
            Error::failed(format!(
                "no guardian can be started for this run, so nothing was changed: {}: {e}",
                path.display()
            ))
        };
        paths::own_folder(Path::new(DIR)).map_err(failed)?;
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(&new)
            .map_err(failed)?;
        let made = Guarded::start_in(calls, run, file, &new, &path, &failed);
        if made.is_err() {
            let _ = fs::remove_file(&new);
        }
        made
    }

    fn start_in(
        calls: PauseCalls<'c>,
        run: &WatchedRun,
        file: File,
        new: &Path,
        path: &Path,
        failed: &dyn Fn(std::io::Error) -> Error,
    ) -> Result<Guarded<'c>> {
        fault::point("guard: lock").map_err(failed)?;
        file.lock().map_err(failed)?;
        run.write(&file).map_err(failed)?;
        let page = SharedPage::create(&file)?;
        // A file with this name is complete and locked. If there is one already, another process had this number and died:
        // `recover` needs that file, so it must not be overwritten.
        fault::point("guard: link").map_err(failed)?;
        fs::hard_link(new, path).map_err(failed)?;
        let started = fs::remove_file(new)
            .map_err(failed)
            .and_then(|()| Guarded::launch(calls, run, file, page, failed));
        if started.is_err() {
            let _ = fs::remove_file(path);
        }
        started
    }

    fn launch(
        calls: PauseCalls<'c>,
        run: &WatchedRun,
        file: File,
        page: SharedPage,
        failed: &dyn Fn(std::io::Error) -> Error,
    ) -> Result<Guarded<'c>> {
        fault::point("guard: spawn").map_err(failed)?;
        let mut child = Command::new("/proc/self/exe")
            .arg0(guardian::NAME)
            .env_remove(fault::VARIABLE)
            .stdin(Stdio::from(file.try_clone().map_err(failed)?))
            .stdout(Stdio::piped())
            .spawn()
            .map_err(failed)?;
        let _ = fault::point("guard: hear");
        let mut said = Vec::new();
        let heard = match child.stdout.take() {
            Some(stdout) => hear(stdout, &mut said),
            None => Ok(()),
        };
        let guarded = Guarded {
            calls,
            page,
            path: run.path(),
            child: RefCell::new(child),
            _file: file,
        };
        if heard.is_err() || said != guardian::READY {
            return Err(Error::failed(format!(
                "the guardian of this run could not prepare itself, so nothing was changed: {}",
                String::from_utf8_lossy(&said).trim()
            )));
        }
        Ok(guarded)
    }

    /// The registers of all vCPUs, read as in a pause, while the guest runs.
    ///
    /// # Errors
    /// A hypercall failed.
    pub fn vcpus_now(&self) -> std::result::Result<Vec<Vcpu>, guest::Error> {
        Ok(self.calls.vcpus_now()?)
    }

    /// If the guardian is about to check this process, waits until it has done so. The guardian has the higher priority, and
    /// would interrupt this process in the middle of a pause.
    pub fn wait_for_guardian_tick(&self) {
        if let Some(left) = self.page.next_check().filter(|&left| left < MOMENTS) {
            std::thread::sleep(left + LOOK);
        }
    }

    /// Checks that this tool can still do right by the guest, and waits until the guardian has mapped the places of the
    /// change, if it has unmapped them.
    ///
    /// # Errors
    /// [`guest::Error::Unsupported`]: it can't. Or the guardian is gone, or does not answer.
    pub fn hold(&self) -> std::result::Result<(), guest::Error> {
        self.calls.check_guest()?;
        let began = Instant::now();
        while !self.page.hold() {
            self.check_guardian()?;
            if began.elapsed() > ANSWER {
                return Err(guest::Error::Odd(format!(
                    "the guardian of this run does not answer within {} ms; nothing was changed",
                    ANSWER.as_millis()
                )));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Tells the guardian to unmap the places of the change. It does so when it next looks, within 40 ms, also while this
    /// process is stopped.
    pub fn let_go(&self) {
        self.page.let_go();
    }

    fn check_guardian(&self) -> std::result::Result<(), guest::Error> {
        let gone = || {
            guest::Error::Odd("the guardian of this run has ended; the guest is not touched".into())
        };
        let mut child = self.child.try_borrow_mut().map_err(|_| gone())?;
        match child.try_wait() {
            Ok(None) => Ok(()),
            _ => Err(gone()),
        }
    }

    /// Pauses the guest.
    ///
    /// # Errors
    /// The guardian is gone, or a hypercall failed.
    pub fn pause(&self) -> std::result::Result<Pause<'_>, guest::Error> {
        self.check_guardian()?;
        Ok(Pause::new(&self.calls, &self.page)?)
    }
}

/// Reads what the guardian writes, until it is ready or has said why it is not.
fn hear(mut stdout: impl Read, said: &mut Vec<u8>) -> std::io::Result<()> {
    let mut first = vec![0; guardian::READY.len()];
    let mut len = 0;
    while let Some(rest) = first.get_mut(len..).filter(|rest| !rest.is_empty()) {
        match stdout.read(rest)? {
            0 => break,
            n => len += n,
        }
    }
    first.truncate(len);
    let ready = first == guardian::READY;
    said.append(&mut first);
    if !ready {
        stdout.take(4096).read_to_end(said)?;
    }
    Ok(())
}

impl Drop for Guarded<'_> {
    fn drop(&mut self) {
        let _ = fault::point("guard: end");
        // The guest is not paused, so nothing is left to finish or undo.
        let _ = fs::remove_file(&self.path);
        let _ = fault::point("guard: let go");
        self.page.release();
        let _ = self.child.get_mut().wait();
    }
}
