//! The actions a person or the daemon asks for: on one guest, under its lock, published after.

pub mod host;
pub mod operator;
pub mod recover_all;

use std::fs::{self, File, TryLockError};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use locus_guest::addr::DomId;
use locus_kernel::Kernel;
use locus_payload::Payload;
use locus_xen::{fault, uuid, Control, DomainInfo};

use crate::apply::{self, Options, Report};
use crate::arena::record::Function;
use crate::arena::{self, Arena};
use crate::domain::Domain;
use crate::error::{Error, Result};
use crate::machine;
use crate::nudge::{self, Nudged};
use crate::plan::{self, Mode, Stack};
use crate::quiesce::Watch;
use crate::recover;
use crate::say;
use crate::storage::audit::{Action, Audit, Writer};
use crate::storage::journal::Journal;
use crate::storage::xenstore::{Store, ROOT};
use crate::target::modules_present;

/// Where locks stand: gone after a reboot of dom0, as the guests are.
const LOCKS: &str = "/run/xen-locus";

/// Why a patch is gone that went with the guest's kernel.
pub const GUEST_REBOOTED: &str = "guest-rebooted";

/// One patch of a guest.
#[derive(Clone, Debug)]
pub struct Patch {
    /// Its name.
    pub name: String,
    /// `applied`, `gone` when it is in force no more though nobody took it back, or `drifted` when a
    /// redirect is not as it was written.
    pub state: &'static str,
    /// Why it is gone: `module-gone` when a module whose functions it replaces is not there any more,
    /// `guest-rebooted` when the guest was started anew.
    pub reason: Option<&'static str>,
    /// SHA-256 of its file.
    pub sha256: String,
    /// When it was applied, in seconds since 1970.
    pub applied_at: u64,
    /// What it says it mends.
    pub cves: Vec<String>,
    /// What it replaces.
    pub functions: Vec<Replaced>,
    /// Where threads may still be that entered its functions before it was applied, if it lets them.
    pub old_versions: Option<Watch>,
}

/// A function that a patch replaces.
#[derive(Clone, Debug)]
pub struct Replaced {
    /// Its entry in the patch's record.
    pub function: Function,
    /// The topmost patch, whose version runs instead.
    pub covered_by: Option<String>,
}

/// The patches of a guest, as its memory shows them.
#[derive(Clone, Debug)]
pub struct Status {
    /// Its id.
    pub domid: DomId,
    /// Its UUID.
    pub uuid: String,
    /// Its kernel's release.
    pub kernel: String,
    /// Patches in the order they were applied: of two that replace the same function, the later lies
    /// on top.
    pub patches: Vec<Patch>,
}

/// Reads a guest's status.
///
/// # Errors
/// Its kernel or arena can't be read.
pub fn status(domain: &Domain<'_>) -> Result<Status> {
    let kernel = machine::kernel_of(domain)?;
    status_of(domain, &kernel)
}

fn status_of(domain: &Domain<'_>, kernel: &Kernel<'_>) -> Result<Status> {
    Ok(Status {
        domid: domain.info.id,
        uuid: domain.info.uuid.clone(),
        kernel: kernel.release.clone(),
        patches: patches(kernel, Some(&domain.info.uuid))?,
    })
}

/// The patches that a guest's memory shows, in the order they were applied; before them those that the
/// guest `uuid` lost, by the audit log.
///
/// # Errors
/// Its arena can't be read.
pub fn patches(kernel: &Kernel<'_>, uuid: Option<&str>) -> Result<Vec<Patch>> {
    let residents = plan::residents(kernel, &Arena::read(kernel)?)?;
    let stack = Stack::new(&residents);
    let has = |sha256: &str| residents.iter().any(|r| r.record.sha256 == sha256);
    let mut patches = uuid.map_or_else(Vec::new, |uuid| gone(uuid, has));
    for resident in stack.applied() {
        let record = &resident.record;
        let module_gone = modules_present::gone(kernel, record)?.is_some();
        let functions = record.functions.iter().map(|f| Replaced {
            function: f.clone(),
            covered_by: stack.covering(resident, f).map(str::to_owned),
        });
        patches.push(Patch {
            name: record.name.clone(),
            reason: module_gone.then_some("module-gone"),
            state: if module_gone {
                // where a module was there may be nothing, or anything
                "gone"
            } else if stack.displaced(kernel, resident)?.is_some() {
                "drifted"
            } else {
                "applied"
            },
            sha256: record.sha256.clone(),
            applied_at: resident.slot.applied_at,
            cves: record.cves.clone(),
            functions: functions.collect(),
            old_versions: plan::old_versions(kernel, &stack, resident),
        });
    }
    Ok(patches)
}

