//! Runs scenarios: one boot for each profile, several profiles at the same time.

use std::collections::BTreeSet;
use std::io::Write;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::path::Path;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Instant;

use anyhow::Result;

use crate::profile::{Profile, PROFILES};
use crate::qemu::tail;
use crate::qemu_faults;
use crate::scenario::Scenario;
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
    retried: u32,
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
        self.failures.extend(other.failures);
    }
}

/// Profiles that have not started, and the number of the host's processors that no machine uses.
struct Waiting {
    profiles: Vec<&'static Profile>,
    free: u32,
}

impl Waiting {
    /// Takes the next profile that fits. A profile that is too large for the host runs alone.
    fn take(&mut self, cpus: u32) -> Option<&'static Profile> {
        let fits = |p: &&'static Profile| p.cpus.min(cpus) <= self.free;
        let at = self.profiles.iter().position(fits)?;
        let profile = self.profiles.remove(at);
        self.free -= profile.cpus.min(cpus);
        Some(profile)
    }
}

/// Runs these scenarios, with as many profiles at the same time as `cpus` processors of the host allow. Prints
/// a line for each scenario, and the sum.
pub fn run(testbed: &Testbed, scenarios: &[Scenario], cpus: u32) -> Result<Totals> {
    let allowed = allowed_skips(&testbed.paths.workspace.join("xtest/skips.txt"));
    let profiles: Vec<&'static Profile> = PROFILES
        .iter()
        .copied()
        .filter(|p| scenarios.iter().any(|s| s.profile == *p))
        .collect();
    let count = profiles.len();
    let waiting = Mutex::new(Waiting {
        profiles,
        free: cpus,
    });
    let freed = Condvar::new();
    let totals = Mutex::new(Totals::default());
    let began = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..count {
            scope.spawn(|| {
                let mut state = waiting.lock().unwrap_or_else(PoisonError::into_inner);
                let profile = loop {
                    match state.take(cpus) {
                        Some(profile) => break profile,
                        None => {
                            state = freed.wait(state).unwrap_or_else(PoisonError::into_inner);
                        }
                    }
                };
                drop(state);
                let own: Vec<&Scenario> =
                    scenarios.iter().filter(|s| s.profile == profile).collect();
                let sum = run_profile(testbed, profile, &own, &allowed);
                totals
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .add(sum);
                waiting.lock().unwrap_or_else(PoisonError::into_inner).free +=
                    profile.cpus.min(cpus);
                freed.notify_all();
            });
        }
    });
    let sum = totals.into_inner().unwrap_or_else(PoisonError::into_inner);
    eprintln!("xtest: took {:.0} s", began.elapsed().as_secs_f64());
    if sum.retried > 0 {
        eprintln!(
            "xtest: {} scenarios were run twice: QEMU lost a guest (SVM)",
            sum.retried
        );
    }
    // Again at the end, so that the last lines show what went wrong.
    for failure in &sum.failures {
        println!("failed: {failure}");
    }
    println!(
        "{} passed, {} failed, {} skipped",
        sum.passed, sum.failed, sum.skipped
    );
    Ok(sum)
}

/// Scenarios that may skip themselves in continuous integration: one name per line, `#` starts a comment.
fn allowed_skips(file: &Path) -> Option<BTreeSet<String>> {
    if std::env::var("CI").as_deref() != Ok("true") {
        return None;
    }
    let text = std::fs::read_to_string(file).unwrap_or_default();
    let names = text
        .lines()
        .map(|l| l.split('#').next().unwrap_or_default().trim());
    Some(names.filter(|n| !n.is_empty()).map(str::to_owned).collect())
}

