//! Compares a guest's memory with the records of its patches: redirects and ftrace's nops before them, the
//! arena's page-table entries, the payloads' code and constants, and whether the guest still knows the payloads
//! as modules.
//!
//! It only reads and mends nothing. The guest may change things while it is read, for example when it switches a
//! static key. So only a difference that is seen in two passes counts.

use std::collections::{HashMap, HashSet};
use std::thread;
use std::time::Duration;

use locus_guest::addr::{Gva, Range, PAGE_SIZE};
use locus_guest::space::Space;
use locus_kernel::Kernel;

use crate::arena::digests::{self, BLOCK};
use crate::arena::record::{Function, State, HEAD_MAX};
use crate::arena::{page_address, Arena, Contents, Newer, Resident, Rights};
use crate::error::Result;
use crate::link::module::lists::{self, Known};
use crate::plan::{self, PatchStack};
use crate::target::conflicts::{self, Caller};
use crate::target::kprobes::Kprobes;
use crate::target::modules_present;
use crate::target::redirect::{self, Head};
use crate::x86::{self, JUMP};

mod drift;
mod host_records;

pub use drift::{Drift, DriftCause, DriftKind};
use host_records::without_arena;
pub use host_records::HostRecords;

/// Most passes over a guest; there is another one only while the last one shows differences.
const PASSES: u32 = 3;
/// Time between two passes: the kernel changes its code in less (`text_poke_bp`).
const BETWEEN: Duration = Duration::from_millis(50);

/// How much was compared, and the differences.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VerifyReport {
    /// Number of patches in force.
    pub patches: usize,
    /// Number of patches that are reverted, whose code is still in the arena.
    pub parked: usize,
    /// Number of places of redirects.
    pub redirects: usize,
    /// Number of pages of payloads.
    pub pages: usize,
    /// Names of patches in force whose records are not in the audit log: they came with a guest that was moved or
    /// restored, or were forged.
    pub unconfirmed: Vec<String>,
    /// Names of payloads of a newer xen-locus, whose records this one can't read. They are not compared.
    pub unknown: Vec<String>,
    /// The differences.
    pub drift: Vec<Drift>,
    /// What there is to say of a nudge that is under way, or was interrupted.
    pub nudge: Option<String>,
}

/// Compares a guest with the records of its patches, which are in its own memory, and those records with the ones
/// that this host has.
///
/// # Errors
/// The arena's directory or a record was changed, so there is nothing to compare with; the guest can't
/// be read; a run that was ended midway left it uncertain.
pub fn verify(kernel: &Kernel<'_>, known: Option<&HostRecords<'_>>) -> Result<VerifyReport> {
    let mut seen = compare_once(kernel, known)?;
    for _ in 1..PASSES {
        if seen.drift.is_empty() {
            break;
        }
        thread::sleep(BETWEEN);
        let mut again = compare_once(kernel, known)?;
        // There may be tens of thousands in each.
        let before: HashSet<&Drift> = seen.drift.iter().collect();
        again.drift.retain(|drift| before.contains(drift));
        seen = again;
    }
    Ok(seen)
}

/// The same in one pass.
///
/// # Errors
/// As [`verify`].
pub fn compare_once(kernel: &Kernel<'_>, known: Option<&HostRecords<'_>>) -> Result<VerifyReport> {
    let contents = Arena::read(kernel)
        .and_then(|arena| plan::contents(kernel, &arena).map(|contents| (arena, contents)));
    let (
        arena,
        Contents {
            residents,
            gates,
            newer,
        },
    ) = match contents {
        Ok(read) => read,
        Err(error) if error.is_arena_lost() => return Ok(without_arena(&error, known)),
        Err(error) => return Err(error),
    };
    let stack = PatchStack::new(&residents);
    let mut comparison = Comparison {
        kernel,
        space: kernel.space.fresh(),
        kprobes: match residents.is_empty() {
            true => Kprobes::default(),
            false => Kprobes::read(kernel)?,
        },
        drift: Vec::new(),
        newer: &newer,
    };
    let mut outcome = VerifyReport {
        patches: stack.applied().len(),
        parked: residents.len() - stack.applied().len(),
        unknown: newer.iter().map(|n| n.name.clone()).collect(),
        nudge: plan::nudge_left(&gates),
        ..VerifyReport::default()
    };
    let originals = Originals::of(&residents);
    let mut sites = HashSet::new();
    // The newest first: of a function that several patches replaced, the newest record counts.
    for patch in residents.iter().rev() {
        outcome.pages += usize::from(patch.slot.pages);
        comparison.pages(&arena, patch);
        comparison.code(patch)?;
        comparison.constants(patch)?;
        if comparison.module(patch)? {
            continue;
        }
        for function in &patch.record.functions {
            if sites.insert(function.site) {
                outcome.redirects += 1;
                comparison.redirect(&originals, &stack, patch, function)?;
            }
        }
    }
    if let Some(known) = known {
        outcome.unconfirmed = comparison.records(&residents, stack.applied(), known);
    }
    outcome.drift = comparison.drift;
    Ok(outcome)
}

