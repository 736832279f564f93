//! Serves requests: the steps of the protocol, and the operations on the guests of this host.

use std::io;
use std::sync::atomic::Ordering;
use std::time::Duration;

use locus_guest::addr::DomId;
use locus_payload::Payload;
use locus_xen::{self as xen, DomainInfo};

use super::publisher::{Guests, Mark};
use super::reapply;
use super::request::{is_name, Request, NAME_MAX};
use super::requests::{Serve, Served};
use super::Settings;
use crate::apply::Report;
use crate::arena::now;
use crate::error::{Error, ExitCode, Result};
use crate::operation::Operation;
use crate::ops;
use crate::ops::host::Host;
use crate::paths;
use crate::plan::Mode;
use crate::storage::xenstore::{Nodes, ROOT};

/// Serves requests on the guests of a host.
pub(super) struct Server<'s> {
    pub(super) host: &'s Host,
    pub(super) settings: &'s Settings,
}

impl Serve for Server<'_> {
    fn is_stopping(&self) -> bool {
        self.settings.options.interrupted.load(Ordering::SeqCst)
    }

    fn serve(&self, id: &str) -> Result<Served> {
        let carry_out = |request: &Request| self.carry_out(id, request);
        let serve = || serve_one(&self.host.store, id, || self.is_stopping(), carry_out);
        let (served, answer) = xen::with_memory_locked(serve)?;
        if let Some(answer) = answer {
            self.settings.say(0, format!("request {id}: {answer}"));
        }
        Ok(served)
    }

    fn clear(&self, id: &str) -> Result<()> {
        match is_done(&self.host.store, id)? {
            true => self.host.store.remove(&format!("{ROOT}/request/{id}")),
            false => Ok(()),
        }
    }
}

impl Guests for Server<'_> {
    fn store(&self) -> &dyn Nodes {
        &self.host.store
    }

    fn domains(&self) -> Result<Vec<DomainInfo>> {
        Ok(self.host.control.domains(DomId(1))?)
    }

    fn publish(&self, info: DomainInfo) -> Result<()> {
        xen::with_memory_locked(|| {
            let host = self.host;
            let domain = host.domain(info)?;
            // Before the look: a guest that is made again after this is looked at again.
            Mark::of(&host.store, domain.info.id).set()?;
            let status = ops::look(&host.store, &host.audit, &domain)?;
            match self.settings.reapply {
                true => reapply::reapply(self, &domain, &status),
                false => Ok(()),
            }
        })
    }

    fn tell(&self, what: String) {
        self.settings.say(1, what);
    }
}

/// Serves request `id`, if it is submitted and not answered yet: reads it, carries it out and answers it. With what
/// became of it comes the answer, if there is one.
///
/// # Errors
/// XenStore failed. Other errors are answers.
fn serve_one(
    store: &dyn Nodes,
    id: &str,
    is_stopping: impl Fn() -> bool,
    carry_out: impl FnOnce(&Request) -> Result<Report>,
) -> Result<(Served, Option<String>)> {
    if id.contains('/') {
        return Ok((Served::None, None));
    }
    let base = format!("{ROOT}/request/{id}");
    let write = |name: &str, value: &str| store.write(&format!("{base}/{name}"), value);
    let read = |name: &str| store.read(&format!("{base}/{name}"));
    let is_submitted = || Ok::<_, Error>(read("submit")?.is_some_and(|v| v.trim() == "1"));
    if !is_submitted()? {
        return Ok((Served::None, None));
    }
    if is_done(store, id)? {
        return Ok((Served::Answered, None));
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
            match carry_out(&request) {
                Ok(report) => (ExitCode::Done, format!("{}: {report}", report.patch)),
                // This ends, because the deadline is checked before each try.
                Err(error) if is_stopping() || request.waits_after(&error) => {
                    if is_submitted()? {
                        write("message", &one_line(&error))?;
                        write("state", "queued")?;
                    }
                    return Ok((Served::Waits, None));
                }
                Err(error) => (error.exit_code(), one_line(&error)),
            }
        }
    };
    // The requester may have removed the request meanwhile: then it must not be made again.
    if is_submitted()? {
        write("rc", &(code as u8).to_string())?;
        write("message", &message)?;
        write("state", "done")?;
    }
    let answer = format!("rc {}: {message}", code as u8);
    Ok((Served::Answered, Some(answer)))
}

/// Whether request `id` is answered.
fn is_done(store: &dyn Nodes, id: &str) -> Result<bool> {
    let state = store.read(&format!("{ROOT}/request/{id}/state"))?;
    Ok(state.as_deref() == Some("done"))
}

