//! Compares lists: modules, tasks, which change meanwhile, and features of the processor.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use crate::guest::Guest;
use crate::scenario::Ctx;
use crate::scenarios::steps::tool;
use crate::scenarios::steps::wait::GATHERING;
use crate::verdict::Verdict;
use crate::{check, check_eq};

fn list<'a>(info: &'a Value, name: &str) -> Result<&'a Vec<Value>, Verdict> {
    let list = info[name].as_array();
    list.ok_or_else(|| Verdict::failure(format!("no {name}: {info}")))
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

/// Compares every field of `/proc/modules`, in its order, and build-ids.
pub fn modules(ctx: &Ctx, guest: &Guest) -> Result<(), Verdict> {
    let info = tool::info(ctx, &guest.name, "--modules")?;
    let mut ours = Vec::new();
    for m in list(&info, "module_list")? {
        let mut users: Vec<&str> = m["used_by"]
            .as_array()
            .into_iter()
            .flatten()
            .map(text)
            .collect();
        if m["permanent"] == true {
            users.push("[permanent]");
        }
        let taints = text(&m["taints"]);
        let line = format!(
            "{} {} {} {} {} 0x{:0>16}{} {}",
            text(&m["name"]),
            m["size"],
            m["refcount"],
            if users.is_empty() {
                "-".to_owned()
            } else {
                users.join(",") + ","
            },
            text(&m["state"]),
            text(&m["address"]).trim_start_matches("0x"),
            if taints.is_empty() {
                String::new()
            } else {
                format!(" ({taints})")
            },
            text(&m["build_id"]),
        );
        // The guest shows no build-id of a payload.
        ours.push(line.trim_end().to_owned());
    }
    let theirs = guest.ok(
        "while read m rest; do f=/sys/module/$m/notes/.note.gnu.build-id; \
         id=$(tail -c +17 $f | od -An -v -tx1 | tr -d ' \\n'); echo \"$m $rest $id\"; \
         done < /proc/modules",
    )?;
    let theirs: Vec<String> = theirs
        .lines()
        .map(|l| l.replace(" Live ", " live "))
        .map(|l| l.split_whitespace().collect::<Vec<_>>().join(" "))
        .collect();
    check_eq!(ours, theirs, "modules");
    Ok(())
}

/// Most bytes of a task's `comm` (Linux `TASK_COMM_LEN`, less the NUL).
const COMM_LEN: usize = 15;

/// A thread, as `/proc` shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Thread {
    tgid: u64,
    comm: String,
    state: char,
}

fn threads(guest: &Guest) -> Result<BTreeMap<u64, Thread>, Verdict> {
    // If threads end meanwhile, grep ends with 2.
    let cmd = "grep -H . /proc/[0-9]*/task/[0-9]*/stat 2>/dev/null; true";
    let out = guest.sh_timeout(cmd, GATHERING)?.text();
    let all: BTreeMap<u64, Thread> = out.lines().filter_map(thread).collect();
    check!(all.contains_key(&1), "the guest's threads: {out}");
    Ok(all)
}

/// `/proc/TGID/task/PID/stat:PID (COMM) STATE …`
fn thread(line: &str) -> Option<(u64, Thread)> {
    let (path, stat) = line.split_once("/stat:")?;
    let tgid = path
        .strip_prefix("/proc/")?
        .split('/')
        .next()?
        .parse()
        .ok()?;
    let (pid, rest) = stat.split_once(" (")?;
    let (comm, rest) = rest.rsplit_once(") ")?;
    let thread = Thread {
        tgid,
        comm: comm.to_owned(),
        state: rest.chars().next()?,
    };
    Some((pid.parse().ok()?, thread))
}

/// Checks that every thread that exists before and after is listed, with the values that did not change.
pub fn tasks(ctx: &Ctx, guest: &Guest) -> Result<(), Verdict> {
    let before = threads(guest)?;
    let info = tool::info(ctx, &guest.name, "--tasks")?;
    let after = threads(guest)?;
    let mut ours = BTreeMap::new();
    let mut idle = 0;
    for task in list(&info, "task_list")? {
        if task["idle"] == true {
            idle += 1;
            continue;
        }
        let pid = task["pid"].as_u64().unwrap_or_default();
        let thread = Thread {
            tgid: task["tgid"].as_u64().unwrap_or_default(),
            comm: text(&task["comm"]).to_owned(),
            state: text(&task["state"]).chars().next().unwrap_or('?'),
        };
        check!(
            ours.insert(pid, thread).is_none(),
            "pid {pid} is listed twice"
        );
    }
    let vcpus: u64 = guest.ok("nproc")?.parse().unwrap_or_default();
    // CPUs that are offline have an idle task too.
    check!(idle >= vcpus, "{idle} idle tasks of {vcpus} vCPUs");
    for (pid, was) in &before {
        let Some(is) = after.get(pid).filter(|is| is.tgid == was.tgid) else {
            continue;
        };
        let Some(seen) = ours.get(pid) else {
            return Err(Verdict::failure(format!("pid {pid} is missing: {was:?}")));
        };
        check_eq!(seen.tgid, was.tgid, "tgid of {pid} {was:?}");
        // /proc adds what a worker does, and shows names of kernel threads that are too long for comm.
        let begins = was.comm.starts_with(&seen.comm);
        let worker = begins && was.comm.starts_with("kworker/");
        let cut = begins && seen.comm.len() == COMM_LEN;
        if was.comm == is.comm {
            check!(
                seen.comm == was.comm || worker || cut,
                "comm of {pid}: {seen:?}, {was:?}"
            );
        }
        // A thread may have run in between.
        let unchanged = was.state == is.state && !worker && was.state != 'R';
        check!(
            !unchanged || seen.state == was.state || seen.state == 'R',
            "state of {pid}: {seen:?}, {was:?}"
        );
    }
    let strangers: Vec<_> = ours
        .iter()
        .filter(|(pid, t)| {
            !before.contains_key(pid) && !after.contains_key(pid) && t.comm != "grep"
        })
        .collect();
    check!(
        strangers
            .iter()
            // The workload starts itself from /proc/self/exe many times.
            .all(|(_, t)| t.comm.starts_with("kworker/") || ["sh", "exe"].contains(&&*t.comm)),
        "threads that /proc did not have: {strangers:?}"
    );
    Ok(())
}

/// Compares all flags of `/proc/cpuinfo`.
pub fn cpu(ctx: &Ctx, guest: &Guest) -> Result<(), Verdict> {
    let info = tool::info(ctx, &guest.name, "")?;
    let ours: BTreeSet<&str> = list(&info["cpu"], "features")?.iter().map(text).collect();
    let line = guest.ok("grep -m1 ^flags /proc/cpuinfo | cut -d: -f2")?;
    let theirs: BTreeSet<&str> = line.split_whitespace().collect();
    let only = |a: &BTreeSet<&str>, b: &BTreeSet<&str>| -> String {
        a.difference(b).copied().collect::<Vec<_>>().join(" ")
    };
    check!(
        ours == theirs,
        "features that the guest does not show: {:?}; that only the guest shows: {:?}",
        only(&ours, &theirs),
        only(&theirs, &ours)
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_may_have_brackets_in_its_name() {
        let (pid, thread) = thread("/proc/7/task/8/stat:8 (a) b (c)) S 1 7").unwrap();
        assert_eq!(pid, 8);
        assert_eq!(
            (thread.tgid, thread.comm.as_str(), thread.state),
            (7, "a) b (c)", 'S')
        );
    }
}
