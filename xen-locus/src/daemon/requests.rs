//! The requests that the daemon knows: those that are queued, those that wait, and those that are answered.

use std::collections::{HashMap, HashSet, VecDeque};
use std::time::{Duration, Instant};

use super::backoff::Backoff;
use super::queue::{Job, Queue};
use super::request::{is_name, IsSubmitted, Nodes as RequestNodes, NAME_MAX};
use super::work::{End, Work};
use super::TICK;
use crate::error::{ExitCode, Result};
use crate::storage::xenstore::Nodes;

/// Longest wait between two tries of a request, whose module is not loaded yet or that could not be read.
const WAIT_MAX: Duration = Duration::from_secs(8);
/// Most answered requests that stay until the requester removes them.
const ANSWERED_MAX: usize = 1024;
/// Most workers that end in the middle of one request.
const DEATHS_MAX: u32 = 3;

/// The requests that are known.
pub(super) struct Requests {
    /// In the queue, or a worker has them.
    queued: HashSet<String>,
    /// To be looked at again.
    waiting: Backoff<String>,
    /// The last answered requests, the oldest first.
    answered: VecDeque<String>,
    /// How many workers ended in the middle of a request.
    deaths: HashMap<String, u32>,
}

impl Requests {
    pub(super) fn new() -> Requests {
        Requests {
            queued: HashSet::new(),
            waiting: Backoff::new(TICK, WAIT_MAX),
            answered: VecDeque::new(),
            deaths: HashMap::new(),
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
            Ok(()) => self.waiting.forget(&id.to_owned()),
            Err(error) => {
                say(format!("request {}: {error}", shown(id)));
                match is_name(id) {
                    true => self.waiting.put_off(id.to_owned(), now),
                    // It can't be answered, and will not be a better one.
                    false => self.waiting.forget(&id.to_owned()),
                }
            }
        }
    }

    fn try_look(&mut self, store: &dyn Nodes, queue: &mut Queue, id: &str) -> Result<()> {
        let nodes = RequestNodes { store, id };
        match nodes.is_submitted()? {
            IsSubmitted::No => return Ok(()),
            IsSubmitted::Answered => {
                self.remember(store, id);
                return Ok(());
            }
            IsSubmitted::Yes => {}
        }
        if !is_name(id) {
            let why = format!(
                "malformed request: its ID is {}; expected at most {NAME_MAX} letters, digits, _ and -",
                shown(id)
            );
            nodes.answer(ExitCode::Usage as u8, &why)?;
            self.remember(store, id);
            return Ok(());
        }
        let guest = nodes.guest()?;
        // Otherwise a worker has begun it, and the next one must know. That one may still be at work, and write its state now.
        if nodes.read("state")?.is_none() {
            nodes.write("state", "queued")?;
        }
        self.queued.insert(id.to_owned());
        queue.push(Job {
            work: Work::Request(id.to_owned()),
            guest,
            is_background: false,
        });
        Ok(())
    }

    /// The worker that had request `id` has ended.
    pub(super) fn ended(
        &mut self,
        store: &dyn Nodes,
        id: &str,
        end: &End,
        now: Instant,
        say: &dyn Fn(String),
    ) {
        self.queued.remove(id);
        let End::Died(how) = end else {
            self.deaths.remove(id);
            let nodes = RequestNodes { store, id };
            match (end, nodes.is_submitted()) {
                (End::Done, Ok(IsSubmitted::Answered)) => self.remember(store, id),
                (End::Done, Ok(IsSubmitted::No)) => {}
                // Or its requester made a new one with this ID, before it was known that the old one is answered.
                _ => self.waiting.put_off(id.to_owned(), now),
            }
            return;
        };
        let deaths = self.deaths.entry(id.to_owned()).or_default();
        *deaths += 1;
        say(format!("request {id}: its worker ended: {how}"));
        if *deaths < DEATHS_MAX {
            self.waiting.put_off(id.to_owned(), now);
            return;
        }
        self.deaths.remove(id);
        let why = format!(
            "{DEATHS_MAX} workers ended while they carried it out, the last one by {how}: run `xen-locus recover`, and see `xen-locus \
             status`"
        );
        let nodes = RequestNodes { store, id };
        if let Err(error) = nodes.answer(ExitCode::Uncertain as u8, &why) {
            say(format!("request {id}: {error}"));
        }
        self.remember(store, id);
    }

    /// All requests are to be looked at anew: xenstored was started again.
    pub(super) fn forget_waiting(&mut self) {
        self.waiting.retain(|_| false);
        self.answered.clear();
    }

    /// Request `id` is answered. Of many, the oldest is removed, unless it was submitted again.
    fn remember(&mut self, store: &dyn Nodes, id: &str) {
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
