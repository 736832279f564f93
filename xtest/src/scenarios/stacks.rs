//! `info --stacks` shows the stack of every task as the guest itself shows it. Stacks of all tasks that are not on a
//! CPU are reliable: sleeping, stopped, dead and preempted ones (but in a thunk, where ORC has no caller).

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use super::steps::kernels::kernel_scenarios;
use super::steps::tool;
use super::steps::wait::GATHERING;
use crate::guest::{Guest, GuestSpec, Kind};
use crate::scenario::{Ctx, Scenario};
use crate::suites::Suite;
use crate::verdict::Verdict;
use crate::{check, check_eq};

/// Scenarios that take too long for a usual run.
pub const MATRIX: &[Scenario] = kernel_scenarios!(
    stacks,
    "every stack is reliable, and as the guest shows it",
    [
        ("stacks-bookworm-pv", BOOKWORM, Pv, PV1),
        ("stacks-bookworm-pvh", BOOKWORM, Pvh, PVH),
        ("stacks-bullseye-pv", BULLSEYE, Pv, PV1),
        ("stacks-trixie-pv", TRIXIE, Pv, PV1),
        ("stacks-testing-pv", TESTING, Pv, PV1),
        ("stacks-bullseye-pvh", BULLSEYE, Pvh, PVH),
        ("stacks-trixie-pvh", TRIXIE, Pvh, PVH),
        ("stacks-testing-pvh", TESTING, Pvh, PVH),
    ]
);

/// Number of checks while the guest is busy.
const BUSY: usize = 6;
/// Number of cores that are saved of the guest.
const CORES: usize = 2;
/// How often the two sides are compared at most, until each task was seen asleep.
const ROUNDS: usize = 8;
/// The most tasks that may run between all readings, so that they can't be compared.
const NEVER_ASLEEP_MAX: usize = 4;
/// Most frames that `/proc/PID/stack` shows (fs/proc/base.c: `MAX_STACK_TRACE_DEPTH`).
const SHOWN_MAX: usize = 64;

/// Starts a task that sleeps, one that waits for a pipe, one that is stopped, and a zombie.
const SLEEPERS: &str = "mkfifo /tmp/stacks.fifo; sleep 99999 & echo $! > /tmp/stacks.pids; \
    sh -c 'read x < /tmp/stacks.fifo' & echo $! >> /tmp/stacks.pids; \
    sleep 99998 & echo $! >> /tmp/stacks.pids; kill -STOP $!; \
    sh -c 'true & exec sleep 99997' & echo $! >> /tmp/stacks.pids";
/// Starts tasks that are in user mode, in long system calls, in short ones, and in page faults.
const BUSY_ONES: &str = "rm -f /tmp/stacks.busy; for c in 'while :; do :; done' \
    'exec dd if=/dev/zero of=/dev/null bs=1M' 'exec dd if=/dev/zero of=/dev/null bs=64' \
    'while :; do read x < /proc/self/maps; done' 'while :; do true | true; done'; do \
    sh -c \"$c\" >/dev/null 2>&1 & echo $! >> /tmp/stacks.busy; done";

fn stacks(ctx: &mut Ctx, suite: &'static Suite, kind: Kind) -> Result<(), Verdict> {
    // If the kernel has the choice, tasks are preempted in the kernel too.
    let name = format!("stacks-{}-{}", suite.name, kind.name());
    let spec = GuestSpec::new(&name, kind)
        .suite(suite)
        .memory(256)
        .kernel_args("preempt=full");
    let guest = ctx.ensure_guest(spec)?;
    guest.ok(SLEEPERS)?;
    guest.ok(BUSY_ONES)?;
    let mut preempted = 0;
    let mut interrupted = 0;
    for _ in 0..BUSY {
        let tasks = reliable(ctx, &guest)?;
        let zombie = tasks
            .values()
            .any(|t| t.state == 'Z' && t.ends_in == "gone");
        check!(zombie, "no dead task has no stack: {tasks:#?}");
        for task in tasks.values() {
            preempted += usize::from(task.state == 'R');
            interrupted += usize::from(task.interrupted);
        }
    }
    ctx.dom0.note(&format!(
        "{name}: {preempted} tasks were ready and waited for a CPU, {interrupted} of them or others \
         had been interrupted in the kernel"
    ));
    check!(preempted > 0, "no task waited for a CPU");
    if kind == Kind::Pv {
        saved(ctx, &guest)?;
    }
    guest.ok("kill -9 $(cat /tmp/stacks.busy)")?;
    compare(ctx, &guest)?;
    ctx.destroy_guest(&name)
}

