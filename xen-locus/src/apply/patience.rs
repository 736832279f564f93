//! How long an action has tried, and the one place that decides what is tried again.

use std::cell::Cell;
use std::time::{Duration, Instant};

use super::options::Options;
use crate::error::Result;

/// Shortest wait between two attempts.
const WAIT_MIN: Duration = Duration::from_millis(1);
/// Longest wait between two attempts.
const WAIT_MAX: Duration = Duration::from_millis(500);

/// The time of one action, through all its plans.
#[derive(Debug)]
pub(crate) struct Patience<'o> {
    pub options: &'o Options,
    began: Instant,
    attempts: Cell<u32>,
}

impl Patience<'_> {
    /// The time begins.
    pub fn new(options: &Options) -> Patience<'_> {
        Patience {
            options,
            began: Instant::now(),
            attempts: Cell::new(0),
        }
    }

    /// Makes a plan and carries it out by `attempt`; again if it failed because of what the guest did meanwhile, or is doing, until
    /// the time is over. That is always before anything is written. All else that `attempt` can end with ends it here: an
    /// error that says that the guest must be changed first, and one that leaves the guest changed.
    ///
    /// `attempt` gets true the first time.
    ///
    /// # Errors
    /// That of the last attempt, or the action was interrupted.
    pub fn keep_trying<T>(&self, mut attempt: impl FnMut(bool) -> Result<T>) -> Result<T> {
        let mut wait = Wait::default();
        let mut done = attempt(true);
        while done.as_ref().is_err_and(|e| e.is_passing()) && !self.is_over(&wait) {
            wait.pass();
            self.options.check_interrupted()?;
            done = attempt(false);
        }
        done
    }

    /// Counts an attempt.
    pub fn count(&self) {
        self.attempts.set(self.attempts.get().saturating_add(1));
    }

    /// Attempts so far.
    pub fn attempts(&self) -> u32 {
        self.attempts.get()
    }

    /// Time since it began.
    pub fn elapsed(&self) -> Duration {
        self.began.elapsed()
    }

    /// Whether there is no time for another wait and attempt.
    pub fn is_over(&self, wait: &Wait) -> bool {
        self.elapsed() + wait.0 >= self.options.timeout
    }
}

/// The wait before the next attempt. Each is twice as long as the one before, up to [`WAIT_MAX`].
#[derive(Debug)]
pub(crate) struct Wait(pub Duration);

impl Default for Wait {
    fn default() -> Wait {
        Wait(WAIT_MIN)
    }
}

impl Wait {
    /// Waits.
    pub fn pass(&mut self) {
        std::thread::sleep(self.0);
        self.0 = (self.0 * 2).min(WAIT_MAX);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{Class, Error};

    fn tried(ends: &[fn() -> Error], timeout: Duration) -> (u32, Result<()>) {
        let options = Options {
            timeout,
            ..Options::default()
        };
        let mut times = 0;
        let done = Patience::new(&options).keep_trying(|first| {
            assert_eq!(first, times == 0);
            times += 1;
            match ends.get(times as usize - 1) {
                Some(end) => Err(end()),
                None => Ok(()),
            }
        });
        (times, done)
    }

    #[test]
    fn what_passes_is_tried_again_and_nothing_else() {
        let passing = || Error::passing("moved");
        let long = Duration::from_secs(30);
        let (times, done) = tried(&[passing, passing], long);
        assert!(done.is_ok() && times == 3);
        // The plan that is made anew says why.
        let (times, done) = tried(&[passing, || Error::not_loaded("gone")], long);
        assert_eq!(
            (times, done.unwrap_err().class()),
            (2, Class::NotApplicable)
        );
        for end in [
            || Error::try_again("a kprobe stands there"),
            || Error::uncertain("midway"),
            || Error::rolled_back("midway"),
        ] {
            assert_eq!(tried(&[end], long).0, 1);
        }
        // When there is no time the reason is the last one.
        let (times, done) = tried(&[passing], Duration::ZERO);
        assert_eq!((times, done.unwrap_err().class()), (1, Class::TryAgain));
        let all: Vec<fn() -> Error> = vec![passing; 99];
        let (times, done) = tried(&all, Duration::from_millis(30));
        assert!(times > 2 && times < 20, "{times}");
        assert!(done.unwrap_err().is_passing());
    }
}
