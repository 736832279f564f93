//! Patches that a guest lost when it was started anew are applied again.

use locus_payload::Payload;

use super::request::Server;
use crate::domain::Domain;
use crate::error::{Error, ExitCode, Result};
use crate::ops::{self, Desk, Patch, Status, GUEST_REBOOTED};
use crate::plan::Mode;
use crate::target::symbols::VMLINUX;

/// Applies all that `status` says is lost, in the order in which it was applied. What can't be applied to
/// this guest, or would cover what was applied after it, is said, and left.
///
/// # Errors
/// [`Class::TryAgain`](crate::error::Class::TryAgain) or one like it: the guest is not ready for one of them yet, nor for those that came
/// after it and replace the same.
pub(super) fn reapply(server: &Server<'_>, domain: &Domain<'_>, status: &Status) -> Result<()> {
    let say = |patch: &Patch, what: String| {
        let whom = domain.label();
        server
            .settings
            .say(0, format!("{whom}: {}{what}", patch.name));
    };
    let is_lost = |p: &&Patch| p.reason == Some(GUEST_REBOOTED);
    let mut early = None;
    let mut waiting: Vec<Payload> = Vec::new();
    for patch in status.patches.iter().filter(is_lost) {
        let payload = match server.named(&patch.name, Some(&patch.sha256)) {
            Ok(payload) => payload,
            Err(error) => {
                say(patch, format!(" is not applied again: {error}"));
                continue;
            }
        };
        let is_later = |p: &&Patch| !is_lost(p) && p.applied_at > patch.applied_at;
        let mut later = status.patches.iter().filter(is_later);
        if let Some(later) = later.find(|p| meets(&payload, &functions_of_patch(p))) {
            let why =
                " is not applied again, for it would take the place of what was applied after it";
            say(patch, format!("{why}: {}", later.name));
            continue;
        }
        if waiting.iter().any(|w| meets(&payload, &functions(w))) {
            waiting.push(payload);
            continue;
        }
        let desk = Desk {
            comes_again: is_early,
            ..server.host.desk("daemon --reapply".into())
        };
        match ops::apply(
            &desk,
            domain,
            &payload,
            Mode::Apply,
            &server.settings.options,
        ) {
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

/// A function, with the object that it is in.
type Name<'a> = (&'a str, &'a str);

/// Whether `payload` may not be applied before what replaces `others`: it replaces one of them too, or
/// supersedes all that is there.
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

/// Whether the same may succeed later.
fn is_early(error: &Error) -> bool {
    error.is_not_loaded() || error.exit_code() == ExitCode::TryAgain
}
