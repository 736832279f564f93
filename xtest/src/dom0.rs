//! The runner's side of the agent: commands, files and terminals of dom0.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::fs::File;
use std::io::{BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::limits;
use crate::proto::{self, FailKind, Reply, Request, Tagged};
use crate::verdict::Verdict;

/// What a command printed and how it ended.
#[derive(Debug, Clone)]
pub struct Output {
    /// Exit code; 128 + signal if a signal ended the command.
    pub rc: i32,
    /// The command exceeded its time limit and was killed.
    pub timed_out: bool,
    /// Standard output, byte for byte.
    pub stdout: Vec<u8>,
    /// Standard error, byte for byte.
    pub stderr: Vec<u8>,
}

impl Output {
    /// Standard output as text, trimmed.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).trim().to_owned()
    }

    /// Standard error as text, trimmed.
    pub fn err_text(&self) -> String {
        String::from_utf8_lossy(&self.stderr).trim().to_owned()
    }

    /// Standard output as JSON.
    ///
    /// # Errors
    ///
    /// [`Verdict::Failure`] if it is not JSON.
    pub fn json(&self) -> Result<serde_json::Value, Verdict> {
        serde_json::from_slice(&self.stdout).map_err(|e| {
            Verdict::failure(format!(
                "not JSON ({e}): {}{}",
                self.text(),
                self.err_text()
            ))
        })
    }
}

/// Why a request to the agent failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Trouble {
    /// The guest does not respond.
    Hung(String),
    /// The guest does not exist, or has crashed.
    Gone(String),
    /// dom0 or the whole machine is gone.
    Down,
    /// The scenario took too long and was ended.
    Late,
    /// The testbed itself has failed.
    Testbed(String),
}

impl From<Trouble> for Verdict {
    fn from(t: Trouble) -> Self {
        match t {
            Trouble::Hung(why) => Verdict::failure(why),
            Trouble::Gone(why) => Verdict::crash(why),
            Trouble::Down => Verdict::crash("dom0 or the hypervisor went down".to_owned()),
            Trouble::Late => Verdict::failure("it took too long and was ended"),
            Trouble::Testbed(why) => Verdict::Error(why),
        }
    }
}

/// A reply and its body.
pub type Answer = (Reply, Vec<u8>);

/// A connection to dom0's agent. Clones share it; several threads may use it at a time.
#[derive(Debug, Clone)]
pub struct Dom0 {
    link: Arc<Link>,
}

#[derive(Debug)]
struct Link {
    out: Mutex<UnixStream>,
    pending: Mutex<Pending>,
    next: AtomicU64,
    /// No request is made any more.
    ended: AtomicBool,
    transcript: Mutex<File>,
    started: Instant,
}

#[derive(Debug, Default)]
struct Pending {
    waiting: HashMap<u64, Sender<Answer>>,
    down: bool,
}

impl Pending {
    /// An agent announces itself, and it is not the first: the one before has ended, and what it was asked is not known
    /// to this one.
    fn agent_is_new(&mut self) {
        for (_, tx) in std::mem::take(&mut self.waiting) {
            let message = "dom0's agent has ended and was started again".to_owned();
            let kind = FailKind::Other;
            let _ = tx.send((Reply::Failed { kind, message }, Vec::new()));
        }
    }
}

/// Sends the agent a request every second for as long as the link is in use, and ignores the answers.
///
/// With SVM guests the emulated machine sometimes stops, Xen and dom0 included; once for 120 seconds. The
/// cause is unknown. If a wake-up of Xen's timer was lost, an interrupt from outside ends it.
fn ping(link: &Weak<Link>) {
    loop {
        std::thread::sleep(Duration::from_secs(1));
        let Some(link) = link.upgrade() else { return };
        let id = link.next.fetch_add(1, Ordering::Relaxed);
        if link.send(id, Request::Hello, &[]).is_err() {
            return;
        }
    }
}

