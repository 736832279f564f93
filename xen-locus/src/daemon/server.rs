//! The worker's side: serves a request by the steps of the protocol, or publishes a guest.
//!
//! A request is carried out once, whenever its worker is killed. Before it is begun, the number of the audit log's last entry is
//! written to it, and then its state, `running`. Who finds a request in this state, under the lock of its guest's requests, recovers
//! what the worker before left, and reads in the log what came of it: a line of the request's own, or one of `recover`. The
//! answer is made of that line. If there is none, or the change was undone, the request is begun.

use std::cell::OnceCell;
use std::fs::File;
use std::sync::atomic::Ordering;
use std::time::Duration;

use locus_payload::Payload;
use locus_xen::DomainInfo;

use super::payloads;
use super::publisher::Mark;
use super::reapply;
use super::request::{IsSubmitted, Nodes as RequestNodes, Request};
use super::Settings;
use crate::apply::Report;
use crate::arena::now;
use crate::domain::Domain;
use crate::error::{Class, Error, ExitCode, Result};
use crate::operation::Operation;
use crate::ops;
use crate::ops::host::Host;
use crate::plan::Mode;
use crate::storage::audit::entries::{self, Entries};

/// What became of a request for now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Served {
    /// It is no request, or was removed.
    None,
    /// It is answered.
    Answered,
    /// It is to be tried again: this worker is asked to stop; or an earlier worker has not ended yet, or left what can't be
    /// recovered yet.
    Waits,
    /// It is to be tried again: a module that it changes is not loaded, and its deadline is not reached. What was asked for later
    /// does not wait for it.
    WaitsForModule,
}

/// What serving a request needs of the host.
trait Hands {
    /// A guest that was found.
    type Guest;
    /// Held while a request of the guest is served.
    type Lock;
    /// Whether this worker is asked to stop.
    fn is_stopping(&self) -> bool;
    /// Finds the request's guest.
    fn find(&self, request: &Request) -> Result<Self::Guest>;
    /// The UUID of a guest.
    fn uuid(guest: &Self::Guest) -> &str;
    /// Locks the requests of a guest.
    fn lock(&self, guest: &Self::Guest) -> Result<Self::Lock>;
    /// Recovers a guest from a worker before this one.
    fn recover(&self, guest: &Self::Guest) -> Result<()>;
    /// Carries the request out.
    fn carry_out(&self, guest: &Self::Guest, request: &Request) -> Result<Report>;
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
        let one = Serving {
            nodes: RequestNodes {
                store: &self.host.store,
                id,
            },
            log: &self.host.audit,
            hands: &Of { server: self, id },
            entry: OnceCell::new(),
        };
        let (served, said) = one.serve()?;
        if let Some(said) = said {
            self.settings.say(0, format!("request {id}: {said}"));
        }
        Ok(served)
    }

    /// Reads the status of a guest and publishes it. With `--reapply`, applies what it lost. The exit code says whether that is
    /// done, or that the guest can't be read as it is.
    ///
    /// # Errors
    /// XenStore failed; another run has the guest; something is to be applied later.
    pub(super) fn publish(&self, info: DomainInfo) -> Result<ExitCode> {
        let host = self.host;
        let domain = host.domain(info)?;
        // Before the look: a guest that is made again after this is looked at again.
        Mark::of(&host.store, domain.info.id).set()?;
        let status = match ops::look(&host.store, &host.audit, &domain) {
            // Only a reboot ends that, and then it is another domain.
            Err(error) if error.is_arena_lost() => {
                self.settings.say(0, format!("{}: {error}", domain.label()));
                return Ok(ExitCode::Done);
            }
            Err(error) if error.class() != Class::TryAgain => {
                let whom = domain.label();
                let said =
                    format!("{whom} is not published, and looked at less and less often: {error}");
                self.settings.say(1, said);
                return Ok(ExitCode::NotApplicable);
            }
            looked => looked?,
        };
        if self.settings.reapply {
            reapply::reapply(self, &domain, &status)?;
        }
        Ok(ExitCode::Done)
    }
}

/// What became of a request, and a sentence for the administrator, if there is one.
type Said = (Served, Option<String>);

/// A request that is served.
struct Serving<'a, H> {
    nodes: RequestNodes<'a>,
    log: &'a dyn Entries,
    hands: &'a H,
    /// Its node `entry`, once this worker serves it under the lock. Another request with its ID has another one, or none yet.
    entry: OnceCell<Option<String>>,
}

