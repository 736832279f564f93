//! Which domain somebody means by a name or a UUID.

use locus_xen::DomainInfo;

use crate::error::{Error, Result};
use crate::storage::xenstore::DomainName;

/// How somebody meant a domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Meant {
    /// By its name or its UUID.
    Itself,
    /// Perhaps by what is shown instead of its name.
    AsShown,
}

/// The domain among `all` that is called `wanted`, or has this UUID. Who makes a domain chooses its name: so one whose name
/// looks the same, or is another's UUID, must not be taken for the one that is meant. Those that are going away count only if
/// there is no other.
pub(super) fn the_one(
    wanted: &str,
    all: Vec<(Option<DomainName>, DomainInfo)>,
) -> Result<DomainInfo> {
    let wanted_uuid = wanted.to_ascii_lowercase();
    let meant = |(name, info): (Option<DomainName>, DomainInfo)| {
        let is =
            |test: fn(&DomainName, &str) -> bool| name.as_ref().is_some_and(|n| test(n, wanted));
        if is(DomainName::is) || info.uuid == wanted_uuid {
            Some((Meant::Itself, info))
        } else {
            is(DomainName::is_taken_for).then_some((Meant::AsShown, info))
        }
    };
    let mut meant: Vec<(Meant, DomainInfo)> = all.into_iter().filter_map(meant).collect();
    if meant.iter().any(|(_, info)| !info.dying) {
        meant.retain(|(_, info)| !info.dying);
    }
    let (how, last) = meant.pop().ok_or_else(|| no_such(wanted))?;
    if !meant.is_empty() {
        let others: Vec<String> = meant.iter().map(|(_, info)| info.id.to_string()).collect();
        return Err(Error::failed(format!(
            "domains {} and {} have the name or UUID {wanted:?}, or are shown like that: give the id of the one that is meant",
            others.join(", "),
            last.id
        )));
    }
    match how {
        Meant::Itself => Ok(last),
        Meant::AsShown => Err(Error::failed(format!(
            "domain {} is shown as {wanted:?}, but its name has bytes that are no text: give its id or its UUID, {}",
            last.id, last.uuid
        ))),
    }
}

pub(super) fn no_such(wanted: &str) -> Error {
    Error::failed(format!(
        "there is no domain {wanted:?}: give a name or an id as `xl list` shows them, or a UUID"
    ))
}

#[cfg(test)]
mod tests {
    use locus_guest::addr::DomId;

    use super::super::mock_info;
    use super::*;

    fn domain(id: u16, dying: bool) -> DomainInfo {
        DomainInfo {
            dying,
            ..mock_info(id, "")
        }
    }

    const UUID: &str = "01234567-89ab-cdef-0123-456789abcdef";

    fn named(domain: DomainInfo, name: &[u8]) -> (Option<DomainName>, DomainInfo) {
        (Some(DomainName::of_bytes(name)), domain)
    }

    #[test]
    fn of_two_domains_with_one_name_none_is_taken() {
        let the_one = |all: &[DomainInfo]| {
            let all = all.iter().cloned().map(|domain| named(domain, b"web"));
            the_one("web", all.collect())
        };
        let error = the_one(&[domain(3, false), domain(5, false)]).unwrap_err();
        assert!(error.to_string().contains("domains 3 and 5"), "{error}");
        assert_eq!(the_one(&[domain(3, false)]).unwrap().id, DomId(3));
        // One that is being destroyed is not meant, unless it is the only one.
        let made_again = [domain(3, true), domain(5, false)];
        assert_eq!(the_one(&made_again).unwrap().id, DomId(5));
        assert_eq!(the_one(&[domain(3, true)]).unwrap().id, DomId(3));
        assert!(the_one(&[]).is_err());
    }

    #[test]
    fn a_domain_is_found_by_its_uuid_whatever_its_name() {
        let odd = || named(mock_info(3, UUID), b"w\xff");
        let web = || named(domain(5, false), b"web");
        let find = |wanted: &str, all| the_one(wanted, all).map(|info| info.id.0);
        assert_eq!(find(UUID, vec![odd(), web()]).unwrap(), 3);
        assert_eq!(find(&UUID.to_uppercase(), vec![odd(), web()]).unwrap(), 3);
        assert_eq!(
            find(UUID, vec![(None, mock_info(3, UUID)), web()]).unwrap(),
            3
        );
        // Another one is called like that.
        let liar = named(domain(7, false), UUID.as_bytes());
        let error = find(UUID, vec![odd(), web(), liar]).unwrap_err();
        assert!(error.to_string().contains("domains 3 and 7"), "{error}");
    }

    #[test]
    fn a_domain_is_not_taken_for_one_that_is_shown_alike() {
        let odd = || named(mock_info(3, UUID), b"w\xff");
        let web = || named(domain(5, false), b"w\\xff");
        let find = |all| the_one("w\\xff", all).map(|info| info.id.0);
        assert_eq!(find(vec![web()]).unwrap(), 5);
        let error = find(vec![odd()]).unwrap_err().to_string();
        assert!(
            error.contains("domain 3 is shown as") && error.contains(UUID),
            "{error}"
        );
        let error = find(vec![odd(), web()]).unwrap_err().to_string();
        assert!(error.contains("domains 3 and 5"), "{error}");
    }
}
