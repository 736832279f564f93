//! `xen-locus recover [DOMAIN]`: how a run ended that nobody saw end, and what it left settled.

use locus_guest::addr::DomId;
use serde_json::{json, Value};

use super::args::{Output, Recover};
use super::subject::Subject;
use super::{apply, out, Host, Session};
use crate::apply::Options;
use crate::error::{Error, ExitCode, Result};
use crate::recover::{Finding, Report};
use crate::say;
use crate::{guard, journal, service};

/// What is said of one guest.
#[derive(Debug)]
pub struct Found {
    /// The guest; of one that is gone the UUID is all there is.
    pub subject: Subject,
    /// What was found and done, or why it can't be told.
    pub result: Result<Report>,
}

impl Found {
    /// In one line.
    #[must_use]
    pub fn line(&self) -> String {
        let whom = match self.subject.domid {
            Some(_) => self.subject.label(),
            None => self.subject.uuid.clone().unwrap_or_default(),
        };
        match &self.result {
            Ok(report) => format!("{whom}: {report}"),
            Err(error) => format!("{whom}: {error}"),
        }
    }

    fn json(&self) -> Value {
        let mut value = match &self.result {
            Ok(report) => json!(report),
            Err(error) => out::failure(error),
        };
        if let Some(map) = value.as_object_mut() {
            map.insert("uuid".into(), json!(self.subject.uuid));
        }
        self.subject.object(value)
    }

    fn code(&self) -> ExitCode {
        match &self.result {
            Ok(report) if report.result == Finding::Uncertain => ExitCode::Uncertain,
            Ok(_) => ExitCode::Done,
            Err(error) => error.exit_code(),
        }
    }
}

/// Runs the command.
///
/// # Errors
/// There is no such guest; domains can't be listed.
pub fn run(session: &Session, host: &Host, args: &Recover) -> anyhow::Result<ExitCode> {
    if session.dry_run {
        let why = "recover has no dry run: `status` shows what is in force, and changes nothing";
        return Err(Error::Usage(why.into()).into());
    }
    let options = session.options(&args.patience);
    let found = match &args.domain {
        Some(wanted) => {
            let domain = host.guest(wanted)?;
            vec![Found {
                subject: Subject::of(&domain),
                result: service::recover(&host.desk(apply::user()), &domain, &options),
            }]
        }
        None => all(host, &options, false)?,
    };
    match (session.output, &args.domain) {
        (Output::Json, Some(_)) => out::object(found.first().map(Found::json).unwrap_or_default()),
        (Output::Json, None) => {
            let all: Vec<Value> = found.iter().map(Found::json).collect();
            out::object(json!({ "domains": all }));
        }
        (Output::Table, _) => {
            for one in &found {
                match one.result {
                    Ok(_) => out::line(&one.line()),
                    Err(_) => say::warn(one.line()),
                }
            }
        }
    }
    let code = found.iter().map(Found::code).max();
    Ok(code.unwrap_or(ExitCode::Done))
}

/// All guests, those that are gone and left something among them; or only those of which something is
/// noted in this control domain. A guest whose kernel can't be read, and of which nothing is noted, is none
/// of ours.
///
/// # Errors
/// Domains can't be listed.
pub fn all(host: &Host, options: &Options, only_noted: bool) -> Result<Vec<Found>> {
    let mut found = Vec::new();
    let mut noted = journal::all()?;
    let files = guard::files(None)?;
    noted.extend(
        files
            .iter()
            .filter_map(|f| guard::uuid_of(f))
            .map(str::to_owned),
    );
    noted.sort();
    noted.dedup();
    let domains = host.control.domains(DomId(1))?;
    for info in domains.clone() {
        let uuid = info.uuid.clone();
        let known = noted.binary_search(&uuid).is_ok();
        let running = !info.dying && !info.shutdown;
        noted.retain(|n| *n != uuid);
        if !running || (only_noted && !known) {
            continue;
        }
        let domain = host.domain(info)?;
        let result = service::recover(&host.desk(apply::user()), &domain, options);
        if known || result.is_ok() {
            found.push(Found {
                subject: Subject::of(&domain),
                result,
            });
        }
    }
    for uuid in noted {
        found.push(Found {
            result: service::forget(&host.control, &uuid, options),
            subject: Subject {
                domid: None,
                name: String::new(),
                uuid: Some(uuid),
                vcpus: 0,
                core: None,
                registers: Vec::new(),
            },
        });
    }
    service::sweep(&domains);
    Ok(found)
}
