// Over 500 lines because the manual pages are made from it, and one file shows the whole command line.
//! The types of the command line. They are alone in one file, because manual pages are made from them too.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgAction, Args, Parser, Subcommand, ValueEnum};

use super::info::raw::Raw;
use super::manual;
use crate::daemon::work::Work;
use crate::paths;

const VERSION: &str = if cfg!(feature = "faults") {
    concat!(
        env!("CARGO_PKG_VERSION"),
        " (faults: fails, dies or overlooks threads where a test wants it; for tests)"
    )
} else {
    env!("CARGO_PKG_VERSION")
};

/// Change the kernel of a running Xen guest from dom0
#[derive(Debug, Parser)]
#[command(name = "xen-locus", version = VERSION, max_term_width = 100)]
#[command(override_usage = "xen-locus [OPTIONS] <COMMAND>")]
#[command(long_about = manual::long_about(manual::XEN_LOCUS))]
#[command(after_long_help = manual::after_help(manual::XEN_LOCUS))]
#[command(
    after_help = "Exit codes: 0 done or nothing to do; 1 failed, no function changed; 2 try again \
    (blocked, busy, timed out); 3 not applicable (other kernel, unsupported); 5 failed midway, \
    rolled back and verified; 6 uncertain, run recover; 64 usage."
)]
pub struct Cli {
    /// Print more messages on stderr
    #[arg(short, long, global = true, action = ArgAction::Count)]
    pub verbose: u8,
    /// Change nothing: of a command that changes guests, check and link only (refused by recover and daemon)
    #[arg(short = 'N', long, global = true)]
    pub dry_run: bool,
    /// Format of stdout
    #[arg(short, long, global = true, value_enum, default_value_t = Output::Table)]
    pub output: Output,
    /// Folder of the cache of guests' symbols and types
    #[arg(
        long,
        global = true,
        value_name = "DIR",
        default_value = paths::CACHE
    )]
    pub cache: PathBuf,
    /// Ignore the cache and don't write to it
    #[arg(long, global = true, conflicts_with = "cache")]
    pub no_cache: bool,
    /// The command
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

