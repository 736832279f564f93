#![doc = include_str!("../manual/info.md")]

mod modules;
mod raw;
pub(super) mod stacks;
mod symbols;
mod tasks;
mod types;

use locus_guest::budget::LIMIT;
use locus_kernel::cpu::Cpu;
use locus_kernel::orc::OrcTable;
use locus_kernel::vmcoreinfo::VmcoreInfo;
use locus_kernel::{self as kernel, Kernel};
use serde_json::{json, Map, Value};

use super::args::{self, Output};
use super::guest::{self, Guest};
use super::{out, Session};
use crate::arena::{self, Arena};
use crate::error::{Error, ExitCode};

/// Runs the command.
///
/// # Errors
/// No such guest, or its kernel can't be read.
pub fn run(session: &Session, args: &args::Info) -> anyhow::Result<ExitCode> {
    guest::with_kernel(session, &args.guest, |guest, kernel| {
        if let Some(pattern) = &args.view.symbols {
            symbols::show(session, guest, kernel, pattern)?;
        } else if args.view.tasks {
            tasks::show(session, guest, kernel)?;
        } else if args.view.stacks {
            stacks::show(session, guest, kernel)?;
        } else if args.view.modules {
            modules::show(session, guest, kernel)?;
        } else if let Some(name) = &args.view.type_name {
            types::show(session, guest, kernel, name)?;
        } else if let Some(what) = &args.view.raw {
            raw::show(kernel, what)?;
        } else {
            summary(session, guest, kernel)?;
        }
        session.say(1, cost(session, kernel));
        Ok(ExitCode::Done)
    })
    .map_err(Into::into)
}

/// What reading the guest has cost so far.
fn cost(session: &Session, kernel: &Kernel<'_>) -> String {
    let budget = kernel.space.budget();
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let peak = status.lines().find_map(|l| l.strip_prefix("VmHWM:"));
    format!(
        "read {} KiB of guest memory in {} us, {}% of what reading a guest may cost; peak memory {}",
        budget.copied() / 1024,
        session.began.elapsed().as_micros(),
        budget.spent() * 100 / LIMIT,
        peak.map_or("not known", str::trim),
    )
}

