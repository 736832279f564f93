//! What the daemon does in each turn: looks at xenstored, at guests, at requests and at workers, and starts workers.

use std::time::{Duration, Instant};

use locus_xen::DomainInfo;

use super::backoff::Backoff;
use super::publisher::Publisher;
use super::queue::{Job, Queue};
use super::requests::Requests;
use super::work::{End, Work};
use super::TICK;
use crate::error::Result;
use crate::storage::xenstore::{Nodes, ROOT};

/// Time between two looks at all requests, for those of which xenstored did not tell.
const LIST: Duration = Duration::from_secs(60);
/// Longest wait between two tries to settle what was interrupted. Each may add a line to the audit log for each guest.
const RECOVER_MAX: Duration = Duration::from_secs(600);
/// A node of the daemon's that is watched beside the requests. It is written once a minute. If xenstored does not tell of that, the
/// connection by which it tells of requests is broken: nothing else shows that.
pub(super) const BEAT: &str = "/tool/xen-locus/pid";
/// The queue of what is done for all guests. No request gives this text for its guest, because texts of requests are trimmed.
const ALL_GUESTS: &str = "\n";

/// What the daemon needs of its host.
pub(super) trait Hands {
    /// A process that does one piece of work.
    type Worker;
    /// XenStore.
    fn store(&self) -> &dyn Nodes;
    /// How often a connection to xenstored was made.
    fn connections(&self) -> u32;
    /// All domains except the control domain.
    fn domains(&self) -> Result<Vec<DomainInfo>>;
    /// Starts a worker.
    fn start(&self, work: &Work) -> std::io::Result<Self::Worker>;
    /// How a worker ended, if it has ended.
    fn end(&self, worker: &mut Self::Worker) -> Option<End>;
    /// Asks a worker to end.
    fn ask_to_end(&self, worker: &Self::Worker);
    /// Whether the daemon is asked to stop.
    fn is_stopping(&self) -> bool;
    /// Tells the administrator something, if they want this level of detail.
    fn say(&self, level: u8, what: String);
    /// Removes what this host keeps of guests that are not among `domains`.
    fn sweep(&self, domains: &[DomainInfo]);
    /// UUIDs of the guests whose status in XenStore may not be true.
    fn unpublished(&self) -> Vec<String>;
    /// Lets only the control domain use the tool's nodes.
    fn protect(&self) -> Result<()>;
}

/// The daemon, between two turns.
pub(super) struct Daemon<'h, H: Hands> {
    hands: &'h H,
    queue: Queue,
    requests: Requests,
    publisher: Publisher,
    workers: Vec<(Job, H::Worker)>,
    next_look: Instant,
    /// When all requests are listed again, and the watch is tried.
    next_list: Instant,
    /// A node that is watched was written for that, and xenstored has not told of it yet.
    is_unheard: bool,
    /// The connection by whose xenstored requests are watched; `None` if they are not.
    watched: Option<u32>,
    /// xenstored does not answer, and that was said.
    is_silent: bool,
    /// Xen does not list the domains, and that was said.
    is_blind: bool,
    /// Workers were asked to end.
    is_ending: bool,
    /// No worker was begun yet for what is interrupted.
    is_recover_queued: bool,
    /// Something that was interrupted could not be settled.
    recovery: Backoff<()>,
}

