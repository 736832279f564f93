//! The requests that the daemon knows: those that are queued, those that wait, and those that are answered.
//!
//! Requests for one guest are carried out in their order. So one that failed for a reason that may pass stays at the head of its
//! guest's queue until it is answered. Two kinds wait elsewhere: those that wait for a module, with a deadline, and those that
//! could not be read, because nobody knows whose they are.

use std::collections::{HashMap, HashSet, VecDeque};
use std::time::{Duration, Instant};

use super::backoff::Backoff;
use super::queue::{Job, Queue};
use super::request::{is_name, IsSubmitted, Nodes as RequestNodes, NAME_MAX};
use super::work::{End, Work};
use super::TICK;
use crate::error::{ExitCode, Result};
use crate::storage::xenstore::Nodes;

/// Longest wait between two tries of a request.
const WAIT_MAX: Duration = Duration::from_secs(8);
/// Most answered requests that stay until the requester removes them.
const ANSWERED_MAX: usize = 1024;
/// Most workers that end in the middle of one request.
const DEATHS_MAX: u32 = 3;
/// Most tries to find out what a worker did that had begun a request. With the waits between them they take two minutes.
const LEFT_RUNNING_MAX: u32 = 20;

/// What went wrong with a request that is not answered.
#[derive(Debug, Default)]
struct Trouble {
    /// How many workers ended in the middle of it.
    deaths: u32,
    /// How the last one of them ended.
    how: String,
    /// How many tries did not find out what a worker before them did.
    left_running: u32,
}

impl Trouble {
    /// Why no other worker is to try it, if none is. `said` is what the last one said of it.
    fn is_hopeless(&self, said: impl FnOnce() -> Result<String>) -> Result<Option<String>> {
        let why = if self.deaths >= DEATHS_MAX {
            format!(
                "{} workers ended while they carried it out, the last one by {}",
                self.deaths, self.how
            )
        } else if self.left_running >= LEFT_RUNNING_MAX {
            format!(
                "this request was begun before, and {} tries did not find out whether it was carried out, the last one \
                 because: {}",
                self.left_running,
                said()?
            )
        } else {
            return Ok(None);
        };
        Ok(Some(format!(
            "{why}: run `xen-locus recover`, and see `xen-locus status`"
        )))
    }
}

/// The requests that are known.
pub(super) struct Requests {
    /// In the queue, or a worker has them.
    queued: HashSet<String>,
    /// Those at the head of their guest's queue that were put off.
    held: Backoff<String>,
    /// Not in the queue, and to be looked at again.
    waiting: Backoff<String>,
    /// The last answered requests, the oldest first.
    answered: VecDeque<String>,
    /// Those with which something went wrong.
    troubles: HashMap<String, Trouble>,
}

impl Requests {
    pub(super) fn new() -> Requests {
        Requests {
            queued: HashSet::new(),
            held: Backoff::new(TICK, WAIT_MAX),
            waiting: Backoff::new(TICK, WAIT_MAX),
            answered: VecDeque::new(),
            troubles: HashMap::new(),
        }
    }

    /// Looks at the requests whose wait is over.
    pub(super) fn look_due(
        &mut self,
        store: &dyn Nodes,
        queue: &mut Queue,
        now: Instant,
        say: &dyn Fn(String),
    ) {
        for id in self.waiting.due(now) {
            self.look(store, queue, &id, now, say);
        }
    }

    /// Looks at request `id`: if it is submitted and not answered, it comes into the queue. Whatever is wrong with it is
    /// no other request's affair.
    pub(super) fn look(
        &mut self,
        store: &dyn Nodes,
        queue: &mut Queue,
        id: &str,
        now: Instant,
        say: &dyn Fn(String),
    ) {
        if self.queued.contains(id) || id.contains('/') {
            return;
        }
        match self.try_look(store, queue, id) {
            // If this is not the last try, the wait for the next one is longer.
            Ok(true) => {}
            Ok(false) => self.forget(id),
            Err(error) => {
                say(format!("request {}: {error}", shown(id)));
                match is_name(id) {
                    true => drop(self.waiting.put_off(id.to_owned(), now)),
                    // It can't be answered, and will not be a better one.
                    false => self.forget(id),
                }
            }
        }
    }

