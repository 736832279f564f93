//! The thread that talks to xenstored for a [`Store`](super::Store), and the errors that it meets.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::Arc;
use std::thread;

use locus_xen::{HeldSignals, XenstoreList};
use xenstore_rs::unix::XsUnix;
use xenstore_rs::Xs as _;

/// xenstored's socket, if the environment names no other.
const SOCKET: &str = "/run/xenstored/socket";
/// The variable that has the socket's path.
const PATH: &str = "XENSTORED_PATH";
/// The variable that has the socket's folder.
const RUNDIR: &str = "XENSTORED_RUNDIR";
/// Stack of the thread that talks to xenstored. It is locked in memory.
const STACK: usize = 256 << 10;
/// Name of that thread, as the kernel shows it.
const NAME: &str = "xenstore";
/// How `xenstore-rs` begins the text of an error that xenstored answered. All other errors are the connection's.
pub(super) const ANSWERED: &str = "XS interface error ";

/// What xenstored is asked for.
#[derive(Debug)]
pub(super) enum Call {
    Read(String),
    List(String),
    Write(String, String),
    Remove(String),
    SetPrivate(String),
}

impl Call {
    pub(super) fn len(&self) -> usize {
        match self {
            Call::Read(path) | Call::List(path) | Call::Remove(path) | Call::SetPrivate(path) => {
                path.len() + 1
            }
            Call::Write(path, value) => path.len() + 1 + value.len(),
        }
    }
}

/// The names of a list, or the one value that was read.
pub(super) type Answer = io::Result<Vec<String>>;

/// A thread that talks to xenstored.
pub(super) struct Line {
    pub(super) calls: Sender<Call>,
    pub(super) answers: Receiver<Answer>,
}

impl Line {
    /// Starts the thread. It ends when this value is dropped, and it has its last answer.
    pub(super) fn open(connections: &Arc<AtomicU32>) -> io::Result<Line> {
        let (calls, to_do) = mpsc::channel();
        let (done, answers) = mpsc::channel();
        let connections = Arc::clone(connections);
        let talk = move || {
            let mut talker = Talker::new(connections);
            while let Ok(call) = to_do.recv() {
                if done.send(talker.talk(&call)).is_err() {
                    break;
                }
            }
        };
        let named = thread::Builder::new().name(NAME.to_owned());
        // A signal that is held back while a guest is paused must not reach the process through this thread.
        let held = HeldSignals::all();
        named.stack_size(STACK).spawn(talk)?;
        drop(held);
        Ok(Line { calls, answers })
    }
}

/// Whether xenstored answered that there is no such node. That there is no xenstored is another thing.
pub(super) fn is_missing(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound && !is_broken(error)
}

/// The thread's side of a [`Store`].
struct Talker {
    xs: Option<XsUnix>,
    /// Opened when it is first needed.
    list: Option<XenstoreList>,
    /// xenstored has a socket. If that is not there any more, the kernel's device is no way to it.
    has_socket: bool,
    connections: Arc<AtomicU32>,
}

impl Talker {
    fn new(connections: Arc<AtomicU32>) -> Talker {
        Talker {
            xs: None,
            list: None,
            has_socket: socket().exists(),
            connections,
        }
    }

    /// Connects. Without a socket `xenstore-rs` takes the kernel's device, which takes requests and answers none while
    /// xenstored is away.
    fn connect(&self) -> io::Result<XsUnix> {
        if self.has_socket {
            UnixStream::connect(socket())?;
        }
        let xs = XsUnix::new()?;
        self.connections.fetch_add(1, Ordering::SeqCst);
        Ok(xs)
    }

    /// Asks xenstored. If the connection broke, it is made anew, and the same is asked once more: each call may be made twice.
    fn talk(&mut self, call: &Call) -> Answer {
        let had = self.xs.is_some();
        let first = self.ask(call);
        match first {
            Err(e) if is_broken(&e) => {
                self.xs = None;
                self.list = None;
                match had {
                    true => self.talk(call),
                    false => Err(e),
                }
            }
            other => other,
        }
    }