/// The commands. The line here is the short help; the command's manual is in `manual/NAME.md`.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// List domains: kernel, patches, and whether they can be patched
    #[command(long_about = manual::long_about(manual::LIST))]
    #[command(after_long_help = manual::after_help(manual::LIST))]
    #[command(override_usage = "xen-locus list [OPTIONS]")]
    List {
        /// List the guest in a saved core (`xl dump-core`); needs no Xen
        #[arg(long, value_name = "CORE")]
        core: Option<PathBuf>,
    },
    /// Show a guest's kernel, read from guest memory
    #[command(long_about = manual::long_about(manual::INFO))]
    #[command(after_long_help = manual::after_help(manual::INFO))]
    #[command(override_usage = "xen-locus info [OPTIONS] <DOMAIN>\n       \
        xen-locus info [OPTIONS] --core <CORE>")]
    Info(Info),
    /// Show what a payload changes and needs (needs no Xen)
    #[command(long_about = manual::long_about(manual::SHOW))]
    #[command(after_long_help = manual::after_help(manual::SHOW))]
    #[command(override_usage = "xen-locus show [OPTIONS] <FILE>")]
    Show {
        /// Payload: a livepatch module
        file: PathBuf,
    },
    /// Check every precondition of a payload on a guest, without writing
    #[command(long_about = manual::long_about(manual::CHECK))]
    #[command(after_long_help = manual::after_help(manual::CHECK))]
    #[command(override_usage = "xen-locus check [OPTIONS] <DOMAIN> <FILE>\n       \
        xen-locus check [OPTIONS] --core <CORE> <FILE>")]
    Check(Check),
    /// Apply a payload to guests
    #[command(long_about = manual::long_about(manual::APPLY))]
    #[command(after_long_help = manual::after_help(manual::APPLY))]
    #[command(
        override_usage = "xen-locus apply [OPTIONS] <DOMAIN>... <FILE>\n       \
        xen-locus apply [OPTIONS] --all <FILE>"
    )]
    Apply(Apply),
    /// Apply a payload in place of all patches of a guest, in one pause
    #[command(long_about = manual::long_about(manual::REPLACE))]
    #[command(after_long_help = manual::after_help(manual::REPLACE))]
    #[command(
        override_usage = "xen-locus replace [OPTIONS] <DOMAIN>... <FILE>\n       \
        xen-locus replace [OPTIONS] --all <FILE>"
    )]
    Replace(Replace),
    /// Revert a patch, or all patches of a guest
    #[command(long_about = manual::long_about(manual::REVERT))]
    #[command(after_long_help = manual::after_help(manual::REVERT))]
    #[command(
        override_usage = "xen-locus revert [OPTIONS] <DOMAIN> <PATCH>\n       \
        xen-locus revert [OPTIONS] --all <DOMAIN>"
    )]
    Revert(Revert),
    /// Show which threads block applying a payload or reverting a patch
    #[command(long_about = manual::long_about(manual::BLOCKING))]
    #[command(after_long_help = manual::after_help(manual::BLOCKING))]
    #[command(
        override_usage = "xen-locus blocking [OPTIONS] <DOMAIN> <FILE|PATCH>\n       \
        xen-locus blocking [OPTIONS] --core <CORE> <FILE|PATCH>"
    )]
    Blocking(Blocking),
    /// Wake sleeping threads that block a patch, using a fake signal (nothing is delivered)
    #[command(long_about = manual::long_about(manual::NUDGE))]
    #[command(after_long_help = manual::after_help(manual::NUDGE))]
    #[command(override_usage = "xen-locus nudge [OPTIONS] <DOMAIN> <FILE|PATCH>")]
    Nudge(Nudge),
    /// Give back the memory of payloads that are in a guest and not in force
    #[command(long_about = manual::long_about(manual::RECLAIM))]
    #[command(after_long_help = manual::after_help(manual::RECLAIM))]
    #[command(override_usage = "xen-locus reclaim [OPTIONS] <DOMAIN> [PATCH]")]
    Reclaim(Reclaim),
    /// Show the patches of one guest or of all guests
    #[command(long_about = manual::long_about(manual::STATUS))]
    #[command(after_long_help = manual::after_help(manual::STATUS))]
    #[command(override_usage = "xen-locus status [OPTIONS] [DOMAIN]\n       \
        xen-locus status [OPTIONS] --core <CORE>")]
    Status {
        /// Name, id or UUID; all guests if not given
        #[arg(conflicts_with = "core")]
        domain: Option<String>,
        /// Read a saved core (`xl dump-core`); needs no Xen
        #[arg(long, value_name = "CORE")]
        core: Option<PathBuf>,
    },
    /// Compare a guest's patches with their records, and report each difference
    #[command(long_about = manual::long_about(manual::VERIFY))]
    #[command(after_long_help = manual::after_help(manual::VERIFY))]
    #[command(override_usage = "xen-locus verify [OPTIONS] [DOMAIN]\n       \
        xen-locus verify [OPTIONS] --core <CORE>")]
    Verify {
        /// Name, id or UUID; all guests if not given
        #[arg(conflicts_with = "core")]
        domain: Option<String>,
        /// Read a saved core (`xl dump-core`); needs no Xen
        #[arg(long, value_name = "CORE")]
        core: Option<PathBuf>,
    },
    /// Finish or undo what an interrupted run left, and say how the run ended
    #[command(long_about = manual::long_about(manual::RECOVER))]
    #[command(after_long_help = manual::after_help(manual::RECOVER))]
    #[command(override_usage = "xen-locus recover [OPTIONS] [DOMAIN]")]
    Recover(Recover),
    /// Show what was done to guests, and check that the audit log was not changed
    #[command(long_about = manual::long_about(manual::HISTORY))]
    #[command(after_long_help = manual::after_help(manual::HISTORY))]
    #[command(override_usage = "xen-locus history [OPTIONS] [DOMAIN]")]
    History(History),
    /// Serve requests made through XenStore, and publish status there
    #[command(long_about = manual::long_about(manual::DAEMON))]
    #[command(after_long_help = manual::after_help(manual::DAEMON))]
    #[command(override_usage = "xen-locus daemon [OPTIONS]")]
    Daemon(Daemon),
}