/// Those that the guest `uuid` lost. A log that can't be read is no reason to hide what is there.
fn gone(uuid: &str, has: impl Fn(&str) -> bool) -> Vec<Patch> {
    let mut lost = Audit::system().in_force(uuid).unwrap_or_else(|error| {
        say::warn(format_args!(
            "what the guest lost when it was started anew can't be told: {error}"
        ));
        Vec::new()
    });
    lost.retain(|p| !has(&p.sha256));
    lost.into_iter()
        .map(|lost| Patch {
            name: lost.name,
            state: "gone",
            reason: Some(GUEST_REBOOTED),
            sha256: lost.sha256,
            applied_at: lost.applied_at,
            cves: Vec::new(),
            functions: Vec::new(),
            old_versions: None,
        })
        .collect()
}

/// Who asks for actions, and what they go through.
#[derive(Debug)]
pub struct Desk<'a> {
    /// Where a guest's status is published.
    pub store: &'a Store,
    /// Where actions are recorded.
    pub audit: Audit,
    /// Who asks.
    pub who: String,
    /// Whether who asks comes again after this error by himself: then there is nothing to record yet.
    pub comes_again: fn(&Error) -> bool,
}

/// An action, as it is recorded.
struct Asked<'a> {
    op: &'static str,
    patch: &'a str,
    sha256: String,
}

