#![doc = include_str!("manual/blocking.md")]

use std::collections::HashSet;
use std::path::Path;

use locus_guest::Vcpu;
use locus_kernel::Kernel;
use locus_payload::Payload;
use serde_json::json;

use super::args::{self, DomainOrCore, Output};
use super::guest::{self, Guest};
use super::info::stacks::{self, RenderedStacks};
use super::{out, Session};
use crate::apply;
use crate::arena::Arena;
use crate::blocker::Blocker;
use crate::error::{ExitCode, Result};
use crate::machine;
use crate::plan::{self, Mode, PatchStack, Readiness};
use crate::quiesce::{self, Watch};

/// What the user asks about: applying a payload, or reverting a patch.
pub(super) enum PayloadOrPatch {
    Payload(Box<Payload>),
    Patch(String),
}

impl PayloadOrPatch {
    /// A payload's file has a folder before its name or `.ko` behind it; a patch's name has neither.
    pub(super) fn of(what: &str) -> Result<PayloadOrPatch> {
        if what.contains('/') || what.ends_with(".ko") {
            let payload = Payload::read(Path::new(what))?;
            return Ok(PayloadOrPatch::Payload(Box::new(payload)));
        }
        Ok(PayloadOrPatch::Patch(what.to_owned()))
    }

    pub(super) fn name(&self) -> &str {
        match self {
            PayloadOrPatch::Payload(payload) => &payload.name,
            PayloadOrPatch::Patch(name) => name,
        }
    }

    /// What is asked, and what is so already if there is nothing to do.
    fn words(&self) -> (&'static str, &'static str) {
        match self {
            PayloadOrPatch::Payload(_) => ("applying", "already applied"),
            PayloadOrPatch::Patch(_) => ("reverting", "not applied"),
        }
    }

    /// Code in which no thread may be; `None` if there is nothing to do.
    pub(super) fn watch(&self, kernel: &Kernel<'_>) -> Result<Option<Watch>> {
        let arena = Arena::read(kernel)?;
        Ok(match self {
            PayloadOrPatch::Payload(payload) => {
                match plan::prepare(kernel, &arena, payload, Mode::Apply)? {
                    Readiness::Ready(ready) => Some(ready.plan.watch),
                    Readiness::Already(_) => None,
                }
            }
            PayloadOrPatch::Patch(name) => {
                let residents = plan::residents(kernel, &arena)?;
                let stack = PatchStack::new(&residents);
                match stack.named(&residents, name)? {
                    Some(resident) => Some(plan::undo(kernel, &stack, resident)?.watch),
                    None => None,
                }
            }
        })
    }
}

/// The threads in the way.
struct Blocking {
    /// `None` if there is nothing to do.
    blockers: Option<Vec<Blocker>>,
    /// Their stacks, if they are asked for.
    stacks: Option<RenderedStacks>,
}

impl Blocking {
    fn of(
        session: &Session,
        kernel: &Kernel<'_>,
        registers: &[Vcpu],
        blockers: Option<Vec<Blocker>>,
    ) -> Result<Blocking> {
        let all = blockers.as_deref().unwrap_or_default();
        let wanted: HashSet<u32> = all.iter().map(|b| b.pid).collect();
        let stacks = if session.verbose == 0 || all.is_empty() {
            None
        } else {
            let of = |pid| wanted.contains(&pid);
            Some(stacks::of(session.output, kernel, registers, of)?)
        };
        Ok(Blocking { blockers, stacks })
    }
}

/// Runs the command.
///
/// # Errors
/// The guest can't be read, or the payload or patch is not for it.
pub fn run(session: &Session, args: &args::Blocking) -> anyhow::Result<ExitCode> {
    let (named, what) = DomainOrCore::and_last(&args.words, args.core.clone())?;
    let asked = PayloadOrPatch::of(&what.to_string_lossy())?;
    if let Some(path) = &named.core {
        let (guest, found) = guest::with_core(path, |guest, kernel, core| {
            let blockers = match asked.watch(kernel)? {
                Some(watch) => Some(quiesce::inside(kernel, core.vcpus(), &watch)?),
                None => None,
            };
            let found = Blocking::of(session, kernel, core.vcpus(), blockers)?;
            Ok((guest.clone(), found))
        })?;
        return Ok(print(session, &guest, &asked, found));
    }
    let host = session.host()?;
    let (guest, found) = guest::on_domain(&host, named.domain()?, |domain| {
        let kernel = machine::kernel_of(domain)?;
        let options = session.unhurried();
        let blockers = match asked.watch(&kernel)? {
            Some(watch) => Some(apply::blocking(domain, &kernel, &watch, &options)?),
            None => None,
        };
        let found = Blocking::of(session, &kernel, &[], blockers)?;
        Ok((Guest::of(domain), found))
    })?;
    Ok(print(session, &guest, &asked, found))
}

fn print(session: &Session, guest: &Guest, asked: &PayloadOrPatch, found: Blocking) -> ExitCode {
    let name = asked.name();
    let (verb, done) = asked.words();
    let label = guest.label();
    match (session.output, found.blockers) {
        (Output::Json, blockers) => {
            let mut object = json!({ "patch": name, "blockers": blockers.unwrap_or_default() });
            if session.verbose > 0 {
                let stacks = match found.stacks {
                    Some(RenderedStacks::Objects(all)) => all,
                    _ => Vec::new(),
                };
                if let Some(map) = object.as_object_mut() {
                    map.insert("stack_list".into(), stacks.into());
                }
            }
            out::object(guest.object(object));
        }
        (Output::Table, None) => {
            out::line(&format!("{label}: {name} is {done}; nothing to do"));
        }
        (Output::Table, Some(all)) if all.is_empty() => {
            out::line(&format!(
                "{label}: no thread is in the way of {verb} {name}"
            ));
        }
        (Output::Table, Some(all)) => {
            out::line(&format!("{label}: in the way of {verb} {name}:"));
            out::text(&out::blockers(&all));
            if let Some(RenderedStacks::Text(stacks)) = &found.stacks {
                for one in stacks {
                    out::text(&format!("\n{one}"));
                }
            }
        }
    }
    ExitCode::Done
}
