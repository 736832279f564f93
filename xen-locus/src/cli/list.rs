//! `xen-locus list`: domains, their kernels and whether they can be patched.

use serde_json::{json, Value};

use super::args::Output;
use super::{out, Host, Session};
use crate::addr::DomId;
use crate::domain::Domain;
use crate::error::{ExitCode, Result};
use crate::kernel::Kernel;
use crate::link::arena::Arena;
use crate::link::record::{hex, State};
use crate::plan;

/// One domain in the list.
#[derive(Debug)]
struct Row {
    domid: DomId,
    name: String,
    kind: String,
    kernel: String,
    build_id: String,
    patches: usize,
    status: &'static str,
    reason: String,
}

/// Runs the command.
///
/// # Errors
/// Xen can't be asked.
pub fn run(session: &Session, host: &Host) -> anyhow::Result<ExitCode> {
    let mut rows = Vec::new();
    for info in host
        .control
        .domains(DomId(0))
        .map_err(crate::error::Error::from)?
    {
        rows.push(match Domain::of(&host.control, &host.store, info.clone()) {
            Ok(domain) => row(&domain),
            Err(error) => Row {
                name: host.store.domain_name(info.id).unwrap_or_default(),
                ..unsupported(info.id, &info.kind.to_string(), error.to_string())
            },
        });
    }
    match session.output {
        Output::Json => {
            let domains: Vec<Value> = rows.iter().map(Row::json).collect();
            out::object(json!({ "domains": domains }));
        }
        Output::Table => {
            let rows: Vec<[String; 6]> = rows.iter().map(Row::cells).collect();
            out::table(["Name", "ID", "Type", "Kernel", "Patches", "Status"], &rows);
        }
    }
    Ok(ExitCode::Done)
}

fn unsupported(domid: DomId, kind: &str, reason: String) -> Row {
    Row {
        domid,
        name: String::new(),
        kind: kind.into(),
        kernel: String::new(),
        build_id: String::new(),
        patches: 0,
        status: "unsupported",
        reason,
    }
}

fn row(domain: &Domain<'_>) -> Row {
    let info = &domain.info;
    let mut row = Row {
        name: domain.name.clone(),
        ..unsupported(info.id, &info.kind.to_string(), String::new())
    };
    if info.id == DomId(0) {
        row.reason = "the control domain itself".into();
        return row;
    }
    if info.dying || info.shutdown {
        row.reason = "it has shut down".into();
        return row;
    }
    match examine(domain, &mut row) {
        Ok(patches) => {
            row.patches = patches;
            row.status = if patches == 0 { "ready" } else { "patched" };
        }
        Err(error) => row.reason = error.to_string(),
    }
    row
}

fn examine(domain: &Domain<'_>, row: &mut Row) -> Result<usize> {
    let kernel = Kernel::of(domain)?;
    row.kernel = kernel.release.clone();
    row.build_id = kernel.build_id.as_deref().map(hex).unwrap_or_default();
    let residents = plan::residents(&kernel, &Arena::read(&kernel)?)?;
    Ok(residents
        .iter()
        .filter(|r| r.slot.state == State::Applied)
        .count())
}

impl Row {
    fn json(&self) -> Value {
        json!({
            "domid": self.domid.0,
            "name": self.name,
            "type": self.kind,
            "kernel": self.kernel,
            "build_id": self.build_id,
            "patches": self.patches,
            "status": self.status,
            "reason": self.reason,
        })
    }

    fn cells(&self) -> [String; 6] {
        let or_dash = |s: &str| {
            if s.is_empty() {
                "-".to_owned()
            } else {
                s.to_owned()
            }
        };
        let status = if self.reason.is_empty() {
            self.status.to_owned()
        } else {
            format!("{}: {}", self.status, self.reason)
        };
        [
            or_dash(&self.name),
            self.domid.to_string(),
            self.kind.clone(),
            or_dash(&self.kernel),
            self.patches.to_string(),
            status,
        ]
    }
}
