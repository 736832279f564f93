#![doc = include_str!("manual/show.md")]

use std::path::Path;

use locus_payload::{Payload, Summary};
use serde_json::json;

use super::args::Output;
use super::{out, Session};
use crate::error::{Error, ExitCode};
use crate::say;

/// Runs the command.
///
/// # Errors
/// The file can't be read as a payload.
pub fn run(session: &Session, file: &Path) -> anyhow::Result<ExitCode> {
    let payload = Payload::read(file).map_err(Error::from)?;
    let summary = payload.summary();
    match session.output {
        Output::Json => out::object(json!(summary)),
        Output::Table => table(&summary),
    }
    Ok(ExitCode::Done)
}

/// How `klp_patch.replace` is shown.
fn replaces_all(replace: Option<bool>) -> &'static str {
    match replace {
        Some(true) => "yes: patches applied before it",
        Some(false) => "",
        None => "not known: the file does not tell",
    }
}

fn table(summary: &Summary) {
    for (what, value) in [
        ("name", summary.name.as_str()),
        ("description", &summary.description),
        ("format", summary.format),
        ("kernel", &summary.kernel_release),
        ("vermagic", &summary.vermagic),
        ("license", &summary.license),
        ("sha256", &summary.sha256),
        ("CVEs", &summary.cves.join(", ")),
        ("supersedes", &summary.supersedes.join(", ")),
        (
            "build-id",
            summary.target_build_id.as_deref().unwrap_or_default(),
        ),
        ("replaces all", replaces_all(summary.replace)),
        (
            "entry only",
            if summary.entry_only {
                "yes: old and new may run at the same time"
            } else {
                ""
            },
        ),
    ] {
        if !value.is_empty() {
            out::line(&format!("{what:<13} {value}"));
        }
    }
    for object in &summary.objects {
        for f in &object.functions {
            let place = if f.sympos == 0 {
                String::new()
            } else {
                format!(" number {}", f.sympos)
            };
            out::line(&format!(
                "{:<13} {}{place} in {} -> {} ({})",
                "replaces",
                f.old,
                object.object,
                f.new,
                say::count(f.size, "byte", "bytes")
            ));
        }
    }
    for role in &summary.sections {
        let names = role.sections.join(" ");
        out::line(&format!(
            "{:<13} {} ({}): {names}",
            "sections",
            role.role,
            say::count(role.size, "byte", "bytes")
        ));
    }
    out::line(&format!("{:<13} {}", "needs", summary.needs.join(" ")));
    for concern in &summary.concerns {
        out::line(&format!(
            "{:<13} {}: {}",
            "not supported", concern.subject, concern.reason
        ));
    }
}