/// In a core of the busy guest, stacks of tasks on a CPU are reliable too, unless the CPU was in entry code. Only PV,
/// because `xl dump-core` of other guests takes ten minutes.
fn saved(ctx: &Ctx, guest: &Guest) -> Result<(), Verdict> {
    let entry = ranges(guest, &["entry", "noinstr"])?;
    let mut unreliable = Vec::new();
    let mut on_cpu = 0;
    ctx.expects_long_pauses();
    for _ in 0..CORES {
        ctx.dom0.ok(&format!(
            "xl pause {0}; xl dump-core {0} /tmp/stacks.core >&2; xl unpause {0}",
            guest.name
        ))?;
        let info = ctx.json("xen-locus -o json info --core /tmp/stacks.core --stacks")?;
        ctx.dom0.ok("rm /tmp/stacks.core")?;
        let list = info["stack_list"].as_array();
        let list = list.ok_or_else(|| Verdict::failure(format!("no stack_list: {info}")))?;
        check!(
            list.iter().any(|t| t["on_cpu"] == true),
            "no task is on a CPU: {info}"
        );
        for task in list {
            let frames = task["frames"].as_array().map_or(0, Vec::len);
            if task["on_cpu"] == true {
                on_cpu += 1;
                ctx.dom0
                    .note(&format!("on a CPU: {} with {frames} frames", task["comm"]));
            }
            if task["reliable"] != true {
                unreliable.push(task.clone());
            }
        }
    }
    for task in &unreliable {
        check!(
            task["on_cpu"] == true
                && (ended_in_entry_code(task, &entry)
                    || was_between_tasks(task)
                    || was_just_left(task)),
            "unreliable: {task:#}"
        );
        ctx.dom0.note(&format!("unreliable on a CPU: {task:#}"));
    }
    check!(
        unreliable.len() < on_cpu,
        "each CPU was in entry code, so this shows nothing: {unreliable:#?}"
    );
    Ok(())
}

/// Entry code of a PV kernel that is in no section of its own (arch/x86/xen/xen-asm.S).
const XEN_ENTRIES: [&str; 4] = ["xen_asm_", "xen_entry_", "xen_iret", "xen_sysret"];
/// Thunks of indirect jumps and calls (arch/x86/lib/retpoline.S). ORC has no caller there: a thunk may have been jumped to.
const THUNKS: &str = "__x86_indirect_thunk_";
/// Why a stack can't be followed where ORC has no caller.
const NO_CALLER: [&str; 3] = [
    "no ORC row",
    "ORC has no caller",
    "ends in the middle of the stack",
];

/// Whether a stack could not be followed because a CPU was interrupted in entry code: in these ranges, or in
/// [`XEN_ENTRIES`].
fn ended_in_entry_code(task: &Value, entry: &[(u64, u64)]) -> bool {
    ended_at(task).is_some_and(|(at, name)| {
        let within = |&(start, end): &(u64, u64)| (start..end).contains(&at);
        entry.iter().any(within) || XEN_ENTRIES.iter().any(|begin| name.starts_with(begin))
    })
}

