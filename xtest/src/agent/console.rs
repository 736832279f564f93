//! Guests' consoles. They are read all the time, logged, and used to run commands in the guests.
//!
//! The other end is `guest/console-server.c`, which describes the lines. A console that is not read would
//! block its guest when the ring is full.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use base64::prelude::{Engine, BASE64_STANDARD};
use rustix::termios;

use super::exec::Done;
use super::port::Failed;
use super::xenstore::Store;
use crate::proto::FailKind;

/// Bytes asked for at once, and how many such requests are under way.
const PIECE: usize = 32 * 1024;
const AHEAD: usize = 4;
/// A line without an answer is sent again after this time.
const RESEND: Duration = Duration::from_secs(3);
/// The same for a guest that boots: nothing listens to the first lines.
const KNOCK: Duration = Duration::from_millis(500);

/// All guests with a console.
#[derive(Clone, Default)]
pub(super) struct Guests {
    by_domid: Arc<Mutex<BTreeMap<u32, Arc<Console>>>>,
    next: Arc<AtomicU64>,
}

struct Console {
    /// A guest that is being migrated here has another name until it has arrived.
    name: Mutex<String>,
    input: Mutex<File>,
    /// The guest's command server has announced itself, or has answered.
    up: AtomicBool,
    /// The console is closed: the domain is gone.
    closed: AtomicBool,
    /// The domain has shut down or crashed, and is preserved.
    dead: AtomicBool,
    waiting: Mutex<BTreeMap<String, Sender<Line>>>,
}

/// A line of the guest's command server, without mark and checksum.
type Line = Vec<String>;

impl Guests {
    /// Starts to look for guests.
    pub(super) fn watch() -> Self {
        let guests = Self::default();
        let found = guests.clone();
        std::thread::spawn(move || loop {
            if let Err(e) = found.follow() {
                eprintln!("xtest-agent: {e:#}");
                std::thread::sleep(Duration::from_secs(1));
            }
        });
        guests
    }

    fn follow(&self) -> Result<()> {
        let mut store = Store::open()?;
        store.watch("@introduceDomain")?;
        store.watch("@releaseDomain")?;
        loop {
            let pending = self.scan(&mut store)?;
            // xenconsoled writes the name of the terminal some time after the domain appears.
            let limit = Duration::from_millis(if pending { 100 } else { 10_000 });
            if store.wait(limit)? {
                self.bury()?;
            }
        }
    }

    /// Marks guests that are preserved after their end. Their console stays open, but silent. A guest that was
    /// only suspended, to be saved, comes back.
    fn bury(&self) -> Result<()> {
        if locked(&self.by_domid).is_empty() {
            return Ok(());
        }
        let list = std::process::Command::new("xl")
            .arg("list")
            .output()
            .context("xl list")?;
        // Name ID Mem VCPUs State Time
        for line in String::from_utf8_lossy(&list.stdout).lines().skip(1) {
            let mut words = line.split_whitespace().skip(1);
            let domid = words.next().and_then(|d| d.parse::<u32>().ok());
            let dead = words
                .nth(2)
                .is_some_and(|state| state.contains(['s', 'c', 'd']));
            let found = domid.and_then(|d| locked(&self.by_domid).get(&d).cloned());
            if let Some(console) = found {
                console.dead.store(dead, Ordering::Relaxed);
            }
        }
        Ok(())
    }

    /// Opens consoles of new domains; true when one is not ready yet.
    fn scan(&self, store: &mut Store) -> Result<bool> {
        let domids: Vec<u32> = store
            .list("/local/domain")?
            .iter()
            .filter_map(|d| d.parse().ok())
            .collect();
        locked(&self.by_domid)
            .retain(|domid, c| domids.contains(domid) && !c.closed.load(Ordering::Relaxed));
        let mut pending = false;
        for domid in domids.into_iter().filter(|&d| d != 0) {
            let name = store.read(&format!("/local/domain/{domid}/name"));
            let known = locked(&self.by_domid).get(&domid).cloned();
            if let Some(console) = known {
                if let Ok(name) = name {
                    *locked(&console.name) = name;
                }
                continue;
            }
            let tty = store.read(&format!("/local/domain/{domid}/console/tty"));
            match (name, tty) {
                (Ok(name), Ok(tty)) if !tty.is_empty() => match Console::open(&name, &tty) {
                    Ok(console) => {
                        locked(&self.by_domid).insert(domid, console);
                    }
                    Err(_) => pending = true,
                },
                _ => pending = true,
            }
        }
        Ok(pending)
    }

    fn find(&self, name: &str) -> Option<Arc<Console>> {
        let all = locked(&self.by_domid);
        // The newest one, if a destroyed domain of the same name still exists.
        let console = all.values().rev().find(|c| *locked(&c.name) == name)?;
        (!console.closed.load(Ordering::Relaxed)).then(|| Arc::clone(console))
    }

