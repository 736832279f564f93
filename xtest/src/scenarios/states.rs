//! For each state that a thread can be in, one is inside a function that is to be replaced, and apply names it. Threads
//! elsewhere don't block it.

use std::time::{Duration, Instant};

use serde_json::Value;

use super::steps::guest_log::Log;
use super::steps::tool;
use crate::guest::{Guest, GuestSpec, Kind};
use crate::profile::{PV1, PVH};
use crate::scenario::{Ctx, Scenario};
use crate::verdict::Verdict;
use crate::{check, check_eq};

/// Scenarios that are short enough for a usual run.
pub const SCENARIOS: &[Scenario] = &[Scenario {
    name: "states-pv",
    summary: "in a PV guest no thread inside a function is missed, whatever its state",
    profile: &PV1,
    run: |ctx| states(ctx, Kind::Pv),
}];

/// Scenarios that take too long for a usual run.
pub const MATRIX: &[Scenario] = &[Scenario {
    name: "states-pvh",
    summary: "in a PVH guest no thread inside a function is missed, whatever its state",
    profile: &PVH,
    run: |ctx| states(ctx, Kind::Pvh),
}];

const SUBJECT: &str = "locus_states";
const PATCH: &str = "locus_states_patch";
/// The length of a pause on an emulated machine does not matter here.
const PAUSE: &str = "--max-pause 1s";
const TARGET: &str = "locus_states_target";

/// Trampolines behind which a tracer hides return addresses.
const TRAMPOLINES: &[&str] = &[
    "arch_rethook_trampoline",
    "__kretprobe_trampoline",
    "return_to_handler",
];

/// A thread or an interrupt inside the function.
struct Inside {
    /// The module's name of the state.
    state: &'static str,
    /// The thread's name; none if it can be any thread that was interrupted.
    comm: Option<&'static str>,
    /// The report names one of these functions.
    functions: &'static [&'static str],
    /// It is not on a CPU, so only its stack shows that it is inside.
    off_cpu: bool,
    /// It is an interrupt. The guest can't be asked whether it has begun.
    late: bool,
}

const fn inside(state: &'static str, comm: &'static str, off_cpu: bool) -> Inside {
    Inside {
        state,
        comm: Some(comm),
        functions: &[TARGET],
        off_cpu,
        late: false,
    }
}

const INSIDE: &[Inside] = &[
    inside("running", "at-running", false),
    inside("preempted", "at-preempted", true),
    Inside {
        late: true,
        ..inside("interrupted", "at-interrupted", false)
    },
    inside("sleeping", "at-sleeping", true),
    inside("deep", "at-deep", true),
    inside("calling", "at-calling", true),
    inside("process", "sh", true),
    inside("beneath", "at-beneath", true),
    Inside {
        functions: &["locus_states_outer"],
        ..inside("beneath", "at-beneath", true)
    },
    Inside {
        functions: TRAMPOLINES,
        ..inside("probed", "at-probed", true)
    },
    Inside {
        comm: None,
        late: true,
        ..inside("interrupt", "", false)
    },
    Inside {
        comm: None,
        late: true,
        ..inside("softirq", "", false)
    },
];

struct Subject<'c> {
    ctx: &'c Ctx,
    guest: Guest,
}

