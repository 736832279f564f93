//! XenStore: names of domains, and what this tool publishes. Through `xenstore-rs`, and through `libxenstore` what that lacks.
//!
//! Each node has one writer, and the node that commits a step is written last, so no transaction is needed
//! (xen-locus-xenstore(7)).

mod talker;

use std::cell::{Cell, RefCell};
use std::fmt::{self, Write as _};
use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::RecvTimeoutError;
use std::sync::Arc;
use std::time::{Duration, Instant};

use locus_guest::addr::DomId;
use locus_xen::{fault, HeldSignals};

use crate::error::{Error, Result};
use crate::say;
pub use talker::obey_environment;
use talker::{is_missing, is_not_text, Answer, Call, Line, NotText, ANSWERED};

/// Path of this tool's nodes.
pub const ROOT: &str = "/tool/xen-locus";

/// How long xenstored may take for an answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long an answer that is late is waited for at first.
const GIVE_UP: Duration = Duration::from_secs(60);
/// Most bytes of a message (`XENSTORE_PAYLOAD_MAX`, xen/include/public/io/xs_wire.h).
const MESSAGE_MAX: usize = 4096;

/// A connection to xenstored. If xenstored ends and is started again, the next call connects again.
///
/// A thread of its own talks to xenstored, because a xenstored that is stopped, or that is not there while the kernel's device
/// is, never answers. So no call takes longer than some seconds, whoever waits for a guest's lock meanwhile.
pub struct Store {
    line: RefCell<Line>,
    /// Since when the answer to an earlier call is still to come.
    late_since: Cell<Option<Instant>>,
    /// How long such an answer is waited for, until another thread connects anew.
    give_up: Cell<Duration>,
    connections: Arc<AtomicU32>,
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Store")
    }
}

impl Store {
    /// Connects, and waits for a first answer.
    ///
    /// # Errors
    /// No xenstored answers.
    pub fn open() -> Result<Store> {
        let none = |why: io::Error| {
            Error::failed(format!(
                "no xenstored answers ({why}): is it running? (systemctl status xenstored, or xen where an init script starts it)"
            ))
        };
        let connections = Arc::new(AtomicU32::new(0));
        let store = Store {
            line: RefCell::new(Line::open(&connections).map_err(none)?),
            late_since: Cell::new(None),
            give_up: Cell::new(GIVE_UP),
            connections,
        };
        match store.call(Call::Read("/".into())) {
            Err(e) if !is_missing(&e) => Err(none(e)),
            _ => Ok(store),
        }
    }

    /// How often it was connected to a xenstored. Watches are gone when that changes, and nodes may be.
    #[must_use]
    pub fn connections(&self) -> u32 {
        self.connections.load(Ordering::SeqCst)
    }

    /// Lets only the control domain read and write a node, and the nodes that are made below it from now on.
    ///
    /// # Errors
    /// There is no such node, xenstored failed, or `libxenstore` is missing.
    pub fn set_private(&self, path: &str) -> Result<()> {
        self.call(Call::SetPrivate(path.to_owned()))
            .map(|_| ())
            .map_err(|e| failed("setting permissions of", path, &e))
    }

    /// The name of a domain as text, if it has one and xenstored gives it.
    #[must_use]
    pub fn domain_name(&self, id: DomId) -> Option<String> {
        self.try_domain_name(id)
            .ok()
            .flatten()
            .map(|name| name.text)
    }

    /// The same, for callers that decide by it.
    ///
    /// # Errors
    /// xenstored failed.
    pub fn try_domain_name(&self, id: DomId) -> Result<Option<DomainName>> {
        let path = format!("/local/domain/{id}/name");
        match fault::point("xs_read").and_then(|()| self.call(Call::Read(path.clone()))) {
            Ok(value) => Ok(value
                .first()
                .map(|name| DomainName::of_bytes(name.as_bytes()))),
            Err(e) if is_missing(&e) => Ok(None),
            Err(e) if is_not_text(&e) => Ok(NotText::of(&e).map(DomainName::of_bytes)),
            Err(e) => Err(failed("reading", &path, &e)),
        }
    }