    /// Runs a command in a guest.
    pub(super) fn exec(
        &self,
        name: &str,
        cmd: &str,
        timeout_ms: u64,
        silence_ms: u64,
    ) -> Result<Done, Failed> {
        let silence = Duration::from_millis(silence_ms);
        let limit = Instant::now() + silence;
        let console = loop {
            match self.find(name) {
                Some(console) => break console,
                None if Instant::now() > limit => {
                    return Err(fail(FailKind::Gone, format!("{name}: no console")));
                }
                None => std::thread::sleep(Duration::from_millis(50)),
            }
        };
        if console.dead.load(Ordering::Relaxed) {
            self.bury()
                .map_err(|e| fail(FailKind::Other, format!("{e:#}")))?;
        }
        let id = format!("{}", self.next.fetch_add(1, Ordering::Relaxed));
        let (tx, rx) = mpsc::channel();
        locked(&console.waiting).insert(id.clone(), tx);
        let result = Talk {
            console: &console,
            id: &id,
            rx,
            silence,
        }
        .run(cmd, timeout_ms);
        locked(&console.waiting).remove(&id);
        result
    }
}

impl Console {
    fn open(name: &str, tty: &str) -> Result<Arc<Self>> {
        let reader = OpenOptions::new()
            .read(true)
            .write(true)
            .open(tty)
            .with_context(|| format!("opening {tty}"))?;
        let mut mode = termios::tcgetattr(&reader)?;
        mode.make_raw();
        termios::tcsetattr(&reader, termios::OptionalActions::Now, &mode)?;
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(Path::new("/var/log").join(format!("guest-{name}.log")))?;
        let console = Arc::new(Self {
            name: Mutex::new(name.to_owned()),
            input: Mutex::new(reader.try_clone()?),
            up: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            dead: AtomicBool::new(false),
            waiting: Mutex::new(BTreeMap::new()),
        });
        let drained = Arc::clone(&console);
        std::thread::spawn(move || {
            drained.drain(reader, log);
            drained.closed.store(true, Ordering::Relaxed);
            // Wakes threads that wait for an answer.
            locked(&drained.waiting).clear();
        });
        Ok(console)
    }

    fn drain(&self, reader: impl Read, mut log: File) {
        let mut reader = BufReader::with_capacity(1 << 16, reader);
        let mut raw = Vec::new();
        while let Ok(1..) = reader.read_until(b'\n', &mut raw) {
            match frame(&raw) {
                Some(line) => self.dispatch(line),
                None => {
                    let text: Vec<u8> = raw.iter().copied().filter(|&b| b != b'\r').collect();
                    if text != b"\n" {
                        let _ = log.write_all(&text);
                    }
                }
            }
            raw.clear();
        }
    }

    /// Takes a line of the command server. An echo does not count as a response: the console echoes until the
    /// server has opened it.
    fn dispatch(&self, line: Line) {
        if !["O", "W", "A", "C", "U"].iter().any(|op| is(&line, op)) {
            return;
        }
        self.up.store(true, Ordering::Relaxed);
        let Some(id) = line.get(1) else { return };
        if let Some(tx) = locked(&self.waiting).get(id) {
            let _ = tx.send(line);
        }
    }

    fn send(&self, text: &str) -> Result<()> {
        let line = format!("\n~{text} {:08x}\n", crc32fast::hash(text.as_bytes()));
        Ok(locked(&self.input).write_all(line.as_bytes())?)
    }
}

/// The words of a line of the command server; none if it is something else or damaged. A kernel message may
/// precede it on the same line.
fn frame(raw: &[u8]) -> Option<Line> {
    let text = std::str::from_utf8(raw).ok()?.trim_end();
    let (_, text) = text.rsplit_once('~')?;
    let (text, crc) = text.rsplit_once(' ')?;
    let crc = u32::from_str_radix(crc, 16).ok()?;
    (crc == crc32fast::hash(text.as_bytes())).then(|| text.split(' ').map(str::to_owned).collect())
}

/// One command's conversation with the guest.
struct Talk<'a> {
    console: &'a Console,
    id: &'a str,
    rx: Receiver<Line>,
    silence: Duration,
}