fn states(ctx: &mut Ctx, kind: Kind) -> Result<(), Verdict> {
    let name = format!("states-{}", kind.name());
    let spec = GuestSpec::new(&name, kind).kernel_args("preempt=full");
    let guest = ctx.ensure_guest(spec)?;
    guest.insmod(&ctx.payloads.join(format!("{SUBJECT}/{SUBJECT}.ko")))?;
    let log = Log::begin(ctx, &guest)?;
    let subject = Subject { ctx, guest };
    // All of them, so that one run reports everything that is missed.
    let mut wrong = Vec::new();
    let mut tell = |what: &str, found: Result<(), Verdict>| match found {
        Ok(()) => Ok(()),
        Err(Verdict::Failure(why)) => {
            eprintln!("states: {what}: {why}");
            wrong.push(format!("{what}: {why}"));
            subject.reset()
        }
        other => other,
    };
    for one in INSIDE {
        tell(one.state, subject.is_seen(one))?;
    }
    tell("restarting", subject.restarting())?;
    tell("traced", subject.traced())?;
    tell("reverting", subject.reverting())?;
    tell("created", subject.created())?;
    tell("elsewhere", subject.elsewhere())?;
    tell("fresh fork", subject.fresh_fork())?;
    tell("the guest's log", log.nothing_new(ctx, &subject.guest))?;
    // The guest logs this, so it comes after the check of the log.
    tell("CPU down", subject.cpu_down())?;
    let guest = subject.guest.name;
    check!(
        wrong.is_empty(),
        "{} went wrong:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
    ctx.destroy_guest(&guest)
}

impl Subject<'_> {
    /// Makes the module begin a state, and waits until `sign` shows that it has.
    fn begin(&self, state: &str, sign: &str) -> Result<(), Verdict> {
        let after = if state == "process" { "&" } else { "" };
        self.guest.ok(&format!(
            "taskset 1 sh -c 'echo {state} > /proc/{SUBJECT}' {after}\n\
             for i in $(seq 100); do grep -q '{sign}' /proc/{SUBJECT} && exit 0; usleep 100000; done; \
             cat /proc/{SUBJECT}; exit 1"
        ))?;
        Ok(())
    }

    /// Asks for an interrupt, which comes after a second and lasts ten.
    fn begin_late(&self, state: &str) -> Result<(), Verdict> {
        self.guest
            .ok(&format!("taskset 1 sh -c 'echo {state} > /proc/{SUBJECT}'"))?;
        self.ctx.dom0.ok("sleep 2")?;
        Ok(())
    }

    fn release(&self) -> Result<(), Verdict> {
        self.guest.ok(&format!("echo release > /proc/{SUBJECT}"))?;
        Ok(())
    }

    /// Releases all threads, and reverts the patch if it is applied.
    fn reset(&self) -> Result<(), Verdict> {
        self.release()?;
        self.ctx.dom0.sh(&format!(
            "xen-locus revert {} {PATCH} --timeout 30s",
            self.guest.name
        ))?;
        Ok(())
    }

    fn applying(&self, timeout: &str) -> String {
        let name = &self.guest.name;
        format!("xen-locus -o json apply {name} /payloads/{PATCH}.ko {PAUSE} --timeout {timeout}")
    }

    fn reverting_within(&self, timeout: &str) -> String {
        let name = &self.guest.name;
        format!("xen-locus -o json revert {name} {PATCH} {PAUSE} --timeout {timeout}")
    }

    /// Runs a command that must be blocked. Returns the blockers.
    fn blocked(&self, cmd: &str) -> Result<Vec<Value>, Verdict> {
        let out = self.ctx.dom0.sh(cmd)?;
        check_eq!(out.rc, 2, "{cmd}: {} {}", out.text(), out.err_text());
        let report = out.json()?;
        check_eq!(report["result"], "blocked", "{report}");
        Ok(report["blockers"].as_array().cloned().unwrap_or_default())
    }

    /// Runs a command that must not be blocked.
    fn free(&self, cmd: &str, result: &str) -> Result<(), Verdict> {
        let out = self.ctx.dom0.sh_timeout(cmd, Duration::from_secs(180))?;
        check_eq!(out.rc, 0, "{cmd}: {} {}", out.text(), out.err_text());
        check_eq!(out.json()?["result"], result, "{}", out.text());
        Ok(())
    }

    fn comes_and_goes(&self) -> Result<(), Verdict> {
        self.free(&self.applying("30s"), "applied")?;
        self.free(&self.reverting_within("30s"), "reverted")
    }

    fn is_seen(&self, one: &Inside) -> Result<(), Verdict> {
        if one.late {
            self.begin_late(one.state)?;
        } else {
            self.begin(one.state, "inside 1 ")?;
        }
        let tried = self.blocked(&self.applying("1s"));
        self.release()?;
        named(&tried?, one)?;
        self.comes_and_goes()
    }

    /// A stopped process whose system call will continue in the function.
    fn restarting(&self) -> Result<(), Verdict> {
        let pid = self.guest.ok(&format!(
            "taskset 1 sh -c 'echo restarting > /proc/{SUBJECT}' >/dev/null 2>&1 & \
             sleep 1; kill -STOP $!; sleep 1; grep -q '^State:.T' /proc/$!/status && echo $!"
        ))?;
        let tried = self.blocked(&self.applying("1s"));
        self.guest.ok(&format!("kill -9 {pid}; sleep 1"))?;
        let blockers = tried?;
        let mut restarting = blockers.iter().filter(|b| b["reason"] == "restart-block");
        let found = restarting.find(|b| b["pid"].as_u64() == pid.parse().ok());
        check!(found.is_some(), "{pid} is not among {blockers:?}");
        self.comes_and_goes()
    }

    /// The function-graph tracer hides the return address of a function that the target has called.
    fn traced(&self) -> Result<(), Verdict> {
        let guest = &self.guest;
        guest.ok(&tool::in_tracing(
            "echo locus_states_callee > set_ftrace_filter && \
             echo function_graph > current_tracer",
        ))?;
        let mut tried = self.begin("calling", "inside 1 ").and_then(|()| {
            let tried = self.blocked(&self.applying("1s"));
            self.release()?;
            tried
        });
        // A thread that began under the tracer may stay below its trampoline long after tracing has ended.
        guest.ok(&tool::in_tracing(
            "echo nop > current_tracer && echo > set_ftrace_filter",
        ))?;
        let blockers = std::mem::replace(&mut tried, Ok(Vec::new()))?;
        let expected = Inside {
            functions: TRAMPOLINES,
            ..inside("traced", "at-calling", true)
        };
        named(&blockers, &expected)?;
        self.comes_and_goes()
    }

    /// A thread in the new function blocks revert.
    fn reverting(&self) -> Result<(), Verdict> {
        for state in ["running", "sleeping", "preempted", "calling"] {
            self.free(&self.applying("30s"), "applied")?;
            self.begin(state, "inside 1 ")?;
            let tried = self.blocked(&self.reverting_within("1s"));
            self.release()?;
            let comm = format!("at-{state}");
            let blockers = tried?;
            check!(
                blockers.iter().any(|b| b["comm"] == *comm),
                "{state}: {comm} is not among {blockers:?}"
            );
            let counted = self.guest.ok(&format!("cat /proc/{SUBJECT}"))?;
            check!(counted.contains("old 0 new 1"), "{state}: {counted}");
            self.free(&self.reverting_within("30s"), "reverted")?;
        }
        Ok(())
    }

    /// A kernel thread that will begin in the function, but has not yet: it will begin in the new version.
    fn created(&self) -> Result<(), Verdict> {
        self.begin("created", "inside 0 ")?;
        self.free(&self.applying("10s"), "applied")?;
        self.release()?;
        self.guest.ok(&format!(
            "for i in $(seq 100); do grep -q 'old 0 new 1' /proc/{SUBJECT} && exit 0; \
             usleep 100000; done; cat /proc/{SUBJECT}; exit 1"
        ))?;
        self.free(&self.reverting_within("30s"), "reverted")
    }

    /// A CPU that is in an interrupt, but not in the function, does not block.
    fn elsewhere(&self) -> Result<(), Verdict> {
        let began = Instant::now();
        self.begin_late("elsewhere")?;
        let tried = self.free(&self.applying("5s"), "applied");
        let took = began.elapsed();
        self.release()?;
        tried?;
        check!(
            took < Duration::from_secs(10),
            "the interrupt may have been over: {took:?}"
        );
        self.free(&self.reverting_within("30s"), "reverted")
    }

    /// A CPU that stays in user mode, and a process that has never run. Neither blocks.
    fn fresh_fork(&self) -> Result<(), Verdict> {
        let begun = self.guest.ok(
            "fresh-fork > /tmp/child & sleep 2; child=$(cat /tmp/child); [ -n \"$child\" ] && \
             cut -d' ' -f3 /proc/$child/schedstat",
        )?;
        check_eq!(begun, "0", "how often the child was given a CPU");
        let tried = self.comes_and_goes();
        let ran = self.guest.ok(
            "cut -d' ' -f3 /proc/$(cat /tmp/child)/schedstat; killall -9 fresh-fork; sleep 1",
        )?;
        tried?;
        check_eq!(ran, "0", "how often the child was given a CPU");
        Ok(())
    }

    /// A CPU is taken offline. Threads inside the function are still found.
    fn cpu_down(&self) -> Result<(), Verdict> {
        const ONLINE: &str = "/sys/devices/system/cpu/cpu1/online";
        self.guest.ok(&format!("echo 0 > {ONLINE}"))?;
        let one = inside("sleeping", "at-sleeping", true);
        let tried = self.comes_and_goes().and_then(|()| self.is_seen(&one));
        self.guest.ok(&format!("echo 1 > {ONLINE}"))?;
        tried?;
        self.is_seen(&inside("running", "at-running", false))
    }
}

/// Checks that the expected thread is among the blockers.
fn named(blockers: &[Value], one: &Inside) -> Result<(), Verdict> {
    let found = blockers.iter().find(|b| {
        let comm = one.comm.is_none_or(|comm| b["comm"] == *comm);
        comm && one.functions.iter().any(|f| b["function"] == **f)
    });
    let Some(found) = found else {
        return Err(Verdict::failure(format!(
            "{:?} in {:?} is not among {blockers:?}",
            one.comm, one.functions
        )));
    };
    let reason = found["reason"].as_str().unwrap_or("?");
    check!(
        !one.off_cpu || reason != "running",
        "{}: off the CPU, but called {reason}",
        one.state
    );
    eprintln!("states: {}: {found}", one.state);
    Ok(())
}
