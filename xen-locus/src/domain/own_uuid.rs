//! Whether a UUID says which domain is meant.
//!
//! A guest keeps its UUID when it is rebooted, restored or migrated, so its lock, journal, cache and lines of the audit log
//! are named by it. But Xen lets two domains have the same UUID: a configuration file was copied, or a guest is migrated to
//! its own host. And a domain may have none, which is all zeroes.

use locus_guest::addr::DomId;
use locus_xen::{uuid, DomainInfo};

use crate::error::{Error, Result};

/// Checks that no other domain among `all` is known by the UUID of `own`. `has_run` says whether a domain ever ran, and
/// `label` gives its name and id. Domains that have shut down or are going away don't count, because none of them is changed.
/// Nor does one that never ran while `own` did: a toolstack still makes it, for example as the target of a migration.
///
/// # Errors
/// [`Class::NotApplicable`](crate::error::Class::NotApplicable): another domain is, or there is no UUID.
/// [`Class::TryAgain`](crate::error::Class::TryAgain): it is `own` that never ran.
pub(super) fn check(
    own: &DomainInfo,
    all: &[DomainInfo],
    has_run: impl Fn(DomId) -> Result<bool>,
    label: impl Fn(DomId) -> String,
) -> Result<()> {
    let (id, text) = (own.id, &own.uuid);
    if !uuid::is_unique(text) {
        return Err(Error::not_applicable(format!(
            "domain {} has no UUID of its own ({text}), so what is noted of it could be taken for another domain's: give it \
             one (uuid= in its configuration), and start it again",
            label(id)
        )));
    }
    let twins = all
        .iter()
        .filter(|d| d.uuid == *text && d.id != id && !d.dying && !d.shutdown);
    for twin in twins {
        if !has_run(twin.id)? {
            continue;
        }
        let both = format!(
            "domains {} and {} have the same UUID, {text}",
            label(id.min(twin.id)),
            label(id.max(twin.id))
        );
        return Err(match has_run(id)? {
            true => Error::not_applicable(format!(
                "{both}, so what is noted of one could be taken for the other's: end one of them, or give it another UUID \
                 (uuid= in its configuration) and start it again"
            )),
            false => Error::try_again(format!(
                "{both}, and {id} has not run yet: if it is the target of a migration, try again when that has ended"
            )),
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::mock_info as domain;
    use crate::error::ExitCode;

    const UUID: &str = "01234567-89ab-cdef-0123-456789abcdef";

    /// The answer for the first of `all`, of which those in `made` never ran.
    fn first_of(all: &[DomainInfo], made: &[u16]) -> Result<()> {
        let has_run = |id: DomId| Ok(!made.contains(&id.0));
        check(&all[0], all, has_run, |id| format!("d{id} ({id})"))
    }

    #[test]
    fn two_domains_of_one_uuid_are_both_refused_by_name() {
        let [a, b, c] = [domain(3, UUID), domain(5, UUID), domain(4, "another")];
        for all in [[a.clone(), b.clone(), c.clone()], [b, c, a]] {
            let error = first_of(&all, &[]).unwrap_err();
            assert_eq!(error.exit_code(), ExitCode::NotApplicable);
            let said = error.to_string();
            assert!(said.contains("d3 (3) and d5 (5)"), "{said}");
            assert!(said.contains(UUID) && said.contains("uuid="), "{said}");
        }
        first_of(&[domain(3, UUID)], &[]).unwrap();
    }

    #[test]
    fn a_domain_without_a_uuid_is_refused_even_alone() {
        let none = uuid::to_text(&[0; 16]);
        let error = first_of(&[domain(3, &none)], &[]).unwrap_err();
        assert_eq!(error.exit_code(), ExitCode::NotApplicable);
        assert!(error.to_string().contains("d3 (3) has no UUID"), "{error}");
    }

    #[test]
    fn one_that_never_ran_has_shut_down_or_goes_away_is_in_nobodys_way() {
        let (a, b) = (domain(3, UUID), domain(5, UUID));
        first_of(&[a.clone(), b.clone()], &[5]).unwrap();
        // The target itself has to wait.
        let error = first_of(&[b.clone(), a.clone()], &[5]).unwrap_err();
        assert_eq!(error.exit_code(), ExitCode::TryAgain);
        for change in [
            |d: &mut DomainInfo| d.dying = true,
            |d: &mut DomainInfo| d.shutdown = true,
        ] {
            let mut ended = b.clone();
            change(&mut ended);
            first_of(&[a.clone(), ended], &[]).unwrap();
        }
    }
}