impl<'h, H: Hands> Daemon<'h, H> {
    pub(super) fn new(hands: &'h H, now: Instant) -> Daemon<'h, H> {
        let mut daemon = Daemon {
            hands,
            queue: Queue::default(),
            requests: Requests::new(),
            publisher: Publisher::new(),
            workers: Vec::new(),
            next_look: now,
            next_list: now,
            is_unheard: false,
            watched: None,
            is_silent: false,
            is_blind: false,
            is_ending: false,
            is_recover_queued: false,
            recovery: Backoff::new(TICK * 2, RECOVER_MAX),
        };
        daemon.recover();
        daemon
    }

    /// All guests are to be recovered from interrupted runs, now: a worker ended in the middle of something.
    fn recover(&mut self) {
        self.recovery.forget(&());
        self.queue.hasten(ALL_GUESTS);
        if !std::mem::replace(&mut self.is_recover_queued, true) {
            self.queue.push(Job {
                work: Work::Recover,
                guest: ALL_GUESTS.into(),
                is_background: false,
            });
        }
    }

    /// A worker that was to settle it has ended.
    fn has_recovered(&mut self, job: &Job, end: &End, now: Instant) {
        if *end == End::Done {
            return self.recovery.forget(&());
        }
        if let End::Died(how) = end {
            let said =
                format!("recovering all guests is to be done again later: its worker ended: {how}");
            self.hands.say(0, said);
        }
        // Otherwise another one comes next.
        if !std::mem::replace(&mut self.is_recover_queued, true) {
            let due = self.recovery.put_off((), now);
            self.queue.put_off(job.clone(), due);
        }
    }

    /// One turn. It waits for nothing but xenstored, and for that not long.
    pub(super) fn turn(&mut self, now: Instant) {
        self.collect(now);
        if self.hands.is_stopping() {
            if !self.is_ending {
                self.workers
                    .iter()
                    .for_each(|(_, worker)| self.hands.ask_to_end(worker));
            }
            self.is_ending = true;
            return;
        }
        if now >= self.next_look {
            self.look(now);
            self.next_look = now + TICK;
        }
        // A worker can't begin without xenstored.
        if !self.is_silent && self.watched.is_some() {
            self.start(now);
        }
    }

    /// Whether all is ended that was to end.
    pub(super) fn has_ended(&self) -> bool {
        self.is_ending && self.workers.is_empty()
    }

    pub(super) fn has_workers(&self) -> bool {
        !self.workers.is_empty()
    }

    /// Whether requests are to be watched anew.
    pub(super) fn needs_watch(&self) -> bool {
        self.watched.is_none() && !self.is_silent && !self.is_ending
    }

    pub(super) fn has_lost_watch(&mut self) {
        self.watched = None;
    }

    /// xenstored told of [`BEAT`].
    pub(super) fn has_heard(&mut self) {
        self.is_unheard = false;
    }

    /// Requests are watched from now on. Says that the daemon is there, and looks at all requests that were made before. False if
    /// xenstored does not take part.
    pub(super) fn is_watching(&mut self, now: Instant) -> bool {
        let (hands, connections) = (self.hands, self.hands.connections());
        let store = hands.store();
        self.publisher.forget();
        self.requests.forget_waiting();
        let announce = || {
            let requests = format!("{ROOT}/request");
            store.write(&format!("{ROOT}/version"), env!("CARGO_PKG_VERSION"))?;
            store.write(BEAT, &std::process::id().to_string())?;
            if let Err(error) = hands.protect() {
                hands.say(0, format!("who may use {ROOT} is left as it is: {error}"));
            }
            store.write(&format!("{ROOT}/state"), "running")?;
            store.children(&requests)
        };
        match announce() {
            Ok(ids) => {
                self.watched = Some(connections);
                self.is_unheard = true;
                self.next_list = now + LIST;
                let ids = Requests::in_order(store, ids);
                ids.iter().for_each(|id| self.is_submitted(id, now));
                true
            }
            Err(error) => {
                hands.say(0, format!("requests are not served yet: {error}"));
                false
            }
        }
    }

    /// Request `id` may have been submitted.
    pub(super) fn is_submitted(&mut self, id: &str, now: Instant) {
        let hands = self.hands;
        let say = |what| hands.say(0, what);
        self.requests
            .look(hands.store(), &mut self.queue, id, now, &say);
    }

    /// Looks at xenstored, and if it is there at guests, and at requests whose wait is over.
    fn look(&mut self, now: Instant) {
        let hands = self.hands;
        match hands.store().read(BEAT) {
            Err(error) => {
                if !self.is_silent {
                    hands.say(
                        0,
                        format!("nothing is done until xenstored answers: {error}"),
                    );
                }
                self.is_silent = true;
                return;
            }
            // If it is another's, or gone, xenstored lost what it knew.
            Ok(pid) => {
                let is_ours = pid.as_deref() == Some(&*std::process::id().to_string());
                if self.watched.is_some() && (!is_ours || self.watched != Some(hands.connections()))
                {
                    hands.say(0, "xenstored was started again".into());
                    self.watched = None;
                }
            }
        }
        if self.is_silent {
            hands.say(0, "xenstored answers again".into());
            self.is_silent = false;
            // What it has to tell may come only now.
            self.is_unheard = false;
        }
        let detail = |what| hands.say(1, what);
        match hands.domains() {
            Ok(domains) => {
                self.is_blind = false;
                let there = domains.iter().map(|d| &*d.uuid).collect();
                self.queue.retain_slow(&there);
                if self.publisher.are_gone(&domains) {
                    hands.sweep(&domains);
                }
                self.publisher.are_unpublished(&hands.unpublished(), now);
                self.publisher
                    .look(hands.store(), domains, &mut self.queue, now, &detail);
            }
            Err(error) => {
                if !self.is_blind {
                    hands.say(
                        0,
                        format!("guests are not looked at until Xen lists them: {error}"),
                    );
                }
                self.is_blind = true;
            }
        }
        let say = |what| hands.say(0, what);
        self.requests
            .look_due(hands.store(), &mut self.queue, now, &say);
        if self.watched.is_some() && now >= self.next_list {
            self.next_list = now + LIST;
            if std::mem::replace(&mut self.is_unheard, true) {
                hands.say(
                    0,
                    "xenstored does not tell of requests any more: they are watched anew".into(),
                );
                return self.has_lost_watch();
            }
            if let Err(error) = hands.store().write(BEAT, &std::process::id().to_string()) {
                self.is_unheard = false;
                hands.say(1, format!("the watch of requests can't be tried: {error}"));
            }
            match hands.store().children(&format!("{ROOT}/request")) {
                Ok(ids) => ids.iter().for_each(|id| self.is_submitted(id, now)),
                // It is listed again.
                Err(error) => hands.say(1, format!("requests can't be listed: {error}")),
            }
        }
    }

    /// Looks which workers have ended.
    fn collect(&mut self, now: Instant) {
        let hands = self.hands;
        let mut ended = Vec::new();
        self.workers
            .retain_mut(|(job, worker)| match hands.end(worker) {
                Some(end) => {
                    ended.push((job.clone(), end));
                    false
                }
                None => true,
            });
        for (job, end) in ended {
            self.has_done(&job, &end, now);
        }
    }

    fn has_done(&mut self, job: &Job, end: &End, now: Instant) {
        let hands = self.hands;
        self.queue.ended(job, end, now);
        match &job.work {
            Work::Recover => self.has_recovered(job, end, now),
            Work::Publish(id, uuid) => {
                if let End::Died(how) = end {
                    hands.say(
                        0,
                        format!("domain {id} is looked at again later: its worker ended: {how}"),
                    );
                }
                self.publisher.ended(*id, uuid, end, now);
            }
            Work::Request(_) => {
                let say = |what| hands.say(0, what);
                let (store, queue) = (hands.store(), &mut self.queue);
                self.requests.ended(store, queue, job, end, now, &say);
                if *end == End::Done {
                    self.publisher.was_served(hands.store(), &job.guest);
                }
            }
        }
        // Whatever it did may be there in part: its guest may be paused, and nobody may come back to it.
        if matches!(end, End::Died(_)) && job.work != Work::Recover {
            self.recover();
        }
    }

    fn start(&mut self, now: Instant) {
        let hands = self.hands;
        let say = |what| hands.say(0, what);
        while let Some(job) = self.queue.next(now) {
            let (store, queue) = (hands.store(), &mut self.queue);
            if !self.requests.has_turn(store, queue, &job, now, &say) {
                continue;
            }
            self.is_recover_queued &= job.work != Work::Recover;
            match self.hands.start(&job.work) {
                Ok(worker) => self.workers.push((job, worker)),
                Err(error) => {
                    let about = job.work.about();
                    self.hands.say(
                        0,
                        format!(
                            "{about} is to be done again later: no worker can be started: {error}"
                        ),
                    );
                    self.has_done(&job, &End::Later, now);
                    return;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
