//! One page shared by two processes: what the one has of a guest, and when it dies.
//!
//! The page is mapped from a file, so that both find it, and so that it outlives both. Its mutex is
//! robust: the kernel hands it on when the thread that holds it dies, as the first thing of that death and
//! before its memory is taken apart (`futex_exit_release`, kernel/futex/core.c).

use std::cell::Cell;
use std::fs::File;
use std::os::fd::AsRawFd as _;
use std::ptr::{null_mut, NonNull};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use locus_guest::addr::PAGE_LEN;

use super::Error;

/// Says what kind of file it is, and in which form.
const MAGIC: [u8; 8] = *b"XLGUARD1";

/// How far a run has come with the pause of a guest. The order of the stores is that of the steps, each
/// before what it announces, so that a run may end between any two instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
#[repr(u32)]
pub enum Step {
    /// Nothing of the guest is held.
    Idle = 0,
    /// A count of Xen's pause counter is being taken.
    Pausing = 1,
    /// It is held.
    Paused = 2,
    /// It is held, and the guest's memory is being changed.
    Writing = 3,
    /// It is being given back.
    Unpausing = 4,
}

impl Step {
    fn of(word: u32) -> Option<Step> {
        [
            Step::Idle,
            Step::Pausing,
            Step::Paused,
            Step::Writing,
            Step::Unpausing,
        ]
        .into_iter()
        .find(|&step| step as u32 == word)
    }
}

/// How the wait for a run's end ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// It let go.
    Released,
    /// It died.
    Died,
}

#[repr(C)]
struct Head {
    magic: [u8; 8],
    mutex: libc::pthread_mutex_t,
    step: AtomicU32,
    others: AtomicU32,
    outcome: AtomicU32,
    /// When whoever waits looks again, in nanoseconds since 1970; 0 before the first wait.
    next_look: AtomicU64,
}

/// The mapped page.
pub struct Page {
    head: NonNull<Head>,
    held: Cell<bool>,
}

impl std::fmt::Debug for Page {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Page").field("step", &self.step()).finish()
    }
}

impl Page {
    /// Makes the first page of `file`, which must be there in full and all zeroes, and takes its mutex for
    /// this thread.
    ///
    /// # Errors
    /// It can't be mapped.
    pub fn create(file: &File) -> Result<Page, Error> {
        let page = Page::map(file)?;
        let head = page.head.as_ptr();
        let failed =
            |rc: i32| Error::Environment(format!("cannot make a shared mutex: error {rc}"));
        // SAFETY: `head` is a mapping of a whole page that nobody else uses yet; the attribute is
        // initialised before it is used, and the mutex before it is locked.
        let rc = unsafe {
            let mut attr = std::mem::zeroed::<libc::pthread_mutexattr_t>();
            libc::pthread_mutexattr_init(&raw mut attr);
            libc::pthread_mutexattr_setpshared(&raw mut attr, libc::PTHREAD_PROCESS_SHARED);
            libc::pthread_mutexattr_setrobust(&raw mut attr, libc::PTHREAD_MUTEX_ROBUST);
            let mutex = &raw mut (*head).mutex;
            match libc::pthread_mutex_init(mutex, &raw const attr) {
                0 => libc::pthread_mutex_lock(mutex),
                rc => rc,
            }
        };
        if rc != 0 {
            return Err(failed(rc));
        }
        page.held.set(true);
        // SAFETY: as above; written last, since it says that the page is made.
        unsafe { (&raw mut (*head).magic).write_volatile(MAGIC) };
        Ok(page)
    }

    /// Maps the page that another process made.
    ///
    /// # Errors
    /// It can't be mapped, or is not such a page.
    pub fn open(file: &File) -> Result<Page, Error> {
        let len = file.metadata().map_or(0, |m| m.len());
        if len < PAGE_LEN as u64 {
            return Err(Error::Environment(format!("a guard's file of {len} bytes")));
        }
        let page = Page::map(file)?;
        // SAFETY: the file has a whole page; the array is plain bytes.
        let magic = unsafe { (&raw const (*page.head.as_ptr()).magic).read_volatile() };
        if magic != MAGIC {
            return Err(Error::Environment(
                "this is no guard's file of this version".into(),
            ));
        }
        Ok(page)
    }

    fn map(file: &File) -> Result<Page, Error> {
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let at = unsafe {
            libc::mmap(
                null_mut(),
                PAGE_LEN,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_POPULATE,
                file.as_raw_fd(),
                0,
            )
        };
        if at == libc::MAP_FAILED {
            return Err(Error::last("mapping a guard's page (mmap)"));
        }
        NonNull::new(at.cast::<Head>())
            .map(|head| Page {
                head,
                held: Cell::new(false),
            })
            .ok_or_else(|| Error::last("mapping a guard's page (mmap)"))
    }

    fn head(&self) -> &Head {
        // SAFETY: mapped and at least that large while this value lives; all that is read through the
        // reference is atomic, and any bytes are valid in it.
        unsafe { self.head.as_ref() }
    }

    /// The step that the run is at; `None` if what stands there is none.
    #[must_use]
    pub fn step(&self) -> Option<Step> {
        Step::of(self.head().step.load(Ordering::SeqCst))
    }