    /// Requests in the order in which a daemon that starts is to look at them: first those that a worker began, in the order in
    /// which they were begun, and then the others as xenstored lists them.
    pub(super) fn in_order(store: &dyn Nodes, mut ids: Vec<String>) -> Vec<String> {
        ids.sort_by_cached_key(|id| {
            let nodes = RequestNodes { store, id };
            // What can't be read is looked at again in any case.
            let begun = nodes.read("entry").ok().flatten();
            begun.map_or(u64::MAX, |entry| entry.trim().parse().unwrap_or(0))
        });
        ids
    }

    /// Whether a worker is to be started for a request that has its turn. If not, it does not count as running any more.
    pub(super) fn has_turn(
        &mut self,
        store: &dyn Nodes,
        queue: &mut Queue,
        job: &Job,
        now: Instant,
        say: &dyn Fn(String),
    ) -> bool {
        let Work::Request(id) = &job.work else {
            return true;
        };
        let nodes = RequestNodes { store, id };
        let is_new = |state: Option<String>| state.is_none();
        let found = match self.is_to_be_served(&nodes) {
            Ok(true) => nodes.read("state").map(is_new).map(Some),
            Ok(false) => Ok(None),
            Err(error) => Err(error),
        };
        match found {
            Ok(Some(false)) => return true,
            Ok(is_new) => {
                queue.not_begun(job);
                self.queued.remove(id);
                self.forget(id);
                // Its requester removed it, and made another one with its ID: that comes after those that were made before.
                if is_new.is_some() {
                    self.look(store, queue, id, now, say);
                }
            }
            Err(error) => {
                say(format!("request {id}: {error}"));
                queue.not_begun(job);
                self.hold(queue, job, id, now);
            }
        }
        false
    }

    /// Whether it waits for an answer, and not for one that the daemon gives now.
    fn is_to_be_served(&mut self, nodes: &RequestNodes<'_>) -> Result<bool> {
        let (store, id) = (nodes.store, nodes.id);
        match nodes.is_submitted()? {
            IsSubmitted::No => return Ok(false),
            IsSubmitted::Answered => {
                // It keeps its place if it is looked at again.
                if !self.answered.iter().any(|known| known == id) {
                    self.remember(store, id);
                }
                return Ok(false);
            }
            IsSubmitted::Yes => {}
        }
        let Some(trouble) = self.troubles.get(id) else {
            return Ok(true);
        };
        let said = || Ok(nodes.read("message")?.unwrap_or_default());
        let Some(why) = trouble.is_hopeless(said)? else {
            return Ok(true);
        };
        nodes.answer(ExitCode::Uncertain as u8, &why)?;
        self.remember(store, id);
        Ok(false)
    }

    /// Whether it came into the queue.
    fn try_look(&mut self, store: &dyn Nodes, queue: &mut Queue, id: &str) -> Result<bool> {
        let nodes = RequestNodes { store, id };
        if !self.is_to_be_served(&nodes)? {
            return Ok(false);
        }
        if !is_name(id) {
            let why = format!(
                "malformed request: its ID is {}; expected at most {NAME_MAX} letters, digits, _ and -",
                shown(id)
            );
            nodes.answer(ExitCode::Usage as u8, &why)?;
            self.remember(store, id);
            return Ok(false);
        }
        let guest = nodes.guest()?;
        // Otherwise a worker has begun it, and the next one must know. That one may still be at work, and write its state now.
        if nodes.read("state")?.is_none() {
            nodes.write("state", "queued")?;
            // If it was removed right now, nobody removes what was written since.
            nodes.clear()?;
        }
        self.queued.insert(id.to_owned());
        queue.push(Job {
            work: Work::Request(id.to_owned()),
            guest,
            is_background: false,
        });
        Ok(true)
    }

