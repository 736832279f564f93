//! Publishes guests as they come, and removes them from XenStore as they go. What changes a guest's patches publishes
//! the guest itself ([`crate::ops`]).

use std::collections::HashMap;
use std::time::{Duration, Instant};

use locus_guest::addr::DomId;
use locus_xen::DomainInfo;

use super::backoff::Backoff;
use super::TICK;
use crate::error::Result;
use crate::storage::xenstore::{Nodes, ROOT};

/// Longest wait between two looks at a guest that can't be read.
const WAIT_MAX: Duration = Duration::from_secs(60);

/// The guests of a host, as the publisher needs them.
pub(super) trait Guests {
    /// XenStore.
    fn store(&self) -> &dyn Nodes;
    /// All domains except the control domain.
    fn domains(&self) -> Result<Vec<DomainInfo>>;
    /// Reads the status of a guest and publishes it, and does what follows from it.
    fn publish(&self, info: DomainInfo) -> Result<()>;
    /// Tells the administrator something, if they want details.
    fn tell(&self, what: String);
}

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

/// What is known of the guests between two looks.
pub(super) struct Publisher {
    /// UUIDs of guests that could not be read.
    waiting: Backoff<String>,
    /// Guests that are published: their UUIDs, by domain id.
    published: HashMap<DomId, String>,
}

impl Publisher {
    pub(super) fn new() -> Publisher {
        Publisher {
            waiting: Backoff::new(TICK * 2, WAIT_MAX),
            published: HashMap::new(),
        }
    }

    /// Looks once at all guests.
    ///
    /// # Errors
    /// Xen or XenStore failed. That a guest can't be read is told, and the guest is tried again later.
    pub(super) fn look(&mut self, guests: &impl Guests, now: Instant) -> Result<()> {
        let domains = guests.domains()?;
        self.remove_gone(guests, &domains)?;
        for info in domains {
            let (id, uuid) = (info.id, info.uuid.clone());
            let is_early = self.waiting.is_early(&uuid, now);
            let is_published = self.published.get(&id) == Some(&uuid);
            if info.dying || info.shutdown || is_early || is_published {
                continue;
            }
            // The toolstack is at work on it, and its kernel does not run yet.
            if info.paused {
                self.waiting.forget(&uuid);
                self.waiting.put_off(uuid, now);
                continue;
            }
            // No guest may end the daemon, whatever its memory makes us publish.
            match guests.publish(info) {
                Ok(()) => {
                    self.published.insert(id, uuid);
                }
                Err(error) => {
                    guests.tell(format!("domain {id} is looked at again later: {error}"));
                    self.waiting.put_off(uuid, now);
                }
            }
        }
        Ok(())
    }

