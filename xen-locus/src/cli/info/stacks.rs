//! `info --stacks`: where every task is in the kernel.

use serde_json::{json, Value};

use crate::cli::args::Output;
use crate::cli::subject::Subject;
use crate::cli::{out, Session};
use crate::error::Result;
use crate::kernel::Kernel;
use crate::quiesce::walk::all::{self, TaskStack};
use crate::quiesce::walk::names::Names;
use crate::quiesce::walk::End;

/// Shows the stacks, each as it was at one moment of the running guest. What a CPU is at is known of
/// a core only.
///
/// # Errors
/// The kernel has no ORC data, or its tasks can't be read.
pub fn show(session: &Session, subject: &Subject, kernel: &Kernel<'_>) -> Result<()> {
    let all = all::walk(kernel, &subject.registers)?;
    let names = Names::read(kernel)?;
    match session.output {
        Output::Json => out::object(subject.object(json!({
            "stack_list": all.iter().map(|one| object(one, &names)).collect::<Vec<_>>(),
        }))),
        Output::Table => {
            for one in &all {
                out::line(&head(one));
                for &frame in &one.walk.frames {
                    out::line(&format!("[<0>] {}", names.of(frame)));
                }
            }
        }
    }
    Ok(())
}

fn object(one: &TaskStack, names: &Names<'_, '_>) -> Value {
    let frames = one.walk.frames.iter().map(|&frame| {
        json!({
            "address": out::address(frame.address.0),
            "interrupted": frame.interrupted,
            "function": names.of(frame),
        })
    });
    json!({
        "pid": one.task.pid,
        "tgid": one.detail.tgid,
        "comm": one.task.comm,
        "state": one.detail.state,
        "on_cpu": one.task.on_cpu,
        "idle": one.task.idle,
        "reliable": one.walk.is_reliable(),
        "ends_in": one.walk.end.ok().map(|end| match end {
            End::User => "user",
            End::Kernel => "kernel",
            End::Gone => "gone",
        }),
        "why": one.walk.end.err().map(|why| why.to_string()),
        "frames": frames.collect::<Vec<_>>(),
    })
}

fn head(one: &TaskStack) -> String {
    let (task, state) = (&one.task, one.detail.state);
    let verdict = match one.walk.end {
        Ok(_) => "reliable".to_owned(),
        Err(why) => format!("unreliable: {why}"),
    };
    // A task chooses its own name: it must not reach the terminal as control characters.
    let comm = task.comm.replace(char::is_control, "?");
    format!("{} {comm} ({state}) {verdict}", task.pid)
}