    /// Says at which step the run is from now on.
    pub fn set_step(&self, step: Step) {
        let named = match step {
            Step::Idle => "mark idle",
            Step::Pausing => "mark pausing",
            Step::Paused => "mark paused",
            Step::Writing => "mark writing",
            Step::Unpausing => "mark unpausing",
        };
        // A store can't fail; before it the run may end.
        let _ = crate::fault::point(named);
        self.head().step.store(step as u32, Ordering::SeqCst);
        // What follows may be plain writes to guest memory.
        std::sync::atomic::fence(Ordering::SeqCst);
    }

    /// Whether somebody else held a pause of the guest when this run began its own.
    #[must_use]
    pub fn paused_by_others(&self) -> bool {
        self.head().others.load(Ordering::SeqCst) != 0
    }

    /// Says whether somebody else holds a pause of the guest.
    pub fn set_paused_by_others(&self, others: bool) {
        self.head().others.store(others.into(), Ordering::SeqCst);
    }

    /// What the guardian left here.
    #[must_use]
    pub fn outcome(&self) -> u32 {
        self.head().outcome.load(Ordering::SeqCst)
    }

    /// Leaves word of what the guardian did.
    pub fn set_outcome(&self, outcome: u32) {
        self.head().outcome.store(outcome, Ordering::SeqCst);
    }

    /// How long it is until whoever waits for the end of the run looks again; `None` where nobody waits, or that is
    /// happening now.
    #[must_use]
    pub fn next_look(&self) -> Option<Duration> {
        let at = Duration::from_nanos(self.head().next_look.load(Ordering::SeqCst));
        at.checked_sub(now())
    }

    /// Gives the mutex up, by the thread that made the page; so does dropping it.
    pub fn release(&self) {
        if self.held.replace(false) {
            // SAFETY: the mutex was initialised and locked by this thread.
            unsafe { libc::pthread_mutex_unlock(&raw mut (*self.head.as_ptr()).mutex) };
        }
    }

    /// Waits until the run that made the page gives the mutex up, or dies; `None` if neither happens within
    /// `limit`.
    ///
    /// # Errors
    /// What stands in the page is no mutex.
    pub fn wait(&self, limit: Duration) -> Result<Option<End>, Error> {
        let until = now() + limit;
        let nanos = u64::try_from(until.as_nanos()).unwrap_or(0);
        self.head().next_look.store(nanos, Ordering::SeqCst);
        let until = libc::timespec {
            tv_sec: i64::try_from(until.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: until.subsec_nanos().into(),
        };
        // SAFETY: the mutex was initialised by the process that made the page, with the same library.
        let rc = unsafe {
            libc::pthread_mutex_timedlock(&raw mut (*self.head.as_ptr()).mutex, &raw const until)
        };
        self.held.set(matches!(rc, 0 | libc::EOWNERDEAD));
        match rc {
            0 => Ok(Some(End::Released)),
            libc::EOWNERDEAD => Ok(Some(End::Died)),
            libc::ETIMEDOUT => Ok(None),
            rc => Err(Error::Environment(format!(
                "waiting for the working process failed: error {rc}"
            ))),
        }
    }
}

/// Time since 1970: the clock of the mutex.
fn now() -> Duration {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.unwrap_or_default()
}

impl Drop for Page {
    fn drop(&mut self) {
        // A mutex that is still held is in this thread's list of those that others wait for.
        self.release();
        // SAFETY: mapped with this size, and no reference into it is left.
        unsafe { libc::munmap(self.head.as_ptr().cast(), PAGE_LEN) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file() -> File {
        let path = std::env::temp_dir().join(format!(
            "xen-locus-page-{}-{:?}",
            std::process::id(),
            std::thread::current().id()
        ));
        std::fs::write(&path, [0; PAGE_LEN]).unwrap();
        let file = File::options().read(true).write(true).open(&path).unwrap();
        std::fs::remove_file(path).unwrap();
        file
    }

    #[test]
    fn a_page_says_that_its_maker_let_go_or_died() {
        for (end, release) in [(End::Released, true), (End::Died, false)] {
            let file = file();
            let theirs = file.try_clone().unwrap();
            std::thread::spawn(move || {
                let page = Page::create(&theirs).unwrap();
                page.set_paused_by_others(true);
                page.set_step(Step::Writing);
                if release {
                    page.release();
                }
                // else it would let go
                std::mem::forget(page);
            })
            .join()
            .unwrap();
            let page = Page::open(&file).unwrap();
            assert_eq!(page.wait(Duration::from_secs(9)).unwrap(), Some(end));
            assert_eq!(page.step(), Some(Step::Writing));
            assert!(page.paused_by_others());
        }
    }

    #[test]
    fn whoever_waits_gives_up_after_a_while() {
        const LIMIT: Duration = Duration::from_millis(200);
        let file = file();
        let page = Page::create(&file).unwrap();
        assert_eq!(page.next_look(), None);
        let waiting = std::thread::spawn(move || {
            let theirs = Page::open(&file).unwrap();
            theirs.wait(LIMIT).unwrap()
        });
        let next = loop {
            match page.next_look() {
                None if !waiting.is_finished() => {}
                next => break next,
            }
        };
        assert!(next.is_some_and(|n| n <= LIMIT), "{next:?}");
        assert_eq!(waiting.join().unwrap(), None);
        assert_eq!(page.next_look(), None);
        page.release();
    }

    #[test]
    fn a_file_that_is_no_such_page_is_refused() {
        assert!(Page::open(&file()).is_err());
        let short = file();
        short.set_len(10).unwrap();
        assert!(Page::open(&short).is_err());
    }
}
