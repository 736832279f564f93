//! `xen-locus info DOMAIN`: who a guest's kernel is, from its memory alone, or from a saved core.

mod symbols;

use serde_json::json;

use super::args::{self, Output};
use super::subject::{self, Subject};
use super::{out, Session};
use crate::error::{Error, ExitCode};
use crate::kernel::tasks::Layout;
use crate::kernel::Kernel;
use crate::link::arena::{self, Arena};
use crate::link::record::hex;

/// Runs the command.
///
/// # Errors
/// No such guest, or its kernel can't be read.
pub fn run(session: &Session, args: &args::Info) -> anyhow::Result<ExitCode> {
    subject::with_kernel(&args.whom, |subject, kernel| {
        if let Some(pattern) = &args.what.symbols {
            symbols::show(session, subject, kernel, pattern);
        } else {
            summary(session, subject, kernel)?;
        }
        Ok(ExitCode::Done)
    })
    .map_err(Into::into)
}

fn summary(session: &Session, subject: &Subject, kernel: &Kernel<'_>) -> Result<(), Error> {
    let btf_types = kernel.btf()?.len();
    let tasks = Layout::of(kernel)?
        .all(kernel, &kernel.space.fresh())?
        .len();
    let build_id = kernel.build_id.as_deref().map(hex).unwrap_or_default();
    let (room, used) = Arena::read(kernel)?.room(kernel.kind);
    let modules = kernel.module_count()?;
    match session.output {
        Output::Json => out::object(subject.object(json!({
            "uuid": subject.uuid,
            "type": kernel.kind,
            "kernel": kernel.release,
            "build_id": build_id,
            "text_base": out::address(kernel.text_base.0),
            "kaslr_offset": out::address(kernel.kaslr_offset()),
            "symbols": kernel.symbols.len(),
            "btf_types": btf_types,
            "orc_entries": kernel.orc_entries(),
            "modules": modules,
            "tasks": tasks,
            "vcpus": subject.vcpus,
            "arena": {
                "base": out::address(arena::BASE.0),
                "pages": room,
                "used": used,
            },
        }))),
        Output::Table => {
            for (what, value) in [
                (
                    if subject.core.is_some() {
                        "core"
                    } else {
                        "domain"
                    },
                    subject.label(),
                ),
                ("uuid", subject.uuid.clone().unwrap_or_default()),
                ("type", kernel.kind.to_string()),
                ("kernel", kernel.release.clone()),
                ("build-id", build_id),
                ("text base", kernel.text_base.to_string()),
                ("KASLR offset", format!("{:#x}", kernel.kaslr_offset())),
                ("symbols", kernel.symbols.len().to_string()),
                ("BTF types", btf_types.to_string()),
                ("ORC entries", kernel.orc_entries().to_string()),
                ("modules", modules.to_string()),
                ("tasks", tasks.to_string()),
                ("vCPUs", subject.vcpus.to_string()),
                (
                    "arena",
                    format!("{} pages at {}, {used} in use", room, arena::BASE),
                ),
            ] {
                if !value.is_empty() {
                    out::line(&format!("{what:<13} {value}"));
                }
            }
        }
    }
    Ok(())
}
