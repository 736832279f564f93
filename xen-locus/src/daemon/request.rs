//! One request: read, checked, carried out, answered.

use std::sync::atomic::Ordering;
use std::time::Duration;

use locus_payload::Payload;

use super::Settings;
use crate::apply::Report;
use crate::arena::now;
use crate::error::{Error, ExitCode, Result};
use crate::ops;
use crate::ops::host::Host;
use crate::plan::Mode;
use crate::storage::xenstore::ROOT;

/// Longest value of a request's node that is believed, in bytes.
const VALUE_MAX: usize = 256;
/// Longest name in a path of the protocol.
pub(super) const NAME_MAX: usize = 64;

/// What serves requests.
pub(super) struct Server<'s> {
    pub host: &'s Host,
    pub settings: &'s Settings,
}

/// What became of a request for now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Served {
    /// It is no request, or none any more.
    None,
    /// It is answered.
    Answered,
    /// It is to be tried again: a module that it changes is not loaded, and its deadline is ahead; or this daemon is
    /// asked to stop, and the next one carries it out.
    Waits,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Op {
    Apply(Mode),
    Revert,
}

/// What a request asks for.
#[derive(Debug, PartialEq, Eq)]
struct Request {
    op: Op,
    domain: String,
    uuid: Option<String>,
    patch: String,
    sha256: Option<String>,
    deadline: Option<u64>,
}

/// Whether `name` may stand in a path of the protocol.
fn is_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= NAME_MAX
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-')
}

impl Request {
    /// Checks the nodes of a request; `read` gives a node's value.
    fn parse(mut read: impl FnMut(&str) -> Result<Option<String>>) -> Result<Request> {
        let bad = |what: String| Error::usage(format!("malformed request: {what}"));
        let mut node = |name: &str| match read(name)? {
            Some(value) if value.len() > VALUE_MAX => Err(bad(format!(
                "{name} is {} bytes long; at most {VALUE_MAX}",
                value.len()
            ))),
            Some(value) => Ok(Some(value.trim().to_owned()).filter(|v| !v.is_empty())),
            None => Ok(None),
        };
        let op = match node("op")?.as_deref() {
            Some("apply") => Op::Apply(Mode::Apply),
            Some("replace") => Op::Apply(Mode::Replace),
            Some("revert") => Op::Revert,
            other => {
                return Err(bad(format!(
                    "op is {:?}; expected apply, replace or revert",
                    other.unwrap_or("")
                )))
            }
        };
        let domain = node("domain")?.ok_or_else(|| bad("no domain is given".into()))?;
        // As the toolstack writes it, or bare.
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
    fn waits_after(&self, error: &Error) -> bool {
        self.deadline.is_some() && error.is_not_loaded()
    }
}

impl Server<'_> {
    /// Serves request `id` if it is submitted and not answered yet.
    pub(super) fn serve(&self, id: &str) -> Result<Served> {
        if id.contains('/') {
            return Ok(Served::None);
        }
        let store = &self.host.store;
        let base = format!("{ROOT}/request/{id}");
        let write = |name: &str, value: &str| store.write(&format!("{base}/{name}"), value);
        let read = |name: &str| store.read(&format!("{base}/{name}"));
        let is_submitted = || Ok::<_, Error>(read("submit")?.is_some_and(|v| v.trim() == "1"));
        if !is_submitted()? {
            return Ok(Served::None);
        }
        if self.is_done(id)? {
            return Ok(Served::Answered);
        }
        write("state", "queued")?;
        let request = match is_name(id) {
            true => Request::parse(read),
            false => Err(Error::usage(format!(
                "malformed request: its ID is {id}; expected at most {NAME_MAX} letters, digits, _ and -"
            ))),
        };
        let (code, message) = match request {
            Err(error) => (error.exit_code(), error.to_string()),
            Ok(request) => {
                write("state", "running")?;
                match self.carry_out(id, &request) {
                    Ok(report) => (ExitCode::Done, format!("{}: {report}", report.patch)),
                    // The deadline is looked at first, so it ends this.
                    Err(error) if self.is_stopping() || request.waits_after(&error) => {
                        if is_submitted()? {
                            write("message", &told(&error))?;
                            write("state", "queued")?;
                        }
                        return Ok(Served::Waits);
                    }
                    Err(error) => (error.exit_code(), told(&error)),
                }
            }
        };
        // Whoever asked may have taken the request away meanwhile: it is not for us to make it anew.
        if is_submitted()? {
            write("rc", &(code as u8).to_string())?;
            write("message", &message)?;
            write("state", "done")?;
        }
        self.settings
            .say(0, format!("request {id}: rc {}: {message}", code as u8));
        Ok(Served::Answered)
    }

