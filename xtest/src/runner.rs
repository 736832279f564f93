//! Runs scenarios: one boot for each profile, several profiles at the same time.

use std::io::Write;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use anyhow::Result;

use crate::debian;
use crate::host::{now, tail};
use crate::late;
use crate::profile::Profile;
use crate::qemu_faults;
use crate::queue::{Work, WORTH};
use crate::results::{Ended, Results, PASSED};
use crate::scenario::Scenario;
use crate::scenarios;
use crate::suites::BOOKWORM;
use crate::testbed::{Machine, Testbed};
use crate::verdict::Verdict;

/// Boots that a profile may have: one, and two more after crashes.
const BOOTS: u32 = 3;

/// The result of a run.
#[derive(Debug, Default, Clone)]
pub struct Totals {
    passed: u32,
    failed: u32,
    skipped: u32,
    /// Scenarios that were run a second time, because QEMU was at fault the first time.
    retried: u32,
    /// Guests that QEMU lost while they started.
    started_again: u32,
    /// Stalls of guests that the machine caused.
    excused: usize,
    /// Each failed scenario and the first line of why.
    failures: Vec<String>,
}

impl Totals {
    /// Whether anything failed.
    pub fn failed(&self) -> bool {
        self.failed > 0
    }

    fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
        self.retried += other.retried;
        self.started_again += other.started_again;
        self.excused += other.excused;
        self.failures.extend(other.failures);
    }

    fn count(&mut self, name: &str, ended: &Ended) {
        match &*ended.verdict {
            PASSED => self.passed += 1,
            "skipped" => self.skipped += 1,
            _ => self.failed += 1,
        }
        if ended.verdict != PASSED {
            let why: Vec<&str> = ended.why.lines().map(str::trim).take(4).collect();
            let line = format!("{}: {name}: {}", ended.verdict, why.join(" "));
            self.failures.push(line);
        }
        self.retried += u32::from(ended.second_try);
        self.started_again += ended.started_again;
        self.excused += ended.excused;
    }

    /// The last line of a run.
    fn line(&self, all: usize) -> String {
        format!(
            "{} passed, {} failed, {} skipped, of {all} scenarios ({} exist); {} second tries, {} guests \
             started again, {} stalls excused",
            self.passed,
            self.failed,
            self.skipped,
            scenarios::all().len(),
            self.retried,
            self.started_again,
            self.excused
        )
    }
}

