//! `xen-locus daemon`: serves requests made through XenStore, and publishes every guest's status.
//!
//! The daemon itself waits, decides what comes next (`queue.rs`), and starts a worker for it: a process of its own
//! ([`mod@work`]). It maps no guest's memory and waits for no guest. Nothing that is wrong with one guest, one node or one worker
//! ends it. Protocol: xen-locus-xenstore(7).

mod backoff;
mod notify;
mod payloads;
mod publisher;
mod queue;
mod reapply;
mod request;
mod requests;
mod server;
mod turns;
pub mod work;

use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{bail, Context as _};
use futures::{stream, Stream, StreamExt as _};
use locus_guest::addr::DomId;
use locus_xen::{DomainInfo, HeldSignals};
use xenstore_rs::tokio::XsTokio;
use xenstore_rs::AsyncWatch as _;

use crate::apply::Options;
use crate::error::{Class, Error, ExitCode, Result};
use crate::ops::host::Host;
use crate::ops::{self, operator, recover_all};
use crate::paths::{self, DAEMON_LOCK};
use crate::recover::Report;
use crate::say;
use crate::storage::xenstore::{Nodes, ROOT};
use server::{Served, Server};
use turns::{Daemon, Hands, BEAT};
use work::{End, Work, Worker};

/// Time between two looks at guests and at xenstored.
const TICK: Duration = Duration::from_millis(500);
/// Time between two looks at workers.
const WORKER_TICK: Duration = Duration::from_millis(10);
/// Longest wait for xenstored to accept a watch.
const WATCH: Duration = Duration::from_secs(5);

/// Settings of the daemon.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Folder of the payloads, which requests name.
    pub payloads: PathBuf,
    /// Patches that guests lost are applied again.
    pub reapply: bool,
    /// Options for each request. The daemon ends when these say that it was interrupted.
    pub options: Options,
    /// Verbosity of stderr.
    pub verbose: u8,
}

impl Settings {
    /// Writes a line to stderr, if the verbosity is at least `level`.
    fn say(&self, level: u8, what: impl std::fmt::Display) {
        if self.verbose >= level {
            say::line(what);
        }
    }
}

/// Runs until asked to stop.
///
/// # Errors
/// Another daemon runs; there is no event loop.
pub fn run(host: &Host, settings: &Settings) -> anyhow::Result<ExitCode> {
    let _lock = only_one()?;
    // Workers lock their own memory.
    locus_xen::unlock_memory();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the event loop")?;
    runtime.block_on(serve(host, settings));
    // If xenstored is away, nobody reads it.
    let _ = host.store.write(&format!("{ROOT}/state"), "stopped");
    Ok(ExitCode::Done)
}

fn only_one() -> anyhow::Result<File> {
    let file = paths::open_lock(Path::new(DAEMON_LOCK))
        .with_context(|| format!("cannot make {DAEMON_LOCK}"))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => bail!(Error::try_again(format!(
            "another xen-locus daemon runs already (it holds {DAEMON_LOCK})"
        ))),
        Err(TryLockError::Error(e)) => bail!("cannot lock {DAEMON_LOCK}: {e}"),
    }
}

/// The daemon's hands on this host.
struct OfHost<'s> {
    host: &'s Host,
    settings: &'s Settings,
}

impl Hands for OfHost<'_> {
    type Worker = Worker;

    fn store(&self) -> &dyn Nodes {
        &self.host.store
    }

    fn connections(&self) -> u32 {
        self.host.store.connections()
    }

    fn domains(&self) -> Result<Vec<DomainInfo>> {
        Ok(self.host.control.domains(DomId(1))?)
    }

    fn start(&self, work: &Work) -> std::io::Result<Worker> {
        Worker::start(work)
    }

    fn end(&self, worker: &mut Worker) -> Option<End> {
        worker.end()
    }

    fn ask_to_end(&self, worker: &Worker) {
        worker.ask_to_end();
    }

    fn is_stopping(&self) -> bool {
        self.settings.options.interrupted.load(Ordering::SeqCst)
    }

    fn say(&self, level: u8, what: String) {
        self.settings.say(level, what);
    }

    fn sweep(&self, domains: &[DomainInfo]) {
        ops::sweep(domains);
    }

    fn unpublished(&self) -> Vec<String> {
        ops::unpublished()
    }

    fn protect(&self) -> Result<()> {
        self.host.store.set_private(ROOT)
    }
}

