//! `xen-locus blocking DOMAIN FILE|PATCH`: who is in the way of applying a payload, or of reverting a
//! patch. Changes nothing.

use std::path::Path;

use locus_guest::Vcpu;
use locus_kernel::Kernel;
use locus_payload::Payload;
use serde_json::json;

use super::args::{Blocking, Output};
use super::info::stacks::{self, Shown};
use super::subject::{self, Subject};
use super::{out, Session};
use crate::apply::{self, Options};
use crate::arena::Arena;
use crate::blocker::Blocker;
use crate::error::{ExitCode, Result};
use crate::machine;
use crate::plan::{self, Mode, Readiness, Stack};
use crate::quiesce::{self, Watch};

/// What is about to be done.
pub(super) enum Change {
    Apply(Box<Payload>),
    Revert(String),
}

impl Change {
    /// A payload's file has a folder before its name or `.ko` behind it; a patch's name has neither.
    pub(super) fn of(what: &str) -> Result<Change> {
        if what.contains('/') || what.ends_with(".ko") {
            return Ok(Change::Apply(Box::new(Payload::read(Path::new(what))?)));
        }
        Ok(Change::Revert(what.to_owned()))
    }

    pub(super) fn name(&self) -> &str {
        match self {
            Change::Apply(payload) => &payload.name,
            Change::Revert(name) => name,
        }
    }

    fn verb(&self) -> &'static str {
        match self {
            Change::Apply(_) => "applying",
            Change::Revert(_) => "reverting",
        }
    }

    /// Where nobody may be; `None` when there is nothing to do.
    pub(super) fn watch(&self, kernel: &Kernel<'_>) -> Result<Option<Watch>> {
        let arena = Arena::read(kernel)?;
        Ok(match self {
            Change::Apply(payload) => match plan::prepare(kernel, &arena, payload, Mode::Apply)? {
                Readiness::Ready(ready) => Some(ready.plan.watch),
                Readiness::Already(_) => None,
            },
            Change::Revert(name) => {
                let residents = plan::residents(kernel, &arena)?;
                let stack = Stack::new(&residents);
                match stack.named(&residents, name)? {
                    Some(resident) => Some(plan::undo(kernel, &stack, resident)?.watch),
                    None => None,
                }
            }
        })
    }
}

/// What there is to tell.
struct Found {
    /// Who is in the way; `None` when there is nothing to do.
    blockers: Option<Vec<Blocker>>,
    /// Their stacks, if they are asked for.
    stacks: Vec<Shown>,
}

impl Found {
    fn of(
        session: &Session,
        kernel: &Kernel<'_>,
        registers: &[Vcpu],
        blockers: Option<Vec<Blocker>>,
    ) -> Result<Found> {
        let all = blockers.as_deref().unwrap_or_default();
        let stacks = if session.verbose == 0 || all.is_empty() {
            Vec::new()
        } else {
            stacks::of(kernel, registers, |pid| all.iter().any(|b| b.pid == pid))?
        };
        Ok(Found { blockers, stacks })
    }
}

/// Runs the command.
///
/// # Errors
/// The guest can't be read, or the payload or patch is not for it.
pub fn run(session: &Session, args: &Blocking) -> anyhow::Result<ExitCode> {
    let change = Change::of(&args.what)?;
    if let Some(path) = &args.whom.core {
        let (subject, found) = subject::with_core(path, |subject, kernel, core| {
            let blockers = match change.watch(kernel)? {
                Some(watch) => Some(quiesce::inside(kernel, core.vcpus(), &watch)?),
                None => None,
            };
            let found = Found::of(session, kernel, core.vcpus(), blockers)?;
            Ok((subject.clone(), found))
        })?;
        return Ok(tell(session, &subject, &change, found));
    }
    let host = session.host()?;
    let domain = host.guest(args.whom.domain()?)?;
    let kernel = machine::kernel_of(&domain)?;
    let options = Options {
        interrupted: std::sync::Arc::clone(&session.interrupted),
        ..Options::default()
    };
    let blockers = match change.watch(&kernel)? {
        Some(watch) => Some(apply::blocking(&domain, &kernel, &watch, &options)?),
        None => None,
    };
    let found = Found::of(session, &kernel, &[], blockers)?;
    let subject = Subject::of(&domain);
    Ok(tell(session, &subject, &change, found))
}

fn tell(session: &Session, subject: &Subject, change: &Change, found: Found) -> ExitCode {
    let (name, verb) = (change.name(), change.verb());
    let label = subject.label();
    match (session.output, found.blockers) {
        (Output::Json, blockers) => {
            let mut object = json!({ "patch": name, "blockers": blockers.unwrap_or_default() });
            if session.verbose > 0 {
                let stacks = found.stacks.into_iter().map(|one| one.value);
                if let Some(map) = object.as_object_mut() {
                    map.insert("stack_list".into(), stacks.collect());
                }
            }
            out::object(subject.object(object));
        }
        (Output::Table, None) => out::line(&format!(
            "{label}: nothing is to be done for {verb} {name}: it is so already"
        )),
        (Output::Table, Some(all)) if all.is_empty() => {
            out::line(&format!("{label}: nobody is in the way of {verb} {name}"));
        }
        (Output::Table, Some(all)) => {
            out::line(&format!("{label}: in the way of {verb} {name}:"));
            out::text(&out::blockers(&all));
            for one in &found.stacks {
                out::text(&format!("\n{}", one.text));
            }
        }
    }
    ExitCode::Done
}
