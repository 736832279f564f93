//! Compares what a guest's memory shows of its patches with what their records say: redirects and what
//! stands before them, the arena's page-table entries, the payloads' code and constants, and whether
//! the guest still knows them as modules.
//!
//! Only reads, and mends nothing. What a guest does itself while it is looked at, such as switching a
//! static key, is not taken for a change: only what is seen twice counts.

use std::collections::HashSet;
use std::thread;
use std::time::Duration;

use locus_guest::addr::{Gva, Range, PAGE_SIZE};
use locus_guest::space::Space;
use locus_kernel::Kernel;

use crate::arena::digests::{self, BLOCK};
use crate::arena::record::{Function, State};
use crate::arena::{page_address, Arena, Resident, Rights};
use crate::error::Result;
use crate::link::module::links;
use crate::plan::{self, Stack};
use crate::storage::audit::Line;
use crate::target::conflicts::{self, Caller};
use crate::target::modules_present;
use crate::target::redirect::{self, Head};
use crate::x86::JUMP;

/// Looks at most, while each shows changes.
const LOOKS: u32 = 3;
/// Time between two looks: the kernel changes its code in less (`text_poke_bp`).
const BETWEEN: Duration = Duration::from_millis(50);

/// What is not as recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// The five bytes in a function that lead to its replacement.
    Redirect,
    /// What stands before them: ftrace's nop.
    Entry,
    /// A payload's code.
    Code,
    /// A payload's constants.
    Constants,
    /// A page-table entry of the arena.
    Page,
    /// The payload among the guest's modules.
    Module,
    /// The record that all else is compared with, by the audit log.
    Record,
}

/// Who changed it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Who {
    /// A tracer of the guest.
    Ftrace,
    /// A kprobe of the guest.
    Kprobe,
    /// A livepatch of the guest's own.
    Livepatch,
    /// A BPF program of the guest.
    Bpf,
    /// Nobody who says so: the guest, or somebody with access to its memory.
    Unknown,
}

impl What {
    /// As programs are told it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            What::Redirect => "redirect",
            What::Entry => "entry",
            What::Code => "code",
            What::Constants => "constants",
            What::Page => "page",
            What::Module => "module",
            What::Record => "record",
        }
    }
}

impl Who {
    /// As programs are told it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Who::Ftrace => "ftrace",
            Who::Kprobe => "kprobe",
            Who::Livepatch => "livepatch",
            Who::Bpf => "bpf",
            Who::Unknown => "unknown",
        }
    }
}

/// A difference.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Drift {
    /// Name of the patch.
    pub patch: String,
    /// What differs.
    pub what: What,
    /// Where it begins.
    pub at: Gva,
    /// The function, where it is about one.
    pub function: Option<String>,
    /// What is recorded.
    pub expected: String,
    /// What is there.
    pub found: String,
    /// Who did it.
    pub by: Who,
}

/// What was compared, and what differs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Patches in force.
    pub patches: usize,
    /// Patches that are undone, whose code stands there still.
    pub parked: usize,
    /// Places of redirects.
    pub redirects: usize,
    /// Pages of payloads.
    pub pages: usize,
    /// Patches in force of whose record the audit log knows nothing: they came with a guest that was
    /// moved or restored, or were forged.
    pub unconfirmed: Vec<String>,
    /// What differs.
    pub drift: Vec<Drift>,
}

/// What this host knows of a guest besides what its memory shows.
#[derive(Clone, Copy, Debug)]
pub struct Known<'a> {
    /// The audit log.
    pub log: &'a [Line],
    /// The guest's UUID.
    pub uuid: &'a str,
}

/// Compares a guest with the records of its patches, which stand in its own memory; and those with what
/// is known of them from elsewhere.
///
/// # Errors
/// The arena's directory or a record was changed, so there is nothing to compare with; the guest can't
/// be read; a run that was ended midway left it uncertain.
pub fn verify(kernel: &Kernel<'_>, known: Option<Known<'_>>) -> Result<Outcome> {
    let mut seen = look(kernel, known)?;
    for _ in 1..LOOKS {
        if seen.drift.is_empty() {
            break;
        }
        thread::sleep(BETWEEN);
        let mut again = look(kernel, known)?;
        again.drift.retain(|drift| seen.drift.contains(drift));
        seen = again;
    }
    Ok(seen)
}