/// Whether a CPU was on the next task's stack while the last one was still its current task. A PV kernel makes hypercalls
/// there (arch/x86/kernel/process_64.c: `__switch_to`).
fn was_between_tasks(task: &Value) -> bool {
    let frames = task["frames"].as_array().map_or(&[][..], Vec::as_slice);
    let is_hypercall = |frame: &Value| text(&frame["function"]).contains("hypercall");
    task["why"] == "off its stacks" && matches!(frames, [only] if is_hypercall(only))
}

/// Whether a CPU had left a task for the next one, and had not yet said so: until `finish_task` (kernel/sched/core.c) the last
/// task counts as one that is on a CPU, and it is no CPU's current one. A PV kernel makes hypercalls there.
fn was_just_left(task: &Value) -> bool {
    let frames = task["frames"].as_array().map_or(&[][..], Vec::as_slice);
    task["why"] == "it runs" && frames.is_empty()
}

/// Whether a stack could not be followed because the task was interrupted in a thunk.
fn ended_in_a_thunk(task: &Value) -> bool {
    // Code that runs at boot, before its addresses are known, has this prefix too (Linux 7.2).
    ended_at(task).is_some_and(|(_, name)| name.trim_start_matches("__pi_").starts_with(THUNKS))
}

/// The instruction at which a task was interrupted, and its function's name, if its stack could not be followed from
/// there because ORC has no caller.
fn ended_at(task: &Value) -> Option<(u64, String)> {
    let why = task["why"].as_str().unwrap_or_default();
    let last = task["frames"].as_array()?.last()?;
    let is_it = NO_CALLER.contains(&why) && last["interrupted"] == true;
    is_it.then(|| (hex(&text(&last["address"])), text(&last["function"])))
}

/// A task as `info --stacks` shows it.
#[derive(Debug)]
struct Seen {
    comm: String,
    state: char,
    /// Where the walk ended.
    ends_in: String,
    /// Whether at least one frame was interrupted in the kernel.
    interrupted: bool,
    /// Addresses and names.
    frames: Vec<(u64, String)>,
}

/// The tasks that were not on a CPU, by id. All of them must be reliable, but for one that was preempted in a thunk.
fn reliable(ctx: &Ctx, guest: &Guest) -> Result<BTreeMap<u64, Seen>, Verdict> {
    let info = tool::info(ctx, &guest.name, "--stacks")?;
    let list = info["stack_list"].as_array();
    let list = list.ok_or_else(|| Verdict::failure(format!("no stack_list: {info}")))?;
    let mut all = BTreeMap::new();
    for task in list {
        let why = task["why"].as_str().unwrap_or_default();
        if ["it runs", "it ran while its stack was read"].contains(&why) {
            continue;
        }
        if ended_in_a_thunk(task) {
            ctx.dom0.note(&format!("preempted in a thunk: {task:#}"));
            continue;
        }
        check!(task["reliable"] == true, "unreliable: {task:#}");
        if task["idle"] == true {
            continue;
        }
        let frames: Vec<&Value> = task["frames"].as_array().into_iter().flatten().collect();
        let seen = Seen {
            comm: text(&task["comm"]),
            ends_in: text(&task["ends_in"]),
            state: text(&task["state"]).chars().next().unwrap_or('?'),
            // The first frame of a task that never ran counts as interrupted.
            interrupted: frames.iter().skip(1).any(|f| f["interrupted"] == true),
            frames: frames
                .iter()
                .map(|f| (hex(&text(&f["address"])), text(&f["function"])))
                .collect(),
        };
        let pid = task["pid"].as_u64().unwrap_or_default();
        check!(all.insert(pid, seen).is_none(), "pid {pid} is listed twice");
    }
    Ok(all)
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

fn hex(text: &str) -> u64 {
    u64::from_str_radix(text.trim_start_matches("0x"), 16).unwrap_or_default()
}

/// A task as `/proc` shows it: its frames, and how often it gave up the CPU or lost it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Shown {
    frames: Vec<String>,
    switches: Vec<String>,
}

