//! Finds the guests that are to be published as they come, and removes them from XenStore as they go. Workers publish them; what
//! changes a guest's patches publishes the guest itself ([`crate::ops`]).

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::time::{Duration, Instant};

use locus_guest::addr::DomId;
use locus_xen::DomainInfo;

use super::backoff::Backoff;
use super::queue::{Job, Queue};
use super::work::{End, Work};
use super::TICK;
use crate::error::Result;
use crate::storage::xenstore::{Nodes, ROOT};

/// Longest wait between two looks at a guest that is not ready.
const WAIT_MAX: Duration = Duration::from_secs(60);
/// The same, if it can't be read as it is: another system than Linux, or a guest that makes its memory unreadable. Each look is
/// a process, and with many such guests nothing else would be done.
const UNREADABLE_MAX: Duration = Duration::from_secs(3600);
/// Time between two looks at all that is published, for what was published of a guest that had just gone.
const LIST: Duration = Duration::from_secs(60);
/// Name of the mark.
const MARK: &str = "xen-locus";
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
        format!("{}/{MARK}", self.directory)
    }

    /// Whether the directory was made again since the mark was set.
    fn is_lost(&self) -> Result<bool> {
        let is_set = self.store.read(&self.node())?.is_some();
        Ok(!is_set && self.store.read(&self.directory)?.is_some())
    }

    /// Sets it, unless the directory is gone: only the toolstack makes that.
    pub(super) fn set(&self) -> Result<()> {
        match self.store.read(&self.directory)? {
            Some(_) => self.store.write(&self.node(), "published"),
            None => Ok(()),
        }
    }

    /// Removes what was set when the toolstack had just removed the directory, of a domain that is gone. The directory itself
    /// stays then, because the toolstack may make another domain of this id right now.
    fn clear(&self) -> Result<()> {
        match &self.store.children(&self.directory)?[..] {
            [name] if name == MARK => self.store.remove(&self.node()),
            _ => Ok(()),
        }
    }
}

/// A guest: two may have the same UUID, and an id may have another guest later.
type GuestKey = (DomId, String);

/// What is known of the guests between two looks.
pub(super) struct Publisher {
    /// Guests that could not be read.
    waiting: Backoff<GuestKey>,
    /// Guests that are published: their UUIDs, by domain id.
    published: BTreeMap<DomId, String>,
    /// The same of guests that can't be read, which have the mark too.
    unreadable: BTreeMap<DomId, String>,
    /// Guests that are in the queue, or that a worker has.
    queued: HashSet<GuestKey>,
    /// All guests of the last look.
    seen: HashSet<GuestKey>,
    /// Ids of guests that were gone when their worker ended.
    left: BTreeSet<DomId>,
    /// Where the next look begins to read marks.
    next_mark: DomId,
    /// When what is in XenStore was listed.
    listed: Option<Instant>,
}

impl Publisher {
    pub(super) fn new() -> Publisher {
        Publisher {
            waiting: Backoff::new(TICK * 2, WAIT_MAX),
            published: BTreeMap::new(),
            unreadable: BTreeMap::new(),
            queued: HashSet::new(),
            seen: HashSet::new(),
            left: BTreeSet::new(),
            next_mark: DomId(0),
            listed: None,
        }
    }

    /// All guests are to be published anew: xenstored was started again.
    pub(super) fn forget(&mut self) {
        self.published.clear();
        self.unreadable.clear();
        self.waiting.retain(|_| false);
        self.listed = None;
    }

    /// The status of the guests with these UUIDs may not be true: they are published again.
    pub(super) fn are_unpublished(&mut self, uuids: &[String], now: Instant) {
        let is_meant = |(_, uuid): &(&DomId, &String)| uuids.contains(uuid);
        let meant = self.published.iter().filter(is_meant);
        let ids: Vec<DomId> = meant.map(|(id, _)| *id).collect();
        ids.into_iter().for_each(|id| self.again(id, now));
    }

    /// A guest is to be published again: in a moment, so that no cause of it takes all the time.
    fn again(&mut self, id: DomId, now: Instant) {
        let published = self.published.remove(&id);
        if let Some(uuid) = published.or_else(|| self.unreadable.remove(&id)) {
            let guest: GuestKey = (id, uuid);
            self.waiting.forget(&guest);
            self.waiting.put_off(guest, now);
        }
    }

    /// A request was served about a guest of this UUID, id or name: if that one waits, it is looked at now.
    pub(super) fn was_served(&mut self, store: &dyn Nodes, whom: &str) {
        let is_meant = |(id, uuid): &GuestKey| {
            uuid == whom
                || id.to_string() == whom
                || store.domain_name(*id).as_deref() == Some(whom)
        };
        self.waiting.retain(|guest| !is_meant(guest));
    }