impl<H: Hands> Serving<'_, H> {
    fn serve(&self) -> Result<Said> {
        if let Some(not) = self.is_none()? {
            return Ok((not, None));
        }
        let request = match self.request() {
            Ok(request) => request,
            Err(error) if error.class() == Class::Usage => return self.fails(&error),
            // XenStore failed: that is no fault of the request.
            Err(error) => return Err(error),
        };
        let guest = match self.hands.find(&request) {
            Ok(guest) => guest,
            Err(error) if self.was_begun()? => return self.is_not_found(&request, &error),
            Err(error) => return self.fails(&error),
        };
        let _lock = match self.hands.lock(&guest) {
            Ok(lock) => lock,
            // Nothing is known yet, so its state stays what it is.
            Err(error) => return self.waits(&error, None),
        };
        // Who had the lock may have served it. Or its requester made another one of it, perhaps for another guest.
        if let Some(not) = self.is_none()? {
            return Ok((not, None));
        }
        if self.request().ok().as_ref() != Some(&request) {
            return Ok((Served::Waits, None));
        }
        if self.was_begun()? {
            let entry = self.nodes.read("entry")?;
            self.entry.get_or_init(|| entry);
            if let Some(said) = self.recover(&guest, &request)? {
                return Ok(said);
            }
        } else {
            let entry = match self.log.last_entry() {
                Ok(entry) => entry.to_string(),
                Err(error) => return self.fails(&error),
            };
            self.nodes.write("entry", &entry)?;
            self.entry.get_or_init(|| Some(entry));
            self.nodes.write("state", "running")?;
        }
        match self.hands.carry_out(&guest, &request) {
            Ok(report) => self.answer(ExitCode::Done as u8, &format!("{}: {report}", report.patch)),
            // This ends, because the deadline is checked before each try.
            Err(error) if request.waits_after(&error) => {
                let (served, said) = self.waits(&error, Some("queued"))?;
                let served = match served {
                    Served::Waits => Served::WaitsForModule,
                    ended => ended,
                };
                Ok((served, said))
            }
            // What is not as it was before is an answer.
            Err(error)
                if self.hands.is_stopping()
                    && matches!(error.class(), Class::Failed | Class::TryAgain) =>
            {
                self.waits(&error, Some("queued"))
            }
            Err(error) => self.fails(&error),
        }
    }

    /// What it is if it is not to be served.
    fn is_none(&self) -> Result<Option<Served>> {
        Ok(match self.nodes.is_submitted()? {
            IsSubmitted::No => Some(Served::None),
            IsSubmitted::Answered => Some(Served::Answered),
            IsSubmitted::Yes => None,
        })
    }

    fn request(&self) -> Result<Request> {
        Request::parse(|name| self.nodes.read(name))
    }

    fn was_begun(&self) -> Result<bool> {
        Ok(self.nodes.read("state")?.as_deref() == Some("running"))
    }

    /// Whether its requester has not made another one of it meanwhile.
    fn is_same(&self) -> Result<bool> {
        match self.entry.get() {
            Some(entry) => Ok(self.nodes.read("entry")? == *entry),
            None => Ok(true),
        }
    }

    fn waits(&self, error: &Error, state: Option<&str>) -> Result<Said> {
        let said = Some(format!("waits: {error}"));
        if !self.is_same()? {
            return Ok((Served::None, said));
        }
        match self.nodes.is_submitted()? {
            IsSubmitted::Yes => {}
            // The daemon gave an answer, because it had waited too long for one.
            IsSubmitted::Answered => return Ok((Served::Answered, said)),
            // Its requester has removed it: it must not be made again.
            IsSubmitted::No => {
                self.nodes.clear()?;
                return Ok((Served::None, said));
            }
        }
        self.nodes.say(&one_line(error))?;
        if let Some(state) = state {
            self.nodes.write("state", state)?;
        }
        // If it was removed right now, nobody removes what was written since.
        self.nodes.clear()?;
        Ok((Served::Waits, said))
    }

    fn answer(&self, code: u8, message: &str) -> Result<Said> {
        let said = Some(format!("rc {code}: {message}"));
        if !self.is_same()? {
            return Ok((Served::None, said));
        }
        self.nodes.answer(code, message)?;
        Ok((Served::Answered, said))
    }

    fn fails(&self, error: &Error) -> Result<Said> {
        self.answer(error.exit_code() as u8, &one_line(error))
    }

    /// Its guest is not found, and a worker has begun it. The guest may be rebooted, saved or migrated right now, with the change
    /// in force. So only the log can give an answer.
    fn is_not_found(&self, request: &Request, error: &Error) -> Result<Said> {
        match earlier(self.log, &self.nodes, request, request.uuid.as_deref()) {
            Ok(Some((code, message))) => self.answer(code, &message),
            Err(error) if error.is_uncertain() => self.fails(&error),
            Ok(None) => self.waits(error, None),
            Err(error) => self.waits(&error, None),
        }
    }

    /// A worker has begun it: recovers the guest from that one. `None` if nothing came of it, so that it is to be begun.
    fn recover(&self, guest: &H::Guest, request: &Request) -> Result<Option<Said>> {
        let uuid = request.uuid.as_deref().unwrap_or(H::uuid(guest));
        let earlier = || earlier(self.log, &self.nodes, request, Some(uuid));
        // What the log knows already is true also of a guest that can't be recovered.
        if let Ok(Some((code, message))) = earlier() {
            return self.answer(code, &message).map(Some);
        }
        let recovered = match self.hands.recover(guest) {
            Ok(()) => earlier(),
            // That won't pass.
            Err(error) if matches!(error.class(), Class::NotApplicable | Class::RolledBack) => {
                Err(Error::uncertain(format!(
                    "this request was begun before, and what it left can't be recovered, so it can't be told whether it was \
                     carried out: {error}"
                )))
            }
            Err(error) => Err(error),
        };
        match recovered {
            Ok(None) => Ok(None),
            Ok(Some((code, message))) => self.answer(code, &message).map(Some),
            Err(error) if error.is_uncertain() => self.fails(&error).map(Some),
            // It may be carried out, or not.
            Err(error) => self.waits(&error, None).map(Some),
        }
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
    let who = operator(nodes.id);
    let actions = log.since(entry, &|a| entries::concerns(a, &who, &request.patch))?;
    let actions =
        actions.ok_or_else(|| unknown("the audit log does not go back to that moment"))?;
    let op = request.op.name();
    entries::outcome(&actions, &who, op, &request.patch, uuid)
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

impl<'s> Hands for Of<'s> {
    type Guest = Domain<'s>;
    type Lock = File;

    fn is_stopping(&self) -> bool {
        self.server.is_stopping()
    }

    fn find(&self, request: &Request) -> Result<Domain<'s>> {
        self.server.host.guest(&request.domain)
    }

    fn uuid<'g>(domain: &'g Domain<'s>) -> &'g str {
        &domain.info.uuid
    }

    fn lock(&self, domain: &Domain<'s>) -> Result<File> {
        ops::take_for_requests(&domain.info.uuid, &self.server.settings.options)
    }

    fn recover(&self, domain: &Domain<'s>) -> Result<()> {
        let operator = self.server.host.operator(operator(self.id));
        ops::recover(&operator, domain, &self.server.settings.options).map(|_| ())
    }

    fn carry_out(&self, domain: &Domain<'s>, request: &Request) -> Result<Report> {
        self.server.carry_out(self.id, domain, request)
    }
}

