//! The testbed tells the truth: what must make a scenario fail does. These scenarios must fail, or run others that must.

use crate::guest::{GuestSpec, Kind};
use crate::late;
use crate::profile::{Profile, PV, PV1, PVH};
use crate::results;
use crate::scenario::{Ctx, Scenario};
use crate::verdict::Verdict;
use crate::{check, check_eq};

/// Scenarios that are short enough for a usual run.
pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "must-fail-guest-warns",
        summary: "a guest whose kernel warns fails a scenario that looks at nothing",
        profile: &PV1,
        run: |ctx| broken_guest(ctx, "warn", "WARNING:"),
    },
    Scenario {
        name: "must-fail-guest-oopses",
        summary: "a guest whose kernel oopses and goes on fails a scenario that looks at nothing",
        profile: &PV1,
        run: |ctx| broken_guest(ctx, "oops", "Oops"),
    },
    Scenario {
        name: "must-fail-dom0-warns",
        summary: "a warning of dom0's kernel fails a scenario that looks at nothing",
        profile: &PV1,
        run: broken_dom0,
    },
    Scenario {
        name: "useless-tools",
        summary: "a tool that always fails, and one that does nothing and succeeds, fail scenarios of many kinds",
        profile: &PV1,
        run: |ctx| useless(ctx, &PV1, Which::Named(QUICK)),
    },
];

/// Scenarios that take too long for a usual run.
pub const MATRIX: &[Scenario] = &[
    Scenario {
        name: "useless-tools-all",
        summary: "a tool that always fails, and one that does nothing and succeeds, fail all scenarios of a machine",
        profile: &PV1,
        run: |ctx| useless(ctx, &PV1, Which::All),
    },
    Scenario {
        name: "useless-tools-pv",
        summary: "such tools fail scenarios with kills, signals, a hostile guest, and threads that are always inside",
        profile: &PV,
        run: |ctx| useless(ctx, &PV, Which::Named(QUICK_PV)),
    },
    Scenario {
        name: "useless-tools-pvh",
        summary: "such tools fail scenarios of many kinds with PVH guests",
        profile: &PVH,
        run: |ctx| useless(ctx, &PVH, Which::Named(QUICK_PVH)),
    },
    Scenario {
        name: LATE,
        summary: "a scenario that takes too long is ended, and it is said what it waits for",
        profile: &PV1,
        run: too_late,
    },
];

/// The module in dom0 that breaks a kernel.
const MODULE: &str = "/payloads/locus_broken.ko";

/// Breaks a guest's kernel, and destroys the guest: nothing is left but what its console said.
fn broken_guest(ctx: &mut Ctx, what: &str, words: &str) -> Result<(), Verdict> {
    ctx.must_fail(words);
    let spec = GuestSpec::new("broken", Kind::Pv).memory(128).vcpus(1);
    let guest = ctx.ensure_guest(spec)?;
    let module = ctx.payloads.join("locus_broken/locus_broken.ko");
    guest.put_module("/tmp/locus_broken.ko", &module)?;
    // The process that loads it may not survive.
    guest.sh(&format!("insmod /tmp/locus_broken.ko what={what}"))?;
    guest.ok("true")?;
    ctx.destroy_guest("broken")
}

fn broken_dom0(ctx: &mut Ctx) -> Result<(), Verdict> {
    ctx.must_fail("WARNING:");
    ctx.dom0
        .ok(&format!("insmod {MODULE} what=warn && rmmod locus_broken"))?;
    Ok(())
}

/// The scenario that takes too long. A command in dom0 has this word too.
const LATE: &str = "must-fail-late";

/// Waits for a command that takes twice as long as this scenario may. The runner must end it, and say of the command's
/// shell what it is doing: its arguments, then its state.
fn too_late(ctx: &mut Ctx) -> Result<(), Verdict> {
    let found = results::usual().find(|(name, _)| *name == LATE);
    let (_, usual) =
        found.ok_or_else(|| Verdict::Error(format!("usual.txt has no {LATE}, so no limit")))?;
    let limit = late::limit(usual);
    ctx.must_fail(&format!("{LATE} \nState:"));
    // A machine on which something is ended is given up. Said like this, it is not one of the few that may be lost.
    ctx.uses_up_the_machine();
    let command = format!("sleep {}; : {LATE}", (2 * limit).as_secs());
    ctx.dom0.sh_timeout(&command, 3 * limit)?;
    Ok(())
}

/// Which scenarios are run with a useless tool.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Which {
    /// Those with these names, in this order.
    Named(&'static [&'static str]),
    /// All of the machine that use the tool.
    All,
}

/// Scenarios that need no guest but the usual one.
const QUICK: &[&str] = &[
    "blocked-pv",
    "drain-pv",
    "arena-is-kernel-only-pv",
    "nudge-pv",
    "stack-pv",
    "refuse-payloads",
    "refuse-changed-functions",
    "history-pv",
    "verify-pv",
    "two-at-once-pv",
];