    /// Removes from XenStore and forgets the guests that are gone or were made again.
    fn remove_gone(&mut self, guests: &impl Guests, domains: &[DomainInfo]) -> Result<()> {
        let store = guests.store();
        for gone in store.children(&format!("{ROOT}/domain"))? {
            if !domains.iter().any(|d| d.id.to_string() == gone) {
                store.remove(&format!("{ROOT}/domain/{gone}"))?;
            }
        }
        self.published
            .retain(|id, _| domains.iter().any(|d| d.id == *id));
        let published: Vec<DomId> = self.published.keys().copied().collect();
        for id in published {
            if !Mark::of(store, id).is_set()? {
                guests.tell(format!("domain {id} was made again"));
                self.published.remove(&id);
                store.remove(&format!("{ROOT}/domain/{id}"))?;
            }
        }
        self.waiting
            .retain(|uuid| domains.iter().any(|d| d.uuid == *uuid));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::cell::{Cell, RefCell};

    use locus_guest::GuestType;

    use super::*;
    use crate::error::Error;
    use crate::storage::mock::MockStore;

    #[derive(Default)]
    struct Host {
        store: MockStore,
        domains: RefCell<Vec<DomainInfo>>,
        /// Guests can't be read.
        fails: Cell<bool>,
        looks: RefCell<Vec<u16>>,
    }

    impl Host {
        fn with(domains: &[DomainInfo]) -> Host {
            let host = Host::default();
            *host.domains.borrow_mut() = domains.to_vec();
            for info in domains {
                let name = format!("/local/domain/{}/name", info.id);
                host.store.put(&name, "guest");
            }
            host
        }

        fn change(&self, change: impl FnOnce(&mut DomainInfo)) {
            change(&mut self.domains.borrow_mut()[0]);
        }

        fn published(&self) -> Vec<String> {
            self.store.children(&format!("{ROOT}/domain")).unwrap()
        }
    }

    impl Guests for Host {
        fn store(&self) -> &dyn Nodes {
            &self.store
        }

        fn domains(&self) -> Result<Vec<DomainInfo>> {
            Ok(self.domains.borrow().clone())
        }

        fn publish(&self, info: DomainInfo) -> Result<()> {
            self.looks.borrow_mut().push(info.id.0);
            if self.fails.get() {
                return Err(Error::failed("it can't be read"));
            }
            Mark::of(&self.store, info.id).set()?;
            let node = format!("{ROOT}/domain/{}/uuid", info.id);
            self.store.put(&node, &info.uuid);
            Ok(())
        }

        fn tell(&self, _: String) {}
    }

    fn domain(id: u16) -> DomainInfo {
        DomainInfo {
            id: DomId(id),
            uuid: format!("uuid {id}"),
            kind: GuestType::Pvh,
            dying: false,
            shutdown: false,
            paused: false,
            vcpus: 1,
            pages: 1,
            max_pages: 1,
            shared_pages: 0,
            paged_pages: 0,
            hap: true,
        }
    }

    #[test]
    fn each_guest_is_published_once_and_removed_when_it_is_gone() {
        let host = Host::with(&[domain(1), domain(2)]);
        let mut publisher = Publisher::new();
        let now = Instant::now();
        publisher.look(&host, now).unwrap();
        publisher.look(&host, now + WAIT_MAX).unwrap();
        assert_eq!(host.looks.take(), [1, 2]);
        assert_eq!(host.published(), ["1", "2"]);
        host.domains.borrow_mut().remove(0);
        publisher.look(&host, now + WAIT_MAX).unwrap();
        assert_eq!(host.published(), ["2"]);
        assert_eq!(publisher.published.len(), 1);
    }

    #[test]
    fn a_guest_that_can_not_be_read_is_tried_again_later_and_keeps_no_other_from_being_published() {
        let host = Host::with(&[domain(1), domain(2)]);
        let mut publisher = Publisher::new();
        let now = Instant::now();
        host.fails.set(true);
        publisher.look(&host, now).unwrap();
        publisher.look(&host, now + TICK).unwrap();
        assert_eq!(host.looks.take(), [1, 2]);
        host.fails.set(false);
        publisher.look(&host, now + TICK * 2).unwrap();
        assert_eq!(host.looks.take(), [1, 2]);
        assert_eq!(host.published(), ["1", "2"]);
    }

    #[test]
    fn a_guest_that_is_made_dies_or_is_paused_is_not_looked_at() {
        let host = Host::with(&[domain(1)]);
        let mut publisher = Publisher::new();
        let now = Instant::now();
        host.change(|info| info.dying = true);
        publisher.look(&host, now).unwrap();
        host.change(|info| (info.dying, info.shutdown) = (false, true));
        publisher.look(&host, now).unwrap();
        host.change(|info| (info.shutdown, info.paused) = (false, true));
        publisher.look(&host, now).unwrap();
        host.change(|info| info.paused = false);
        // The pause put it off.
        publisher.look(&host, now + TICK).unwrap();
        assert_eq!(host.looks.take(), [0; 0]);
        publisher.look(&host, now + TICK * 2).unwrap();
        assert_eq!(host.looks.take(), [1]);
    }

    #[test]
    fn a_guest_whose_directory_was_made_again_is_published_again() {
        let host = Host::with(&[domain(1)]);
        let mut publisher = Publisher::new();
        let now = Instant::now();
        publisher.look(&host, now).unwrap();
        host.store
            .nodes
            .borrow_mut()
            .remove("/local/domain/1/xen-locus");
        publisher.look(&host, now).unwrap();
        assert_eq!(host.looks.take(), [1, 1]);
        assert_eq!(host.published(), ["1"]);
    }

    #[test]
    fn another_guest_with_the_same_id_is_published_too() {
        let host = Host::with(&[domain(1)]);
        let mut publisher = Publisher::new();
        let now = Instant::now();
        publisher.look(&host, now).unwrap();
        host.change(|info| info.uuid = "another".into());
        publisher.look(&host, now).unwrap();
        assert_eq!(host.looks.take(), [1, 1]);
        let uuid = host.store.value(&format!("{ROOT}/domain/1/uuid"));
        assert_eq!(uuid.as_deref(), Some("another"));
    }
}
