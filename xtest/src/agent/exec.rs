//! Runs shell commands in dom0.

use std::io::Read;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::process::{kill_process_group, Pid, Signal};

use super::port::Port;
use crate::proto::Reply;

/// The result of a command.
#[derive(Debug, Default)]
pub(super) struct Done {
    pub(super) rc: i32,
    pub(super) timed_out: bool,
    pub(super) out: Vec<u8>,
    pub(super) err: Vec<u8>,
}

impl Done {
    pub(super) fn send(mut self, port: &Port, id: u64) {
        let out_len = self.out.len().try_into().unwrap_or(u64::MAX);
        self.out.append(&mut self.err);
        let reply = Reply::Done {
            rc: self.rc,
            timed_out: self.timed_out,
            out_len,
        };
        port.reply(id, reply, &self.out);
    }
}

enum Event {
    Data(bool, Vec<u8>),
    Closed,
    Exit(ExitStatus),
}

/// Runs `sh -c cmd`. Each piece of output is passed to `sink`: whether it is standard error, and the bytes. It
/// is stored if `sink` returns true.
///
/// A daemon that the command leaves behind may hold the pipes open forever. So the output counts as complete
/// shortly after the command itself has ended.
pub(super) fn run(
    cmd: &str,
    timeout_ms: u64,
    sink: &mut dyn FnMut(bool, &[u8]) -> bool,
) -> Result<Done> {
    let mut child = Command::new("/bin/sh")
        .args(["-c", cmd])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()
        .context("starting a shell")?;
    let group = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let (tx, rx) = mpsc::channel();
    pump(child.stdout.take(), false, &tx);
    pump(child.stderr.take(), true, &tx);
    std::thread::spawn(move || {
        if let Ok(status) = child.wait() {
            let _ = tx.send(Event::Exit(status));
        }
    });
    let mut done = Done::default();
    let mut limit = Instant::now() + Duration::from_millis(timeout_ms);
    let (mut open, mut ended) = (2, false);
    while open > 0 || !ended {
        match rx.recv_timeout(limit.saturating_duration_since(Instant::now())) {
            Ok(Event::Data(err, data)) => {
                if sink(err, &data) {
                    if err { &mut done.err } else { &mut done.out }.extend_from_slice(&data);
                }
            }
            Ok(Event::Closed) => open -= 1,
            Ok(Event::Exit(status)) => {
                done.rc = status
                    .code()
                    .or(status.signal().map(|s| 128 + s))
                    .unwrap_or(-1);
                ended = true;
                limit = limit.min(Instant::now() + Duration::from_millis(500));
            }
            Err(_) if ended => break,
            Err(_) => {
                if let (Some(group), false) = (group, done.timed_out) {
                    done.timed_out = true;
                    let _ = kill_process_group(group, Signal::KILL);
                    limit = Instant::now() + Duration::from_secs(5);
                    continue;
                }
                // Not even SIGKILL ends it: it is stuck in the kernel.
                done.rc = -1;
                break;
            }
        }
    }
    Ok(done)
}

fn pump(from: Option<impl Read + Send + 'static>, err: bool, tx: &mpsc::Sender<Event>) {
    let tx = tx.clone();
    std::thread::spawn(move || {
        let mut buf = vec![0u8; 1 << 16];
        if let Some(mut from) = from {
            while let Ok(n @ 1..) = from.read(&mut buf) {
                let data = buf.get(..n).unwrap_or_default().to_vec();
                if tx.send(Event::Data(err, data)).is_err() {
                    return;
                }
            }
        }
        let _ = tx.send(Event::Closed);
    });
}
