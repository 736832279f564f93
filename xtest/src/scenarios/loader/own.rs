//! The kernel's own livepatches: `samples/livepatch` and `lib/livepatch` of the source of the guest's kernel, built
//! unchanged.

use super::subject::Subject;
use crate::guest::Kind;
use crate::scenario::Ctx;
use crate::suites::BOOKWORM;
use crate::verdict::Verdict;
use crate::{check, check_eq};

/// The expected result for a module.
enum Fate {
    /// It is applied. Then this file of the guest has this content.
    Works(&'static str, &'static str),
    /// It is refused, with these words.
    Refused(&'static [&'static str]),
}
use Fate::{Refused, Works};

/// All modules of both folders.
const MODULES: &[(&str, Fate)] = &[
    (
        "livepatch-sample",
        Works("/proc/cmdline", "this has been live patched"),
    ),
    (
        "test_klp_livepatch",
        // It prints its own module's name, which is a field of `struct module`.
        Works(
            "/proc/cmdline",
            "test_klp_livepatch: this has been live patched",
        ),
    ),
    // A parameter, `replace`, decides what its init function does.
    ("test_klp_atomic_replace", Refused(&["parameter"])),
    ("test_klp_callbacks_demo", Refused(&["callback"])),
    ("test_klp_callbacks_demo2", Refused(&["callback"])),
    ("test_klp_state", Refused(&["callback"])),
    ("test_klp_state2", Refused(&["callback"])),
    ("test_klp_state3", Refused(&["callback"])),
    ("livepatch-callbacks-demo", Refused(&["callback"])),
    // They replace functions of a module that no guest here has.
    (
        "livepatch-shadow-fix1",
        Refused(&["livepatch_shadow_mod", "not loaded"]),
    ),
    (
        "livepatch-shadow-fix2",
        Refused(&["livepatch_shadow_mod", "not loaded"]),
    ),
    // Modules that the livepatches are tried on.
    ("test_klp_callbacks_busy", Refused(&["not a livepatch"])),
    ("test_klp_callbacks_mod", Refused(&["not a livepatch"])),
    ("test_klp_shadow_vars", Refused(&["not a livepatch"])),
    ("livepatch-shadow-mod", Refused(&["not a livepatch"])),
    ("livepatch-callbacks-mod", Refused(&["not a livepatch"])),
    ("livepatch-callbacks-busymod", Refused(&["not a livepatch"])),
];

/// Applies each module, and reports everything that is wrong.
pub fn run(ctx: &mut Ctx, kind: Kind) -> Result<(), Verdict> {
    let built = ctx.kernels.own_livepatches()?;
    let subject = Subject::with_room(ctx, kind, &BOOKWORM)?;
    let mut wrong = Vec::new();
    for (name, file) in &built {
        let Some((_, fate)) = MODULES.iter().find(|(known, _)| known == name) else {
            wrong.push(format!("{name}: nothing is known of this module"));
            continue;
        };
        let path = format!("/payloads/own/{name}.ko");
        subject.ctx.dom0.put(&path, 0o644, &std::fs::read(file)?)?;
        subject.note(&format!("--- {name}"));
        subject.log.mark(subject.ctx, &subject.guest)?;
        match fulfilled(&subject, name, &path, fate) {
            Err(Verdict::Failure(why)) => wrong.push(format!("{name}: {why}")),
            other => other?,
        }
    }
    for (name, _) in MODULES {
        if built.iter().all(|(found, _)| found != name) {
            wrong.push(format!("{name}: not built"));
        }
    }
    check!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

fn fulfilled(subject: &Subject<'_>, name: &str, path: &str, fate: &Fate) -> Result<(), Verdict> {
    match fate {
        Refused(words) => subject.refused(path, words),
        Works(file, text) => {
            let before = subject.read(file)?;
            subject.apply_file(path)?;
            check_eq!(subject.read(file)?, *text, "{file}");
            subject.revert(&name.replace('-', "_"))?;
            check_eq!(subject.read(file)?, before, "{file}");
            subject.log.nothing_new(subject.ctx, &subject.guest)
        }
    }
}