impl Server<'_> {
    fn carry_out(&self, id: &str, request: &Request) -> Result<Report> {
        let mut operator = self.host.operator(format!("XenStore request {id}"));
        let mut options = self.settings.options.clone();
        if let Some(deadline) = request.deadline {
            let left = deadline
                .checked_sub(now())
                .ok_or_else(|| Error::try_again(format!("the deadline {deadline} has passed")))?;
            options.timeout = options.timeout.min(Duration::from_secs(left));
            operator.retries_after = Error::is_not_loaded;
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
        let mode = match request.op {
            Operation::Revert => {
                return ops::revert(&operator, &domain, patch, sha256, &options);
            }
            Operation::Replace => Mode::Replace,
            _ => Mode::Apply,
        };
        let payload = self.named(patch, sha256)?;
        ops::apply(&operator, &domain, &payload, mode, &options)
    }

    /// Reads the payload of this name, which only this user can have put there. If a SHA-256 is given, its file must have it.
    pub(super) fn named(&self, name: &str, sha256: Option<&str>) -> Result<Payload> {
        let path = self.settings.payloads.join(format!("{name}.ko"));
        for place in [&self.settings.payloads, &path] {
            match paths::check_own(place) {
                // That is said below.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                checked => checked.map_err(|error| {
                    Error::failed(format!("payload {name} is not applied: {error}"))
                })?,
            }
        }
        let payload = Payload::read(&path)?;
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

/// An error in one line, with the first few threads that block.
fn one_line(error: &Error) -> String {
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

/// Cuts a text to the length of a node.
fn cut(mut text: String) -> String {
    text.truncate(text.floor_char_boundary(1024));
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::apply;
    use crate::storage::mock::MockStore;

    /// A store with a request, which has these nodes too.
    fn store(more: &[(&str, &str)]) -> MockStore {
        let store = MockStore::default();
        let request = [
            ("op", "revert"),
            ("domain", "web"),
            ("patch", "fix"),
            ("submit", "1"),
        ];
        for (name, value) in request.iter().chain(more) {
            store.put(&format!("{ROOT}/request/r/{name}"), value);
        }
        store
    }

    fn node(store: &MockStore, name: &str) -> String {
        let value = store.value(&format!("{ROOT}/request/r/{name}"));
        value.unwrap_or_default()
    }

    fn serve(
        store: &MockStore,
        is_stopping: bool,
        carry_out: impl FnOnce(&Request) -> Result<Report>,
    ) -> Served {
        serve_one(store, "r", || is_stopping, carry_out).unwrap().0
    }

    #[test]
    fn a_request_is_queued_then_running_then_done_and_its_state_is_written_last() {
        let store = store(&[]);
        let served = serve(&store, false, |request| {
            assert_eq!(request.op, Operation::Revert);
            assert_eq!(node(&store, "state"), "running");
            assert_eq!(node(&store, "rc"), "");
            Ok(apply::nothing_to_do("fix"))
        });
        assert_eq!(served, Served::Answered);
        assert_eq!(
            (&*node(&store, "state"), &*node(&store, "rc")),
            ("done", "0")
        );
        // It is answered once.
        let never = |_: &Request| -> Result<Report> { panic!("carried out again") };
        assert_eq!(serve(&store, false, never), Served::Answered);
    }

    #[test]
    fn a_malformed_request_is_answered_and_not_carried_out() {
        let store = store(&[("op", "destroy")]);
        let never = |_: &Request| -> Result<Report> { panic!("carried out") };
        assert_eq!(serve(&store, false, never), Served::Answered);
        assert_eq!(node(&store, "rc"), (ExitCode::Usage as u8).to_string());
    }

    #[test]
    fn a_request_with_a_deadline_waits_for_a_module_and_for_nothing_else() {
        let not_loaded = |_: &Request| Err(Error::not_loaded("ext4 is not loaded"));
        let failed = |_: &Request| Err(Error::failed("no"));
        let deadline = [("deadline", "12")];
        for (more, waits) in [(&deadline[..], true), (&[], false)] {
            let store = store(more);
            let served = serve(&store, false, not_loaded);
            assert_eq!(served == Served::Waits, waits);
            assert_eq!(node(&store, "message"), "ext4 is not loaded");
            let state = if waits { "queued" } else { "done" };
            assert_eq!(node(&store, "state"), state);
        }
        assert_eq!(serve(&store(&deadline), false, failed), Served::Answered);
    }

    #[test]
    fn what_fails_while_the_daemon_is_asked_to_stop_is_left_to_the_next_one() {
        let store = store(&[]);
        let served = serve(&store, true, |_| Err(Error::failed("interrupted")));
        assert_eq!(served, Served::Waits);
        assert_eq!(
            (&*node(&store, "state"), &*node(&store, "rc")),
            ("queued", "")
        );
    }

    #[test]
    fn a_request_that_is_removed_while_it_runs_is_not_made_again() {
        for result in [Ok(()), Err("it is gone")] {
            let store = store(&[]);
            serve(&store, false, |_| {
                store.remove(&format!("{ROOT}/request/r")).unwrap();
                result
                    .map_err(Error::failed)
                    .map(|()| apply::nothing_to_do("fix"))
            });
            assert!(store.nodes.borrow().is_empty(), "{result:?}");
        }
    }

    #[test]
    fn what_is_not_submitted_is_no_request() {
        let never = |_: &Request| -> Result<Report> { panic!("carried out") };
        assert_eq!(
            serve(&store(&[("submit", "0")]), false, never),
            Served::None
        );
        assert_eq!(serve(&MockStore::default(), false, never), Served::None);
    }

    #[test]
    fn an_answer_fits_a_node() {
        assert_eq!(cut("\u{20ac}".repeat(1000)).len(), 1023);
    }
}
