//! `xen-locus check DOMAIN FILE`: a dry run of `apply`, also on a saved core.

use std::path::Path;

use locus_guest::core::Core;
use locus_kernel::Kernel;
use locus_payload::Payload;
use serde_json::{json, Value};

use super::args::{Check, Output, Patience};
use super::subject::{self, Subject};
use super::{apply, out, Session};
use crate::apply::{Options, Report};
use crate::arena::Arena;
use crate::blocker::Blocker;
use crate::error::{Error, ExitCode, Result};
use crate::plan::{self, Mode, Readiness};
use crate::quiesce;
use crate::say;

/// What can't be checked on a core.
const NOT_CHECKED: [&str; 2] = [
    "whether the guest has pages for the payload",
    "whether a moment comes when nobody is inside the functions",
];

/// Runs the command.
///
/// # Errors
/// No such payload; what makes it not applicable is printed.
pub fn run(session: &Session, args: &Check) -> anyhow::Result<ExitCode> {
    let payload = Payload::read(&args.file).map_err(Error::from)?;
    if let Some(path) = &args.whom.core {
        return Ok(on_core(session, path, &payload));
    }
    let patience = Patience {
        timeout: Options::default().timeout,
        max_pause: Options::default().max_pause,
    };
    let options = Options {
        dry_run: true,
        ..session.options(&patience)
    };
    let host = session.host()?;
    let wanted = args.whom.domain()?;
    let done = apply::apply_one(session, &host, wanted, &payload, Mode::Apply, &options);
    Ok(apply::tell(session, "Checking", vec![done]))
}

/// What a core shows of a payload.
#[derive(Debug)]
pub struct Verdicts {
    /// As a dry run on the live guest says it.
    pub report: Report,
    /// Who was inside a function at the moment of saving, by the stacks and registers saved.
    pub blockers: Vec<Blocker>,
}

/// Checks `payload` on a saved guest: all that `check` does on a live one, and who was inside the
/// functions when it was saved.
///
/// # Errors
/// Whatever makes it not applicable.
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
    let result = subject::with_core(path, |subject, kernel, core| {
        Ok((subject.clone(), examine(kernel, core, payload)?))
    });
    match result {
        Ok((subject, verdicts)) => {
            tell(session, &subject, &verdicts);
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
                out::object(apply::with(out::failure(&error), &fields));
            }
            error.exit_code()
        }
    }
}

fn tell(session: &Session, subject: &Subject, verdicts: &Verdicts) {
    let Verdicts { report, blockers } = verdicts;
    match session.output {
        Output::Json => {
            let fields = [
                ("blockers", json!(blockers)),
                ("not_checked", json!(NOT_CHECKED)),
            ];
            out::object(subject.object(apply::with(json!(report), &fields)));
        }
        Output::Table => {
            out::line(&format!(
                "Checking {} on {}... {report}",
                report.patch,
                subject.label()
            ));
            if !blockers.is_empty() {
                out::line("inside the functions when it was saved:");
                out::text(&out::blockers(blockers));
            }
            out::line(&format!(
                "not checked, as the guest does not run: {}",
                NOT_CHECKED.join("; ")
            ));
        }
    }
}
