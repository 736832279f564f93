//! The requests that the daemon knows: those that wait, and those that are answered.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::backoff::Backoff;
use super::TICK;
use crate::error::Result;

/// Longest wait between two tries of a request whose module is not loaded yet.
const MODULE_WAIT_MAX: Duration = Duration::from_secs(8);
/// Most answered requests that stay until the requester removes them. With the longest names they leave room in the
/// 4 KiB that XenStore lists of a folder.
const ANSWERED_MAX: usize = 48;

/// What became of a request for now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Served {
    /// It is no request, or was removed.
    None,
    /// It is answered.
    Answered,
    /// It is to be tried again: a module that it changes is not loaded, and its deadline is not reached; or this daemon
    /// is asked to stop, and the next one carries it out.
    Waits,
}

/// Carries out requests.
pub(super) trait Serve {
    /// Whether this daemon is asked to stop.
    fn is_stopping(&self) -> bool;
    /// Serves request `id`, if it is submitted and not answered yet.
    fn serve(&self, id: &str) -> Result<Served>;
    /// Removes request `id`, unless it was submitted again.
    fn clear(&self, id: &str) -> Result<()>;
}

/// The requests that are known.
pub(super) struct Requests<'s, S> {
    server: &'s S,
    /// Requests that are to be tried again.
    waiting: Backoff<String>,
    /// The last answered requests, the oldest first.
    answered: VecDeque<String>,
}

impl<'s, S: Serve> Requests<'s, S> {
    pub(super) fn new(server: &'s S) -> Requests<'s, S> {
        Requests {
            server,
            waiting: Backoff::new(TICK, MODULE_WAIT_MAX),
            answered: VecDeque::new(),
        }
    }

    /// Serves the requests whose wait is over.
    ///
    /// # Errors
    /// XenStore failed.
    pub(super) fn serve_due(&mut self, now: Instant) -> Result<()> {
        let due = self.waiting.due(now);
        due.into_iter().try_for_each(|id| self.serve(id))
    }

    /// Serves request `id`, unless this daemon is asked to stop: the next daemon finds the request.
    ///
    /// # Errors
    /// XenStore failed.
    pub(super) fn serve(&mut self, id: String) -> Result<()> {
        if self.server.is_stopping() {
            return Ok(());
        }
        match self.server.serve(&id)? {
            Served::None => self.waiting.forget(&id),
            Served::Waits => self.waiting.put_off(id, Instant::now()),
            Served::Answered => {
                self.waiting.forget(&id);
                self.answered.retain(|known| *known != id);
                self.answered.push_back(id);
                if self.answered.len() > ANSWERED_MAX {
                    let oldest = self.answered.pop_front();
                    oldest.map_or(Ok(()), |id| self.server.clear(&id))?;
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::cell::{Cell, RefCell};

    use super::*;

    struct Mock {
        stops: Cell<bool>,
        gives: Cell<Served>,
        calls: RefCell<Vec<String>>,
    }

    impl Mock {
        fn gives(served: Served) -> Mock {
            Mock {
                stops: Cell::new(false),
                gives: Cell::new(served),
                calls: RefCell::default(),
            }
        }
    }

    impl Serve for Mock {
        fn is_stopping(&self) -> bool {
            self.stops.get()
        }

        fn serve(&self, id: &str) -> Result<Served> {
            self.calls.borrow_mut().push(format!("serve {id}"));
            Ok(self.gives.get())
        }

        fn clear(&self, id: &str) -> Result<()> {
            self.calls.borrow_mut().push(format!("clear {id}"));
            Ok(())
        }
    }

    #[test]
    fn a_request_that_waits_is_served_again_when_it_is_due_until_it_is_answered() {
        let server = Mock::gives(Served::Waits);
        let mut requests = Requests::new(&server);
        let before = Instant::now();
        requests.serve("a".into()).unwrap();
        requests.serve_due(before).unwrap();
        assert_eq!(server.calls.take(), ["serve a"]);
        let later = Instant::now() + TICK;
        server.gives.set(Served::Answered);
        requests.serve_due(later).unwrap();
        requests.serve_due(later + MODULE_WAIT_MAX).unwrap();
        assert_eq!(server.calls.take(), ["serve a"]);
        assert_eq!(requests.answered, ["a"]);
    }

    #[test]
    fn a_request_that_was_removed_while_it_waited_is_forgotten() {
        let server = Mock::gives(Served::Waits);
        let mut requests = Requests::new(&server);
        requests.serve("a".into()).unwrap();
        server.gives.set(Served::None);
        let mut later = Instant::now() + TICK;
        requests.serve_due(later).unwrap();
        later += MODULE_WAIT_MAX;
        requests.serve_due(later).unwrap();
        assert_eq!(server.calls.take(), ["serve a", "serve a"]);
        assert!(requests.answered.is_empty());
    }

    #[test]
    fn a_daemon_that_is_asked_to_stop_serves_nothing() {
        let server = Mock::gives(Served::Waits);
        let mut requests = Requests::new(&server);
        requests.serve("a".into()).unwrap();
        server.stops.set(true);
        requests.serve("b".into()).unwrap();
        requests.serve_due(Instant::now() + TICK).unwrap();
        assert_eq!(server.calls.take(), ["serve a"]);
    }

    #[test]
    fn of_many_answered_requests_the_oldest_is_removed_and_one_answered_again_is_the_newest() {
        let server = Mock::gives(Served::Answered);
        let mut requests = Requests::new(&server);
        for id in 0..ANSWERED_MAX {
            requests.serve(id.to_string()).unwrap();
        }
        requests.serve("0".into()).unwrap();
        assert!(!server.calls.take().iter().any(|c| c.starts_with("clear")));
        requests.serve("one more".into()).unwrap();
        assert_eq!(server.calls.take(), ["serve one more", "clear 1"]);
        assert_eq!(requests.answered.len(), ANSWERED_MAX);
    }
}
