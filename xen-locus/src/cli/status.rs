#![doc = include_str!("manual/status.md")]

use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::Instant;

use locus_guest::addr::DomId;
use locus_kernel::Kernel;
use serde_json::{json, Value};

use super::args::Output;
use super::guest::{self, Guest};
use super::{out, Session};
use crate::apply::{self, Options};
use crate::arena::{Arena, Usage};
use crate::blocker::{threads, Blocker};
use crate::domain::Domain;
use crate::error::{ExitCode, Result};
use crate::machine;
use crate::ops::host::Host;
use crate::ops::{self, Patch, Replaced};
use crate::quiesce::{self, Watch};

/// Most threads of a guest that are shown as still in old versions. The guest says how many there are, and each takes memory
/// until all guests were looked at.
const DRAINING_MAX: usize = 4096;

/// The patches of one guest.
struct GuestStatus {
    guest: Guest,
    kernel: String,
    /// How full the arena is; `None` if that can't be read.
    arena: Option<Usage>,
    patches: Vec<PatchStatus>,
}

/// A patch, and the threads that it drains.
struct PatchStatus {
    patch: Patch,
    /// Threads that are still in versions that the patch replaced. Empty unless the patch allows entry-only.
    draining: Vec<Blocker>,
}

/// Runs the command: of a core, of the domain `wanted`, or of all guests.
///
/// # Errors
/// The guest can't be read.
pub fn run(
    session: &Session,
    wanted: Option<&str>,
    core: Option<&Path>,
) -> anyhow::Result<ExitCode> {
    let one = wanted.is_some() || core.is_some();
    let mut code = ExitCode::Done;
    let statuses = match (core, wanted) {
        (Some(path), _) => vec![guest::with_core(path, |guest, kernel, core| {
            let inside = |watch: &Watch| quiesce::inside(kernel, core.vcpus(), watch);
            GuestStatus::read(guest.clone(), kernel, None, inside)
        })?],
        (None, Some(wanted)) => {
            let host = session.host()?;
            vec![guest::on_domain(&host, wanted, |domain| {
                status(session, domain)
            })?]
        }
        (None, None) => {
            let (all, worst) = all(session, &session.host()?)?;
            code = worst;
            all
        }
    };
    match session.output {
        Output::Json if one => {
            out::object(
                statuses
                    .into_iter()
                    .next()
                    .map(|s| s.json())
                    .unwrap_or_default(),
            );
        }
        Output::Json => {
            let domains: Vec<Value> = statuses.iter().map(GuestStatus::json).collect();
            out::object(json!({ "domains": domains }));
        }
        Output::Table => table(&statuses),
    }
    Ok(code)
}

/// The guest's patches. All that drain are looked at within the time of one action: a guest says how many do.
fn status(session: &Session, domain: &Domain<'_>) -> Result<GuestStatus> {
    let kernel = machine::kernel_of(domain)?;
    let began = Instant::now();
    let inside = |watch: &Watch| apply::blocking(domain, &kernel, watch, &left(session, began));
    let known = ops::is_known_to_log(domain.check_uuid(), &domain.label())?;
    let uuid = known.then_some(&*domain.info.uuid);
    GuestStatus::read(Guest::of(domain), &kernel, uuid, inside)
}

/// What is left of the time of one action that `began` then. It ends too when this command is asked to stop.
fn left(session: &Session, began: Instant) -> Options {
    let all = session.unhurried();
    Options {
        timeout: all.timeout.saturating_sub(began.elapsed()),
        ..all
    }
}

/// All guests that can be read, and the exit code for those that can't.
fn all(session: &Session, host: &Host) -> Result<(Vec<GuestStatus>, ExitCode)> {
    let mut found = Vec::new();
    let mut worst = ExitCode::Done;
    for info in host.control.domains(DomId(1))? {
        session.unhurried().check_interrupted()?;
        let domain = host.domain(info)?;
        match status(session, &domain) {
            // That was the last guest.
            Err(error) if session.interrupted.load(Ordering::SeqCst) => return Err(error),
            Ok(status) => found.push(status),
            Err(error) => {
                let code = guest::unread(session, &Guest::of(&domain), &error);
                worst = worst.max(code);
            }
        }
    }
    Ok((found, worst))
}

