//! A guest's kernel crashes, in the middle of applying, and starts another one by kexec.

use std::time::Duration;

use crate::guest::{Guest, GuestSpec, Kind};
use crate::profile::HVM;
use crate::scenario::{Ctx, Scenario};
use crate::scenarios::steps::patches::{CMDLINE, PAIR};
use crate::scenarios::steps::tool::{self, shows};
use crate::scenarios::steps::{daemon, wait};
use crate::verdict::Verdict;
use crate::{check, check_eq};

/// What takes too long for a usual run. Only HVM: a PV kernel can't be started by another one, and libxl makes no other
/// guest ready for it (`libxl_domain_soft_reset`, tools/libs/light/libxl_create.c), but destroys it.
pub const MATRIX: &[Scenario] = &[Scenario {
    name: "crash-hvm",
    summary: "an HVM guest crashes into another kernel as patches come and go: they went with it, and status says so",
    profile: &HVM,
    run: crash,
}];

/// Tells the kernel that comes after a crash.
const MARK: &str = "locus-after-crash";

/// `crash.sh NAME`: applies a patch and takes it back, again and again, until a step fails. Says how many
/// did not, and how that one did.
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

/// Where the guest has what it is to start when it crashes: the same kernel as its own.
const NEXT: &str = "/next";
/// Its initramfs, with that in it.
const RAMDISK: &str = "/tmp/crash-initrd";

/// Makes [`RAMDISK`] in dom0.
fn make_ramdisk(ctx: &Ctx, dir: &str) -> Result<(), Verdict> {
    // What is not compressed comes first: it is padded.
    ctx.dom0.ok(&format!(
        "set -e; d=/tmp/crash{NEXT}; rm -rf $d; mkdir -p $d; \
         ln -s {dir}/vmlinuz {dir}/initrd.gz $d; cd /tmp/crash; \
         find .{NEXT} | cpio -o -L -H newc >{RAMDISK} 2>/dev/null; \
         cat {dir}/initrd.gz >>{RAMDISK}; rm -r /tmp/crash"
    ))?;
    Ok(())
}

/// Has the guest's kernel start the other one when it crashes.
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
    shows(ctx, &guest, ["live", "", ""], &[CMDLINE])?;

    // The daemon tells of it too.
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
    // On its first vCPU: the other kernel's event channels go there, and on any other it would wait for them forever.
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

    // The toolstack makes the domain ready for the other kernel; it has no name for a moment.
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
    shows(ctx, &guest, ["", "", ""], &[])?;
    until(ctx, &format!("[ \"$({published})\" = gone ]"))?;
    daemon::stop(ctx)?;
    tool::apply(ctx, name, CMDLINE)?;
    shows(ctx, &guest, ["live", "", ""], &[CMDLINE])?;
    // To take back what was lost is to want it no more; else it is missing.
    if lost.iter().any(|p| p["name"] == PAIR) {
        tool::revert(ctx, name, PAIR)?;
    }
    ctx.dom0.ok(&format!("xen-locus verify {name}"))?;
    tool::revert_all(ctx, name)?;
    shows(ctx, &guest, ["", "", ""], &[])?;
    ctx.destroy_guest(name)
}
