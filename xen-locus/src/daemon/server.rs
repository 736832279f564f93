//! The worker's side: serves a request by the steps of the protocol, or publishes a guest.
//!
//! A request is carried out once, whenever its worker is killed. Before it is begun, the number of the audit log's last entry is
//! written to it, and then its state, `running`. Who finds a request in this state, under the lock of its guest's requests, settles
//! what the worker before left, and reads in the log what came of it: a line of the request's own, or one of `recover`. The
//! answer is made of that line. If there is none, or the change was undone, the request is begun.

use std::fs::File;
use std::io;
use std::sync::atomic::Ordering;
use std::time::Duration;

use locus_payload::Payload;
use locus_xen::DomainInfo;

use super::publisher::Mark;
use super::reapply;
use super::request::{IsSubmitted, Nodes as RequestNodes, Request};
use super::Settings;
use crate::apply::Report;
use crate::arena::now;
use crate::error::{Class, Error, ExitCode, Result};
use crate::operation::Operation;
use crate::ops;
use crate::ops::host::Host;
use crate::paths;
use crate::plan::Mode;
use crate::storage::audit::entries::{self, Entries};
use crate::storage::xenstore::Nodes;

/// What became of a request for now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Served {
    /// It is no request, or was removed.
    None,
    /// It is answered.
    Answered,
    /// It is to be tried again: a module that it changes is not loaded, and its deadline is not reached; this worker is asked
    /// to stop; or an earlier worker has not ended yet, or left what can't be settled yet.
    Waits,
}

/// What serving a request needs of the host.
trait Hands {
    /// Held while requests of the guest are served.
    type Lock;
    /// Whether this worker is asked to stop.
    fn is_stopping(&self) -> bool;
    /// Locks the requests of the request's guest. If a worker before this one has begun the request, what that left is settled.
    /// `None` if there is no such guest; else with the lock the guest's UUID.
    fn claim(&self, request: &Request, was_begun: bool) -> Result<Option<(Self::Lock, String)>>;
    /// Carries the request out.
    fn carry_out(&self, request: &Request) -> Result<Report>;
}

/// Works on the guests of a host.
pub(super) struct Server<'s> {
    pub(super) host: &'s Host,
    pub(super) settings: &'s Settings,
}

impl Server<'_> {
    pub(super) fn is_stopping(&self) -> bool {
        self.settings.options.interrupted.load(Ordering::SeqCst)
    }

    /// Serves request `id`, if it is submitted and not answered yet.
    ///
    /// # Errors
    /// XenStore failed. Other errors are answers.
    pub(super) fn serve(&self, id: &str) -> Result<Served> {
        let hands = Of { server: self, id };
        let (served, said) = serve_one(&self.host.store, &self.host.audit, id, &hands)?;
        if let Some(said) = said {
            self.settings.say(0, format!("request {id}: {said}"));
        }
        Ok(served)
    }

    /// Reads the status of a guest and publishes it. With `--reapply`, applies what it lost.
    ///
    /// # Errors
    /// It can't be read; XenStore failed; something is to be applied later.
    pub(super) fn publish(&self, info: DomainInfo) -> Result<()> {
        let host = self.host;
        let domain = host.domain(info)?;
        // Before the look: a guest that is made again after this is looked at again.
        Mark::of(&host.store, domain.info.id).set()?;
        let status = ops::look(&host.store, &host.audit, &domain)?;
        match self.settings.reapply {
            true => reapply::reapply(self, &domain, &status),
            false => Ok(()),
        }
    }
}

