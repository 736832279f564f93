//! A process on its own: nothing that ends its parent ends it.

use std::fs;

use super::stay_resident;

/// Makes this process live on when its parent dies: its own session, no signal but KILL and STOP, before
/// others when it wants to run, kept in memory, last to be killed for lack of it. What the kernel does not
/// allow of the last three it goes without.
pub fn detach() {
    // SAFETY: plain calls; the set is filled before it is used, and the parameter is a plain structure.
    unsafe {
        libc::setsid();
        let mut all = std::mem::zeroed::<libc::sigset_t>();
        libc::sigfillset(&raw mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, std::ptr::null_mut());
        let mut first = std::mem::zeroed::<libc::sched_param>();
        first.sched_priority = 1;
        libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const first);
    }
    let _ = std::env::set_current_dir("/");
    let _ = fs::write("/proc/self/oom_score_adj", "-1000");
    let _ = stay_resident();
}
