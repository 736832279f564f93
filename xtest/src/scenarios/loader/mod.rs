//! Payloads are ordinary kernel code. Everything that the kernel's own module loader prepares works in a payload that
//! is applied from outside, or is refused by name.
//!
//! `patches/test/` has a payload for each behaviour. Its new functions report in a file of `/proc` what they found.

mod behaviour;
mod heads;
mod own;
mod refused;
mod subject;
mod toggled;

use std::time::Duration;

use super::steps::tool;
use crate::guest::Kind;
use crate::profile::{HVM, PV1, PVH};
use crate::scenario::{Ctx, Scenario};
use crate::suites::{Suite, BOOKWORM, BULLSEYE, TESTING, TRIXIE};
use crate::verdict::Verdict;
use crate::{check, check_eq};
use subject::Subject;

/// Scenarios that are short enough for a usual run.
pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "loader-pv",
        summary: "payloads with seven things that a loader prepares work in a PV guest",
        profile: &PV1,
        run: |ctx| loader(ctx, Kind::Pv, &BOOKWORM, &[SOME]),
    },
    Scenario {
        name: "loader-own-pv",
        summary:
            "the kernel's own livepatches, built unchanged, work or are refused for the right reason",
        profile: &PV1,
        run: |ctx| own::run(ctx, Kind::Pv),
    },
    Scenario {
        name: "heads-trixie-pv",
        summary: "sealed functions of Debian 13's kernel and of a module, and a tail call, are replaced",
        profile: &PV1,
        run: heads::short,
    },
    Scenario {
        name: "sealed-trixie-pv",
        summary: "functions that the kernel sealed, that begin with a tail call or only return, are replaced; \
                  what the guest itself does with a sealed one is told",
        profile: &PV1,
        run: heads::run,
    },
    Scenario {
        name: "loader-pvh",
        summary:
            "payloads with everything that a loader prepares work in a PVH guest, or are refused by name",
        profile: &HVM,
        run: |ctx| loader(ctx, Kind::Pvh, &BOOKWORM, ALL),
    },
];

/// Scenarios that take too long for a usual run.
pub const MATRIX: &[Scenario] = &[
    Scenario {
        name: "loader-all-pv",
        summary:
            "payloads with everything that a loader prepares work in a PV guest, or are refused by name",
        profile: &PV1,
        run: |ctx| loader(ctx, Kind::Pv, &BOOKWORM, ALL),
    },
    Scenario {
        name: "loader-trixie-pv",
        summary: "the same with the PV kernel of Debian 13",
        profile: &PV1,
        run: |ctx| loader(ctx, Kind::Pv, &TRIXIE, ALL),
    },
    Scenario {
        name: "loader-bullseye-pv",
        summary: "the same with the PV kernel of Debian 11",
        profile: &PV1,
        run: |ctx| loader(ctx, Kind::Pv, &BULLSEYE, ALL),
    },
    Scenario {
        name: "loader-testing-pv",
        summary: "the same with the PV kernel of Debian's next release",
        profile: &PV1,
        run: |ctx| loader(ctx, Kind::Pv, &TESTING, ALL),
    },
    Scenario {
        name: "loader-cycles-pv",
        summary: "a mixed payload is applied and reverted 50 times and leaks no page of the arena",
        profile: &PV1,
        run: |ctx| cycles(ctx, Kind::Pv, 50, false),
    },
    Scenario {
        name: "loader-cycles-1000-pv",
        summary: "a mixed payload is applied and reverted 1,000 times and leaks no page of the arena",
        profile: &PV1,
        run: |ctx| cycles(ctx, Kind::Pv, 1000, false),
    },
    Scenario {
        name: "cycles-2000-pv",
        summary: "the same 2,000 times in a PV guest under load: no memory of xen-locus or the guest grows",
        profile: &PV1,
        run: |ctx| cycles(ctx, Kind::Pv, 2000, true),
    },
    Scenario {
        name: "cycles-2000-pvh",
        summary: "the same 2,000 times in a PVH guest under load",
        profile: &PVH,
        run: |ctx| cycles(ctx, Kind::Pvh, 2000, true),
    },
    Scenario {
        name: "loader-trixie-pvh",
        summary: "the same with the PVH kernel of Debian 13",
        profile: &PVH,
        run: |ctx| loader(ctx, Kind::Pvh, &TRIXIE, ALL),
    },
    Scenario {
        name: "loader-hvm",
        summary: "the same with an HVM guest, whose kernel is placed at random",
        profile: &HVM,
        run: |ctx| loader(ctx, Kind::Hvm, &BOOKWORM, ALL),
    },
];

