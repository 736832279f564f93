//! The short form of `info`: what kernel a guest runs, and how much of it was found.

use locus_kernel::cpu::Cpu;
use locus_kernel::orc::OrcTable;
use locus_kernel::vmcoreinfo::VmcoreInfo;
use locus_kernel::{self as kernel, Kernel};
use serde_json::{json, Map, Value};

use super::super::args::Output;
use super::super::guest::Guest;
use super::super::{out, Session};
use crate::arena::{self, Arena, Usage};
use crate::error::Error;
use crate::ops;
use crate::plan;
use crate::say;

/// What is shown of a kernel.
struct Summary {
    build_id: String,
    kaslr: u64,
    btf_types: usize,
    orc_entries: usize,
    orc_format: Option<String>,
    modules: usize,
    tasks: usize,
    levels: u8,
    pti: Option<bool>,
    cpu: Option<Cpu>,
    vmcoreinfo: Option<VmcoreInfo>,
    /// Lines of VMCOREINFO that were compared and agree.
    agreed: usize,
    /// How full the arena is, or why that is not known.
    arena: Result<Usage, String>,
    /// Names of the payloads in it that a newer xen-locus applied.
    newer: Vec<String>,
}

/// Shows it.
///
/// # Errors
/// The kernel can't be read.
pub fn show(session: &Session, guest: &Guest, kernel: &Kernel<'_>) -> Result<(), Error> {
    let summary = Summary::of(guest, kernel)?;
    match session.output {
        Output::Json => out::object(summary.json(guest, kernel)),
        Output::Table => summary.lines(guest, kernel),
    }
    Ok(())
}

impl Summary {
    fn of(guest: &Guest, kernel: &Kernel<'_>) -> Result<Summary, Error> {
        let orc = optional(OrcTable::of(kernel))?;
        let cpu = optional(Cpu::read(kernel))?;
        let vmcoreinfo = VmcoreInfo::read(kernel)?;
        let agreed = match &vmcoreinfo {
            Some(info) => info.check(kernel)?,
            None => 0,
        };
        let kaslr = vmcoreinfo.as_ref().and_then(VmcoreInfo::kernel_offset);
        let build_id = kernel.build_id.as_deref().map(hex::encode);
        let mut newer = Vec::new();
        let arena = match Arena::read(kernel) {
            Ok(arena) => {
                // What else is wrong with records is for `status` and `verify`.
                let contents = arena.contents(kernel).unwrap_or_default();
                let left = plan::nudge_left(&contents.gates);
                ops::warn_of_nudge(&guest.label(), left.as_deref());
                newer = contents.newer.into_iter().map(|n| n.name).collect();
                Ok(arena.usage(kernel.kind))
            }
            // `xl dump-core` leaves out the highest frames of some guests.
            Err(error)
                if guest.core.is_some() || error.is_newer_format() || error.is_arena_lost() =>
            {
                Err(error.to_string())
            }
            Err(error) => return Err(error),
        };
        Ok(Summary {
            build_id: build_id.unwrap_or_default(),
            kaslr: kaslr.unwrap_or_else(|| kernel.kaslr_offset()),
            btf_types: kernel.btf()?.len(),
            orc_entries: orc.as_ref().map_or(0, OrcTable::len),
            orc_format: orc.map(|table| table.format().to_string()),
            modules: kernel.module_count()?,
            tasks: kernel::tasks::count(kernel)?,
            levels: kernel.space.levels(),
            pti: cpu.as_ref().map(Cpu::pti),
            cpu,
            vmcoreinfo,
            agreed,
            arena,
            newer,
        })
    }

    fn json(&self, guest: &Guest, kernel: &Kernel<'_>) -> Value {
        guest.object(json!({
            "uuid": guest.uuid,
            "type": kernel.kind,
            "kernel": kernel.release,
            "build_id": self.build_id,
            "text_base": out::address(kernel.text_base.0),
            "kaslr_offset": out::address(self.kaslr),
            "symbols": kernel.symbols.len(),
            "btf_types": self.btf_types,
            "orc_entries": self.orc_entries,
            "orc": { "entries": self.orc_entries, "format": self.orc_format },
            "modules": self.modules,
            "tasks": self.tasks,
            "vcpus": guest.vcpus,
            "levels": self.levels,
            "pti": self.pti,
            "cpu": self.cpu.as_ref().map(|cpu| json!({
                "features": cpu.features(),
                "bugs": cpu.bugs(),
                "mitigations": cpu.mitigations(),
                "return_thunk": cpu.return_thunk().map(|at| out::address(at.0)),
            })),
            "vmcoreinfo": self.vmcoreinfo.as_ref().map(|info| {
                info.iter()
                    .map(|(key, value)| (key.to_owned(), value.into()))
                    .collect::<Map<String, Value>>()
            }),
            "arena": self.arena.as_ref().ok().map(|usage| json!({
                "base": out::address(arena::BASE.0),
                "pages": usage.pages,
                "used": usage.used,
                "parked": usage.parked,
                "free": usage.free,
            })),
        }))
    }

    fn lines(&self, guest: &Guest, kernel: &Kernel<'_>) {
        let what = match guest.core {
            Some(_) => "core",
            None => "domain",
        };
        let rows = [
            (what, guest.label()),
            ("uuid", guest.uuid.clone().unwrap_or_default()),
            ("type", kernel.kind.to_string()),
            ("kernel", kernel.release.clone()),
            ("build-id", self.build_id.clone()),
            ("text base", kernel.text_base.to_string()),
            ("KASLR offset", format!("{:#x}", self.kaslr)),
            ("symbols", kernel.symbols.len().to_string()),
            ("BTF types", self.btf_types.to_string()),
            (
                "ORC entries",
                orc_value(self.orc_entries, self.orc_format.as_deref()),
            ),
            ("modules", self.modules.to_string()),
            ("tasks", self.tasks.to_string()),
            ("vCPUs", guest.vcpus.to_string()),
            ("paging", paging_value(self.levels, self.pti)),
            (
                "vmcoreinfo",
                vmcoreinfo_value(self.vmcoreinfo.as_ref(), self.agreed),
            ),
            ("arena", self.arena_value()),
        ];
        let cpu = self.cpu.iter().flat_map(cpu_lines);
        for (what, value) in rows.into_iter().filter(|(_, v)| !v.is_empty()).chain(cpu) {
            out::line(&format!("{what:<13} {value}"));
        }
    }

    fn arena_value(&self) -> String {
        match &self.arena {
            Err(why) => format!("not known: {why}"),
            Ok(usage) => {
                let pages = say::count(usage.pages, "page", "pages");
                let parked = match usage.parked {
                    0 => String::new(),
                    parked => format!(", {parked} of them by reverted payloads"),
                };
                let newer = match self.newer.is_empty() {
                    true => String::new(),
                    false => format!("; unknown (newer xen-locus): {}", self.newer.join(", ")),
                };
                let base = arena::BASE;
                format!("{pages} at {base}, {} in use{parked}{newer}", usage.used)
            }
        }
    }
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
                say::count(info.iter().count(), "line", "lines")
            )
        },
    )
}