/// A guest: a domain or a saved core.
#[derive(Clone, Debug, Args)]
pub struct DomainOrCore {
    /// Name, id or UUID
    #[arg(required_unless_present = "core", conflicts_with = "core")]
    pub domain: Option<String>,
    /// Read a saved core (`xl dump-core`) instead of a domain; needs no Xen
    #[arg(long, value_name = "CORE")]
    pub core: Option<PathBuf>,
}

/// Arguments of `check`.
#[derive(Debug, Args)]
pub struct Check {
    /// The guest by name, id or UUID, unless a core is read; then the payload, a livepatch module
    // One argument: of two, clap takes a word behind `--` for the last one, whatever comes after it.
    #[arg(required = true, num_args = 1..=2, value_name = "DOMAIN|FILE")]
    pub words: Vec<OsString>,
    /// Read a saved core (`xl dump-core`) instead of a domain; needs no Xen
    #[arg(long, value_name = "CORE")]
    pub core: Option<PathBuf>,
}

/// Arguments of `blocking`.
#[derive(Debug, Args)]
pub struct Blocking {
    /// The guest by name, id or UUID, unless a core is read; then a payload (its path has a folder, or its name ends in .ko), or
    /// the name of an applied patch
    // As for `check`.
    #[arg(required = true, num_args = 1..=2, value_name = "DOMAIN|FILE|PATCH")]
    pub words: Vec<OsString>,
    /// Read a saved core (`xl dump-core`) instead of a domain; needs no Xen
    #[arg(long, value_name = "CORE")]
    pub core: Option<PathBuf>,
}

/// Arguments of `nudge`.
#[derive(Debug, Args)]
pub struct Nudge {
    /// Name, id or UUID
    pub domain: String,
    /// Payload (its path has a folder, or its name ends in .ko), or the name of an applied patch
    #[arg(value_name = "FILE|PATCH")]
    pub what: String,
    /// Limits of time
    #[command(flatten)]
    pub limits: TimeLimits,
}

/// Arguments of `reclaim`.
#[derive(Debug, Args)]
pub struct Reclaim {
    /// Name, id or UUID
    pub domain: String,
    /// Name of the payload; all that are parked if not given
    pub patch: Option<String>,
    /// Limits of time
    #[command(flatten)]
    pub limits: TimeLimits,
}

/// Arguments of `info`.
#[derive(Debug, Args)]
pub struct Info {
    /// The guest
    #[command(flatten)]
    pub guest: DomainOrCore,
    /// What to show instead of the summary
    #[command(flatten)]
    pub view: View,
}

/// What `info` shows; the summary if nothing is chosen.
#[derive(Debug, Args)]
#[group(multiple = false)]
pub struct View {
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
    /// A type as C, with offsets and sizes: struct NAME, union NAME, enum NAME; a typedef, a function, a variable, a basic type
    #[arg(long = "type", value_name = "NAME")]
    pub type_name: Option<String>,
    /// Raw bytes from the guest, on stdout: btf, btf:MODULE, notes, text, vmcoreinfo
    #[arg(long, value_name = "WHAT")]
    pub raw: Option<Raw>,
}

/// Arguments of `apply`.
#[derive(Debug, Args)]
pub struct Apply {
    /// What is applied, and to which guests
    #[command(flatten)]
    pub targets: Targets,
    /// Whether to wait for threads inside the functions to be replaced
    #[command(flatten)]
    pub consistency: Consistency,
    /// Limits of time
    #[command(flatten)]
    pub limits: TimeLimits,
}

/// Arguments of `replace`. What supersedes others always waits for threads.
#[derive(Debug, Args)]
pub struct Replace {
    /// What is applied, and to which guests
    #[command(flatten)]
    pub targets: Targets,
    /// Limits of time
    #[command(flatten)]
    pub limits: TimeLimits,
}

/// A payload, and the guests that it is for.
#[derive(Debug, Args)]
pub struct Targets {
    /// Guests by name, id or UUID; the last one is the payload, a livepatch module
    // One argument: with two, clap refuses options between the domains and the file.
    #[arg(required = true, num_args = 1.., value_name = "DOMAIN|FILE")]
    pub domains_and_file: Vec<String>,
    /// All guests; give only FILE then
    #[arg(long)]
    pub all: bool,
}

