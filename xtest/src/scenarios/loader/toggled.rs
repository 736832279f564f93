//! The guest changes static keys, tracepoints and static calls while a payload is in force.

use std::time::Duration;

use super::subject::Subject;
use crate::verdict::Verdict;
use crate::{check, check_eq};

/// Keys of the kernel and of the payload are switched while the payload is in force, while it is not, and between
/// two applies.
pub fn static_keys(subject: &Subject<'_>) -> Result<(), Verdict> {
    const NAME: &str = "locus_statickey";
    let guest = &subject.guest;
    let turn = |schedstats: u8, bpf_stats: u8| {
        guest.ok(&format!(
            "cd /proc/sys/kernel && echo {schedstats} > sched_schedstats && \
             echo {bpf_stats} > bpf_stats_enabled"
        ))
    };
    let follows = |schedstats: u8, bpf_stats: u8, on: u8, off: u8| -> Result<(), Verdict> {
        let text = subject.all_ok("/proc/cmdline")?;
        for (key, state) in [
            ("schedstats", schedstats),
            ("bpf_stats", bpf_stats),
            ("on", on),
            ("off", off),
        ] {
            let line = format!("{key}={state}");
            check!(text.lines().any(|l| l == line), "not {line}: {text}");
        }
        Ok(())
    };
    turn(1, 0)?;
    subject.apply(NAME)?;
    follows(1, 0, 1, 0)?;
    turn(0, 1)?;
    follows(0, 1, 1, 0)?;
    turn(1, 1)?;
    follows(1, 1, 1, 0)?;
    check_eq!(subject.read("/proc/version")?, "turned");
    follows(1, 1, 0, 1)?;
    check_eq!(subject.read("/proc/version")?, "turned");
    follows(1, 1, 1, 0)?;
    subject.revert(NAME)?;
    // The kernel must not write to the payload now, and the next apply must use the present state.
    turn(0, 0)?;
    turn(1, 1)?;
    turn(0, 1)?;
    subject.apply(NAME)?;
    follows(0, 1, 1, 0)?;
    turn(1, 0)?;
    follows(1, 0, 1, 0)?;
    subject.revert(NAME)?;
    turn(0, 0)?;
    Ok(())
}

/// A tracepoint in the payload reports to every user: to none, to one (the static call leads to it directly), and to
/// two (the static call leads to a loop over both).
pub fn tracepoints(subject: &Subject<'_>) -> Result<(), Verdict> {
    const NAME: &str = "locus_tracepoint";
    let guest = &subject.guest;
    let enable = |dir: &str, on: u8| {
        guest.ok(&format!(
            "cd {dir} && echo {on} > events/power/cpu_frequency/enable && \
             echo {on} > events/power/suspend_resume/enable"
        ))
    };
    let seen = |dir: &str, times: u64, what: &str| -> Result<(), Verdict> {
        let counts = guest.ok(&format!(
            "grep -c 'cpu_frequency: state=4711 cpu_id=1' {dir}/trace; \
             grep -c 'suspend_resume: .*\\[815\\] begin' {dir}/trace; echo > {dir}/trace"
        ))?;
        check_eq!(
            counts,
            format!("{times}\n{times}"),
            "events in {dir} ({what})"
        );
        Ok(())
    };
    let (one, two) = ("/run/trace", "/run/trace/instances/locus");
    let read = |on: u8| -> Result<(), Verdict> {
        check_eq!(subject.read("/proc/cmdline")?, format!("enabled={on}"));
        Ok(())
    };
    guest.ok(&format!("mkdir -p {two}"))?;
    subject.apply(NAME)?;
    read(0)?;
    seen(one, 0, "off")?;
    enable(one, 1)?;
    read(1)?;
    seen(one, 1, "one user")?;
    enable(two, 1)?;
    read(1)?;
    seen(one, 1, "two users")?;
    seen(two, 1, "two users")?;
    enable(one, 0)?;
    read(1)?;
    seen(one, 0, "the other user")?;
    seen(two, 1, "the other user")?;
    // The tracepoint is on while the payload is reverted and applied.
    subject.revert(NAME)?;
    enable(one, 1)?;
    subject.apply(NAME)?;
    read(1)?;
    seen(one, 1, "on before")?;
    seen(two, 1, "on before")?;
    enable(one, 0)?;
    enable(two, 0)?;
    read(0)?;
    seen(one, 0, "off again")?;
    seen(two, 0, "off again")?;
    subject.revert(NAME)?;
    guest.ok(&format!("rmdir {two}"))?;
    Ok(())
}

/// Static calls that depend on the kernel's model of preemption (kernel/sched/core.c, "SC:"), at the time of apply
/// and later.
pub fn static_calls(subject: &Subject<'_>) -> Result<(), Verdict> {
    const NAME: &str = "locus_staticcall";
    const CALLED: &str = "__cond_resched";
    const NOTHING: &str = "nothing";
    let guest = &subject.guest;
    let control = "/run/debug/sched/preempt";
    let modes = guest.sh(&format!("cat {control}"))?;
    if modes.rc != 0 || !modes.text().contains("voluntary") {
        // A kernel whose preemption can't be changed, or does not change these calls, makes them directly.
        subject.apply(NAME)?;
        subject.read("/proc/cmdline")?;
        return subject.revert(NAME);
    }
    let follows = |mode: &str| -> Result<(), Verdict> {
        let to = if mode == "full" { NOTHING } else { CALLED };
        check_eq!(
            subject.read("/proc/cmdline")?,
            format!("with key: {to}\nwith trampoline: {to}"),
            "preemption {mode}"
        );
        Ok(())
    };
    // The kernel rewrites some thousand places, one after the other. That takes a minute here.
    let set = |mode: &str| -> Result<(), Verdict> {
        let limit = Duration::from_secs(400);
        let out = guest.sh_timeout(&format!("echo {mode} > {control}"), limit)?;
        check_eq!(out.rc, 0, "preemption {mode}: {}", out.err_text());
        Ok(())
    };
    if !modes.text().contains("(voluntary)") {
        set("voluntary")?;
    }
    subject.apply(NAME)?;
    follows("voluntary")?;
    set("full")?;
    follows("full")?;
    subject.revert(NAME)?;
    subject.apply(NAME)?;
    follows("full")?;
    set("voluntary")?;
    follows("voluntary")?;
    subject.revert(NAME)?;
    Ok(())
}
