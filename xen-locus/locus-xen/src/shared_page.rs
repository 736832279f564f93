//! One page that a run of xen-locus shares with its guardian: how far the run has come with a pause, and a mutex that
//! shows when the run dies.
//!
//! The page is mapped from a file, so that both processes find it and it outlives them. The mutex is robust: when the
//! thread that holds it dies, the kernel passes it to the waiting thread before it frees the dead process's memory
//! (`futex_exit_release`, kernel/futex/core.c).

use std::cell::{Cell, UnsafeCell};
use std::fs::File;
use std::os::fd::AsRawFd as _;
use std::ptr::{null_mut, NonNull};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::OnceLock;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use locus_guest::addr::PAGE_LEN;

use super::Error;

/// First bytes of the file: its kind and version.
const MAGIC: [u8; 8] = *b"XLGUARD1";

/// How far a run has come with the pause of a guest. Each step is stored before it is done, so that a run may end
/// between any two instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
#[repr(u32)]
pub enum PauseStep {
    /// The run holds no pause of the guest.
    Idle = 0,
    /// The run is taking a count of Xen's pause counter.
    Pausing = 1,
    /// The run holds the count.
    Paused = 2,
    /// The run holds the count and is changing the guest's memory.
    Writing = 3,
    /// The run is giving the count back.
    Unpausing = 4,
}

impl PauseStep {
    fn of(word: u32) -> Option<PauseStep> {
        [
            PauseStep::Idle,
            PauseStep::Pausing,
            PauseStep::Paused,
            PauseStep::Writing,
            PauseStep::Unpausing,
        ]
        .into_iter()
        .find(|&step| step as u32 == word)
    }
}

/// Whether the guardian has the places of the change mapped, and whether the run wishes that to change. The run goes from
/// mapped to `Unwanted` and back, and from unmapped to `Wanted`; the guardian goes the other ways.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
enum PlacesState {
    /// They are mapped. So a new page begins.
    Mapped = 0,
    /// They are still mapped; the guardian is to unmap them.
    Unwanted = 1,
    /// The guardian unmaps them, or has done so.
    Unmapped = 2,
    /// They are not mapped; the guardian is to map them.
    Wanted = 3,
}

/// Why the wait for a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WaitOutcome {
    /// The run released the mutex.
    Released,
    /// The run died while it held the mutex.
    OwnerDied,
}

/// What the page begins with. Other threads and processes write all of it, so each field is atomic or an [`UnsafeCell`]: a
/// shared reference to it says nothing about its bytes.
#[repr(C)]
struct Head {
    magic: UnsafeCell<[u8; 8]>,
    mutex: UnsafeCell<libc::pthread_mutex_t>,
    step: AtomicU32,
    others: AtomicU32,
    outcome: AtomicU32,
    /// When the guardian checks the run again, in nanoseconds by `CLOCK_MONOTONIC`, which all processes share; 0 before
    /// the first wait.
    next_check: AtomicU64,
    /// Time that the guest had run when the run paused it, in nanoseconds, plus one; 0 if it is not known. Pages of earlier
    /// versions have 0.
    cpu_time: AtomicU64,
    /// Whether the guardian has the places of the change mapped ([`PlacesState`]).
    places: AtomicU32,
}

const _: () = assert!(size_of::<Head>() <= PAGE_LEN);

/// The page, mapped into this process.
pub struct SharedPage {
    head: NonNull<Head>,
    held: Cell<bool>,
}

impl std::fmt::Debug for SharedPage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SharedPage")
            .field("step", &self.step())
            .finish()
    }
}

