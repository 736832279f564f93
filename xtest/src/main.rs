//! `xtest`: runs xen-locus on nested Xen under QEMU.

#![forbid(unsafe_code)]

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{bail, Context, Result};
use clap::{Parser, Subcommand};
use xtest::fetch::ensure_suite;
use xtest::guest::Kind;
use xtest::inputs::RECORD;
use xtest::measure::Clock;
use xtest::paths::Paths;
use xtest::profile::{Profile, PROFILES};
use xtest::results::{Part, Results, PASSED};
use xtest::scenario::Scenario;
use xtest::suites::{Suite, BOOKWORM, SUITES};
use xtest::testbed::Testbed;
use xtest::{demo, host, measure, payloads, report, runner, scenarios, shell, source};

/// Runs xen-locus on nested Xen under QEMU: no KVM, no root.
#[derive(Debug, Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// List the scenarios
    List,
    /// Run scenarios: the usual ones, or those named
    Run {
        /// Names; `apply-*` selects all that begin with `apply-`
        names: Vec<String>,
        /// Run all scenarios: all guest kernels as all types of guest, and long ones; takes hours
        #[arg(long, conflicts_with = "names")]
        matrix: bool,
        /// Run only scenarios of this profile
        #[arg(long, value_parser = profile)]
        profile: Option<&'static Profile>,
        /// Processors of the host to use [default: all]
        #[arg(long)]
        cpus: Option<u32>,
        /// Run only scenarios that have not passed since something they depend on changed
        #[arg(long)]
        missing: bool,
        /// Run only a share, like 2/4
        #[arg(long, value_parser = Part::parse)]
        part: Option<Part>,
    },
    /// Show the results that hold for the sources as they are, and which are missing
    Report {
        /// Only the scenarios of a usual run
        #[arg(long)]
        usual: bool,
        /// Keep in the tree what passed, for other machines
        #[arg(long)]
        record: bool,
    },
    /// Boot with guests running, and a dom0 shell on this terminal (leave with Ctrl-A x)
    Shell {
        /// The machine
        #[arg(long, value_parser = profile, default_value = "pv")]
        profile: &'static Profile,
        /// Start no guests
        #[arg(long)]
        bare: bool,
    },
    /// Show xen-locus at work
    Demo,
    /// Measure pauses and calls, compared with their lower bounds and with the guest's own livepatch
    Bench {
        /// Applies, and as many reverts, at the base point; other points have half as many [default: 200]
        #[arg(long)]
        rounds: Option<u32>,
        /// Measure fewer points, with 20 rounds
        #[arg(long)]
        quick: bool,
        /// Measure only guests of this type
        #[arg(long, value_parser = kind)]
        kind: Option<Kind>,
        /// Measure only this line of the table (may be repeated); "calls" means the cost of a call
        #[arg(long, value_name = "NAME")]
        only: Vec<String>,
        /// Measure only what reading a guest's kernel costs, which is otherwise left out
        #[arg(long)]
        reading: bool,
        /// Time limit for one point, in seconds of the machine's clock; what was measured until then counts
        #[arg(long, default_value_t = 480)]
        limit: u64,
        /// Clock of the machine; the host's clock is disturbed by the host's other work
        #[arg(long, value_enum, default_value_t = Clock::Instructions)]
        clock: Clock,
    },
    /// Download and unpack the Debian packages
    Fetch,
    /// Build the payloads of patches/
    Payloads {
        /// Releases of Debian to build them for [default: all]
        suites: Vec<String>,
    },
}

fn profile(name: &str) -> Result<&'static Profile> {
    let names: Vec<&str> = PROFILES.iter().map(|p| p.name).collect();
    let found = PROFILES.iter().find(|p| p.name == name).copied();
    found.with_context(|| format!("profiles are: {}", names.join(", ")))
}