fn shown(guest: &Guest) -> Result<BTreeMap<u64, Shown>, Verdict> {
    // If tasks end meanwhile, grep ends with 2. An empty stack has no line.
    let cmd = "cd /proc; grep -H -e ctxt_switches [0-9]*/task/[0-9]*/status 2>/dev/null; \
               grep -H . [0-9]*/task/[0-9]*/stack 2>/dev/null; true";
    let out = guest.sh_timeout(cmd, GATHERING)?.text();
    let mut all = BTreeMap::<u64, Shown>::new();
    for line in out.lines() {
        let Some((pid, file, rest)) = entry(line) else {
            return Err(Verdict::Error(format!("/proc gave {line:?}")));
        };
        let task = all.entry(pid).or_default();
        match file {
            "stack" => task
                .frames
                .push(rest.trim_start_matches("[<0>] ").to_owned()),
            _ => task.switches.push(rest.to_owned()),
        }
    }
    Ok(all)
}

/// Of `TGID/task/PID/FILE:REST`: PID, FILE, REST.
fn entry(line: &str) -> Option<(u64, &str, &str)> {
    let (path, rest) = line.split_once(':')?;
    let mut parts = path.split('/').skip(2);
    Some((parts.next()?.parse().ok()?, parts.next()?, rest))
}

/// Text that `/proc/PID/stack` leaves out: the scheduler and spin locks (kernel/sched/core.c:
/// `in_sched_functions`).
fn hidden(guest: &Guest) -> Result<Vec<(u64, u64)>, Verdict> {
    ranges(guest, &["sched", "lock"])
}

/// Parts of the kernel's text (include/asm-generic/vmlinux.lds.h: `__NAME_text_start`, `__NAME_text_end`). The first one
/// must be there.
fn ranges(guest: &Guest, names: &[&str]) -> Result<Vec<(u64, u64)>, Verdict> {
    let list = guest.ok("grep -E ' __[a-z]+_text_(start|end)$' /proc/kallsyms")?;
    let at = |name: &str| {
        let line = list.lines().find(|l| l.ends_with(name));
        line.and_then(|l| l.split(' ').next()).map_or(0, hex)
    };
    let ranges: Vec<(u64, u64)> = names
        .iter()
        .map(|what| {
            let [start, end] = ["start", "end"].map(|end| at(&format!(" __{what}_text_{end}")));
            (start, end)
        })
        .collect();
    check!(
        ranges.first().is_some_and(|(start, end)| start < end),
        "{names:?}: {list}"
    );
    Ok(ranges)
}

/// The frames of a task that `/proc` shows.
fn visible(seen: &Seen, hidden: &[(u64, u64)]) -> Vec<String> {
    let shown = |at: &u64| !hidden.iter().any(|(start, end)| (start..end).contains(&at));
    let frames = seen.frames.iter().filter(|(at, _)| shown(at));
    frames
        .map(|(_, name)| name.clone())
        .take(SHOWN_MAX)
        .collect()
}

