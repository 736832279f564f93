//! What a worker of the daemon does: a process of its own, for one piece of work.
//!
//! Work on guests is done by processes, and not by threads of the daemon. A guest that makes its worker use up all memory, or
//! wait, or end, does so to that process alone. A worker is what a command is: one run, with its own guardian, locks and handles
//! of Xen. So all that is shown of a command that is killed holds for a worker.

use std::fmt;
use std::fs;
use std::io;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::process::{Child, Command, Stdio};
use std::str::FromStr;
use std::time::Duration;

use locus_guest::addr::DomId;
use locus_xen::{uuid, Process};

use super::request::is_name;
use crate::error::ExitCode;
use crate::say;

/// The option by which the daemon tells a worker what to do.
pub const OPTION: &str = "--work";

/// A piece of work.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Work {
    /// Recovers all guests from interrupted runs.
    Recover,
    /// Publishes a guest, and applies again what it lost.
    Publish(DomId, String),
    /// Serves the request with this ID.
    Request(String),
}

impl fmt::Display for Work {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Work::Recover => f.write_str("recover"),
            Work::Publish(id, uuid) => write!(f, "publish/{id}/{uuid}"),
            Work::Request(id) => write!(f, "request/{id}"),
        }
    }
}

impl FromStr for Work {
    type Err = String;

    fn from_str(text: &str) -> Result<Work, String> {
        let parts: Vec<&str> = text.split('/').collect();
        match parts[..] {
            ["recover"] => Ok(Work::Recover),
            ["publish", id, guest] if uuid::is_text(guest) => match id.parse() {
                Ok(id) => Ok(Work::Publish(DomId(id), guest.to_owned())),
                Err(_) => Err(format!("{id:?} is no domain id")),
            },
            ["request", id] if is_name(id) => Ok(Work::Request(id.to_owned())),
            _ => Err("this option is for the daemon itself".into()),
        }
    }
}

impl Work {
    /// What it is about, for a sentence.
    pub(super) fn about(&self) -> String {
        match self {
            Work::Recover => "recovering all guests".into(),
            Work::Publish(id, _) => format!("publishing domain {id}"),
            Work::Request(id) => format!("request {id}"),
        }
    }
}

/// How a worker ends whose request waits for a module.
pub(super) const WAITS_ALONE: ExitCode = ExitCode::Refused;

/// How a worker ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// The work is done.
    Done,
    /// It is to be done again later. The worker has said why.
    Later,
    /// The same, and nothing that was asked for later is to wait for it.
    Waits,
    /// The guest can't be read as it is. The worker has said why.
    CanNotBeRead,
    /// The worker ended in the middle of it.
    Died(String),
}

/// A worker that runs.
#[derive(Debug)]
pub(super) struct Worker {
    child: Child,
}

impl Worker {
    /// Starts a worker, with the options that this process has.
    ///
    /// # Errors
    /// No process can be started.
    pub(super) fn start(work: &Work) -> io::Result<Worker> {
        let child = Command::new("/proc/self/exe")
            .arg0("xen-locus")
            .args(std::env::args_os().skip(1))
            .arg(format!("{OPTION}={work}"))
            .stdin(Stdio::null())
            .spawn()?;
        Ok(Worker { child })
    }

    /// How it ended, if it has ended.
    pub(super) fn end(&mut self) -> Option<End> {
        let status = match self.child.try_wait() {
            Ok(status) => status?,
            Err(error) => return Some(End::Died(error.to_string())),
        };
        const LATER: i32 = ExitCode::TryAgain as i32;
        const CAN_NOT_BE_READ: i32 = ExitCode::NotApplicable as i32;
        const WAITS: i32 = WAITS_ALONE as i32;
        Some(match (status.code(), status.signal()) {
            (Some(0), _) => End::Done,
            (Some(LATER), _) => End::Later,
            (Some(CAN_NOT_BE_READ), _) => End::CanNotBeRead,
            (Some(WAITS), _) => End::Waits,
            (Some(code), _) => End::Died(format!("exit code {code}")),
            (None, signal) => End::Died(format!("signal {}", signal.unwrap_or(0))),
        })
    }

    /// Asks it to end, which it does between two attempts.
    pub(super) fn ask_to_end(&self) {
        if let Ok(process) = Process::open(self.child.id()) {
            process.ask_to_end();
        }
    }
}

/// Where a process says how good a victim it is when memory runs out: -1000 to 1000 (proc(5)).
const VICTIM: &str = "/proc/self/oom_score_adj";

/// Makes this process, a worker, the first victim when memory runs out: a guest whose worker needs so much must not cost another
/// guest its device model. What a worker leaves is recovered. Its guardian is no victim ([`locus_xen::detach`]).
pub(super) fn be_the_victim() {
    // If the kernel does not allow it, nothing changes.
    let _ = fs::write(VICTIM, "1000");
}

/// Processor time of a worker for one guest, beside the time that its attempts may take. Reading a guest takes seconds.
const CPU_MAX: Duration = Duration::from_secs(600);

/// Ends this process, a worker for one guest, once it has used the processor far longer than any honest guest makes it, if
/// it did not begin to change that guest: else a few guests could keep all workers busy.
pub(super) fn limit_cpu(work: &Work, timeout: Duration) {
    // Recovery is about all guests.
    if *work != Work::Recover {
        let most = CPU_MAX.saturating_add(timeout).as_secs();
        if let Err(error) = locus_xen::limit_cpu(most) {
            say::warn(format_args!("{error}; it has no limit"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_reads_what_the_daemon_wrote() {
        let uuid = "00000000-0000-0000-0000-000000000001".to_owned();
        for work in [
            Work::Recover,
            Work::Publish(DomId(7), uuid),
            Work::Request("fix_1-a".into()),
        ] {
            assert_eq!(work.to_string().parse(), Ok(work));
        }
        for wrong in ["", "request/", "request/a/b", "publish/1/x", "publish/x"] {
            assert!(wrong.parse::<Work>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_daemon_sees_how_a_worker_ended_and_can_ask_it_to() {
        let worker = |script: &str| Worker {
            child: Command::new("sh").args(["-c", script]).spawn().unwrap(),
        };
        let end = |mut worker: Worker| loop {
            match worker.end() {
                Some(end) => break end,
                None => std::thread::sleep(std::time::Duration::from_millis(5)),
            }
        };
        assert_eq!(end(worker("exit 0")), End::Done);
        assert_eq!(end(worker("exit 2")), End::Later);
        assert_eq!(end(worker("exit 3")), End::CanNotBeRead);
        assert_eq!(end(worker("exit 4")), End::Waits);
        assert_eq!(end(worker("exit 1")), End::Died("exit code 1".into()));
        assert_eq!(end(worker("kill -9 $$")), End::Died("signal 9".into()));
        let long = worker("exec sleep 60");
        long.ask_to_end();
        assert_eq!(end(long), End::Died("signal 15".into()));
    }

    #[test]
    fn a_worker_is_the_first_victim() {
        let before = fs::read_to_string(VICTIM).unwrap();
        be_the_victim();
        let now = fs::read_to_string(VICTIM).unwrap();
        // Without CAP_SYS_RESOURCE it stays so, for a test.
        let _ = fs::write(VICTIM, before.trim());
        assert_eq!(now.trim(), "1000");
    }
}