fn table(statuses: &[GuestStatus]) {
    let mut rows = Vec::new();
    for status in statuses {
        for PatchStatus { patch, draining } in &status.patches {
            let functions: Vec<String> = patch.functions.iter().map(shown).collect();
            rows.push([
                status.guest.label(),
                patch.name.clone(),
                match threads(draining) {
                    0 => patch.state.to_string(),
                    threads => format!("draining {threads}"),
                },
                match functions.is_empty() {
                    true => "-".into(),
                    false => functions.join(","),
                },
                if patch.cves.is_empty() {
                    "-".into()
                } else {
                    patch.cves.join(",")
                },
            ]);
        }
    }
    if rows.is_empty() {
        for status in statuses {
            out::line(&format!("{}: no patches", status.guest.label()));
        }
        return;
    }
    out::table(["Domain", "Patch", "State", "Functions", "CVEs"], &rows);
}

/// A function, and the patch that covers it.
fn shown(replaced: &Replaced) -> String {
    let name = &replaced.function.name;
    match &replaced.covered_by {
        Some(by) => format!("{name} (covered by {by})"),
        None => name.clone(),
    }
}

impl GuestStatus {
    /// The status of a guest that the audit log knows by `uuid`, if it knows it.
    fn read(
        guest: Guest,
        kernel: &Kernel<'_>,
        uuid: Option<&str>,
        inside: impl Fn(&Watch) -> Result<Vec<Blocker>>,
    ) -> Result<GuestStatus> {
        let mut patches = Vec::new();
        let mut left = DRAINING_MAX;
        let (all, drained) = ops::patches_and_drained(&guest.label(), kernel, uuid)?;
        // One look for all: the guest says how many there are.
        let blockers = match &drained {
            Some(drained) => inside(&drained.watch)?,
            None => Vec::new(),
        };
        for patch in all {
            let mut draining = match (&drained, patch.drains_at) {
                (Some(drained), Some(level)) => {
                    let functions = patch.functions.iter().map(|f| f.function.old).collect();
                    drained.below(level, &functions, &blockers)
                }
                _ => Vec::new(),
            };
            draining.truncate(left);
            left -= draining.len();
            patches.push(PatchStatus { patch, draining });
        }
        let arena = Arena::read(kernel).ok();
        Ok(GuestStatus {
            guest,
            kernel: kernel.release.clone(),
            arena: arena.map(|arena| arena.usage(kernel.kind)),
            patches,
        })
    }

    fn json(&self) -> Value {
        let patches: Vec<Value> = self
            .patches
            .iter()
            .map(|PatchStatus { patch: p, draining }| {
                let functions: Vec<Value> = p
                    .functions
                    .iter()
                    .map(
                        |Replaced {
                             function: f,
                             covered_by,
                         }| {
                            json!({
                                "name": f.name,
                                "object": f.object,
                                "old": out::address(f.old.0),
                                "new": out::address(f.new.0),
                                "covered_by": covered_by,
                            })
                        },
                    )
                    .collect();
                json!({
                    "name": p.name,
                    "state": p.state.name(),
                    "reason": p.state.reason(),
                    "sha256": p.sha256,
                    "applied_at": p.applied_at,
                    "cves": p.cves,
                    "functions": functions,
                    "draining": draining,
                })
            })
            .collect();
        self.guest.object(json!({
            "uuid": self.guest.uuid,
            "kernel": self.kernel,
            "arena": self.arena,
            "patches": patches,
        }))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::sync::Arc;

    use super::*;

    #[test]
    fn threads_that_drain_are_looked_for_as_long_as_the_session_goes_on() {
        let session = Session {
            output: Output::Table,
            dry_run: false,
            verbose: 0,
            cache: None,
            began: Instant::now(),
            interrupted: Arc::new(AtomicBool::new(false)),
        };
        let limit = Options::default().timeout;
        let began = Instant::now().checked_sub(limit / 2).unwrap();
        assert!(left(&session, began).timeout <= limit / 2);
        let before = began.checked_sub(limit).unwrap();
        assert!(left(&session, before).timeout.is_zero());
        left(&session, began).check_interrupted().unwrap();
        session.interrupted.store(true, Ordering::SeqCst);
        left(&session, began).check_interrupted().unwrap_err();
    }
}
