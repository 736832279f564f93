//! `locus-kill DOMAIN [--after US | --in-pause US] -- COMMAND…`: runs a command that works on a guest, kills it,
//! and watches whether the guest stays paused.
//!
//! It prints, as JSON, how the command ended and the longest time for which the guest was seen paused. A guest
//! that is still paused three seconds after the command ended is `stuck`. A command may stop itself: if the guest was
//! paused meanwhile, and somebody else than this program killed the command, it was `stopped_in_pause`.

use std::io::Read as _;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use clap::Parser;
use locus_xen::{set_realtime_priority, Control, Process};
use serde_json::json;
use xen_locus::ops::host::Host;
use xen_locus::storage::journal::Journal;

/// Run a command, kill it, and see whether the guest runs on
#[derive(Parser)]
struct Args {
    /// Name or id
    domain: String,
    /// Kill the command this many microseconds after its start
    #[arg(long, conflicts_with = "in_pause")]
    after: Option<u64>,
    /// Kill the command this many microseconds after the guest was first seen paused
    #[arg(long)]
    in_pause: Option<u64>,
    /// The command; it may also end or kill itself
    #[arg(last = true, required = true)]
    command: Vec<String>,
}

/// A guest that stays paused longer than this is stuck.
const PATIENCE: Duration = Duration::from_secs(3);
/// A command that is stopped for longer than this is killed.
const STOPPED: Duration = Duration::from_millis(500);
/// Time between two looks. Each look takes CPU time from the command.
const REST: Duration = Duration::from_millis(2);
/// The same once the journal exists: then a pause may come at any moment.
const SHORT_REST: Duration = Duration::from_micros(200);

/// Watches when the guest is paused.
struct Watch<'c> {
    control: &'c Control,
    id: locus_guest::addr::DomId,
    since: Option<Instant>,
    longest: Duration,
    /// How long the vCPUs had run at the last look, in nanoseconds, and how many there are.
    ran: u64,
    vcpus: u64,
}

impl Watch<'_> {
    fn look(&mut self) -> Result<bool> {
        let standing = self.control.pause_state(self.id)?;
        let now = Instant::now();
        let standing = standing.context("the domain is gone")?;
        let paused = standing.paused;
        // This process may not have run for long. While the guest ran meanwhile, it was not paused.
        let ran = standing.cpu_time_ns.saturating_sub(self.ran) / self.vcpus.max(1);
        self.ran = standing.cpu_time_ns;
        if let Some(since) = self.since {
            let held = (now - since).saturating_sub(Duration::from_nanos(ran));
            self.longest = self.longest.max(held);
        }
        self.since = match self.since {
            _ if !paused => None,
            Some(since) if ran == 0 => Some(since),
            _ => Some(now),
        };
        Ok(paused)
    }
}

fn main() -> Result<()> {
    let args = Args::parse();
    let host = Host::open(None)?;
    let info = host.guest(&args.domain)?.info;
    let mut watch = Watch {
        control: &host.control,
        id: info.id,
        since: None,
        longest: Duration::ZERO,
        ran: 0,
        vcpus: info.vcpus.into(),
    };
    // Without this the times would show when this process runs, not when the guest is paused. The command has a
    // high priority too while the guest is paused.
    set_realtime_priority(2);
    let (program, rest) = args.command.split_first().context("no command")?;
    let began = Instant::now();
    let mut child = Command::new(program)
        .args(rest)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("starting {program}"))?;
    let process = Process::open(child.id())?;
    let journal = Journal::new(&info.uuid);
    let mut stopped: Option<Instant> = None;
    let (mut stopped_in_pause, mut ended_by_us) = (false, false);
    let mut killed_in_pause = None;
    let mut due = args.after.map(|us| began + Duration::from_micros(us));
    let mut status: Option<ExitStatus> = None;
    let mut ended = began;
    loop {
        let paused = watch.look()?;
        if let (true, Some(us), None) = (paused, args.in_pause, due) {
            due = Some(Instant::now() + Duration::from_micros(us));
        }
        if killed_in_pause.is_none() && due.is_some_and(|at| at <= Instant::now()) {
            child.kill()?;
            killed_in_pause = Some(paused);
        }
        // A command that stopped itself must be ended from outside.
        if process.is_stopped() {
            // It was stopped before this look at the guest: the pause is its own, and does not end by it.
            stopped_in_pause |= paused && stopped.is_some();
            if stopped.get_or_insert_with(Instant::now).elapsed() > STOPPED {
                child.kill()?;
                ended_by_us = true;
            }
        }
        if status.is_none() {
            status = child.try_wait()?;
            ended = Instant::now();
        } else if !paused || ended.elapsed() > PATIENCE {
            break;
        }
        let rest = match args.in_pause {
            Some(_) if journal.exists() => SHORT_REST,
            _ => REST,
        };
        if due.is_none_or(|at| at > Instant::now() + rest) || killed_in_pause.is_some() {
            std::thread::sleep(rest);
        }
    }
    // stderr ends only when the guardian has ended too.
    let mut said = String::new();
    if let Some(mut stderr) = child.stderr.take() {
        stderr.read_to_string(&mut said)?;
    }
    println!(
        "{}",
        json!({
            "schema": 1,
            "rc": status.and_then(|s| s.code()),
            "signal": status.and_then(|s| s.signal()),
            "killed_in_pause": killed_in_pause,
            "stopped_in_pause": stopped_in_pause && !ended_by_us,
            "longest_pause_us": watch.longest.as_micros(),
            "stuck": watch.since.is_some(),
            "stderr": said,
            "total_us": (ended - began).as_micros(),
        })
    );
    Ok(())
}