    /// Whether request `id` is answered.
    fn is_done(&self, id: &str) -> Result<bool> {
        let state = self
            .host
            .store
            .read(&format!("{ROOT}/request/{id}/state"))?;
        Ok(state.as_deref() == Some("done"))
    }

    /// Removes request `id`, unless it was made anew.
    pub(super) fn clear(&self, id: &str) -> Result<()> {
        match self.is_done(id)? {
            true => self.host.store.remove(&format!("{ROOT}/request/{id}")),
            false => Ok(()),
        }
    }

    /// Whether this daemon is asked to stop.
    pub(super) fn is_stopping(&self) -> bool {
        self.settings.options.interrupted.load(Ordering::SeqCst)
    }

    fn carry_out(&self, id: &str, request: &Request) -> Result<Report> {
        let mut desk = self.host.desk(format!("XenStore request {id}"));
        let mut options = self.settings.options.clone();
        if let Some(deadline) = request.deadline {
            let left = deadline
                .checked_sub(now())
                .ok_or_else(|| Error::try_again(format!("the deadline {deadline} has passed")))?;
            options.timeout = options.timeout.min(Duration::from_secs(left));
            desk.comes_again = Error::is_not_loaded;
        }
        let domain = self.host.guest(&request.domain)?;
        if let Some(uuid) = request.uuid.as_ref().filter(|u| **u != domain.info.uuid) {
            return Err(Error::failed(format!(
                "domain {} has UUID {}, not {uuid}: it is another guest than the request was made \
                 for",
                domain.label(),
                domain.info.uuid
            )));
        }
        let (patch, sha256) = (&request.patch, request.sha256.as_deref());
        match request.op {
            Op::Apply(mode) => {
                let payload = self.named(patch, sha256)?;
                ops::apply(&desk, &domain, &payload, mode, &options)
            }
            Op::Revert => ops::revert(&desk, &domain, patch, sha256, &options),
        }
    }

    /// The payload of this name, whose file must have this SHA-256, if one is given.
    pub(super) fn named(&self, name: &str, sha256: Option<&str>) -> Result<Payload> {
        let payload = Payload::read(&self.settings.payloads.join(format!("{name}.ko")))?;
        if payload.name != name {
            return Err(Error::failed(format!(
                "the payload in {name}.ko calls itself {}; name the file after it",
                payload.name
            )));
        }
        let found = hex::encode(payload.sha256);
        if let Some(wanted) = sha256.filter(|s| *s != found) {
            return Err(Error::failed(format!(
                "payload {name} has SHA-256 {found}, and {wanted} is asked for",
            )));
        }
        Ok(payload)
    }
}

/// An error in one line, the first few of those in the way named.
fn told(error: &Error) -> String {
    let mut text = error.to_string();
    if let Some(blocked) = error.blocked() {
        for b in blocked.blockers.iter().take(5) {
            text.push_str(&format!(
                "; {} ({}) {} {}+{:#x}",
                b.pid, b.comm, b.reason, b.function, b.offset
            ));
        }
    }
    cut(text)
}

/// No longer than a node should be.
fn cut(mut text: String) -> String {
    text.truncate(text.floor_char_boundary(1024));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

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
            op: Op::Apply(Mode::Apply),
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
        assert_eq!(parse(&good).unwrap().op, Op::Revert);
        let replace = [("op", "replace"), ("domain", "web"), ("patch", "fix")];
        assert_eq!(parse(&replace).unwrap().op, Op::Apply(Mode::Replace));
        for (name, value) in [
            ("op", "destroy"),
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
