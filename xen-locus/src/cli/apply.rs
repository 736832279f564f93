//! `xen-locus apply DOMAIN… FILE`, and `replace`, which supersedes the patches that are there.

use std::io::{self, IsTerminal as _};
use std::path::Path;

use locus_guest::addr::DomId;
use locus_payload::Payload;
use serde_json::{json, Value};

use super::args::{Apply, Output};
use super::{out, Session};
use crate::apply::{Options, Report};
use crate::error::{Error, ExitCode, Result};
use crate::ops;
use crate::ops::host::Host;
use crate::ops::operator;
use crate::plan::Mode;
use crate::say;

/// Runs `apply` or `replace`.
///
/// # Errors
/// What went wrong for the only guest; with several guests each is reported and the highest exit
/// code is returned.
pub fn run(session: &Session, host: &Host, args: &Apply, mode: Mode) -> anyhow::Result<ExitCode> {
    let doing = match mode {
        Mode::Apply => "Applying",
        Mode::Replace => "Replacing all patches by",
    };
    let (domains, file) = targets(host, args)?;
    let payload = Payload::read(Path::new(&file)).map_err(Error::from)?;
    let options = Options {
        entry_only: args.consistency.entry_only,
        ..session.options(&args.patience)
    };
    let mut results = Vec::new();
    for domain in &domains {
        if io::stderr().is_terminal() {
            say::line(format_args!("{doing} {} on {domain}...", payload.name));
        }
        results.push(apply_one(session, host, domain, &payload, mode, &options));
    }
    Ok(tell(session, doing, results))
}

fn targets(host: &Host, args: &Apply) -> Result<(Vec<String>, String)> {
    let usage = |why: &str| Error::usage(why.to_owned());
    let Some((file, domains)) = args.targets.split_last() else {
        return Err(usage("give a domain and a payload file"));
    };
    if !args.all {
        if domains.is_empty() {
            return Err(usage(
                "give at least one domain, or --all, before the payload file",
            ));
        }
        return Ok((domains.to_vec(), file.clone()));
    }
    if !domains.is_empty() {
        return Err(usage("--all and a domain exclude each other"));
    }
    let all = host.control.domains(DomId(1))?;
    Ok((
        all.iter().map(|info| info.id.to_string()).collect(),
        file.clone(),
    ))
}

pub(super) fn apply_one(
    session: &Session,
    host: &Host,
    wanted: &str,
    payload: &Payload,
    mode: Mode,
    options: &Options,
) -> Done {
    let done = |found, result| Done {
        domain: wanted.to_owned(),
        found,
        patch: payload.name.clone(),
        result,
    };
    let domain = match host.guest(wanted) {
        Ok(domain) => domain,
        Err(error) => return done(None, Err(error)),
    };
    let desk = host.desk(operator::user());
    let result = ops::apply(&desk, &domain, payload, mode, options);
    if let Ok(report) = &result {
        session.say(1, format!("{}: {report:?}", domain.label()));
    }
    done(Some((domain.info.id, domain.label())), result)
}

/// What came of an action.
pub(super) struct Done {
    /// The guest as the user named it.
    pub domain: String,
    /// Its id and label, if there is such a guest.
    pub found: Option<(DomId, String)>,
    /// The patch.
    pub patch: String,
    /// The report.
    pub result: Result<Report>,
}

/// Prints results; returns the highest exit code.
pub(super) fn tell(session: &Session, doing: &str, results: Vec<Done>) -> ExitCode {
    let mut code = ExitCode::Done;
    let mut objects: Vec<Value> = Vec::new();
    for done in &results {
        let (domid, label) = match &done.found {
            Some((id, label)) => (Some(id.0), label),
            None => (None, &done.domain),
        };
        let whom = [
            ("domid", Value::from(domid)),
            ("domain", done.domain.as_str().into()),
            ("patch", done.patch.as_str().into()),
        ];
        match &done.result {
            Ok(report) => {
                objects.push(with(json!(report), &whom));
                if session.output == Output::Table {
                    out::line(&format!("{doing} {} on {label}... {report}", done.patch));
                }
            }
            Err(error) => {
                code = code.max(error.exit_code());
                let blocked = error.blocked();
                let (attempts, waited_ms) = blocked.map_or((0, 0), |b| (b.attempts, b.waited_ms));
                let numbers = [
                    ("pause_us", 0.into()),
                    ("attempts", attempts.into()),
                    ("functions", 0.into()),
                    ("total_ms", waited_ms.into()),
                ];
                objects.push(with(with(out::failure(error), &numbers), &whom));
                say::warn(format_args!("{}: {error}", done.domain));
                if let Some(blocked) = error.blocked() {
                    say::text(out::blockers(&blocked.blockers));
                }
            }
        }
    }
    if session.output == Output::Json {
        match <[Value; 1]>::try_from(objects) {
            Ok([one]) => out::object(one),
            Err(many) => out::object(json!({ "results": many })),
        }
    }
    code
}

pub(super) fn with(mut value: Value, fields: &[(&str, Value)]) -> Value {
    if let Some(map) = value.as_object_mut() {
        for (name, field) in fields {
            map.insert((*name).into(), field.clone());
        }
    }
    value
}