/// Runs these scenarios, on as many machines at the same time as `cpus` processors of the host allow. Prints a line for
/// each scenario, and the sum; stores each result.
pub fn run(
    testbed: &Testbed,
    results: &Results,
    scenarios: &[Scenario],
    cpus: u32,
) -> Result<Totals> {
    let work = Mutex::new(Work::new(scenarios, cpus));
    let freed = Condvar::new();
    let totals = Mutex::new(Totals::default());
    let began = Instant::now();
    let seconds = |name: &str| results.usual(name).unwrap_or(WORTH / 2.0);
    let worker = || {
        let mut state = locked(&work);
        loop {
            if state.is_done() {
                return;
            }
            let Some(at) = state.take(cpus, &seconds) else {
                state = freed.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            drop(state);
            let sum = run_machine(testbed, results, &work, at);
            locked(&totals).add(sum);
            state = locked(&work);
            state.give_back(at, cpus);
            freed.notify_all();
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..cpus.max(1) {
            scope.spawn(worker);
        }
    });
    let sum = totals.into_inner().unwrap_or_else(PoisonError::into_inner);
    eprintln!("xtest: took {:.0} s", began.elapsed().as_secs_f64());
    // Again at the end, so that the last lines show what went wrong.
    for failure in &sum.failures {
        println!("{failure}");
    }
    println!("{}", sum.line(scenarios.len()));
    Ok(sum)
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs scenarios of one profile on one machine, until none is left.
fn run_machine(testbed: &Testbed, results: &Results, work: &Mutex<Work>, at: usize) -> Totals {
    let mut totals = Totals::default();
    let mut bed = Bed {
        testbed,
        results,
        work,
        at,
        machine: None,
        boots: 0,
    };
    loop {
        let Some(scenario) = locked(work).next(at) else {
            break;
        };
        let began = Instant::now();
        let mut tried = bed.attempt(&scenario);
        let second_try = tried.emulator;
        if second_try {
            let before = tried;
            tried = bed.attempt(&scenario);
            tried.started_again += before.started_again;
            tried.excused += before.excused;
        }
        let (verdict, why) = words(scenario.name, &tried.result);
        let ended = Ended {
            verdict: verdict.to_owned(),
            why,
            seconds: began.elapsed().as_secs_f64(),
            at: now(),
            second_try,
            started_again: tried.started_again,
            excused: tried.excused,
            commit: results.key.clone(),
            inputs: results.inputs.of(scenario.name, tried.suites.into_iter()),
        };
        totals.count(scenario.name, &ended);
        println!("{}", line(scenario.profile, scenario.name, &ended));
        if let Err(e) = results.store(scenario.name, ended) {
            eprintln!("xtest: {e:#}");
        }
    }
    if let Some(machine) = &bed.machine {
        machine.collect_logs();
    }
    totals
}

/// The word for a result, and why. A scenario of a usual run can't skip itself.
fn words(name: &str, result: &Result<(), Verdict>) -> (&'static str, String) {
    match result {
        Ok(()) => (PASSED, String::new()),
        Err(Verdict::Skip(why)) if !scenarios::usual().iter().any(|s| s.name == name) => {
            ("skipped", why.clone())
        }
        Err(verdict) => ("failed", verdict.to_string()),
    }
}

fn line(profile: &Profile, name: &str, ended: &Ended) -> String {
    let mut word = match &*ended.verdict {
        PASSED => "SUCCESS".to_owned(),
        "skipped" => format!("SKIP ({})", ended.why),
        _ => ended
            .why
            .trim()
            .replacen(": ", "\n", 1)
            .replace('\n', "\n    "),
    };
    if ended.second_try {
        word = format!("(second try) {word}");
    }
    format!(
        "{:<12}{name:<28} {:6.1} s  {word}",
        profile.name, ended.seconds
    )
}

/// How an attempt ended.
struct Tried {
    result: Result<(), Verdict>,
    /// QEMU was provably at fault.
    emulator: bool,
    started_again: u32,
    excused: usize,
    /// Releases of Debian that it needed.
    suites: Vec<&'static str>,
}

/// What becomes of a machine after a scenario.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    /// The next scenario runs on it.
    Stays,
    /// The scenario said so. The boot does not count, however it ended.
    UsedUp,
    /// It is of no use any more. Only so many boots may end like that.
    Lost,
}

impl Fate {
    fn of(uses_up: bool, lost: bool) -> Self {
        match (uses_up, lost) {
            (true, _) => Self::UsedUp,
            (false, true) => Self::Lost,
            (false, false) => Self::Stays,
        }
    }
}

/// A machine, booted when it is needed.
struct Bed<'a> {
    testbed: &'a Testbed,
    results: &'a Results,
    work: &'a Mutex<Work>,
    /// The number of its profile's queue.
    at: usize,
    machine: Option<Machine>,
    /// How often it was booted.
    boots: u32,
}