/// Serves a request. With what became of it comes a sentence for the administrator, if there is one.
fn serve_one(
    store: &dyn Nodes,
    log: &dyn Entries,
    id: &str,
    hands: &impl Hands,
) -> Result<(Served, Option<String>)> {
    let nodes = RequestNodes { store, id };
    match nodes.is_submitted()? {
        IsSubmitted::No => return Ok((Served::None, None)),
        IsSubmitted::Answered => return Ok((Served::Answered, None)),
        IsSubmitted::Yes => {}
    }
    let waits = |error: &Error, state: Option<&str>| {
        // The requester may have removed the request meanwhile: then it must not be made again.
        if nodes.is_submitted()? != IsSubmitted::No {
            nodes.say(&one_line(error))?;
            if let Some(state) = state {
                nodes.write("state", state)?;
            }
        }
        Ok((Served::Waits, Some(format!("waits: {error}"))))
    };
    let answer = |code: u8, message: &str| {
        nodes.answer(code, message)?;
        Ok((Served::Answered, Some(format!("rc {code}: {message}"))))
    };
    let fails = |error: &Error| answer(error.exit_code() as u8, &one_line(error));
    let request = match Request::parse(|name| nodes.read(name)) {
        Ok(request) => request,
        Err(error) if error.class() == Class::Usage => return fails(&error),
        // XenStore failed: that is no fault of the request.
        Err(error) => return Err(error),
    };
    let was_begun = nodes.read("state")?.as_deref() == Some("running");
    let claimed = match hands.claim(&request, was_begun) {
        Ok(claimed) => claimed,
        // Nothing is known yet, so its state stays what it is.
        Err(error) => return waits(&error, None),
    };
    if was_begun {
        let uuid = claimed.as_ref().map(|(_, uuid)| uuid);
        let uuid = uuid.or(request.uuid.as_ref()).map(String::as_str);
        match earlier(log, &nodes, &request, uuid) {
            Ok(None) => {}
            Ok(Some((code, message))) => return answer(code, &message),
            Err(error) => return fails(&error),
        }
    } else {
        match log.last_entry() {
            Ok(entry) => nodes.write("entry", &entry.to_string())?,
            Err(error) => return fails(&error),
        }
        nodes.write("state", "running")?;
    }
    match hands.carry_out(&request) {
        Ok(report) => answer(ExitCode::Done as u8, &format!("{}: {report}", report.patch)),
        // This ends, because the deadline is checked before each try.
        Err(error) if request.waits_after(&error) => waits(&error, Some("queued")),
        // What is not as it was before is an answer.
        Err(error)
            if hands.is_stopping() && matches!(error.class(), Class::Failed | Class::TryAgain) =>
        {
            waits(&error, Some("queued"))
        }
        Err(error) => fails(&error),
    }
}

/// Exit code and message of a request that was begun before, if it was carried out.
///
/// # Errors
/// [`Class::Uncertain`]: it can't be told.
fn earlier(
    log: &dyn Entries,
    nodes: &RequestNodes<'_>,
    request: &Request,
    uuid: Option<&str>,
) -> Result<Option<(u8, String)>> {
    let unknown = |why: &str| {
        Error::uncertain(format!(
            "this request was begun before, and {why}, so it can't be told whether it was carried out: see `xen-locus status` \
             and `xen-locus history`, and make another request if it is still needed"
        ))
    };
    let entry = nodes.read("entry")?;
    let entry = entry.and_then(|text| text.trim().parse().ok());
    let entry = entry.ok_or_else(|| unknown("by a daemon of an earlier version"))?;
    let actions = log.since(entry)?;
    let actions =
        actions.ok_or_else(|| unknown("the audit log does not go back to that moment"))?;
    let op = request.op.name();
    entries::outcome(&actions, &operator(nodes.id), op, &request.patch, uuid)
}

/// Who carries out the request `id`, for the audit log.
fn operator(id: &str) -> String {
    format!("XenStore request {id}")
}

/// The hands of a worker for request `id`.
struct Of<'s> {
    server: &'s Server<'s>,
    id: &'s str,
}

impl Hands for Of<'_> {
    type Lock = File;

    fn is_stopping(&self) -> bool {
        self.server.is_stopping()
    }

    fn claim(&self, request: &Request, was_begun: bool) -> Result<Option<(File, String)>> {
        let host = self.server.host;
        // Carrying it out says why.
        let Ok(domain) = host.guest(&request.domain) else {
            return Ok(None);
        };
        let uuid = domain.info.uuid.clone();
        let options = &self.server.settings.options;
        let lock = ops::take_for_requests(&uuid, options)?;
        if was_begun {
            ops::recover(&host.operator(operator(self.id)), &domain, options)?;
        }
        Ok(Some((lock, uuid)))
    }

    fn carry_out(&self, request: &Request) -> Result<Report> {
        self.server.carry_out(self.id, request)
    }
}

impl Server<'_> {
    fn carry_out(&self, id: &str, request: &Request) -> Result<Report> {
        let mut operator = self.host.operator(operator(id));
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
    text
}

#[cfg(test)]
mod tests;
