//! The command line: one file per command. stdout is data, stderr is messages.

pub mod apply;
pub mod args;
pub mod blocking;
pub mod check;
pub mod history;
pub mod info;
pub mod list;
pub mod nudge;
pub mod out;
pub mod recover;
pub mod revert;
pub mod show;
pub mod status;
pub mod subject;
pub mod verify;

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context as _;
use clap::error::ErrorKind;
use clap::Parser as _;
use locus_xen::{self as xen, Control, DomainInfo};

use crate::apply::Options;
use crate::audit::Audit;
use crate::daemon;
use crate::domain::Domain;
use crate::error::{Error, ExitCode, Result};
use crate::guard::guardian;
use crate::plan::Mode;
use crate::say;
use crate::service::Desk;
use crate::state::kernel_cache::Cache;
use crate::state::store::Store;
use args::{Cli, Command, Output, Patience};

/// The host a command works on.
#[derive(Debug)]
pub struct Host {
    /// Xen's control interface.
    pub control: Control,
    /// XenStore.
    pub store: Store,
    cache: Option<PathBuf>,
}

impl Host {
    /// Opens Xen and XenStore. What is read of guests' kernels is kept in folder `cache`, if any.
    ///
    /// # Errors
    /// Not dom0, not root, no libxenctrl, no xenstored: one sentence.
    pub fn open(cache: Option<&Path>) -> Result<Host> {
        xen::keep();
        // Where it isn't allowed things take longer, pauses too.
        let _ = xen::stay_resident();
        xen::check_environment()?;
        Ok(Host {
            control: Control::open()?,
            store: Store::open()?,
            cache: cache.map(Path::to_owned),
        })
    }

    /// What actions go through that `who` asks for.
    #[must_use]
    pub fn desk(&self, who: String) -> Desk<'_> {
        Desk {
            store: &self.store,
            audit: Audit::system(),
            who,
            comes_again: |_| false,
        }
    }

    /// The domain `info` is about.
    ///
    /// # Errors
    /// As [`Domain::of`].
    pub fn domain(&self, info: DomainInfo) -> Result<Domain<'_>> {
        Ok(self.with_cache(Domain::of(&self.control, &self.store, info)?))
    }

    fn with_cache<'h>(&self, mut domain: Domain<'h>) -> Domain<'h> {
        if let Some(dir) = &self.cache {
            domain.cache = Cache::new(dir, &domain.info.uuid);
        }
        domain
    }

    /// Finds a guest by name or id.
    ///
    /// # Errors
    /// As [`Domain::find`].
    pub fn guest(&self, wanted: &str) -> Result<Domain<'_>> {
        Domain::find(&self.control, &self.store, wanted).map(|domain| self.with_cache(domain))
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
    pub fn options(&self, patience: &Patience) -> Options {
        Options {
            timeout: patience.timeout,
            max_pause: patience.max_pause,
            entry_only: false,
            dry_run: self.dry_run,
            interrupted: Arc::clone(&self.interrupted),
        }
    }
}

/// The program: parses, runs, and turns the outcome into an exit code.
#[must_use]
pub fn main() -> std::process::ExitCode {
    if guardian::is_meant() {
        return guardian::main();
    }
    let code = match Cli::try_parse() {
        Ok(args) => run(&args).unwrap_or_else(|e| {
            // The library's errors say all in one sentence; others have a chain of causes.
            match e.downcast_ref::<Error>() {
                Some(known) => say::warn(known),
                None => say::warn(format_args!("{e:#}")),
            }
            exit_code(&e)
        }),
        Err(e) => {
            // A closed stdout or stderr leaves nobody to tell.
            let _ = e.print();
            match e.kind() {
                ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => ExitCode::Done,
                _ => ExitCode::Usage,
            }
        }
    };
    std::process::ExitCode::from(code as u8)
}

/// Runs a command and says how it ended.
///
/// # Errors
/// What went wrong; [`exit_code`] makes an exit code of it.
pub fn run(cli: &Cli) -> anyhow::Result<ExitCode> {
    let began = Instant::now();
    let interrupted = Arc::new(AtomicBool::new(false));
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
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
    let changes = matches!(
        cli.command,
        Command::Apply(_)
            | Command::Replace(_)
            | Command::Revert(_)
            | Command::Nudge(_)
            | Command::Recover(_)
    );
    if session.dry_run && !changes {
        session.say(1, "--dry-run: this command changes nothing anyway");
    }
    match &cli.command {
        Command::List { core } => list::run(&session, core.as_deref()),
        Command::Info(args) => info::run(&session, args),
        Command::Show { file } => show::run(&session, file),
        Command::Check(args) => check::run(&session, args),
        Command::Apply(args) => apply::run(&session, &session.host()?, args, Mode::Apply),
        Command::Replace(args) => apply::run(&session, &session.host()?, args, Mode::Replace),
        Command::Revert(args) => revert::run(&session, &session.host()?, args),
        Command::Blocking(args) => blocking::run(&session, args),
        Command::Nudge(args) => nudge::run(&session, &session.host()?, args),
        Command::Status { domain, core } => {
            status::run(&session, domain.as_deref(), core.as_deref())
        }
        Command::Verify { domain, core } => {
            verify::run(&session, domain.as_deref(), core.as_deref())
        }
        Command::History(args) => history::run(&session, args),
        Command::Recover(args) => recover::run(&session, &session.host()?, args),
        Command::Daemon(args) => daemon::run(&session, &session.host()?, args),
    }
}

/// The exit code of an error.
#[must_use]
pub fn exit_code(error: &anyhow::Error) -> ExitCode {
    error
        .downcast_ref::<Error>()
        .map_or(ExitCode::Failed, Error::exit_code)
}