impl Bed<'_> {
    fn ready(&mut self, profile: &Profile) -> Result<&mut Machine, Verdict> {
        if self.machine.is_none() {
            if self.boots == BOOTS {
                return Err(Verdict::Error("the machine went down too often".to_owned()));
            }
            let name = profile.name;
            eprintln!("xtest: {name}: booting");
            let before = locked(self.work).boot(self.at);
            let booted = self.testbed.boot(profile, before)?;
            let took = booted.boot_time.as_secs_f64();
            eprintln!("xtest: {name}: dom0 is up after {took:.1} s");
            self.boots += 1;
            self.machine = Some(booted);
        }
        let machine = self.machine.as_mut();
        machine.ok_or_else(|| Verdict::Error("no machine".to_owned()))
    }

    /// Runs one scenario, and looks at all consoles, whatever the scenario looked at.
    fn attempt(&mut self, scenario: &Scenario) -> Tried {
        let usual = self.results.usual(scenario.name);
        let mut tried = Tried {
            result: Ok(()),
            emulator: false,
            started_again: 0,
            excused: 0,
            suites: vec![BOOKWORM.name],
        };
        let profile = scenario.profile;
        if profile.debian {
            tried.suites.push(debian::NAME);
        }
        let running = match self.ready(profile) {
            Ok(machine) => machine,
            Err(verdict) => {
                tried.result = Err(verdict);
                return tried;
            }
        };
        let name = scenario.name;
        let (mut result, is_late) = watched(running, scenario, usual);
        let dom0 = running.ctx.dom0.clone();
        let down = dom0.is_down();
        // A crashed guest explains more than the command that could not reach it.
        let crashed = match &result {
            Err(Verdict::Skip(_)) => Vec::new(),
            _ if down => Vec::new(),
            _ => running.ctx.crashed(),
        };
        if !crashed.is_empty() {
            let said = match &result {
                Err(verdict) => verdict.to_string(),
                Ok(()) => "it ended well, but not for all guests".to_owned(),
            };
            let text = format!("{said}\ncrashed: {}", crashed.join("; "));
            result = Err(Verdict::Crash(text));
        }
        let new = running.ctx.xen_said();
        let (told, wrong) = running.ctx.end(result.is_ok());
        if !wrong.is_empty() {
            let also = match &result {
                Err(verdict) => format!("{verdict}\n"),
                Ok(()) => String::new(),
            };
            result = Err(Verdict::Failure(format!("{also}{}", wrong.trim_end())));
        }
        if let Some(words) = told.must_fail.into_inner() {
            result = inverted(result, &words);
        }
        tried.excused = told.excused.get();
        tried.started_again = told.started_again.get();
        tried.suites.extend(told.suites.into_inner());
        let mut fate = Fate::of(told.uses_up.get(), down || is_late);
        if let Err(verdict) = &mut result {
            if !matches!(verdict, Verdict::Skip(_)) {
                dom0.note(&format!("=== {name}: {verdict}"));
                running.collect_logs();
                let emulator = profile.thread == "multi" || !crashed.is_empty();
                tried.emulator = emulator && qemu_faults::triple_fault_in_xen(&new)
                    || qemu_faults::equal_gs_bases_in(&running.logs, &crashed);
                append(verdict, &report(running));
                if fate == Fate::Stays
                    && (!running.qemu.runs() || running.ctx.destroy_all().is_err())
                {
                    fate = Fate::Lost;
                }
            }
        }
        if fate == Fate::UsedUp {
            running.collect_logs();
            self.boots -= 1;
        }
        if fate != Fate::Stays {
            self.machine = None;
        }
        tried.result = result;
        tried
    }
}

/// Runs a scenario. Returns its result, and whether it took too long and was ended.
fn watched(
    running: &mut Machine,
    scenario: &Scenario,
    usual: Option<f64>,
) -> (Result<(), Verdict>, bool) {
    let (name, summary) = (scenario.name, scenario.summary);
    eprintln!("xtest: {}: {name}: {summary}", scenario.profile.name);
    let dom0 = running.ctx.dom0.clone();
    dom0.note(&format!("=== {name}: {summary}"));
    running.ctx.begin();
    let limit = usual.map(late::limit);
    let (outcome, late) = late::watched(&dom0, limit, || {
        catch_unwind(AssertUnwindSafe(|| (scenario.run)(&mut running.ctx)))
    });
    if let (Some(doing), Some(limit)) = (late, limit) {
        dom0.go_on();
        let why = format!(
            "it took longer than {:.0} s, three times its usual time, and was ended; what dom0 was \
             doing: {doing}",
            limit.as_secs_f64()
        );
        return (Err(Verdict::failure(why)), true);
    }
    let panicked = |_| Err(Verdict::Error("the scenario panicked".to_owned()));
    (outcome.unwrap_or_else(panicked), false)
}

