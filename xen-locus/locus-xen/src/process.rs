//! Processes: one that survives its parent, scheduling priority, and a handle on another process.

use std::fs::{self, File};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::fs::FileExt as _;

use super::{fault, lock_memory, Error, HeldSignals};

/// Sends this process a signal. KILL and STOP end and stop it: no handler runs, nothing is dropped.
#[cfg(feature = "faults")]
pub(super) fn signal_self(signal: libc::c_int) {
    // SAFETY: the calls take plain numbers.
    unsafe { libc::kill(libc::getpid(), signal) };
}

/// Makes this process survive its parent: it gets a session of its own, blocks all signals but KILL and STOP, locks its
/// memory, and is the last to be killed when memory runs out. If the kernel does not allow the last two, the process
/// goes on without them.
pub fn detach() {
    // SAFETY: a plain call.
    unsafe { libc::setsid() };
    // For its whole life.
    std::mem::forget(HeldSignals::all());
    // It is no part of the work of the one that started it.
    lift_cpu_limit();
    let _ = std::env::set_current_dir("/");
    let _ = fs::write("/proc/self/oom_score_adj", "-1000");
    let _ = lock_memory();
}

/// From now on no other user can open what this process makes (umask(2)), whatever mode is asked for.
pub fn shut_out_others() {
    // SAFETY: a plain call.
    unsafe { libc::umask(0o077) };
}

/// If this process crashes, it is over at once, and nothing of its memory is written anywhere.
pub(super) fn leave_no_core() {
    // SAFETY: the call takes plain numbers.
    unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0) };
}

/// Whether this process ignores a signal. Who started it may want that: `nohup`, or a shell for its jobs in the background.
#[must_use]
pub fn is_ignored(signal: i32) -> bool {
    // SAFETY: nothing is changed, and the structure is filled before it is used.
    let handler = unsafe {
        let mut found = std::mem::zeroed::<libc::sigaction>();
        match libc::sigaction(signal, std::ptr::null(), &raw mut found) {
            0 => found.sa_sigaction,
            _ => libc::SIG_DFL,
        }
    };
    handler == libc::SIG_IGN
}

/// Ends this process by a signal (`SIGXCPU`) once it has used the processor for so many `seconds` in all (`RLIMIT_CPU`,
/// setrlimit(2)). A lower limit stays. Processes that it starts have the same limit, each for itself.
///
/// Then a mistake in what reading a guest may cost does not keep this process busy for hours. It does not end a process that
/// may have changed a guest: [`set_guest_may_be_changed`](super::set_guest_may_be_changed) lifts the limit.
///
/// # Errors
/// The kernel refuses.
pub fn limit_cpu(seconds: u64) -> Result<(), Error> {
    let what = "limiting the processor time of this process (getrlimit, setrlimit)";
    let mut limit = cpu_limit().ok_or_else(|| Error::last(what))?;
    limit.rlim_cur = limit.rlim_cur.min(seconds);
    // SAFETY: the call reads the structure.
    if unsafe { libc::setrlimit(libc::RLIMIT_CPU, &raw const limit) } != 0 {
        return Err(Error::last(what));
    }
    Ok(())
}

/// Undoes [`limit_cpu`]. The limit above which the kernel kills stays: it is not this program's.
pub(super) fn lift_cpu_limit() {
    if let Some(mut limit) = cpu_limit() {
        limit.rlim_cur = limit.rlim_max;
        // SAFETY: the call reads the structure. It can't fail: each process may raise its limit so far.
        unsafe { libc::setrlimit(libc::RLIMIT_CPU, &raw const limit) };
    }
}

fn cpu_limit() -> Option<libc::rlimit> {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the call fills the structure, which is its own.
    let read = unsafe { libc::getrlimit(libc::RLIMIT_CPU, &raw mut limit) };
    (read == 0).then_some(limit)
}

/// Lets this process run before all others of ordinary priority, and before those with a lower real-time `priority`:
/// 1 (lowest) to 99 (`SCHED_FIFO`, sched(7)). Processes that it starts have ordinary priority. If the kernel does not
/// allow it, nothing changes.
pub fn set_realtime_priority(priority: i32) {
    let first = libc::sched_param {
        sched_priority: priority,
    };
    let policy = libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK;
    // SAFETY: the parameter is a plain structure.
    unsafe { libc::sched_setscheduler(0, policy, &raw const first) };
}

/// A handle on another process: it never means a later process with the same id (pidfd_open(2)). Kernels before 5.3
/// have no such handles; there, see [`Process::kill`].
#[derive(Debug)]
pub struct Process {
    fd: Option<OwnedFd>,
    pid: libc::pid_t,
    stat: File,
}

