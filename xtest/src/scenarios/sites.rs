//! Code settled from outside is what the guest's kernel makes of its own code.

use std::time::Duration;

use crate::fetch::{Suite, BOOKWORM, BULLSEYE, TESTING, TRIXIE};
use crate::guest::{Guest, GuestSpec, Kind};
use crate::profile::{HVM, PV1, PVH};
use crate::scenario::{Ctx, Scenario};
use crate::verdict::Verdict;
use crate::{check, check_eq};

/// A scenario for a release's kernel and a guest's type.
macro_rules! sites {
    ($name:literal, $suite:ident, $kind:ident, $profile:ident) => {
        Scenario {
            name: $name,
            summary:
                "alternatives, calls, returns and jump labels are what the kernel made of its own",
            profile: &$profile,
            run: |ctx| sites(ctx, &$suite, Kind::$kind),
        }
    };
}

/// Part of every run.
pub const SCENARIOS: &[Scenario] = &[
    sites!("sites-bookworm-pv", BOOKWORM, Pv, PV1),
    sites!("sites-trixie-pv", TRIXIE, Pv, PV1),
    sites!("sites-bookworm-pvh", BOOKWORM, Pvh, PVH),
];

/// The rest of the matrix of kernels and types.
pub const MATRIX: &[Scenario] = &[
    sites!("sites-bullseye-pv", BULLSEYE, Pv, PV1),
    sites!("sites-testing-pv", TESTING, Pv, PV1),
    sites!("sites-bullseye-pvh", BULLSEYE, Pvh, PVH),
    sites!("sites-trixie-pvh", TRIXIE, Pvh, PVH),
    sites!("sites-testing-pvh", TESTING, Pvh, PVH),
    sites!("sites-bookworm-hvm", BOOKWORM, Hvm, HVM),
];

fn sites(ctx: &mut Ctx, suite: &'static Suite, kind: Kind) -> Result<(), Verdict> {
    let spec = if *suite == BOOKWORM {
        GuestSpec::new(kind.name(), kind)
    } else {
        GuestSpec::new(&format!("{}-{}", suite.name, kind.name()), kind)
            .suite(suite)
            .memory(256)
    };
    let file = format!("{}/vmlinux", spec.boot_dir());
    let guest = ctx.ensure_guest(spec)?;
    if *suite != BOOKWORM {
        // what other kernels boot from does not stay in dom0
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

/// A payload with an alternative in its code comes and goes.
fn alternative(ctx: &Ctx, guest: &Guest) -> Result<(), Verdict> {
    let name = &guest.name;
    ctx.dom0.ok(&format!(
        "xen-locus apply {name} /payloads/locus_altinst.ko"
    ))?;
    let seen = guest.ok("cat /proc/cmdline")?;
    check!(
        seen.ends_with("locus=altinst"),
        "it is not in force: {seen}"
    );
    ctx.dom0
        .ok(&format!("xen-locus revert {name} locus_altinst"))?;
    let seen = guest.ok("cat /proc/cmdline")?;
    check!(!seen.contains("locus="), "it is in force still: {seen}");
    Ok(())
}
