//! Patches that a guest lost when it was started anew are applied again.

use super::request::Server;
use crate::domain::Domain;
use crate::error::{Error, ExitCode, Result};
use crate::plan::Mode;
use crate::service::{self, Desk, Status, GUEST_REBOOTED};

/// Applies all that `status` says is lost, in the order in which it was applied. What can't be applied to
/// this guest is said, and left.
///
/// # Errors
/// [`Error::TryAgain`] or one like it: the guest is not ready for one of them yet, nor for those that came
/// after it.
pub(super) fn reapply(server: &Server<'_>, domain: &Domain<'_>, status: &Status) -> Result<()> {
    let lost = |reason| reason == Some(GUEST_REBOOTED);
    for patch in status.patches.iter().filter(|p| lost(p.reason)) {
        let (name, whom) = (&patch.name, domain.label());
        let done = server.named(name, Some(&patch.sha256)).and_then(|payload| {
            let desk = Desk {
                waits: true,
                ..server.host.desk("daemon --reapply".into())
            };
            service::apply(&desk, domain, &payload, Mode::Apply, server.options)
        });
        match done {
            Ok(report) => server.session.say(0, format!("{whom}: {name}: {report}")),
            Err(error) if is_early(&error) => return Err(error),
            Err(error) => server
                .session
                .say(0, format!("{whom}: {name} is not applied again: {error}")),
        }
    }
    Ok(())
}

/// Whether the same may succeed later.
fn is_early(error: &Error) -> bool {
    matches!(error, Error::NotLoaded(_)) || error.exit_code() == ExitCode::TryAgain
}
