//! Finds the guests that are to be published as they come, and removes them from XenStore as they go. Workers publish them; what
//! changes a guest's patches publishes the guest itself ([`crate::ops`]).

use std::collections::{BTreeMap, HashSet};
use std::time::{Duration, Instant};

use locus_guest::addr::DomId;
use locus_xen::DomainInfo;

use super::backoff::Backoff;
use super::queue::{Job, Queue};
use super::work::{End, Work};
use super::TICK;
use crate::error::Result;
use crate::storage::xenstore::{Nodes, ROOT};

/// Longest wait between two looks at a guest that can't be read.
const WAIT_MAX: Duration = Duration::from_secs(60);
/// Most guests whose mark is read in one look.
const MARKS: usize = 128;

/// The sign that a guest is published: a node in the domain's own directory. The toolstack makes that directory again,
/// without the node, when a guest's kernel starts another one (soft reset); the guest's id and UUID stay the same.
pub(super) struct Mark<'s> {
    store: &'s dyn Nodes,
    directory: String,
}

impl<'s> Mark<'s> {
    pub(super) fn of(store: &'s dyn Nodes, id: DomId) -> Mark<'s> {
        let directory = format!("/local/domain/{id}");
        Mark { store, directory }
    }

    fn node(&self) -> String {
        format!("{}/xen-locus", self.directory)
    }

    fn is_set(&self) -> Result<bool> {
        Ok(self.store.read(&self.node())?.is_some())
    }

    /// Sets it, unless the directory is gone: only the toolstack makes that.
    pub(super) fn set(&self) -> Result<()> {
        match self.store.read(&self.directory)? {
            Some(_) => self.store.write(&self.node(), "published"),
            None => Ok(()),
        }
    }
}

/// A guest: two may have the same UUID, and an id may have another guest later.
type Known = (DomId, String);

/// What is known of the guests between two looks.
pub(super) struct Publisher {
    /// Guests that could not be read.
    waiting: Backoff<Known>,
    /// Guests that are published: their UUIDs, by domain id.
    published: BTreeMap<DomId, String>,
    /// Guests that are in the queue, or that a worker has.
    queued: HashSet<Known>,
    /// Where the next look begins to read marks.
    next_mark: DomId,
    /// What is in XenStore was listed once.
    is_listed: bool,
}

impl Publisher {
    pub(super) fn new() -> Publisher {
        Publisher {
            waiting: Backoff::new(TICK * 2, WAIT_MAX),
            published: BTreeMap::new(),
            queued: HashSet::new(),
            next_mark: DomId(0),
            is_listed: false,
        }
    }

    /// All guests are to be published anew: xenstored was started again.
    pub(super) fn forget(&mut self) {
        self.published.clear();
        self.is_listed = false;
    }

    /// Whether a guest that was published is not among `domains` any more.
    pub(super) fn are_gone(&self, domains: &[DomainInfo]) -> bool {
        let there: HashSet<DomId> = domains.iter().map(|d| d.id).collect();
        self.published.keys().any(|id| !there.contains(id))
    }

    /// Looks once at all guests: those that are to be published come into the queue. What is wrong with one guest or node keeps
    /// no other from being looked at.
    pub(super) fn look(
        &mut self,
        store: &dyn Nodes,
        domains: Vec<DomainInfo>,
        queue: &mut Queue,
        now: Instant,
        say: &dyn Fn(String),
    ) {
        self.remove_gone(store, &domains, say);
        self.look_at_marks(store, say);
        for info in domains {
            let DomainInfo { id, uuid, .. } = info;
            let guest: Known = (id, uuid);
            let is_early = self.waiting.is_early(&guest, now);
            let is_published = self.published.get(&id) == Some(&guest.1);
            let is_known = is_early || is_published || self.queued.contains(&guest);
            if info.dying || info.shutdown || is_known {
                continue;
            }
            // The toolstack is at work on it, and its kernel does not run yet.
            if info.paused {
                self.waiting.forget(&guest);
                self.waiting.put_off(guest, now);
                continue;
            }
            self.queued.insert(guest.clone());
            queue.push(Job {
                work: Work::Publish(id, guest.1.clone()),
                guest: guest.1,
                is_background: true,
            });
        }
    }

    /// The worker that had a guest has ended.
    pub(super) fn ended(&mut self, id: DomId, uuid: &str, end: &End, now: Instant) {
        let guest: Known = (id, uuid.to_owned());
        self.queued.remove(&guest);
        match end {
            End::Done => {
                self.waiting.forget(&guest);
                self.published.insert(id, guest.1);
            }
            End::Later | End::Died(_) => self.waiting.put_off(guest, now),
        }
    }

    /// Removes from XenStore and forgets the guests that are gone.
    fn remove_gone(&mut self, store: &dyn Nodes, domains: &[DomainInfo], say: &dyn Fn(String)) {
        let there: HashSet<DomId> = domains.iter().map(|d| d.id).collect();
        let is_there = |id: DomId| there.contains(&id);
        let mut gone: Vec<String> = Vec::new();
        self.published.retain(|id, _| {
            let stays = is_there(*id);
            if !stays {
                gone.push(id.to_string());
            }
            stays
        });
        if !self.is_listed {
            match store.children(&format!("{ROOT}/domain")) {
                Ok(names) => {
                    self.is_listed = true;
                    let is_gone =
                        |name: &String| name.parse().map_or(true, |id| !is_there(DomId(id)));
                    gone.extend(names.into_iter().filter(is_gone));
                }
                Err(error) => say(format!(
                    "guests that are gone stay published for now: {error}"
                )),
            }
        }
        for id in gone {
            if let Err(error) = store.remove(&format!("{ROOT}/domain/{id}")) {
                say(format!("domain {id} is gone, and stays published: {error}"));
                self.is_listed = false;
            }
        }
        let all: HashSet<(DomId, &String)> = domains.iter().map(|d| (d.id, &d.uuid)).collect();
        self.waiting.retain(|(id, uuid)| all.contains(&(*id, uuid)));
    }

    /// Looks whether published guests were made again: some of them in each look, because there may be many.
    fn look_at_marks(&mut self, store: &dyn Nodes, say: &dyn Fn(String)) {
        let rest = self.published.range(self.next_mark..);
        let again = self.published.range(..self.next_mark);
        let ids: Vec<DomId> = rest.chain(again).take(MARKS).map(|(id, _)| *id).collect();
        for id in &ids {
            match Mark::of(store, *id).is_set() {
                Ok(true) => {}
                Ok(false) => {
                    say(format!("domain {id} was made again"));
                    self.published.remove(id);
                    if let Err(error) = store.remove(&format!("{ROOT}/domain/{id}")) {
                        say(format!("domain {id} is still published as it was: {error}"));
                    }
                }
                Err(error) => {
                    say(format!("domain {id}: {error}"));
                    break;
                }
            }
        }
        self.next_mark = ids
            .last()
            .map_or(DomId(0), |id| DomId(id.0.saturating_add(1)));
    }
}

#[cfg(test)]
pub(super) mod tests;
