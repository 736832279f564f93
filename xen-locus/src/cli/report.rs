//! How the results of actions on guests are printed: a line for each guest, or JSON.

use locus_guest::addr::DomId;
use serde_json::{json, Value};

use super::args::Output;
use super::{out, Session};
use crate::apply::Report;
use crate::error::{ExitCode, Result};
use crate::say;

/// The result of an action on one guest.
pub(super) struct ActionResult {
    /// The guest as the user named it.
    pub domain: String,
    /// Its id and label, if there is such a guest.
    pub guest: Option<(DomId, String)>,
    /// Name of the patch.
    pub patch: String,
    /// The report, or why the action failed.
    pub result: Result<Report>,
}

/// Prints results, each line beginning with `action` ("Applying"); returns the highest exit code.
pub(super) fn print(session: &Session, action: &str, results: Vec<ActionResult>) -> ExitCode {
    let mut code = ExitCode::Done;
    let mut objects: Vec<Value> = Vec::new();
    for one in &results {
        let (domid, label) = match &one.guest {
            Some((id, label)) => (Some(id.0), label),
            None => (None, &one.domain),
        };
        let subject = [
            ("domid", Value::from(domid)),
            ("domain", one.domain.as_str().into()),
            ("patch", one.patch.as_str().into()),
        ];
        match &one.result {
            Ok(report) => {
                objects.push(with_fields(json!(report), &subject));
                if session.output == Output::Table {
                    out::line(&format!("{action} {} on {label}... {report}", one.patch));
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
                let failure = with_fields(out::failure(error), &numbers);
                objects.push(with_fields(failure, &subject));
                say::warn(format_args!("{}: {error}", one.domain));
                if let Some(blocked) = blocked {
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

/// Adds `fields` to an object.
pub(super) fn with_fields(mut object: Value, fields: &[(&str, Value)]) -> Value {
    if let Some(map) = object.as_object_mut() {
        for (name, value) in fields {
            map.insert((*name).into(), value.clone());
        }
    }
    object
}
