//! What xen-locus makes of alternatives, calls, returns and jump labels is what the guest's kernel made of them.

use std::time::Duration;

use super::steps::kernels::{self, kernel_scenarios};
use super::steps::patches::{self, cmdline_is_untouched};
use super::steps::tool;
use crate::guest::{Guest, Kind};
use crate::scenario::{Ctx, Scenario};
use crate::suites::{Suite, BOOKWORM};
use crate::verdict::Verdict;
use crate::{check, check_eq};

const SUMMARY: &str =
    "alternatives, calls, returns and jump labels are what the kernel made of its own";

/// Scenarios that are short enough for a usual run.
pub const SCENARIOS: &[Scenario] = kernel_scenarios!(
    sites,
    SUMMARY,
    [
        ("sites-bookworm-pv", BOOKWORM, Pv, PV1),
        ("sites-trixie-pv", TRIXIE, Pv, PV1),
        ("sites-bookworm-pvh", BOOKWORM, Pvh, PVH),
    ]
);

/// The rest of the matrix of kernels and types.
pub const MATRIX: &[Scenario] = kernel_scenarios!(
    sites,
    SUMMARY,
    [
        ("sites-bullseye-pv", BULLSEYE, Pv, PV1),
        ("sites-testing-pv", TESTING, Pv, PV1),
        ("sites-bullseye-pvh", BULLSEYE, Pvh, PVH),
        ("sites-trixie-pvh", TRIXIE, Pvh, PVH),
        ("sites-testing-pvh", TESTING, Pvh, PVH),
        ("sites-bookworm-hvm", BOOKWORM, Hvm, HVM),
    ]
);

fn sites(ctx: &mut Ctx, suite: &'static Suite, kind: Kind) -> Result<(), Verdict> {
    let spec = kernels::spec(suite, kind);
    let file = format!("{}/vmlinux", spec.boot_dir());
    let guest = ctx.ensure_guest(spec)?;
    if *suite != BOOKWORM {
        // What other kernels boot from does not stay in dom0.
        let kernel = ctx.kernels.get(suite)?;
        ctx.dom0
            .put(&file, 0o644, &std::fs::read(&kernel.vmlinux)?)?;
    }
    compare(ctx, &guest, &file)?;
    alternative(ctx, &guest, suite)?;
    if *suite == BOOKWORM {
        return Ok(());
    }
    ctx.dom0.ok(&format!("rm -f {file}"))?;
    ctx.destroy_guest(&guest.name)
}

/// Compares all places of a guest's kernel, which was made of this file.
pub(super) fn compare(ctx: &Ctx, guest: &Guest, file: &str) -> Result<(), Verdict> {
    let out = ctx.dom0.sh_timeout(
        &format!("locus-sites {} {file}", guest.name),
        Duration::from_secs(600),
    )?;
    ctx.dom0.note(&out.text());
    check_eq!(out.rc, 0, "{}\n{}", out.text(), out.err_text());
    compared(&out.text())
}

/// Tables that each kernel here has, and the fewest of their places that must have been compared. The kernel with the
/// fewest has twice as many.
const FEWEST: [(&str, u64); 4] = [
    (".altinstructions", 1000),
    (".retpoline_sites", 1000),
    (".return_sites", 10_000),
    ("__jump_table", 1000),
];

/// Checks how many places were compared and equal, by what `locus-sites` printed.
fn compared(said: &str) -> Result<(), Verdict> {
    for (table, fewest) in FEWEST {
        let line = said.lines().find_map(|l| {
            // TABLE: EQUAL of ALL places equal, …
            let (equal, _) = l.strip_prefix(table)?.strip_prefix(": ")?.split_once(' ')?;
            equal.parse::<u64>().ok()
        });
        check!(
            line.is_some_and(|equal| equal >= fewest),
            "{table}: {line:?} places, expected {fewest}: {said}"
        );
    }
    Ok(())
}

/// A payload with an alternative in its code is applied and reverted.
pub(super) fn alternative(ctx: &Ctx, guest: &Guest, suite: &Suite) -> Result<(), Verdict> {
    const PATCH: &str = "locus_altinst";
    let name = &guest.name;
    let file = patches::file_for(suite, PATCH);
    ctx.dom0.ok(&format!("xen-locus apply {name} {file}"))?;
    let seen = guest.ok("cat /proc/cmdline")?;
    check!(
        seen.ends_with("locus=altinst"),
        "it is not in force: {seen}"
    );
    tool::revert(ctx, name, PATCH)?;
    cmdline_is_untouched(guest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_few_places_are_noticed() {
        let line = |table: &str, n: u64| format!("{table}: {n} of {n} places equal, 0 calls\n");
        let said = |n: u64| FEWEST.map(|(table, _)| line(table, n)).concat();
        assert_eq!(compared(&said(20_000)), Ok(()));
        assert!(compared(&said(2000)).is_err());
        assert!(compared("changed by us: 0 bytes").is_err());
    }
}