/// The same, with one look.
///
/// # Errors
/// As [`verify`].
pub fn look(kernel: &Kernel<'_>, known: Option<Known<'_>>) -> Result<Outcome> {
    let arena = Arena::read(kernel)?;
    let residents = plan::residents(kernel, &arena)?;
    let stack = Stack::new(&residents);
    let mut look = Look {
        kernel,
        space: kernel.space.fresh(),
        drift: Vec::new(),
    };
    let mut outcome = Outcome {
        patches: stack.applied().len(),
        parked: residents.len() - stack.applied().len(),
        ..Outcome::default()
    };
    let mut sites = HashSet::new();
    // The newest first: of a function that several replaced, the newest's word counts.
    for patch in residents.iter().rev() {
        outcome.pages += usize::from(patch.slot.pages);
        look.pages(&arena, patch);
        look.code(patch)?;
        look.constants(patch)?;
        if look.module(patch)? {
            continue;
        }
        for function in &patch.record.functions {
            if sites.insert(function.site) {
                outcome.redirects += 1;
                look.redirect(&residents, &stack, patch, function)?;
            }
        }
    }
    if let Some(known) = known {
        outcome.unconfirmed = look.records(&residents, stack.applied(), known);
    }
    outcome.drift = look.drift;
    Ok(outcome)
}

/// What a look goes through.
struct Look<'a, 'm> {
    kernel: &'a Kernel<'m>,
    space: Space<'m>,
    drift: Vec<Drift>,
}

impl Look<'_, '_> {
    fn note(&mut self, patch: &Resident, (what, at): (What, Gva), said: (String, String), by: Who) {
        let (expected, found) = said;
        self.drift.push(Drift {
            patch: patch.record.name.clone(),
            what,
            at,
            function: None,
            expected,
            found,
            by,
        });
    }

    /// Whether the records are those that were placed, and all of them are there; returns of whom the log
    /// doesn't tell.
    fn records(
        &mut self,
        all: &[Resident],
        applied: &[&Resident],
        known: Known<'_>,
    ) -> Vec<String> {
        let mut lines = known.log.iter().rev();
        let last = lines.find(|line| line.action.uuid == known.uuid);
        let in_force = last.map_or(&[][..], |line| &line.in_force);
        let mut unconfirmed = Vec::new();
        for patch in applied {
            let found = hex::encode(patch.slot.record_sha256);
            let name = &patch.record.name;
            let told = in_force.iter().find(|p| p.name == *name);
            let mut own = known.log.iter().map(|l| &l.action);
            if told.is_some_and(|p| p.record == found)
                || own.any(|a| a.uuid == known.uuid && a.record == found)
            {
                continue;
            }
            match told {
                Some(p) if !p.record.is_empty() => {
                    let at =
                        page_address(patch.slot.first.into()).plus(patch.slot.record_offset.into());
                    let expected = format!("SHA-256 {}, by the audit log", p.record);
                    let said = (expected, format!("SHA-256 {found}"));
                    self.note(patch, (What::Record, at), said, Who::Unknown);
                }
                _ => unconfirmed.push(name.clone()),
            }
        }
        for lost in in_force {
            if all.iter().any(|r| r.record.sha256 == lost.sha256) {
                continue;
            }
            self.drift.push(Drift {
                patch: lost.name.clone(),
                what: What::Record,
                at: page_address(0),
                function: None,
                expected: "a patch in force, by the audit log".into(),
                found: "no trace of it: the guest was started anew, or its directory was changed"
                    .into(),
                by: Who::Unknown,
            });
        }
        unconfirmed
    }

