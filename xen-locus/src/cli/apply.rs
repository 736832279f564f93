#![doc = include_str!("manual/apply.md")]
#![doc = include_str!("manual/replace.md")]

use std::io::{self, IsTerminal as _};
use std::path::Path;

use locus_guest::addr::DomId;
use locus_payload::Payload;

use super::args::{Apply, Replace, Targets};
use super::report::{self, ActionResult};
use super::Session;
use crate::apply::Options;
use crate::error::{Error, ExitCode, Result};
use crate::ops;
use crate::ops::host::Host;
use crate::ops::operator;
use crate::plan::Mode;
use crate::say;

/// Runs `apply`.
///
/// # Errors
/// What went wrong for the only guest; with several guests each is reported and the highest exit
/// code is returned.
pub fn apply(session: &Session, args: &Apply) -> anyhow::Result<ExitCode> {
    let options = Options {
        entry_only: args.consistency.entry_only,
        ..session.options(&args.limits)
    };
    run(session, &args.targets, Mode::Apply, &options)
}

/// Runs `replace`.
///
/// # Errors
/// As [`apply`].
pub fn replace(session: &Session, args: &Replace) -> anyhow::Result<ExitCode> {
    let options = session.options(&args.limits);
    run(session, &args.targets, Mode::Replace, &options)
}

fn run(
    session: &Session,
    targets: &Targets,
    mode: Mode,
    options: &Options,
) -> anyhow::Result<ExitCode> {
    let action = match mode {
        Mode::Apply => "Applying",
        Mode::Replace => "Replacing all patches by",
    };
    let (domains, file) = domains_and_file(targets)?;
    let host = &session.host()?;
    let payload = Payload::read(Path::new(file)).map_err(Error::from)?;
    let domains = match targets.all {
        true => {
            let all = host.control.domains(DomId(1))?;
            all.iter().map(|info| info.id.to_string()).collect()
        }
        false => domains.to_vec(),
    };
    if let ([_, _, ..], false) = (&domains[..], targets.all) {
        if let Some(results) = not_begun(host, &domains, &payload) {
            return Ok(report::print(session, action, results));
        }
    }
    let mut results = Vec::new();
    for domain in &domains {
        if io::stderr().is_terminal() {
            say::line(format_args!("{action} {} on {domain}...", payload.name));
        }
        results.push(apply_to(session, host, domain, &payload, mode, options));
    }
    Ok(report::print(session, action, results))
}

/// The domains and the payload's file. Nothing that needs Xen: what is wrong usage is so everywhere.
fn domains_and_file(targets: &Targets) -> Result<(&[String], &str)> {
    let Some((file, domains)) = targets.domains_and_file.split_last() else {
        return Err(Error::usage("give a domain and a payload file"));
    };
    // As other tools take several patches.
    if let Some(word) = domains
        .iter()
        .find(|d| d.contains('/') || d.ends_with(".ko"))
    {
        return Err(Error::usage(format!(
            "{word:?} stands where a domain is expected, and looks like a payload: one payload is applied at a time, and its \
             file is given last (a domain that is called so is given by its id)"
        )));
    }
    match (targets.all, domains.is_empty()) {
        (false, true) => Err(Error::usage(
            "give at least one domain, or --all, before the payload file",
        )),
        (true, false) => Err(Error::usage("--all and a domain exclude each other")),
        _ => Ok((domains, file)),
    }
}

/// The results for all `domains` if one of them can't be found: then no guest is changed, because the user may have meant
/// something else.
fn not_begun(host: &Host, domains: &[String], payload: &Payload) -> Option<Vec<ActionResult>> {
    let found = domains.iter().map(|domain| host.guest(domain));
    results_if_one_is_missing(domains, found.map(|found| found.map(|_| ())), payload)
}

fn results_if_one_is_missing(
    domains: &[String],
    found: impl Iterator<Item = Result<()>>,
    payload: &Payload,
) -> Option<Vec<ActionResult>> {
    let found: Vec<Result<()>> = found.collect();
    let missing = found.iter().position(Result::is_err)?;
    let missing = domains.get(missing).map_or("", |name| name);
    let other = || {
        Error::failed(format!(
            "not begun, because of {missing:?}; nothing was changed"
        ))
    };
    let results = domains
        .iter()
        .zip(found)
        .map(|(domain, found)| ActionResult {
            domain: domain.clone(),
            guest: None,
            patch: payload.name.clone(),
            result: Err(found.err().unwrap_or_else(other)),
        });
    Some(results.collect())
}

/// Applies `payload` to the guest that the user named `wanted`, or checks it if `options` ask for a dry run.
pub(super) fn apply_to(
    session: &Session,
    host: &Host,
    wanted: &str,
    payload: &Payload,
    mode: Mode,
    options: &Options,
) -> ActionResult {
    let of = |guest, result| ActionResult {
        domain: wanted.to_owned(),
        guest,
        patch: payload.name.clone(),
        result,
    };
    let domain = match host.guest(wanted) {
        Ok(domain) => domain,
        Err(error) => return of(None, Err(error)),
    };
    let operator = host.operator(operator::user());
    let result = ops::apply(&operator, &domain, payload, mode, options);
    if let Ok(report) = &result {
        session.say(1, format!("{}: {}", domain.label(), report.details()));
    }
    of(Some((domain.info.id, domain.label())), result)
}

#[cfg(test)]
mod tests {
    use locus_payload::testelf::Spec;

    use super::*;

    #[test]
    fn if_one_of_several_guests_is_not_there_none_is_changed() {
        let payload = Payload::parse("test.ko", &Spec::default().bytes()).unwrap();
        let domains = ["web".to_owned(), "dbb".to_owned()];
        let results = |second: Result<()>| {
            let found = [Ok(()), second].into_iter();
            results_if_one_is_missing(&domains, found, &payload)
        };
        assert!(results(Ok(())).is_none());
        let results = results(Err(Error::failed("there is no domain"))).unwrap();
        let said: Vec<String> = results
            .iter()
            .map(|one| one.result.as_ref().unwrap_err().to_string())
            .collect();
        assert_eq!(
            said,
            [
                "not begun, because of \"dbb\"; nothing was changed",
                "there is no domain"
            ]
        );
    }
}
