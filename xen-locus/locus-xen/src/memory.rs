//! What becomes of this process when there is no memory left for it.
//!
//! Rust's own answer is `abort`: no word of the guest, and an exit code that says nothing. Here the
//! process says what it asked for and ends with an exit code that is true of the guest. Should it have
//! been at work on one, its guardian does the rest.

use std::alloc::{GlobalAlloc, Layout, System};
use std::fmt::Write as _;
use std::sync::atomic::{AtomicBool, Ordering};

/// A guest may have been changed.
static AT_WORK: AtomicBool = AtomicBool::new(false);

/// From now on it can't be said any more that no guest was changed.
pub fn at_work() {
    AT_WORK.store(true, Ordering::SeqCst);
}

/// Has this process get its memory in large pieces and keep them. Else each table of a guest's kernel comes in pages
/// of its own and goes back with them, and for a PV control domain each page is a change of page tables that Xen
/// checks: more than half of the time that a short command takes.
pub fn keep() {
    #[cfg(target_env = "gnu")]
    for (what, value) in [
        // The most that malloc takes (HEAP_MAX_SIZE / 2, malloc/malloc.c).
        (libc::M_MMAP_THRESHOLD, 32 << 20),
        (libc::M_TRIM_THRESHOLD, 1 << 30),
        (libc::M_TOP_PAD, 16 << 20),
    ] {
        // SAFETY: the call takes plain numbers; what it does not know it leaves as it is.
        unsafe { libc::mallopt(what, value) };
    }
}

/// Does a piece of work with all memory in place, and gives back what it took: for a process that rests between two
/// pieces for days.
pub fn resident<T>(work: impl FnOnce() -> T) -> T {
    // Where it isn't allowed things take longer, pauses too.
    let _ = super::stay_resident();
    let done = work();
    // SAFETY: the call changes no memory's contents and takes no pointer.
    unsafe { libc::munlockall() };
    #[cfg(target_env = "gnu")]
    // SAFETY: the call takes a plain number, and gives back only what nobody holds.
    unsafe {
        libc::malloc_trim(0)
    };
    done
}

/// The system's memory; a process that can't get any is ended.
#[derive(Debug)]
pub struct Memory {
    /// Exit code of a process that changed nothing.
    pub failed: i32,
    /// Exit code of a process that may have changed a guest.
    pub uncertain: i32,
}

impl Memory {
    fn checked(&self, memory: *mut u8, size: usize) -> *mut u8 {
        if memory.is_null() {
            self.give_up(size);
        }
        memory
    }

    fn give_up(&self, size: usize) -> ! {
        let at_work = AT_WORK.load(Ordering::SeqCst);
        let (code, then) = if at_work {
            (
                self.uncertain,
                "what came of the change of a guest says `xen-locus recover`",
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
            "xen-locus: out of memory: {size} more bytes were asked for and not to be had; {then}"
        );
        // SAFETY: the bytes are there, and the call keeps no pointer; `_exit` runs nothing of this process,
        // which may be in the middle of anything.
        unsafe {
            libc::write(2, line.bytes.as_ptr().cast(), line.len);
            libc::_exit(code)
        }
    }
}

// SAFETY: each function is that of `System`, called with what the caller vouches for; null is never
// returned, for then the process ends.
unsafe impl GlobalAlloc for Memory {
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

/// A line that needs no memory.
struct Line {
    bytes: [u8; 256],
    len: usize,
}

impl std::fmt::Write for Line {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        for (room, byte) in self.bytes.iter_mut().skip(self.len).zip(text.bytes()) {
            *room = byte;
            self.len += 1;
        }
        Ok(())
    }
}