impl Desk<'_> {
    /// Carries out an action under the guest's lock and records what came of it; a dry run is no action.
    fn record(
        &self,
        domain: &Domain<'_>,
        asked: &Asked<'_>,
        options: &Options,
        action: impl FnOnce(&Kernel<'_>, &Options) -> Result<Report>,
    ) -> Result<Report> {
        let began = Instant::now();
        // What can't be recorded is not begun.
        let log = (!options.dry_run).then(|| self.audit.open()).transpose()?;
        let (_lock, done) = match lock(&domain.info.uuid, options) {
            Ok(lock) => (
                Some(lock),
                self.change(domain, &rest(options, began), action),
            ),
            Err(error) => (None, Err(error)),
        };
        let done = done.map(|report| timed(report, began));
        if let Some(mut log) = log {
            self.end(&mut log, domain, asked, &done);
        }
        done
    }

    /// Settles what an earlier run left, carries out `action` and publishes the guest's status. The caller
    /// has the guest's lock.
    fn change<R>(
        &self,
        domain: &Domain<'_>,
        options: &Options,
        action: impl FnOnce(&Kernel<'_>, &Options) -> Result<R>,
    ) -> Result<R> {
        self.changed(domain, options, action)
            .map_err(|error| if_gone(domain, error))
    }

    fn changed<R>(
        &self,
        domain: &Domain<'_>,
        options: &Options,
        action: impl FnOnce(&Kernel<'_>, &Options) -> Result<R>,
    ) -> Result<R> {
        let due = recover::is_due(&domain.info.uuid)?;
        if due && options.dry_run {
            say::warn(format_args!(
                "{}: an earlier run did not end as it should: `xen-locus recover` settles what it left",
                domain.label()
            ));
        } else if due {
            let found = self.recover(domain, options)?;
            // Else there was but the file of somebody who looks at the guest right now.
            if found.result != recover::Finding::NothingToDo || !found.detail.is_empty() {
                let whom = domain.label();
                say::warn(format_args!("{whom}: what an earlier run left: {found}"));
            }
        }
        let kernel = machine::kernel_of(domain)?;
        let done = action(&kernel, options)?;
        if !options.dry_run {
            // The guest is changed: what can't be published is said, and does not undo that.
            if let Err(error) = status_of(domain, &kernel).and_then(|s| publish(self.store, &s)) {
                say::warn(format_args!(
                    "{}: done, but not published: {error}",
                    domain.label()
                ));
            }
        }
        Ok(done)
    }

    /// Records what came of an action, and only then removes its journal: else the next run finds by that what is
    /// to be recorded. Whether it is.
    fn end(
        &self,
        log: &mut Writer<'_>,
        domain: &Domain<'_>,
        asked: &Asked<'_>,
        done: &Result<Report>,
    ) -> bool {
        if done.as_ref().is_err_and(self.comes_again) {
            domain.close();
            return true;
        }
        let mut action = Action {
            sha256: asked.sha256.clone(),
            ..self.action(domain, asked.op, asked.patch)
        };
        match done {
            Ok(report) => {
                action.result = report.result.name().into();
                action.sha256.clone_from(&report.sha256);
                action.record.clone_from(&report.record);
                action.pause_us = report.pause_us;
                action.superseded.clone_from(&report.superseded);
                [action.text_before, action.text_after] = report.text.clone();
            }
            Err(error) => {
                action.result = error.result().into();
                action.exit = error.exit_code() as u8;
                action.message = error.to_string();
            }
        }
        let what = format!("{} {}", action.op, action.patch);
        match log.append(action) {
            Ok(()) => domain.close(),
            Err(error) => {
                say::warn(format_args!(
                    "{}: {what}: not recorded, which the next run makes good: {error}",
                    domain.label()
                ));
                return false;
            }
        }
        true
    }

    /// What an earlier run left is settled, or can't be: recorded, if there was anything. While that can't be
    /// recorded nothing else is begun.
    fn recover(&self, domain: &Domain<'_>, options: &Options) -> Result<recover::Report> {
        let mut log = self.audit.open()?;
        let done = recover::recover(domain, options);
        let mut action = self.action(domain, "recover", "");
        match &done {
            Ok(report) if report.result == recover::Finding::NothingToDo => {}
            Ok(report) => {
                action.patch = report.patch.clone().unwrap_or_default();
                action.of = report.op.map(|op| op.to_string()).unwrap_or_default();
                action.sha256.clone_from(&report.sha256);
                action.record.clone_from(&report.record);
                action.superseded.clone_from(&report.parked);
                action.result = report.result.name().into();
                action.message = report.to_string();
            }
            Err(error) => {
                action.result = error.result().into();
                action.exit = error.exit_code() as u8;
                action.message = error.to_string();
            }
        }
        let recorded = match action.result.is_empty() {
            true => Ok(()),
            false => log.append(action),
        };
        let report = done?;
        recorded?;
        Journal::new(&domain.info.uuid).end()?;
        Ok(report)
    }

    fn action(&self, domain: &Domain<'_>, op: &str, patch: &str) -> Action {
        Action {
            time: arena::now(),
            who: self.who.clone(),
            op: op.into(),
            domid: domain.info.id.0,
            domain: self.store.domain_name(domain.info.id).unwrap_or_default(),
            uuid: domain.info.uuid.clone(),
            patch: patch.into(),
            ..Action::default()
        }
    }
}

/// Applies a payload, on top of the patches that are there or in their place, records it and publishes
/// the guest's status.
///
/// # Errors
/// As [`apply::apply`]; [`Class::TryAgain`](crate::error::Class::TryAgain) when another run holds the guest's lock.
pub fn apply(
    desk: &Desk<'_>,
    domain: &Domain<'_>,
    payload: &Payload,
    mode: Mode,
    options: &Options,
) -> Result<Report> {
    let asked = Asked {
        op: match mode.supersedes(payload) {
            false => "apply",
            true => "replace",
        },
        patch: &payload.name,
        sha256: hex::encode(payload.sha256),
    };
    desk.record(domain, &asked, options, |kernel, options| {
        apply::apply(domain, kernel, payload, mode, options)
    })
}

/// An action that undoes `patch`.
fn undoing(patch: &str) -> Asked<'_> {
    Asked {
        op: "revert",
        patch,
        sha256: String::new(),
    }
}

/// Undoes a patch, which must be of the file with this SHA-256 if one is given, records it and publishes the guest's
/// status.
///
/// # Errors
/// As [`apply::revert`]; [`Class::Failed`](crate::error::Class::Failed) when the patch is of another file; [`Class::TryAgain`](crate::error::Class::TryAgain) when another run holds
/// the guest's lock.
pub fn revert(
    desk: &Desk<'_>,
    domain: &Domain<'_>,
    patch: &str,
    sha256: Option<&str>,
    options: &Options,
) -> Result<Report> {
    desk.record(domain, &undoing(patch), options, |kernel, options| {
        let all = patches(kernel, Some(&domain.info.uuid))?;
        // One that is there is meant, if it was lost and is there again.
        let of_name = all.iter().filter(|p| p.name == patch);
        let named = of_name.max_by_key(|p| p.reason != Some(GUEST_REBOOTED));
        if let (Some(named), Some(wanted)) = (named, sha256) {
            if named.sha256 != wanted {
                return Err(Error::failed(format!(
                    "patch {patch} is of a file with SHA-256 {}, and that of {wanted} is to be reverted",
                    named.sha256
                )));
            }
        }
        match named {
            // It is not there, and from now on not missed: the audit log says so.
            Some(lost) if lost.reason == Some(GUEST_REBOOTED) => Ok(apply::nothing_to_do(patch)),
            _ => apply::revert(domain, kernel, patch, options),
        }
    })
}

/// Wakes those who sleep in the ranges that `watch` gives, for the sake of `patch`, and records it. `None` if
/// it gives none.
///
/// # Errors
/// As [`nudge::nudge`]; [`Class::TryAgain`](crate::error::Class::TryAgain) when another run holds the guest's lock.
pub fn nudge(
    desk: &Desk<'_>,
    domain: &Domain<'_>,
    patch: &str,
    watch: impl FnOnce(&Kernel<'_>) -> Result<Option<Watch>>,
    options: &Options,
) -> Result<Option<Nudged>> {
    let asked = Asked {
        op: "nudge",
        patch,
        sha256: String::new(),
    };
    let mut nudged = None;
    desk.record(domain, &asked, options, |kernel, options| {
        let Some(watch) = watch(kernel)? else {
            return Ok(apply::nothing_to_do(patch));
        };
        let done = nudge::nudge(domain, kernel, patch, &watch, options)?;
        Ok(nudged.insert(done).report.clone())
    })?;
    Ok(nudged)
}

/// Undoes all patches, the topmost first, until one can't be undone, records each that was tried and
/// publishes the guest's status. Says what came of them.
///
/// # Errors
/// As [`apply::revert_all`]; [`Class::TryAgain`](crate::error::Class::TryAgain) when another run holds the guest's lock.
pub fn revert_all(
    desk: &Desk<'_>,
    domain: &Domain<'_>,
    options: &Options,
) -> Result<Vec<(String, Result<Report>)>> {
    let began = Instant::now();
    let mut log = desk.audit.open()?;
    let _lock = lock(&domain.info.uuid, options)?;
    desk.change(domain, options, |kernel, options| {
        let mut results = Vec::new();
        apply::revert_all(domain, kernel, options, |patch, result| {
            let result = result.map(|report| timed(report, began));
            // What can't be recorded is the last one.
            let recorded = options.dry_run || desk.end(&mut log, domain, &undoing(patch), &result);
            results.push((patch.to_owned(), result));
            recorded
        })?;
        Ok(results)
    })
}

/// Settles what an interrupted run left on a guest, records it and publishes the guest's status.
///
/// # Errors
/// As [`recover::recover`]; [`Class::TryAgain`](crate::error::Class::TryAgain) when another run holds the guest's lock.
pub fn recover(desk: &Desk<'_>, domain: &Domain<'_>, options: &Options) -> Result<recover::Report> {
    let _lock = lock(&domain.info.uuid, options)?;
    let report = desk.recover(domain, options)?;
    if report.result != recover::Finding::NothingToDo {
        let kernel = machine::kernel_of(domain)?;
        if let Err(error) = status_of(domain, &kernel).and_then(|s| publish(desk.store, &s)) {
            say::warn(format_args!("{}: not published: {error}", domain.label()));
        }
    }
    Ok(report)
}

/// Removes what speaks of a guest that is not there any more.
///
/// # Errors
/// As [`recover::forget`]; [`Class::TryAgain`](crate::error::Class::TryAgain) when another run holds that guest's lock.
pub fn forget(control: &Control, uuid: &str, options: &Options) -> Result<recover::Report> {
    let _lock = lock(uuid, options)?;
    recover::forget(control, uuid)
}

fn timed(report: Report, began: Instant) -> Report {
    Report {
        total_ms: u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX),
        ..report
    }
}

/// What went wrong with `domain`; that it is gone, if it is.
fn if_gone(domain: &Domain<'_>, error: Error) -> Error {
    let same = |now: &DomainInfo| now.uuid == domain.info.uuid && !now.dying;
    match domain.control().domain(domain.info.id) {
        Ok(now) if !now.as_ref().is_some_and(same) => Error::failed(format!(
            "domain {} is gone: it ended while it was worked on ({error})",
            domain.label()
        )),
        _ => error,
    }
}

/// What is left of the time for all, which began at `began`.
fn rest(options: &Options, began: Instant) -> Options {
    Options {
        timeout: options.timeout.saturating_sub(began.elapsed()),
        ..options.clone()
    }
}

/// Takes the guest's lock: one change of a guest at a time.
fn lock(uuid: &str, options: &Options) -> Result<File> {
    let began = Instant::now();
    let path = Path::new(LOCKS).join(format!("{uuid}.lock"));
    let failed =
        |e: std::io::Error| Error::failed(format!("cannot take the lock {}: {e}", path.display()));
    fault::point("lock").map_err(failed)?;
    fs::create_dir_all(LOCKS).map_err(failed)?;
    loop {
        options.check_interrupted()?;
        let file = File::create(&path).map_err(failed)?;
        match file.try_lock() {
            // Else it was removed meanwhile, and another may have its name.
            Ok(()) if is_at(&file, &path) => return Ok(file),
            Ok(()) => {}
            Err(TryLockError::Error(e)) => return Err(failed(e)),
            Err(TryLockError::WouldBlock) if began.elapsed() >= options.timeout => {
                return Err(Error::try_again(format!(
                    "another run of xen-locus works on this guest (lock {}); try again",
                    path.display()
                )))
            }
            Err(TryLockError::WouldBlock) => std::thread::sleep(Duration::from_millis(50)),
        }
    }
}

/// Whether `file` is what stands at `path`.
fn is_at(file: &File, path: &Path) -> bool {
    let id = |m: &fs::Metadata| (m.dev(), m.ino());
    matches!((file.metadata(), fs::metadata(path)), (Ok(a), Ok(b)) if id(&a) == id(&b))
}

/// Removes the locks of guests that are none of `domains`, unless somebody holds them.
pub fn sweep(domains: &[DomainInfo]) {
    for entry in fs::read_dir(LOCKS).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let uuid = name.to_str().and_then(|n| n.strip_suffix(".lock"));
        // The daemon's own lock is none of a guest's.
        let is_gone = |uuid: &str| uuid::is_text(uuid) && domains.iter().all(|d| d.uuid != uuid);
        if !uuid.is_some_and(is_gone) {
            continue;
        }
        let path = entry.path();
        let Ok(file) = File::open(&path) else {
            continue;
        };
        // Held until it is gone: whoever waits for it finds that it has no name any more.
        if file.try_lock().is_ok() && is_at(&file, &path) {
            // What stays is an empty file.
            let _ = fs::remove_file(&path);
        }
    }
}

