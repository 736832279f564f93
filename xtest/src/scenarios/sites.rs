//! What xen-locus makes of alternatives, calls, returns and jump labels is what the guest's kernel made of them.

use std::time::Duration;

use super::steps::kernels::{self, kernel_scenarios};
use super::steps::patches::cmdline_is_untouched;
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
    let out = ctx.dom0.sh_timeout(
        &format!("locus-sites {} {file}", guest.name),
        Duration::from_secs(600),
    )?;
    ctx.dom0.note(&out.text());
    check_eq!(out.rc, 0, "{}\n{}", out.text(), out.err_text());
    if *suite == BOOKWORM {
        return alternative(ctx, &guest);
    }
    ctx.dom0.ok(&format!("rm -f {file}"))?;
    ctx.destroy_guest(&guest.name)
}

/// A payload with an alternative in its code is applied and reverted.
fn alternative(ctx: &Ctx, guest: &Guest) -> Result<(), Verdict> {
    const PATCH: &str = "locus_altinst";
    let name = &guest.name;
    tool::apply(ctx, name, PATCH)?;
    let seen = guest.ok("cat /proc/cmdline")?;
    check!(
        seen.ends_with("locus=altinst"),
        "it is not in force: {seen}"
    );
    tool::revert(ctx, name, PATCH)?;
    cmdline_is_untouched(guest)
}
