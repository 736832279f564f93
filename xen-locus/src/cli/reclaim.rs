#![doc = include_str!("manual/reclaim.md")]

use super::args::Reclaim;
use super::report::{self, ActionResult};
use super::Session;
use crate::error::ExitCode;
use crate::ops;
use crate::ops::host::Host;
use crate::ops::operator;
use crate::say;

/// Runs the command.
///
/// # Errors
/// No such guest, or it can't be read.
pub fn run(session: &Session, host: &Host, args: &Reclaim) -> anyhow::Result<ExitCode> {
    let domain = host.guest(&args.domain)?;
    let options = session.options(&args.limits);
    let operator = host.operator(operator::user());
    let names: Vec<String> = args.patch.iter().cloned().collect();
    let results = ops::reclaim(&operator, &domain, &names, &options)
        .map_err(|error| error.context(say::one_line(&args.domain)))?;
    if results.is_empty() {
        session.say(0, format!("{}: no payload is parked", domain.label()));
    }
    let results = results.into_iter().map(|(patch, result)| ActionResult {
        domain: args.domain.clone(),
        guest: Some((domain.info.id, domain.label())),
        patch,
        result,
    });
    Ok(report::print(session, "Reclaiming", results.collect()))
}
