//! Wakes threads that sleep in a function that is to be replaced, by a fake signal: nothing is delivered, but they leave their
//! system call and restart it.
//!
//! The guest's kernel does this itself, in its next timer interrupt. Until then the interrupt's handler is redirected through
//! code in the arena ([`gate`]), which has an entry in the arena's directory ([`place`]). Both writes are made as those of a
//! patch: in the journal, guarded, in a pause, while no thread is at the bytes that are written.

pub mod gate;
pub mod place;

use std::collections::HashSet;
use std::thread;
use std::time::{Duration, Instant};

use locus_guest::addr::{Range, PAGE_LEN, PAGE_SIZE};
use locus_kernel::{tasks, Kernel};

use self::gate::{Calls, Thread, FUNCTION, THREADS_MAX};
use self::place::{Place, Turn, INT3, INTO};
use crate::apply::{self, Done, Options, Outcome, Patience, Report};
use crate::arena::record::Slot;
use crate::arena::{self, Arena, Rights};
use crate::blocker::{Blocker, Reason};
use crate::error::{Error, Result};
use crate::machine::Machine;
use crate::plan::conditions::Entry;
use crate::plan::{self, PatchStack, Plan, Proposal};
use crate::quiesce::{self, Watch, Watched};
use crate::target::kprobes::{self, Kprobes};
use crate::target::lkrg;
use crate::target::redirect;
use crate::target::symbols::Object;
use crate::x86::{self, JUMP};

/// Longest wait for a timer interrupt in the guest. An idle guest has several every second.
const TICK: Duration = Duration::from_secs(5);

/// What a nudge found and did.
#[derive(Clone, Debug)]
pub struct Nudged {
    /// The threads that sleep there.
    pub asleep: Vec<Blocker>,
    /// How many of these threads were woken.
    pub woken: u32,
    /// The report for the audit log.
    pub report: Report,
}

/// Wakes the user threads that sleep in one of the ranges of `watch`, so that `patch` can be applied or reverted.
///
/// # Errors
/// As [`apply::apply`]. [`Class::TryAgain`](crate::error::Class::TryAgain): the guest handled no timer interrupt in time.
/// [`Class::NotApplicable`](crate::error::Class::NotApplicable): its kernel lacks what the gate calls.
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
        return Ok(nudged(asleep, 0, Outcome::NobodyAsleep, Done::default()));
    }
    let gate = Gate::prepare(kernel, patch, &threads)?;
    apply::check_host(machine)?;
    if options.dry_run {
        return Ok(nudged(asleep, 0, Outcome::WouldNudge, Done::default()));
    }
    apply::begin(machine, &gate.place.change(kernel)?)?;
    let passed = gate.pass(machine, kernel, options);
    if !passed.as_ref().is_err_and(Error::is_uncertain) {
        machine.ended();
    }
    let (woken, done) = passed?;
    Ok(nudged(asleep, woken, Outcome::Nudged, done))
}