impl SharedPage {
    /// Initialises the first page of `file`, which must be a whole page of zeroes, and takes its mutex for this thread.
    ///
    /// # Errors
    /// The page can't be mapped, or the mutex can't be initialised.
    pub fn create(file: &File) -> Result<SharedPage, Error> {
        let page = SharedPage::map(file)?;
        let failed =
            |rc: i32| Error::Environment(format!("cannot make a shared mutex: error {rc}"));
        // SAFETY: the page is a mapping that no other process uses yet; the attribute is initialised before it is used, and
        // the mutex before it is locked.
        let rc = unsafe {
            let mut attr = std::mem::zeroed::<libc::pthread_mutexattr_t>();
            libc::pthread_mutexattr_init(&raw mut attr);
            libc::pthread_mutexattr_setpshared(&raw mut attr, libc::PTHREAD_PROCESS_SHARED);
            libc::pthread_mutexattr_setrobust(&raw mut attr, libc::PTHREAD_MUTEX_ROBUST);
            let mutex = page.head().mutex.get();
            match libc::pthread_mutex_init(mutex, &raw const attr) {
                0 => libc::pthread_mutex_lock(mutex),
                rc => rc,
            }
        };
        if rc != 0 {
            return Err(failed(rc));
        }
        page.held.set(true);
        // SAFETY: as above; written last, because it says that the page is complete.
        unsafe { page.head().magic.get().write_volatile(MAGIC) };
        Ok(page)
    }

    /// Maps the page that another process made.
    ///
    /// # Errors
    /// It can't be mapped, or the file has no such page.
    pub fn open(file: &File) -> Result<SharedPage, Error> {
        let len = file.metadata().map_or(0, |m| m.len());
        if len < PAGE_LEN as u64 {
            return Err(Error::Environment(format!(
                "the guard file has only {len} bytes"
            )));
        }
        let page = SharedPage::map(file)?;
        // SAFETY: the file has a whole page; the array is plain bytes.
        let magic = unsafe { page.head().magic.get().read_volatile() };
        if magic != MAGIC {
            return Err(Error::Environment(
                "the file is not a guard file of this version of xen-locus".into(),
            ));
        }
        Ok(page)
    }

