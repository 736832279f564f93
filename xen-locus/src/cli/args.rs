//! The command line's types, alone in one file so that completions and man pages come from them.

use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgAction, Args, Parser, Subcommand, ValueEnum};

const VERSION: &str = if cfg!(feature = "faults") {
    concat!(
        env!("CARGO_PKG_VERSION"),
        " (faults: fails, dies or sees nobody where a test wants it; for tests)"
    )
} else {
    env!("CARGO_PKG_VERSION")
};

/// Change a running guest's kernel from dom0.
///
/// No agent, no reboot, no profile: the guest's symbols and types are read from its own memory.
#[derive(Debug, Parser)]
#[command(name = "xen-locus", version = VERSION, max_term_width = 100)]
#[command(
    after_help = "Exit codes: 0 done or nothing to do; 1 failed, guest unchanged; 2 try again \
    (blocked, busy, timed out); 3 not applicable (other kernel, unsupported); 4 refused (signature, \
    policy); 5 failed midway, rolled back and verified; 6 uncertain, run recover; 64 usage."
)]
pub struct Cli {
    /// Say more on stderr (repeat for more)
    #[arg(short, long, global = true, action = ArgAction::Count)]
    pub verbose: u8,
    /// Check and link, but change nothing
    #[arg(short = 'N', long, global = true)]
    pub dry_run: bool,
    /// Format of stdout
    #[arg(short, long, global = true, value_enum, default_value_t = Output::Table)]
    pub output: Output,
    /// Folder that keeps what was read of guests' kernels
    #[arg(
        long,
        global = true,
        value_name = "DIR",
        default_value = "/var/cache/xen-locus"
    )]
    pub cache: PathBuf,
    /// Read guests' kernels anew, and keep nothing
    #[arg(long, global = true, conflicts_with = "cache")]
    pub no_cache: bool,
    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

/// Format of stdout.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// For people
    Table,
    /// For programs: one object with "schema": 1
    Json,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// List domains: kernel, patches, readiness and why not
    List {
        /// Say it of a saved core (`xl dump-core`) instead of all domains; needs no Xen
        #[arg(long, value_name = "FILE")]
        core: Option<PathBuf>,
    },
    /// Show a guest's kernel: who it is, its symbols, types, tasks, modules, read from its memory
    Info(Info),
    /// Show what a payload changes and targets (needs no Xen)
    Show {
        /// Livepatch module
        file: PathBuf,
    },
    /// Check every precondition of a payload on a guest, without writing
    Check(Check),
    /// Apply a payload to guests
    Apply(Apply),
    /// Apply a payload in place of all patches of a guest, in one step
    ///
    /// Functions that only the patches before it replaced get the kernel's own code back, in the same
    /// pause. A payload that says itself that it replaces those before it (klp_patch.replace) needs
    /// no more than `apply`.
    Replace(Apply),
    /// Undo an applied patch
    ///
    /// A patch on which another lies, one that was applied later and replaces the same function, is
    /// refused with exit code 1 and the names of those to revert first.
    Revert(Revert),
    /// Show who is in the way of applying a payload, or of reverting a patch
    ///
    /// Who is inside a function that is to be replaced, or in a replacement, or has it on its stack: at
    /// one moment, for which the guest is paused. With -v the whole stacks of those that sleep.
    Blocking(Blocking),
    /// Wake those who sleep in the way, as a signal would that is none
    ///
    /// In the way of applying a payload or reverting a patch; or, where `status` says that a patch is
    /// draining, in what it replaced. They leave their system call and restart it, as those do whom the
    /// kernel's own livepatch signals; some calls end with EINTR. At most 128 at once; kernel threads are left
    /// alone. The guest's kernel does it, on its next timer interrupt.
    Nudge(Nudge),
    /// Show patches of one guest or of all
    Status {
        /// Name or id; all guests if not given
        #[arg(conflicts_with = "core")]
        domain: Option<String>,
        /// Look into a saved core (`xl dump-core`); needs no Xen
        #[arg(long, value_name = "FILE")]
        core: Option<PathBuf>,
    },
    /// Compare a guest's patches with the record of them, and say exactly what differs
    ///
    /// Redirects and what stands before them, the pages of the payloads and their rights, code and
    /// constants; of each difference what was expected, what is there, and whether the guest's own ftrace,
    /// kprobes, livepatch or BPF did it. Mends nothing. Exit code 1 if anything differs.
    Verify {
        /// Name or id; all guests if not given
        #[arg(conflicts_with = "core")]
        domain: Option<String>,
        /// Look into a saved core (`xl dump-core`); needs no Xen
        #[arg(long, value_name = "FILE")]
        core: Option<PathBuf>,
    },
    /// Settle what an interrupted run left, and say how it ended
    ///
    /// A run that is killed leaves its guest running, with the patch in force or not: this says which, and
    /// clears what is left of the run. `apply`, `replace` and `revert` do so by themselves first.
    Recover(Recover),
    /// Show what was done to guests, and check that the record of it is whole
    ///
    /// Every action is recorded in /var/log/xen-locus/audit.jsonl. Exit code 1 if somebody changed that
    /// record since.
    History(History),
    /// Serve requests made through XenStore, and publish status there
    Daemon(Daemon),
}

