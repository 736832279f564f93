//! A guest's status in XenStore, below `/tool/xen-locus/domain/DOMID`.

use std::time::Duration;

use super::guest::Guest;
use super::status::{self, Patch, PatchState, Status};
use crate::apply::Options;
use crate::error::{Error, Result};
use crate::machine;
use crate::storage::audit::Log;
use crate::storage::xenstore::{Nodes, ROOT};

/// Most bytes of the list of CVEs that is published: with its path it must fit a message of xenstored.
const CVES_MAX: usize = 3072;

/// Reads a guest's status and publishes it, unless another run works on the guest.
///
/// # Errors
/// Its kernel or arena can't be read; as [`publish`]; [`Class::TryAgain`](crate::error::Class::TryAgain) when another
/// run holds the guest's lock: that run publishes the status itself. If the log may speak of another guest too, the status
/// is published without what it says, and that is the error: it is to be tried again.
pub fn look<G: Guest>(store: &dyn Nodes, log: &dyn Log, guest: &G) -> Result<Status> {
    let at_once = Options {
        timeout: Duration::ZERO,
        ..Options::default()
    };
    let _lock = guest.lock(&at_once)?;
    let status = status::read(guest, &machine::kernel_of(guest)?, log);
    if status.as_ref().is_err_and(Error::is_arena_lost) {
        // Nothing will be known of it until it reboots, and then it is another domain.
        guest.was_published();
    }
    let status = status?;
    publish(store, &status)?;
    guest.check_uuid()?;
    guest.was_published();
    Ok(status)
}

/// Writes a guest's status.
///
/// # Errors
/// XenStore failed.
pub fn publish(store: &dyn Nodes, status: &Status) -> Result<()> {
    let base = format!("{ROOT}/domain/{}", status.domid);
    if store.read(&format!("{base}/uuid"))?.as_deref() != Some(&status.uuid) {
        // Of a guest that had this id before.
        store.remove(&base)?;
        store.write(&format!("{base}/uuid"), &status.uuid)?;
    }
    store.write(&format!("{base}/kernel"), &status.kernel)?;
    for old in store.children(&format!("{base}/patch"))? {
        if !status.patches.iter().any(|p| p.name == old) {
            store.remove(&format!("{base}/patch/{old}"))?;
        }
    }
    // Of two with one name, the one whose state is known is told.
    let is_unknown = |p: &&Patch| p.state == PatchState::Unknown;
    let (unknown, known): (Vec<_>, Vec<_>) = status.patches.iter().partition(is_unknown);
    for patch in unknown.into_iter().chain(known) {
        let node = format!("{base}/patch/{}", patch.name);
        store.write(&format!("{node}/sha256"), &patch.sha256)?;
        store.write(&format!("{node}/cves"), &listed(&patch.cves))?;
        store.write(&format!("{node}/applied-at"), &patch.applied_at.to_string())?;
        store.write(&format!("{node}/state"), patch.state.name())?;
    }
    Ok(())
}

/// The list of CVEs, cut behind a whole name if it is too long.
fn listed(cves: &[String]) -> String {
    let mut list = String::new();
    for cve in cves {
        if list.len() + cve.len() >= CVES_MAX {
            break;
        }
        if !list.is_empty() {
            list.push(',');
        }
        list.push_str(cve);
    }
    list
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_of_many_cves_is_cut_behind_a_name() {
        let many: Vec<String> = (10_000..11_000).map(|n| format!("CVE-2024-{n}")).collect();
        assert_eq!(listed(&many[..2]), "CVE-2024-10000,CVE-2024-10001");
        let cut = listed(&many);
        assert!((CVES_MAX - 20..CVES_MAX + 1).contains(&cut.len()));
        let names: Vec<&str> = cut.split(',').collect();
        assert_eq!(names, many[..names.len()]);
        assert_eq!(listed(&[]), "");
    }
}