/// The user threads among `asleep`, at most [`THREADS_MAX`].
fn threads(kernel: &Kernel<'_>, asleep: &[Blocker]) -> Result<Vec<Thread>> {
    let ids: HashSet<u32> = asleep.iter().map(|b| b.pid).collect();
    let memory = kernel.btf()?.offset_of_sized("task_struct", "mm", 8)?;
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

/// A gate that is ready to be put in place.
struct Gate {
    /// The arena, which has room for it.
    arena: Arena,
    /// Its entry in the arena's directory.
    slot: Slot,
    /// Its code, with the record behind it.
    page: Vec<u8>,
    data: Vec<u8>,
    place: Place,
    /// The function that leads through it.
    handler: Entry,
    /// The addresses of that function.
    room: Range,
}

impl Gate {
    fn prepare(kernel: &Kernel<'_>, patch: &str, threads: &[Thread]) -> Result<Gate> {
        lkrg::check_absent(kernel)?;
        kprobes::check_table(kernel)?;
        quiesce::check_trampolines(kernel)?;
        let mut arena = Arena::read(kernel)?;
        let residents = plan::resolve_interrupted(kernel, &mut arena)?;
        let entry = kernel.function(FUNCTION, 0)?;
        if let Some(layers) = PatchStack::new(&residents).layers(entry) {
            return Err(Error::not_applicable(format!(
                "{FUNCTION}, by which threads are woken, is replaced by {}",
                layers.owner()
            )));
        }
        let function = redirect::examine(
            kernel,
            Object::Kernel,
            FUNCTION,
            entry,
            None,
            &Kprobes::read(kernel)?,
        )?;
        let site = function.site;
        let code = kernel.space.read_vec(site.at, JUMP + 15)?;
        let len = gate::displaced(&code, site.at).map_err(|why| {
            Error::not_applicable(format!(
                "{FUNCTION}, by which threads are woken, can't be entered: {why}"
            ))
        })?;
        let cut = || Error::failed(format!("the code of {FUNCTION} is cut short"));
        let displaced = code.get(..len).ok_or_else(cut)?;
        let first = arena.find_room(kernel.kind, place::PAGES)?;
        let (text, data) = (arena::page_address(first), arena::page_address(first + 1));
        let at = text.plus(INTO as u64);
        let mut code = vec![INT3; INTO];
        code.extend(gate::code(
            at,
            data,
            Calls::of(kernel)?,
            displaced,
            site.at,
        )?);
        let jump = x86::jump(site.at, at)
            .ok_or_else(|| Error::failed(format!("{at} is out of reach of {FUNCTION}")))?;
        let place = Place {
            patch: patch.to_owned(),
            text: Range::new(text, code.len() as u64),
            site: site.at,
            bytes: [site.old, jump],
        };
        let handler = Entry {
            at: entry,
            site: site.at,
            name: FUNCTION.into(),
        };
        let (page, slot) = place.entry(&code, &handler, function.range)?;
        Ok(Gate {
            arena,
            slot,
            page,
            data: gate::data(threads)?,
            place,
            handler,
            room: function.range,
        })
    }

    fn plan(&self, kernel: &Kernel<'_>, turn: Turn) -> Result<Plan> {
        let mut unprobed = self.place.watched(turn);
        // On the way back the rest of the handler keeps its bytes.
        if turn == Turn::Up {
            let start = self.handler.site;
            unprobed.push(Watched::new(Range { start, ..self.room }, FUNCTION));
        }
        let proposal = Proposal {
            patch: &self.place.patch,
            // The way back leaves the nop as it is.
            untraced: match turn {
                Turn::Up => vec![self.handler.clone()],
                Turn::Down => Vec::new(),
            },
            unprobed,
            redirects: vec![self.place.write(turn)],
            watched: self.place.watched(turn),
            ..Proposal::default()
        };
        match turn {
            Turn::Up => Plan::to_begin(kernel, proposal),
            Turn::Down => Plan::new(kernel, proposal),
        }
    }

    /// Makes the plan for this turn and carries it out.
    fn turn(
        &self,
        machine: &dyn Machine,
        kernel: &Kernel<'_>,
        turn: Turn,
        options: &Options,
    ) -> Result<Done> {
        let patience = Patience::new(options);
        patience.keep_trying(|_| {
            let plan = self.plan(kernel, turn)?;
            apply::execute(machine, kernel, &plan, &patience)
        })
    }

    /// Puts the gate in place, waits until a CPU has run through it, and takes it down. Returns how many threads were woken.
    /// Its entry is in the arena's directory before anything leads to it, and until nothing does.
    fn pass(
        mut self,
        machine: &dyn Machine,
        kernel: &Kernel<'_>,
        options: &Options,
    ) -> Result<(u32, Done)> {
        self.write_pages(machine, kernel)?;
        let mut slots = self.arena.directory.slots.clone();
        slots.push(self.slot.clone());
        // One that failed may be in the guest all the same, so it is taken out as if it had not.
        let listed = self.arena.commit(machine, kernel, slots);
        let passed = listed.and_then(|()| self.wake_through_gate(machine, kernel, options));
        if !passed.as_ref().is_err_and(Error::is_uncertain) {
            let mut slots = self.arena.directory.slots.clone();
            slots.retain(|slot| slot.first != self.slot.first);
            let removed = self.arena.commit(machine, kernel, slots);
            removed.map_err(|error| {
                Error::uncertain(format!(
                    "nothing leads through the gate by which threads are woken, but its entry in the arena's directory could \
                     not be removed: {error}; run `xen-locus recover`"
                ))
            })?;
        }
        passed
    }

    /// Writes the gate to the arena. Nothing leads to it, and nothing names it.
    fn write_pages(&mut self, machine: &dyn Machine, kernel: &Kernel<'_>) -> Result<()> {
        let first = self.slot.first.into();
        let arena = &mut self.arena;
        arena.add(machine, kernel, first, &[Rights::Text, Rights::Data])?;
        arena.write(machine, arena::page_address(first), &self.page)?;
        // What an earlier payload left behind the data must not be taken for the gate's.
        let mut data = self.data.clone();
        data.resize(PAGE_LEN, 0);
        arena.write(machine, arena::page_address(first + 1), &data)
    }

    /// Leads the timer interrupt through the gate, waits until that has woken the threads, and takes the way back. Returns how
    /// many were woken.
    fn wake_through_gate(
        &self,
        machine: &dyn Machine,
        kernel: &Kernel<'_>,
        options: &Options,
    ) -> Result<(u32, Done)> {
        let data = arena::page_address(usize::from(self.slot.first) + 1);
        let frames = self.arena.frames(Range::new(data, PAGE_SIZE))?;
        let window = machine.memory().map(&frames)?;
        let up = self.turn(machine, kernel, Turn::Up, options)?;
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
        // Taking it down is not interrupted.
        let patient = Options {
            interrupted: std::sync::Arc::default(),
            ..options.clone()
        };
        let down = self.turn(machine, kernel, Turn::Down, &patient).map_err(|error| {
            Error::uncertain(format!(
                "threads were woken through {FUNCTION}, which still leads through the arena: {error}. The \
                 guest can run with that; run `xen-locus recover`"
            ))
        })?;
        let done = Done {
            pause: up.pause.max(down.pause),
            attempts: up.attempts + down.attempts,
        };
        let woken = woken.ok_or_else(|| {
            Error::try_again(format!(
                "{}: no CPU of the guest came to {FUNCTION} in {} s, by which a guest handles timer interrupts unless it \
                 was booted with highres=off; no thread was woken, and nothing is changed",
                self.place.patch,
                TICK.as_secs()
            ))
        })?;
        Ok((woken, done))
    }
}

#[cfg(test)]
pub(crate) mod mock;
#[cfg(test)]
mod tests;
