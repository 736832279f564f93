//! What an action reports.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use locus_guest::addr::Gva;
use locus_kernel::Kernel;
use locus_payload::Payload;
use serde::Serialize;
use sha2::{Digest, Sha256};

use crate::arena::record::Record;
use crate::error::{Error, Result};
use crate::plan::Readiness;
use crate::say;

/// What became of an action.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// The patch is in force now.
    Applied,
    /// The patch is undone now.
    Reverted,
    /// There was nothing to do: the patch is in force.
    #[serde(rename = "already")]
    AlreadyApplied,
    /// There was nothing to do: the patch is in the guest, and not in force.
    #[serde(rename = "already")]
    AlreadyReverted,
    /// There was nothing to do: the guest lost the patch.
    #[serde(rename = "already")]
    AlreadyLost,
    /// There is nothing to do but to note that a patch that the guest lost is not wanted any more; a dry run.
    #[serde(rename = "already")]
    WouldForget,
    /// There was nothing to do: no thread sleeps in the way.
    #[serde(rename = "already")]
    NobodyAsleep,
    /// It could be done; a dry run.
    WouldApply,
    /// It could be undone; a dry run.
    WouldRevert,
    /// Threads that sleep in the way were woken.
    Nudged,
    /// They could be woken; a dry run.
    WouldNudge,
    /// The memory of the payload is given back.
    Reclaimed,
    /// It could be given back, unless something leads into it; a dry run.
    WouldReclaim,
}

impl Outcome {
    /// Its name in JSON.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Outcome::Applied => "applied",
            Outcome::Reverted => "reverted",
            Outcome::AlreadyApplied
            | Outcome::AlreadyReverted
            | Outcome::AlreadyLost
            | Outcome::WouldForget
            | Outcome::NobodyAsleep => "already",
            Outcome::WouldApply => "would-apply",
            Outcome::WouldRevert => "would-revert",
            Outcome::Nudged => "nudged",
            Outcome::WouldNudge => "would-nudge",
            Outcome::Reclaimed => "reclaimed",
            Outcome::WouldReclaim => "would-reclaim",
        }
    }
}

/// The result of an action on one guest.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Name of the payload.
    pub patch: String,
    /// What became of it.
    pub result: Outcome,
    /// How long the guest was paused at the attempt that succeeded, in microseconds.
    pub pause_us: u64,
    /// Pauses tried.
    pub attempts: u32,
    /// Functions replaced or put back.
    pub functions: usize,
    /// Patches that it superseded, the undermost first.
    pub superseded: Vec<String>,
    /// SHA-256 of the payload's file, in hex; for the audit log.
    #[serde(skip)]
    pub sha256: String,
    /// SHA-256 of the record that was placed in the guest, in hex; for the audit log.
    #[serde(skip)]
    pub record: String,
    /// SHA-256 of the guest's code of all functions concerned before and after, in hex; empty where
    /// nothing was done. For the audit log.
    #[serde(skip)]
    pub text: [String; 2],
    /// From start to end, reading the guest's kernel included, in milliseconds: filled in by
    /// [`crate::ops`].
    pub total_ms: u64,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut functions = say::count(self.functions, "function", "functions");
        if !self.superseded.is_empty() {
            functions.push_str(&format!(", superseding {}", self.superseded.join(", ")));
        }
        let done = |f: &mut fmt::Formatter<'_>, what| {
            let attempts = say::count(self.attempts, "attempt", "attempts");
            write!(
                f,
                "{what} ({functions}, paused {} us, {attempts})",
                self.pause_us
            )
        };
        match self.result {
            Outcome::Applied => done(f, "applied"),
            Outcome::Reverted => done(f, "reverted"),
            Outcome::Reclaimed => write!(f, "reclaimed (paused {} us)", self.pause_us),
            Outcome::AlreadyApplied => f.write_str("no action needed: already applied"),
            Outcome::AlreadyReverted => f.write_str("no action needed: already reverted"),
            Outcome::AlreadyLost => f.write_str(
                "no action needed: the guest has lost it; from now on it is not listed any more",
            ),
            Outcome::WouldForget => f.write_str(
                "no action needed: the guest has lost it; without --dry-run it would not be listed any more",
            ),
            Outcome::NobodyAsleep => f.write_str("no action needed: no thread sleeps in the way"),
            Outcome::Nudged => write!(f, "nudged (paused {} us)", self.pause_us),
            Outcome::WouldApply
            | Outcome::WouldRevert
            | Outcome::WouldNudge
            | Outcome::WouldReclaim => {
                write!(f, "possible ({functions}); nothing was changed")
            }
        }
    }
}