    fn call(&self, call: Call) -> Answer {
        let silent = |how: &str| Err(io::Error::new(io::ErrorKind::TimedOut, how));
        if call.len() > MESSAGE_MAX {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("longer than the {MESSAGE_MAX} bytes of a message"),
            ));
        }
        if let Some(since) = self.late_since.get() {
            let late = self.line.borrow().answers.try_recv();
            match late {
                // It is nobody's any more.
                Ok(_) => {}
                Err(_) if since.elapsed() < self.give_up.get() => {
                    return silent("it has not answered for some time")
                }
                // The thread may wait for ever, so another one tries. The more there are, the longer this takes.
                Err(_) => {
                    *self.line.borrow_mut() = Line::open(&self.connections)?;
                    self.give_up.set(self.give_up.get() * 2);
                }
            }
            self.late_since.set(None);
        }
        // Both libraries send a message in two parts, and xenstored reads it to its end before it serves anybody else. Who is
        // stopped in between stops all that use XenStore.
        let _whole = HeldSignals::of_job_control();
        let line = self.line.borrow();
        // If the thread has ended, there is no answer either.
        let answer = line
            .calls
            .send(call)
            .map_err(|_| RecvTimeoutError::Disconnected)
            .and_then(|()| line.answers.recv_timeout(PATIENCE));
        match answer {
            Ok(answer) => {
                self.give_up.set(GIVE_UP);
                answer
            }
            Err(_) => {
                self.late_since.set(Some(Instant::now()));
                silent(&format!("waited {} s", PATIENCE.as_secs()))
            }
        }
    }
}

/// Nodes of XenStore, as the daemon and the publication of a guest's status need them.
pub trait Nodes: fmt::Debug {
    /// A node's value; `None` if there is no such node.
    ///
    /// # Errors
    /// xenstored failed.
    fn read(&self, path: &str) -> Result<Option<String>>;
    /// Names of a node's children; none if there is no such node.
    ///
    /// # Errors
    /// xenstored failed.
    fn children(&self, path: &str) -> Result<Vec<String>>;
    /// Writes a node, with the nodes above it as needed. The value becomes one line: programs show it to people.
    ///
    /// # Errors
    /// xenstored failed.
    fn write(&self, path: &str, value: &str) -> Result<()>;
    /// Removes a node and all below it; nothing to do if there is none.
    ///
    /// # Errors
    /// xenstored failed.
    fn remove(&self, path: &str) -> Result<()>;
    /// The name of a domain as text, if it has one.
    fn domain_name(&self, id: DomId) -> Option<String> {
        self.read(&format!("/local/domain/{id}/name"))
            .ok()
            .flatten()
    }
}

/// A domain's name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DomainName {
    /// The name, or what stands for it if it is no text.
    text: String,
    is_text: bool,
}

impl DomainName {
    /// The name that XenStore has. Instead of each byte that is no text stands its number, as a shell's `$'…'` has it.
    #[must_use]
    pub fn of_bytes(bytes: &[u8]) -> DomainName {
        let (mut text, mut is_text) = (String::new(), true);
        for chunk in bytes.utf8_chunks() {
            text.push_str(chunk.valid());
            for byte in chunk.invalid() {
                is_text = false;
                let _ = write!(text, "\\x{byte:02x}");
            }
        }
        DomainName { text, is_text }
    }

    /// Whether this is the name that a person typed.
    #[must_use]
    pub fn is(&self, wanted: &str) -> bool {
        self.is_text && self.text == wanted
    }

    /// Whether it is another one that looks the same where it is shown.
    #[must_use]
    pub fn is_taken_for(&self, wanted: &str) -> bool {
        !self.is(wanted) && (self.text == wanted || say::one_line(&self.text) == wanted)
    }
}

impl Nodes for Store {
    fn read(&self, path: &str) -> Result<Option<String>> {
        match fault::point("xs_read").and_then(|()| self.call(Call::Read(path.to_owned()))) {
            Ok(value) => Ok(Some(value.into_iter().next().unwrap_or_default())),
            Err(e) if is_missing(&e) => Ok(None),
            Err(e) => Err(failed("reading", path, &e)),
        }
    }

