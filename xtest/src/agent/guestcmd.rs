//! `guest NAME COMMAND` for use in dom0's shell: asks the running agent over a local socket.

use std::io::Write;
use std::os::unix::net::UnixStream;

use anyhow::{bail, Result};

use crate::proto::{self, Reply, Request, Tagged};

/// The socket that the agent listens on, in dom0.
pub(super) const SOCKET: &str = "/run/xtest-agent.sock";

/// Runs a command in a guest and returns its exit code.
pub fn guest_command(name: &str, cmd: &str) -> Result<u8> {
    let mut socket = UnixStream::connect(SOCKET)?;
    let request = Request::GuestExec {
        domain: name.to_owned(),
        cmd: cmd.to_owned(),
        timeout_ms: 3_600_000,
        silence_ms: 60_000,
    };
    proto::send(
        &mut socket,
        &Tagged {
            id: 1,
            message: request,
        },
        &[],
    )?;
    // The first message is a greeting.
    let _ = proto::receive::<Reply>(&mut socket)?;
    match proto::receive::<Reply>(&mut socket)? {
        (
            Tagged {
                message: Reply::Done { rc, out_len, .. },
                ..
            },
            body,
        ) => {
            let at = usize::try_from(out_len)?.min(body.len());
            let (out, err) = body.split_at(at);
            std::io::stdout().write_all(out)?;
            std::io::stderr().write_all(err)?;
            Ok(u8::try_from(rc).unwrap_or(1))
        }
        (
            Tagged {
                message: Reply::Failed { message, .. },
                ..
            },
            _,
        ) => bail!("{message}"),
        _ => bail!("an answer of the wrong kind"),
    }
}
