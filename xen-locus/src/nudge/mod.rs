//! Wakes those who sleep in a function that is to be replaced, as a signal would that is none: they leave
//! their system call, and restart it.
//!
//! The guest's kernel does it, on its next timer interrupt, whose handler is redirected for that long through
//! code in the arena ([`gate`]). Both writes are made as a patch's are: journalled, guarded, in a pause, when
//! nobody stands there.

pub mod gate;

use std::collections::HashSet;
use std::thread;
use std::time::{Duration, Instant};

use locus_guest::addr::{Gva, Range, PAGE_SIZE};
use locus_kernel::{tasks, Kernel};

use self::gate::{Calls, Thread, FUNCTION, THREADS_MAX};
use crate::apply::{self, Done, Options, Outcome, Report};
use crate::arena::{self, Arena, Rights};
use crate::blocker::Blocker;
use crate::blocker::Reason;
use crate::error::{Class, Error, Result};
use crate::machine::Machine;
use crate::plan::{self, Plan, Stack};
use crate::quiesce::{Watch, Watched};
use crate::storage::journal::{self, Change, Op};
use crate::target::redirect;
use crate::target::symbols::Owner;
use crate::write::Write;
use crate::x86;
use crate::x86::JUMP;

/// How long the guest may take until a timer interrupt comes: an idle one has some every second.
const TICK: Duration = Duration::from_secs(5);
/// Where the gate's code stands in its page: its first byte is no place that nobody may be at (see
/// [`Watch::hit`]), and that of the page is not part of it.
const INTO: u64 = 16;
/// Fills the page before it.
const INT3: u8 = 0xcc;

/// What came of it.
#[derive(Clone, Debug)]
pub struct Nudged {
    /// Who sleeps there.
    pub asleep: Vec<Blocker>,
    /// How many of them were woken.
    pub woken: u32,
    /// For the audit log.
    pub report: Report,
}

/// Wakes the threads that sleep in one of the ranges of `watch`, for the sake of `patch`. Kernel threads are
/// left alone.
///
/// # Errors
/// As [`apply::apply`]; [`Class::TryAgain`](crate::error::Class::TryAgain) when the guest handled no timer interrupt in time.
pub fn nudge(
    machine: &dyn Machine,
    kernel: &Kernel<'_>,
    patch: &str,
    watch: &Watch,
    options: &Options,
) -> Result<Nudged> {
    kernel.check_runs()?;
    let mut asleep = apply::blocking(machine, kernel, watch, options)?;
    asleep.retain(|b| b.reason == Reason::SleepingOn);
    let threads = threads(kernel, &asleep)?;
    let nudged = |asleep, woken, outcome, done| Nudged {
        asleep,
        woken,
        report: apply::report(patch, outcome, 0, done),
    };
    if threads.is_empty() {
        return Ok(nudged(asleep, 0, Outcome::Already, Done::default()));
    }
    let gate = Gate::prepare(kernel, patch, &threads)?;
    if options.dry_run {
        return Ok(nudged(asleep, 0, Outcome::WouldNudge, Done::default()));
    }
    machine.begin(&gate.change(kernel))?;
    let passed = gate.pass(machine, kernel, options);
    let is_uncertain = |e: &Error| e.class() == Class::Uncertain;
    if !passed.as_ref().is_err_and(is_uncertain) {
        machine.ended();
    }
    let (woken, done) = passed?;
    Ok(nudged(asleep, woken, Outcome::Nudged, done))
}

/// The user threads among `asleep`, at most as many as are woken at once.
fn threads(kernel: &Kernel<'_>, asleep: &[Blocker]) -> Result<Vec<Thread>> {
    let ids: HashSet<u32> = asleep.iter().map(|b| b.pid).collect();
    let memory = kernel.btf()?.offset_of("task_struct", "mm")?;
    let mut threads = Vec::new();
    for task in tasks::TaskLayout::of(kernel)?.all(kernel, &kernel.space)? {
        if threads.len() == THREADS_MAX {
            break;
        }
        let wanted = task.pid > 0 && ids.contains(&task.pid);
        if wanted && kernel.space.read_u64(task.addr.plus(memory as u64))? != 0 {
            threads.push(Thread {
                pid: task.pid,
                task: task.addr,
            });
        }
    }
    Ok(threads)
}

/// A gate that is ready to be put up.
struct Gate {
    /// First of its two arena pages.
    first: usize,
    code: Vec<u8>,
    data: Vec<u8>,
    up: Plan,
    down: Plan,
}

