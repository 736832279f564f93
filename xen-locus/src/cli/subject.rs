//! Whom a read-only command is about: a live domain or a saved core.

use std::path::{Path, PathBuf};

use locus_guest::addr::DomId;
use locus_guest::core::Core;
use locus_guest::Vcpu;
use locus_kernel::Kernel;
use serde_json::Value;

use super::args::Whom;
use super::Session;
use crate::domain::Domain;
use crate::error::{Error, ExitCode, Result};
use crate::machine;
use crate::say;
use crate::storage::audit::Audit;

/// Who is looked at, apart from the kernel.
#[derive(Clone, Debug)]
pub struct Subject {
    /// Domain id; none of a core.
    pub domid: Option<DomId>,
    /// Name of the domain, or of the core's file.
    pub name: String,
    /// UUID; none of a core.
    pub uuid: Option<String>,
    /// Number of virtual CPUs.
    pub vcpus: u32,
    /// The core's file.
    pub core: Option<PathBuf>,
    /// Registers of its virtual CPUs, of the same moment as its memory; those of a running domain
    /// are not.
    pub registers: Vec<Vcpu>,
}

impl Subject {
    /// Who `domain` is.
    #[must_use]
    pub fn of(domain: &Domain<'_>) -> Subject {
        Subject {
            domid: Some(domain.info.id),
            name: domain.name.clone(),
            uuid: Some(domain.info.uuid.clone()),
            vcpus: domain.info.vcpus,
            core: None,
            registers: Vec::new(),
        }
    }

    /// Who is in `core`.
    #[must_use]
    pub fn of_core(core: &Core) -> Subject {
        let name = core.path().file_name().unwrap_or(core.path().as_os_str());
        Subject {
            domid: None,
            name: name.to_string_lossy().into_owned(),
            uuid: None,
            vcpus: u32::try_from(core.vcpus().len()).unwrap_or(u32::MAX),
            core: Some(core.path().to_owned()),
            registers: core.vcpus().to_vec(),
        }
    }

    /// As a person reads it: `web1 (3)`, or the core's path.
    #[must_use]
    pub fn label(&self) -> String {
        match (&self.core, self.domid) {
            (Some(path), _) => path.display().to_string(),
            (None, Some(id)) => format!("{} ({id})", self.name),
            (None, None) => self.name.clone(),
        }
    }

    /// Adds to an object about the kernel whose it is: `domid`, `name`, and `core` of a core.
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

/// Calls `action` with the kernel that `whom` names. Xen is asked only for a domain.
///
/// # Errors
/// No such guest or core, its kernel can't be read, or `action` failed.
pub fn with_kernel<T>(
    session: &Session,
    whom: &Whom,
    action: impl FnOnce(&Subject, &Kernel<'_>) -> Result<T>,
) -> Result<T> {
    if let Some(path) = &whom.core {
        return with_core(path, |subject, kernel, _| action(subject, kernel));
    }
    let host = session.host()?;
    let domain = host.guest(whom.domain()?)?;
    action(&Subject::of(&domain), &machine::kernel_of(&domain)?)
}

/// Calls `action` with the kernel in the core at `path`.
///
/// # Errors
/// As [`with_kernel`].
pub fn with_core<T>(
    path: &Path,
    action: impl FnOnce(&Subject, &Kernel<'_>, &Core) -> Result<T>,
) -> Result<T> {
    let core = Core::open(path)?;
    let kernel = Kernel::of_saved(&core, core.kind(), core.vcpus())?;
    action(&Subject::of_core(&core), &kernel, &core)
}

impl Whom {
    /// The domain that is named.
    ///
    /// # Errors
    /// None is.
    pub fn domain(&self) -> Result<&str> {
        self.domain
            .as_deref()
            .ok_or_else(|| Error::usage("give a domain, or --core FILE"))
    }
}

/// Says that `subject` can't be read, and how that counts: a guest is none of ours if it has no patches of ours, by the
/// audit log; `list` says why it can't be read.
pub(super) fn unread(session: &Session, subject: &Subject, error: &Error) -> ExitCode {
    let in_force = |uuid: &str| Audit::system().in_force(uuid);
    let has = |uuid| in_force(uuid).map_or(true, |patches| !patches.is_empty());
    if !subject.uuid.as_deref().is_some_and(has) {
        session.say(1, format!("{}: {error}", subject.label()));
        return ExitCode::Done;
    }
    say::warn(format_args!(
        "{}: it has patches, by the audit log, and can't be read: {error}",
        subject.label()
    ));
    error.exit_code()
}
