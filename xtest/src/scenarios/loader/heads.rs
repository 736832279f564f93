//! Functions that begin in other ways than most: with an `endbr64` that the kernel sealed, with a tail call, or with
//! their return.
//!
//! A kernel that is built for IBT (Debian 13 and later) overwrites the `endbr64` of a function whose address nobody
//! takes. On an older kernel these are functions like any other.

use super::behaviour;
use super::subject::Subject;
use crate::guest::Kind;
use crate::payloads::Which;
use crate::scenario::Ctx;
use crate::scenarios::steps::tool;
use crate::suites::TRIXIE;
use crate::verdict::Verdict;
use crate::{check, check_eq};

/// The payload for a sealed function of the kernel, and the function.
const SEALED: (&str, &str) = ("locus_sealed", "arch_report_meminfo");
/// The payload for one of module ext4, and the function.
const MODULE_SEALED: (&str, &str) = ("locus_module_sealed", "__ext4_msg");
/// The payload for a function that is a tail call.
const TAIL_CALL: &str = "locus_tail_call";
/// The payloads of [`short`].
const SHORT: Which = Which::These(&[SEALED.0, MODULE_SEALED.0, TAIL_CALL]);
/// What Debian 13's kernel writes over `endbr64` (arch/x86/include/asm/ibt.h: `gen_endbr_poison`).
const POISON: &str = "660f1f00";

/// A function of the kernel whose address nobody takes.
pub fn sealed(subject: &Subject<'_>) -> Result<(), Verdict> {
    let (name, _) = SEALED;
    let shows = |patched: bool| -> Result<(), Verdict> {
        let text = subject.read("/proc/meminfo")?;
        let found = (text.contains("LocusSealed:"), text.contains("DirectMap4k:"));
        check_eq!(found, (patched, !patched), "/proc/meminfo: {text}");
        Ok(())
    };
    shows(false)?;
    // The second time its code is already in the arena.
    for _ in 0..2 {
        subject.apply(name)?;
        shows(true)?;
        let verified = subject
            .ctx
            .dom0
            .sh(&format!("xen-locus verify {}", subject.guest.name))?;
        check_eq!(verified.rc, 0, "verify: {}", verified.err_text());
        subject.revert(name)?;
        shows(false)?;
    }
    Ok(())
}

/// A function that is nothing but a jump to another one.
pub fn tail_call(subject: &Subject<'_>) -> Result<(), Verdict> {
    const NAME: &str = TAIL_CALL;
    const FOLDER: &str = "/sys/devices/system/cpu/cpu0/topology";
    if let Some(missing) = subject.lacks(NAME)? {
        return subject.refused(&subject.file(NAME), &[&format!("has no symbol {missing}")]);
    }
    let (own, target) = (
        format!("{FOLDER}/core_cpus_list"),
        format!("{FOLDER}/thread_siblings_list"),
    );
    let before = (subject.read(&own)?, subject.read(&target)?);
    subject.apply(NAME)?;
    check_eq!(subject.read(&own)?, "locus", "{own}");
    check_eq!(subject.read(&target)?, before.1, "{target}");
    subject.revert(NAME)?;
    check_eq!(
        (subject.read(&own)?, subject.read(&target)?),
        before,
        "{FOLDER}"
    );
    Ok(())
}

/// A function that only returns.
pub fn only_return(subject: &Subject<'_>) -> Result<(), Verdict> {
    const NAME: &str = "locus_only_return";
    let last = || subject.guest.ok("tail -n 1 /proc/net/softnet_stat");
    check!(last()? != "locus", "/proc/net/softnet_stat says locus");
    subject.apply(NAME)?;
    check_eq!(last()?, "locus", "the last line of /proc/net/softnet_stat");
    subject.revert(NAME)?;
    check!(last()? != "locus", "/proc/net/softnet_stat says locus");
    Ok(())
}

/// A function of a module whose address nobody takes: what ext4 says when it is to mount what is no file system.
pub fn module_sealed(subject: &Subject<'_>) -> Result<(), Verdict> {
    let (name, _) = MODULE_SEALED;
    let (ctx, guest) = (subject.ctx, &subject.guest);
    behaviour::load_modules(guest)?;
    guest.ok(
        "mkdir -p /tmp/ext4 && dd if=/dev/zero of=/tmp/ext4.img bs=1M count=2 && \
         { [ -b /dev/loop0 ] || mknod /dev/loop0 b 7 0; } && losetup /dev/loop0 /tmp/ext4.img",
    )?;
    let says = |words: &str| -> Result<(), Verdict> {
        subject.log.mark(ctx, guest)?;
        guest.ok("! mount -t ext4 -o loud /dev/loop0 /tmp/ext4")?;
        let said = subject.log.since(guest)?;
        let about: Vec<&str> = said
            .lines()
            .filter(|l| l.to_lowercase().contains("ext4"))
            .collect();
        check!(
            !about.is_empty() && about.iter().all(|line| line.contains(words)),
            "ext4 should say {words:?}: {said}"
        );
        Ok(())
    };
    let own = "EXT4-fs (loop0)";
    says(own)?;
    subject.apply(name)?;
    says("locus: ext4")?;
    let verify = format!("xen-locus verify {}", guest.name);
    ctx.dom0.ok(&verify)?;
    subject.revert(name)?;
    says(own)?;
    guest.ok("losetup -d /dev/loop0; rm -r /tmp/ext4 /tmp/ext4.img")?;
    subject.log.mark(ctx, guest)
}

