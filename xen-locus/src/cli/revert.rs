//! `xen-locus revert DOMAIN PATCH`.

use super::args::Revert;
use super::{apply, Host, Session};
use crate::error::{Error, ExitCode};
use crate::service;

/// Runs the command.
///
/// # Errors
/// No such guest.
pub fn run(session: &Session, host: &Host, args: &Revert) -> anyhow::Result<ExitCode> {
    let domain = host.guest(&args.domain)?;
    let options = session.options(&args.patience);
    let patches = match &args.patch {
        Some(patch) => vec![patch.clone()],
        None => service::status(&domain)?
            .patches
            .into_iter()
            .rev()
            .map(|p| p.name)
            .collect(),
    };
    let mut results = Vec::new();
    for patch in &patches {
        let result = service::revert(&host.store, &domain, patch, &options)
            .map(|report| (domain.info.id, domain.label(), report));
        let failed = result.is_err();
        results.push((args.domain.clone(), result));
        if failed {
            break;
        }
    }
    if results.is_empty() {
        return Err(Error::Failed(format!("no patch is applied to {}", domain.label())).into());
    }
    let patch = args.patch.as_deref().unwrap_or_default();
    Ok(apply::tell(session, "Reverting", patch, results))
}
