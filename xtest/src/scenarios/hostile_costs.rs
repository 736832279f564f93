//! What a hostile guest costs dom0: for each command the peak of memory, and the time by a clock that counts instructions,
//! both beside those of the same command for an honest guest on the same machine.
//!
//! `locus-forge` writes what the guest's own root could write: a full arena, symbols and types that multiply. The
//! module `patches/test/liar` bends the guest's lists.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use super::steps::patches::{self, CMDLINE, PAIR};
use crate::guest::{Guest, GuestSpec, Kind};
use crate::profile::PV_COUNTED;
use crate::scenario::{Ctx, Scenario};
use crate::verdict::Verdict;
use crate::{check, check_eq};

/// Scenarios that take too long for a usual run.
pub const MATRIX: &[Scenario] = &[Scenario {
    name: "hostile-costs-pv",
    summary: "each command about a forged guest takes less than 256 MiB, and at most ten times what an honest one costs",
    profile: &PV_COUNTED,
    run: costs,
}];

const NAME: &str = "hostile";
/// The most memory of a command, its workers and its guardian each, in KiB.
const MEMORY: u64 = 256 << 10;
/// How many times the cost for an honest guest is allowed.
const TIMES: u64 = 10;
/// The commands. Those that wait do so for a moment only, because waiting costs something too. `PATCH` is a patch in force, `FILE`
/// a payload that is not applied, `UUID` and `ID` the guest's. All read the guest anew: from the cache they would get what it showed
/// before it was forged.
const COMMANDS: [&str; 20] = [
    "list",
    "status NAME",
    "info NAME",
    "info NAME --symbols cmdline*",
    "info NAME --tasks",
    "info NAME --stacks",
    "info NAME --modules",
    "info NAME --type file",
    "info NAME --raw notes",
    "verify NAME",
    "blocking NAME FILE",
    "blocking NAME PATCH",
    "check NAME FILE",
    "daemon --work=publish/ID/UUID",
    "nudge NAME PATCH --timeout 100ms",
    "apply NAME FILE --timeout 100ms",
    "revert NAME PATCH --timeout 100ms",
    "replace NAME FILE --timeout 100ms",
    "recover NAME",
    RECLAIM,
];
/// Something in an honest guest, too, may lead into a patch that was in force a moment ago.
const RECLAIM: &str = "reclaim NAME --timeout 100ms";
/// The command that must notice forged names, and how it ends then.
const NOTICED: (&str, i32) = ("check NAME FILE", 3);
/// As many structures of one name are shown at least where types are forged. An honest guest has one, and of thousands only
/// some are shown.
const SHOWN: u64 = 10;
/// What `locus-forge` can forge, and the name of the topmost patch then.
const FORGED: [(&str, &str); 4] = [
    ("layers", "p30"),
    ("functions", "p30"),
    ("names", CMDLINE),
    ("types", CMDLINE),
];
/// Lies of the module.
const LIES: [&str; 3] = ["tasks", "threads", "modules"];

/// What one command cost.
#[derive(Clone, Copy)]
struct Cost {
    rc: i32,
    /// Peak of memory, in KiB.
    kib: u64,
    /// Time on a CPU, in milliseconds of the machine's clock.
    ms: u64,
}

/// What commands cost for a guest that is called `what`, in the order of [`COMMANDS`].
fn measure(ctx: &Ctx, what: &str, patch: &str) -> Result<Vec<Cost>, Verdict> {
    // The daemon's worker is run as the daemon starts it.
    let id = ctx.dom0.ok(&format!("xl domid {NAME}"))?;
    let uuid = ctx
        .dom0
        .ok(&format!("basename $(xenstore-read /local/domain/{id}/vm)"))?;
    let mut costs = Vec::new();
    for command in COMMANDS {
        let command = command
            .replace("NAME", NAME)
            .replace("PATCH", patch)
            .replace("FILE", &patches::file(PAIR))
            .replace("UUID", &uuid)
            .replace("ID", &id);
        let out = ctx.dom0.sh(&format!(
            "busybox time -o /tmp/cost -f '%M %U %S' xen-locus --no-cache {command} >/dev/null; \
             rc=$?; tail -n 1 /tmp/cost; exit $rc"
        ))?;
        let (text, said) = (out.text(), out.err_text());
        check!(!out.timed_out, "{what}: {command} did not end");
        check!(!said.contains("panicked"), "{what}: {command}: {said}");
        let cost = cost(out.rc, &text);
        let cost = cost.ok_or_else(|| Verdict::Error(format!("{command}: cost {text:?}")))?;
        let Cost { rc, kib, ms } = cost;
        eprintln!("hostile-costs: {what}: {command}: {rc}, {kib} KiB, {ms} ms: {said}");
        costs.push(cost);
    }
    Ok(costs)
}

