//! The guest that a command is about: a live domain or a saved core.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use locus_guest::addr::DomId;
use locus_guest::core::Core;
use locus_guest::Vcpu;
use locus_kernel::Kernel;
use locus_xen::PauseCalls;
use serde_json::Value;

use super::args::DomainOrCore;
use super::Session;
use crate::domain::{self, Domain};
use crate::error::{Error, ExitCode, Result};
use crate::machine;
use crate::ops::host::Host;
use crate::say;
use crate::storage::audit::Audit;

/// What identifies a guest, apart from its kernel.
#[derive(Clone, Debug)]
pub struct Guest {
    /// Domain id; a core has none.
    pub domid: Option<DomId>,
    /// Name of the domain, or of the core's file.
    pub name: String,
    /// UUID; a core has none.
    pub uuid: Option<String>,
    /// Number of virtual CPUs.
    pub vcpus: u32,
    /// Path of the core, if the guest is a saved one.
    pub core: Option<PathBuf>,
    /// Registers of the virtual CPUs of a core, saved at the same moment as its memory. Empty for a live
    /// domain, because its registers and its memory would be of different moments.
    pub registers: Vec<Vcpu>,
}

impl Guest {
    /// The guest in `domain`.
    #[must_use]
    pub fn of(domain: &Domain<'_>) -> Guest {
        Guest {
            domid: Some(domain.info.id),
            name: domain.name.clone(),
            uuid: Some(domain.info.uuid.clone()),
            vcpus: domain.info.vcpus,
            core: None,
            registers: Vec::new(),
        }
    }

    /// The guest in `core`.
    #[must_use]
    pub fn of_core(core: &Core) -> Guest {
        let name = core.path().file_name().unwrap_or(core.path().as_os_str());
        Guest {
            domid: None,
            name: name.to_string_lossy().into_owned(),
            uuid: None,
            vcpus: u32::try_from(core.vcpus().len()).unwrap_or(u32::MAX),
            core: Some(core.path().to_owned()),
            registers: core.vcpus().to_vec(),
        }
    }

    /// How messages name the guest: `web1 (3)`, or the core's path.
    #[must_use]
    pub fn label(&self) -> String {
        match (&self.core, self.domid) {
            (Some(path), _) => say::one_line(&path.to_string_lossy()).into_owned(),
            (None, Some(id)) => domain::label(&self.name, id),
            (None, None) => say::one_line(&self.name).into_owned(),
        }
    }

    /// Adds to an object which guest it is about: `domid`, `name`, and for a core its path as `core`.
    #[must_use]
    pub fn object(&self, mut value: Value) -> Value {
        if let Some(map) = value.as_object_mut() {
            map.insert("domid".into(), self.domid.map(|id| id.0).into());
            map.insert("name".into(), self.name.clone().into());
            if let Some(path) = &self.core {
                map.insert("core".into(), path.display().to_string().into());
            }
        }
        value
    }
}