    /// The rights of a payload's pages. That their entries lead to pages of the arena was found when it
    /// was read.
    fn pages(&mut self, arena: &Arena, patch: &Resident) {
        let text = patch.record.text.1.div_ceil(PAGE_SIZE);
        let rodata = patch.record.rodata_len / PAGE_SIZE;
        for i in 0..patch.slot.pages {
            let page = usize::from(patch.slot.first) + usize::from(i);
            let rights = match u64::from(i) {
                i if i < text => Rights::Text,
                i if i < text.saturating_add(rodata) => Rights::RoData,
                _ => Rights::Data,
            };
            if let Some(said) = arena.compare(self.kernel.kind, page, rights) {
                let at = page_address(page);
                self.note(patch, (What::Page, at), said, Who::Unknown);
            }
        }
    }

    fn code(&mut self, patch: &Resident) -> Result<()> {
        let record = &patch.record;
        let (start, len) = record.text;
        let own = u64::from(patch.slot.pages) * PAGE_SIZE;
        let Some(len) = usize::try_from(len).ok().filter(|&l| l as u64 <= own) else {
            return Ok(());
        };
        let code = self.space.read_vec(start, len)?;
        for offset in record.code.changed(code) {
            let at = start.plus(offset as u64);
            let block = Range::new(at, BLOCK.min(len - offset) as u64);
            let (found, by) = match conflicts::kprobe(self.kernel, block)? {
                Some(probe) => (format!("a kprobe at {probe}"), Who::Kprobe),
                None => ("other bytes".into(), Who::Unknown),
            };
            let expected = format!("{} bytes as they were placed", block.len());
            self.note(patch, (What::Code, at), (expected, found), by);
            if let Some(drift) = self.drift.last_mut() {
                let within =
                    |f: &&Function| f.new < block.end && at.0 < f.new.0.saturating_add(f.new_size);
                drift.function = record.functions.iter().find(within).map(|f| f.name.clone());
            }
        }
        Ok(())
    }

    fn constants(&mut self, patch: &Resident) -> Result<()> {
        let record = &patch.record;
        let text = record.text.1.div_ceil(PAGE_SIZE).saturating_mul(PAGE_SIZE);
        let own = u64::from(patch.slot.pages) * PAGE_SIZE;
        let fits = text
            .checked_add(record.rodata_len)
            .is_some_and(|end| end <= own);
        let (true, Ok(len)) = (fits, usize::try_from(record.rodata_len)) else {
            return Ok(());
        };
        let at = page_address(patch.slot.first.into()).plus(text);
        let mut bytes = self.space.read_vec(at, len)?;
        let first = u64::from(patch.slot.record_offset).checked_sub(text);
        let first = first.and_then(|first| usize::try_from(first).ok());
        let end = |first: usize| first.saturating_add(patch.slot.record_len as usize);
        if let Some(room) = first.and_then(|first| bytes.get_mut(first..end(first))) {
            room.fill(0);
        }
        if digests::digest(&bytes) != record.rodata_sha256 {
            let said = (
                format!("{len} bytes as they were placed"),
                "other bytes".into(),
            );
            self.note(patch, (What::Constants, at), said, Who::Unknown);
        }
        Ok(())
    }

    /// Whether the modules whose functions `patch` replaces are gone; and if it is in force, that the
    /// guest knows it.
    fn module(&mut self, patch: &Resident) -> Result<bool> {
        let module = patch.record.module;
        let applied = patch.slot.state == State::Applied;
        if applied && !links::is_entered(self.kernel, module)? {
            let said = ("one of the guest's modules".into(), "not among them".into());
            self.note(patch, (What::Module, module), said, Who::Unknown);
        }
        let gone = modules_present::gone(self.kernel, &patch.record)?;
        let is_gone = gone.is_some();
        if let Some(why) = gone.filter(|_| applied) {
            let said = ("the modules whose functions it replaces".into(), why);
            self.note(patch, (What::Module, module), said, Who::Unknown);
        }
        Ok(is_gone)
    }