/// Reads `KIB USER SYSTEM`, with seconds as decimal numbers.
fn cost(rc: i32, text: &str) -> Option<Cost> {
    let mut words = text.split_whitespace();
    let kib = words.next()?.parse().ok()?;
    let mut ms = 0;
    for seconds in words {
        let (whole, hundredths) = seconds.split_once('.')?;
        ms += whole.parse::<u64>().ok()? * 1000 + hundredths.parse::<u64>().ok()? * 10;
    }
    Some(Cost { rc, kib, ms })
}

fn fresh(ctx: &mut Ctx) -> Result<Guest, Verdict> {
    ctx.destroy_guest(NAME)?;
    ctx.ensure_guest(GuestSpec::new(NAME, Kind::Pv))
}

fn costs(ctx: &mut Ctx) -> Result<(), Verdict> {
    let apply = format!("xen-locus apply {NAME} {}", patches::file(CMDLINE));
    fresh(ctx)?;
    ctx.dom0.ok(&apply)?;
    let honest = measure(ctx, "honest", CMDLINE)?;
    for (command, cost) in COMMANDS.iter().zip(&honest) {
        let is_busy = *command == RECLAIM && cost.rc == 2;
        check!(cost.rc == 0 || is_busy, "honest: {command}: {}", cost.rc);
    }
    let mut found = BTreeMap::new();
    for (what, patch) in FORGED {
        fresh(ctx)?;
        if patch == CMDLINE {
            ctx.dom0.ok(&apply)?;
        }
        let done = ctx.dom0.ok(&format!("locus-forge {NAME} {what}"))?;
        eprintln!("hostile-costs: {what}: {done}");
        if what == "types" {
            let shown = ctx.dom0.ok(&format!(
                "xen-locus --no-cache info {NAME} --type file | grep -c '^struct file {{' || true"
            ))?;
            check!(
                shown.trim().parse::<u64>().is_ok_and(|n| n >= SHOWN),
                "types: {shown} are shown"
            );
        }
        found.insert(what, measure(ctx, what, patch)?);
    }
    let guest = fresh(ctx)?;
    ctx.dom0.ok(&apply)?;
    let module = ctx.payloads.join("locus_liar/locus_liar.ko");
    guest.put_module("/tmp/liar.ko", &module)?;
    for lie in LIES {
        guest.ok(&format!("insmod /tmp/liar.ko lie={lie}"))?;
        found.insert(lie, measure(ctx, lie, CMDLINE)?);
        guest.ok("rmmod locus_liar")?;
    }
    ctx.destroy_guest(NAME)?;
    let (noticing, code) = NOTICED;
    let costs = found.get("names").into_iter().flatten();
    let cost = COMMANDS.iter().zip(costs).find(|(c, _)| **c == noticing);
    check_eq!(
        cost.map(|(_, cost)| cost.rc),
        Some(code),
        "names: {noticing}"
    );
    let wrong = judge(&honest, &found);
    check!(wrong.is_empty(), "{wrong}");
    Ok(())
}

/// What costs too much, a line for each command and guest.
fn judge(honest: &[Cost], found: &BTreeMap<&str, Vec<Cost>>) -> String {
    let mut wrong = String::new();
    for (what, costs) in found {
        for ((command, cost), honest) in COMMANDS.iter().zip(costs).zip(honest) {
            let Cost { rc, kib, ms } = *cost;
            let most = TIMES * honest.ms;
            if !(0..=6).contains(&rc) || kib >= MEMORY || ms > most {
                let _ = writeln!(
                    wrong,
                    "{what}: {command}: exit code {rc}, {kib} KiB of {MEMORY}, {ms} ms of {most}"
                );
            }
        }
    }
    wrong
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_that_costs_too_much_is_named() {
        let cost = |text| super::cost(0, text).unwrap();
        let honest = vec![cost("20000 0.03 0.02"); COMMANDS.len()];
        let mut forged = honest.clone();
        let judged = |forged: &[Cost]| judge(&honest, &BTreeMap::from([("x", forged.to_vec())]));
        assert_eq!(judged(&forged), "");
        forged[1] = cost("20000 0.30 0.20");
        assert_eq!(judged(&forged), "");
        forged[1] = cost("20000 0.30 0.21");
        assert!(judged(&forged).starts_with("x: status NAME: exit code 0, 20000 KiB"));
        forged[1] = cost("262144 0.03 0.02");
        assert!(judged(&forged).contains("262144 KiB of 262144"));
        forged[1] = super::cost(134, "20000 0.03 0.02").unwrap();
        assert!(judged(&forged).contains("exit code 134"));
        assert!(super::cost(0, "").is_none());
    }
}
