//! Programs of the guest that sleep in pause(2): threads inside a kernel function for as long as wanted.

use std::time::Duration;

use super::wait::until;
use crate::guest::Guest;
use crate::verdict::Verdict;

/// The longest time until a program got there, or is gone. All CPUs of the guest may be busy.
const LIMIT: Duration = Duration::from_secs(60);

/// Prints the ids of those that sleep there: a CPU can start such a program long before it makes the system call.
/// 34 is pause (`arch/x86/entry/syscalls/syscall_64.tbl`).
const ASLEEP: &str = "for pid in $(pidof pause); do \
    if grep -q '^34 ' /proc/$pid/syscall; then echo $pid; fi; done";

/// Starts `more` of them. Returns the process ids of all that sleep there, when `all` do.
///
/// # Errors
///
/// [`Verdict::Failure`] if they do not after a minute.
pub fn begin(guest: &Guest, more: usize, all: usize) -> Result<Vec<String>, Verdict> {
    guest.ok(&format!("for i in $(seq {more}); do pause & done"))?;
    await_asleep(guest, all)
}

/// Waits until `all` of them sleep there, and returns their process ids.
///
/// # Errors
///
/// [`Verdict::Failure`] if they do not after a minute.
pub fn await_asleep(guest: &Guest, all: usize) -> Result<Vec<String>, Verdict> {
    until(LIMIT, || {
        let text = guest.ok(ASLEEP)?;
        let pids: Vec<String> = text.split_whitespace().map(str::to_owned).collect();
        if pids.len() == all {
            return Ok(Ok(pids));
        }
        Ok(Err(format!("{pids:?} sleep in pause(2), expected {all}")))
    })
}

/// Ends all of them, and waits until they are gone.
///
/// # Errors
///
/// [`Verdict::Failure`] if one is there after a minute.
pub fn end(guest: &Guest) -> Result<(), Verdict> {
    guest.ok("killall pause")?;
    gone(guest, "$(pidof pause)")
}

/// Ends the process `pid`, and waits until it is gone.
///
/// # Errors
///
/// [`Verdict::Failure`] if it is there after a minute.
pub fn end_one(guest: &Guest, pid: &str) -> Result<(), Verdict> {
    guest.ok(&format!("kill {pid}"))?;
    gone(guest, pid)
}

/// Waits until none of these processes is there.
fn gone(guest: &Guest, pids: &str) -> Result<(), Verdict> {
    until(LIMIT, || {
        let left = guest.ok(&format!(
            "for pid in {pids}; do [ ! -e /proc/$pid ] || echo $pid; done"
        ))?;
        Ok(if left.is_empty() {
            Ok(())
        } else {
            Err(format!("{left} were ended, and are still there"))
        })
    })
}