/// Arguments of `history`.
#[derive(Debug, Args)]
pub struct History {
    /// Name, id or UUID; all guests if not given
    pub domain: Option<String>,
    /// Another audit log than that of this dom0
    #[arg(long, value_name = "FILE")]
    pub log: Option<PathBuf>,
}

/// Arguments of `revert`.
#[derive(Debug, Args)]
pub struct Revert {
    /// Name, id or UUID
    pub domain: String,
    /// Name of the patch, as `status` shows it
    #[arg(required_unless_present = "all", conflicts_with = "all")]
    pub patch: Option<String>,
    /// Revert all patches of the guest, the newest first
    #[arg(long)]
    pub all: bool,
    /// Whether to wait for threads inside the replacements
    #[command(flatten)]
    pub consistency: Consistency,
    /// Limits of time
    #[command(flatten)]
    pub limits: TimeLimits,
}

/// Whether old and new versions may run at the same time.
#[derive(Clone, Debug, Args)]
pub struct Consistency {
    /// Do not wait for threads inside: they finish in the version they entered
    ///
    /// For threads that never leave. Only the place where threads enter a function is changed, and only
    /// a thread at these bytes is waited for. Refused unless the payload's author says, by
    /// MODULE_INFO(entry_only, "Y"), that both versions may run at the same time. After `apply`, `status`
    /// shows how many threads are still in the old versions.
    #[arg(long)]
    pub entry_only: bool,
}

/// Arguments of `recover`.
#[derive(Debug, Args)]
pub struct Recover {
    /// Name, id or UUID; all guests if not given
    pub domain: Option<String>,
    /// Limits of time
    #[command(flatten)]
    pub limits: TimeLimits,
}

/// How long a command may take, and how long it may pause the guest.
#[derive(Clone, Debug, Args)]
pub struct TimeLimits {
    /// No new attempt begins after this time, such as 30s or 500ms
    ///
    /// At least one attempt is made, also with 0s. But none is made if another run holds the guest's lock all this time. What
    /// reads the guest before and between attempts is not cut short, so a command may end later.
    // A hyphen: else clap says what it makes of "-1s".
    #[arg(long, default_value = "30s", value_parser = duration, allow_hyphen_values = true)]
    pub timeout: Duration,
    /// Longest time in a pause until the last look is over; a look that takes longer is given up
    ///
    /// Writing and unpausing come on top. Nothing is written after a look that was given up.
    #[arg(long, default_value = "10ms", value_parser = duration, allow_hyphen_values = true)]
    pub max_pause: Duration,
}

/// Arguments of `daemon`.
#[derive(Debug, Args)]
pub struct Daemon {
    /// Folder of the payloads that requests name
    #[arg(long, default_value = paths::PAYLOADS)]
    pub payloads: PathBuf,
    /// Apply patches again, from that folder, that guests lost in a reboot
    #[arg(long)]
    pub reapply: bool,
    /// Limits of time for each request
    #[command(flatten)]
    pub limits: TimeLimits,
    /// What this process does for the daemon that started it
    #[arg(long, hide = true)]
    pub work: Option<Work>,
}

