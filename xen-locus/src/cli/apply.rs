#![doc = include_str!("manual/apply.md")]
#![doc = include_str!("manual/replace.md")]

use std::io::{self, IsTerminal as _};
use std::path::Path;

use locus_guest::addr::DomId;
use locus_payload::Payload;

use super::args::Apply;
use super::report::{self, ActionResult};
use super::Session;
use crate::apply::Options;
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
    let action = match mode {
        Mode::Apply => "Applying",
        Mode::Replace => "Replacing all patches by",
    };
    let (domains, file) = domains_and_file(host, args)?;
    let payload = Payload::read(Path::new(&file)).map_err(Error::from)?;
    let options = Options {
        entry_only: args.consistency.entry_only,
        ..session.options(&args.limits)
    };
    let mut results = Vec::new();
    for domain in &domains {
        if io::stderr().is_terminal() {
            say::line(format_args!("{action} {} on {domain}...", payload.name));
        }
        results.push(apply_to(session, host, domain, &payload, mode, &options));
    }
    Ok(report::print(session, action, results))
}

fn domains_and_file(host: &Host, args: &Apply) -> Result<(Vec<String>, String)> {
    let usage = |why: &str| Error::usage(why.to_owned());
    let Some((file, domains)) = args.domains_and_file.split_last() else {
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
        session.say(1, format!("{}: {report:?}", domain.label()));
    }
    of(Some((domain.info.id, domain.label())), result)
}
