//! What this host knows of a guest's patches outside of the guest.

use super::{Drift, DriftCause, DriftKind, VerifyReport};
use crate::arena::page_address;
use crate::error::Error;
use crate::storage::audit::in_force::InForce;
use crate::storage::audit::Line;

/// The records that this host has of a guest outside the guest.
#[derive(Clone, Debug)]
pub struct HostRecords<'a> {
    /// The audit log.
    pub log: &'a [Line],
    /// The guest's UUID.
    pub uuid: &'a str,
    /// What is in force in the guest by the audit log; of use if that has no line of it because it was rotated.
    pub in_force: Vec<InForce>,
}

impl HostRecords<'_> {
    /// What is in force in the guest: by the last line about it, or else by what was kept.
    pub(super) fn in_force(&self) -> &[InForce] {
        let mut lines = self.log.iter().rev();
        let last = lines.find(|line| line.action.uuid == self.uuid);
        last.map_or(&self.in_force, |line| &line.in_force)
    }
}

/// What there is to say of a guest that came back without the memory of its arena: `error` says so.
pub(super) fn without_arena(error: &Error, known: Option<&HostRecords<'_>>) -> VerifyReport {
    let drift = |patch: String| Drift {
        patch,
        what: DriftKind::Page,
        at: page_address(0),
        function: None,
        expected: "the pages of the arena".into(),
        found: error.to_string(),
        by: DriftCause::Unknown,
    };
    let names = known.map_or_else(Vec::new, |known| {
        let names = known.in_force().iter().map(|p| p.name.clone());
        names.collect()
    });
    VerifyReport {
        drift: match names.is_empty() {
            true => vec![drift("unknown".into())],
            false => names.into_iter().map(drift).collect(),
        },
        ..VerifyReport::default()
    }
}
