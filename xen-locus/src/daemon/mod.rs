//! `xen-locus daemon`: serves requests made through XenStore, and publishes every guest's status.
//!
//! One thread: watches of `xenstore-rs` are awaited, and a request is carried out before the next is
//! looked at, so no two of them meet. Protocol: DESIGN.md section 7, xen-locus-xenstore(7).

mod later;
mod reapply;
mod request;

use std::collections::{HashMap, VecDeque};
use std::fs::{self, File, TryLockError};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{bail, Context as _};
use futures::StreamExt as _;
use locus_guest::addr::DomId;
use locus_xen::{self as xen, DomainInfo};
use xenstore_rs::tokio::XsTokio;
use xenstore_rs::AsyncWatch as _;

use crate::apply::Options;
use crate::error::{Error, ExitCode, Result};
use crate::ops;
use crate::ops::host::Host;
use crate::ops::{operator, recover_all};
use crate::recover::Finding;
use crate::say;
use crate::storage::xenstore::{Store, ROOT};
use later::Later;
use request::{Served, Server};

const LOCK: &str = "/run/xen-locus/daemon.lock";
/// How often guests that are not published yet are looked at, and signals are noticed.
const TICK: Duration = Duration::from_millis(500);
/// Longest wait between two looks at a guest that can't be read.
const WAIT_MAX: Duration = Duration::from_secs(60);
/// Longest wait between two tries of a request whose module is not loaded yet.
const MODULE_WAIT_MAX: Duration = Duration::from_secs(8);
/// Most answered requests that stay until whoever asked removes them: with the longest names they leave room in the 4 KiB
/// that XenStore lists of a folder.
const ANSWERED_MAX: usize = 48;

/// How the daemon works.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Folder of the payloads that requests name.
    pub payloads: PathBuf,
    /// Patches that guests lost are applied again.
    pub reapply: bool,
    /// How patient it is with each request; it ends when these say that it was interrupted.
    pub options: Options,
    /// How much it says on stderr.
    pub verbose: u8,
}

impl Settings {
    /// Says something on stderr if the administrator wants to hear it.
    fn say(&self, level: u8, what: impl std::fmt::Display) {
        if self.verbose >= level {
            say::line(what);
        }
    }
}

/// Runs until asked to stop.
///
/// # Errors
/// Another daemon runs, or xenstored went away.
pub fn run(host: &Host, settings: &Settings) -> anyhow::Result<ExitCode> {
    let _lock = only_one()?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the event loop")?;
    let served = runtime.block_on(serve(host, settings));
    host.store.write(&format!("{ROOT}/state"), "stopped")?;
    served.map(|()| ExitCode::Done)
}

fn only_one() -> anyhow::Result<File> {
    fs::create_dir_all("/run/xen-locus").context("cannot make /run/xen-locus")?;
    let file = File::create(LOCK).with_context(|| format!("cannot make {LOCK}"))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => bail!(Error::try_again(format!(
            "another xen-locus daemon runs already (it holds {LOCK})"
        ))),
        Err(TryLockError::Error(e)) => bail!("cannot lock {LOCK}: {e}"),
    }
}

async fn serve(host: &Host, settings: &Settings) -> anyhow::Result<()> {
    let xs = XsTokio::new().await.context("cannot reach xenstored")?;
    let requests = format!("{ROOT}/request");
    let mut submitted = xs
        .watch(&requests)
        .await
        .context("cannot watch for requests")?;
    let store = &host.store;
    store.write(&format!("{ROOT}/version"), env!("CARGO_PKG_VERSION"))?;
    store.write(&format!("{ROOT}/pid"), &std::process::id().to_string())?;
    store.write(&format!("{ROOT}/state"), "running")?;
    settings.say(0, format!("xen-locus daemon: serving {requests}"));
    let server = Server { host, settings };
    let mut desk = Requests::new(&server);
    // Runs that died while no daemon ran, or as the one before this.
    for found in recover_all::all(host, &operator::user(), &settings.options, true)? {
        if !matches!(&found.result, Ok(report) if report.result == Finding::NothingToDo) {
            settings.say(0, format!("recover: {}", found.line()));
        }
    }
    // Requests made while no daemon ran.
    match store.children(&requests) {
        Ok(ids) => ids.into_iter().try_for_each(|id| desk.serve(id))?,
        // There may be more than xenstored lists.
        Err(error) => settings.say(
            0,
            format!("requests made before are not served, remove some and start again: {error}"),
        ),
    }
    let mut publisher = Publisher::new(settings.reapply);
    let mut tick = tokio::time::interval(TICK);
    while !server.is_stopping() {
        tokio::select! {
            path = submitted.next() => {
                let Some(path) = path else { bail!("xenstored went away") };
                let id = path.strip_prefix(&*requests).and_then(|rest| {
                    rest.strip_prefix('/')?.strip_suffix("/submit")
                });
                if let Some(id) = id {
                    desk.serve(id.to_owned())?;
                }
            }
            _ = tick.tick() => {
                publisher.look(&server)?;
                for id in desk.waiting.due(Instant::now()) {
                    desk.serve(id)?;
                }
            }
        }
    }
    Ok(())
}