/// A difference in a patch that is not named yet.
struct Difference {
    what: DriftKind,
    at: Gva,
    expected: String,
    found: String,
    by: DriftCause,
}

/// One pass over a guest, and the differences so far.
struct Comparison<'a, 'm> {
    kernel: &'a Kernel<'m>,
    space: Space<'m>,
    kprobes: Kprobes,
    drift: Vec<Drift>,
    newer: &'a [Newer],
}

impl Comparison<'_, '_> {
    /// Adds a difference that is about no single function.
    fn note(&mut self, patch: &Resident, found: Difference) {
        self.drift.push(Drift {
            patch: patch.record.name.clone(),
            what: found.what,
            at: found.at,
            function: None,
            expected: found.expected,
            found: found.found,
            by: found.by,
        });
    }

    /// Compares the records in the guest with those in the audit log. Returns the names of patches in force that the
    /// log does not have.
    fn records(
        &mut self,
        all: &[Resident],
        applied: &[&Resident],
        known: &HostRecords<'_>,
    ) -> Vec<String> {
        let in_force = known.in_force();
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
                    let difference = Difference {
                        what: DriftKind::Record,
                        at,
                        expected: format!("SHA-256 {}, by the audit log", p.record),
                        found: format!("SHA-256 {found}"),
                        by: DriftCause::Unknown,
                    };
                    self.note(patch, difference);
                }
                _ => unconfirmed.push(name.clone()),
            }
        }
        for lost in in_force {
            if lost.is_among(all, self.newer) {
                continue;
            }
            self.drift.push(Drift {
                patch: lost.name.clone(),
                what: DriftKind::Record,
                at: page_address(0),
                function: None,
                expected: "a patch in force, by the audit log".into(),
                found: "no trace of it: the guest was rebooted, or its directory was changed"
                    .into(),
                by: DriftCause::Unknown,
            });
        }
        unconfirmed
    }

    /// Compares the rights of a payload's pages. That their entries lead to pages of the arena was checked when the
    /// arena was read.
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
            if let Some(entry) = arena.compare(self.kernel.kind, page, rights) {
                let difference = Difference {
                    what: DriftKind::Page,
                    at: page_address(page),
                    expected: entry.expected,
                    found: entry.found,
                    by: DriftCause::Unknown,
                };
                self.note(patch, difference);
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
            let (found, by) = match self.kprobes.in_range(block) {
                Some(probe) => (format!("a kprobe at {probe}"), DriftCause::Kprobe),
                None => ("other bytes".into(), DriftCause::Unknown),
            };
            let within =
                |f: &&Function| f.new < block.end && at.0 < f.new.0.saturating_add(f.new_size);
            let function = record.functions.iter().find(within);
            self.drift.push(Drift {
                patch: record.name.clone(),
                what: DriftKind::Code,
                at,
                function: function.map(|f| f.name.clone()),
                expected: format!("{} bytes as they were placed", block.len()),
                found,
                by,
            });
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
        let (offset, room) = record.record_room.unwrap_or((
            patch.slot.record_offset.into(),
            patch.slot.record_len.into(),
        ));
        let index = |at: u64| usize::try_from(at.checked_sub(text)?).ok();
        let room = index(offset).zip(index(offset.saturating_add(room)));
        if let Some(room) = room.and_then(|(first, end)| bytes.get_mut(first..end)) {
            room.fill(0);
        }
        if digests::digest(&bytes) != record.rodata_sha256 {
            let difference = Difference {
                what: DriftKind::Constants,
                at,
                expected: format!("{len} bytes as they were placed"),
                found: "other bytes".into(),
                by: DriftCause::Unknown,
            };
            self.note(patch, difference);
        }
        Ok(())
    }

    /// Returns whether a module whose functions `patch` replaces is gone. Checks that the guest knows a patch in
    /// force as a module.
    fn module(&mut self, patch: &Resident) -> Result<bool> {
        let module = patch.record.module;
        let applied = patch.slot.state == State::Applied;
        let difference = |expected: &str, found: String| Difference {
            what: DriftKind::Module,
            at: module,
            expected: expected.into(),
            found,
            by: DriftCause::Unknown,
        };
        if applied && lists::known(self.kernel, module)? != Known::Listed {
            let absent = difference("one of the guest's modules", "not among them".into());
            self.note(patch, absent);
        }
        let gone = modules_present::gone(self.kernel, &patch.record)?;
        let is_gone = gone.is_some();
        if let Some(why) = gone.filter(|_| applied) {
            let gone = difference("the modules whose functions it replaces", why);
            self.note(patch, gone);
        }
        Ok(is_gone)
    }

    /// Compares the redirect of `function`, of which `patch` is the newest that replaced it, and ftrace's nop
    /// before it.
    fn redirect(
        &mut self,
        originals: &Originals<'_>,
        stack: &PatchStack<'_>,
        patch: &Resident,
        function: &Function,
    ) -> Result<()> {
        let layers = stack.layers(function.old);
        let (owner, expected) = match layers {
            Some(layers) => {
                let installed = layers.installed();
                (installed.patch.to_owned(), Some(installed.jump))
            }
            None => (patch.record.name.clone(), originals.at(function.site)),
        };
        let (entry, at) = (function.old, function.site);
        // A redirect is a few bytes behind the entry; a record that says otherwise was changed in the guest.
        let head = at.0.checked_sub(entry.0).filter(|&len| len < HEAD_MAX);
        let Some(head) = head.and_then(|len| usize::try_from(len).ok()) else {
            return Ok(());
        };
        let code = self.space.read_vec(entry, head + JUMP)?;
        let Some(found) = locus_guest::fetch::array::<JUMP>(&code, head) else {
            return Ok(());
        };
        let mut drift = Drift {
            patch: owner,
            what: DriftKind::Redirect,
            at,
            function: Some(function.name.clone()),
            expected: expected.map_or_else(String::new, hex::encode),
            found: hex::encode(found),
            by: DriftCause::Unknown,
        };
        if Newer::behind(self.newer, at, found).is_some() {
            // It lies on this one, or is what runs instead of it.
            return Ok(());
        }
        if expected.is_some_and(|expected| expected != found) {
            let place = Range::new(at, JUMP as u64);
            if let Some(probe) = self.kprobes.in_range(place) {
                drift.found.push_str(&format!(", a kprobe at {probe}"));
                drift.by = DriftCause::Kprobe;
            } else if originals.at(function.site) == Some(found) {
                // They may be a jump themselves.
                drift.found.push_str(", the kernel's own");
            } else if let Some(to) = self.jump(at, found) {
                drift.found.push_str(&format!(", a jump to {to}"));
            }
            self.drift.push(drift.clone());
        }
        // A function that is the kernel's again is the guest's to trace.
        if layers.is_none() {
            return Ok(());
        }
        if expected == Some(found) {
            // It has a copy of the redirect, and is disabled.
            if let Some(probe) = self.kprobes.in_range(Range::new(at, JUMP as u64)) {
                self.drift.push(Drift {
                    found: format!("{}, a disabled kprobe at {probe}", hex::encode(found)),
                    by: DriftCause::Kprobe,
                    ..drift.clone()
                });
            }
        }
        if let Some((found, by)) = self.entry(entry, head, &code)? {
            self.drift.push(Drift {
                what: DriftKind::Entry,
                at: entry,
                expected: "ftrace's nop".into(),
                found,
                by,
                ..drift
            });
        }
        Ok(())
    }

    /// What a function at `entry` has in place of ftrace's nop, which ends at byte `head` of its `code`, and the
    /// cause; `None` if the nop is there.
    fn entry(&self, entry: Gva, head: usize, code: &[u8]) -> Result<Option<(String, DriftCause)>> {
        Ok(Some(match redirect::fentry_end(code, entry) {
            Ok(end) if end == head => return Ok(None),
            Ok(_) => (
                hex::encode(code.get(..head).unwrap_or(code)),
                DriftCause::Unknown,
            ),
            Err(Head { bytes, lead }) => {
                let caller = lead.map(|lead| conflicts::caller(self.kernel, entry, lead));
                let Some(caller) = caller.transpose()?.flatten() else {
                    let probe = self.kprobes.in_range(Range::new(entry, head as u64));
                    return Ok(Some(match probe {
                        Some(probe) => (format!("a kprobe at {probe}"), DriftCause::Kprobe),
                        None => (bytes, DriftCause::Unknown),
                    }));
                };
                let by = match &caller {
                    Caller::Livepatch => DriftCause::Livepatch,
                    Caller::Bpf(_) => DriftCause::Bpf,
                    Caller::Ftrace(_) => DriftCause::Ftrace,
                };
                (caller.to_string(), by)
            }
        }))
    }

    /// The target of the jump at `at`, by name where it has one; `None` if `bytes` are no jump.
    fn jump(&self, at: Gva, bytes: [u8; JUMP]) -> Option<String> {
        let to = x86::jump_target(at, bytes)?;
        Some(match self.kernel.symbols.covering(to) {
            Some((name, offset)) if offset < PAGE_SIZE => format!("{name}+{offset:#x}"),
            _ => to.to_string(),
        })
    }
}

/// The functions of all records, by the place of their redirect.
struct Originals<'r>(HashMap<Gva, Vec<&'r Function>>);

impl<'r> Originals<'r> {
    fn of(residents: &'r [Resident]) -> Originals<'r> {
        let mut by_site: HashMap<Gva, Vec<&Function>> = HashMap::new();
        for function in residents.iter().flat_map(|r| &r.record.functions) {
            by_site.entry(function.site).or_default().push(function);
        }
        Originals(by_site)
    }

    /// The bytes that the kernel itself has at `site`, by the records of the patches that replaced the function: the bytes
    /// that they put back, except redirects of each other. `None` if the records disagree.
    fn at(&self, site: Gva) -> Option<[u8; JUMP]> {
        let all = self.0.get(&site)?;
        let mut found = all
            .iter()
            .map(|f| f.old_bytes)
            .filter(|old| all.iter().all(|f| f.new_bytes != *old));
        let first = found.next()?;
        found.all(|other| other == first).then_some(first)
    }
}

#[cfg(test)]
mod tests;
