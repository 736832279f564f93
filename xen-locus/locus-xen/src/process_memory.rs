//! Memory of this process: how malloc gets it, whether it is locked, and what happens when there is none.
//!
//! When memory runs out, Rust aborts: no message about the guest, and an exit code that means nothing. The
//! [`ExitingAllocator`] says how much was asked for, and ends the process with an exit code that is true of the guest.
//! If the process was changing a guest, its guardian finishes or undoes the change.

use std::alloc::{GlobalAlloc, Layout, System};
use std::fmt::Write as _;
use std::sync::atomic::{AtomicBool, Ordering};

use super::process::{leave_no_core, lift_cpu_limit};
use super::Error;

/// Whether a guest may have been changed.
static GUEST_MAY_BE_CHANGED: AtomicBool = AtomicBool::new(false);

/// Notes that a guest may have been changed from now on: if memory runs out later, the process ends with
/// [`ExitingAllocator::uncertain`]. Its processor time has no limit any more ([`limit_cpu`](super::limit_cpu)). If it crashes,
/// it leaves no core (PR_SET_DUMPABLE, prctl(2)): a guest may be paused until that is written.
pub fn set_guest_may_be_changed() {
    lift_cpu_limit();
    leave_no_core();
    GUEST_MAY_BE_CHANGED.store(true, Ordering::SeqCst);
}

/// Makes malloc take memory from the kernel in large pieces and keep what is freed.
///
/// Otherwise each table of a guest's kernel gets pages of its own, which go back to the kernel with it. In a PV control
/// domain each of these pages is a change of page tables that Xen checks. That took more than half of the time of a
/// short command.
pub fn keep_freed_memory() {
    #[cfg(target_env = "gnu")]
    for (option, value) in [
        // The most that malloc takes (HEAP_MAX_SIZE / 2, malloc/malloc.c).
        (libc::M_MMAP_THRESHOLD, 32 << 20),
        (libc::M_TRIM_THRESHOLD, 1 << 30),
        (libc::M_TOP_PAD, 16 << 20),
        // Other threads do not get such pieces of their own.
        (libc::M_ARENA_MAX, 1),
    ] {
        // SAFETY: the call takes plain numbers and ignores options that it does not know.
        unsafe { libc::mallopt(option, value) };
    }
}

/// Lets this process, and those that it starts, take at most `bytes` of memory of its own (`RLIMIT_DATA`, setrlimit(2)).
/// Memory of guests that is mapped does not count. A lower limit stays.
///
/// Then a mistake in what reading a guest may cost ends this process, by [`ExitingAllocator`], and does not take the memory of
/// the control domain.
///
/// # Errors
/// The kernel refuses.
pub fn limit_memory(bytes: u64) -> Result<(), Error> {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the call fills the structure, which is its own.
    if unsafe { libc::getrlimit(libc::RLIMIT_DATA, &raw mut limit) } != 0 {
        return Err(Error::last("reading the limit of memory (getrlimit)"));
    }
    if limit.rlim_cur <= bytes {
        return Ok(());
    }
    limit.rlim_cur = bytes;
    // SAFETY: the call reads the structure.
    if unsafe { libc::setrlimit(libc::RLIMIT_DATA, &raw const limit) } != 0 {
        return Err(Error::last(
            "limiting the memory of this process (setrlimit)",
        ));
    }
    Ok(())
}

/// Locks all memory of this process from now on: code, data and what it will allocate (mlockall(2)).
///
/// Otherwise the first use of a page in a pause waits for the kernel, or for a disk to swap it in. Outside of a pause,
/// pages come one by one, and a PV control domain asks Xen for each.
///
/// # Errors
/// The kernel refuses: the process may not lock so much.
pub fn lock_memory() -> Result<(), Error> {
    // SAFETY: the call changes no memory's contents and takes no pointer.
    if unsafe { libc::mlockall(libc::MCL_CURRENT | libc::MCL_FUTURE) } == 0 {
        return Ok(());
    }
    Err(Error::last("locking this process in memory (mlockall)"))
}

/// Undoes [`lock_memory`]: for a process that is idle for days, and works on no guest itself.
pub fn unlock_memory() {
    // SAFETY: the call changes no memory's contents and takes no pointer.
    unsafe { libc::munlockall() };
}

/// The system's allocator, except that a process which gets no memory is ended.
#[derive(Debug)]
pub struct ExitingAllocator {
    /// Exit code of a process that changed nothing.
    pub failed: i32,
    /// Exit code of a process that may have changed a guest.
    pub uncertain: i32,
}

impl ExitingAllocator {
    fn checked(&self, memory: *mut u8, size: usize) -> *mut u8 {
        if memory.is_null() {
            self.give_up(size);
        }
        memory
    }

    fn give_up(&self, size: usize) -> ! {
        let changed = GUEST_MAY_BE_CHANGED.load(Ordering::SeqCst);
        let (code, then) = if changed {
            (
                self.uncertain,
                "run `xen-locus recover` to find out what became of the change of a guest",
            )
        } else {
            (self.failed, "nothing was changed")
        };
        let mut line = Line {
            bytes: [0; 256],
            len: 0,
        };
        let _ = writeln!(
            line,
            "xen-locus: out of memory: {size} more bytes were asked for and not available; {then}"
        );
        // SAFETY: `line` has `len` bytes, and the call keeps no pointer; `_exit` runs no code of this process,
        // which may be in the middle of anything.
        unsafe {
            libc::write(2, line.bytes.as_ptr().cast(), line.len);
            libc::_exit(code)
        }
    }
}

// SAFETY: each function is that of `System`, called with what the caller guarantees; null is never
// returned, because the process ends then.
unsafe impl GlobalAlloc for ExitingAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as above.
        self.checked(unsafe { System.alloc(layout) }, layout.size())
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(memory, layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as above.
        self.checked(unsafe { System.alloc_zeroed(layout) }, layout.size())
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: as above.
        self.checked(unsafe { System.realloc(memory, layout, size) }, size)
    }
}

/// A line of text on the stack.
struct Line {
    bytes: [u8; 256],
    len: usize,
}

impl std::fmt::Write for Line {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        for (to, byte) in self.bytes.iter_mut().skip(self.len).zip(text.bytes()) {
            *to = byte;
            self.len += 1;
        }
        Ok(())
    }
}
