#![doc = include_str!("manual/list.md")]

use std::path::Path;

use locus_guest::addr::DomId;
use locus_guest::core::Core;
use locus_guest::GuestType;
use locus_kernel::Kernel;
use serde_json::{json, Value};

use super::args::Output;
use super::guest::Guest;
use super::{out, Session};
use crate::arena::record::State;
use crate::arena::{Arena, Contents};
use crate::domain::Domain;
use crate::error::{Error, ExitCode, Result};
use crate::machine;
use crate::ops;
use crate::ops::host::Host;
use crate::plan;

/// One domain in the list.
#[derive(Debug)]
struct Row {
    guest: Guest,
    kind: String,
    kernel: String,
    build_id: String,
    patches: usize,
    status: &'static str,
    reason: String,
}

/// Runs the command: lists the guest in a core, or all domains.
///
/// # Errors
/// Xen or XenStore can't be opened, or the core can't be read.
pub fn run(session: &Session, core: Option<&Path>) -> anyhow::Result<ExitCode> {
    let rows = match core {
        Some(path) => vec![row_of_core(&Core::open(path).map_err(Error::from)?)],
        None => rows_of_domains(&session.host()?)?,
    };
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

fn rows_of_domains(host: &Host) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for info in host.control.domains(DomId(0))? {
        let kind = info.kind;
        rows.push(match host.domain(info.clone()) {
            Ok(domain) => row(&domain),
            Err(error) => {
                let guest = Guest {
                    domid: Some(info.id),
                    name: host.store.domain_name(info.id).unwrap_or_default(),
                    uuid: Some(info.uuid),
                    vcpus: info.vcpus,
                    core: None,
                    registers: Vec::new(),
                };
                unsupported(guest, kind, error.to_string())
            }
        });
    }
    Ok(rows)
}

fn unsupported(guest: Guest, kind: GuestType, reason: String) -> Row {
    Row {
        guest,
        kind: kind.to_string(),
        kernel: String::new(),
        build_id: String::new(),
        patches: 0,
        status: "unsupported",
        reason,
    }
}

fn row(domain: &Domain<'_>) -> Row {
    let info = &domain.info;
    let no = |why: &str| unsupported(Guest::of(domain), info.kind, why.into());
    if info.id == DomId(0) {
        return no("the control domain itself");
    }
    if info.dying || info.shutdown {
        return no("it has shut down");
    }
    match machine::kernel_of(domain) {
        Ok(kernel) => {
            let mut row = row_of_kernel(Guest::of(domain), &kernel);
            if let Err(error) = domain.check_uuid() {
                (row.status, row.reason) = ("unsupported", error.to_string());
            }
            row
        }
        Err(error) => no(&error.to_string()),
    }
}

fn row_of_core(core: &Core) -> Row {
    let guest = Guest::of_core(core);
    match Kernel::of_saved(core, core.kind(), core.vcpus()) {
        Ok(kernel) => row_of_kernel(guest, &kernel),
        Err(error) => unsupported(guest, core.kind(), error.to_string()),
    }
}

fn row_of_kernel(guest: Guest, kernel: &Kernel<'_>) -> Row {
    let mut row = Row {
        kernel: kernel.release.clone(),
        build_id: kernel
            .build_id
            .as_deref()
            .map(hex::encode)
            .unwrap_or_default(),
        ..unsupported(guest, kernel.kind, String::new())
    };
    let contents = Arena::read(kernel).and_then(|arena| plan::contents(kernel, &arena));
    match contents {
        Ok(Contents {
            residents,
            gates,
            newer,
        }) => {
            ops::warn_of_nudge(&row.guest.label(), plan::nudge_left(&gates).as_deref());
            let slots = residents.iter().map(|r| &r.slot);
            let slots = slots.chain(newer.iter().map(|n| &n.slot));
            row.patches = slots.filter(|s| s.state == State::Applied).count();
            if row.patches > 0 {
                row.status = "patched";
            } else if newer.is_empty() {
                row.status = "ready";
            }
            if let Some(newer) = newer.first() {
                row.reason = newer.refusal().to_string();
            }
        }
        Err(error) => row.reason = error.to_string(),
    }
    row
}

impl Row {
    fn json(&self) -> Value {
        self.guest.object(json!({
            "type": self.kind,
            "kernel": self.kernel,
            "build_id": self.build_id,
            "patches": self.patches,
            "status": self.status,
            "reason": self.reason,
        }))
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
            or_dash(&self.guest.name),
            self.guest
                .domid
                .map_or_else(|| "-".to_owned(), |id| id.to_string()),
            self.kind.clone(),
            or_dash(&self.kernel),
            self.patches.to_string(),
            status,
        ]
    }
}