/// The test of one behaviour.
type Behaviour = fn(&Subject<'_>) -> Result<(), Verdict>;

/// A behaviour, and the name under which it is reported.
type Named = (&'static str, Behaviour);

/// A part for a usual run: half a minute each on an emulated machine.
const SOME: &[Named] = &[
    ("relocations", behaviour::relocations),
    ("state", behaviour::state),
    ("warnings", behaviour::warnings),
    ("static keys", toggled::static_keys),
    ("tracepoints", toggled::tracepoints),
    ("module function", behaviour::module_function),
    ("tail call", heads::tail_call),
];

/// All others.
const REST: &[Named] = &[
    ("per-CPU", behaviour::percpu),
    ("sites", behaviour::sites),
    ("alternatives", behaviour::alternatives),
    ("user access", behaviour::uaccess),
    ("static calls", toggled::static_calls),
    ("stack traces", behaviour::stacks),
    ("same names", behaviour::same_names),
    ("sealed function", heads::sealed),
    ("sealed function of a module", heads::module_sealed),
    ("only a return", heads::only_return),
    ("300 functions", behaviour::many),
    ("1 MiB of data", behaviour::big),
    ("refusals", refused::all),
];

const ALL: &[&[Named]] = &[SOME, REST];

fn loader(
    ctx: &mut Ctx,
    kind: Kind,
    suite: &'static Suite,
    behaviours: &[&[Named]],
) -> Result<(), Verdict> {
    // All of them, so that one run reports everything that is wrong.
    let mut wrong = Vec::new();
    let behaviours = behaviours.concat();
    for (what, behaviour) in &behaviours {
        let subject = Subject::with_room(ctx, kind, suite)?;
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
    let (count, all) = (wrong.len(), behaviours.len());
    check!(
        wrong.is_empty(),
        "{count} of {all} went wrong:\n{}",
        wrong.join("\n")
    );
    Ok(())
}

/// Tests one behaviour. Afterwards the guest must be as it was before.
fn shown(subject: &Subject<'_>, behaviour: Behaviour) -> Result<(), Verdict> {
    let before = subject.texts()?;
    behaviour(subject)?;
    check_eq!(subject.applied()?, Vec::<String>::new(), "patches left");
    check_eq!(
        subject.texts()?,
        before,
        "what the guest's files say afterwards"
    );
    subject.log.nothing_new(subject.ctx, &subject.guest)
}

/// A payload with a mixture of what a loader prepares.
const MIXED: &str = "locus_mixed";

/// What must not grow when a payload is applied many times.
#[derive(Debug, PartialEq, Eq)]
struct Held {
    /// Pages of the arena in use.
    arena: u64,
    /// Memory that Xen gives the guest, in MiB, by `xl list`.
    guest: u64,
    /// Processes of xen-locus in dom0.
    processes: u64,
}

impl Held {
    fn of(subject: &Subject<'_>) -> Result<Self, Verdict> {
        let name = &subject.guest.name;
        let count = |cmd: &str| -> Result<u64, Verdict> {
            let text = subject.ctx.dom0.ok(cmd)?;
            let number = text.trim().parse();
            number.map_err(|_| Verdict::Error(format!("`{cmd}` says {text:?}")))
        };
        Ok(Self {
            arena: subject.arena_used()?,
            guest: count(&format!("xl list {name} | awk 'NR == 2 {{print $3}}'"))?,
            processes: count("ps | grep -c 'xen-locu[s]'; true")?,
        })
    }
}

/// Runs one cycle. Returns the peak memory of its two runs, in KiB (`ru_maxrss`).
fn peak(subject: &Subject<'_>) -> Result<u64, Verdict> {
    let (name, file) = (&subject.guest.name, subject.file(MIXED));
    let mut most = 0;
    for command in [
        format!("apply {name} {file}"),
        format!("revert {name} {MIXED}"),
    ] {
        let text = subject.ctx.dom0.ok(&format!(
            "busybox time -f 'peak %M' xen-locus {command} 2>&1"
        ))?;
        let found = text
            .lines()
            .find_map(|l| l.strip_prefix("peak ")?.parse().ok());
        let found: u64 = found.ok_or_else(|| Verdict::Error(format!("{command}: {text}")))?;
        // busybox takes the KiB that the kernel reports for pages of 4 KiB.
        most = most.max(found / 4);
    }
    Ok(most)
}

/// Cycles between two checks of [`Held`].
const AT_ONCE: u32 = 250;

/// Applies and reverts `count` times. After the last cycle the guest, its arena and a run of xen-locus must have no
/// more memory than after the first.
fn cycles(ctx: &mut Ctx, kind: Kind, count: u32, load: bool) -> Result<(), Verdict> {
    let subject = Subject::with_room(ctx, kind, &BOOKWORM)?;
    let before = subject.texts()?;
    if load {
        subject.guest.start_workload()?;
    }
    subject.log.mark(subject.ctx, &subject.guest)?;
    let (name, file) = (&subject.guest.name, subject.file(MIXED));
    let run = |count: u32| -> Result<(), Verdict> {
        let limit = Duration::from_secs(60) + count * Duration::from_secs(3);
        let (applied, reverted) = (format!("{name} {file}"), format!("{name} {MIXED}"));
        let cmd = tool::cycles("xen-locus", &applied, &reverted, count);
        let out = subject.ctx.dom0.sh_timeout(&cmd, limit)?;
        check_eq!(out.rc, 0, "{} {}", out.text(), out.err_text());
        Ok(())
    };
    run(1)?;
    let (held, first) = (Held::of(&subject)?, peak(&subject)?);
    let mut done = 0;
    while done < count {
        let some = (count - done).min(AT_ONCE);
        run(some)?;
        done += some;
        // A run of hours reports its progress, and shows when something began to grow.
        eprintln!("cycles: {done} of {count}");
        check_eq!(Held::of(&subject)?, held, "held after {done} cycles");
    }
    let last = peak(&subject)?;
    eprintln!("cycles: {count}: {held:?}, peak of a run {first} KiB, then {last} KiB");
    check!(
        last <= first + first / 8,
        "a run took {first} KiB, then {last}"
    );
    subject.apply(MIXED)?;
    subject.all_ok("/proc/cmdline")?;
    subject.revert(MIXED)?;
    check_eq!(Held::of(&subject)?, held, "held after one more");
    check_eq!(
        subject.texts()?,
        before,
        "what the guest's files say afterwards"
    );
    if load {
        subject.guest.ok("kill $(pidof spin-workload)")?;
    }
    subject.log.nothing_new(subject.ctx, &subject.guest)
}