    fn domain_name(&self, id: DomId) -> Option<String> {
        Store::domain_name(self, id)
    }

    fn children(&self, path: &str) -> Result<Vec<String>> {
        match fault::point("xs_directory").and_then(|()| self.call(Call::List(path.to_owned()))) {
            Ok(mut names) => {
                names.retain(|name| !name.is_empty());
                Ok(names)
            }
            Err(e) if is_missing(&e) => Ok(Vec::new()),
            Err(e) => Err(failed("listing", path, &e)),
        }
    }

    fn write(&self, path: &str, value: &str) -> Result<()> {
        let line = say::one_line(value).into_owned();
        fault::point("xs_write")
            .and_then(|()| self.call(Call::Write(path.to_owned(), line)))
            .map(|_| ())
            .map_err(|e| failed("writing", path, &e))
    }

    fn remove(&self, path: &str) -> Result<()> {
        match fault::point("xs_rm").and_then(|()| self.call(Call::Remove(path.to_owned()))) {
            Err(e) if !is_missing(&e) => Err(failed("removing", path, &e)),
            _ => Ok(()),
        }
    }
}

/// The start of a path is enough to know it.
const SHOWN: usize = 200;

fn failed(doing: &str, path: &str, e: &io::Error) -> Error {
    let shown = path.get(..path.floor_char_boundary(SHOWN)).unwrap_or(path);
    let rest = if shown.len() < path.len() { "…" } else { "" };
    let why = e.to_string();
    let why = why.strip_prefix(ANSWERED).unwrap_or(&why);
    Error::failed(format!("{doing} {shown}{rest} in XenStore failed: {why}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::fake_xenstored::Xenstored;

    #[test]
    fn a_list_of_any_length_is_read() {
        let xenstored = Xenstored::start();
        let store = Store::open().unwrap();
        for count in [0, 1, 100, 1500, 12_000] {
            let path = format!("{ROOT}/{count}");
            store.write(&path, "").unwrap();
            let mut names: Vec<String> = (0..count).map(|n| format!("{:05}", 10_000 + n)).collect();
            xenstored.put_all(names.iter().map(|name| format!("{path}/{name}")));
            let mut found = store.children(&path).unwrap();
            found.sort();
            names.sort();
            assert_eq!(found, names);
        }
        assert_eq!(store.children("/none").unwrap(), [""; 0]);
    }

    #[test]
    fn only_the_control_domain_may_use_what_is_private() {
        let xenstored = Xenstored::start();
        let store = Store::open().unwrap();
        store.write(ROOT, "").unwrap();
        store.set_private(ROOT).unwrap();
        assert_eq!(xenstored.permissions(ROOT).as_deref(), Some("n0"));
        assert!(store.set_private("/none").is_err());
        assert_eq!(store.connections(), 1);
    }

    #[test]
    fn nobody_is_stopped_in_the_middle_of_a_message() {
        let xenstored = Xenstored::start();
        let store = Store::open().unwrap();
        assert!(xenstored.holds_stops_back(|| store.write("/a", "1").unwrap()));
        assert!(xenstored.holds_stops_back(|| store.set_private("/a").unwrap()));
    }

    #[test]
    fn a_xenstored_that_is_started_again_is_found_again() {
        let mut xenstored = Xenstored::start();
        let store = Store::open().unwrap();
        store.write("/a", "1").unwrap();
        xenstored.end();
        assert!(store.read("/a").is_err());
        assert!(store.children("/").is_err());
        xenstored.begin();
        assert_eq!(store.read("/a").unwrap(), None);
        store.write("/a", "2").unwrap();
        assert_eq!(store.read("/a").unwrap().as_deref(), Some("2"));
        assert_eq!(store.connections(), 2);
        // Nobody asked meanwhile.
        xenstored.end();
        xenstored.begin();
        assert_eq!(store.read("/a").unwrap(), None);
        assert_eq!(store.connections(), 3);
    }

    #[test]
    fn a_xenstored_that_does_not_answer_holds_nobody_up_for_long() {
        let xenstored = Xenstored::start();
        let store = Store::open().unwrap();
        store.write("/a", "1").unwrap();
        xenstored.stop(true);
        let began = std::time::Instant::now();
        assert!(store.read("/a").is_err());
        for _ in 0..100 {
            let said = store.write("/a", "2").unwrap_err().to_string();
            assert!(said.contains("not answered"), "{said}");
        }
        assert!(began.elapsed() < PATIENCE * 2);
        xenstored.stop(false);
        // The late answer is not taken for that of the next call.
        while store.write("/b", "3").is_err() {}
        assert_eq!(store.read("/b").unwrap().as_deref(), Some("3"));
        assert_eq!(store.connections(), 1);
    }

    #[test]
    fn a_connection_that_is_never_answered_is_given_up() {
        let mut xenstored = Xenstored::start();
        let store = Store::open().unwrap();
        xenstored.stop(true);
        assert!(store.read("/a").is_err());
        // Another one is there now, and the old connections stay open.
        xenstored.begin();
        assert!(store.read("/a").is_err());
        store.give_up.set(Duration::ZERO);
        assert_eq!(store.read("/a").unwrap(), None);
        assert_eq!(store.connections(), 2);
    }

    #[test]
    fn a_name_that_is_no_text_is_shown_and_is_not_taken_for_another() {
        let xenstored = Xenstored::start();
        let store = Store::open().unwrap();
        xenstored.put("/local/domain/1/name", b"w\xff\xc3b");
        let odd = store.try_domain_name(DomId(1)).unwrap().unwrap();
        assert!(!odd.is("w\\xff\\xc3b") && odd.is_taken_for("w\\xff\\xc3b"));
        assert_eq!(store.domain_name(DomId(1)).as_deref(), Some("w\\xff\\xc3b"));
        xenstored.put("/local/domain/3/name", b"w\\xff\\xc3b");
        let text = store.try_domain_name(DomId(3)).unwrap().unwrap();
        assert!(text.is("w\\xff\\xc3b") && !text.is_taken_for("w\\xff\\xc3b"));
        xenstored.put("/local/domain/4/name", b"a\nb");
        let lines = store.try_domain_name(DomId(4)).unwrap().unwrap();
        assert!(lines.is("a\nb") && lines.is_taken_for("a\\u000ab"));
        assert_eq!(store.try_domain_name(DomId(2)).unwrap(), None);
        assert!(store.read("/local/domain/1/name").is_err());
        assert_eq!(store.connections(), 1);
    }

    #[test]
    fn xenstored_is_found_where_xen_s_own_tools_find_it() {
        let xenstored = Xenstored::start();
        let socket = std::env::var_os("XENSTORED_PATH").unwrap();
        let dir = std::env::temp_dir().join(format!("xen-locus-rundir-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir(&dir).unwrap();
        std::os::unix::fs::symlink(&socket, dir.join("socket")).unwrap();
        std::env::set_var("XENSTORED_RUNDIR", &dir);
        obey_environment();
        assert_eq!(std::env::var_os("XENSTORED_PATH"), Some(socket.clone()));
        std::env::remove_var("XENSTORED_PATH");
        obey_environment();
        std::env::remove_var("XENSTORED_RUNDIR");
        let store = Store::open();
        std::env::set_var("XENSTORED_PATH", socket);
        xenstored.put("/a", b"1");
        assert_eq!(store.unwrap().read("/a").unwrap().as_deref(), Some("1"));
    }

    #[test]
    fn what_fits_no_message_is_not_sent() {
        let _xenstored = Xenstored::start();
        let store = Store::open().unwrap();
        let long = "x".repeat(MESSAGE_MAX);
        let said = store.write("/a", &long).unwrap_err().to_string();
        assert!(said.contains("4096 bytes"), "{said}");
        let said = store.read(&format!("/{long}")).unwrap_err().to_string();
        assert!(said.len() < 400, "{said}");
        assert_eq!(store.connections(), 1);
    }
}
