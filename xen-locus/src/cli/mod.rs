//! The command line: one file for each command. stdout is data, stderr is messages.
//!
//! The manual of each command is the head of its module; its text is in the folder `manual/`.

pub mod apply;
pub mod args;
pub mod blocking;
pub mod check;
pub mod guest;
pub mod history;
pub mod info;
pub mod list;
pub mod manual;
pub mod nudge;
pub mod out;
pub mod reclaim;
pub mod recover;
mod report;
pub mod revert;
pub mod show;
pub mod status;
pub mod verify;

use std::io::{self, IsTerminal as _};
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context as _;
use clap::error::ErrorKind;
use clap::Parser as _;

use crate::apply::Options;
use crate::daemon::{self, Settings};
use crate::error::{Error, ExitCode, Result};
use crate::guard::guardian;
use crate::ops::host::Host;
use crate::say;
use crate::storage::xenstore;
use args::{Cli, Command, Output, TimeLimits};

/// Most memory of this process and of its guardian each, in bytes: ten times what a command takes for an honest guest.
const MEMORY_MAX: u64 = 1 << 30;

/// What all commands share.
#[derive(Debug)]
pub struct Session {
    /// Format of stdout.
    pub output: Output,
    /// Change nothing.
    pub dry_run: bool,
    /// How much to say on stderr.
    pub verbose: u8,
    /// Where what is read of guests' kernels is kept; nowhere if none.
    pub cache: Option<PathBuf>,
    /// When it began.
    pub began: Instant,
    /// Set by a signal that asks to stop.
    pub interrupted: Arc<AtomicBool>,
}

impl Session {
    /// Opens Xen and XenStore.
    ///
    /// # Errors
    /// As [`Host::open`].
    pub fn host(&self) -> Result<Host> {
        Host::open(self.cache.as_deref())
    }

    /// Says something on stderr if the user wants to hear it.
    pub fn say(&self, level: u8, what: impl std::fmt::Display) {
        if self.verbose >= level {
            say::line(what);
        }
    }

    /// The library's options for this session.
    #[must_use]
    pub fn options(&self, limits: &TimeLimits) -> Options {
        Options {
            timeout: limits.timeout,
            max_pause: limits.max_pause,
            entry_only: false,
            dry_run: self.dry_run,
            interrupted: Arc::clone(&self.interrupted),
        }
    }

    /// The library's options for a command without time limits of its own.
    #[must_use]
    pub fn unhurried(&self) -> Options {
        Options {
            interrupted: Arc::clone(&self.interrupted),
            ..Options::default()
        }
    }
}

/// The program: parses, runs, and turns the outcome into an exit code.
#[must_use]
pub fn main() -> std::process::ExitCode {
    if guardian::is_meant() {
        return guardian::main();
    }
    locus_xen::shut_out_others();
    // Before any other thread runs.
    xenstore::obey_environment();
    let code = match Cli::try_parse() {
        Ok(args) => {
            // Whatever it reads, a guest or a payload, may be made to need more.
            if let Err(error) = locus_xen::limit_memory(MEMORY_MAX) {
                say::warn(format_args!("{error}; it has no limit"));
            }
            let code = run(&args).unwrap_or_else(|e| {
                // The library's errors say all in one sentence; others have a chain of causes.
                match e.downcast_ref::<Error>() {
                    Some(known) => say::warn(known),
                    None => say::warn(format_args!("{e:#}")),
                }
                exit_code(&e)
            });
            shown(code, changes(&args.command) && !args.dry_run)
        }
        Err(e) => {
            match e.kind() {
                ErrorKind::DisplayHelp => {
                    let help = e.render();
                    let help = match is_styled() {
                        true => help.ansi().to_string(),
                        false => help.to_string(),
                    };
                    out::bytes(manual::shown(&help).as_bytes());
                    shown(ExitCode::Done, false)
                }
                ErrorKind::DisplayVersion => {
                    out::note(e.print());
                    shown(ExitCode::Done, false)
                }
                // It goes to stderr. If that is closed, there is nobody to tell.
                _ => {
                    let _ = e.print();
                    ExitCode::Usage
                }
            }
        }
    };
    std::process::ExitCode::from(code as u8)
}

/// Whether help may have bold words, as clap would decide.
fn is_styled() -> bool {
    let is_set = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    let is_dumb = std::env::var_os("TERM").is_none_or(|term| term == "dumb");
    io::stdout().is_terminal() && !is_set("NO_COLOR") && !is_dumb
}

/// The exit code when all was printed: success is none if what the user asked for could not be written to stdout. If the
/// command has `changed` guests, its exit code is about these, and stays.
fn shown(code: ExitCode, changed: bool) -> ExitCode {
    match out::lost() {
        Some(why) => not_shown(code, changed, why),
        None => code,
    }
}

