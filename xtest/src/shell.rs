//! `xtest shell`: a machine with guests, and a shell in its dom0 on the terminal.

use std::io::{IsTerminal, Read, Write};
use std::time::Duration;

use anyhow::{anyhow, bail, Result};
use rustix::termios::{self, OptionalActions, Termios};

use crate::guest::{GuestSpec, Kind};
use crate::profile::Profile;
use crate::proto::Reply;
use crate::testbed::Testbed;
use crate::verdict::Verdict;

/// Ctrl-A. Followed by x it ends the shell; twice, it is sent once.
const ESCAPE: u8 = 1;

/// Boots, starts guests unless `bare`, and connects the terminal.
pub fn run(testbed: &Testbed, profile: &Profile, bare: bool) -> Result<()> {
    eprintln!("xtest: booting Xen and dom0");
    let mut machine = testbed.boot(profile, 0)?;
    let mut kinds = vec![match profile.name {
        "pvh" | "hvm" => Kind::Pvh,
        _ => Kind::Pv,
    }];
    if profile.hvm {
        kinds.push(Kind::Hvm);
    }
    if bare {
        kinds.clear();
    }
    for kind in kinds {
        eprintln!("xtest: starting guest {0} (type {0})", kind.name());
        machine
            .ctx
            .ensure_guest(GuestSpec::new(kind.name(), kind))
            .map_err(as_error)?;
    }
    eprintln!(
        "\nThis is dom0. Try `xl list`, `xen-locus list`, `ls /payloads`.\n\
         A command in a guest: `guest NAME COMMAND`; its console: /var/log/guest-NAME.log.\n\
         Leave with Ctrl-A x (or `exit`): that ends the machine.\n"
    );
    let (rows, cols) = termios::tcgetwinsize(std::io::stdout())
        .map_or((24, 80), |size| (size.ws_row.max(1), size.ws_col.max(1)));
    let terminal = machine
        .ctx
        .dom0
        .terminal("cd /root; exec sh -l", rows, cols)
        .map_err(as_error)?;
    let _raw = Raw::enter()?;
    let (dom0, id) = (machine.ctx.dom0.clone(), terminal.id);
    let (leave, left) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut escaped = false;
        let mut buf = [0u8; 1024];
        while let Ok(n @ 1..) = std::io::stdin().read(&mut buf) {
            let mut typed = Vec::with_capacity(n);
            for &byte in buf.get(..n).unwrap_or_default() {
                match (escaped, byte) {
                    (false, ESCAPE) => escaped = true,
                    (true, b'x') => {
                        let _ = leave.send(());
                        return;
                    }
                    _ => {
                        escaped = false;
                        typed.push(byte);
                    }
                }
            }
            if dom0.type_in(id, &typed).is_err() {
                break;
            }
        }
    });
    loop {
        match terminal.replies.recv_timeout(Duration::from_millis(100)) {
            Ok((Reply::Data { .. }, data)) => {
                let mut out = std::io::stdout().lock();
                out.write_all(&data)?;
                out.flush()?;
            }
            Ok(_) => return Ok(()),
            Err(std::sync::mpsc::RecvTimeoutError::Timeout) => {
                if left.try_recv().is_ok() {
                    return Ok(());
                }
            }
            Err(_) => bail!("dom0 went down"),
        }
    }
}

fn as_error(verdict: Verdict) -> anyhow::Error {
    anyhow!("{verdict}")
}

/// Puts the terminal into raw mode until dropped.
struct Raw {
    before: Option<Termios>,
}

impl Raw {
    fn enter() -> Result<Self> {
        let stdin = std::io::stdin();
        if !stdin.is_terminal() {
            return Ok(Self { before: None });
        }
        let before = termios::tcgetattr(&stdin)?;
        let mut raw = before.clone();
        raw.make_raw();
        termios::tcsetattr(&stdin, OptionalActions::Drain, &raw)?;
        Ok(Self {
            before: Some(before),
        })
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            let _ = termios::tcsetattr(std::io::stdin(), OptionalActions::Drain, before);
        }
    }
}