/// The requests that are known.
struct Requests<'s> {
    server: &'s Server<'s>,
    /// Those that are to be tried again.
    waiting: Later<String>,
    /// Those that are answered, in that order; of many the last ones.
    answered: VecDeque<String>,
}

impl<'s> Requests<'s> {
    fn new(server: &'s Server<'s>) -> Requests<'s> {
        Requests {
            server,
            waiting: Later::new(TICK, MODULE_WAIT_MAX),
            answered: VecDeque::new(),
        }
    }

    /// Serves request `id`, unless this daemon is asked to stop: the next one finds it.
    fn serve(&mut self, id: String) -> Result<()> {
        if self.server.is_stopping() {
            return Ok(());
        }
        match xen::with_memory_locked(|| self.server.serve(&id))? {
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

/// What tells that a guest is published: a node in the domain's own directory. The toolstack makes that anew, without
/// the node, where a guest's kernel starts another one (soft reset): its id and UUID stay as they were.
struct Mark<'s> {
    store: &'s Store,
    home: String,
}

impl<'s> Mark<'s> {
    fn of(store: &'s Store, id: DomId) -> Mark<'s> {
        let home = format!("/local/domain/{id}");
        Mark { store, home }
    }

    fn node(&self) -> String {
        format!("{}/xen-locus", self.home)
    }

    fn is_there(&self) -> Result<bool> {
        Ok(self.store.read(&self.node())?.is_some())
    }

    /// Sets it, unless the directory is gone: it is not for us to make.
    fn set(&self) -> Result<()> {
        match self.store.read(&self.home)? {
            Some(_) => self.store.write(&self.node(), "published"),
            None => Ok(()),
        }
    }
}

/// Publishes guests as they come and removes them as they go. What changes a guest's patches
/// publishes it itself.
struct Publisher {
    /// UUIDs of guests that could not be read.
    waiting: Later<String>,
    /// UUIDs of guests that are published.
    known: HashMap<DomId, String>,
    /// Patches that guests lost are applied again.
    reapply: bool,
}

impl Publisher {
    fn new(reapply: bool) -> Publisher {
        Publisher {
            waiting: Later::new(TICK * 2, WAIT_MAX),
            known: HashMap::new(),
            reapply,
        }
    }

    fn publish(&self, server: &Server<'_>, info: DomainInfo) -> Result<()> {
        let host = server.host;
        let domain = host.domain(info)?;
        // Before the look: what is made anew since is looked at again.
        Mark::of(&host.store, domain.info.id).set()?;
        let status = ops::look(&host.store, &domain)?;
        match self.reapply {
            true => reapply::reapply(server, &domain, &status),
            false => Ok(()),
        }
    }

    fn look(&mut self, server: &Server<'_>) -> anyhow::Result<()> {
        let (settings, host) = (server.settings, server.host);
        let domains = host.control.domains(DomId(1)).map_err(Error::from)?;
        for gone in host.store.children(&format!("{ROOT}/domain"))? {
            if !domains.iter().any(|d| d.id.to_string() == gone) {
                host.store.remove(&format!("{ROOT}/domain/{gone}"))?;
            }
        }
        self.known
            .retain(|id, _| domains.iter().any(|d| d.id == *id));
        let known: Vec<DomId> = self.known.keys().copied().collect();
        for id in known {
            if !Mark::of(&host.store, id).is_there()? {
                settings.say(1, format!("domain {id} was made anew"));
                self.known.remove(&id);
                host.store.remove(&format!("{ROOT}/domain/{id}"))?;
            }
        }
        self.waiting
            .retain(|uuid| domains.iter().any(|d| d.uuid == *uuid));
        let now = Instant::now();
        for info in domains {
            let (id, uuid) = (info.id, info.uuid.clone());
            let patient = self.waiting.is_early(&uuid, now);
            if info.dying || info.shutdown || patient || self.known.get(&id) == Some(&uuid) {
                continue;
            }
            // The toolstack is making it or making it anew, and what runs in it when that is done is yet to come.
            if info.paused {
                self.waiting.forget(&uuid);
                self.waiting.put_off(uuid, now);
                continue;
            }
            // No guest may end the daemon: not by what it has to be published either.
            let seen = xen::with_memory_locked(|| self.publish(server, info));
            match seen {
                Ok(()) => {
                    self.known.insert(id, uuid);
                }
                Err(error) => {
                    settings.say(1, format!("domain {id} is looked at again later: {error}"));
                    self.waiting.put_off(uuid, now);
                }
            }
        }
        Ok(())
    }
}
