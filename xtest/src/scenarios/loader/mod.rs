//! Payloads are ordinary kernel code: each thing that the kernel's own loader prepares such code for
//! works in a payload applied from outside, or is refused by name.
//!
//! One payload of `patches/test/` for each behaviour. Its new functions tell, in a file of /proc,
//! what they found.

mod behaviour;
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

/// See the names.
pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "loader-pv",
        summary:
            "payloads with all that a loader prepares work in a PV guest, or are refused by name",
        profile: &PV1,
        run: |ctx| loader(ctx, Kind::Pv, &BOOKWORM),
    },
    Scenario {
        name: "loader-own-pv",
        summary:
            "the kernel's own livepatches, built unchanged, work or are refused for a true reason",
        profile: &PV1,
        run: |ctx| own::run(ctx, Kind::Pv),
    },
    Scenario {
        name: "loader-pvh",
        summary:
            "payloads with all that a loader prepares work in a PVH guest, or are refused by name",
        profile: &HVM,
        run: |ctx| loader(ctx, Kind::Pvh, &BOOKWORM),
    },
];

/// What takes too long for a usual run.
pub const MATRIX: &[Scenario] = &[
    Scenario {
        name: "loader-trixie-pv",
        summary: "the same with the PV kernel of Debian 13",
        profile: &PV1,
        run: |ctx| loader(ctx, Kind::Pv, &TRIXIE),
    },
    Scenario {
        name: "loader-bullseye-pv",
        summary: "the same with the PV kernel of Debian 11",
        profile: &PV1,
        run: |ctx| loader(ctx, Kind::Pv, &BULLSEYE),
    },
    Scenario {
        name: "loader-testing-pv",
        summary: "the same with the PV kernel of Debian's next release",
        profile: &PV1,
        run: |ctx| loader(ctx, Kind::Pv, &TESTING),
    },
    Scenario {
        name: "loader-cycles-pv",
        summary: "a mixed payload comes and goes 50 times and leaks no page of the arena",
        profile: &PV1,
        run: |ctx| cycles(ctx, Kind::Pv, 50, false),
    },
    Scenario {
        name: "loader-cycles-1000-pv",
        summary: "a mixed payload comes and goes 1,000 times and leaks no page of the arena",
        profile: &PV1,
        run: |ctx| cycles(ctx, Kind::Pv, 1000, false),
    },
    Scenario {
        name: "cycles-2000-pv",
        summary: "the same 2,000 times in a PV guest under load: no memory grows, ours, its arena or its own",
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

fn loader(ctx: &mut Ctx, kind: Kind, suite: &'static Suite) -> Result<(), Verdict> {
    // All of them, so that one run tells all that is wrong.
    let mut wrong = Vec::new();
    for (what, behaviour) in BEHAVIOURS {
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

/// The payload that has everything in it that a loader prepares.
const MIXED: &str = "locus_mixed";

/// What applying again and again must not make more of.
#[derive(Debug, PartialEq, Eq)]
struct Held {
    /// Pages of the arena in use.
    arena: u64,
    /// Memory that Xen gives the guest, in MiB, as `xl list` has it.
    guest: u64,
    /// Processes in dom0.
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

/// One cycle, and the most memory that one of its two runs took, in KiB (`ru_maxrss`).
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
        // busybox takes what the kernel says, KiB, for pages of four.
        most = most.max(found / 4);
    }
    Ok(most)
}

/// Cycles between two looks at what is held.
const AT_ONCE: u32 = 250;

/// Applies and reverts again and again. After the last cycle nobody has more memory than after
/// the first: the guest, its arena, or a run of xen-locus.
fn cycles(ctx: &mut Ctx, kind: Kind, count: u32, load: bool) -> Result<(), Verdict> {
    let subject = Subject::with_room(ctx, kind, &BOOKWORM)?;
    let before = subject.texts()?;
    if load {
        subject.guest.start_workload()?;
    }
    subject.log.mark(&subject.guest)?;
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
        // A run of hours says how it stands, and what grows is seen where it began to.
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
