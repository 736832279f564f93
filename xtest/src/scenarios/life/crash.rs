//! A guest's kernel crashes in the middle of an apply, and starts another kernel by kexec.

use std::time::Duration;

use crate::guest::{Guest, GuestSpec, Kind};
use crate::profile::HVM;
use crate::scenario::{Ctx, Scenario};
use crate::scenarios::steps::patches::{CMDLINE, PAIR};
use crate::scenarios::steps::tool::{self, shows_now};
use crate::scenarios::steps::{daemon, wait};
use crate::verdict::Verdict;
use crate::{check, check_eq};

/// Scenarios that take too long for a usual run. Only HVM: another kernel can't start a PV kernel, and libxl
/// destroys a PVH guest instead of preparing it (`libxl_domain_soft_reset`, tools/libs/light/libxl_create.c).
pub const MATRIX: &[Scenario] = &[Scenario {
    name: "crash-hvm",
    summary: "an HVM guest crashes into another kernel as patches are changed: they are gone, and status says so",
    profile: &HVM,
    run: crash,
}];

/// The argument that marks the kernel after the crash.
const MARK: &str = "locus-after-crash";

/// `crash.sh NAME`: applies and reverts a patch until a step fails. Prints the number of steps that succeeded, and
/// exit code and last message of the one that failed.
const SCRIPT: &str = r#"
steps=0
while [ $steps -lt 500 ]; do
	if [ $((steps % 2)) = 0 ]; then
		xen-locus apply "$1" /payloads/locus_proc_pair.ko
	else
		xen-locus revert "$1" locus_proc_pair
	fi >/tmp/step.log 2>&1
	rc=$?
	[ $rc = 0 ] || break
	steps=$((steps + 1))
	echo $steps >/tmp/steps
done
echo "$steps $rc $(tail -n 1 /tmp/step.log)" >/tmp/crash.said
"#;

/// The folder in the guest with what it starts after a crash: its own kernel again.
const NEXT: &str = "/next";
/// The guest's initramfs, with [`NEXT`] in it.
const RAMDISK: &str = "/tmp/crash-initrd";

/// Makes [`RAMDISK`] in dom0.
fn make_ramdisk(ctx: &Ctx, dir: &str) -> Result<(), Verdict> {
    // The uncompressed part comes first, because it is padded.
    ctx.dom0.ok(&format!(
        "set -e; d=/tmp/crash{NEXT}; rm -rf $d; mkdir -p $d; \
         ln -s {dir}/vmlinuz {dir}/initrd.gz $d; cd /tmp/crash; \
         find .{NEXT} | cpio -o -L -H newc >{RAMDISK} 2>/dev/null; \
         cat {dir}/initrd.gz >>{RAMDISK}; rm -r /tmp/crash"
    ))?;
    Ok(())
}

/// Makes the guest's kernel start the other one when it crashes.
fn load(guest: &Guest) -> Result<(), Verdict> {
    guest.ok(&format!(
        "kexec-load {NEXT}/vmlinuz {NEXT}/initrd.gz \
         \"$(sed 's/crashkernel=[^ ]*//' /proc/cmdline) nr_cpus=1 reset_devices {MARK}\""
    ))?;
    check_eq!(guest.ok("cat /sys/kernel/kexec_crash_loaded")?, "1");
    Ok(())
}

/// Waits until `cmd` succeeds in dom0.
fn until(ctx: &Ctx, cmd: &str) -> Result<(), Verdict> {
    wait::until(Duration::from_secs(120), || {
        let done = ctx.dom0.sh(cmd)?.rc == 0;
        Ok(if done {
            Ok(())
        } else {
            Err(format!("`{cmd}` still fails"))
        })
    })
}

fn crash(ctx: &mut Ctx) -> Result<(), Verdict> {
    let name = "crash-hvm";
    let spec = GuestSpec::new(name, Kind::Hvm)
        .memory(512)
        .kernel_args("crashkernel=192M")
        .config(&format!(
            "on_soft_reset=\"soft-reset\"\nramdisk=\"{RAMDISK}\""
        ));
    make_ramdisk(ctx, &spec.boot_dir())?;
    let guest = ctx.ensure_guest(spec.clone())?;
    load(&guest)?;
    tool::apply(ctx, name, CMDLINE)?;
    shows_now(ctx, &guest, ["live", "", ""], &[CMDLINE])?;

    // The daemon publishes the state too.
    let published = format!(
        "xenstore-read /tool/xen-locus/domain/{}/patch/{CMDLINE}/state",
        guest.domid
    );
    daemon::start_as(ctx, "xen-locus -v daemon", "/var/log/xen-locus/daemon.log")?;
    until(ctx, &format!("[ \"$({published})\" = applied ]"))?;

    ctx.dom0.put("/tmp/crash.sh", 0o755, SCRIPT.as_bytes())?;
    ctx.dom0.ok(&format!(
        "rm -f /tmp/steps /tmp/crash.said; sh /tmp/crash.sh {name} </dev/null >/dev/null 2>&1 &"
    ))?;
    until(ctx, "[ \"$(cat /tmp/steps)\" -ge 3 ]")?;
    ctx.expects("Kernel panic - not syncing: sysrq triggered crash");
    // On its first vCPU, where the other kernel's event channels go. On another vCPU it would wait for them forever.
    let limit = Duration::from_secs(60);
    let _ = guest.try_sh(
        "taskset 1 sh -c 'echo c > /proc/sysrq-trigger'",
        limit,
        limit,
    );
    until(ctx, "[ -s /tmp/crash.said ]")?;
    let said = ctx.dom0.ok("cat /tmp/crash.said")?;
    eprintln!("xtest: {name}: steps, exit code and words of the last: {said}");
    let rc = said.split(' ').nth(1).unwrap_or_default();
    check!(["1", "2", "3"].contains(&rc), "a step ended with {said}");

    // The toolstack prepares the domain for the other kernel. Meanwhile it has no name.
    until(
        ctx,
        &format!("xl list {name} | awk 'NR == 2 {{up = $5 !~ /s/}} END {{exit !up}}'"),
    )?;
    let old = guest.domid;
    let guest = ctx.adopt_guest(spec.clone())?;
    guest.try_sh("true", Duration::from_secs(30), Duration::from_secs(240))?;
    let line = guest.ok("cat /proc/cmdline; ls /proc/vmcore")?;
    check!(line.contains(MARK), "it runs the same kernel: {line}");
    check_eq!(guest.domid, old, "domain of the new kernel");
    ctx.dom0.ok(&format!("xen-locus recover {name}"))?;
    let status = tool::status(ctx, name)?;
    let lost = tool::patches_of(&status)?;
    check!(
        (1..=2).contains(&lost.len())
            && lost[0]["name"] == CMDLINE
            && lost
                .iter()
                .all(|p| p["state"] == "gone" && p["reason"] == "guest-rebooted"),
        "{status}"
    );
    shows_now(ctx, &guest, ["", "", ""], &[])?;
    until(ctx, &format!("[ \"$({published})\" = gone ]"))?;
    daemon::stop(ctx)?;
    tool::apply(ctx, name, CMDLINE)?;
    shows_now(ctx, &guest, ["live", "", ""], &[CMDLINE])?;
    // A lost patch is missing until it is reverted, which means that it is no longer wanted.
    if lost.iter().any(|p| p["name"] == PAIR) {
        tool::revert(ctx, name, PAIR)?;
    }
    ctx.dom0.ok(&format!("xen-locus verify {name}"))?;
    tool::revert_all(ctx, name)?;
    shows_now(ctx, &guest, ["", "", ""], &[])?;
    ctx.destroy_guest(name)
}