    /// Whether a guest of the last look is not among `domains` any more.
    pub(super) fn are_gone(&self, domains: &[DomainInfo]) -> bool {
        let there: HashSet<(DomId, &str)> = domains.iter().map(|d| (d.id, &*d.uuid)).collect();
        let mut seen = self.seen.iter();
        seen.any(|(id, uuid)| !there.contains(&(*id, uuid)))
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
        self.remove_gone(store, &domains, now, say);
        self.look_at_marks(store, now, say);
        for info in domains {
            let DomainInfo { id, uuid, .. } = info;
            let guest: GuestKey = (id, uuid);
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
        let guest: GuestKey = (id, uuid.to_owned());
        self.queued.remove(&guest);
        self.unreadable.remove(&id);
        if !self.seen.contains(&guest) {
            self.left.insert(id);
        }
        match end {
            End::Done => {
                self.waiting.forget(&guest);
                self.published.insert(id, guest.1);
            }
            End::Later | End::Waits => drop(self.waiting.put_off(guest, now)),
            End::CanNotBeRead => {
                self.unreadable.insert(id, guest.1.clone());
                self.waiting.put_off_up_to(guest, now, UNREADABLE_MAX);
            }
            // It may have ended before the mark was set.
            End::Died(_) => drop(self.waiting.put_off_up_to(guest, now, UNREADABLE_MAX)),
        }
    }

    /// Removes from XenStore and forgets the guests that are gone: those of the last look at once, and what a command published
    /// of another one within a minute.
    fn remove_gone(
        &mut self,
        store: &dyn Nodes,
        domains: &[DomainInfo],
        now: Instant,
        say: &dyn Fn(String),
    ) {
        let all: HashSet<GuestKey> = domains.iter().map(|d| (d.id, d.uuid.clone())).collect();
        let there: HashSet<DomId> = domains.iter().map(|d| d.id).collect();
        let is_gone = |id: &DomId| !there.contains(id);
        self.left.extend(self.seen.iter().map(|(id, _)| *id));
        let left: Vec<DomId> = std::mem::take(&mut self.left).into_iter().collect();
        for id in left.into_iter().filter(is_gone) {
            let removed = store.remove(&format!("{ROOT}/domain/{id}"));
            if let Err(error) = removed.and_then(|()| Mark::of(store, id).clear()) {
                say(format!("domain {id} is gone, and stays published: {error}"));
                self.left.insert(id);
            }
        }
        let is_fresh = |at: Instant| now.duration_since(at) < LIST;
        if !self.listed.is_some_and(is_fresh) {
            self.listed = Some(now);
            if let Err(error) = remove_strange(store, &there) {
                say(format!(
                    "guests that are gone stay published for now: {error}"
                ));
                self.listed = None;
            }
        }
        self.published.retain(|id, _| !is_gone(id));
        // Of two domains with one UUID, the other can be told now, and does not wait.
        let ended: HashSet<&String> = self.seen.difference(&all).map(|(_, uuid)| uuid).collect();
        let waits = |guest: &GuestKey| all.contains(guest) && !ended.contains(&guest.1);
        self.waiting.retain(waits);
        self.unreadable
            .retain(|id, uuid| all.contains(&(*id, uuid.clone())));
        self.seen = all;
    }

    /// Looks whether guests were made again that have a mark: some of them in each look, because there may be many.
    fn look_at_marks(&mut self, store: &dyn Nodes, now: Instant, say: &dyn Fn(String)) {
        let marked = self.published.keys().chain(self.unreadable.keys());
        let marked: BTreeSet<DomId> = marked.copied().collect();
        let rest = marked.range(self.next_mark..);
        let again = marked.range(..self.next_mark);
        let ids: Vec<DomId> = rest.chain(again).take(MARKS).copied().collect();
        for id in &ids {
            match Mark::of(store, *id).is_lost() {
                Ok(false) => {}
                Ok(true) => {
                    say(format!("domain {id} was made again"));
                    self.again(*id, now);
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

/// Removes all that is published of guests that are not `there`.
fn remove_strange(store: &dyn Nodes, there: &HashSet<DomId>) -> Result<()> {
    let mut failed = Ok(());
    for name in store.children(&format!("{ROOT}/domain"))? {
        let is_gone = name.parse().map_or(true, |id| !there.contains(&DomId(id)));
        if is_gone {
            failed = store.remove(&format!("{ROOT}/domain/{name}")).and(failed);
        }
    }
    failed
}

#[cfg(test)]
pub(super) mod tests;