/// Reads a guest's status and publishes it, unless somebody works on the guest.
///
/// # Errors
/// As [`status`] and [`publish`]; [`Class::TryAgain`](crate::error::Class::TryAgain) when another run holds the guest's lock: it publishes what
/// it leaves.
pub fn look(store: &Store, domain: &Domain<'_>) -> Result<Status> {
    let at_once = Options {
        timeout: Duration::ZERO,
        ..Options::default()
    };
    let _lock = lock(&domain.info.uuid, &at_once)?;
    let status = status(domain)?;
    publish(store, &status)?;
    Ok(status)
}

/// Writes a guest's status below `/tool/xen-locus/domain/DOMID`.
///
/// # Errors
/// XenStore failed.
pub fn publish(store: &Store, status: &Status) -> Result<()> {
    let base = format!("{ROOT}/domain/{}", status.domid);
    if store.read(&format!("{base}/uuid"))?.as_deref() != Some(&status.uuid) {
        store.remove(&base)?; // of a guest that had this id before
        store.write(&format!("{base}/uuid"), &status.uuid)?;
    }
    store.write(&format!("{base}/kernel"), &status.kernel)?;
    for old in store.children(&format!("{base}/patch"))? {
        if !status.patches.iter().any(|p| p.name == old) {
            store.remove(&format!("{base}/patch/{old}"))?;
        }
    }
    for patch in &status.patches {
        let node = format!("{base}/patch/{}", patch.name);
        store.write(&format!("{node}/sha256"), &patch.sha256)?;
        store.write(&format!("{node}/cves"), &patch.cves.join(","))?;
        store.write(&format!("{node}/applied-at"), &patch.applied_at.to_string())?;
        store.write(&format!("{node}/state"), patch.state)?;
    }
    Ok(())
}
