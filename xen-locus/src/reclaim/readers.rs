//! Waits until no CPU and no task of the guest uses what it found in the guest's lists before they changed.
//!
//! The kernel reads these lists in sections of RCU. Where a section can't be preempted, a CPU that is in user mode or idle
//! is in none. Where it can (`CONFIG_PREEMPT_RCU`), a task counts the sections that it is in. `rcu_state.gp_seq` would
//! tell too, but an idle guest never advances it.

use std::collections::{HashMap, HashSet};
use std::thread;
use std::time::{Duration, Instant};

use locus_guest::addr::{Gva, Range};
use locus_guest::space::if_mapped;
use locus_guest::Vcpu;
use locus_kernel::tasks::{self, Task};
use locus_kernel::Kernel;

use super::check_interrupted;
use crate::apply::Options;
use crate::error::{Error, Result};
use crate::machine::Machine;

/// Time between two looks.
const BETWEEN: Duration = Duration::from_millis(2);
/// Section of the code in which a CPU idles (include/linux/cpu.h: `__cpuidle`).
const IDLE: [&str; 2] = ["__cpuidle_text_start", "__cpuidle_text_end"];
/// Other code in which it idles: its `hlt`, or the hypercall by which a PV guest blocks. A kernel has some of them. Other
/// hypercalls share the code with that one, but the idle task makes none of them in a section of RCU.
const IDLE_CODE: [&str; 7] = [
    "pv_native_safe_halt",
    "native_safe_halt",
    "default_idle",
    "acpi_safe_halt",
    "xen_safe_halt",
    "xen_hypercall_sched_op",
    "xen_hypercall_pv",
];
/// Enters a section of RCU that can be preempted.
const ENTERS: &str = "__rcu_read_lock";
/// Longest believed of these, in bytes.
const IDLE_CODE_MAX: u64 = 512;

/// Waits until each CPU was seen in user mode or idle, and each task outside of a section of RCU.
///
/// # Errors
/// [`Class::TryAgain`](crate::error::Class::TryAgain): not until `limit`. Or the guest can't be read.
pub(super) fn wait(
    machine: &dyn Machine,
    kernel: &Kernel<'_>,
    limit: Instant,
    options: &Options,
) -> Result<()> {
    let mut readers = Readers::new(machine, kernel)?;
    loop {
        readers.look(machine, kernel)?;
        if readers.cpus.is_empty() && readers.tasks.is_empty() {
            return Ok(());
        }
        check_interrupted(options)?;
        if Instant::now() > limit {
            return Err(readers.give_up());
        }
        thread::sleep(BETWEEN);
    }
}

/// CPUs and tasks that are not yet known to have left.
struct Readers {
    /// Numbers of vCPUs.
    cpus: Vec<u32>,
    /// Tasks by address: when they began, and their names.
    tasks: HashMap<Gva, (u64, String)>,
    /// Code in which a CPU idles, and the stacks of the idle tasks.
    idle_code: Vec<Range>,
    idle_stacks: Vec<Range>,
}

impl Readers {
    fn new(machine: &dyn Machine, kernel: &Kernel<'_>) -> Result<Readers> {
        let tasks = all_tasks(kernel)?;
        let idle = tasks.iter().filter(|t| t.idle);
        let idle_stacks = idle.map(|t| t.stack).collect();
        let counts = nesting(kernel)?.is_some();
        let tasks = tasks.into_iter().filter(|_| counts);
        let symbol = |name| kernel.symbols.addr(name);
        let section = IDLE.map(&symbol);
        let mut idle_code = Vec::new();
        if let [Some(start), Some(end)] = section {
            idle_code.push(Range { start, end });
        }
        idle_code.extend(IDLE_CODE.iter().filter_map(|name| {
            let at = symbol(name)?;
            let len = kernel.symbols.room(at)?;
            Some(Range::new(at, len.min(IDLE_CODE_MAX)))
        }));
        Ok(Readers {
            cpus: machine.vcpus()?.iter().map(|v| v.id).collect(),
            tasks: tasks.map(|t| (t.addr, (t.start_time, t.comm))).collect(),
            idle_code,
            idle_stacks,
        })
    }