/// Checks that both sides agree on every task.
fn compare(ctx: &Ctx, guest: &Guest) -> Result<(), Verdict> {
    let hidden = hidden(guest)?;
    let mut agreed = BTreeSet::new();
    let mut left = BTreeMap::new();
    for _ in 0..ROUNDS {
        let before = shown(guest)?;
        let ours = reliable(ctx, guest)?;
        let after = shown(guest)?;
        left.clear();
        for (pid, was) in &before {
            let Some(is) = after.get(pid) else { continue };
            let Some(seen) = ours.get(pid) else {
                left.insert(*pid, format!("running; {was:?}"));
                continue;
            };
            let frames = visible(seen, &hidden);
            if frames == was.frames || frames == is.frames {
                agreed.insert(*pid);
                continue;
            }
            // It did not run meanwhile.
            if was.switches == is.switches && was.frames == is.frames {
                check_eq!(frames, was.frames, "{pid} {seen:?}");
            }
            let comm = &seen.comm;
            left.insert(*pid, format!("{comm}: {frames:?}; {was:?}; {is:?}"));
        }
        left.retain(|pid, _| !agreed.contains(pid));
        if left.is_empty() {
            break;
        }
    }
    // Tasks that serve the reading itself are never asleep meanwhile: those of the console and of RCU.
    check!(
        left.len() <= NEVER_ASLEEP_MAX,
        "never seen asleep: {left:#?}"
    );
    for task in left.values() {
        ctx.dom0.note(&format!("never seen asleep: {task}"));
    }
    ctx.dom0
        .note(&format!("{}: {} stacks agree", guest.name, agreed.len()));
    check!(
        agreed.len() > 20,
        "only {} tasks were compared",
        agreed.len()
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{ended_in_a_thunk, ended_in_entry_code, entry, was_between_tasks};

    #[test]
    fn only_a_cpu_that_was_in_entry_code_is_excused() {
        let task = |why: &str, address: &str, function: &str, interrupted: bool| {
            let frame = |address: &str, function: &str| json!({"address": address, "function": function, "interrupted": interrupted});
            let frames = [frame("0x1", "a+0x0/0x1"), frame(address, function)];
            json!({"why": why, "frames": frames})
        };
        let excused = |task| ended_in_entry_code(&task, &[(0x1000, 0x2000), (0, 0)]);
        let why = "no ORC row";
        assert!(excused(task(
            why,
            "0x1004",
            "entry_SYSCALL_64+0x4/0x9",
            true
        )));
        assert!(excused(task(why, "0x9000", "xen_iret+0x0/0x9", true)));
        // Elsewhere, behind a call, for another reason, or nowhere.
        assert!(!excused(task(why, "0x2000", "do_idle+0x0/0x9", true)));
        assert!(!excused(task(
            why,
            "0x1004",
            "entry_SYSCALL_64+0x4/0x9",
            false
        )));
        assert!(!excused(task(
            "off its stacks",
            "0x1004",
            "a+0x0/0x1",
            true
        )));
        assert!(!excused(json!({"why": why, "frames": []})));
        let thunk = "__x86_indirect_thunk_array+0x0/0x20";
        let why = "ends in the middle of the stack";
        assert!(ended_in_a_thunk(&task(why, "0x9000", thunk, true)));
        assert!(!ended_in_a_thunk(&task(why, "0x9000", thunk, false)));
        assert!(!ended_in_a_thunk(&task(
            why,
            "0x9000",
            "do_idle+0x0/0x9",
            true
        )));
        assert!(!excused(task(why, "0x9000", thunk, true)));
    }

    #[test]
    fn a_cpu_between_two_tasks_is_excused_in_its_hypercall_only() {
        let task = |why: &str, functions: &[&str]| {
            let frames: Vec<_> = functions.iter().map(|f| json!({"function": f})).collect();
            was_between_tasks(&json!({"why": why, "frames": frames}))
        };
        let off = "off its stacks";
        assert!(task(off, &["xen_hypercall_pv+0x5/0x10"]));
        assert!(!task("no ORC row", &["xen_hypercall_pv+0x5/0x10"]));
        assert!(!task(off, &["__switch_to+0x5/0x10"]));
        assert!(!task(
            off,
            &["do_idle+0x1/0x9", "xen_hypercall_pv+0x5/0x10"]
        ));
        assert!(!task(off, &[]));
    }

    #[test]
    fn lines_of_proc_are_taken_apart() {
        let line = "7/task/8/stack:[<0>] pipe_read+0x1/0x2 [a:b]";
        let rest = "[<0>] pipe_read+0x1/0x2 [a:b]";
        assert_eq!(entry(line), Some((8, "stack", rest)));
        assert_eq!(entry("7/task/x/stack:y"), None);
    }
}