    fn map(file: &File) -> Result<SharedPage, Error> {
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
            return Err(Error::last("mapping the page of a guard file (mmap)"));
        }
        NonNull::new(at.cast::<Head>())
            .map(|head| SharedPage {
                head,
                held: Cell::new(false),
            })
            .ok_or_else(|| Error::last("mapping the page of a guard file (mmap)"))
    }

    fn head(&self) -> &Head {
        // SAFETY: mapped and at least that large while this value lives, and aligned to a page. Who else writes it writes into
        // atomics and cells only, and any bytes are valid in them.
        unsafe { self.head.as_ref() }
    }

    /// The step that the run is at; `None` if the page has no valid step.
    #[must_use]
    pub fn step(&self) -> Option<PauseStep> {
        PauseStep::of(self.head().step.load(Ordering::SeqCst))
    }

    /// Marks the step that the run is about to do.
    pub fn set_step(&self, step: PauseStep) {
        let named = match step {
            PauseStep::Idle => "mark idle",
            PauseStep::Pausing => "mark pausing",
            PauseStep::Paused => "mark paused",
            PauseStep::Writing => "mark writing",
            PauseStep::Unpausing => "mark unpausing",
        };
        // A store can't fail, but the run may end before it.
        let _ = crate::fault::point(named);
        self.head().step.store(step as u32, Ordering::SeqCst);
        // What follows may be plain writes to guest memory.
        std::sync::atomic::fence(Ordering::SeqCst);
    }

    /// Whether another program held a pause of the guest when this run began its own.
    #[must_use]
    pub fn paused_by_others(&self) -> bool {
        self.head().others.load(Ordering::SeqCst) != 0
    }

    /// Notes whether another program holds a pause of the guest.
    pub fn set_paused_by_others(&self, others: bool) {
        self.head().others.store(others.into(), Ordering::SeqCst);
    }

    /// Time that all vCPUs of the guest together had run when the run's pause was taken, in nanoseconds; `None` if it is not
    /// known. As long as the guest is held, it does not change.
    #[must_use]
    pub fn cpu_time_ns(&self) -> Option<u64> {
        self.head().cpu_time.load(Ordering::SeqCst).checked_sub(1)
    }

    /// Notes that time.
    pub fn set_cpu_time_ns(&self, time: Option<u64>) {
        let word = time.map_or(0, |time| time.saturating_add(1));
        self.head().cpu_time.store(word, Ordering::SeqCst);
    }

    /// The run's wish that the guardian unmaps the places of the change when it next looks.
    pub fn let_go(&self) {
        self.go(PlacesState::Mapped, PlacesState::Unwanted);
    }

    /// The run's wish that the guardian has the places mapped. Returns whether it has, and keeps them; else this is to be
    /// called again. A guardian that did not unmap them yet has them at once.
    #[must_use]
    pub fn hold(&self) -> bool {
        self.go(PlacesState::Unwanted, PlacesState::Mapped);
        self.go(PlacesState::Unmapped, PlacesState::Wanted);
        self.head().places.load(Ordering::SeqCst) == PlacesState::Mapped as u32
    }

    /// What the guardian is to do, if anything: true, map the places, and then call [`SharedPage::set_mapped`]; false, unmap
    /// them.
    #[must_use]
    pub fn wish(&self) -> Option<bool> {
        // From here on the run can't take that back.
        if self.go(PlacesState::Unwanted, PlacesState::Unmapped) {
            return Some(false);
        }
        let places = self.head().places.load(Ordering::SeqCst);
        (places == PlacesState::Wanted as u32).then_some(true)
    }

    /// Notes that the guardian has mapped the places.
    pub fn set_mapped(&self) {
        self.go(PlacesState::Wanted, PlacesState::Mapped);
    }

    /// Goes from one state to another one, if it is that.
    fn go(&self, from: PlacesState, to: PlacesState) -> bool {
        let (from, to) = (from as u32, to as u32);
        let places = &self.head().places;
        let gone = places.compare_exchange(from, to, Ordering::SeqCst, Ordering::SeqCst);
        gone.is_ok()
    }

    /// What the guardian did: the number that it set, 0 if it set none.
    #[must_use]
    pub fn outcome(&self) -> u32 {
        self.head().outcome.load(Ordering::SeqCst)
    }

    /// Notes what the guardian did.
    pub fn set_outcome(&self, outcome: u32) {
        self.head().outcome.store(outcome, Ordering::SeqCst);
    }

    /// Time until the guardian checks the run again; `None` if it does not wait, or is checking now.
    #[must_use]
    pub fn next_check(&self) -> Option<Duration> {
        let at = Duration::from_nanos(self.head().next_check.load(Ordering::SeqCst));
        at.checked_sub(monotonic())
    }

    /// Releases the mutex, if this thread holds it. Dropping the page does so too.
    pub fn release(&self) {
        if self.held.replace(false) {
            // SAFETY: the mutex was initialised and locked by this thread.
            unsafe { libc::pthread_mutex_unlock(self.head().mutex.get()) };
        }
    }

    /// Waits until the run that made the page releases the mutex or dies; `None` if neither happens within `limit`.
    ///
    /// # Errors
    /// The page has no valid mutex.
    pub fn wait(&self, limit: Duration) -> Result<Option<WaitOutcome>, Error> {
        let next = monotonic() + limit;
        // For 584 years it fits.
        let nanos = u64::try_from(next.as_nanos()).unwrap_or(0);
        self.head().next_check.store(nanos, Ordering::SeqCst);
        let at = |time: Duration| libc::timespec {
            // A wait for ever, if the clock is that wrong.
            tv_sec: i64::try_from(time.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: time.subsec_nanos().into(),
        };
        let (monotonic, realtime) = (at(next), at(realtime() + limit));
        // SAFETY: the mutex was initialised by the process that made the page, with the same library. Both calls take it
        // and a time.
        let rc = unsafe {
            let mutex = self.head().mutex.get();
            match clocklock() {
                Some(clocklock) => clocklock(mutex, libc::CLOCK_MONOTONIC, &raw const monotonic),
                None => libc::pthread_mutex_timedlock(mutex, &raw const realtime),
            }
        };
        self.held.set(matches!(rc, 0 | libc::EOWNERDEAD));
        match rc {
            0 => Ok(Some(WaitOutcome::Released)),
            libc::EOWNERDEAD => Ok(Some(WaitOutcome::OwnerDied)),
            libc::ETIMEDOUT => Ok(None),
            rc => Err(Error::Environment(format!(
                "waiting for the working process failed: error {rc}"
            ))),
        }
    }
}

/// The prototype of `pthread_mutex_clocklock` (pthread.h).
type ClockLock = unsafe extern "C" fn(
    *mut libc::pthread_mutex_t,
    libc::clockid_t,
    *const libc::timespec,
) -> libc::c_int;

