//! `info --modules`: the modules that are loaded.

use locus_kernel::modules::{Module, ModuleReader};
use locus_kernel::Kernel;
use serde_json::{json, Value};

use super::super::{out, Session};
use crate::cli::args::Output;
use crate::cli::guest::Guest;
use crate::error::Error;

/// Shows all modules, in the order of `/proc/modules`.
///
/// # Errors
/// The list or a module can't be read.
pub fn show(session: &Session, guest: &Guest, kernel: &Kernel<'_>) -> Result<(), Error> {
    let mut reader = ModuleReader::new(kernel)?;
    match session.output {
        Output::Table => {
            let rows: Vec<_> = reader.all()?.iter().map(row).collect();
            out::table(
                [
                    "MODULE", "SIZE", "REFS", "USED BY", "STATE", "ADDRESS", "TAINTS", "BUILD-ID",
                ],
                &rows,
            );
        }
        Output::Json => {
            let all = reader.each(|reader, module| {
                let symbols = reader.symbols(module)?.len();
                let types = reader.btf(module)?.map(|btf| btf.len());
                Ok(entry(module, symbols, types))
            })?;
            out::object(guest.object(json!({
                "module_list": all,
            })));
        }
    }
    Ok(())
}

fn dash(text: String) -> String {
    match text.is_empty() {
        true => "-".into(),
        false => text,
    }
}

fn row(m: &Module) -> [String; 8] {
    let mut users = m.used_by.clone();
    if m.permanent {
        users.push("[permanent]".into());
    }
    [
        m.name.clone(),
        m.size.to_string(),
        m.refcount.map_or_else(|| "-".into(), |n| n.to_string()),
        dash(users.join(",")),
        m.state.name().to_owned(),
        m.base.to_string(),
        dash(m.taints.clone()),
        dash(m.build_id.as_deref().map(hex::encode).unwrap_or_default()),
    ]
}

fn entry(m: &Module, symbols: usize, types: Option<usize>) -> Value {
    json!({
        "name": m.name,
        "size": m.size,
        "refcount": m.refcount,
        "used_by": m.used_by,
        "permanent": m.permanent,
        "state": m.state,
        "address": out::address(m.base.0),
        "ranges": m.parts.iter().map(|p| json!({
            "kind": p.kind,
            "start": out::address(p.range.start.0),
            "size": p.range.len(),
        })).collect::<Vec<_>>(),
        "taints": m.taints,
        "build_id": m.build_id.as_deref().map(hex::encode),
        "symbols": symbols,
        "btf_types": types,
    })
}
