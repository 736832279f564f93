//! XenStore, through `xenstore-rs`: names of domains, and what this tool publishes.
//!
//! One writer per node and the node that commits a step is written last, so no transaction is
//! needed (DESIGN.md section 7).

use std::io;
use std::sync::mpsc;
use std::time::Duration;

use locus_guest::addr::DomId;
use locus_xen::fault;
use xenstore_rs::unix::XsUnix;
use xenstore_rs::Xs;

use crate::error::{Error, Result};

/// Where this tool's nodes stand.
pub const ROOT: &str = "/tool/xen-locus";

/// How long xenstored may take for its first answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// A connection to xenstored.
pub struct Store {
    xs: XsUnix,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Store")
    }
}

impl Store {
    /// Connects, and makes sure that somebody answers: without xenstored the kernel's device takes
    /// requests all the same and lets them wait forever.
    ///
    /// # Errors
    /// No xenstored answers.
    pub fn open() -> Result<Store> {
        let none = |why: &str| {
            Error::failed(format!(
                "no xenstored answers ({why}): is it running? (systemctl status xenstored, or xen where an init script starts it)"
            ))
        };
        let (sender, receiver) = mpsc::channel();
        std::thread::spawn(move || {
            let store = XsUnix::new().and_then(|xs| xs.directory("/").map(|_| xs));
            // Nobody listens any more if the answer came too late.
            let _ = sender.send(store);
        });
        match receiver.recv_timeout(PATIENCE) {
            Ok(Ok(xs)) => Ok(Store { xs }),
            Ok(Err(e)) => Err(none(&e.to_string())),
            Err(_) => Err(none(&format!("waited {} s", PATIENCE.as_secs()))),
        }
    }

    /// A node's value; `None` when there is no such node.
    ///
    /// # Errors
    /// xenstored failed.
    pub fn read(&self, path: &str) -> Result<Option<String>> {
        match fault::point("xs_read").and_then(|()| self.xs.read(path)) {
            Ok(value) => Ok(Some(value.into())),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(failed("reading", path, &e)),
        }
    }

    /// Names of a node's children; none when there is no such node.
    ///
    /// # Errors
    /// xenstored failed.
    pub fn children(&self, path: &str) -> Result<Vec<String>> {
        match fault::point("xs_directory").and_then(|()| self.xs.directory(path)) {
            Ok(names) => Ok(names
                .into_iter()
                .map(String::from)
                .filter(|n| !n.is_empty())
                .collect()),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(e) => Err(failed("listing", path, &e)),
        }
    }

    /// Writes a node, with the nodes above it as needed.
    ///
    /// # Errors
    /// xenstored failed.
    pub fn write(&self, path: &str, value: &str) -> Result<()> {
        fault::point("xs_write")
            .and_then(|()| self.xs.write(path, value))
            .map_err(|e| failed("writing", path, &e))
    }

    /// Removes a node and all below it; nothing to do when there is none.
    ///
    /// # Errors
    /// xenstored failed.
    pub fn remove(&self, path: &str) -> Result<()> {
        match fault::point("xs_rm").and_then(|()| self.xs.rm(path)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(failed("removing", path, &e)),
            _ => Ok(()),
        }
    }

    /// The name of a domain.
    #[must_use]
    pub fn domain_name(&self, id: DomId) -> Option<String> {
        self.read(&format!("/local/domain/{id}/name"))
            .ok()
            .flatten()
    }
}

fn failed(doing: &str, path: &str, e: &io::Error) -> Error {
    Error::failed(format!("{doing} {path} in XenStore failed: {e}"))
}