/// `pthread_mutex_clocklock`, which waits by a clock that nobody can set. `None` if the C library is older than glibc 2.30:
/// there the wait is longer when dom0's clock is set back.
fn clocklock() -> Option<ClockLock> {
    static FOUND: OnceLock<Option<ClockLock>> = OnceLock::new();
    *FOUND.get_or_init(|| {
        // SAFETY: the name is a C string. A function of this name has this prototype.
        unsafe {
            let found = libc::dlsym(libc::RTLD_DEFAULT, c"pthread_mutex_clocklock".as_ptr());
            std::mem::transmute::<*mut libc::c_void, Option<ClockLock>>(found)
        }
    })
}

/// Time by `CLOCK_MONOTONIC`.
fn monotonic() -> Duration {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: a place for the answer. This clock is always there.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    let part = u32::try_from(now.tv_nsec).unwrap_or(0);
    Duration::new(u64::try_from(now.tv_sec).unwrap_or(0), part)
}

/// Time since 1970; 0 if the clock is before 1970.
fn realtime() -> Duration {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.unwrap_or_default()
}

impl Drop for SharedPage {
    fn drop(&mut self) {
        // The kernel keeps a list of the robust mutexes that this thread holds. None of them may be unmapped.
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
    fn a_wait_shows_whether_the_owner_released_the_page_or_died() {
        for (end, release) in [
            (WaitOutcome::Released, true),
            (WaitOutcome::OwnerDied, false),
        ] {
            let file = file();
            let theirs = file.try_clone().unwrap();
            std::thread::spawn(move || {
                let page = SharedPage::create(&theirs).unwrap();
                page.set_paused_by_others(true);
                page.set_step(PauseStep::Writing);
                if release {
                    page.release();
                }
                // else it would let go
                std::mem::forget(page);
            })
            .join()
            .unwrap();
            let page = SharedPage::open(&file).unwrap();
            assert_eq!(page.wait(Duration::from_secs(9)).unwrap(), Some(end));
            assert_eq!(page.step(), Some(PauseStep::Writing));
            assert!(page.paused_by_others());
        }
    }

    #[test]
    fn places_that_the_guardian_began_to_unmap_are_held_only_when_they_are_mapped_anew() {
        let file = file();
        let page = SharedPage::create(&file).unwrap();
        assert!(page.hold() && page.wish().is_none());
        // The run waits so briefly that the guardian did not look meanwhile.
        page.let_go();
        assert!(page.hold() && page.wish().is_none());
        // It looked.
        page.let_go();
        page.let_go();
        assert_eq!((page.wish(), page.wish()), (Some(false), None));
        assert!(!page.hold() && !page.hold());
        page.let_go();
        assert_eq!((page.wish(), page.wish()), (Some(true), Some(true)));
        assert!(!page.hold());
        page.set_mapped();
        assert!(page.hold() && page.wish().is_none());
        // What the run no longer waits for is not taken for done.
        page.let_go();
        page.set_mapped();
        assert_eq!(page.wish(), Some(false));
    }

    #[test]
    fn a_wait_ends_after_its_limit() {
        const LIMIT: Duration = Duration::from_millis(200);
        let file = file();
        let page = SharedPage::create(&file).unwrap();
        assert_eq!(page.next_check(), None);
        let waiting = std::thread::spawn(move || {
            let theirs = SharedPage::open(&file).unwrap();
            theirs.wait(LIMIT).unwrap()
        });
        let next = loop {
            match page.next_check() {
                None if !waiting.is_finished() => {}
                next => break next,
            }
        };
        assert!(next.is_some_and(|n| n <= LIMIT), "{next:?}");
        assert!(clocklock().is_some(), "this C library is older than 2.30");
        assert_eq!(waiting.join().unwrap(), None);
        assert_eq!(page.next_check(), None);
        page.release();
    }

    #[test]
    fn a_file_that_is_no_such_page_is_refused() {
        assert!(SharedPage::open(&file()).is_err());
        let short = file();
        short.set_len(10).unwrap();
        assert!(SharedPage::open(&short).is_err());
    }
}
