//! The guest that payloads are tried on.

use serde_json::Value;

use crate::guest::{Guest, GuestSpec, Kind};
use crate::payloads::Which;
use crate::scenario::Ctx;
use crate::scenarios::steps::guest_log::Log;
use crate::scenarios::steps::{patches, tool};
use crate::suites::{Suite, BOOKWORM};
use crate::verdict::Verdict;
use crate::{check, check_eq};

/// Files whose content payloads change.
const FILES: &str = "/proc/cmdline /proc/version /proc/sys/kernel/ostype";

/// Pages of the arena that one behaviour may need.
const ROOM: u64 = 80;

/// A guest, and the payloads for its kernel.
#[derive(Debug)]
pub struct Subject<'a> {
    /// The machine.
    pub ctx: &'a Ctx,
    /// The guest.
    pub guest: Guest,
    /// Its type.
    pub kind: Kind,
    /// The release of Debian whose kernel it runs.
    pub suite: &'static Suite,
    /// What its kernel says.
    pub log: Log,
}

impl<'a> Subject<'a> {
    /// Name of the guest for such subjects.
    pub fn guest_name(kind: Kind, suite: &Suite) -> String {
        format!("loader-{}-{}", suite.name, kind.name())
    }

    /// A guest with at least [`ROOM`] pages of its arena free. A payload that was reverted keeps its
    /// own pages, so the guest is started again if many payloads were tried.
    pub fn with_room(ctx: &'a mut Ctx, kind: Kind, suite: &'static Suite) -> Result<Self, Verdict> {
        Self::with_payloads(ctx, kind, suite, Which::All)
    }

    /// The same, with these payloads.
    pub fn with_payloads(
        ctx: &'a mut Ctx,
        kind: Kind,
        suite: &'static Suite,
        which: Which,
    ) -> Result<Self, Verdict> {
        let name = Self::guest_name(kind, suite);
        let spec = GuestSpec::new(&name, kind).suite(suite).memory(256);
        let before = ctx.guest(&name).ok().map(|guest| guest.domid);
        let mut guest = ctx.ensure_guest(spec.clone())?;
        let (total, used) = arena(ctx, &guest)?;
        if total < used + ROOM {
            ctx.destroy_guest(&name)?;
            guest = ctx.ensure_guest(spec)?;
        }
        let fresh = before != Some(guest.domid);
        if fresh && *suite != BOOKWORM {
            for (name, file) in ctx.kernels.payloads(suite, which)? {
                let path = patches::file_for(suite, &name);
                ctx.dom0.put(&path, 0o644, &std::fs::read(file)?)?;
            }
        }
        if fresh {
            guest.ok("mkdir -p /run/trace /run/debug; \
                mount -t tracefs t /run/trace; mount -t debugfs d /run/debug")?;
        }
        let log = Log::begin(ctx, &guest)?;
        Ok(Self {
            ctx,
            guest,
            kind,
            suite,
            log,
        })
    }

    /// Writes a line to the transcript.
    pub fn note(&self, text: &str) {
        self.ctx.dom0.note(text);
    }

    /// The payload's file in dom0.
    pub fn file(&self, name: &str) -> String {
        patches::file_for(self.suite, name)
    }

    /// Applies a payload.
    pub fn apply(&self, name: &str) -> Result<Value, Verdict> {
        self.apply_file(&self.file(name))
    }

    /// Applies the payload in a file of dom0.
    pub fn apply_file(&self, file: &str) -> Result<Value, Verdict> {
        tool::apply_json(self.ctx, &self.guest, file, "applied")
    }

    /// The first function that the payload replaces but the guest's kernel does not have.
    pub fn lacks(&self, name: &str) -> Result<Option<String>, Verdict> {
        let file = self.file(name);
        let shown = self.ctx.json(&format!("xen-locus -o json show {file}"))?;
        let functions = shown["objects"][0]["functions"].as_array();
        let names: Vec<&str> = functions
            .into_iter()
            .flatten()
            .filter_map(|f| f["old"].as_str())
            .collect();
        check!(!names.is_empty(), "it replaces nothing: {shown}");
        let missing = self.guest.ok(&format!(
            "printf '%s\\n' {} | awk 'NR == FNR {{k[$3]; next}} !($1 in k) {{print; exit}}' /proc/kallsyms -",
            names.join(" ")
        ))?;
        Ok(Some(missing.trim().to_owned()).filter(|m| !m.is_empty()))
    }