/// Checks that the guest's kernel has sealed a function, given by name or address. If not, the test would show nothing.
fn is_sealed(subject: &Subject<'_>, place: &str) -> Result<(), Verdict> {
    let poke = format!("locus-poke {} {place}", subject.guest.name);
    let head = subject.ctx.dom0.ok(&poke)?;
    check!(head.starts_with(POISON), "{place} begins with {head}");
    Ok(())
}

/// What the guest itself does with the sealed function: a shell command to begin it, words of the refusal, and a shell
/// command to end it.
const HELD: [(&str, &str, &str); 3] = [
    (
        "echo 'p:locus arch_report_meminfo' > kprobe_events",
        "a kprobe of the guest's own stands at",
        "echo > kprobe_events",
    ),
    (
        "echo 'p:locus arch_report_meminfo' > kprobe_events && echo 1 > events/kprobes/enable",
        "a kprobe of the guest's own stands at",
        "echo 0 > events/kprobes/enable && echo > kprobe_events",
    ),
    (
        "echo arch_report_meminfo > set_ftrace_filter && echo function > current_tracer",
        "traced by the guest itself",
        "echo nop > current_tracer && echo > set_ftrace_filter",
    ),
];

/// A sealed function that the guest itself traces, probes or livepatches is refused, and the refusal says why.
fn held(subject: &Subject<'_>) -> Result<(), Verdict> {
    let (name, _) = SEALED;
    let (ctx, guest) = (subject.ctx, &subject.guest);
    let apply = format!("xen-locus apply {} {}", guest.name, subject.file(name));
    for (begin, words, end) in HELD {
        guest.ok(&tool::in_tracing(begin))?;
        tool::refused(ctx, &apply, 2, words)?;
        guest.ok(&tool::in_tracing(end))?;
    }
    let all = ctx.kernels.payloads(subject.suite, Which::All)?;
    let file = all.iter().find(|(found, _)| found == name);
    let (_, file) = file.ok_or_else(|| Verdict::Error(format!("{name} was not built")))?;
    guest.put_module("/tmp/locus_sealed.ko", file)?;
    guest.ok("insmod /tmp/locus_sealed.ko")?;
    tool::refused(ctx, &apply, 2, "livepatched by the guest itself")?;
    let there = format!("/sys/kernel/livepatch/{name}");
    guest.ok(&format!(
        "for i in $(seq 60); do echo 0 > {there}/enabled && break; sleep 1; done; \
         for i in $(seq 60); do [ -e {there} ] || break; sleep 1; done; rmmod {name}"
    ))?;
    let out = ctx.dom0.sh(&format!(
        "xen-locus check {} {}",
        guest.name,
        subject.file(name)
    ))?;
    check_eq!(out.rc, 0, "check: {}", out.err_text());
    subject.log.mark(subject.ctx, guest)
}

/// All of these in a PV guest of Debian 13, whose kernel does seal.
pub fn run(ctx: &mut Ctx) -> Result<(), Verdict> {
    let subject = Subject::with_room(ctx, Kind::Pv, &TRIXIE)?;
    let (_, function) = SEALED;
    is_sealed(&subject, function)?;
    // The guest can't load a livepatch of a name that is parked.
    held(&subject)?;
    sealed(&subject)?;
    tail_call(&subject)?;
    only_return(&subject)?;
    let name = subject.guest.name.clone();
    ctx.destroy_guest(&name)
}

/// What a usual run has of them: a sealed function of the kernel, one of a module, and a tail call.
pub fn short(ctx: &mut Ctx) -> Result<(), Verdict> {
    let subject = Subject::with_payloads(ctx, Kind::Pv, &TRIXIE, SHORT)?;
    is_sealed(&subject, SEALED.1)?;
    sealed(&subject)?;
    tail_call(&subject)?;
    behaviour::load_modules(&subject.guest)?;
    let find = format!(
        "awk '$3 == \"{}\" {{print \"0x\" $1}}' /proc/kallsyms",
        MODULE_SEALED.1
    );
    is_sealed(&subject, &subject.guest.ok(&find)?)?;
    module_sealed(&subject)?;
    let name = subject.guest.name.clone();
    ctx.destroy_guest(&name)
}
