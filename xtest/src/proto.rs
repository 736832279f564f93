//! The protocol between the runner and the agent in dom0: framed requests and replies.
//!
//! A frame is `XTF1`, then little-endian `u32` lengths of header and body and the CRC-32 of both,
//! then a JSON header and a binary body. A reader that sees garbage (a boot message on the line)
//! looks for the next magic, so that the stream recovers by itself.

use std::io::{self, Read, Write};

use anyhow::{bail, Result};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

const MAGIC: &[u8; 4] = b"XTF1";
/// The largest header, in bytes. A larger length means a damaged frame.
const MAX_HEADER: u32 = 1 << 20;
/// The largest body, in bytes.
const MAX_BODY: u32 = 1 << 28;

/// The header of a frame: a message and its id.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Tagged<T> {
    /// The id of the request, which its replies have too.
    pub id: u64,
    /// The message.
    #[serde(flatten)]
    pub message: T,
}

/// A request of the runner.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum Request {
    /// Are you there? Answered by [`Reply::Ready`].
    Hello,
    /// Run `sh -c cmd` in a process group of its own, killed after the timeout.
    Run {
        /// The shell command.
        cmd: String,
        /// Limit in milliseconds.
        timeout_ms: u64,
        /// Whether output is sent as it comes ([`Reply::Data`]) instead of at the end.
        stream: bool,
    },
    /// Write the body to a file.
    Put {
        /// Path in dom0.
        path: String,
        /// Permission bits.
        mode: u32,
    },
    /// Read a file.
    Get {
        /// Path in dom0.
        path: String,
    },
    /// Run a command in a guest, over its console.
    GuestExec {
        /// The guest's name.
        domain: String,
        /// The shell command.
        cmd: String,
        /// Limit for the command, in milliseconds.
        timeout_ms: u64,
        /// The guest counts as hung if it does not respond for so long, in milliseconds.
        silence_ms: u64,
    },
    /// Run a command on a terminal of its own; [`Reply::Data`] carries what it prints.
    Pty {
        /// The shell command.
        cmd: String,
        /// Terminal height.
        rows: u16,
        /// Terminal width.
        cols: u16,
    },
    /// The body is input for the terminal of the request `to`.
    Input {
        /// Id of the [`Request::Pty`].
        to: u64,
    },
}

/// A reply of the agent.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "re", rename_all = "snake_case")]
pub enum Reply {
    /// The agent runs.
    Ready {
        /// dom0's uptime in seconds.
        uptime: f64,
    },
    /// A command has ended; the body is its output, then its error output.
    Done {
        /// Exit code; 128 + signal for a killed command.
        rc: i32,
        /// The command exceeded its time limit and was killed.
        timed_out: bool,
        /// How many bytes of the body are standard output.
        out_len: u64,
    },
    /// A piece of output, in the body; more follows.
    Data {
        /// Whether it is standard error.
        err: bool,
    },
    /// Done. For [`Request::Get`] the body is the file.
    Ok,
    /// The request failed.
    Failed {
        /// The kind of failure.
        kind: FailKind,
        /// Why, in words.
        message: String,
    },
}

/// Kinds of failure that callers tell apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailKind {
    /// The guest does not respond.
    Hung,
    /// The guest does not exist, or has crashed.
    Gone,
    /// Any other failure: the testbed broke.
    Other,
}

/// Writes one frame.
pub fn send<T: Serialize>(out: &mut impl Write, msg: &Tagged<T>, body: &[u8]) -> Result<()> {
    let header = serde_json::to_vec(msg)?;
    let mut crc = crc32fast::Hasher::new();
    crc.update(&header);
    crc.update(body);
    let mut frame = Vec::with_capacity(16 + header.len() + body.len());
    frame.extend_from_slice(MAGIC);
    frame.extend_from_slice(&u32::try_from(header.len())?.to_le_bytes());
    frame.extend_from_slice(&u32::try_from(body.len())?.to_le_bytes());
    frame.extend_from_slice(&crc.finalize().to_le_bytes());
    frame.extend_from_slice(&header);
    frame.extend_from_slice(body);
    out.write_all(&frame)?;
    out.flush()?;
    Ok(())
}

/// Reads the next whole frame, and skips anything that is not a frame.
pub fn receive<T: DeserializeOwned>(input: &mut impl Read) -> Result<(Tagged<T>, Vec<u8>)> {
    loop {
        seek_magic(input)?;
        let header_len = read_u32(input)?;
        let body_len = read_u32(input)?;
        let want = read_u32(input)?;
        if header_len > MAX_HEADER || body_len > MAX_BODY {
            continue;
        }
        let header = read_exactly(input, header_len)?;
        let body = read_exactly(input, body_len)?;
        let mut crc = crc32fast::Hasher::new();
        crc.update(&header);
        crc.update(&body);
        if crc.finalize() != want {
            continue;
        }
        match serde_json::from_slice(&header) {
            Ok(msg) => return Ok((msg, body)),
            Err(e) => bail!("a frame's header is not understood: {e}"),
        }
    }
}

fn seek_magic(input: &mut impl Read) -> io::Result<()> {
    let mut last = [0u8; 4];
    while &last != MAGIC {
        let mut byte = [0u8; 1];
        input.read_exact(&mut byte)?;
        last.rotate_left(1);
        if let (Some(slot), [b]) = (last.last_mut(), byte) {
            *slot = b;
        }
    }
    Ok(())
}

fn read_u32(input: &mut impl Read) -> io::Result<u32> {
    let mut bytes = [0u8; 4];
    input.read_exact(&mut bytes)?;
    Ok(u32::from_le_bytes(bytes))
}

fn read_exactly(input: &mut impl Read, len: u32) -> Result<Vec<u8>> {
    let mut bytes = vec![0u8; usize::try_from(len)?];
    input.read_exact(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_survives_garbage_before_it() {
        let mut wire = b"boot message XTF XTF1 no".to_vec();
        // The false magic above must not swallow the true frame.
        let msg = Tagged {
            id: 7,
            message: Request::Hello,
        };
        for _ in 0..8 {
            send(&mut wire, &msg, b"body\0bytes").unwrap();
        }
        let (got, body) = receive::<Request>(&mut wire.as_slice()).unwrap();
        assert_eq!(got.id, 7);
        assert_eq!(body, b"body\0bytes");
    }

    #[test]
    fn a_damaged_frame_is_passed_over() {
        let mut wire = Vec::new();
        send(
            &mut wire,
            &Tagged {
                id: 1,
                message: Request::Hello,
            },
            b"first",
        )
        .unwrap();
        let at = wire.len() - 1;
        wire[at] ^= 1;
        send(
            &mut wire,
            &Tagged {
                id: 2,
                message: Request::Hello,
            },
            b"second",
        )
        .unwrap();
        let (got, _) = receive::<Request>(&mut wire.as_slice()).unwrap();
        assert_eq!(got.id, 2);
    }
}