    /// Whether the guest's kernel has several functions `control_show`, as most have.
    pub fn has_namesakes(&self) -> Result<bool, Verdict> {
        let count = self.guest.sh("grep -c ' control_show$' /proc/kallsyms")?;
        Ok(count.text().trim() != "1")
    }

    /// Reverts a patch.
    pub fn revert(&self, name: &str) -> Result<(), Verdict> {
        tool::revert_json(self.ctx, &self.guest, name)
    }

    /// Names of the patches in force.
    pub fn applied(&self) -> Result<Vec<String>, Verdict> {
        tool::listed(self.ctx, &self.guest.name)
    }

    /// Reverts all patches in force, the newest first.
    pub fn revert_all(&self) -> Result<(), Verdict> {
        for name in self.applied()?.iter().rev() {
            self.revert(name)?;
        }
        Ok(())
    }

    /// Pages of the arena in use, parked patches included.
    pub fn arena_used(&self) -> Result<u64, Verdict> {
        Ok(arena(self.ctx, &self.guest)?.1)
    }

    /// The content of a file of the guest.
    pub fn read(&self, file: &str) -> Result<String, Verdict> {
        self.guest.ok(&format!("cat {file}"))
    }

    /// The content of [`FILES`].
    pub fn texts(&self) -> Result<String, Verdict> {
        self.read(FILES)
    }

    /// Reads a file in which each line must end with `: ok` or have the form `name=value`. Returns its content.
    pub fn all_ok(&self, file: &str) -> Result<String, Verdict> {
        let text = self.read(file)?;
        let wrong: Vec<&str> = text
            .lines()
            .filter(|line| !line.ends_with(": ok") && !line.contains('='))
            .collect();
        check!(
            wrong.is_empty() && text.contains(": ok"),
            "{file} of the patched guest: {}",
            if wrong.is_empty() {
                text
            } else {
                wrong.join("; ")
            }
        );
        Ok(text)
    }

    /// Applies a payload, reads its file of `/proc` twice, which must say ok, and reverts it.
    pub fn comes_and_goes(&self, name: &str) -> Result<(), Verdict> {
        let before = self.read("/proc/cmdline")?;
        self.apply(name)?;
        for _ in 0..2 {
            self.all_ok("/proc/cmdline")?;
        }
        self.revert(name)?;
        check_eq!(self.read("/proc/cmdline")?, before, "/proc/cmdline");
        Ok(())
    }

    /// Checks that applying this file ends with 3 (not applicable), says all of `words`, and changes nothing.
    pub fn refused(&self, file: &str, words: &[&str]) -> Result<(), Verdict> {
        self.unchanged_by(file, || self.refused_with(file, words))
    }

    /// Checks that something changes neither the guest's files nor its arena.
    pub fn unchanged_by<T>(
        &self,
        what: &str,
        act: impl FnOnce() -> Result<T, Verdict>,
    ) -> Result<T, Verdict> {
        let used = self.arena_used()?;
        let before = self.texts()?;
        let done = act()?;
        check_eq!(self.texts()?, before, "the guest's files after {what}");
        check_eq!(self.arena_used()?, used, "pages in use after {what}");
        Ok(done)
    }

    /// Checks that applying this file ends with 3 (not applicable) and says all of `words`.
    pub fn refused_with(&self, file: &str, words: &[&str]) -> Result<(), Verdict> {
        let cmd = format!("xen-locus apply {} {file}", self.guest.name);
        let out = self.ctx.dom0.sh(&cmd)?;
        let said = out.err_text();
        check_eq!(out.rc, 3, "exit code of `{cmd}` ({said})");
        let lower = said.to_lowercase();
        for word in words {
            check!(
                lower.contains(&word.to_lowercase()),
                "`{cmd}` does not say {word:?}: {said}"
            );
        }
        Ok(())
    }
}

/// The number of pages of the arena, and how many of them are in use.
fn arena(ctx: &Ctx, guest: &Guest) -> Result<(u64, u64), Verdict> {
    let info = tool::info(ctx, &guest.name, "")?;
    let number = |key: &str| info["arena"][key].as_u64();
    match (number("pages"), number("used")) {
        (Some(pages), Some(used)) => Ok((pages, used)),
        _ => Err(Verdict::failure(format!(
            "info says nothing of the arena: {info}"
        ))),
    }
}