fn kind(name: &str) -> Result<Kind> {
    let found = [Kind::Pv, Kind::Pvh].into_iter().find(|k| k.name() == name);
    found.context("types are: pv, pvh")
}

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(e) => {
            eprintln!("xtest: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn report(usual: bool, record: bool) -> Result<bool> {
    let paths = Paths::find()?;
    let results = Results::open(&paths)?;
    let all = scenarios::all();
    if record {
        let names: Vec<&str> = all.iter().map(|s| s.name).collect();
        let kept = results.record(&paths.workspace, &names)?;
        eprintln!("xtest: {RECORD}: {kept} results");
    }
    let shown = if usual { scenarios::usual() } else { all };
    Ok(report::print(&results, &shown))
}

fn run(cli: Cli) -> Result<bool> {
    runner::end_on_signals()?;
    match cli.command {
        Command::List => {
            for s in scenarios::all() {
                println!("{:<5}{:<28} {}", s.profile.name, s.name, s.summary);
            }
        }
        Command::Run {
            names,
            matrix,
            profile,
            cpus,
            missing,
            part,
        } => {
            let mut chosen = choose(&names, matrix, profile)?;
            if let Some(part) = part {
                let mut index = 0..;
                chosen.retain(|_| index.next().is_some_and(|i| part.has(i)));
            }
            let testbed = Testbed::prepare()?;
            let results = Results::open(&testbed.paths)?;
            if missing {
                let passed = |s: &Scenario| {
                    let stored = results.of(s.name);
                    stored.is_some_and(|stored| stored.last.verdict == PASSED)
                };
                chosen.retain(|s| !passed(s));
            }
            let cpus = cpus.unwrap_or_else(host::cpus);
            return Ok(!runner::run(&testbed, &results, &chosen, cpus)?.failed());
        }
        Command::Report { usual, record } => return report(usual, record),
        Command::Shell { profile, bare } => {
            shell::run(&Testbed::prepare()?, profile, bare)?;
        }
        Command::Demo => demo::run(&Testbed::prepare()?)?,
        Command::Bench {
            rounds,
            quick,
            kind,
            only,
            reading,
            limit,
            clock,
        } => {
            let wanted = measure::Wanted {
                rounds: rounds.unwrap_or(if quick { 20 } else { 200 }),
                quick,
                kind,
                only,
                reading,
                limit: Duration::from_secs(limit),
                clock,
            };
            measure::run(&Testbed::prepare()?, &wanted)?;
        }
        Command::Fetch => {
            let paths = Paths::find()?;
            for suite in SUITES {
                let root = ensure_suite(&paths, suite)?;
                println!("{} {} {}", suite.name, root.release, root.dir.display());
            }
        }
        Command::Payloads { suites } => {
            build_payloads(&suites)?;
        }
    }
    Ok(true)
}

/// Builds payloads for kernels of these releases of Debian, or of all, and prints their files.
fn build_payloads(suites: &[String]) -> Result<()> {
    let paths = Paths::find()?;
    if let Some(name) = suites.iter().find(|&n| SUITES.iter().all(|s| s.name != n)) {
        bail!("{name}: not a release of Debian that guests have kernels of");
    }
    let wanted = |s: &&&Suite| suites.is_empty() || suites.iter().any(|n| n == s.name);
    for suite in SUITES.iter().filter(wanted).copied() {
        let root = ensure_suite(&paths, suite)?;
        payloads::build_all(&paths, &root, payloads::Which::All)?;
        let mut built = payloads::built(&paths, &root.release)?;
        if *suite == BOOKWORM {
            built.extend(source::own_livepatches(&paths, suite, &root)?);
        }
        for (_, file) in built {
            println!("{}", file.display());
        }
    }
    Ok(())
}

fn choose(
    names: &[String],
    matrix: bool,
    profile: Option<&'static Profile>,
) -> Result<Vec<Scenario>> {
    let all = match (matrix, names) {
        (false, []) => scenarios::usual(),
        _ => scenarios::all(),
    };
    let matches = |pattern: &String, s: &Scenario| match pattern.strip_suffix('*') {
        Some(start) => s.name.starts_with(start),
        None => s.name == pattern,
    };
    for name in names {
        if !all.iter().any(|s| matches(name, s)) {
            bail!("no scenario {name}: see `xtest list`");
        }
    }
    let wanted = |s: &Scenario| {
        (names.is_empty() || names.iter().any(|n| matches(n, s)))
            && profile.is_none_or(|p| s.profile == p)
    };
    let chosen: Vec<Scenario> = all.into_iter().filter(wanted).collect();
    if chosen.is_empty() {
        bail!("no scenario chosen");
    }
    Ok(chosen)
}