/// The exit code when not all was printed.
fn not_shown(code: ExitCode, changed: bool, why: &io::Error) -> ExitCode {
    if changed {
        say::warn(format_args!(
            "stdout can't be written: {why}: the report is lost; the exit code says what was done"
        ));
        return code;
    }
    say::warn(format_args!(
        "stdout can't be written: {why}: what was to be shown is not complete; repeat the command with another stdout"
    ));
    code.max(ExitCode::Failed)
}

/// Runs a command and says how it ended.
///
/// # Errors
/// What went wrong; [`exit_code`] makes an exit code of it.
pub fn run(cli: &Cli) -> anyhow::Result<ExitCode> {
    let began = Instant::now();
    let interrupted = Arc::new(AtomicBool::new(false));
    let stops = [libc::SIGINT, libc::SIGHUP, libc::SIGTERM];
    for signal in stops.into_iter().filter(|_| ends_itself(&cli.command)) {
        // Whoever started this process decided that it goes on.
        if locus_xen::is_ignored(signal) {
            continue;
        }
        signal_hook::flag::register(signal, Arc::clone(&interrupted))
            .context("cannot install a signal handler")?;
    }
    let session = Session {
        output: cli.output,
        dry_run: cli.dry_run,
        verbose: cli.verbose,
        cache: (!cli.no_cache).then(|| cli.cache.clone()),
        began,
        interrupted,
    };
    if session.dry_run && !changes(&cli.command) && !matches!(cli.command, Command::Daemon(_)) {
        session.say(1, "--dry-run: this command changes nothing anyway");
    }
    match &cli.command {
        Command::List { core } => list::run(&session, core.as_deref()),
        Command::Info(args) => info::run(&session, args),
        Command::Show { file } => show::run(&session, file),
        Command::Check(args) => check::run(&session, args),
        Command::Apply(args) => apply::apply(&session, args),
        Command::Replace(args) => apply::replace(&session, args),
        Command::Revert(args) => revert::run(&session, &session.host()?, args),
        Command::Blocking(args) => blocking::run(&session, args),
        Command::Nudge(args) => nudge::run(&session, &session.host()?, args),
        Command::Reclaim(args) => reclaim::run(&session, &session.host()?, args),
        Command::Status { domain, core } => {
            status::run(&session, domain.as_deref(), core.as_deref())
        }
        Command::Verify { domain, core } => {
            verify::run(&session, domain.as_deref(), core.as_deref())
        }
        Command::History(args) => history::run(&session, args),
        Command::Recover(args) => recover::run(&session, args),
        Command::Daemon(_) if session.dry_run => {
            Err(Error::usage("daemon has no dry run: it does what requests ask for").into())
        }
        Command::Daemon(args) => {
            let settings = Settings {
                payloads: args.payloads.clone(),
                reapply: args.reapply,
                options: session.options(&args.limits),
                verbose: session.verbose,
            };
            match &args.work {
                None => daemon::run(&session.host()?, &settings),
                Some(work) => Ok(daemon::do_work(|| session.host(), &settings, work)),
            }
        }
    }
}

/// Whether a command that is asked to stop ends what it has begun: it pauses or changes guests, or serves others. Any other
/// one ends at once, as the signal has it: it may be in the middle of reading a guest that takes long to be read.
fn ends_itself(command: &Command) -> bool {
    changes(command)
        || matches!(
            command,
            Command::Status { .. } | Command::Blocking(_) | Command::Daemon(_)
        )
}

/// Whether a command may change a guest.
fn changes(command: &Command) -> bool {
    matches!(
        command,
        Command::Apply(_)
            | Command::Replace(_)
            | Command::Revert(_)
            | Command::Nudge(_)
            | Command::Reclaim(_)
            | Command::Recover(_)
    )
}

/// The exit code of an error.
#[must_use]
pub fn exit_code(error: &anyhow::Error) -> ExitCode {
    error
        .downcast_ref::<Error>()
        .map_or(ExitCode::Failed, Error::exit_code)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_that_is_lost_is_a_failure_unless_guests_were_changed() {
        let full = io::Error::from_raw_os_error(libc::ENOSPC);
        for code in [ExitCode::Done, ExitCode::TryAgain, ExitCode::Uncertain] {
            assert_eq!(not_shown(code, true, &full), code);
            assert_eq!(not_shown(code, false, &full), code.max(ExitCode::Failed));
        }
        assert_eq!(not_shown(ExitCode::Done, false, &full), ExitCode::Failed);
    }
}