impl Dom0 {
    /// Waits until the agent answers. `transcript` is the file that all requests and answers are logged to.
    pub fn connect(stream: UnixStream, transcript: &Path, limit: Duration) -> Result<Self> {
        let link = Arc::new(Link {
            out: Mutex::new(stream.try_clone()?),
            pending: Mutex::default(),
            next: AtomicU64::new(1),
            ended: AtomicBool::new(false),
            transcript: Mutex::new(File::create(transcript)?),
            started: Instant::now(),
        });
        let ready = link.register(0);
        let reader = Arc::clone(&link);
        std::thread::spawn(move || reader.read(stream));
        let pinged = Arc::downgrade(&link);
        std::thread::spawn(move || ping(&pinged));
        match ready.recv_timeout(limit) {
            Ok(_) => Ok(Self { link }),
            Err(RecvTimeoutError::Timeout) => anyhow::bail!("dom0 was not up within {limit:?}"),
            Err(RecvTimeoutError::Disconnected) => anyhow::bail!("the machine went down"),
        }
    }

    /// Runs a shell command with the default limit (two minutes).
    pub fn sh(&self, cmd: &str) -> Result<Output, Verdict> {
        self.sh_timeout(cmd, Duration::from_secs(120))
    }

    /// Runs a shell command. If it exceeds the limit, its process group is killed
    /// ([`Output::timed_out`]).
    pub fn sh_timeout(&self, cmd: &str, limit: Duration) -> Result<Output, Verdict> {
        let limit = limits::scaled(limit);
        let request = Request::Run {
            cmd: cmd.to_owned(),
            timeout_ms: millis(limit),
            stream: false,
        };
        Ok(self
            .ask(request, &[], limit + limits::GRACE, "dom0", cmd)
            .and_then(output)?)
    }

    /// Runs a shell command and returns its standard output as text.
    ///
    /// # Errors
    ///
    /// [`Verdict::Failure`] with its output if it does not end with 0.
    pub fn ok(&self, cmd: &str) -> Result<String, Verdict> {
        let out = self.sh(cmd)?;
        if out.rc != 0 {
            let said = format!("{}\n{}", out.text(), out.err_text());
            return Err(Verdict::failure(format!(
                "`{cmd}` ended with {}: {said}",
                out.rc
            )));
        }
        Ok(out.text())
    }

    /// Runs a shell command and passes its output to `sink` as it comes: whether it is standard error, and
    /// the bytes. Returns the exit code.
    pub fn sh_stream(
        &self,
        cmd: &str,
        limit: Duration,
        sink: &mut dyn FnMut(bool, &[u8]),
    ) -> Result<i32, Verdict> {
        let limit = limits::scaled(limit);
        let request = Request::Run {
            cmd: cmd.to_owned(),
            timeout_ms: millis(limit),
            stream: true,
        };
        self.link.note(&format!("dom0$ {cmd}"));
        let (_, rx) = self.begin(request, &[])?;
        let deadline = Instant::now() + limit + limits::GRACE;
        loop {
            match self.next(&rx, deadline)? {
                (Reply::Data { err }, body) => sink(err, &body),
                (Reply::Done { rc, .. }, _) => return Ok(rc),
                other => return Err(unexpected(&other.0).into()),
            }
        }
    }

    /// Writes a file in dom0. A missing folder is created.
    pub fn put(&self, path: &str, mode: u32, data: &[u8]) -> Result<(), Verdict> {
        let request = Request::Put {
            path: path.to_owned(),
            mode,
        };
        let what = format!("(put {} bytes to {path})", data.len());
        self.ask(request, data, limits::TRANSFER, "dom0", &what)?;
        Ok(())
    }

    /// Reads a file in dom0.
    pub fn get(&self, path: &str) -> Result<Vec<u8>, Verdict> {
        let request = Request::Get {
            path: path.to_owned(),
        };
        let what = format!("(get {path})");
        Ok(self.ask(request, &[], limits::TRANSFER, "dom0", &what)?.1)
    }