/// The result of a scenario that must fail, with these words.
fn inverted(result: Result<(), Verdict>, words: &str) -> Result<(), Verdict> {
    match result {
        Err(verdict @ Verdict::Error(_)) => Err(verdict),
        Err(verdict) if verdict.to_string().contains(words) => Ok(()),
        Err(verdict) => Err(Verdict::Failure(format!(
            "it failed as it must, but did not say {words:?}: {verdict}"
        ))),
        Ok(()) => Err(Verdict::Failure(format!(
            "the testbed did not notice what it must notice: {words:?}"
        ))),
    }
}

fn append(verdict: &mut Verdict, text: &str) {
    let (Verdict::Error(why) | Verdict::Failure(why) | Verdict::Crash(why) | Verdict::Skip(why)) =
        verdict;
    why.push_str(text);
}

/// The last lines of all consoles.
fn report(machine: &Machine) -> String {
    let mut text = format!("\nXen and dom0:\n{}", machine.qemu.console_tail(25));
    let guests = std::fs::read_dir(&machine.logs)
        .into_iter()
        .flatten()
        .flatten();
    for entry in guests.filter(|e| e.file_name().to_string_lossy().starts_with("guest-")) {
        let name = entry.file_name().to_string_lossy().into_owned();
        text += &format!("\n{name}:\n{}", tail(&entry.path(), 25));
    }
    text + &format!("\nall logs: {}", machine.logs.display())
}

/// Ends the process on SIGINT, SIGTERM and SIGHUP. QEMU ends with it.
pub fn end_on_signals() -> Result<()> {
    let mut signals = signal_hook::iterator::Signals::new([
        signal_hook::consts::SIGINT,
        signal_hook::consts::SIGTERM,
        signal_hook::consts::SIGHUP,
    ])?;
    std::thread::spawn(move || {
        if let Some(signal) = signals.forever().next() {
            // Not eprintln!, because that panics if the terminal is gone.
            let _ = writeln!(std::io::stderr(), "xtest: stopped by signal {signal}");
            let _ = signal_hook::low_level::emulate_default_handler(signal);
        }
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_that_a_scenario_uses_up_is_not_lost_however_it_ends() {
        assert_eq!(Fate::of(true, false), Fate::UsedUp);
        assert_eq!(Fate::of(true, true), Fate::UsedUp);
        assert_eq!(Fate::of(false, true), Fate::Lost);
        assert_eq!(Fate::of(false, false), Fate::Stays);
    }

    #[test]
    fn a_scenario_that_must_fail_fails_when_it_passes() {
        assert!(inverted(Ok(()), "BUG:").is_err());
        let noticed = || Err(Verdict::failure("a BUG: in the guest"));
        assert_eq!(inverted(noticed(), "BUG:"), Ok(()));
        assert!(inverted(noticed(), "WARNING:").is_err());
        let broken = Err(Verdict::Error("BUG: no network".into()));
        assert!(inverted(broken, "BUG:").is_err());
    }

    #[test]
    fn only_what_is_not_in_a_usual_run_may_skip_itself() {
        let skip = Err(Verdict::skip("no"));
        assert_eq!(words("previous-pv", &skip).0, "skipped");
        assert_eq!(words("testbed-pv", &skip).0, "failed");
    }

    #[test]
    fn the_last_line_counts_second_chances() {
        let mut totals = Totals::default();
        let ended = Ended {
            verdict: PASSED.into(),
            why: String::new(),
            seconds: 1.0,
            at: 0,
            second_try: true,
            started_again: 2,
            excused: 3,
            commit: String::new(),
            inputs: std::collections::BTreeMap::new(),
        };
        totals.count("one", &ended);
        let line = totals.line(7);
        for words in [
            "1 passed",
            "of 7 scenarios",
            "1 second tries",
            "2 guests",
            "3 stalls excused",
        ] {
            assert!(line.contains(words), "{line}");
        }
    }
}
