#![doc = include_str!("manual/nudge.md")]

use locus_kernel::Kernel;
use serde_json::json;

use super::args::{Nudge, Output};
use super::blocking::PayloadOrPatch;
use super::{guest, out, Session};
use crate::apply::Outcome;
use crate::arena::Arena;
use crate::blocker::threads;
use crate::error::{ExitCode, Result};
use crate::nudge::Nudged;
use crate::ops;
use crate::ops::host::Host;
use crate::ops::operator;
use crate::plan::{self, PatchStack};
use crate::quiesce::Watch;
use crate::say;

/// Code in which threads are woken: the versions that a draining patch replaced, else what is in the way.
fn watch(asked: &PayloadOrPatch, kernel: &Kernel<'_>) -> Result<Option<Watch>> {
    if let PayloadOrPatch::Patch(name) = asked {
        let residents = plan::residents(kernel, &Arena::read(kernel)?)?;
        let stack = PatchStack::new(&residents);
        let named = stack.named(&residents, name)?;
        if let Some(resident) = named {
            if let Some(old) = plan::old_versions(kernel, &stack, resident)? {
                return Ok(Some(old));
            }
        }
    }
    asked.watch(kernel)
}

/// Runs the command.
///
/// # Errors
/// The guest can't be read, or the payload or patch is not for it; no thread could be woken.
pub fn run(session: &Session, host: &Host, args: &Nudge) -> anyhow::Result<ExitCode> {
    let asked = PayloadOrPatch::of(&args.what)?;
    let name = asked.name();
    let options = session.options(&args.limits);
    let operator = host.operator(operator::user());
    let (domid, label, nudged) = guest::on_domain(host, &args.domain, |domain| {
        let nudged = ops::nudge(&operator, domain, name, |k| watch(&asked, k), &options)?;
        Ok((domain.info.id, domain.label(), nudged))
    })?;
    if session.output == Output::Json {
        let report = nudged.as_ref().map(|n| &n.report);
        out::object(json!({
            "domid": domid.0,
            "domain": args.domain,
            "patch": name,
            "result": report.map_or("already", |r| r.result.name()),
            "asleep": nudged.as_ref().map(|n| &n.asleep[..]).unwrap_or_default(),
            "woken": nudged.as_ref().map_or(0, |n| n.woken),
            "pause_us": report.map_or(0, |r| r.pause_us),
        }));
        return Ok(ExitCode::Done);
    }
    match nudged.filter(|n| !n.asleep.is_empty()) {
        None => out::line(&format!("{label}: no thread sleeps in the way of {name}")),
        Some(nudged) => {
            out::line(&format!("{label}: {}", woke(&nudged)));
            out::text(&out::blockers(&nudged.asleep));
        }
    }
    Ok(ExitCode::Done)
}

/// What was done to the threads that sleep in the way. One of them may be in several functions.
fn woke(nudged: &Nudged) -> String {
    let asleep = threads(&nudged.asleep);
    let asleep = say::count(asleep, "sleeping thread", "sleeping threads");
    match nudged.report.result {
        Outcome::WouldNudge => format!("would wake {asleep}"),
        Outcome::NobodyAsleep => {
            format!("none of {asleep} can be woken: they are kernel threads, or have ended")
        }
        _ => format!(
            "woke {} of {asleep} (paused {} us)",
            nudged.woken, nudged.report.pause_us
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::apply::nothing_to_do;
    use crate::blocker::{Blocker, Reason};

    #[test]
    fn a_thread_in_two_functions_is_one_thread() {
        let asleep = ["outer", "inner"].map(|function| Blocker {
            pid: 7,
            comm: "sleeper".into(),
            reason: Reason::SleepingOn,
            function: function.into(),
            offset: 0,
        });
        let said = |outcome| {
            woke(&Nudged {
                asleep: asleep.clone().into(),
                woken: 1,
                report: nothing_to_do("one", outcome),
            })
        };
        assert_eq!(
            said(Outcome::Nudged),
            "woke 1 of 1 sleeping thread (paused 0 us)"
        );
        assert_eq!(said(Outcome::WouldNudge), "would wake 1 sleeping thread");
        assert!(said(Outcome::NobodyAsleep).contains("can be woken"));
    }
}