/// Parses a time with its unit: `30s`, `500ms`, `200us`, `2m`.
///
/// # Errors
/// No number, no unit, or more than 2^64 microseconds: a deadline so far away can't be added to the present.
fn duration(text: &str) -> Result<Duration, String> {
    let expected = "expected a number and its unit, such as 30s or 500ms";
    // humantime alone takes a zero without a unit.
    if text.bytes().all(|c| c.is_ascii_digit()) {
        return Err(expected.into());
    }
    let duration = humantime::parse_duration(text).map_err(|error| match error {
        humantime::DurationError::NumberOverflow => "the time is too long",
        _ => expected,
    })?;
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
        let check = |words: &[&str]| match Cli::try_parse_from(words).ok()?.command {
            Command::Check(Check { words, core }) => {
                let (guest, file) = DomainOrCore::and_last(&words, core).ok()?;
                Some((guest.domain, guest.core.is_some(), file.into_string().ok()?))
            }
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
    fn usage_lines_show_what_is_required() {
        let mut cli = Cli::command();
        cli.build();
        let usage = |name: &str| {
            let command = cli.find_subcommand(name).cloned();
            let usage = command.map(|mut c| c.render_usage().to_string());
            usage.unwrap_or_default().replace("[OPTIONS] ", "")
        };
        let core = |name, rest| format!("xen-locus {name} --core <CORE>{rest}");
        for (name, line, other) in [
            (
                "apply",
                "<DOMAIN>... <FILE>",
                "xen-locus apply --all <FILE>".into(),
            ),
            (
                "replace",
                "<DOMAIN>... <FILE>",
                "xen-locus replace --all <FILE>".into(),
            ),
            (
                "revert",
                "<DOMAIN> <PATCH>",
                "xen-locus revert --all <DOMAIN>".into(),
            ),
            ("check", "<DOMAIN> <FILE>", core("check", " <FILE>")),
            (
                "blocking",
                "<DOMAIN> <FILE|PATCH>",
                core("blocking", " <FILE|PATCH>"),
            ),
            ("info", "<DOMAIN>", core("info", "")),
            ("status", "[DOMAIN]", core("status", "")),
            ("verify", "[DOMAIN]", core("verify", "")),
        ] {
            let both = format!("Usage: xen-locus {name} {line}\n       {other}");
            assert_eq!(usage(name), both);
        }
        assert_eq!(
            usage("nudge"),
            "Usage: xen-locus nudge <DOMAIN> <FILE|PATCH>"
        );
        assert_eq!(usage("show"), "Usage: xen-locus show <FILE>");
    }

    #[test]
    fn the_usage_line_of_an_error_is_the_whole_one() {
        let mut cli = Cli::command();
        let all = cli.get_subcommands().map(clap::Command::get_name);
        let all: Vec<String> = all.map(str::to_owned).collect();
        cli.build();
        for name in all {
            let mut command = cli.find_subcommand(&name).cloned().unwrap();
            let usage = command.render_usage().to_string();
            assert!(usage.contains("[OPTIONS]"), "{usage}");
            // Unknown; missing; two that exclude each other.
            for more in [&["--nonsense"][..], &[], &["--core", "c", "x"]] {
                let words = [&["xen-locus", &name], more].concat();
                let error = Cli::try_parse_from(words).err();
                let error = error.map_or_else(|| usage.clone(), |error| error.to_string());
                assert!(error.contains(&usage), "{error}");
            }
        }
        let error = Cli::try_parse_from(["xen-locus", "--nonsense"]).unwrap_err();
        assert!(error.to_string().contains("[OPTIONS] <COMMAND>"), "{error}");
    }

    #[test]
    fn options_may_stand_between_domains_and_the_payload() {
        let words = [
            "xen-locus",
            "apply",
            "a",
            "--timeout",
            "2s",
            "b",
            "--entry-only",
            "x.ko",
        ];
        let Ok(Command::Apply(apply)) = Cli::try_parse_from(words).map(|cli| cli.command) else {
            panic!("not an apply");
        };
        assert_eq!(apply.targets.domains_and_file, ["a", "b", "x.ko"]);
    }

    #[test]
    fn what_supersedes_all_others_has_no_entry_only() {
        let entry_only =
            |name| Cli::try_parse_from(["xen-locus", name, "a", "x.ko", "--entry-only"]);
        assert!(entry_only("apply").is_ok());
        assert!(entry_only("replace").is_err());
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
        for text in ["", "0", "30", "s", "-1s", "30x", "abc", "1s 2", "30ms5"] {
            let error = duration(text).unwrap_err();
            assert!(error.contains("such as 30s"), "{text}: {error}");
        }
        for words in [["--timeout", "-1s"], ["--max-pause", "-5ms"]] {
            let words = [&["xen-locus", "reclaim", "web"][..], &words].concat();
            let error = Cli::try_parse_from(words).unwrap_err().to_string();
            assert!(error.contains("such as 30s"), "{error}");
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