fn run_profile(
    testbed: &Testbed,
    profile: &Profile,
    scenarios: &[&Scenario],
    allowed: &Option<BTreeSet<String>>,
) -> Totals {
    let mut totals = Totals::default();
    let mut machine = None;
    let mut boots = 0;
    for scenario in scenarios {
        let began = Instant::now();
        let failed_before = totals.failed;
        let mut result = attempt(testbed, profile, scenario, &mut machine, &mut boots);
        let mut retried = "";
        if matches!(result, Err((_, true))) {
            totals.retried += 1;
            retried = ", second try";
            result = attempt(testbed, profile, scenario, &mut machine, &mut boots);
        }
        let took = began.elapsed().as_secs_f64();
        let word = match &result {
            Ok(()) => {
                totals.passed += 1;
                "SUCCESS".to_owned()
            }
            Err((Verdict::Skip(why), _)) => {
                let fine = allowed
                    .as_ref()
                    .is_none_or(|names| names.contains(scenario.name));
                if fine {
                    totals.skipped += 1;
                    format!("SKIP ({why})")
                } else {
                    totals.failed += 1;
                    format!("FAIL, skipped but not listed in skips.txt ({why})")
                }
            }
            Err((verdict, _)) => {
                totals.failed += 1;
                let (word, why) = verdict.to_string().split_once(": ").map_or_else(
                    || (String::new(), String::new()),
                    |(w, y)| (w.to_owned(), y.to_owned()),
                );
                format!("{word}\n    {}", why.trim().replace('\n', "\n    "))
            }
        };
        if totals.failed > failed_before {
            let why: Vec<&str> = word.lines().map(str::trim).take(4).collect();
            let why = why.join(" ");
            totals.failures.push(format!("{}: {why}", scenario.name));
        }
        println!(
            "{:<6}{:<28} {took:6.1} s{retried}  {word}",
            profile.name, scenario.name
        );
    }
    if let Some(machine) = &machine {
        machine.collect_logs();
    }
    totals
}

/// Runs one scenario. The flag of an error says whether QEMU was provably at fault.
fn attempt(
    testbed: &Testbed,
    profile: &Profile,
    scenario: &Scenario,
    machine: &mut Option<Machine>,
    boots: &mut u32,
) -> Result<(), (Verdict, bool)> {
    if machine.is_none() {
        if *boots == BOOTS {
            return Err((
                Verdict::Error("the machine went down too often".to_owned()),
                false,
            ));
        }
        eprintln!("xtest: {}: booting", profile.name);
        let booted = testbed
            .boot(profile, *boots)
            .map_err(|e| (e.into(), false))?;
        let took = booted.boot_time.as_secs_f64();
        eprintln!("xtest: {}: dom0 is up after {took:.1} s", profile.name);
        *boots += 1;
        *machine = Some(booted);
    }
    let Some(running) = machine.as_mut() else {
        return Err((Verdict::Error("no machine".to_owned()), false));
    };
    eprintln!(
        "xtest: {}: {}: {}",
        profile.name, scenario.name, scenario.summary
    );
    running
        .ctx
        .dom0
        .note(&format!("=== {}: {}", scenario.name, scenario.summary));
    let console_before = size(&running.qemu.console);
    let outcome = catch_unwind(AssertUnwindSafe(|| (scenario.run)(&mut running.ctx)));
    let mut verdict = match outcome {
        Ok(Ok(())) => return Ok(()),
        Ok(Err(verdict @ Verdict::Skip(_))) => return Err((verdict, false)),
        Ok(Err(verdict)) => verdict,
        Err(_) => Verdict::Error("the scenario panicked".to_owned()),
    };
    let down = running.ctx.dom0.is_down();
    // A crashed guest explains more than the command that could not reach it.
    let crashed = if down {
        Vec::new()
    } else {
        running.ctx.crashed()
    };
    if !crashed.is_empty() {
        verdict = Verdict::Crash(format!("{verdict}\ncrashed: {}", crashed.join("; ")));
    }
    running
        .ctx
        .dom0
        .note(&format!("=== {}: {verdict}", scenario.name));
    running.collect_logs();
    let new = text_after(&running.qemu.console, console_before);
    let emulator = profile.thread == "multi" || !crashed.is_empty();
    let emulator = emulator && qemu_faults::triple_fault_in_xen(&new)
        || qemu_faults::equal_gs_bases_in(&running.logs, &crashed);
    let report = report(running);
    if down || !running.qemu.runs() || running.ctx.destroy_all().is_err() {
        *machine = None;
    }
    let (Verdict::Error(why) | Verdict::Failure(why) | Verdict::Crash(why) | Verdict::Skip(why)) =
        &mut verdict;
    why.push_str(&report);
    Err((verdict, emulator))
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

fn size(path: &Path) -> usize {
    path.metadata()
        .ok()
        .and_then(|m| usize::try_from(m.len()).ok())
        .unwrap_or_default()
}

fn text_after(path: &Path, from: usize) -> String {
    let bytes = std::fs::read(path).unwrap_or_default();
    String::from_utf8_lossy(bytes.get(from..).unwrap_or_default()).into_owned()
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
