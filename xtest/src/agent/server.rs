//! Reads requests from the port and answers them.

use std::fs::{File, OpenOptions};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::Path;

use anyhow::{Context, Result};
use rustix::termios;

use super::console::Guests;
use super::port::{Failed, Port};
use super::{exec, guestcmd, pty};
use crate::proto::{self, Reply, Request, Tagged};

/// Serves requests until the port closes.
pub fn serve(port: &Path) -> Result<()> {
    let input = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(i32::try_from(rustix::fs::OFlags::NOCTTY.bits())?)
        .open(port)
        .with_context(|| format!("opening {}", port.display()))?;
    // A serial line edits and echoes its input. A virtio port is not a terminal.
    if let Ok(mut mode) = termios::tcgetattr(&input) {
        mode.make_raw();
        termios::tcsetattr(&input, termios::OptionalActions::Flush, &mode)?;
    }
    let guests = Guests::watch();
    let local = guests.clone();
    std::thread::spawn(move || {
        if let Err(e) = serve_locally(&local) {
            eprintln!("xtest-agent: {e:#}");
        }
    });
    converse(input, &guests)
}

/// Answers requests from within dom0.
fn serve_locally(guests: &Guests) -> Result<()> {
    let _ = std::fs::remove_file(guestcmd::SOCKET);
    let listener = UnixListener::bind(guestcmd::SOCKET)?;
    loop {
        let (socket, _) = listener.accept()?;
        let guests = guests.clone();
        // The thread ends with the connection.
        std::thread::spawn(move || converse(File::from(OwnedFd::from(socket)), &guests));
    }
}

/// Answers requests until the other side closes the connection.
fn converse(mut input: File, guests: &Guests) -> Result<()> {
    let port = Port::new(input.try_clone()?);
    let terminals = pty::Terminals::default();
    port.reply(0, Reply::Ready { uptime: uptime() }, &[]);
    loop {
        let (request, body) = proto::receive::<Request>(&mut input)?;
        let id = request.id;
        if let Request::Input { to } = request.message {
            terminals.input(to, body);
            continue;
        }
        let (port, guests, terminals) = (port.clone(), guests.clone(), terminals.clone());
        std::thread::spawn(move || {
            if let Err(e) = answer(&port, &guests, &terminals, request, &body) {
                port.reply(
                    id,
                    Reply::Failed {
                        kind: e.kind,
                        message: e.message,
                    },
                    &[],
                );
            }
        });
    }
}

fn answer(
    port: &Port,
    guests: &Guests,
    terminals: &pty::Terminals,
    request: Tagged<Request>,
    body: &[u8],
) -> Result<(), Failed> {
    let id = request.id;
    match request.message {
        Request::Hello => port.reply(id, Reply::Ready { uptime: uptime() }, &[]),
        Request::Run {
            cmd,
            timeout_ms,
            stream,
        } => {
            let done = exec::run(&cmd, timeout_ms, &mut |err, data| {
                if stream {
                    port.reply(id, Reply::Data { err }, data);
                }
                !stream
            })?;
            done.send(port, id);
        }
        Request::Put { path, mode } => {
            if let Some(dir) = Path::new(&path).parent() {
                std::fs::create_dir_all(dir)?;
            }
            // The file is replaced, because the file of a running program can't be written to.
            let new = format!("{path}.new");
            std::fs::write(&new, body)?;
            std::fs::set_permissions(&new, std::fs::Permissions::from_mode(mode))?;
            std::fs::rename(&new, &path)?;
            port.reply(id, Reply::Ok, &[]);
        }
        Request::Get { path } => {
            let data = std::fs::read(&path).with_context(|| format!("reading {path}"))?;
            port.reply(id, Reply::Ok, &data);
        }
        Request::GuestExec {
            domain,
            cmd,
            timeout_ms,
            silence_ms,
        } => {
            guests
                .exec(&domain, &cmd, timeout_ms, silence_ms)?
                .send(port, id);
        }
        Request::Pty { cmd, rows, cols } => {
            let rc = terminals.run(port, id, &cmd, rows, cols)?;
            port.reply(
                id,
                Reply::Done {
                    rc,
                    timed_out: false,
                    out_len: 0,
                },
                &[],
            );
        }
        Request::Input { .. } => {}
    }
    Ok(())
}

fn uptime() -> f64 {
    let text = std::fs::read_to_string("/proc/uptime").unwrap_or_default();
    text.split(' ')
        .next()
        .and_then(|t| t.parse().ok())
        .unwrap_or_default()
}
