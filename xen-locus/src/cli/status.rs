//! `xen-locus status [DOMAIN]`: the patches of one guest or of all.

use serde_json::{json, Value};

use super::args::Output;
use super::{out, Host, Session};
use crate::addr::DomId;
use crate::domain::Domain;
use crate::error::{ExitCode, Result};
use crate::service::{self, Status};

/// Runs the command.
///
/// # Errors
/// The guest can't be read.
pub fn run(session: &Session, host: &Host, wanted: Option<&str>) -> anyhow::Result<ExitCode> {
    let one = wanted.is_some();
    let statuses = match wanted {
        Some(wanted) => vec![status(&host.guest(wanted)?)?],
        None => all(session, host)?,
    };
    match session.output {
        Output::Json if one => {
            out::object(
                statuses
                    .into_iter()
                    .next()
                    .map(|(_, s)| s.json())
                    .unwrap_or_default(),
            );
        }
        Output::Json => {
            let domains: Vec<Value> = statuses.iter().map(|(_, s)| s.json()).collect();
            out::object(json!({ "domains": domains }));
        }
        Output::Table => table(&statuses),
    }
    Ok(ExitCode::Done)
}

fn status(domain: &Domain<'_>) -> Result<(String, Status)> {
    Ok((domain.label(), service::status(domain)?))
}

fn all(session: &Session, host: &Host) -> Result<Vec<(String, Status)>> {
    let mut found = Vec::new();
    for info in host.control.domains(DomId(1))? {
        let domain = Domain::of(&host.control, &host.store, info)?;
        match status(&domain) {
            Ok(status) => found.push(status),
            // A guest this tool can't read has no patches of ours; `list` says why.
            Err(error) => session.say(1, format!("{}: {error}", domain.label())),
        }
    }
    Ok(found)
}

fn table(statuses: &[(String, Status)]) {
    let mut rows = Vec::new();
    for (label, status) in statuses {
        for patch in &status.patches {
            let functions: Vec<&str> = patch.functions.iter().map(|f| f.name.as_str()).collect();
            rows.push([
                label.clone(),
                patch.name.clone(),
                patch.state.into(),
                functions.join(","),
                if patch.cves.is_empty() {
                    "-".into()
                } else {
                    patch.cves.join(",")
                },
            ]);
        }
    }
    if rows.is_empty() {
        for (label, _) in statuses {
            out::line(&format!("{label}: no patches"));
        }
        return;
    }
    out::table(["Domain", "Patch", "State", "Functions", "CVEs"], &rows);
}

impl Status {
    fn json(&self) -> Value {
        let patches: Vec<Value> = self
            .patches
            .iter()
            .map(|p| {
                let functions: Vec<Value> = p
                    .functions
                    .iter()
                    .map(|f| {
                        json!({
                            "name": f.name,
                            "object": f.object,
                            "old": out::address(f.old),
                            "new": out::address(f.new),
                        })
                    })
                    .collect();
                json!({
                    "name": p.name,
                    "state": p.state,
                    "sha256": p.sha256,
                    "applied_at": p.applied_at,
                    "cves": p.cves,
                    "functions": functions,
                })
            })
            .collect();
        json!({ "domid": self.domid.0, "uuid": self.uuid, "kernel": self.kernel, "patches": patches })
    }
}
