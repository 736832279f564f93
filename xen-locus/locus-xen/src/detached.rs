//! A process on its own: nothing that ends its parent ends it.

use std::fs::{self, File};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::fs::FileExt as _;

use super::{stay_resident, Error};

/// Kills this process, or stops it: no handler runs, nothing is dropped.
#[cfg(feature = "faults")]
pub fn end_self(stop: bool) {
    let signal = if stop { libc::SIGSTOP } else { libc::SIGKILL };
    // SAFETY: the calls take plain numbers.
    unsafe { libc::kill(libc::getpid(), signal) };
}

/// Makes this process live on when its parent dies: its own session, no signal but KILL and STOP, kept in
/// memory, last to be killed for lack of it. What the kernel does not allow of the last two it goes without.
pub fn detach() {
    // SAFETY: plain calls; the set is filled before it is used.
    unsafe {
        libc::setsid();
        let mut all = std::mem::zeroed::<libc::sigset_t>();
        libc::sigfillset(&raw mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, std::ptr::null_mut());
    }
    let _ = std::env::set_current_dir("/");
    let _ = fs::write("/proc/self/oom_score_adj", "-1000");
    let _ = stay_resident();
}

/// Lets this process, but none that it starts, run before all others of ordinary priority, if it may, and before
/// those that asked for the same with a lower `rank`: 1 is the lowest (`SCHED_FIFO`, sched(7)).
pub fn run_first(rank: i32) {
    let first = libc::sched_param {
        sched_priority: rank,
    };
    let policy = libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK;
    // SAFETY: the parameter is a plain structure.
    unsafe { libc::sched_setscheduler(0, policy, &raw const first) };
}

/// Another process, the same one for as long as this value lives.
#[derive(Debug)]
pub struct Other {
    fd: OwnedFd,
    stat: File,
}

impl Other {
    /// The process of this id.
    ///
    /// # Errors
    /// There is none, or it can't be looked at.
    pub fn open(pid: u32) -> Result<Other, Error> {
        // SAFETY: the call takes plain numbers.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, libc::c_long::from(pid), 0) };
        let Some(fd) = i32::try_from(fd).ok().filter(|fd| *fd >= 0) else {
            return Err(Error::last(format!(
                "looking at process {pid} (pidfd_open)"
            )));
        };
        // SAFETY: a descriptor that was just made and is nobody else's.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let stat = File::open(format!("/proc/{pid}/stat"))
            .map_err(|e| Error::Environment(format!("cannot look at process {pid}: {e}")))?;
        Ok(Other { fd, stat })
    }

    /// Whether it is stopped (`T` in proc(5), /proc/PID/stat). Allocates no memory.
    #[must_use]
    pub fn is_stopped(&self) -> bool {
        let mut text = [0; 128];
        let len = self.stat.read_at(&mut text, 0).unwrap_or(0);
        let text = text.get(..len).unwrap_or_default();
        // The name may hold anything, and ends with the last bracket.
        let name = text.iter().rposition(|&b| b == b')').unwrap_or(0);
        text.get(name..)
            .is_some_and(|rest| rest.starts_with(b") T"))
    }

    /// Kills it.
    pub fn kill(&self) {
        // SAFETY: the call takes plain numbers and no information about the signal.
        unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                self.fd.as_raw_fd(),
                libc::SIGKILL,
                std::ptr::null::<libc::siginfo_t>(),
                0,
            )
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt as _;
    use std::process::Command;
    use std::time::{Duration, Instant};

    #[test]
    fn a_process_that_is_stopped_is_seen_and_killed() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let other = Other::open(child.id()).unwrap();
        assert!(!other.is_stopped());
        let pid = child.id().to_string();
        let mut stop = Command::new("kill");
        assert!(stop.args(["-STOP", &pid]).status().unwrap().success());
        let began = Instant::now();
        while !other.is_stopped() {
            assert!(began.elapsed() < Duration::from_secs(10));
        }
        other.kill();
        assert_eq!(child.wait().unwrap().signal(), Some(libc::SIGKILL));
        assert!(!other.is_stopped());
    }
}