    /// Runs a command in a guest; see [`crate::guest::Guest`].
    pub(crate) fn guest_exec(
        &self,
        domain: &str,
        cmd: &str,
        limit: Duration,
        silence: Duration,
    ) -> Result<Output, Trouble> {
        let (limit, silence) = (limits::scaled(limit), limits::scaled(silence));
        let request = Request::GuestExec {
            domain: domain.to_owned(),
            cmd: cmd.to_owned(),
            timeout_ms: millis(limit),
            silence_ms: millis(silence),
        };
        let patience = limit + silence + limits::TRANSFER;
        self.ask(request, &[], patience, domain, cmd)
            .and_then(output)
    }

    /// Starts a command on a terminal; returns its id for [`Self::type_in`] and its output.
    pub fn terminal(&self, cmd: &str, rows: u16, cols: u16) -> Result<Terminal, Verdict> {
        let request = Request::Pty {
            cmd: cmd.to_owned(),
            rows,
            cols,
        };
        let (id, replies) = self.begin(request, &[])?;
        Ok(Terminal { id, replies })
    }

    /// Writes input to a terminal.
    pub fn type_in(&self, terminal: u64, data: &[u8]) -> Result<(), Verdict> {
        let id = self.link.next.fetch_add(1, Ordering::Relaxed);
        self.link.send(id, Request::Input { to: terminal }, data)?;
        Ok(())
    }

    /// Writes a line to the transcript of the run.
    pub fn note(&self, text: &str) {
        self.link.note(text);
    }

    /// Ends all requests that wait for an answer with [`Trouble::Late`], and all new ones until [`Self::go_on`].
    pub(crate) fn end(&self) {
        self.link.ended.store(true, Ordering::SeqCst);
        locked(&self.link.pending).waiting.clear();
    }

    /// Allows requests again.
    pub(crate) fn go_on(&self) {
        self.link.ended.store(false, Ordering::SeqCst);
    }

    /// Whether the connection to the machine was lost.
    pub fn is_down(&self) -> bool {
        locked(&self.link.pending).down
    }

    fn ask(
        &self,
        request: Request,
        body: &[u8],
        patience: Duration,
        target: &str,
        what: &str,
    ) -> Result<Answer, Trouble> {
        self.link.note(&format!("{target}$ {what}"));
        let began = Instant::now();
        let answer = self
            .begin(request, body)
            .and_then(|(_, rx)| self.next(&rx, began + patience));
        self.link.note(&summary(&answer, began.elapsed()));
        answer
    }

    fn begin(&self, request: Request, body: &[u8]) -> Result<(u64, Receiver<Answer>), Trouble> {
        let id = self.link.next.fetch_add(1, Ordering::Relaxed);
        let rx = self.link.register(id);
        if self.link.ended.load(Ordering::SeqCst) {
            return Err(Trouble::Late);
        }
        self.link.send(id, request, body)?;
        Ok((id, rx))
    }

    fn next(&self, rx: &Receiver<Answer>, deadline: Instant) -> Result<Answer, Trouble> {
        match rx.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok((Reply::Failed { kind, message }, _)) => Err(match kind {
                FailKind::Hung => Trouble::Hung(message),
                FailKind::Gone => Trouble::Gone(message),
                FailKind::Other => Trouble::Testbed(message),
            }),
            Ok(answer) => Ok(answer),
            Err(RecvTimeoutError::Disconnected) if self.link.ended.load(Ordering::SeqCst) => {
                Err(Trouble::Late)
            }
            Err(RecvTimeoutError::Disconnected) => Err(Trouble::Down),
            Err(RecvTimeoutError::Timeout) => {
                Err(Trouble::Testbed("dom0's agent does not answer".to_owned()))
            }
        }
    }
}

/// A command on a terminal.
#[derive(Debug)]
pub struct Terminal {
    /// Its id, for [`Dom0::type_in`].
    pub id: u64,
    /// [`Reply::Data`] for each piece of output, then [`Reply::Done`].
    pub replies: Receiver<Answer>,
}

impl Link {
    fn register(&self, id: u64) -> Receiver<Answer> {
        let (tx, rx) = mpsc::channel();
        let mut pending = locked(&self.pending);
        if !pending.down {
            pending.waiting.insert(id, tx);
        }
        rx
    }