async fn serve(host: &Host, settings: &Settings) {
    let hands = OfHost { host, settings };
    let mut daemon = Daemon::new(&hands, Instant::now());
    let requests = format!("{ROOT}/request");
    let mut watch: Option<Box<dyn Stream<Item = Box<str>> + Unpin>> = None;
    loop {
        daemon.turn(Instant::now());
        if daemon.has_ended() {
            return;
        }
        if daemon.needs_watch() {
            watch = None;
            // If it does not answer, the next turn is in a moment.
            let new = watch_of([&requests, BEAT]);
            if let Ok(Ok(new)) = tokio::time::timeout(WATCH, new).await {
                watch = Some(new);
                if daemon.is_watching(Instant::now()) {
                    settings.say(0, format!("xen-locus daemon: serving {requests}"));
                    if let Err(error) = notify::ready() {
                        settings.say(0, format!("the service manager can't be told: {error}"));
                    }
                }
            }
        }
        let wait = match daemon.has_workers() {
            true => WORKER_TICK,
            false => TICK,
        };
        let Some(stream) = &mut watch else {
            tokio::time::sleep(wait).await;
            continue;
        };
        tokio::select! {
            path = stream.next() => match path {
                Some(path) if &*path == BEAT => daemon.has_heard(),
                Some(path) => {
                    let id = path.strip_prefix(&*requests).and_then(|rest| {
                        rest.strip_prefix('/')?.strip_suffix("/submit")
                    });
                    if let Some(id) = id {
                        daemon.is_submitted(id, Instant::now());
                    }
                }
                None => daemon.has_lost_watch(),
            },
            () = tokio::time::sleep(wait) => {}
        }
    }
}

/// The paths of nodes that are written at or below `paths`, by one connection. If that breaks, nothing comes any more.
async fn watch_of(paths: [&str; 2]) -> std::io::Result<Box<dyn Stream<Item = Box<str>> + Unpin>> {
    // As for each message: see `Store`.
    let _whole = HeldSignals::of_job_control();
    let xs = XsTokio::new().await?;
    let first = xs.watch(paths[0]).await?;
    let second = xs.watch(paths[1]).await?;
    Ok(Box::new(stream::select(first, second)))
}

/// Does one piece of work, as a worker of the daemon.
pub fn do_work(open: impl FnOnce() -> Result<Host>, settings: &Settings, work: &Work) -> ExitCode {
    work::be_the_victim();
    work::limit_cpu(work, settings.options.timeout);
    let done = open().and_then(|host| {
        let server = Server {
            host: &host,
            settings,
        };
        match work {
            Work::Recover => recover(&server).map(|()| ExitCode::Done),
            Work::Publish(id, uuid) => match host.control.domain(*id)? {
                Some(info) if info.uuid == *uuid => server.publish(info),
                // The daemon sees that too.
                _ => Err(Error::try_again("it is gone")),
            },
            Work::Request(id) => match server.serve(id)? {
                Served::None | Served::Answered => Ok(ExitCode::Done),
                Served::Waits => Ok(ExitCode::TryAgain),
                Served::WaitsForModule => Ok(work::WAITS_ALONE),
            },
        }
    });
    done.unwrap_or_else(|error| {
        let level = u8::from(matches!(work, Work::Publish(..)));
        settings.say(
            level,
            format!("{} is to be done again later: {error}", work.about()),
        );
        ExitCode::TryAgain
    })
}

/// Recovers guests from runs that died while no daemon ran, or with the daemon before this one, or beside it.
///
/// # Errors
/// Guests can't be listed; or one of them is to be tried again.
fn recover(server: &Server<'_>) -> Result<()> {
    let options = &server.settings.options;
    let all = recover_all::all(server.host, &operator::user(), options, true)?;
    for found in &all {
        if !found.result.as_ref().is_ok_and(Report::is_nothing) {
            server.settings.say(0, format!("recover: {}", found.line()));
        }
    }
    let left = all.iter().find(|found| {
        let error = found.result.as_ref().err();
        error.is_some_and(|e| may_pass(e.class()))
    });
    left.map_or(Ok(()), |found| Err(Error::try_again(found.line())))
}

/// Whether what a run left may be settled later by the same means: not if it was found out that it can't be.
fn may_pass(class: Class) -> bool {
    matches!(class, Class::TryAgain | Class::Failed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::fake_xenstored::Xenstored;
    use crate::storage::xenstore::Store;

    #[test]
    fn what_is_written_below_a_watched_node_is_noticed() {
        let xenstored = Xenstored::start();
        let store = Store::open().unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let mut events = watch_of(["/a", "/c"]).await.unwrap();
            let first = [events.next().await, events.next().await];
            let first = first.map(Option::unwrap);
            assert!(first.contains(&"/a".into()) && first.contains(&"/c".into()));
            store.write("/b/submit", "1").unwrap();
            store.write("/a/x/submit", "1").unwrap();
            assert_eq!(events.next().await.as_deref(), Some("/a/x/submit"));
            store.write("/c", "1").unwrap();
            assert_eq!(events.next().await.as_deref(), Some("/c"));
        });
        // It is not stopped in the middle of a message.
        assert!(xenstored.holds_stops_back(|| {
            let _events = runtime.block_on(watch_of(["/a", "/c"])).unwrap();
        }));
    }
}