/// A guest: a domain or a saved core.
#[derive(Clone, Debug, Args)]
pub struct Whom {
    /// Name or id
    #[arg(required_unless_present = "core", conflicts_with = "core")]
    pub domain: Option<String>,
    /// Look into a saved core (`xl dump-core`) instead of a domain; needs no Xen
    #[arg(long, value_name = "FILE")]
    pub core: Option<PathBuf>,
}

/// Arguments of `check`.
#[derive(Debug, Args)]
#[command(allow_missing_positional = true)]
pub struct Check {
    /// On whom
    #[command(flatten)]
    pub whom: Whom,
    /// Livepatch module
    pub file: PathBuf,
}

/// Arguments of `blocking`.
#[derive(Debug, Args)]
#[command(allow_missing_positional = true)]
pub struct Blocking {
    /// On whom
    #[command(flatten)]
    pub whom: Whom,
    /// Livepatch module (with a folder before its name, or .ko behind it), or the name of an applied
    /// patch
    #[arg(value_name = "FILE|PATCH")]
    pub what: String,
}

/// Arguments of `nudge`.
#[derive(Debug, Args)]
pub struct Nudge {
    /// Name or id
    pub domain: String,
    /// Livepatch module (with a folder before its name, or .ko behind it), or the name of an applied
    /// patch
    #[arg(value_name = "FILE|PATCH")]
    pub what: String,
    /// How patient to be
    #[command(flatten)]
    pub patience: Patience,
}

/// Arguments of `info`.
#[derive(Debug, Args)]
pub struct Info {
    /// Whose kernel
    #[command(flatten)]
    pub whom: Whom,
    /// What to show instead of the summary
    #[command(flatten)]
    pub what: What,
}

/// What `info` shows; the summary if nothing is chosen.
#[derive(Debug, Args)]
#[group(multiple = false)]
pub struct What {
    /// Symbols whose name matches PATTERN (* and ? as in a shell), as /proc/kallsyms shows them
    #[arg(long, value_name = "PATTERN")]
    pub symbols: Option<String>,
    /// Tasks: every thread of every process, and the idle task of every CPU
    #[arg(long)]
    pub tasks: bool,
    /// The kernel stack of every task, as /proc/PID/stack shows it, and whether it is reliable
    #[arg(long)]
    pub stacks: bool,
    /// Loaded modules, in the order of /proc/modules
    #[arg(long)]
    pub modules: bool,
    /// A type as C, with offsets and sizes: struct NAME, union NAME, enum NAME, a typedef or a function
    #[arg(long = "type", value_name = "NAME")]
    pub type_name: Option<String>,
    /// Bytes as they are in the guest, on stdout: btf, btf:MODULE, notes, text, vmcoreinfo
    #[arg(long, value_name = "WHAT")]
    pub raw: Option<String>,
}

/// Arguments of `apply` and `replace`.
#[derive(Debug, Args)]
pub struct Apply {
    /// Guests by name or id, then the livepatch module
    #[arg(required = true, num_args = 1.., value_names = ["DOMAIN", "FILE"])]
    pub targets: Vec<String>,
    /// All guests; only FILE is given then
    #[arg(long)]
    pub all: bool,
    /// Do not wait for threads that are inside the functions to be replaced
    #[command(flatten)]
    pub consistency: Consistency,
    /// How patient to be
    #[command(flatten)]
    pub patience: Patience,
}

/// Arguments of `history`.
#[derive(Debug, Args)]
pub struct History {
    /// Name, id or UUID; all guests if not given
    pub domain: Option<String>,
    /// Another record than that of this dom0; needs no Xen either
    #[arg(long, value_name = "FILE")]
    pub log: Option<PathBuf>,
}

/// Arguments of `revert`.
#[derive(Debug, Args)]
pub struct Revert {
    /// Name or id
    pub domain: String,
    /// Name of the patch, as `status` shows it
    #[arg(required_unless_present = "all", conflicts_with = "all")]
    pub patch: Option<String>,
    /// Undo all patches of the guest, the newest first
    #[arg(long)]
    pub all: bool,
    /// Do not wait for threads that are inside the replacements
    #[command(flatten)]
    pub consistency: Consistency,
    /// How patient to be
    #[command(flatten)]
    pub patience: Patience,
}

