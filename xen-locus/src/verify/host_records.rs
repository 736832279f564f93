//! What this host knows of a guest's patches outside of the guest.

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