impl Server<'_> {
    fn carry_out(&self, id: &str, domain: &Domain<'_>, request: &Request) -> Result<Report> {
        let mut operator = self.host.operator(operator(id));
        let mut options = self.settings.options.clone();
        if let Some(deadline) = request.deadline {
            let left = deadline.checked_sub(now()).ok_or_else(|| {
                let nodes = RequestNodes {
                    store: &self.host.store,
                    id,
                };
                is_too_late(&nodes, deadline)
            })?;
            options.timeout = options.timeout.min(Duration::from_secs(left));
            operator.retries_after = Error::is_not_loaded;
        }
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
                return ops::revert(&operator, domain, patch, sha256, &options);
            }
            Operation::Replace => Mode::Replace,
            _ => Mode::Apply,
        };
        let payload = self.named(patch, sha256)?;
        ops::apply(&operator, domain, &payload, mode, &options)
    }

    /// Reads the payload of this name, which only this user can have put there. If a SHA-256 is given, its file must have it.
    pub(super) fn named(&self, name: &str, sha256: Option<&str>) -> Result<Payload> {
        payloads::named(&self.settings.payloads, name, sha256)
    }
}

/// The deadline has passed. What the request waited for is its last message.
fn is_too_late(nodes: &RequestNodes<'_>, deadline: u64) -> Error {
    let passed = format!("the deadline {deadline} has passed");
    // Without it, the answer is still true.
    let last = nodes.read("message").ok().flatten();
    Error::try_again(match last.as_deref().unwrap_or_default() {
        "" => passed,
        last => format!("{passed}; until then it waited, because: {last}"),
    })
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
