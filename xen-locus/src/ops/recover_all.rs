//! Recovers all guests of this host from interrupted runs.

use locus_guest::addr::DomId;

use super::host::Host;
use super::Operator;
use crate::apply::Options;
use crate::domain::{self, Domain};
use crate::error::{Class, Error, Result};
use crate::guard;
use crate::recover::Report;
use crate::storage::journal;

/// What was found on one guest.
#[derive(Debug)]
pub struct Recovered {
    /// Domain id; `None` for a guest that is not on this host now.
    pub domid: Option<DomId>,
    /// Name of the domain; empty for a guest that is not on this host now.
    pub name: String,
    /// UUID of the guest.
    pub uuid: String,
    /// It has a journal or a guardian's file.
    pub is_noted: bool,
    /// What was found and done.
    pub result: Result<Report>,
}

impl Recovered {
    /// How messages name the guest.
    #[must_use]
    pub fn label(&self) -> String {
        match self.domid {
            Some(id) => domain::label(&self.name, id),
            None => self.uuid.clone(),
        }
    }

    /// Whether it is a guest of which nothing is noted, and whose kernel is none that this tool can change, or does not run yet.
    #[must_use]
    pub fn is_left_out(&self) -> bool {
        let is_none = |error: &Error| error.class() == Class::NotApplicable || error.is_not_ready();
        !self.is_noted && self.result.as_ref().is_err_and(is_none)
    }

    /// Guest and result in one line.
    #[must_use]
    pub fn line(&self) -> String {
        let whom = self.label();
        match &self.result {
            Ok(report) => format!("{whom}: {report}"),
            Err(error) => format!("{whom}: {error}"),
        }
    }
}

/// Recovers one guest, which is on this host.
#[must_use]
pub fn one(operator: &Operator<'_>, domain: &Domain<'_>, options: &Options) -> Recovered {
    Recovered {
        is_noted: true,
        domid: Some(domain.info.id),
        name: domain.name.clone(),
        uuid: domain.info.uuid.clone(),
        result: super::recover(operator, domain, options),
    }
}

/// Recovers all guests that have a journal or a guardian's file, including those that are not on this host now, and unless
/// `only_noted` all other guests too: of one that migrated here in the middle of a change, only its memory tells.
///
/// # Errors
/// Domains can't be listed.
pub fn all(host: &Host, who: &str, options: &Options, only_noted: bool) -> Result<Vec<Recovered>> {
    let mut found = Vec::new();
    let mut noted = journal::all()?;
    let files = guard::files(None)?;
    noted.extend(
        files
            .iter()
            .filter_map(|f| guard::uuid_of(f))
            .map(str::to_owned),
    );
    noted.sort();
    noted.dedup();
    let domains = host.control.domains(DomId(1))?;
    for info in domains.clone() {
        let uuid = info.uuid.clone();
        let known = noted.binary_search(&uuid).is_ok();
        let running = !info.dying && !info.shutdown;
        noted.retain(|n| *n != uuid);
        if !running || (only_noted && !known) {
            continue;
        }
        found.push(match host.domain(info.clone()) {
            Ok(domain) => Recovered {
                is_noted: known,
                ..one(&host.operator(who.to_owned()), &domain, options)
            },
            // It may be going away. The others are not to wait for it.
            Err(error) => Recovered {
                domid: Some(info.id),
                name: host.store.domain_name(info.id).unwrap_or_default(),
                uuid,
                is_noted: known,
                result: Err(error),
            },
        });
    }
    for uuid in noted {
        found.push(Recovered {
            domid: None,
            name: String::new(),
            is_noted: true,
            result: super::recover_absent(&host.control, &uuid, options),
            uuid,
        });
    }
    super::sweep(&domains);
    Ok(found)
}
