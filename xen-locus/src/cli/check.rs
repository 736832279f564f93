#![doc = include_str!("manual/check.md")]

use std::path::Path;

use locus_guest::core::Core;
use locus_kernel::Kernel;
use locus_payload::Payload;
use serde_json::{json, Value};

use super::args::{Check, DomainOrCore, Output, TimeLimits};
use super::guest::{self, Guest};
use super::{apply, out, report, Session};
use crate::apply::{Options, Report};
use crate::arena::Arena;
use crate::blocker::Blocker;
use crate::error::{Error, ExitCode, Result};
use crate::machine;
use crate::ops::host::Host;
use crate::plan::{self, Mode, Readiness};
use crate::quiesce;
use crate::say;

/// What only a running guest can show. Values of the JSON output: programs may compare them.
const NOT_CHECKED: [&str; 2] = [
    "whether the guest has pages for the payload",
    "whether a moment comes when nobody is inside the functions",
];

/// Runs the command.
///
/// # Errors
/// The payload can't be read. Why it is not applicable is printed, not returned.
pub fn run(session: &Session, args: &Check) -> anyhow::Result<ExitCode> {
    let (guest, file) = DomainOrCore::and_last(&args.words, args.core.clone())?;
    let payload = Payload::read(Path::new(&file)).map_err(Error::from)?;
    if let Some(path) = &guest.core {
        return Ok(on_core(session, path, &payload));
    }
    let limits = TimeLimits {
        timeout: Options::default().timeout,
        max_pause: Options::default().max_pause,
    };
    let options = Options {
        dry_run: true,
        ..session.options(&limits)
    };
    let host = session.host()?;
    let wanted = guest.domain()?;
    warn_of_little_room(&host, wanted);
    let result = apply::apply_to(session, &host, wanted, &payload, Mode::Apply, &options);
    Ok(report::print(session, "Checking", vec![result]))
}

/// Says it before a guest has no room any more. What can't be read is reported by the check itself.
fn warn_of_little_room(host: &Host, wanted: &str) {
    let Ok(domain) = host.guest(wanted) else {
        return;
    };
    let arena = machine::kernel_of(&domain)
        .map_err(Error::from)
        .and_then(|kernel| Ok((Arena::read(&kernel)?, kernel.kind)));
    let Ok((arena, kind)) = arena else {
        return;
    };
    if let Some(warning) = arena.little_room(kind) {
        say::warn(format_args!("{}: {warning}", domain.label()));
    }
}

/// What a check on a saved core found.
#[derive(Debug)]
pub struct Verdicts {
    /// The same report as of a dry run on a live guest.
    pub report: Report,
    /// Threads that were inside a function when the core was saved, by its stacks and registers.
    pub blockers: Vec<Blocker>,
}

/// Checks `payload` on a saved guest: all that `check` does on a live one, and which threads were inside
/// the functions when the core was saved.
///
/// # Errors
/// Why the payload is not applicable.
pub fn examine(kernel: &Kernel<'_>, core: &Core, payload: &Payload) -> Result<Verdicts> {
    let ready = plan::prepare(kernel, &Arena::read(kernel)?, payload, Mode::Apply)?;
    let report = Report::dry(payload, &ready);
    let blockers = match &ready {
        Readiness::Ready(ready) => quiesce::inside(kernel, core.vcpus(), &ready.plan.watch)?,
        Readiness::Already(_) => Vec::new(),
    };
    Ok(Verdicts { report, blockers })
}

fn on_core(session: &Session, path: &Path, payload: &Payload) -> ExitCode {
    let result = guest::with_core(path, |guest, kernel, core| {
        Ok((guest.clone(), examine(kernel, core, payload)?))
    });
    match result {
        Ok((guest, verdicts)) => {
            print(session, &guest, &verdicts);
            ExitCode::Done
        }
        Err(error) => {
            say::warn(format_args!("{}: {error}", path.display()));
            if session.output == Output::Json {
                let path = path.display().to_string();
                let fields = [
                    ("domid", Value::Null),
                    ("core", path.into()),
                    ("patch", payload.name.clone().into()),
                ];
                out::object(report::with_fields(out::failure(&error), &fields));
            }
            error.exit_code()
        }
    }
}

fn print(session: &Session, guest: &Guest, verdicts: &Verdicts) {
    let Verdicts {
        report: dry,
        blockers,
    } = verdicts;
    match session.output {
        Output::Json => {
            let fields = [
                ("blockers", json!(blockers)),
                ("not_checked", json!(NOT_CHECKED)),
            ];
            out::object(guest.object(report::with_fields(json!(dry), &fields)));
        }
        Output::Table => {
            out::line(&format!(
                "Checking {} on {}... {dry}",
                dry.patch,
                guest.label()
            ));
            if !blockers.is_empty() {
                out::line("threads inside the functions when the core was saved:");
                out::text(&out::blockers(blockers));
            }
            out::line(&format!(
                "not checked, because the guest does not run: {}",
                NOT_CHECKED.join("; ")
            ));
        }
    }
}