    fn send(&self, id: u64, message: Request, body: &[u8]) -> Result<(), Trouble> {
        let mut out = locked(&self.out);
        proto::send(&mut *out, &Tagged { id, message }, body).map_err(|_| Trouble::Down)
    }

    fn read(&self, stream: UnixStream) {
        let mut stream = BufReader::with_capacity(1 << 16, stream);
        while let Ok((Tagged { id, message }, body)) = proto::receive::<Reply>(&mut stream) {
            let more = matches!(message, Reply::Data { .. });
            let mut pending = locked(&self.pending);
            if id == 0 && !pending.waiting.contains_key(&0) {
                pending.agent_is_new();
                continue;
            }
            if let Some(tx) = pending.waiting.get(&id) {
                let _ = tx.send((message, body));
            }
            if !more {
                pending.waiting.remove(&id);
            }
        }
        let mut pending = locked(&self.pending);
        pending.down = true;
        pending.waiting.clear();
    }

    fn note(&self, text: &str) {
        let at = self.started.elapsed().as_secs_f64();
        let _ = writeln!(locked(&self.transcript), "[{at:8.3}] {text}");
    }
}

fn summary(answer: &Result<Answer, Trouble>, took: Duration) -> String {
    let mut text = match answer {
        Ok((Reply::Done { rc, timed_out, .. }, body)) => {
            let shown = match std::str::from_utf8(body.get(..4096).unwrap_or(body)) {
                Ok(text) => text,
                Err(e) if e.error_len().is_none() => "(text, cut within a character)",
                Err(_) => "(binary)",
            };
            let late = if *timed_out {
                ", killed at its limit"
            } else {
                ""
            };
            format!("-> {rc}{late}, {} bytes\n{}", body.len(), shown.trim_end())
        }
        Ok((_, body)) => format!("-> {} bytes", body.len()),
        Err(t) => format!("-> {t:?}"),
    };
    let _ = write!(text, " ({:.3} s)", took.as_secs_f64());
    text
}

fn output((reply, mut body): Answer) -> Result<Output, Trouble> {
    match reply {
        Reply::Done {
            rc,
            timed_out,
            out_len,
        } => {
            let at = usize::try_from(out_len)
                .unwrap_or(usize::MAX)
                .min(body.len());
            let stderr = body.split_off(at);
            Ok(Output {
                rc,
                timed_out,
                stdout: body,
                stderr,
            })
        }
        other => Err(unexpected(&other)),
    }
}

fn unexpected(reply: &Reply) -> Trouble {
    Trouble::Testbed(format!("an answer of the wrong kind: {reply:?}"))
}

fn millis(d: Duration) -> u64 {
    d.as_millis().try_into().unwrap_or(u64::MAX)
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_agent_was_asked_ends_when_another_announces_itself() {
        let (ours, mut agent) = UnixStream::pair().unwrap();
        let file = std::env::temp_dir().join(format!("xtest-agent-{}", std::process::id()));
        let ready = |agent: &mut UnixStream| {
            let message = Reply::Ready { uptime: 1.0 };
            proto::send(agent, &Tagged { id: 0, message }, &[]).unwrap();
        };
        ready(&mut agent);
        let dom0 = Dom0::connect(ours, &file, Duration::from_secs(30)).unwrap();
        let asked = std::thread::spawn({
            let dom0 = dom0.clone();
            move || dom0.sh("sleep 9999")
        });
        // The request has arrived, and the agent dies and is started again.
        while !matches!(
            proto::receive::<Request>(&mut agent).unwrap().0.message,
            Request::Run { .. }
        ) {}
        ready(&mut agent);
        let said = asked.join().unwrap();
        assert!(
            matches!(&said, Err(Verdict::Error(why)) if why.contains("started again")),
            "{said:?}"
        );
        dom0.end();
        assert_eq!(dom0.sh("true").unwrap_err(), Verdict::from(Trouble::Late));
        let _ = std::fs::remove_file(file);
    }
}
