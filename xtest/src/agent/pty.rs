//! Commands on terminals, for the interactive shell.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result};
use rustix::pty::{grantpt, openpt, ptsname, unlockpt, OpenptFlags};
use rustix::termios::{tcsetwinsize, Winsize};

use super::port::Port;
use crate::proto::Reply;

/// Open terminals, by the id of their request.
#[derive(Clone, Default)]
pub(super) struct Terminals {
    masters: Arc<Mutex<BTreeMap<u64, File>>>,
}

impl Terminals {
    /// Writes input to a terminal.
    pub(super) fn input(&self, id: u64, data: Vec<u8>) {
        let masters = self.masters.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(mut master) = masters.get(&id) {
            let _ = master.write_all(&data);
        }
    }

    /// Runs a command to its end.
    pub(super) fn run(&self, port: &Port, id: u64, cmd: &str, rows: u16, cols: u16) -> Result<i32> {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY)?;
        grantpt(&master)?;
        unlockpt(&master)?;
        let size = Winsize {
            ws_row: rows,
            ws_col: cols,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        tcsetwinsize(&master, size)?;
        let name = ptsname(&master, Vec::new())?.into_string()?;
        let slave = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&name)
            .context("a terminal")?;
        // setsid -c makes the terminal the controlling one of a new session
        let mut child = Command::new("setsid")
            .args(["-c", "/bin/sh", "-c", cmd])
            .env("TERM", "linux")
            .stdin(OwnedFd::from(slave.try_clone()?))
            .stdout(OwnedFd::from(slave.try_clone()?))
            .stderr(OwnedFd::from(slave))
            .spawn()?;
        let mut output = File::from(master);
        let input = output.try_clone()?;
        self.masters
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(id, input);
        let mut buf = vec![0u8; 1 << 14];
        // Ends with an error (EIO) when all have closed the terminal.
        while let Ok(n @ 1..) = output.read(&mut buf) {
            port.reply(
                id,
                Reply::Data { err: false },
                buf.get(..n).unwrap_or_default(),
            );
        }
        self.masters
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&id);
        Ok(child.wait()?.code().unwrap_or(-1))
    }
}
