//! Guests on processors with real lists of faults. Elsewhere guests see QEMU's own processor, against which a kernel does
//! little. QEMU emulates none of what microcode brought (IBRS, STIBP, SSBD, `MD_CLEAR`), so kernels take what needs none.

use super::mitigations::read_and_patch;
use super::sites;
use super::steps::guest_log::Log;
use super::steps::patches::{put_check, PAIR};
use super::steps::tool;
use crate::guest::{GuestSpec, Kind, Mitigations};
use crate::profile::{CASCADELAKE, EPYC, HASWELL, MILAN, NEHALEM, PVH};
use crate::scenario::{Ctx, Scenario};
use crate::verdict::Verdict;
use crate::{check, check_eq};

/// Each but the last needs a machine of its own, so none is in a usual run.
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
    Scenario {
        name: "model-skylake-pvh",
        summary: "a PVH guest that isolates page tables by itself, on what it takes for Intel, is read and patched",
        profile: &PVH,
        run: skylake,
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
    sites::alternative(ctx, &guest)
}

/// Xen shows the guest another vendor and model than those of the machine, and lets it read registers that only that vendor
/// has: a kernel reads `MSR_IA32_MISC_ENABLE` before it can catch an exception (arch/x86/kernel/verify_cpu.S).
fn skylake(ctx: &mut Ctx) -> Result<(), Verdict> {
    let name = "skylake-pvh";
    let intel = sees(*b"GenuineIntel", 0x50654) + "msr_relaxed=1\n";
    let spec = GuestSpec::new(name, Kind::Pvh).config(&intel);
    model(ctx, spec, &["cpu_meltdown", "mds", "retbleed"])?;
    let info = tool::info(ctx, name, "")?;
    check_eq!(info["pti"], true, "{info}");
    ctx.destroy_guest(name)
}

/// The line of `xl`'s configuration by which a guest's processor has this vendor, and this signature of family, model and
/// stepping (Intel SDM, volume 2, CPUID).
fn sees(vendor: [u8; 12], signature: u32) -> String {
    let [a, b, c, d, e, f, g, h, i, j, k, l] = vendor;
    let ebx = u32::from_le_bytes([a, b, c, d]);
    let edx = u32::from_le_bytes([e, f, g, h]);
    let ecx = u32::from_le_bytes([i, j, k, l]);
    format!(
        "cpuid=[\"0:ebx={ebx:032b},ecx={ecx:032b},edx={edx:032b}\", \"1:eax={signature:032b}\"]\n"
    )
}

#[cfg(test)]
mod tests {
    use super::sees;

    #[test]
    fn a_vendor_is_three_registers_of_bits() {
        let line = sees(*b"GenuineIntel", 0x50654);
        // "Genu", "ntel", "ineI".
        for (register, value) in [
            ("ebx", 0x756e_6547_u32),
            ("ecx", 0x6c65_746e),
            ("edx", 0x4965_6e69),
            ("eax", 0x0005_0654),
        ] {
            assert!(line.contains(&format!("{register}={value:032b}")), "{line}");
        }
    }
}
