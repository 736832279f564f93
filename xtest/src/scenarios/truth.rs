//! The testbed tells the truth: what must make a scenario fail does. These scenarios must fail, or run others that must.

use crate::guest::{GuestSpec, Kind};
use crate::profile::PV1;
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
        run: |ctx| useless(ctx, Which::Quick),
    },
];

/// Scenarios that take too long for a usual run.
pub const MATRIX: &[Scenario] = &[Scenario {
    name: "useless-tools-all",
    summary: "a tool that always fails, and one that does nothing and succeeds, fail all scenarios of a machine",
    profile: &PV1,
    run: |ctx| useless(ctx, Which::All),
}];

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

/// Which scenarios are run with a useless tool.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Which {
    /// [`QUICK`].
    Quick,
    /// All of this machine that use the tool.
    All,
}

/// Scenarios that need no guest but the usual one.
const QUICK: &[&str] = &[
    "arena-is-kernel-only-pv",
    "blocked-pv",
    "drain-pv",
    "history-pv",
    "nudge-pv",
    "refuse-changed-functions",
    "refuse-payloads",
    "stack-pv",
    "two-at-once-pv",
    "verify-pv",
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

/// Runs scenarios with something else in the tool's place. Each must fail.
fn useless(ctx: &mut Ctx, which: Which) -> Result<(), Verdict> {
    let all = super::all().into_iter();
    let some: Vec<Scenario> = all
        .filter(|s| s.profile == &PV1 && uses_the_tool(s.name))
        .filter(|s| which == Which::All || QUICK.contains(&s.name))
        .collect();
    check!(some.len() >= QUICK.len(), "{} scenarios", some.len());
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
