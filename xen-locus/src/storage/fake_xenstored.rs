//! A xenstored for tests: the wire protocol on a socket, with its limits (docs/misc/xenstore.txt in Xen's source).
//!
//! The tests that use it take turns, because both clients learn the socket's path from the environment.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

const DIRECTORY: u32 = 1;
const READ: u32 = 2;
const WATCH: u32 = 4;
const UNWATCH: u32 = 5;
const WRITE: u32 = 11;
const RM: u32 = 13;
const SET_PERMS: u32 = 14;
const WATCH_EVENT: u32 = 15;
const ERROR: u32 = 16;
const DIRECTORY_PART: u32 = 22;
/// Most bytes of a message.
const PAYLOAD_MAX: usize = 4096;
/// Most bytes of a path.
const PATH_MAX: usize = 3072;

static TURN: Mutex<()> = Mutex::new(());

/// All nodes, and who is connected.
#[derive(Debug, Default)]
struct State {
    nodes: BTreeMap<String, Vec<u8>>,
    permissions: BTreeMap<String, String>,
    /// Connection, path and token of each watch.
    watches: Vec<(u64, String, String)>,
    clients: BTreeMap<u64, UnixStream>,
    is_stopped: bool,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    goes_on: Condvar,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A xenstored that runs while this value lives.
#[derive(Debug)]
pub(crate) struct Xenstored {
    shared: Arc<Shared>,
    socket: PathBuf,
    _turn: MutexGuard<'static, ()>,
}

impl Xenstored {
    pub(crate) fn start() -> Xenstored {
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let name = format!("xen-locus-xenstored-{}", std::process::id());
        let socket = std::env::temp_dir().join(name);
        std::env::set_var("XENSTORED_PATH", &socket);
        let mut started = Xenstored {
            shared: Arc::default(),
            socket,
            _turn: turn,
        };
        started.begin();
        started
    }

    /// Starts again, without a node.
    pub(crate) fn begin(&mut self) {
        let _ = std::fs::remove_file(&self.socket);
        let listener = UnixListener::bind(&self.socket).unwrap();
        self.shared = Arc::default();
        self.shared.state().nodes.insert("/".into(), Vec::new());
        let shared = Arc::clone(&self.shared);
        thread::spawn(move || {
            for (number, client) in (0..).zip(listener.incoming()) {
                let client = client.unwrap();
                let copy = client.try_clone().unwrap();
                shared.state().clients.insert(number, copy);
                let shared = Arc::clone(&shared);
                thread::spawn(move || {
                    // An error is the end of the connection.
                    let _ = serve(&shared, number, client);
                });
            }
        });
    }

    /// Ends: all connections break, and no new one is taken.
    pub(crate) fn end(&mut self) {
        let _ = std::fs::remove_file(&self.socket);
        for client in self.shared.state().clients.values() {
            let _ = client.shutdown(Shutdown::Both);
        }
    }

    /// Stops to answer, or goes on.
    pub(crate) fn stop(&self, stops: bool) {
        self.shared.state().is_stopped = stops;
        self.shared.goes_on.notify_all();
    }

    /// Whether this thread can't be stopped by a terminal while it asks, and can afterwards.
    pub(crate) fn holds_stops_back(&self, ask: impl FnOnce()) -> bool {
        let own = std::fs::read_link("/proc/thread-self").unwrap();
        let own = Path::new("/proc").join(own).join("status");
        let held = || {
            let status = std::fs::read_to_string(&own).unwrap();
            let mask = status.lines().find_map(|l| l.strip_prefix("SigBlk:\t"));
            let mask = u64::from_str_radix(mask.unwrap(), 16).unwrap();
            let stops = [libc::SIGTSTP, libc::SIGTTIN, libc::SIGTTOU];
            stops.iter().all(|signal| mask >> (signal - 1) & 1 == 1)
        };
        self.stop(true);
        let while_asking = thread::scope(|scope| {
            let looks = scope.spawn(|| {
                let seen = (0..200).any(|_| {
                    thread::sleep(Duration::from_millis(10));
                    held()
                });
                self.stop(false);
                seen
            });
            ask();
            looks.join().unwrap()
        });
        while_asking && !held()
    }

    /// Makes nodes.
    pub(crate) fn put_all(&self, paths: impl Iterator<Item = String>) {
        let nodes = paths.map(|path| (path, Vec::new()));
        self.shared.state().nodes.extend(nodes);
    }

    /// Makes a node.
    pub(crate) fn put(&self, path: &str, value: &[u8]) {
        let mut state = self.shared.state();
        state.nodes.insert(path.to_owned(), value.to_vec());
    }

