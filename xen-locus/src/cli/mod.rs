//! The command line: one file per command. stdout is data, stderr is messages.

pub mod apply;
pub mod args;
pub mod check;
pub mod info;
pub mod list;
pub mod out;
pub mod revert;
pub mod show;
pub mod status;
pub mod subject;

use std::sync::atomic::AtomicBool;
use std::sync::Arc;

use anyhow::Context as _;

use crate::apply::Options;
use crate::daemon;
use crate::domain::Domain;
use crate::error::{Error, ExitCode, Result};
use crate::store::Store;
use crate::xen::{self, Control};
use args::{Cli, Command, Output, Patience};

/// The host a command works on.
#[derive(Debug)]
pub struct Host {
    /// Xen's control interface.
    pub control: Control,
    /// XenStore.
    pub store: Store,
}

impl Host {
    /// Opens Xen and XenStore.
    ///
    /// # Errors
    /// Not dom0, not root, no libxenctrl, no xenstored: one sentence.
    pub fn open() -> Result<Host> {
        xen::check_environment()?;
        Ok(Host {
            control: Control::open()?,
            store: Store::open()?,
        })
    }

    /// Finds a guest by name or id.
    ///
    /// # Errors
    /// As [`Domain::find`].
    pub fn guest(&self, wanted: &str) -> Result<Domain<'_>> {
        Domain::find(&self.control, &self.store, wanted)
    }
}

/// What all commands share.
#[derive(Debug)]
pub struct Session {
    /// Format of stdout.
    pub output: Output,
    /// Change nothing.
    pub dry_run: bool,
    /// How much to say on stderr.
    pub verbose: u8,
    /// Set by a signal that asks to stop.
    pub interrupted: Arc<AtomicBool>,
}

impl Session {
    /// Says something on stderr if the user wants to hear it.
    pub fn say(&self, level: u8, what: impl std::fmt::Display) {
        if self.verbose >= level {
            eprintln!("{what}");
        }
    }

    /// The library's options for this session.
    #[must_use]
    pub fn options(&self, patience: &Patience) -> Options {
        Options {
            timeout: patience.timeout,
            max_pause: patience.max_pause,
            dry_run: self.dry_run,
            interrupted: Arc::clone(&self.interrupted),
        }
    }
}

/// Runs a command and says how it ended.
///
/// # Errors
/// What went wrong; [`exit_code`] makes an exit code of it.
pub fn run(cli: &Cli) -> anyhow::Result<ExitCode> {
    let interrupted = Arc::new(AtomicBool::new(false));
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        signal_hook::flag::register(signal, Arc::clone(&interrupted))
            .context("cannot install a signal handler")?;
    }
    let session = Session {
        output: cli.output,
        dry_run: cli.dry_run,
        verbose: cli.verbose,
        interrupted,
    };
    if session.dry_run && !matches!(cli.command, Command::Apply(_) | Command::Revert(_)) {
        session.say(1, "--dry-run: this command changes nothing anyway");
    }
    match &cli.command {
        Command::List { core } => list::run(&session, core.as_deref()),
        Command::Info(args) => info::run(&session, args),
        Command::Show { file } => show::run(&session, file),
        Command::Check(args) => check::run(&session, args),
        Command::Apply(args) => apply::run(&session, &Host::open()?, args),
        Command::Revert(args) => revert::run(&session, &Host::open()?, args),
        Command::Status { domain, core } => {
            status::run(&session, domain.as_deref(), core.as_deref())
        }
        Command::Daemon(args) => daemon::run(&session, &Host::open()?, args),
    }
}

/// The exit code of an error.
#[must_use]
pub fn exit_code(error: &anyhow::Error) -> ExitCode {
    error
        .downcast_ref::<Error>()
        .map_or(ExitCode::Failed, Error::exit_code)
}
