//! `xen-locus history [DOMAIN]`: what was done to guests, from the audit log.

use std::time::{Duration, UNIX_EPOCH};

use serde_json::json;

use super::args::{History, Output};
use super::{out, Session};
use crate::audit::{Audit, Line};
use crate::error::ExitCode;

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
        })),
        Output::Table if lines.is_empty() => out::line("nothing is recorded"),
        Output::Table => {
            let rows: Vec<[String; 7]> = lines.iter().map(|line| row(line)).collect();
            let heads = [
                "Time", "Domain", "Action", "Patch", "Result", "Pause us", "Who",
            ];
            out::table(heads, &rows);
        }
    }
    for fault in &history.faults {
        eprintln!("xen-locus: {}: {fault}", audit.path().display());
    }
    Ok(if history.faults.is_empty() {
        ExitCode::Done
    } else {
        ExitCode::Failed
    })
}

fn row(line: &Line) -> [String; 7] {
    let action = &line.action;
    let time = UNIX_EPOCH + Duration::from_secs(action.time);
    [
        humantime::format_rfc3339_seconds(time).to_string(),
        format!("{} ({})", action.domain, action.domid),
        action.op.clone(),
        action.patch.clone(),
        action.result.clone(),
        if action.pause_us == 0 {
            "-".into()
        } else {
            action.pause_us.to_string()
        },
        action.who.clone(),
    ]
}