impl Process {
    /// Opens the process with this id.
    ///
    /// # Errors
    /// There is no such process, or the kernel gives no access to it.
    pub fn open(pid: u32) -> Result<Process, Error> {
        let gone =
            |e: std::io::Error| Error::Environment(format!("cannot open process {pid}: {e}"));
        let number = libc::pid_t::try_from(pid)
            .map_err(|_| gone(std::io::Error::from_raw_os_error(libc::ESRCH)))?;
        // This file, too, never means a later process.
        let stat = File::open(format!("/proc/{pid}/stat")).map_err(gone)?;
        Ok(Process {
            fd: pidfd_open(number)?,
            pid: number,
            stat,
        })
    }

    /// Whether it is stopped (`T` in proc(5), /proc/PID/stat). Allocates no memory.
    #[must_use]
    pub fn is_stopped(&self) -> bool {
        let mut text = [0; 128];
        // A process that is gone can't be read, and is not stopped.
        let len = self.stat.read_at(&mut text, 0).unwrap_or(0);
        let text = text.get(..len).unwrap_or(&[]);
        // The process's name may have any characters. It ends at the last bracket.
        let name = text.iter().rposition(|&b| b == b')');
        let rest = name.and_then(|end| text.get(end..));
        rest.is_some_and(|rest| rest.starts_with(b") T"))
    }

    /// Whether [`Process::kill`] goes by the number of the process, because the kernel has no handles.
    #[must_use]
    pub fn is_by_number(&self) -> bool {
        self.fd.is_none()
    }

    /// Sends it SIGKILL. If [`Process::is_by_number`], the caller makes sure right before that it has not ended: else
    /// another process may have its number.
    pub fn kill(&self) {
        self.signal(libc::SIGKILL);
    }

    /// Sends it SIGTERM, as [`Process::kill`] sends SIGKILL.
    pub fn ask_to_end(&self) {
        self.signal(libc::SIGTERM);
    }

    fn signal(&self, signal: libc::c_int) {
        // SAFETY: the calls take plain numbers and no information about the signal.
        unsafe {
            match &self.fd {
                Some(fd) => {
                    libc::syscall(
                        libc::SYS_pidfd_send_signal,
                        fd.as_raw_fd(),
                        signal,
                        std::ptr::null::<libc::siginfo_t>(),
                        0,
                    );
                }
                None => {
                    libc::kill(self.pid, signal);
                }
            }
        }
    }
}

/// A descriptor of the process; `None` if this kernel makes none.
fn pidfd_open(pid: libc::pid_t) -> Result<Option<OwnedFd>, Error> {
    if fault::has_no_pidfd() {
        return Ok(None);
    }
    // SAFETY: the call takes plain numbers.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, libc::c_long::from(pid), 0) };
    match i32::try_from(fd) {
        // SAFETY: a descriptor that was just made, and nothing else owns it.
        Ok(fd) if fd >= 0 => Ok(Some(unsafe { OwnedFd::from_raw_fd(fd) })),
        _ => match Error::last(format!("opening process {pid} (pidfd_open)")) {
            Error::Call {
                errno: libc::ENOSYS,
                ..
            } => Ok(None),
            error => Err(error),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt as _;
    use std::process::Command;
    use std::time::{Duration, Instant};

    #[test]
    fn a_process_that_is_stopped_is_seen_and_killed_with_and_without_a_handle() {
        for by_number in [false, true] {
            let mut child = Command::new("sleep").arg("60").spawn().unwrap();
            let mut process = Process::open(child.id()).unwrap();
            if by_number {
                process.fd = None;
            }
            assert_eq!(process.is_by_number(), by_number);
            assert!(!process.is_stopped());
            let pid = child.id().to_string();
            let mut stop = Command::new("kill");
            assert!(stop.args(["-STOP", &pid]).status().unwrap().success());
            let began = Instant::now();
            while !process.is_stopped() {
                assert!(began.elapsed() < Duration::from_secs(10));
            }
            process.kill();
            assert_eq!(child.wait().unwrap().signal(), Some(libc::SIGKILL));
            // Whatever process has its number now.
            assert!(!process.is_stopped());
        }
    }

    #[test]
    fn a_process_that_may_have_changed_a_guest_is_not_ended_for_its_processor_time() {
        let soft = || cpu_limit().unwrap().rlim_cur;
        let before = soft();
        limit_cpu(1 << 20).unwrap();
        assert_eq!(soft(), before.min(1 << 20));
        limit_cpu(1 << 21).unwrap();
        assert_eq!(soft(), before.min(1 << 20), "a lower limit stays");
        crate::set_guest_may_be_changed();
        assert_eq!(soft(), cpu_limit().unwrap().rlim_max);
        // SAFETY: the call takes plain numbers.
        let dumpable = unsafe { libc::prctl(libc::PR_GET_DUMPABLE, 0, 0, 0, 0) };
        assert_eq!(dumpable, 0, "a core takes time");
    }
}
