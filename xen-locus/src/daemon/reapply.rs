//! Applies again the patches that a guest lost in a reboot.

use std::time::Duration;

use locus_payload::Payload;

use super::server::Server;
use crate::apply::Options;
use crate::domain::Domain;
use crate::error::{Error, ExitCode, Result};
use crate::ops::{self, Operator, Patch, Status};
use crate::plan::Mode;
use crate::target::symbols::VMLINUX;

/// Longest time for one patch. Nobody waits for it, and it comes again later.
const TIMEOUT: Duration = Duration::from_secs(2);

/// Applies all patches that are lost by `status`, in the order in which they were applied. A patch is left out, and
/// that is said, if it can't be applied to this guest or would cover a patch that was applied after it.
///
/// # Errors
/// [`Class::TryAgain`](crate::error::Class::TryAgain), or a module is not loaded: the guest is not ready yet for one of
/// them, nor for later ones that replace the same functions. Or this worker is asked to stop.
pub(super) fn reapply(server: &Server<'_>, domain: &Domain<'_>, status: &Status) -> Result<()> {
    let say = |patch: &Patch, what: String| {
        let whom = domain.label();
        server
            .settings
            .say(0, format!("{whom}: {}{what}", patch.name));
    };
    let is_lost = |p: &&Patch| p.state.is_lost();
    let options = hurried(&server.settings.options);
    let mut early = None;
    let mut waiting: Vec<Payload> = Vec::new();
    for patch in status.patches.iter().filter(is_lost) {
        if server.is_stopping() {
            return Err(Error::try_again("interrupted"));
        }
        let payload = match server.named(&patch.name, Some(&patch.sha256)) {
            Ok(payload) => payload,
            Err(error) => {
                say(patch, format!(" is not applied again: {error}"));
                continue;
            }
        };
        let is_later = |p: &&Patch| !is_lost(p) && p.is_after(patch);
        let mut later = status.patches.iter().filter(is_later);
        if let Some(later) = later.find(|p| meets(&payload, &functions_of_patch(p))) {
            let why =
                " is not applied again, because it would take the place of what was applied after it";
            say(patch, format!("{why}: {}", later.name));
            continue;
        }
        if waiting.iter().any(|w| meets(&payload, &functions(w))) {
            waiting.push(payload);
            continue;
        }
        let operator = Operator {
            retries_after: is_early,
            ..server.host.operator("daemon --reapply".into())
        };
        match ops::apply(&operator, domain, &payload, Mode::Apply, &options) {
            Ok(report) => say(patch, format!(": {report}")),
            Err(error) if is_early(&error) => {
                say(patch, format!(" is not applied again yet: {error}"));
                waiting.push(payload);
                early.get_or_insert(error);
            }
            Err(error) => say(patch, format!(" is not applied again: {error}")),
        }
    }
    early.map_or(Ok(()), Err)
}

/// The options of a change that nobody waits for.
fn hurried(options: &Options) -> Options {
    Options {
        timeout: options.timeout.min(TIMEOUT),
        ..options.clone()
    }
}

/// A function, with the object that it is in.
type Name<'a> = (&'a str, &'a str);

/// Whether `payload` must keep its place in the order relative to a patch that replaces `others`: it replaces one of
/// them too, or supersedes all patches.
fn meets(payload: &Payload, others: &[Name<'_>]) -> bool {
    let shares = || functions(payload).iter().any(|name| others.contains(name));
    Mode::Apply.supersedes(payload) || shares()
}

fn functions(payload: &Payload) -> Vec<Name<'_>> {
    let objects = payload.klp.objects.iter();
    let of = objects.flat_map(|object| {
        let name = object.name.as_deref().unwrap_or(VMLINUX);
        object.funcs.iter().map(move |f| (name, &*f.old_name))
    });
    of.collect()
}

fn functions_of_patch(patch: &Patch) -> Vec<Name<'_>> {
    let all = patch.functions.iter().map(|f| &f.function);
    all.map(|f| (&*f.object, &*f.name)).collect()
}

/// Whether the same operation may succeed later.
fn is_early(error: &Error) -> bool {
    error.is_not_loaded() || error.exit_code() == ExitCode::TryAgain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_nobody_waits_for_has_two_seconds_at_most() {
        let of = |timeout| {
            let options = Options {
                timeout,
                ..Options::default()
            };
            hurried(&options).timeout
        };
        assert_eq!(of(Duration::from_secs(600)), Duration::from_secs(2));
        assert_eq!(of(Duration::from_secs(1)), Duration::from_secs(1));
    }
}
