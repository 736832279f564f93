//! `xen-locus verify [DOMAIN]`: is all of a guest's patches as it was written?

use std::path::Path;

use locus_guest::addr::DomId;
use serde_json::{json, Value};

use super::args::Output;
use super::subject::{self, Subject};
use super::{out, Session};
use crate::domain::Domain;
use crate::error::ExitCode;
use crate::machine;
use crate::say;
use crate::storage::audit::{Audit, History};
use crate::verify::{verify, Known, Outcome};

/// Runs the command: of a core, of the domain `wanted`, or of all guests.
///
/// # Errors
/// The guest can't be read, or what it says of its patches is damaged.
pub fn run(
    session: &Session,
    wanted: Option<&str>,
    core: Option<&Path>,
) -> anyhow::Result<ExitCode> {
    let one = wanted.is_some() || core.is_some();
    let mut all = Vec::new();
    let mut worst = ExitCode::Done;
    match (core, wanted) {
        (Some(path), _) => all.push(subject::with_core(path, |subject, kernel, _| {
            Ok((subject.clone(), verify(kernel, None)?))
        })?),
        (None, Some(wanted)) => {
            let host = session.host()?;
            let domain = host.guest(wanted)?;
            let history = log()?;
            let known = known(&history, &domain);
            let outcome = verify(&machine::kernel_of(&domain)?, Some(known))?;
            all.push((Subject::of(&domain), outcome));
        }
        (None, None) => {
            let host = session.host()?;
            let history = log()?;
            for info in host.control.domains(DomId(1))? {
                let domain = host.domain(info)?;
                let subject = Subject::of(&domain);
                let kernel = match machine::kernel_of(&domain) {
                    Ok(kernel) => kernel,
                    Err(error) => {
                        worst = worst.max(subject::unread(session, &subject, &error.into()));
                        continue;
                    }
                };
                match verify(&kernel, Some(known(&history, &domain))) {
                    Ok(outcome) => all.push((subject, outcome)),
                    Err(error) => {
                        say::warn(format_args!("{}: {error}", subject.label()));
                        worst = worst.max(error.exit_code());
                    }
                }
            }
        }
    }
    if all.iter().any(|(_, outcome)| !outcome.drift.is_empty()) {
        worst = worst.max(ExitCode::Failed);
    }
    let mut objects = all
        .iter()
        .map(|(subject, outcome)| object(subject, outcome));
    match session.output {
        Output::Json if one => out::object(objects.next().unwrap_or_default()),
        Output::Json => out::object(json!({ "domains": objects.collect::<Vec<Value>>() })),
        Output::Table => all
            .iter()
            .for_each(|(subject, outcome)| table(subject, outcome)),
    }
    Ok(worst)
}

/// The audit log, with a word of warning where it can't be believed.
fn log() -> anyhow::Result<History> {
    let audit = Audit::system();
    let history = audit.history()?;
    if !history.faults.is_empty() {
        say::warn(format_args!(
            "the audit log {} is not as it was written (`xen-locus history` says where), and \
             records are compared with it",
            audit.path().display()
        ));
    }
    Ok(history)
}

fn known<'a>(history: &'a History, domain: &'a Domain<'_>) -> Known<'a> {
    Known {
        log: &history.lines,
        uuid: &domain.info.uuid,
    }
}

fn object(subject: &Subject, outcome: &Outcome) -> Value {
    let clean = outcome.drift.is_empty();
    let drift = outcome.drift.iter().map(|d| {
        json!({
            "patch": d.patch,
            "what": d.what.name(),
            "address": out::address(d.at.0),
            "function": d.function,
            "expected": d.expected,
            "found": d.found,
            "by": d.by.name(),
        })
    });
    subject.object(json!({
        "uuid": subject.uuid,
        "result": if clean { "clean" } else { "drifted" },
        "patches": outcome.patches,
        "parked": outcome.parked,
        "redirects": outcome.redirects,
        "pages": outcome.pages,
        "unconfirmed": outcome.unconfirmed,
        "drift": drift.collect::<Vec<Value>>(),
    }))
}

fn table(subject: &Subject, outcome: &Outcome) {
    let Outcome {
        patches,
        parked,
        redirects,
        pages,
        unconfirmed,
        drift,
    } = outcome;
    let found = match drift.len() {
        0 => "all as recorded".to_owned(),
        1 => "1 difference".to_owned(),
        n => format!("{n} differences"),
    };
    out::line(&format!(
        "{}: {found} ({patches} patches, {parked} parked, {redirects} redirects, {pages} pages)",
        subject.label()
    ));
    if !unconfirmed.is_empty() {
        out::line(&format!(
            "{}: this host's audit log knows nothing of the record of {}: applied elsewhere, or forged",
            subject.label(),
            unconfirmed.join(", ")
        ));
    }
    if drift.is_empty() {
        return;
    }
    let rows: Vec<[String; 6]> = drift
        .iter()
        .map(|d| {
            let what = d.what.name();
            [
                d.patch.clone(),
                match &d.function {
                    Some(name) => format!("{what} of {name}"),
                    None => what.into(),
                },
                d.at.to_string(),
                d.expected.clone(),
                d.found.clone(),
                d.by.name().into(),
            ]
        })
        .collect();
    out::table(
        ["Patch", "What", "Address", "Expected", "Found", "By"],
        &rows,
    );
}