    fn ask(&mut self, call: &Call) -> Answer {
        let xs = match &self.xs {
            Some(xs) => xs,
            None => {
                let xs = self.connect()?;
                self.xs.insert(xs)
            }
        };
        let nothing = |()| Vec::new();
        match call {
            Call::Read(path) => match xs.read(path) {
                // Without the library it is only known that it is no text.
                Err(e) if is_not_text(&e) => {
                    Err(match self.list().and_then(|list| list.value(path)) {
                        Ok(bytes) => io::Error::new(io::ErrorKind::InvalidData, NotText(bytes)),
                        Err(_) => e,
                    })
                }
                value => value.map(|value| vec![value.into()]),
            },
            Call::Write(path, value) => xs.write(path, value).map(nothing),
            Call::Remove(path) => xs.rm(path).map(nothing),
            Call::List(path) => match xs.directory(path) {
                Err(e) if is_too_long(&e) || is_not_text(&e) => {
                    self.list()?.names(path).map_err(of_library)
                }
                names => names.map(|names| names.into_iter().map(String::from).collect()),
            },
            Call::SetPrivate(path) => self
                .list()?
                .set_private(path)
                .map(nothing)
                .map_err(of_library),
        }
    }

    fn list(&mut self) -> io::Result<&XenstoreList> {
        match &mut self.list {
            Some(list) => Ok(list),
            none => {
                let opened = XenstoreList::open();
                let opened = opened.map_err(|e| io::Error::other(format!("{ANSWERED}{e}")))?;
                Ok(none.insert(opened))
            }
        }
    }
}

/// xenstored's socket, as `xenstore-rs` and `libxenstore` find it.
fn socket() -> PathBuf {
    let path = std::env::var_os(PATH);
    path.map_or_else(|| SOCKET.into(), PathBuf::from)
}

/// Makes both libraries find the same xenstored, where Xen's own tools find it: at `XENSTORED_PATH`, or else in
/// `XENSTORED_RUNDIR` (tools/libs/store/xs.c in Xen's source, `xs_daemon_path`). `xenstore-rs` knows only the first of these.
/// No other thread may run: the environment is changed.
pub fn obey_environment() {
    if let (None, Some(dir)) = (std::env::var_os(PATH), std::env::var_os(RUNDIR)) {
        std::env::set_var(PATH, PathBuf::from(dir).join("socket"));
    }
}

/// Whether xenstored gave no answer, so that the connection can't be used any more.
fn is_broken(error: &io::Error) -> bool {
    !error.to_string().starts_with(ANSWERED) && !is_not_text(error)
}

/// Whether xenstored answered with what is not UTF-8.
pub(super) fn is_not_text(error: &io::Error) -> bool {
    let cause = error.get_ref();
    cause.is_some_and(|cause| cause.is::<std::str::Utf8Error>() || cause.is::<NotText>())
}

/// A value that is not UTF-8.
#[derive(Debug, thiserror::Error)]
#[error("its value is not UTF-8")]
pub(super) struct NotText(pub(super) Vec<u8>);

impl NotText {
    /// The value that this error is about.
    pub(super) fn of(error: &io::Error) -> Option<&[u8]> {
        let cause = error.get_ref()?.downcast_ref::<NotText>()?;
        Some(&cause.0)
    }
}

/// Whether the list is too long for one message.
fn is_too_long(error: &io::Error) -> bool {
    error.to_string() == format!("{ANSWERED}E2BIG")
}

/// An error of `libxenstore`, which gives the number of what xenstored answered too. These numbers are only the connection's.
fn of_library(error: io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(libc::EBADF | libc::EPIPE | libc::EIO | libc::ECONNRESET) | None => error,
        _ => io::Error::new(error.kind(), format!("{ANSWERED}{error}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The masks of blocked signals of the threads with this name (proc_pid_status(5)).
    fn blocked() -> Vec<u64> {
        let mut found = Vec::new();
        for task in std::fs::read_dir("/proc/self/task").unwrap() {
            let Ok(status) = std::fs::read_to_string(task.unwrap().path().join("status")) else {
                continue;
            };
            let field = |name| status.lines().find_map(|l| l.strip_prefix(name)).unwrap();
            if field("Name:\t") == NAME {
                found.push(u64::from_str_radix(field("SigBlk:\t"), 16).unwrap());
            }
        }
        found
    }

    #[test]
    fn no_signal_reaches_the_process_through_this_thread() {
        let line = Line::open(&Arc::default()).unwrap();
        // When it answers, it has its name.
        line.calls.send(Call::Read("/".into())).unwrap();
        let _ = line.answers.recv().unwrap();
        let masks = blocked();
        assert!(!masks.is_empty());
        let bits = [
            libc::SIGINT,
            libc::SIGQUIT,
            libc::SIGTERM,
            libc::SIGHUP,
            libc::SIGTSTP,
        ]
        .map(|signal| 1u64 << (signal - 1));
        let all = bits.iter().sum::<u64>();
        assert!(masks.iter().all(|mask| mask & all == all), "{masks:x?}");
        // This one is as before.
        drop(line);
        let own = std::fs::read_to_string("/proc/thread-self/status").unwrap();
        assert!(own.contains("SigBlk:\t0000000000000000"), "{own}");
    }
}