impl Gate {
    fn prepare(kernel: &Kernel<'_>, patch: &str, threads: &[Thread]) -> Result<Gate> {
        let mut arena = Arena::read(kernel)?;
        let residents = plan::resolve_interrupted(kernel, &mut arena)?;
        let entry = kernel.function(FUNCTION, 0)?;
        if let Some(layers) = Stack::new(&residents).layers(entry) {
            return Err(Error::not_applicable(format!(
                "{FUNCTION}, by which threads are woken, is replaced by {}",
                layers.owner()
            )));
        }
        let site = redirect::examine(kernel, Owner::Kernel, FUNCTION, entry, None)?.site;
        let code = kernel.space.read_vec(site.at, JUMP + 15)?;
        let len = gate::displaced(&code, site.at).map_err(|why| {
            Error::not_applicable(format!(
                "{FUNCTION}, by which threads are woken, can't be entered: {why}"
            ))
        })?;
        let displaced = code.get(..len).unwrap_or_default();
        let first = arena.find_room(kernel.kind, &[Rights::Text, Rights::Data])?;
        let (text, data) = (arena::page_address(first), arena::page_address(first + 1));
        let at = text.plus(INTO);
        let mut page = vec![INT3; usize::try_from(INTO).unwrap_or(0)];
        page.extend(gate::code(
            at,
            data,
            Calls::of(kernel)?,
            displaced,
            site.at,
        )?);
        let jump = x86::jump(site.at, at)
            .ok_or_else(|| Error::failed(format!("{at} is out of reach of {FUNCTION}")))?;
        let watched = |start: Gva, len: u64, name: &str| Watched {
            range: Range::new(start, len),
            name: name.into(),
        };
        let own = watched(text, page.len() as u64, "the gate");
        let write = Write {
            at: site.at,
            expect: site.old.to_vec(),
            new: jump.to_vec(),
        };
        let plan = |write: Write, watch: Vec<Watched>| Plan {
            patch: patch.to_owned(),
            writes: vec![write],
            watch: Watch::new(kernel, watch),
            entry_only: None,
        };
        let back = Write {
            at: write.at,
            expect: write.new.clone(),
            new: write.expect.clone(),
        };
        let redirect = || watched(site.at, JUMP as u64, FUNCTION);
        Ok(Gate {
            first,
            code: page,
            data: gate::data(threads),
            up: plan(write, vec![redirect()]),
            down: plan(back, vec![redirect(), own]),
        })
    }

    /// What is written to the journal: who finds it there takes the gate down.
    fn change(&self, kernel: &Kernel<'_>) -> Change {
        let ranges = self
            .down
            .watch
            .ranges()
            .map(|(range, name)| journal::Range {
                start: range.start.0,
                len: range.len(),
                name: name.to_owned(),
            });
        Change {
            build_id: kernel
                .build_id
                .as_deref()
                .map(hex::encode)
                .unwrap_or_default(),
            text_base: kernel.text_base.0,
            patch: self.up.patch.clone(),
            sha256: String::new(),
            record: String::new(),
            op: Op::Nudge,
            writes: self.up.writes.clone(),
            watched: ranges.collect(),
        }
    }

    /// Puts it up, waits until somebody passed it, and takes it down; says how many threads were woken.
    fn pass(
        &self,
        machine: &dyn Machine,
        kernel: &Kernel<'_>,
        options: &Options,
    ) -> Result<(u32, Done)> {
        let mut arena = Arena::read(kernel)?;
        arena.add(machine, kernel, self.first, &[Rights::Text, Rights::Data])?;
        arena.write(machine, arena::page_address(self.first), &self.code)?;
        let data = arena::page_address(self.first + 1);
        arena.write(machine, data, &self.data)?;
        let window = machine
            .memory()
            .map(&arena.frames(Range::new(data, PAGE_SIZE))?)?;
        let up = apply::execute(machine, kernel, &self.up, options)?;
        let began = Instant::now();
        let mut woken = None;
        let mut seen = vec![0; self.data.len()];
        while woken.is_none() && began.elapsed() < TICK {
            thread::sleep(Duration::from_millis(1));
            if window.read(0, &mut seen).is_err() {
                break;
            }
            woken = gate::woken(&seen);
        }
        // Whoever asks to stop now has to wait for this.
        let patient = Options {
            interrupted: std::sync::Arc::default(),
            ..options.clone()
        };
        let down = apply::execute(machine, kernel, &self.down, &patient).map_err(|error| {
            Error::uncertain(format!(
                "threads were woken through {FUNCTION}, which still leads through the arena: {error}. The \
                 guest runs well with that; run `xen-locus recover`"
            ))
        })?;
        let done = Done {
            pause: up.pause.max(down.pause),
            attempts: up.attempts + down.attempts,
        };
        let woken = woken.ok_or_else(|| {
            Error::try_again(format!(
                "{}: the guest handled no timer interrupt in {} s; nobody was woken, and nothing is changed",
                self.up.patch,
                TICK.as_secs()
            ))
        })?;
        Ok((woken, done))
    }
}
