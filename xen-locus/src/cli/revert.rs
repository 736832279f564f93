#![doc = include_str!("manual/revert.md")]

use super::args::Revert;
use super::report::{self, ActionResult};
use super::Session;
use crate::apply::Options;
use crate::error::ExitCode;
use crate::ops;
use crate::ops::host::Host;
use crate::ops::operator;
use crate::say;

/// Runs the command.
///
/// # Errors
/// No such guest, or it can't be read.
pub fn run(session: &Session, host: &Host, args: &Revert) -> anyhow::Result<ExitCode> {
    let domain = host.guest(&args.domain)?;
    let options = Options {
        entry_only: args.consistency.entry_only,
        ..session.options(&args.limits)
    };
    let operator = host.operator(operator::user());
    let results = match &args.patch {
        Some(patch) => {
            let result = ops::revert(&operator, &domain, patch, None, &options);
            vec![(patch.clone(), result)]
        }
        None => ops::revert_all(&operator, &domain, &options)
            .map_err(|error| error.context(say::one_line(&args.domain)))?,
    };
    if results.is_empty() {
        session.say(0, format!("{}: no patch is applied", domain.label()));
    }
    let results = results.into_iter().map(|(patch, result)| ActionResult {
        domain: args.domain.clone(),
        guest: Some((domain.info.id, domain.label())),
        patch,
        result,
    });
    Ok(report::print(session, "Reverting", results.collect()))
}
