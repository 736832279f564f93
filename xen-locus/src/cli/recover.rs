#![doc = include_str!("manual/recover.md")]

use serde_json::{json, Value};

use super::args::{Output, Recover};
use super::{guest, out, Session};
use crate::error::{Error, ExitCode};
use crate::ops::operator;
use crate::ops::recover_all::{self, Recovered};
use crate::say;

/// The result for one guest, as JSON.
fn json(found: &Recovered) -> Value {
    let mut value = match &found.result {
        Ok(report) => json!(report),
        Err(error) => out::failure(error),
    };
    if let Some(map) = value.as_object_mut() {
        map.insert("domid".into(), json!(found.domid.map(|id| id.0)));
        map.insert("name".into(), json!(found.name));
        map.insert("uuid".into(), json!(found.uuid));
    }
    value
}

fn code(found: &Recovered) -> ExitCode {
    match &found.result {
        Ok(_) => ExitCode::Done,
        Err(error) => error.exit_code(),
    }
}

/// Runs the command.
///
/// # Errors
/// There is no such guest; domains can't be listed.
pub fn run(session: &Session, args: &Recover) -> anyhow::Result<ExitCode> {
    if session.dry_run {
        let why =
            "recover has no dry run; `status` shows what is in force without changing anything";
        return Err(Error::usage(why).into());
    }
    let host = &session.host()?;
    let options = session.options(&args.limits);
    let mut worst = ExitCode::Done;
    let mut found = match &args.domain {
        Some(wanted) => {
            let domain = host.guest(wanted)?;
            let operator = host.operator(operator::user());
            vec![recover_all::one(&operator, &domain, &options)]
        }
        None => recover_all::all(host, &operator::user(), &options, false)?,
    };
    if args.domain.is_none() {
        found.retain(|one| match &one.result {
            Err(error) if one.is_left_out() => {
                worst = worst.max(guest::unread_by_name(
                    session,
                    &one.label(),
                    &one.uuid,
                    error,
                ));
                false
            }
            _ => true,
        });
    }
    match (session.output, &args.domain) {
        (Output::Json, Some(_)) => out::object(found.first().map(json).unwrap_or_default()),
        (Output::Json, None) => {
            let all: Vec<Value> = found.iter().map(json).collect();
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
    Ok(found.iter().map(code).fold(worst, ExitCode::max))
}