    /// The worker that had a request has ended.
    pub(super) fn ended(
        &mut self,
        store: &dyn Nodes,
        queue: &mut Queue,
        job: &Job,
        end: &End,
        now: Instant,
        say: &dyn Fn(String),
    ) {
        let Work::Request(id) = &job.work else {
            return;
        };
        if let End::Died(how) = end {
            say(format!("request {id}: its worker ended: {how}"));
        }
        let nodes = RequestNodes { store, id };
        match (end, nodes.is_submitted()) {
            (_, Ok(IsSubmitted::Answered)) => {
                self.queued.remove(id);
                return self.remember(store, id);
            }
            (_, Ok(IsSubmitted::No)) => {
                self.queued.remove(id);
                return self.forget(id);
            }
            // Its requester made a new one with this ID, before it was known that the old one is answered.
            (End::Done, _) => {
                self.forget(id);
                return self.wait(id, now);
            }
            (End::Waits, _) => {
                self.troubles.remove(id);
                return self.wait(id, now);
            }
            (End::Later | End::CanNotBeRead, _) => {
                match nodes.read("state").as_ref().map(Option::as_deref) {
                    Ok(Some("running")) => self.trouble(id).left_running += 1,
                    Ok(_) => drop(self.troubles.remove(id)),
                    Err(_) => {}
                }
            }
            (End::Died(how), _) => {
                let trouble = self.trouble(id);
                trouble.deaths += 1;
                trouble.how.clone_from(how);
            }
        }
        self.hold(queue, job, id, now);
    }

    /// It leaves the queue, and is looked at again.
    fn wait(&mut self, id: &str, now: Instant) {
        self.queued.remove(id);
        self.held.forget(&id.to_owned());
        self.waiting.put_off(id.to_owned(), now);
    }

    /// It is tried again, before the other requests for its guest.
    fn hold(&mut self, queue: &mut Queue, job: &Job, id: &str, now: Instant) {
        let due = self.held.put_off(id.to_owned(), now);
        queue.put_off(job.clone(), due);
    }

    fn trouble(&mut self, id: &str) -> &mut Trouble {
        self.troubles.entry(id.to_owned()).or_default()
    }

    /// There is no request `id`, or another one.
    fn forget(&mut self, id: &str) {
        self.held.forget(&id.to_owned());
        self.waiting.forget(&id.to_owned());
        self.troubles.remove(id);
    }

    /// All requests are to be looked at anew: xenstored was started again.
    pub(super) fn forget_waiting(&mut self) {
        self.held.retain(|_| false);
        self.waiting.retain(|_| false);
        self.troubles.clear();
        self.answered.clear();
    }

    /// Request `id` is answered. Of many, the oldest is removed, unless it was submitted again.
    fn remember(&mut self, store: &dyn Nodes, id: &str) {
        self.forget(id);
        self.answered.retain(|known| known != id);
        self.answered.push_back(id.to_owned());
        if self.answered.len() <= ANSWERED_MAX {
            return;
        }
        if let Some(id) = self.answered.pop_front() {
            let nodes = RequestNodes { store, id: &id };
            if let Ok(IsSubmitted::Answered) = nodes.is_submitted() {
                // If it stays, the requester can still remove it.
                let _ = nodes.remove();
            }
        }
    }
}

/// An ID as it is said: root in the control domain may have made one of any length.
fn shown(id: &str) -> String {
    let text: String = id.chars().take(NAME_MAX).collect();
    match text.len() < id.len() {
        true => format!("{text:?}… ({} bytes)", id.len()),
        false => format!("{text:?}"),
    }
}

#[cfg(test)]
mod tests;
