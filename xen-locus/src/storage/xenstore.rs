//! XenStore, through `xenstore-rs`: names of domains, and what this tool publishes.
//!
//! Each node has one writer, and the node that commits a step is written last, so no transaction is needed
//! (xen-locus-xenstore(7)).

use std::fmt;
use std::io;
use std::sync::mpsc;
use std::time::Duration;

use locus_guest::addr::DomId;
use locus_xen::fault;
use xenstore_rs::unix::XsUnix;
use xenstore_rs::Xs;

use crate::error::{Error, Result};

/// Path of this tool's nodes.
pub const ROOT: &str = "/tool/xen-locus";

/// How long xenstored may take for its first answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// A connection to xenstored.
pub struct Store {
    xs: XsUnix,
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Store")
    }
}

impl Store {
    /// Connects, and waits for a first answer: without xenstored the kernel's device accepts requests and never
    /// answers them.
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
            // If the answer comes too late, the receiver is gone.
            let _ = sender.send(store);
        });
        match receiver.recv_timeout(PATIENCE) {
            Ok(Ok(xs)) => Ok(Store { xs }),
            Ok(Err(e)) => Err(none(&e.to_string())),
            Err(_) => Err(none(&format!("waited {} s", PATIENCE.as_secs()))),
        }
    }

    /// The name of a domain, if it has one.
    #[must_use]
    pub fn domain_name(&self, id: DomId) -> Option<String> {
        Nodes::domain_name(self, id)
    }
}

/// Nodes of XenStore, as the daemon and the publication of a guest's status need them.
pub trait Nodes: fmt::Debug {
    /// A node's value; `None` if there is no such node.
    ///
    /// # Errors
    /// xenstored failed.
    fn read(&self, path: &str) -> Result<Option<String>>;
    /// Names of a node's children; none if there is no such node.
    ///
    /// # Errors
    /// xenstored failed.
    fn children(&self, path: &str) -> Result<Vec<String>>;
    /// Writes a node, with the nodes above it as needed.
    ///
    /// # Errors
    /// xenstored failed.
    fn write(&self, path: &str, value: &str) -> Result<()>;
    /// Removes a node and all below it; nothing to do if there is none.
    ///
    /// # Errors
    /// xenstored failed.
    fn remove(&self, path: &str) -> Result<()>;
    /// The name of a domain, if it has one.
    fn domain_name(&self, id: DomId) -> Option<String> {
        self.read(&format!("/local/domain/{id}/name"))
            .ok()
            .flatten()
    }
}

impl Nodes for Store {
    fn read(&self, path: &str) -> Result<Option<String>> {
        match fault::point("xs_read").and_then(|()| self.xs.read(path)) {
            Ok(value) => Ok(Some(value.into())),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(failed("reading", path, &e)),
        }
    }

    fn children(&self, path: &str) -> Result<Vec<String>> {
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

    fn write(&self, path: &str, value: &str) -> Result<()> {
        fault::point("xs_write")
            .and_then(|()| self.xs.write(path, value))
            .map_err(|e| failed("writing", path, &e))
    }

    fn remove(&self, path: &str) -> Result<()> {
        match fault::point("xs_rm").and_then(|()| self.xs.rm(path)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(failed("removing", path, &e)),
            _ => Ok(()),
        }
    }
}

fn failed(doing: &str, path: &str, e: &io::Error) -> Error {
    Error::failed(format!("{doing} {path} in XenStore failed: {e}"))
}