impl Talk<'_> {
    fn run(&self, cmd: &str, timeout_ms: u64) -> Result<Done, Failed> {
        // Asked again and again, because a guest that boots does not listen yet.
        if !self.console.up.load(Ordering::Relaxed) {
            self.ask(&format!("P {}", self.id), &|l| is(l, "O"))?;
        }
        let seconds = timeout_ms.div_ceil(1000);
        let request = format!("R {} {seconds} {}", self.id, BASE64_STANDARD.encode(cmd));
        let answer = self.ask(&request, &|l| is(l, "A"))?;
        let number = |at: usize| -> Result<usize, Failed> {
            Ok(answer.get(at).context("a short answer")?.parse::<usize>()?)
        };
        let rc: i32 = answer.get(2).context("a short answer")?.parse()?;
        let timed_out = number(3)? != 0;
        let (out, err, packed) = (number(4)?, number(5)?, number(6)?);
        let out = if packed > 0 && packed < out {
            let mut plain = Vec::with_capacity(out);
            let packed = self.fetch('z', packed)?;
            flate2::read::GzDecoder::new(packed.as_slice()).read_to_end(&mut plain)?;
            plain
        } else {
            self.fetch('o', out)?
        };
        let err = self.fetch('e', err)?;
        self.ask(&format!("D {}", self.id), &|l| is(l, "O"))?;
        Ok(Done {
            rc,
            timed_out,
            out,
            err,
        })
    }

    /// Sends a line until an answer is accepted. Each response of the guest extends the time limit.
    fn ask(&self, text: &str, wanted: &dyn Fn(&Line) -> bool) -> Result<Line, Failed> {
        let mut heard = Instant::now();
        let mut sent: Option<Instant> = None;
        loop {
            let up = self.console.up.load(Ordering::Relaxed);
            let patience = if up { RESEND } else { KNOCK };
            if sent.is_none_or(|t| t.elapsed() >= patience) {
                self.console.send(text)?;
                sent = Some(Instant::now());
            }
            match self.next()? {
                Some(line) if wanted(&line) => return Ok(line),
                Some(_) => heard = Instant::now(),
                None => self.lost_patience(heard)?,
            }
        }
    }

    /// Reads one output in pieces, with several requests under way at a time.
    fn fetch(&self, kind: char, size: usize) -> Result<Vec<u8>, Failed> {
        let offsets: Vec<usize> = (0..size).step_by(PIECE).collect();
        let mut pieces: BTreeMap<usize, Vec<u8>> = BTreeMap::new();
        let mut asked: BTreeMap<usize, Instant> = BTreeMap::new();
        let mut heard = Instant::now();
        while pieces.len() < offsets.len() {
            for &off in offsets
                .iter()
                .filter(|o| !pieces.contains_key(o))
                .take(AHEAD)
            {
                if asked.get(&off).is_none_or(|t| t.elapsed() >= RESEND * 3) {
                    self.console
                        .send(&format!("G {} {kind} {off} {PIECE}", self.id))?;
                    asked.insert(off, Instant::now());
                }
            }
            let Some(line) = self.next()? else {
                self.lost_patience(heard)?;
                continue;
            };
            heard = Instant::now();
            let off = line.get(3).and_then(|o| o.parse().ok());
            if let (true, Some(off), Some(text)) = (is(&line, "C"), off, line.get(4)) {
                if line.get(2).is_some_and(|k| k.starts_with(kind)) {
                    pieces.insert(off, BASE64_STANDARD.decode(text)?);
                }
            }
        }
        let mut all: Vec<u8> = pieces.into_values().flatten().collect();
        all.truncate(size);
        Ok(all)
    }

    fn next(&self) -> Result<Option<Line>, Failed> {
        match self.rx.recv_timeout(Duration::from_millis(500)) {
            Ok(line) => Ok(Some(line)),
            Err(mpsc::RecvTimeoutError::Timeout) if self.console.dead.load(Ordering::Relaxed) => {
                Err(fail(
                    FailKind::Gone,
                    format!("{}: has crashed", locked(&self.console.name)),
                ))
            }
            Err(mpsc::RecvTimeoutError::Timeout) => Ok(None),
            Err(mpsc::RecvTimeoutError::Disconnected) => Err(fail(
                FailKind::Gone,
                format!("{}: its console was closed", locked(&self.console.name)),
            )),
        }
    }

    fn lost_patience(&self, heard: Instant) -> Result<(), Failed> {
        if heard.elapsed() < self.silence {
            return Ok(());
        }
        let seconds = self.silence.as_secs();
        let name = locked(&self.console.name).clone();
        Err(fail(
            FailKind::Hung,
            format!("{name}: no sign of life for {seconds} s"),
        ))
    }
}

fn is(line: &Line, op: &str) -> bool {
    line.first().is_some_and(|w| w == op)
}

fn fail(kind: FailKind, message: String) -> Failed {
    Failed { kind, message }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_is_found_behind_a_kernel_message() {
        let crc = crc32fast::hash(b"A 7 0 0 5 0 0");
        let raw = format!("[ 12.3] BUG~A 7 0 0 5 0 0 {crc:08x}\r\n");
        assert_eq!(frame(raw.as_bytes()).unwrap()[0..2], ["A", "7"]);
        assert!(frame(b"~A 7 0 0 5 0 0 00000000\n").is_none());
        assert!(frame(b"plain text\n").is_none());
    }
}
