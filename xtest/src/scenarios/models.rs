//! Guests on processors with real lists of faults. Elsewhere guests see QEMU's own processor, against which a kernel does
//! little. QEMU emulates none of what microcode brought (IBRS, STIBP, SSBD, `MD_CLEAR`), so kernels take what needs none.

use super::mitigations::read_and_patch;
use super::sites;
use super::steps::guest_log::Log;
use super::steps::patches::{put_check, PAIR};
use super::steps::tool;
use crate::check;
use crate::guest::{GuestSpec, Kind, Mitigations};
use crate::profile::{CASCADELAKE, EPYC, HASWELL, MILAN, NEHALEM};
use crate::scenario::{Ctx, Scenario};
use crate::suites::BOOKWORM;
use crate::verdict::Verdict;

/// Each needs a machine of its own, so none is in a usual run. None is a PVH guest that isolates page tables by itself: that takes
/// a processor that is not AMD's, and QEMU runs PVH guests on AMD's alone. If Xen shows a guest another vendor (`cpuid=`), it
/// halts before its first message. `pti-pvh` has the isolation switched on.
pub const MATRIX: &[Scenario] = &[
    Scenario {
        name: "model-nehalem-pv",
        summary: "a PV guest on an Intel processor of 2008 is read and patched",
        profile: &NEHALEM,
        run: |ctx| model(ctx, GuestSpec::new("pv", Kind::Pv), &["cpu_meltdown", "mds", "l1tf", "its"]),
    },
    Scenario {
        name: "model-haswell-pv",
        summary: "a PV guest on an Intel processor of 2013, whose page tables Xen isolates, is read and patched",
        profile: &HASWELL,
        run: |ctx| model(ctx, GuestSpec::new("pv", Kind::Pv), &["cpu_meltdown", "mds", "l1tf"]),
    },
    Scenario {
        name: "model-cascadelake-pv",
        summary: "a PV guest on an Intel processor of 2019, whose indirect branches can be misled, is read and patched",
        profile: &CASCADELAKE,
        run: |ctx| model(ctx, GuestSpec::new("pv", Kind::Pv), &["cpu_meltdown", "mds", "retbleed", "its"]),
    },
    Scenario {
        name: "model-epyc-pvh",
        summary: "a PVH guest on an AMD processor of 2017, whose returns can be misled, is read and patched",
        profile: &EPYC,
        run: |ctx| model(ctx, GuestSpec::new("pvh", Kind::Pvh), &["retbleed", "srso"]),
    },
    Scenario {
        name: "model-milan-pvh",
        summary: "a PVH guest on an AMD processor of 2021, whose returns can be misled, is read and patched",
        profile: &MILAN,
        run: |ctx| model(ctx, GuestSpec::new("pvh", Kind::Pvh), &["srso"]),
    },
];

/// Kernels, dom0's as well, warn that they can't do enough without microcode.
const NO_MICROCODE: [&str; 2] = [
    "leaves CPU vulnerable to RETBleed attacks",
    "admin-guide/hw-vuln/",
];

fn model(ctx: &mut Ctx, spec: GuestSpec, bugs: &[&str]) -> Result<(), Verdict> {
    for words in NO_MICROCODE {
        ctx.expects(words);
    }
    let spec = spec.mitigations(Mitigations::Default);
    let kernel = format!("{}/vmlinux", spec.boot_dir());
    let guest = ctx.ensure_guest(spec)?;
    let name = &guest.name;
    let info = tool::info(ctx, name, "")?;
    let cpu = &info["cpu"];
    let said = guest.ok(
        "grep -m 3 -E 'model name|vendor|^bugs' /proc/cpuinfo; cd /sys/devices/system/cpu/vulnerabilities && grep . *",
    )?;
    let told = format!("{name}: {said}\n{} {}", cpu["bugs"], cpu["mitigations"]);
    eprintln!("{told}");
    ctx.dom0.note(&told);
    for bug in bugs {
        check!(
            cpu["bugs"]
                .as_array()
                .is_some_and(|all| all.iter().any(|b| b == bug)),
            "{bug}: {cpu}"
        );
    }
    put_check(&guest, PAIR)?;
    let log = Log::begin(ctx, &guest)?;
    read_and_patch(ctx, &guest, 1, 1)?;
    log.nothing_new(ctx, &guest)?;
    sites::compare(ctx, &guest, &kernel)?;
    sites::alternative(ctx, &guest, &BOOKWORM)
}
