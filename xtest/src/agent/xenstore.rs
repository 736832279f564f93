//! The part of the XenStore protocol that is needed to notice domains
//! (Xen `docs/misc/xenstore.txt`, `xen/include/public/io/xs_wire.h`).

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{bail, Context, Result};

const SOCKET: &str = "/run/xenstored/socket";
const DIRECTORY: u32 = 1;
const READ: u32 = 2;
const WATCH: u32 = 4;
const WATCH_EVENT: u32 = 15;
const ERROR: u32 = 16;

/// A connection to xenstored.
pub(super) struct Store {
    socket: UnixStream,
    /// Watch events that arrived before the answer to a request.
    fired: bool,
}

impl Store {
    pub(super) fn open() -> Result<Self> {
        let socket = UnixStream::connect(SOCKET).context("connecting to xenstored")?;
        Ok(Self {
            socket,
            fired: false,
        })
    }

    pub(super) fn watch(&mut self, path: &str) -> Result<()> {
        self.ask(WATCH, &[path, "t"]).map(|_| ())
    }

    pub(super) fn list(&mut self, path: &str) -> Result<Vec<String>> {
        let text = self.ask(DIRECTORY, &[path])?;
        Ok(text
            .split('\0')
            .filter(|s| !s.is_empty())
            .map(str::to_owned)
            .collect())
    }

    pub(super) fn read(&mut self, path: &str) -> Result<String> {
        self.ask(READ, &[path])
    }

    /// Waits until a watch fires. Returns false if none does in time.
    pub(super) fn wait(&mut self, limit: Duration) -> Result<bool> {
        if std::mem::take(&mut self.fired) {
            return Ok(true);
        }
        self.socket.set_read_timeout(Some(limit))?;
        let mut first = [0u8; 1];
        let got = self.socket.read(&mut first);
        self.socket.set_read_timeout(None)?;
        match got {
            Ok(0) => bail!("xenstored closed the connection"),
            Ok(_) => {
                self.message(Some(first))?;
                Ok(true)
            }
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => Ok(false),
            Err(e) => Err(e.into()),
        }
    }

    fn ask(&mut self, op: u32, args: &[&str]) -> Result<String> {
        let mut payload = Vec::new();
        for arg in args {
            payload.extend_from_slice(arg.as_bytes());
            payload.push(0);
        }
        let mut message = Vec::new();
        for word in [op, 0, 0, u32::try_from(payload.len())?] {
            message.extend_from_slice(&word.to_le_bytes());
        }
        message.append(&mut payload);
        self.socket.write_all(&message)?;
        loop {
            let (kind, body) = self.message(None)?;
            match kind {
                WATCH_EVENT => self.fired = true,
                ERROR => bail!("xenstored: {body}"),
                _ => return Ok(body),
            }
        }
    }

    fn message(&mut self, first: Option<[u8; 1]>) -> Result<(u32, String)> {
        let mut header = Vec::with_capacity(16);
        header.extend(first.into_iter().flatten());
        let missing = 16 - u64::try_from(header.len())?;
        (&self.socket).take(missing).read_to_end(&mut header)?;
        let word = |at: usize| -> Result<u32> {
            let bytes = header
                .get(at..at + 4)
                .context("xenstored closed the connection")?;
            Ok(u32::from_le_bytes(bytes.try_into()?))
        };
        let (kind, len) = (word(0)?, word(12)?);
        let mut body = Vec::new();
        (&self.socket).take(u64::from(len)).read_to_end(&mut body)?;
        Ok((kind, String::from_utf8_lossy(&body).into_owned()))
    }
}
