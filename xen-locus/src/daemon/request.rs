//! One request: its nodes are read and checked.

use crate::error::{Error, Result};
use crate::operation::Operation;

/// Longest value of a request's node that is accepted, in bytes.
const VALUE_MAX: usize = 256;
/// Longest name in a path of the protocol.
pub(super) const NAME_MAX: usize = 64;

/// What a request asks for.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Request {
    /// Apply, replace or revert.
    pub(super) op: Operation,
    /// Name or id of the domain.
    pub(super) domain: String,
    /// The UUID that the domain must have.
    pub(super) uuid: Option<String>,
    pub(super) patch: String,
    /// SHA-256 that the patch's file must have, in hex.
    pub(super) sha256: Option<String>,
    /// Until when it may wait for a module, in seconds since 1970.
    pub(super) deadline: Option<u64>,
}

/// Whether `name` may be part of a path of the protocol.
pub(super) fn is_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= NAME_MAX
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-')
}

impl Request {
    /// Checks the nodes of a request; `read` gives a node's value.
    pub(super) fn parse(mut read: impl FnMut(&str) -> Result<Option<String>>) -> Result<Request> {
        let bad = |what: String| Error::usage(format!("malformed request: {what}"));
        let mut node = |name: &str| match read(name)? {
            Some(value) if value.len() > VALUE_MAX => Err(bad(format!(
                "{name} is {} bytes long; at most {VALUE_MAX}",
                value.len()
            ))),
            Some(value) => Ok(Some(value.trim().to_owned()).filter(|v| !v.is_empty())),
            None => Ok(None),
        };
        let word = node("op")?.unwrap_or_default();
        let op = match Operation::named(&word) {
            Some(op @ (Operation::Apply | Operation::Replace | Operation::Revert)) => op,
            _ => {
                return Err(bad(format!(
                    "op is {word:?}; expected apply, replace or revert"
                )))
            }
        };
        let domain = node("domain")?.ok_or_else(|| bad("no domain is given".into()))?;
        // As the toolstack writes it (`/vm/UUID`), or the UUID alone.
        let bare = |u: String| u.strip_prefix("/vm/").unwrap_or(&u).to_ascii_lowercase();
        let uuid = node("uuid")?.map(bare);
        if uuid.is_none() && domain.bytes().all(|b| b.is_ascii_digit()) {
            return Err(bad(format!(
                "domain is the id {domain} and no uuid is given; ids are reused, so write the uuid \
                 too (xenstore-read /local/domain/{domain}/vm), or give the domain's name"
            )));
        }
        let patch = node("patch")?.ok_or_else(|| bad("no patch is given".into()))?;
        if !is_name(&patch) {
            return Err(bad(format!(
                "patch is {patch:?}; expected a name of letters, digits, _ and -: payloads are \
                 named, never carried"
            )));
        }
        let sha256 = node("sha256")?.map(|s| s.to_ascii_lowercase());
        let deadline =
            match node("deadline")? {
                None => None,
                Some(text) => Some(text.parse().map_err(|_| {
                    bad(format!("deadline is {text:?}; expected seconds since 1970"))
                })?),
            };
        Ok(Request {
            op,
            domain,
            uuid,
            patch,
            sha256,
            deadline,
        })
    }
}

impl Request {
    /// Whether it is to be tried again after this error.
    pub(super) fn waits_after(&self, error: &Error) -> bool {
        self.deadline.is_some() && error.is_not_loaded()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ExitCode;

    fn parse(nodes: &[(&str, &str)]) -> Result<Request> {
        Request::parse(|name| {
            Ok(nodes
                .iter()
                .find(|(n, _)| *n == name)
                .map(|(_, v)| (*v).to_owned()))
        })
    }

    #[test]
    fn a_whole_request_is_understood() {
        let request = parse(&[
            ("op", "apply"),
            ("domain", "7"),
            ("uuid", "/vm/AB"),
            ("patch", "fix_1"),
            ("deadline", "12"),
        ]);
        let expected = Request {
            op: Operation::Apply,
            domain: "7".into(),
            uuid: Some("ab".into()),
            patch: "fix_1".into(),
            sha256: None,
            deadline: Some(12),
        };
        assert_eq!(request.unwrap(), expected);
    }

    #[test]
    fn a_malformed_request_is_refused_with_a_sentence() {
        let good = [("op", "revert"), ("domain", "web"), ("patch", "fix")];
        assert_eq!(parse(&good).unwrap().op, Operation::Revert);
        let replace = [("op", "replace"), ("domain", "web"), ("patch", "fix")];
        assert_eq!(parse(&replace).unwrap().op, Operation::Replace);
        for (name, value) in [
            ("op", "destroy"),
            ("op", "nudge"),
            ("op", "recover"),
            ("op", ""),
            ("domain", ""),
            ("domain", "3"),
            ("patch", "../../etc/passwd"),
            ("patch", ""),
            ("deadline", "tomorrow"),
        ] {
            let mut nodes = good.to_vec();
            nodes.retain(|(n, _)| *n != name);
            nodes.push((name, value));
            let error = parse(&nodes).unwrap_err();
            assert_eq!(error.exit_code(), ExitCode::Usage, "{name}={value}");
        }
        let long = "x".repeat(VALUE_MAX + 1);
        assert!(parse(&[("op", &long)]).is_err());
    }
}
