//! Threads enter, sleep in, are preempted in and leave functions whose old and new versions disagree. No thread ever
//! meets one version beneath the other.

use std::time::Duration;

use super::steps::guest_log::Log;
use super::steps::{patches, tool};
use crate::guest::{Guest, GuestSpec, Kind};
use crate::profile::{PV, PVH};
use crate::scenario::{Ctx, Scenario};
use crate::verdict::Verdict;
use crate::{check, check_eq};

/// Scenarios that are short enough for a usual run.
pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "protocol-pv",
        summary: "40 changes of functions that threads always use: no thread sees half of a change",
        profile: &PV,
        run: |ctx| protocol(ctx, Kind::Pv, 20),
    },
    Scenario {
        name: "protocol-blind-pv",
        summary: "the same without the check of stacks: threads see halves of changes",
        profile: &PV,
        run: |ctx| blind(ctx, Kind::Pv),
    },
];

/// Scenarios that take too long for a usual run.
pub const MATRIX: &[Scenario] = &[
    Scenario {
        name: "protocol-500-pv",
        summary: "the same 1,000 times",
        profile: &PV,
        run: |ctx| protocol(ctx, Kind::Pv, 500),
    },
    Scenario {
        name: "protocol-500-pvh",
        summary: "the same 1,000 times in a PVH guest",
        profile: &PVH,
        run: |ctx| protocol(ctx, Kind::Pvh, 500),
    },
];

const SUBJECT: &str = "locus_protocol";
const PATCH: &str = "locus_protocol_patch";
/// Cycles of one command. Between commands the guest is checked.
const ROUND: u32 = 20;
/// Cycles after which a long run reports its progress.
const SAY: u32 = 100;

/// What the threads have counted.
#[derive(Debug)]
struct Count {
    /// Calls that found the token taken by the other version's rule.
    violations: u64,
    /// Calls of the old functions, and of the new ones.
    calls: [u64; 2],
    /// Rounds of each thread.
    rounds: Vec<u64>,
}

impl Count {
    fn read(guest: &Guest) -> Result<Self, Verdict> {
        let text = guest.ok(&format!("cat /proc/{SUBJECT}"))?;
        let numbers = |name: &str| -> Vec<u64> {
            let mut lines = text.lines().filter_map(|l| l.strip_prefix(name));
            let words = lines.next().unwrap_or_default().split_whitespace();
            words.filter_map(|w| w.parse().ok()).collect()
        };
        let one = |name: &str| match *numbers(name) {
            [n] => Ok(n),
            _ => Err(Verdict::Error(format!("/proc/{SUBJECT}: {text:?}"))),
        };
        Ok(Self {
            violations: one("violations ")?,
            calls: [one("old ")?, one("new ")?],
            rounds: numbers("rounds "),
        })
    }

    /// Checks that every thread has made progress since.
    fn goes_on_from(&self, before: &Self) -> Result<(), Verdict> {
        let mut pairs = before.rounds.iter().zip(&self.rounds);
        check!(
            self.rounds.len() == 24 && pairs.all(|(before, now)| now > before),
            "a thread is stuck: {before:?}, then {self:?}"
        );
        Ok(())
    }
}

/// A guest with the threads, and what they have counted so far. Its kernel is preemptible.
fn threads(ctx: &mut Ctx, kind: Kind) -> Result<(Guest, Count), Verdict> {
    let name = format!("threads-{}", kind.name());
    let spec = GuestSpec::new(&name, kind).kernel_args("preempt=full");
    let guest = ctx.ensure_guest(spec)?;
    if !guest.ok("cat /proc/modules")?.contains(SUBJECT) {
        guest.insmod(&ctx.payloads.join(format!("{SUBJECT}/{SUBJECT}.ko")))?;
    }
    let count = Count::read(&guest)?;
    check_eq!(count.violations, 0, "before anything was changed");
    Ok((guest, count))
}

/// Applies and reverts `count` times with this program. Appends its output to a file of dom0.
fn cycles(ctx: &Ctx, guest: &Guest, program: &str, count: u32) -> Result<(), Verdict> {
    let name = &guest.name;
    let cycles = tool::cycles(
        program,
        &format!("{name} {} --timeout 60s", patches::file(PATCH)),
        &format!("{name} {PATCH} --timeout 60s"),
        count,
    );
    let cmd = format!("{cycles} | tee -a /run/{name}.log");
    // The number of attempts of a change varies, and each takes longer beside other machines.
    let limit = Duration::from_secs(120) + count * Duration::from_secs(30);
    let out = ctx
        .dom0
        .sh_timeout(&format!("set -o pipefail; {cmd}"), limit)?;
    let said = || format!("{} {}", out.text(), out.err_text());
    check!(
        !out.timed_out,
        "{count} cycles took longer than {limit:?}: {}",
        said()
    );
    check_eq!(out.rc, 0, "{}", said());
    Ok(())
}

fn protocol(ctx: &mut Ctx, kind: Kind, count: u32) -> Result<(), Verdict> {
    let (guest, first) = threads(ctx, kind)?;
    let log = Log::begin(ctx, &guest)?;
    let mut before = first;
    let mut done = 0;
    while done < count {
        let round = ROUND.min(count - done);
        cycles(ctx, &guest, "xen-locus", round)?;
        done += round;
        let now = Count::read(&guest)?;
        check_eq!(now.violations, 0, "after {done} cycles: {now:?}");
        now.goes_on_from(&before)?;
        let [old, new] = [0, 1].map(|i| now.calls[i] > before.calls[i]);
        check!(old && new, "one version ran only: {before:?}, then {now:?}");
        if done % SAY == 0 {
            eprintln!("protocol: {done} cycles, no violation");
        }
        before = now;
    }
    log.nothing_new(ctx, &guest)?;
    let tries = ctx.dom0.ok(&format!(
        "sed -n 's/.* \\([0-9]*\\) attempt.*/\\1/p' /run/{}.log | sort -n | uniq -c",
        guest.name
    ))?;
    let tries = tries.split_whitespace().collect::<Vec<_>>().join(" ");
    eprintln!("protocol: {done} cycles, {before:?}; how many took how many attempts: {tries}");
    Ok(())
}

fn blind(ctx: &mut Ctx, kind: Kind) -> Result<(), Verdict> {
    let (guest, _) = threads(ctx, kind)?;
    let mut cycles_done = 0;
    let mut count = Count::read(&guest)?;
    while count.violations == 0 && cycles_done < 30 {
        cycles(ctx, &guest, "env XEN_LOCUS_BLIND=1 xen-locus-faults", 2)?;
        cycles_done += 2;
        count = Count::read(&guest)?;
    }
    eprintln!("protocol: without the look at stacks, after {cycles_done} cycles: {count:?}");
    check!(
        count.violations > 0,
        "{cycles_done} blind cycles, and no violation: the test of the look at stacks shows nothing"
    );
    // Other scenarios can't use this guest, because its threads are in an inconsistent state.
    ctx.destroy_guest(&guest.name)
}