    fn look(&mut self, machine: &dyn Machine, kernel: &Kernel<'_>) -> Result<()> {
        let vcpus = machine.vcpus()?;
        let is_out = |vcpu: &Vcpu| !vcpu.online || vcpu.user || self.is_idle(vcpu);
        let out: Vec<u32> = vcpus.iter().filter(|v| is_out(v)).map(|v| v.id).collect();
        self.cpus.retain(|id| !out.contains(id));
        let Some(offset) = nesting(kernel)? else {
            return Ok(());
        };
        if self.tasks.is_empty() {
            return Ok(());
        }
        let space = kernel.space.fresh();
        let alive = all_tasks(kernel)?;
        let alive: HashMap<Gva, u64> = alive.iter().map(|t| (t.addr, t.start_time)).collect();
        let mut out = HashSet::new();
        for (task, (began, _)) in &self.tasks {
            // It may have ended meanwhile.
            let nested = if_mapped(space.read_u32(task.plus(offset)))?;
            if alive.get(task) != Some(began) || nested.unwrap_or(0) == 0 {
                out.insert(*task);
            }
        }
        self.tasks.retain(|task, _| !out.contains(task));
        Ok(())
    }

    /// Whether it idles, and is in no interrupt: it is on the stack of an idle task, and waits.
    fn is_idle(&self, vcpu: &Vcpu) -> bool {
        let within = |ranges: &[Range], at| ranges.iter().any(|r| r.contains(at));
        within(&self.idle_stacks, vcpu.rsp) && within(&self.idle_code, vcpu.rip)
    }

    fn give_up(&self) -> Error {
        let who = match (self.cpus.first(), self.tasks.values().next()) {
            (Some(cpu), _) => format!("vCPU {cpu} was not seen in user mode or idle"),
            (None, Some((_, name))) => format!("the task {name} was always in a section of RCU"),
            (None, None) => "nobody".to_owned(),
        };
        Error::try_again(format!(
            "someone may still look at it through the guest's lists: {who}; try again, or wait longer with --timeout"
        ))
    }
}

/// All tasks at about one moment.
///
/// # Errors
/// [`Class::TryAgain`](crate::error::Class::TryAgain): the lists changed at each try.
pub(super) fn all_tasks(kernel: &Kernel<'_>) -> Result<Vec<Task>> {
    kernel.space.budget().refill()?;
    tasks::snapshot(kernel, |_, tasks| Ok(tasks)).map_err(|error| {
        Error::try_again(format!(
            "the guest's tasks could not be listed, probably because it starts and ends some all the time: {error}"
        ))
    })
}

/// Offset of the count of sections of RCU that a task is in; `None` if the kernel's sections can't be preempted.
///
/// # Errors
/// [`Class::NotApplicable`](crate::error::Class::NotApplicable): they can be preempted, and no such count is known.
fn nesting(kernel: &Kernel<'_>) -> Result<Option<u64>> {
    const MEMBER: &str = "rcu_read_lock_nesting";
    let btf = kernel.btf()?;
    if btf.has("task_struct", MEMBER) {
        return Ok(Some(btf.offset_of_sized("task_struct", MEMBER, 4)? as u64));
    }
    // A function of its own only where it counts (kernel/rcu/tree_plugin.h); else at most a local copy of an inline one.
    match kernel.symbols.all(ENTERS).any(|s| s.kind == 'T') {
        true => Err(Error::not_applicable(format!(
            "the guest's sections of RCU can be preempted (it has {ENTERS}), and its task_struct has no {MEMBER}: who is in such \
             a section can't be known"
        ))),
        false => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Class;
    use locus_kernel::btf::blob::Blob;
    use locus_kernel::fixture::{vcpus, Fixture, KIND, TEXT};

    fn nesting_with(member: &str, kind: char) -> Result<Option<u64>> {
        let mut types = Blob::with_integers();
        types.structure("task_struct", 64, &[(member, 3, 32)]);
        let mut fixture = Fixture::new();
        let enters = (TEXT.0 + 0x1000, kind, ENTERS.to_owned());
        fixture.symbols.push(enters);
        fixture.constants.push(("__start_BTF", types.bytes()));
        fixture.constants.push(("__stop_BTF", Vec::new()));
        let memory = fixture.build();
        nesting(&Kernel::read(&memory, KIND, &vcpus()).unwrap())
    }

    #[test]
    fn a_kernel_that_counts_sections_where_it_is_not_known_is_refused() {
        assert_eq!(
            nesting_with("rcu_read_lock_nesting", 'T').unwrap(),
            Some(32)
        );
        let error = nesting_with("rcu_nesting", 'T').unwrap_err();
        assert_eq!(error.class(), Class::NotApplicable);
        assert!(error.to_string().contains(ENTERS), "{error}");
        // A copy of the inline function of a kernel whose sections can't be preempted.
        assert_eq!(nesting_with("rcu_nesting", 't').unwrap(), None);
    }
}
