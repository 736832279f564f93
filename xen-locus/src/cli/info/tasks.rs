//! `info --tasks`: every thread of every process, and the idle task of every CPU.

use locus_kernel::tasks::{snapshot, DetailLayout, Task, TaskDetail};
use locus_kernel::{Error, Kernel};
use serde_json::{json, Value};

use crate::cli::args::Output;
use crate::cli::guest::Guest;
use crate::cli::{out, Session};
use crate::error::Result;

/// Shows the tasks, as they were at about one moment of the running guest.
///
/// # Errors
/// The task list can't be read.
pub fn show(session: &Session, guest: &Guest, kernel: &Kernel<'_>) -> Result<()> {
    let details = DetailLayout::of(kernel)?;
    let tasks = snapshot(kernel, |space, tasks| {
        tasks
            .into_iter()
            .map(|task| Ok((details.read(space, task.addr)?, task)))
            .collect::<std::result::Result<Vec<_>, Error>>()
    })?;
    match session.output {
        Output::Json => out::object(guest.object(json!({
            "task_list": tasks.iter().map(object).collect::<Vec<_>>(),
        }))),
        Output::Table => {
            let rows: Vec<_> = tasks.iter().map(row).collect();
            out::table(
                ["PID", "TGID", "STATE", "CPU", "COMM", "STACK", "SP"],
                &rows,
            );
        }
    }
    Ok(())
}

fn object((detail, task): &(TaskDetail, Task)) -> Value {
    json!({
        "pid": task.pid,
        "tgid": detail.tgid,
        "comm": task.comm,
        "state": detail.state,
        "cpu": detail.cpu,
        "on_cpu": task.on_cpu,
        "stack": out::address(task.stack.start.0),
        "sp": out::address(task.sp.0),
        "idle": task.idle,
    })
}

fn row((detail, task): &(TaskDetail, Task)) -> [String; 7] {
    // A task chooses its own name: it must not reach the terminal as control characters.
    let comm = task.comm.replace(char::is_control, "?");
    let sp = if task.on_cpu {
        "running".into()
    } else {
        task.sp.to_string()
    };
    [
        task.pid.to_string(),
        detail.tgid.to_string(),
        detail.state.to_string(),
        detail.cpu.to_string(),
        comm,
        task.stack.start.to_string(),
        sp,
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use locus_guest::addr::{Gva, Range};

    #[test]
    fn a_name_cannot_control_the_terminal() {
        let detail = TaskDetail {
            tgid: 7,
            state: 'S',
            cpu: 1,
            dead: false,
        };
        let task = Task {
            addr: Gva(0x1000),
            pid: 8,
            comm: "a\u{1b}[2Jb\u{9b}c\n".into(),
            stack: Range::new(Gva(0x4000), 0x4000),
            sp: Gva(0x7f00),
            on_cpu: false,
            start_time: 0,
            idle: false,
        };
        let row = row(&(detail, task.clone()));
        assert_eq!(row[4], "a?[2Jb?c?");
        assert_eq!(row[0..4], ["8", "7", "S", "1"]);
        let json = object(&(detail, task));
        assert_eq!(json["state"], "S");
        assert_eq!(json["stack"], "0x4000");
        assert_eq!(json["idle"], false);
    }
}
