//! One request: its nodes are read and checked.

use crate::error::{Error, Result};
use crate::operation::Operation;
use crate::say;
use crate::storage::xenstore::{self, ROOT};

/// Longest value of a request's node that is accepted, in bytes.
const VALUE_MAX: usize = 256;
/// Longest name in a path of the protocol.
pub(super) const NAME_MAX: usize = 64;

/// What a request asks for.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Request {
    /// Apply, replace or revert.
    pub(super) op: Operation,
    /// Name, id or UUID of the domain.
    pub(super) domain: String,
    /// The UUID that the domain must have.
    pub(super) uuid: Option<String>,
    pub(super) patch: String,
    /// SHA-256 that the patch's file must have, in hex.
    pub(super) sha256: Option<String>,
    /// Until when it may wait for a module, in seconds since 1970.
    pub(super) deadline: Option<u64>,
}

/// Longest message of an answer.
const MESSAGE_MAX: usize = 1024;

/// Whether a request is one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum IsSubmitted {
    /// It is not there, or not whole yet.
    No,
    /// It waits for an answer.
    Yes,
    /// It has its answer.
    Answered,
}

/// The nodes of the request `id`.
#[derive(Debug)]
pub(super) struct Nodes<'s> {
    pub(super) store: &'s dyn xenstore::Nodes,
    pub(super) id: &'s str,
}

impl Nodes<'_> {
    fn path(&self, name: &str) -> String {
        format!("{ROOT}/request/{}/{name}", self.id)
    }

    pub(super) fn read(&self, name: &str) -> Result<Option<String>> {
        self.store.read(&self.path(name))
    }

    pub(super) fn write(&self, name: &str, value: &str) -> Result<()> {
        self.store.write(&self.path(name), value)
    }

    pub(super) fn remove(&self) -> Result<()> {
        self.store.remove(&format!("{ROOT}/request/{}", self.id))
    }

    pub(super) fn is_submitted(&self) -> Result<IsSubmitted> {
        if self.read("submit")?.is_none_or(|v| v.trim() != "1") {
            return Ok(IsSubmitted::No);
        }
        Ok(match self.read("state")?.as_deref() {
            Some("done") => IsSubmitted::Answered,
            _ => IsSubmitted::Yes,
        })
    }

    /// Whose request it is: the UUID if one is given, else what stands for the domain.
    pub(super) fn guest(&self) -> Result<String> {
        let node = |name| -> Result<Option<String>> {
            let value = self.read(name)?.map(|v| bare(v.trim()));
            Ok(value.filter(|v| !v.is_empty() && v.len() <= VALUE_MAX))
        };
        Ok(match node("uuid")? {
            Some(uuid) => uuid,
            None => node("domain")?.unwrap_or_default(),
        })
    }

    /// Removes what was written of a request since its requester removed it; nothing if there is a node of a requester.
    pub(super) fn clear(&self) -> Result<()> {
        const OURS: [&str; 4] = ["entry", "message", "rc", "state"];
        let all = self
            .store
            .children(&format!("{ROOT}/request/{}", self.id))?;
        match !all.is_empty() && all.iter().all(|name| OURS.contains(&&**name)) {
            true => self.remove(),
            false => Ok(()),
        }
    }

    /// Writes the message: one line, cut to the length that is kept.
    pub(super) fn say(&self, message: &str) -> Result<()> {
        self.write("message", cut(&say::one_line(message)))
    }

    /// Writes the answer, the node that commits it last; nothing if the requester has removed the request, or it has its answer.
    pub(super) fn answer(&self, code: u8, message: &str) -> Result<()> {
        match self.is_submitted()? {
            IsSubmitted::Yes => {}
            IsSubmitted::Answered => return Ok(()),
            IsSubmitted::No => return self.clear(),
        }
        self.write("rc", &code.to_string())?;
        self.say(message)?;
        self.write("state", "done")?;
        // If it was removed right now, nobody removes what was written since.
        self.clear()
    }
}

/// Cuts a message to the length that is kept.
fn cut(message: &str) -> &str {
    let end = message.floor_char_boundary(MESSAGE_MAX);
    message.get(..end).unwrap_or(message)
}

/// A UUID as the toolstack writes it (`/vm/UUID`), or alone.
fn bare(uuid: &str) -> String {
    uuid.strip_prefix("/vm/")
        .unwrap_or(uuid)
        .to_ascii_lowercase()
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
        let uuid = node("uuid")?.map(|uuid| bare(&uuid));
        if uuid.is_none() && domain.bytes().all(|b| b.is_ascii_digit()) {
            return Err(bad(format!(
                "domain is the id {domain} and no uuid is given; ids are reused, so write the uuid \
                 too (xenstore-read /local/domain/{domain}/vm), or give the domain's name"
            )));
        }
        let patch = node("patch")?.ok_or_else(|| bad("no patch is given".into()))?;
        if !is_name(&patch) {
            return Err(bad(format!(
                "patch is {patch:?}; expected a name of at most {NAME_MAX} letters, digits, _ and -: payloads are \
                 named, never carried"
            )));
        }
        let sha256 = node("sha256")?.map(|s| s.to_ascii_lowercase());
        let is_digest = |s: &String| s.len() == 64 && s.bytes().all(|b| b.is_ascii_hexdigit());
        if let Some(odd) = sha256.as_ref().filter(|s| !is_digest(s)) {
            return Err(bad(format!(
                "sha256 is {odd:?}; expected the whole digest, 64 hex digits, as sha256sum prints it"
            )));
        }
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
    use crate::storage::mock::MockStore;

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
            ("sha256", "abcd"),
            ("sha256", &"x".repeat(64)),
            ("patch", &"p".repeat(NAME_MAX + 1)),
        ] {
            let mut nodes = good.to_vec();
            nodes.retain(|(n, _)| *n != name);
            nodes.push((name, value));
            let error = parse(&nodes).unwrap_err();
            assert_eq!(error.exit_code(), ExitCode::Usage, "{name}={value}");
        }
        let mut whole = good.to_vec();
        let digest = "0aF".repeat(21) + "9";
        whole.push(("sha256", &digest));
        let request = parse(&whole).unwrap();
        assert_eq!(request.sha256, Some(digest.to_ascii_lowercase()));
        let long = "x".repeat(VALUE_MAX + 1);
        assert!(parse(&[("op", &long)]).is_err());
    }

    #[test]
    fn nothing_stays_of_a_request_that_is_removed_while_it_is_answered() {
        let store = MockStore::default();
        store.removed_before.set("rc");
        for (name, value) in [("op", "apply"), ("submit", "1")] {
            store.put(&format!("{ROOT}/request/r/{name}"), value);
        }
        let nodes = Nodes {
            store: &store,
            id: "r",
        };
        nodes.answer(0, "done").unwrap();
        assert!(store.nodes.borrow().is_empty());
    }

    #[test]
    fn an_answer_fits_a_node() {
        assert_eq!(cut(&"\u{20ac}".repeat(1000)).len(), 1023);
        // Each of these becomes six characters.
        let store = MockStore::default();
        let nodes = Nodes {
            store: &store,
            id: "a",
        };
        nodes.say(&"\n".repeat(MESSAGE_MAX)).unwrap();
        let said = store.value(&format!("{ROOT}/request/a/message")).unwrap();
        assert_eq!((said.len(), said.contains('\n')), (MESSAGE_MAX, false));
    }
}