fn summary(session: &Session, guest: &Guest, kernel: &Kernel<'_>) -> Result<(), Error> {
    let btf_types = kernel.btf()?.len();
    let tasks = kernel::tasks::count(kernel)?;
    let orc = optional(OrcTable::of(kernel))?;
    let entries = orc.as_ref().map_or(0, OrcTable::len);
    let format = orc.map(|table| table.format().to_string());
    let cpu = optional(Cpu::read(kernel))?;
    let pti = cpu.as_ref().map(Cpu::pti);
    let levels = kernel.space.levels();
    let vmcoreinfo = VmcoreInfo::read(kernel)?;
    let agreed = match &vmcoreinfo {
        Some(info) => info.check(kernel)?,
        None => 0,
    };
    let kaslr = vmcoreinfo.as_ref().and_then(VmcoreInfo::kernel_offset);
    let kaslr = kaslr.unwrap_or_else(|| kernel.kaslr_offset());
    let build_id = kernel
        .build_id
        .as_deref()
        .map(hex::encode)
        .unwrap_or_default();
    let arena = match Arena::read(kernel) {
        Ok(arena) => Ok(arena.room(kernel.kind)),
        // `xl dump-core` leaves out the highest frames of some guests.
        Err(error) if guest.core.is_some() => Err(error.to_string()),
        Err(error) => return Err(error),
    };
    let modules = kernel.module_count()?;
    match session.output {
        Output::Json => out::object(guest.object(json!({
            "uuid": guest.uuid,
            "type": kernel.kind,
            "kernel": kernel.release,
            "build_id": build_id,
            "text_base": out::address(kernel.text_base.0),
            "kaslr_offset": out::address(kaslr),
            "symbols": kernel.symbols.len(),
            "btf_types": btf_types,
            "orc_entries": entries,
            "orc": { "entries": entries, "format": format },
            "modules": modules,
            "tasks": tasks,
            "vcpus": guest.vcpus,
            "levels": levels,
            "pti": pti,
            "cpu": cpu.map(|cpu| json!({
                "features": cpu.features(),
                "bugs": cpu.bugs(),
                "mitigations": cpu.mitigations(),
                "return_thunk": cpu.return_thunk().map(|at| out::address(at.0)),
            })),
            "vmcoreinfo": vmcoreinfo.map(|info| {
                info.iter()
                    .map(|(key, value)| (key.to_owned(), value.into()))
                    .collect::<Map<String, Value>>()
            }),
            "arena": arena.as_ref().ok().map(|(room, used)| json!({
                "base": out::address(arena::BASE.0),
                "pages": room,
                "used": used,
            })),
        }))),
        Output::Table => {
            for (what, value) in [
                (
                    if guest.core.is_some() {
                        "core"
                    } else {
                        "domain"
                    },
                    guest.label(),
                ),
                ("uuid", guest.uuid.clone().unwrap_or_default()),
                ("type", kernel.kind.to_string()),
                ("kernel", kernel.release.clone()),
                ("build-id", build_id),
                ("text base", kernel.text_base.to_string()),
                ("KASLR offset", format!("{kaslr:#x}")),
                ("symbols", kernel.symbols.len().to_string()),
                ("BTF types", btf_types.to_string()),
                ("ORC entries", orc_value(entries, format.as_deref())),
                ("modules", modules.to_string()),
                ("tasks", tasks.to_string()),
                ("vCPUs", guest.vcpus.to_string()),
                ("paging", paging_value(levels, pti)),
                ("vmcoreinfo", vmcoreinfo_value(vmcoreinfo.as_ref(), agreed)),
                (
                    "arena",
                    arena.map_or_else(
                        |why| format!("not known: {why}"),
                        |(room, used)| {
                            let pages = out::count(room, "page", "pages");
                            format!("{pages} at {}, {used} in use", arena::BASE)
                        },
                    ),
                ),
            ] {
                if !value.is_empty() {
                    out::line(&format!("{what:<13} {value}"));
                }
            }
            for (what, value) in cpu.iter().flat_map(cpu_lines) {
                out::line(&format!("{what:<13} {value}"));
            }
        }
    }
    Ok(())
}

/// What a kernel need not have: `None` if it is missing.
fn optional<T>(read: Result<T, kernel::Error>) -> Result<Option<T>, kernel::Error> {
    match read {
        Ok(value) => Ok(Some(value)),
        Err(kernel::Error::Missing(_)) => Ok(None),
        Err(error) => Err(error),
    }
}

fn orc_value(entries: usize, format: Option<&str>) -> String {
    match format {
        Some(format) => format!("{entries}, format {format}"),
        None => "none".into(),
    }
}

fn paging_value(levels: u8, pti: Option<bool>) -> String {
    let isolation = match pti {
        Some(true) => ", page-table isolation on",
        Some(false) => ", page-table isolation off",
        None => "",
    };
    format!("{levels} levels{isolation}")
}

/// Lines about the processor: too long for a column of short values, so they come last.
fn cpu_lines(cpu: &Cpu) -> Vec<(&str, String)> {
    let mut lines = vec![
        ("CPU features", cpu.features().join(" ")),
        ("CPU bugs", cpu.bugs().join(" ")),
    ];
    let chosen = cpu.mitigations().iter();
    lines.extend(chosen.map(|(what, name)| ("mitigation", format!("{what} {name}"))));
    lines
}

fn vmcoreinfo_value(info: Option<&VmcoreInfo>, agreed: usize) -> String {
    info.map_or_else(
        || "none".into(),
        |info| {
            format!(
                "{}, {agreed} of them compared and agreeing",
                out::count(info.iter().count(), "line", "lines")
            )
        },
    )
}
