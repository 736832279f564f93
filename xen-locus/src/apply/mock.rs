//! Actions on the mock guest, and what it shows after them.

#![allow(clippy::cast_possible_truncation)] // small numbers

use std::time::Duration;

use locus_guest::addr::Gva;
use locus_guest::GuestType;
use locus_kernel::Kernel;
use locus_payload::Payload;
use sha2::{Digest as _, Sha256};

use super::{apply, revert, revert_all, Options, Outcome, Report};
use crate::arena::{page_address, record, Arena, Resident};
use crate::error::{Error, Result};
use crate::machine::mock::{code, Guest, FUNCTIONS};
use crate::plan::{self, Mode, PatchStack};
use crate::x86;

impl Guest {
    pub(crate) fn apply(&self, payload: &Payload, mode: Mode) -> Result<Report> {
        apply(self, &self.kernel(), payload, mode, &options(false))
    }

    pub(crate) fn applied(&self, payload: &Payload) -> Report {
        let report = self.apply(payload, Mode::Apply).unwrap();
        assert_eq!(report.result, Outcome::Applied);
        report
    }

    pub(crate) fn revert(&self, name: &str) -> Result<Report> {
        revert(self, &self.kernel(), name, &options(false))
    }

    pub(crate) fn revert_all(&self, dry_run: bool) -> Vec<(String, Result<Report>)> {
        let mut all = Vec::new();
        revert_all(self, &self.kernel(), &options(dry_run), |name, result| {
            all.push((name.to_owned(), result));
            true
        })
        .unwrap();
        all
    }

    pub(crate) fn residents(&self) -> Result<Vec<Resident>> {
        let kernel = self.kernel();
        plan::residents(&kernel, &Arena::read(&kernel)?)
    }

    /// Names of the applied patches, the undermost first.
    pub(crate) fn status(&self) -> Result<Vec<String>> {
        let residents = self.residents()?;
        let stack = PatchStack::new(&residents);
        let applied = stack.applied().iter();
        Ok(applied.map(|r| r.record.name.clone()).collect())
    }

    /// Which patch's version of each function the guest runs; empty for the kernel's own.
    pub(crate) fn runs(&self) -> [String; 3] {
        let kernel = self.kernel();
        let residents = kernel_residents(&kernel);
        FUNCTIONS.map(|(name, at)| {
            let mut found = [0; 11];
            kernel.space.read(Gva(at), &mut found).unwrap();
            let n = FUNCTIONS.iter().position(|f| f.0 == name).unwrap();
            if found == code(n as u8) {
                return String::new();
            }
            let owner = residents.iter().find(|r| {
                let functions = &r.record.functions;
                functions.iter().any(|f| {
                    let jump = x86::jump(f.site, f.new).unwrap();
                    f.old.0 == at && found[5..10] == jump
                })
            });
            owner.map_or("?".into(), |r| r.record.name.clone())
        })
    }

    /// Makes the record of the payload `name` one of the next version, as a newer xen-locus writes it.
    pub(crate) fn make_newer(&self, name: &str) {
        let kernel = self.kernel();
        let mut arena = Arena::read(&kernel).unwrap();
        let all = arena.residents(&kernel).unwrap();
        let resident = all.iter().rfind(|r| r.record.name == name).unwrap();
        let json = String::from_utf8(resident.record.encode().unwrap()).unwrap();
        let json = json.replacen(
            &format!("\"schema\":{}", record::SCHEMA),
            &format!("\"schema\":{}", record::SCHEMA + 1),
            1,
        );
        let mut slots = arena.directory.slots.clone();
        let slot = &mut slots[resident.index];
        assert_eq!(json.len(), slot.record_len as usize);
        let at = page_address(slot.first.into()).plus(slot.record_offset.into());
        self.poke(at.0, json.as_bytes());
        slot.record_sha256 = Sha256::digest(&json).into();
        arena.commit(self, &kernel, slots).unwrap();
    }

    /// The errors of a payload that is applied or replaces all, and of `patch` that is reverted: all must be refused.
    pub(crate) fn refused(&self, payload: &Payload, patch: &str) -> Vec<Error> {
        let modes = [Mode::Apply, Mode::Replace].into_iter();
        let results = modes.map(|mode| self.apply(payload, mode));
        let results = results.chain([self.revert(patch)]);
        results.map(|result| result.unwrap_err()).collect()
    }

    /// Takes the memory of the arena away, as a guest loses it that hibernates.
    pub(crate) fn loses_arena(&self) {
        let arena = Arena::read(&self.kernel()).unwrap();
        arena.own_frames().for_each(|f| self.world.memory.take(f));
    }

    pub(crate) fn pages(&self) -> usize {
        Arena::read(&self.kernel()).unwrap().room(GuestType::Pvh).1
    }
}

/// What is in the arena, whatever the state of it.
pub(crate) fn kernel_residents(kernel: &Kernel<'_>) -> Vec<Resident> {
    Arena::read(kernel).unwrap().residents(kernel).unwrap()
}

pub(crate) fn options(dry_run: bool) -> Options {
    Options {
        timeout: Duration::ZERO,
        dry_run,
        ..Options::default()
    }
}
