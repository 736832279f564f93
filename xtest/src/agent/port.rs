//! How the agent answers: the port to the runner, and a failed request.

use std::fs::File;
use std::sync::{Arc, Mutex, PoisonError};

use crate::proto::{self, FailKind, Reply, Tagged};

/// The port that replies are written to. All threads share it.
#[derive(Clone)]
pub(super) struct Port {
    out: Arc<Mutex<File>>,
}

impl Port {
    /// A port on this file.
    pub(super) fn new(out: File) -> Self {
        Self {
            out: Arc::new(Mutex::new(out)),
        }
    }

    /// Sends a reply. If the port can't be written, there is no one else to report that to.
    pub(super) fn reply(&self, id: u64, message: Reply, body: &[u8]) {
        let mut out = self.out.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(e) = proto::send(&mut *out, &Tagged { id, message }, body) {
            eprintln!("xtest-agent: reply {id}: {e:#}");
        }
    }
}

/// Why a request failed.
#[derive(Debug)]
pub(super) struct Failed {
    pub(super) kind: FailKind,
    pub(super) message: String,
}

impl<E: Into<anyhow::Error>> From<E> for Failed {
    fn from(e: E) -> Self {
        Self {
            kind: FailKind::Other,
            message: format!("{:#}", e.into()),
        }
    }
}
