//! Payloads are ordinary kernel code: each thing that the kernel's own loader prepares such code for
//! works in a payload applied from outside, or is refused by name.
//!
//! One payload of `patches/test/` for each behaviour. Its new functions tell, in a file of /proc,
//! what they found.

mod behaviour;
pub(super) mod guest_log;
mod own;
mod refused;
mod subject;
mod toggled;

use std::time::Duration;

use crate::fetch::{Suite, BOOKWORM, TRIXIE};
use crate::guest::Kind;
use crate::scenario::{Ctx, Scenario, HVM, PV, PVH};
use crate::verdict::Verdict;
use crate::{check, check_eq};
use subject::Subject;

/// See the names.
pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "loader-pv",
        summary:
            "payloads with all that a loader prepares work in a PV guest, or are refused by name",
        profile: &PV,
        run: |ctx| loader(ctx, Kind::Pv, &BOOKWORM),
    },
    Scenario {
        name: "loader-own-pv",
        summary:
            "the kernel's own livepatches, built unchanged, work or are refused for a true reason",
        profile: &PV,
        run: |ctx| own::run(ctx, Kind::Pv),
    },
    Scenario {
        name: "loader-cycles-pv",
        summary: "a mixed payload comes and goes 50 times and leaks no page of the arena",
        profile: &PV,
        run: |ctx| cycles(ctx, Kind::Pv, 50),
    },
    Scenario {
        name: "loader-pvh",
        summary:
            "payloads with all that a loader prepares work in a PVH guest, or are refused by name",
        profile: &PVH,
        run: |ctx| loader(ctx, Kind::Pvh, &BOOKWORM),
    },
];

/// What takes too long for a usual run.
pub const MATRIX: &[Scenario] = &[
    Scenario {
        name: "loader-trixie-pv",
        summary: "the same with the PV kernel of Debian 13",
        profile: &PV,
        run: |ctx| loader(ctx, Kind::Pv, &TRIXIE),
    },
    Scenario {
        name: "loader-cycles-1000-pv",
        summary: "a mixed payload comes and goes 1,000 times and leaks no page of the arena",
        profile: &PV,
        run: |ctx| cycles(ctx, Kind::Pv, 1000),
    },
    Scenario {
        name: "loader-trixie-pvh",
        summary: "the same with the PVH kernel of Debian 13",
        profile: &PVH,
        run: |ctx| loader(ctx, Kind::Pvh, &TRIXIE),
    },
    Scenario {
        name: "loader-hvm",
        summary: "the same with an HVM guest, whose kernel is placed at random",
        profile: &HVM,
        run: |ctx| loader(ctx, Kind::Hvm, &BOOKWORM),
    },
];

/// One thing that is shown.
type Behaviour = fn(&Subject<'_>) -> Result<(), Verdict>;

/// All of them, with the names under which they are reported.
const BEHAVIOURS: &[(&str, Behaviour)] = &[
    ("relocations", behaviour::relocations),
    ("state", behaviour::state),
    ("per-CPU", behaviour::percpu),
    ("sites", behaviour::sites),
    ("alternatives", behaviour::alternatives),
    ("user access", behaviour::uaccess),
    ("warnings", behaviour::warnings),
    ("static keys", toggled::static_keys),
    ("tracepoints", toggled::tracepoints),
    ("static calls", toggled::static_calls),
    ("stack traces", behaviour::stacks),
    ("same names", behaviour::same_names),
    ("module function", behaviour::module_function),
    ("300 functions", behaviour::many),
    ("1 MiB of data", behaviour::big),
    ("refusals", refused::all),
];

/// Pages of the arena that a behaviour may need; with fewer left the guest is started anew.
const ROOM: u64 = 60;

fn loader(ctx: &mut Ctx, kind: Kind, suite: &'static Suite) -> Result<(), Verdict> {
    // All of them, so that one run tells all that is wrong.
    let mut wrong = Vec::new();
    for (what, behaviour) in BEHAVIOURS {
        let subject = Subject::with_room(ctx, kind, suite, ROOM)?;
        subject.note(&format!("--- {what}"));
        match shown(&subject, *behaviour) {
            Ok(()) => {}
            Err(Verdict::Failure(why)) => {
                wrong.push(format!("{what}: {why}"));
                if subject.revert_all().is_err() {
                    ctx.destroy_guest(&Subject::guest_name(kind, suite))?;
                }
            }
            Err(Verdict::Crash(why)) => {
                return Err(Verdict::Crash(format!(
                    "{what}: {why}\n{}",
                    wrong.join("\n")
                )));
            }
            other => other?,
        }
    }
    let name = Subject::guest_name(kind, suite);
    ctx.destroy_guest(&name)?;
    let (count, all) = (wrong.len(), BEHAVIOURS.len());
    check!(
        wrong.is_empty(),
        "{count} of {all} went wrong:\n{}",
        wrong.join("\n")
    );
    Ok(())
}

/// One behaviour, and a guest that is as it was before.
fn shown(subject: &Subject<'_>, behaviour: Behaviour) -> Result<(), Verdict> {
    let before = subject.texts()?;
    subject.log.mark(&subject.guest)?;
    behaviour(subject)?;
    check_eq!(subject.applied()?, Vec::<String>::new(), "patches left");
    check_eq!(
        subject.texts()?,
        before,
        "what the guest's files say afterwards"
    );
    subject.log.nothing_new(subject.ctx, &subject.guest)
}

/// Applies and reverts again and again in one go. The arena has the same number of pages in use after
/// the first cycle as after the last.
fn cycles(ctx: &mut Ctx, kind: Kind, count: u32) -> Result<(), Verdict> {
    let subject = Subject::with_room(ctx, kind, &BOOKWORM, ROOM)?;
    let before = subject.texts()?;
    subject.log.mark(&subject.guest)?;
    let (name, file) = (&subject.guest.name, subject.file("locus_mixed"));
    let run = |count: u32| -> Result<(), Verdict> {
        let limit = Duration::from_secs(60) + count * Duration::from_secs(3);
        let cmd = format!(
            "for i in $(seq {count}); do xen-locus apply {name} {file} && \
             xen-locus revert {name} locus_mixed || {{ echo \"cycle $i: $?\"; exit 1; }}; done"
        );
        let out = subject.ctx.dom0.sh_timeout(&cmd, limit)?;
        check_eq!(out.rc, 0, "{} {}", out.text(), out.err_text());
        Ok(())
    };
    run(1)?;
    let used = subject.arena_used()?;
    run(count)?;
    check_eq!(subject.arena_used()?, used, "pages of the arena in use");
    subject.apply("locus_mixed")?;
    subject.all_ok("/proc/cmdline")?;
    subject.revert("locus_mixed")?;
    check_eq!(subject.arena_used()?, used, "pages of the arena in use");
    check_eq!(
        subject.texts()?,
        before,
        "what the guest's files say afterwards"
    );
    subject.log.nothing_new(subject.ctx, &subject.guest)
}