    /// The redirect of `function`, of which `patch` is the newest that replaced it, and ftrace's nop
    /// before it.
    fn redirect(
        &mut self,
        residents: &[Resident],
        stack: &Stack<'_>,
        patch: &Resident,
        function: &Function,
    ) -> Result<()> {
        let layers = stack.layers(function.old);
        let (owner, expected) = match layers {
            Some(layers) => {
                let standing = layers.installed();
                (standing.patch.to_owned(), Some(standing.jump))
            }
            None => (
                patch.record.name.clone(),
                original(residents, function.site),
            ),
        };
        let (entry, at) = (function.old, function.site);
        let Some(head) = at.0.checked_sub(entry.0).filter(|&len| len < 64) else {
            return Ok(());
        };
        let head = usize::try_from(head).unwrap_or(0);
        let code = self.space.read_vec(entry, head + JUMP)?;
        let found: [u8; JUMP] = locus_guest::fetch::array(&code, head).unwrap_or_default();
        let mut drift = Drift {
            patch: owner,
            what: What::Redirect,
            at,
            function: Some(function.name.clone()),
            expected: expected.map_or_else(String::new, hex::encode),
            found: hex::encode(found),
            by: Who::Unknown,
        };
        if expected.is_some_and(|expected| expected != found) {
            let place = Range::new(at, JUMP as u64);
            if let Some(probe) = conflicts::kprobe(self.kernel, place)? {
                drift.found.push_str(&format!(", a kprobe at {probe}"));
                drift.by = Who::Kprobe;
            } else if let Some(to) = self.jump(at, found) {
                drift.found.push_str(&format!(", a jump to {to}"));
            } else if original(residents, function.site) == Some(found) {
                drift.found.push_str(", the kernel's own");
            }
            self.drift.push(drift.clone());
        }
        // A function that is the kernel's again is the guest's to trace.
        if layers.is_none() {
            return Ok(());
        }
        let (found, by) = match redirect::fentry_end(&code, entry) {
            Ok(end) if end == head => return Ok(()),
            Ok(_) => (
                hex::encode(code.get(..head).unwrap_or_default()),
                Who::Unknown,
            ),
            Err(Head::Unknown(bytes)) => {
                match conflicts::kprobe(self.kernel, Range::new(entry, head as u64))? {
                    Some(probe) => (format!("a kprobe at {probe}"), Who::Kprobe),
                    None => (bytes, Who::Unknown),
                }
            }
            Err(Head::Call(target)) => {
                let caller = conflicts::caller(self.kernel, entry, target)?;
                let by = match &caller {
                    Caller::Livepatch => Who::Livepatch,
                    Caller::Bpf(_) => Who::Bpf,
                    Caller::Ftrace(_) => Who::Ftrace,
                };
                (caller.to_string(), by)
            }
        };
        self.drift.push(Drift {
            what: What::Entry,
            at: entry,
            expected: "ftrace's nop".into(),
            found,
            by,
            ..drift
        });
        Ok(())
    }

    /// Where `bytes` at `at` lead, if they are a jump.
    fn jump(&self, at: Gva, bytes: [u8; JUMP]) -> Option<String> {
        let [0xe9, a, b, c, d] = bytes else {
            return None;
        };
        let distance = i64::from(i32::from_le_bytes([a, b, c, d]));
        let to = Gva(at.0.wrapping_add(JUMP as u64).wrapping_add_signed(distance));
        Some(match self.kernel.symbols.covering(to) {
            Some((name, offset)) if offset < PAGE_SIZE => format!("{name}+{offset:#x}"),
            _ => to.to_string(),
        })
    }
}

/// The bytes that the kernel itself has at `site`, by the records of those that replaced it: what they
/// put back, but redirects of each other. `None` if their words differ.
fn original(residents: &[Resident], site: Gva) -> Option<[u8; JUMP]> {
    let all = || {
        residents
            .iter()
            .flat_map(|r| &r.record.functions)
            .filter(|f| f.site == site)
    };
    let mut found = all()
        .map(|f| f.old_bytes)
        .filter(|old| all().all(|f| f.new_bytes != *old));
    let first = found.next()?;
    found.all(|other| other == first).then_some(first)
}

#[cfg(test)]
mod tests;