/// Scenarios of [`PV`] that notice a useless tool soon, in an order in which no guest starts beside a workload that one before
/// left. A scenario's result depends on each file with its whole name in it ([`crate::inputs`]), so the names are without
/// the type of guest.
const QUICK_PV: &[&str] = &[
    "apply",
    "hostile-flip",
    "protocol",
    "protocol-blind",
    "both-die",
    "kills",
    "signals",
];

/// The same for [`PVH`].
const QUICK_PVH: &[&str] = &[
    "apply",
    "verify",
    "stack",
    "nudge",
    "pti",
    "bigdata",
    "objects",
    "hostile-flip",
    "kprobe-late",
    "kills",
];

/// What stands in for the tool: its name, and the last line of a script.
const TOOLS: [(&str, &str); 2] = [
    (
        "a tool that always fails",
        "echo 'xen-locus: no' >&2; exit 1",
    ),
    ("a tool that does nothing", "echo '{}'; exit 0"),
];

/// Scenarios here that don't use the tool, and this one.
fn uses_the_tool(name: &str) -> bool {
    !["testbed-", "must-fail-", "useless-"]
        .iter()
        .any(|start| name.starts_with(start))
}

/// Whether this is the scenario's name, or its name without the type of guest.
fn is_called(scenario: &str, name: &str) -> bool {
    let rest = scenario.strip_prefix(name);
    rest.is_some_and(|rest| ["", "-pv", "-pvh"].contains(&rest))
}

/// The scenarios of this machine that are run with a useless tool.
fn chosen(profile: &Profile, which: Which) -> Vec<Scenario> {
    let mut here = super::all();
    here.retain(|s| s.profile == profile && uses_the_tool(s.name));
    let Which::Named(names) = which else {
        return here;
    };
    let find = |name: &&str| here.iter().find(|s| is_called(s.name, name)).copied();
    names.iter().filter_map(find).collect()
}

/// Runs scenarios with something else in the tool's place. Each must fail.
fn useless(ctx: &mut Ctx, profile: &Profile, which: Which) -> Result<(), Verdict> {
    let some = chosen(profile, which);
    let fewest = match which {
        Which::Named(names) => names.len(),
        Which::All => QUICK.len(),
    };
    check!(some.len() >= fewest, "{} scenarios", some.len());
    // A workload that an earlier scenario left would slow all down.
    ctx.destroy_all()?;
    let mut passed = Vec::new();
    for (what, script) in TOOLS {
        for scenario in &some {
            ctx.dom0
                .note(&format!("--- {}, with {what}", scenario.name));
            instead_of_the_tool(ctx, script)?;
            let result = ctx.within(scenario);
            put_back(ctx)?;
            match result? {
                Ok(()) | Err(Verdict::Skip(_)) => {
                    passed.push(format!("{} with {what}", scenario.name));
                }
                Err(Verdict::Crash(why)) => return Err(Verdict::Crash(why)),
                // Of those in a list, none calls it an error of the testbed that the tool is useless.
                Err(Verdict::Error(why)) if which != Which::All => {
                    return Err(Verdict::Error(format!("{}: {why}", scenario.name)));
                }
                Err(_) => {}
            }
        }
        // Scenarios that end early leave traces.
        ctx.destroy_all()?;
    }
    check_eq!(passed, Vec::<String>::new(), "what passed all the same");
    Ok(())
}

/// Puts a script in the place of the tool and its variant with faults.
fn instead_of_the_tool(ctx: &Ctx, script: &str) -> Result<(), Verdict> {
    let script = format!("#!/bin/sh\n{script}\n");
    ctx.dom0.put("/tmp/useless", 0o755, script.as_bytes())?;
    ctx.dom0
        .ok("for t in xen-locus xen-locus-faults; do mount --bind /tmp/useless /usr/sbin/$t || exit 1; done")?;
    Ok(())
}

fn put_back(ctx: &Ctx) -> Result<(), Verdict> {
    ctx.dom0
        .ok("for t in xen-locus xen-locus-faults; do umount -l /usr/sbin/$t || exit 1; done")?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_list_names_scenarios_of_its_machine() {
        for (profile, names) in [(&PV1, QUICK), (&PV, QUICK_PV), (&PVH, QUICK_PVH)] {
            let some = chosen(profile, Which::Named(names));
            let found: Vec<&str> = some.iter().map(|s| s.name).collect();
            assert_eq!(found.len(), names.len(), "{names:?}: {found:?}");
        }
        assert!(is_called("nudge-pvh", "nudge") && !is_called("nudge-pvh", "nudge-pv"));
    }

    #[test]
    fn what_is_too_late_has_a_limit() {
        assert!(results::usual().any(|(name, _)| name == LATE));
    }
}
