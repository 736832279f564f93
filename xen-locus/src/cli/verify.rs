#![doc = include_str!("manual/verify.md")]

use std::path::Path;

use locus_guest::addr::DomId;
use locus_kernel::Kernel;
use serde_json::{json, Value};

use super::args::Output;
use super::guest::{self, Guest};
use super::{out, Session};
use crate::domain::Domain;
use crate::error::{ExitCode, Result};
use crate::machine;
use crate::ops;
use crate::say;
use crate::storage::audit::{Audit, History};
use crate::verify::{verify, HostRecords, VerifyReport};

/// Runs the command: of a core, of the domain `wanted`, or of all guests.
///
/// # Errors
/// The guest can't be read, or its records of patches are damaged.
pub fn run(
    session: &Session,
    wanted: Option<&str>,
    core: Option<&Path>,
) -> anyhow::Result<ExitCode> {
    let one = wanted.is_some() || core.is_some();
    let mut all = Vec::new();
    let mut worst = ExitCode::Done;
    match (core, wanted) {
        (Some(path), _) => all.push(guest::with_core(path, |guest, kernel, _| {
            Ok((guest.clone(), compare(guest, kernel, None)?))
        })?),
        (None, Some(wanted)) => {
            let host = session.host()?;
            let history = log()?;
            all.push(guest::on_domain(&host, wanted, |domain| {
                let known = known(&history, domain)?;
                let guest = Guest::of(domain);
                let outcome = compare(&guest, &machine::kernel_of(domain)?, known.as_ref())?;
                Ok((guest, outcome))
            })?);
        }
        (None, None) => {
            let host = session.host()?;
            let history = log()?;
            for info in host.control.domains(DomId(1))? {
                let domain = host.domain(info)?;
                let guest = Guest::of(&domain);
                let kernel = match machine::kernel_of(&domain) {
                    Ok(kernel) => kernel,
                    Err(error) => {
                        worst = worst.max(guest::unread(session, &guest, &error.into()));
                        continue;
                    }
                };
                let known = known(&history, &domain)?;
                match compare(&guest, &kernel, known.as_ref()) {
                    Ok(outcome) => all.push((guest, outcome)),
                    Err(error) => {
                        say::warn(format_args!("{}: {error}", guest.label()));
                        worst = worst.max(error.exit_code());
                    }
                }
            }
        }
    }
    if all.iter().any(|(_, outcome)| !outcome.drift.is_empty()) {
        worst = worst.max(ExitCode::Failed);
    }
    // What was not compared may differ.
    if all.iter().any(|(_, outcome)| !outcome.unknown.is_empty()) {
        worst = worst.max(ExitCode::NotApplicable);
    }
    let mut objects = all.iter().map(|(guest, outcome)| object(guest, outcome));
    match session.output {
        Output::Json if one => out::object(objects.next().unwrap_or_default()),
        Output::Json => out::object(json!({ "domains": objects.collect::<Vec<Value>>() })),
        Output::Table => all
            .iter()
            .for_each(|(guest, outcome)| table(guest, outcome)),
    }
    Ok(worst)
}

/// Compares one guest. Says so if a nudge was interrupted in it: its gate is no patch.
fn compare(
    guest: &Guest,
    kernel: &Kernel<'_>,
    known: Option<&HostRecords<'_>>,
) -> Result<VerifyReport> {
    let outcome = verify(kernel, known)?;
    ops::warn_of_nudge(&guest.label(), outcome.nudge.as_deref());
    Ok(outcome)
}

/// The audit log. Warns if it was changed.
fn log() -> anyhow::Result<History> {
    let audit = Audit::system();
    let history = audit.history()?;
    if !history.faults.is_empty() {
        say::warn(format_args!(
            "the audit log {} was changed (`xen-locus history` says where); records are compared with \
             it all the same",
            audit.path().display()
        ));
    }
    Ok(history)
}

/// What the log says of the guest. Nothing, and that is said, if it may say it of another one.
fn known<'a>(history: &'a History, domain: &'a Domain<'_>) -> Result<Option<HostRecords<'a>>> {
    if let Err(error) = domain.check_uuid() {
        say::warn(format_args!(
            "{}: its records are not compared with the audit log: {error}",
            domain.label()
        ));
        return Ok(None);
    }
    Ok(Some(HostRecords {
        log: &history.lines,
        uuid: &domain.info.uuid,
        in_force: Audit::system().in_force(&domain.info.uuid)?,
    }))
}

fn object(guest: &Guest, outcome: &VerifyReport) -> Value {
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
    guest.object(json!({
        "uuid": guest.uuid,
        "result": if clean { "clean" } else { "drifted" },
        "patches": outcome.patches,
        "parked": outcome.parked,
        "redirects": outcome.redirects,
        "pages": outcome.pages,
        "unconfirmed": outcome.unconfirmed,
        "unknown": outcome.unknown,
        "drift": drift.collect::<Vec<Value>>(),
    }))
}

fn table(guest: &Guest, outcome: &VerifyReport) {
    let VerifyReport {
        patches,
        parked,
        redirects,
        pages,
        unconfirmed,
        unknown,
        drift,
        nudge: _,
    } = outcome;
    let found = match drift.len() {
        0 => "all as recorded".to_owned(),
        n => say::count(n, "difference", "differences"),
    };
    out::line(&format!(
        "{}: {found} ({}, {parked} parked, {}, {})",
        guest.label(),
        say::count(*patches, "patch", "patches"),
        say::count(*redirects, "redirect", "redirects"),
        say::count(*pages, "page", "pages"),
    ));
    if !unconfirmed.is_empty() {
        out::line(&format!(
            "{}: the audit log of this host has no line about {}: applied on another host, or forged",
            guest.label(),
            unconfirmed.join(", ")
        ));
    }
    if !unknown.is_empty() {
        out::line(&format!(
            "{}: not compared: {}, applied by a newer xen-locus",
            guest.label(),
            unknown.join(", ")
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