/// Whether old and new versions may run at the same time.
#[derive(Clone, Debug, Args)]
pub struct Consistency {
    /// Change only where threads enter: whoever is inside goes on in the version that he entered
    ///
    /// For threads that never leave. Refused unless the payload's author says, by
    /// MODULE_INFO(entry_only, "Y"), that both versions may run at the same time. `status` shows how
    /// many threads are in the old ones yet.
    #[arg(long)]
    pub entry_only: bool,
}

/// Arguments of `recover`.
#[derive(Debug, Args)]
pub struct Recover {
    /// Name or id; all guests if not given
    pub domain: Option<String>,
    /// How patient to be
    #[command(flatten)]
    pub patience: Patience,
}

/// How patient to be.
#[derive(Clone, Debug, Args)]
pub struct Patience {
    /// Time for all attempts together, such as 30s or 500ms
    #[arg(long, default_value = "30s", value_parser = duration)]
    pub timeout: Duration,
    /// Longest pause of the guest; an attempt that would take longer is given up
    #[arg(long, default_value = "10ms", value_parser = duration)]
    pub max_pause: Duration,
}

/// Arguments of `daemon`.
#[derive(Debug, Args)]
pub struct Daemon {
    /// Folder of the payloads that requests name
    #[arg(long, default_value = "/var/lib/xen-locus/payloads")]
    pub payloads: PathBuf,
    /// Apply again from there what guests lost when they were started anew
    #[arg(long)]
    pub reapply: bool,
    /// How patient to be with each request
    #[command(flatten)]
    pub patience: Patience,
}

/// Parses a time with its unit: `30s`, `500ms`, `200us`, `2m`.
///
/// # Errors
/// No number, no unit, or more than 2^64 microseconds: a deadline so far away can't be added to the present.
fn duration(text: &str) -> Result<Duration, String> {
    // humantime alone takes a zero without a unit.
    if text.bytes().all(|c| c.is_ascii_digit()) {
        return Err("expected a number and its unit us, ms, s or m, such as 30s".into());
    }
    let duration = humantime::parse_duration(text).map_err(|error| error.to_string())?;
    u64::try_from(duration.as_micros())
        .map(|_| duration)
        .map_err(|_| "the time is too long".into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_core_takes_the_place_of_the_domain() {
        let check = |words: &[&str]| match Cli::try_parse_from(words).map(|cli| cli.command) {
            Ok(Command::Check(check)) => Some((
                check.whom.domain,
                check.whom.core.is_some(),
                check.file.display().to_string(),
            )),
            _ => None,
        };
        let file = "x.ko".to_owned();
        assert_eq!(
            check(&["xen-locus", "check", "web", "x.ko"]),
            Some((Some("web".into()), false, file.clone()))
        );
        for words in [
            ["xen-locus", "check", "--core", "c", "x.ko"],
            ["xen-locus", "check", "x.ko", "--core", "c"],
        ] {
            assert_eq!(check(&words), Some((None, true, file.clone())));
        }
        assert_eq!(check(&["xen-locus", "check", "x.ko"]), None);
        let both = ["xen-locus", "check", "--core", "c", "web", "x.ko"];
        assert_eq!(check(&both), None);
        for wrong in [
            &["xen-locus", "info"][..],
            &["xen-locus", "info", "web", "--core", "c"],
            &["xen-locus", "status", "web", "--core", "c"],
        ] {
            assert!(Cli::try_parse_from(wrong).is_err(), "{wrong:?}");
        }
        assert!(Cli::try_parse_from(["xen-locus", "info", "--core", "c"]).is_ok());
    }

    #[test]
    fn durations_have_a_unit() {
        for (text, expected) in [
            ("30s", Duration::from_secs(30)),
            ("500ms", Duration::from_millis(500)),
            ("200us", Duration::from_micros(200)),
            ("2m", Duration::from_secs(120)),
            ("0s", Duration::ZERO),
        ] {
            assert_eq!(duration(text), Ok(expected), "{text}");
        }
        for text in ["", "0", "30", "s", "-1s", "30x"] {
            assert!(duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_duration_can_be_added_to_the_present() {
        // 2^64 microseconds.
        let longest = Duration::from_secs(18_446_744_073_709);
        assert_eq!(duration("18446744073709s"), Ok(longest));
        assert!(std::time::Instant::now().checked_add(longest).is_some());
        assert!(duration("18446744073710s").is_err());
        for text in ["18446744073709551616us", "99999999999999999m"] {
            assert!(duration(text).is_err(), "{text}");
        }
        // More seconds than a deadline can have, which humantime takes.
        assert!(duration(&format!("{}s", u64::MAX)).is_err());
    }
}