/// Calls `action` with the kernel that `named` names. Xen is needed only for a domain.
///
/// # Errors
/// No such guest or core, its kernel can't be read, or `action` failed.
pub fn with_kernel<T>(
    session: &Session,
    named: &DomainOrCore,
    action: impl FnOnce(&Guest, &Kernel<'_>) -> Result<T>,
) -> Result<T> {
    if let Some(path) = &named.core {
        return with_core(path, |guest, kernel, _| action(guest, kernel));
    }
    on_domain(&session.host()?, named.domain()?, |domain| {
        let kernel = machine::kernel_of(domain)?;
        if session.verbose > 0 {
            session.say(1, format!("{}: {}", domain.label(), pauses(domain)));
        }
        action(&Guest::of(domain), &kernel)
    })
}

/// Calls `action` with the domain that the user named `wanted`. Its errors begin with that name.
///
/// # Errors
/// There is no such guest, or `action` failed.
pub(super) fn on_domain<'h, T>(
    host: &'h Host,
    wanted: &str,
    action: impl FnOnce(&Domain<'h>) -> Result<T>,
) -> Result<T> {
    let domain = host.guest(wanted)?;
    action(&domain).map_err(|error| error.context(say::one_line(wanted)))
}

/// How a pause of this guest would be made, in words.
fn pauses(domain: &Domain<'_>) -> String {
    let (control, info) = (domain.control(), &domain.info);
    let calls = control
        .check_changes(info)
        .and_then(|()| PauseCalls::new(control, info, &[]));
    let how = match calls {
        Ok(calls) if calls.is_multicall() => "two calls (multicall)",
        Ok(_) => "calls one by one, so pauses are longer",
        Err(error) => return error.to_string(),
    };
    format!("Xen {} takes a pause in {how}", control.version())
}

/// Calls `action` with the kernel in the core at `path`.
///
/// # Errors
/// As [`with_kernel`].
pub fn with_core<T>(
    path: &Path,
    action: impl FnOnce(&Guest, &Kernel<'_>, &Core) -> Result<T>,
) -> Result<T> {
    let core = Core::open(path)?;
    let kernel = Kernel::of_saved(&core, core.kind(), core.vcpus())?;
    action(&Guest::of_core(&core), &kernel, &core)
}

impl DomainOrCore {
    /// The guest and the last of `words`, which begin with a domain unless a core is read.
    ///
    /// # Errors
    /// There are too few or too many.
    pub fn and_last(words: &[OsString], core: Option<PathBuf>) -> Result<(DomainOrCore, OsString)> {
        let (domain, last) = match (words, &core) {
            ([last], Some(_)) => (None, last),
            ([domain, last], None) => (Some(domain), last),
            (_, Some(_)) => return Err(Error::usage("--core and a domain exclude each other")),
            (_, None) => {
                return Err(Error::usage(
                    "give a domain, or --core FILE, and then what it is about",
                ))
            }
        };
        let as_text = |domain: &OsString| {
            domain.to_str().map(str::to_owned).ok_or_else(|| {
                Error::usage("the name of the domain is not UTF-8: give its id or its UUID instead")
            })
        };
        let domain = domain.map(as_text).transpose()?;
        Ok((DomainOrCore { domain, core }, last.clone()))
    }

    /// The domain that is named.
    ///
    /// # Errors
    /// No domain is named.
    pub fn domain(&self) -> Result<&str> {
        self.domain
            .as_deref()
            .ok_or_else(|| Error::usage("give a domain, or --core FILE"))
    }
}

/// Reports that `guest` can't be read, and returns the exit code for that.
pub(super) fn unread(session: &Session, guest: &Guest, error: &Error) -> ExitCode {
    let uuid = guest.uuid.as_deref().unwrap_or_default();
    unread_by_name(session, &guest.label(), uuid, error)
}

/// Reports that the guest `label` can't be read, and returns the exit code for that.
///
/// A guest without patches, by the audit log, is no failure: `list` says why it can't be read.
pub(super) fn unread_by_name(
    session: &Session,
    label: &str,
    uuid: &str,
    error: &Error,
) -> ExitCode {
    let in_force = |uuid: &str| Audit::system().in_force(uuid);
    let has_patches = in_force(uuid).map_or(true, |patches| !patches.is_empty());
    if uuid.is_empty() || !has_patches {
        session.say(1, format!("{label}: left out: {error}"));
        return ExitCode::Done;
    }
    say::warn(format_args!(
        "{label}: the audit log lists patches of this guest, but it can't be read: {error}"
    ));
    error.exit_code()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_can_t_be_taken_for_another_line() {
        let guest = Guest {
            domid: Some(DomId(3)),
            name: "web\n7\tdb".into(),
            uuid: None,
            vcpus: 1,
            core: None,
            registers: Vec::new(),
        };
        assert_eq!(guest.label(), "web\\u000a7\\u0009db (3)");
        // A program gets the name as it is.
        assert_eq!(guest.object(serde_json::json!({}))["name"], "web\n7\tdb");
        let saved = Guest {
            domid: None,
            core: Some("a\nb".into()),
            ..guest
        };
        assert_eq!(saved.label(), "a\\u000ab");
    }
}