    /// The permissions that were set.
    pub(crate) fn permissions(&self, path: &str) -> Option<String> {
        self.shared.state().permissions.get(path).cloned()
    }
}

impl Drop for Xenstored {
    fn drop(&mut self) {
        self.stop(false);
        self.end();
    }
}

/// Answers what a client asks.
fn serve(shared: &Shared, number: u64, mut client: UnixStream) -> io::Result<()> {
    loop {
        let mut header = [0; 16];
        client.read_exact(&mut header)?;
        let word = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
        let mut payload = vec![0; word(12) as usize];
        client.read_exact(&mut payload)?;
        let mut state = shared.state();
        while state.is_stopped {
            state = shared.goes_on.wait(state).unwrap();
        }
        let (kind, changed, reply) = match state.answer(number, word(0), &payload) {
            _ if payload.len() > PAYLOAD_MAX => return Err(io::Error::other("too long")),
            Ok((changed, reply)) => (word(0), changed, reply),
            Err(error) => (ERROR, None, format!("{error}\0").into_bytes()),
        };
        send(&client, kind, word(4), &reply)?;
        let Some(path) = changed else { continue };
        let newest = state.watches.len().wrapping_sub(1);
        for (at, (of, watched, token)) in state.watches.iter().enumerate() {
            let fires = match word(0) {
                // A new watch fires at once, for its own path.
                WATCH => at == newest,
                RM => below(&path, watched) || below(watched, &path),
                _ => below(&path, watched),
            };
            if let (true, Some(to)) = (fires, state.clients.get(of)) {
                let _ = send(to, WATCH_EVENT, 0, format!("{path}\0{token}\0").as_bytes());
            }
        }
    }
}

fn send(mut to: &UnixStream, kind: u32, id: u32, payload: &[u8]) -> io::Result<()> {
    let words = [kind, id, 0, u32::try_from(payload.len()).unwrap()];
    let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
    bytes.extend(payload);
    to.write_all(&bytes)
}

/// Whether `path` is `base` or below it.
fn below(path: &str, base: &str) -> bool {
    let rest = path.strip_prefix(base.trim_end_matches('/'));
    rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

impl State {
    /// What changed, and the reply.
    fn answer(
        &mut self,
        client: u64,
        kind: u32,
        payload: &[u8],
    ) -> Result<(Option<String>, Vec<u8>), &'static str> {
        let mut words = payload.splitn(2, |&byte| byte == 0);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let path = text(words.next().unwrap_or_default());
        let rest = words.next().unwrap_or_default();
        let argument = text(rest).trim_end_matches('\0').to_owned();
        if path.len() > PATH_MAX || !path.starts_with(['/', '@']) {
            return Err("EINVAL");
        }
        let done = |reply: &[u8]| Ok((None, reply.to_vec()));
        if !matches!(kind, WRITE | WATCH | UNWATCH) && !self.nodes.contains_key(&path) {
            return Err("ENOENT");
        }
        match kind {
            READ => done(&self.nodes[&path]),
            DIRECTORY => match self.names(&path) {
                long if long.len() > PAYLOAD_MAX => Err("E2BIG"),
                names => done(&names),
            },
            DIRECTORY_PART => {
                let offset = argument.parse().map_err(|_| "EINVAL")?;
                let names = self.names(&path);
                let rest = names.get(offset..).ok_or("EINVAL")?;
                // The generation of the node; whole names; a second NUL behind the last one.
                let mut reply = b"1\0".to_vec();
                let mut left = PAYLOAD_MAX - reply.len() - 1;
                for name in rest.split_inclusive(|&byte| byte == 0) {
                    if name.len() > left {
                        return done(&reply);
                    }
                    left -= name.len();
                    reply.extend(name);
                }
                reply.push(0);
                done(&reply)
            }
            WRITE => {
                let parents = path.match_indices('/').map(|(at, _)| path[..at].to_owned());
                for parent in parents.filter(|parent| !parent.is_empty()) {
                    self.nodes.entry(parent).or_default();
                }
                self.nodes.insert(path.clone(), rest.to_vec());
                Ok((Some(path), b"OK\0".to_vec()))
            }
            RM => {
                self.nodes.retain(|node, _| !below(node, &path));
                Ok((Some(path), b"OK\0".to_vec()))
            }
            SET_PERMS => {
                self.permissions.insert(path, argument);
                done(b"OK\0")
            }
            WATCH => {
                self.watches.push((client, path.clone(), argument));
                Ok((Some(path), b"OK\0".to_vec()))
            }
            UNWATCH => {
                self.watches.retain(|(_, _, token)| *token != argument);
                done(b"OK\0")
            }
            _ => Err("ENOSYS"),
        }
    }

    /// Names of a node's children, each with its NUL.
    fn names(&self, path: &str) -> Vec<u8> {
        let base = format!("{}/", path.trim_end_matches('/'));
        let below = self.nodes.range(base.clone()..);
        let names = below.map_while(|(node, _)| node.strip_prefix(&*base));
        let own = names.filter(|name| !name.is_empty() && !name.contains('/'));
        own.flat_map(|name| format!("{name}\0").into_bytes())
            .collect()
    }
}
