//! `xen-locus daemon`: serves requests made through XenStore, and publishes every guest's status.
//!
//! One thread. It waits for watches of XenStore, and carries out one request before it looks at the next, so no two
//! requests run at once. Protocol: xen-locus-xenstore(7).

mod backoff;
mod publisher;
mod reapply;
mod request;
mod requests;
mod server;

use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{bail, Context as _};
use futures::StreamExt as _;
use xenstore_rs::tokio::XsTokio;
use xenstore_rs::AsyncWatch as _;

use crate::apply::Options;
use crate::error::{Error, ExitCode};
use crate::ops::host::Host;
use crate::ops::{operator, recover_all};
use crate::paths::{self, DAEMON_LOCK};
use crate::recover::Report;
use crate::say;
use crate::storage::xenstore::{Nodes as _, ROOT};
use publisher::Publisher;
use requests::{Requests, Serve as _};
use server::Server;

/// Time between two looks at guests that are not published yet, and at signals.
const TICK: Duration = Duration::from_millis(500);

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
/// Another daemon runs; xenstored went away.
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
    let mut known = Requests::new(&server);
    // Runs that died while no daemon ran, or with the daemon before this one.
    for found in recover_all::all(host, &operator::user(), &settings.options, true)? {
        if !found.result.as_ref().is_ok_and(Report::is_nothing) {
            settings.say(0, format!("recover: {}", found.line()));
        }
    }
    // Requests made while no daemon ran.
    match store.children(&requests) {
        Ok(ids) => ids.into_iter().try_for_each(|id| known.serve(id))?,
        // There may be more of them than xenstored can list.
        Err(error) => settings.say(
            0,
            format!("requests made before are not served, remove some and start again: {error}"),
        ),
    }
    let mut publisher = Publisher::new();
    let mut tick = tokio::time::interval(TICK);
    while !server.is_stopping() {
        tokio::select! {
            path = submitted.next() => {
                let Some(path) = path else { bail!("xenstored went away") };
                let id = path.strip_prefix(&*requests).and_then(|rest| {
                    rest.strip_prefix('/')?.strip_suffix("/submit")
                });
                if let Some(id) = id {
                    known.serve(id.to_owned())?;
                }
            }
            _ = tick.tick() => {
                publisher.look(&server, Instant::now())?;
                known.serve_due(Instant::now())?;
            }
        }
    }
    Ok(())
}
