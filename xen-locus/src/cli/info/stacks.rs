//! `info --stacks`: where every task is in the kernel.

use locus_guest::Vcpu;
use locus_kernel::unwind::frame_names::FrameNames;
use locus_kernel::unwind::task_stacks::{self, TaskStack};
use locus_kernel::unwind::WalkEnd;
use locus_kernel::Kernel;
use serde_json::{json, Value};

use crate::cli::args::Output;
use crate::cli::guest::Guest;
use crate::cli::{out, Session};
use crate::error::Result;

/// A task's stack, for people and for programs.
#[derive(Debug)]
pub struct RenderedStack {
    /// Lines.
    pub text: String,
    /// An object.
    pub value: Value,
}

/// The stacks of the tasks whose id is `wanted`, each as it was at one moment of the running guest.
/// What a CPU is at is known of a core only.
///
/// # Errors
/// The kernel has no ORC data, or its tasks can't be read.
pub fn of(
    kernel: &Kernel<'_>,
    registers: &[Vcpu],
    wanted: impl Fn(u32) -> bool,
) -> Result<Vec<RenderedStack>> {
    let names = FrameNames::read(kernel)?;
    let all = task_stacks::walk(kernel, registers, wanted)?;
    let shown = |one: &TaskStack| RenderedStack {
        text: text(one, &names),
        value: object(one, &names),
    };
    Ok(all.iter().map(shown).collect())
}

/// Shows all stacks.
///
/// # Errors
/// As [`of`].
pub fn show(session: &Session, guest: &Guest, kernel: &Kernel<'_>) -> Result<()> {
    let all = of(kernel, &guest.registers, |_| true)?;
    match session.output {
        Output::Json => {
            let all: Vec<Value> = all.into_iter().map(|one| one.value).collect();
            out::object(guest.object(json!({ "stack_list": all })));
        }
        Output::Table => all.iter().for_each(|one| out::text(&one.text)),
    }
    Ok(())
}

fn text(one: &TaskStack, names: &FrameNames<'_, '_>) -> String {
    let mut text = head(one) + "\n";
    for &frame in &one.walk.frames {
        text.push_str(&format!("[<0>] {}\n", names.of(frame)));
    }
    text
}

fn object(one: &TaskStack, names: &FrameNames<'_, '_>) -> Value {
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
            WalkEnd::User => "user",
            WalkEnd::Kernel => "kernel",
            WalkEnd::Gone => "gone",
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
    format!("{} {} ({state}) {verdict}", task.pid, task.comm)
}
