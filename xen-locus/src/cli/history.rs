#![doc = include_str!("manual/history.md")]

use std::time::{Duration, UNIX_EPOCH};

use serde_json::json;

use super::args::{History, Output};
use super::{out, Session};
use crate::error::ExitCode;
use crate::say;
use crate::storage::audit::{Audit, Line};

/// The first second of the year 10000, in seconds since 1970. RFC 3339 has no form for it.
const YEAR_10000: u64 = 253_402_300_800;

/// Runs the command.
///
/// # Errors
/// The log can't be read.
pub fn run(session: &Session, args: &History) -> anyhow::Result<ExitCode> {
    let audit = args.log.as_deref().map_or_else(Audit::system, Audit::copy);
    let history = audit.history()?;
    let wanted = |line: &&Line| {
        let action = &line.action;
        args.domain.as_ref().is_none_or(|wanted| {
            *wanted == action.domain
                || wanted.eq_ignore_ascii_case(&action.uuid)
                || *wanted == action.domid.to_string()
        })
    };
    let lines: Vec<&Line> = history.lines.iter().filter(wanted).collect();
    match session.output {
        Output::Json => out::object(json!({
            "actions": lines,
            "intact": history.faults.is_empty(),
            "faults": history.faults,
            "notes": history.notes,
        })),
        Output::Table if lines.is_empty() => out::line(&match &args.domain {
            Some(wanted) => format!("no actions are logged of {wanted:?}"),
            None => "no actions are logged".to_owned(),
        }),
        Output::Table => {
            let rows: Vec<[String; 7]> = lines.iter().map(|line| row(line)).collect();
            let heads = [
                "Time", "Domain", "Action", "Patch", "Result", "Pause us", "Who",
            ];
            out::table(heads, &rows);
        }
    }
    for said in history.notes.iter().chain(&history.faults) {
        say::warn(format_args!("{}: {said}", audit.path().display()));
    }
    Ok(if history.faults.is_empty() {
        ExitCode::Done
    } else {
        ExitCode::Failed
    })
}

fn row(line: &Line) -> [String; 7] {
    let action = &line.action;
    [
        time(action.time),
        format!("{} ({})", action.domain, action.domid),
        action.op.clone(),
        match action.patch.is_empty() {
            true => "-".into(),
            false => action.patch.clone(),
        },
        action.result.clone(),
        if action.pause_us == 0 {
            "-".into()
        } else {
            action.pause_us.to_string()
        },
        action.who.clone(),
    ]
}

/// A time, given in seconds since 1970. A time after the year 9999 is shown as the number, because the log may
/// have been changed.
fn time(seconds: u64) -> String {
    match seconds < YEAR_10000 {
        true => {
            humantime::format_rfc3339_seconds(UNIX_EPOCH + Duration::from_secs(seconds)).to_string()
        }
        false => seconds.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_number_is_shown_as_a_time() {
        assert_eq!(time(0), "1970-01-01T00:00:00Z");
        assert_eq!(time(YEAR_10000 - 1), "9999-12-31T23:59:59Z");
        assert_eq!(time(YEAR_10000), "253402300800");
        assert_eq!(time(u64::MAX), u64::MAX.to_string());
    }
}