impl Report {
    /// What else is known of the action, in words: what `-v` shows.
    #[must_use]
    pub fn details(&self) -> String {
        let mut said = format!("took {} ms", self.total_ms);
        let [before, after] = &self.text;
        for (what, digest) in [
            ("SHA-256 of the file", &self.sha256),
            ("of the record in the guest", &self.record),
            ("of the functions before", before),
            ("of the functions now", after),
        ] {
            if !digest.is_empty() {
                said.push_str(&format!(", {what} {digest}"));
            }
        }
        said
    }

    /// What a dry run reports of what [`prepare`](crate::plan::prepare) found.
    #[must_use]
    pub fn dry(payload: &Payload, ready: &Readiness) -> Report {
        let (result, record, superseded) = match ready {
            Readiness::Already(resident) => (Outcome::AlreadyApplied, &resident.record, &[][..]),
            Readiness::Ready(ready) => (Outcome::WouldApply, &ready.record, &ready.superseded[..]),
        };
        let superseded = superseded.iter().map(|r| r.record.name.clone()).collect();
        Report {
            superseded,
            sha256: record.sha256.clone(),
            ..report(
                &payload.name,
                result,
                record.functions.len(),
                Done::default(),
            )
        }
    }
}

/// The report on a patch that is as it should be already, as `outcome` says.
#[must_use]
pub fn nothing_to_do(patch: &str, outcome: Outcome) -> Report {
    report(patch, outcome, 0, Done::default())
}

pub(crate) fn report(patch: &str, result: Outcome, functions: usize, done: Done) -> Report {
    Report {
        patch: patch.into(),
        result,
        pause_us: u64::try_from(done.pause.as_micros()).unwrap_or(u64::MAX),
        attempts: done.attempts,
        functions,
        superseded: Vec::new(),
        sha256: String::new(),
        record: String::new(),
        text: Default::default(),
        total_ms: 0,
    }
}

/// How a plan was carried out.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Done {
    pub pause: Duration,
    pub attempts: u32,
}

/// The functions that an action concerns, each once, by address and length.
pub(super) struct Concerned(BTreeMap<Gva, u64>);

impl Concerned {
    pub(super) fn of<'r>(records: impl Iterator<Item = &'r Record>) -> Concerned {
        let functions = records.flat_map(|r| &r.functions);
        Concerned(functions.map(|f| (f.old, f.old_size)).collect())
    }

    /// SHA-256 of their code.
    pub(super) fn digest(&self, kernel: &Kernel<'_>) -> Result<String> {
        let space = kernel.space.fresh();
        let mut digest = Sha256::new();
        for (&at, &len) in &self.0 {
            let too_long = |_| Error::failed(format!("the function at {at} is {len} bytes long"));
            let len = usize::try_from(len).map_err(too_long)?;
            digest.update(space.read_vec(at, len)?);
        }
        Ok(hex::encode(digest.finalize()))
    }

    /// The digest `before` and the one of now. The second is empty if the code can't be read any more: the action is done
    /// all the same.
    pub(super) fn change(&self, kernel: &Kernel<'_>, before: String) -> [String; 2] {
        [before, self.digest(kernel).unwrap_or_default()]
    }
}
