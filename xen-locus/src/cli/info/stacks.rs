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

/// Units of the guest's budget for one frame that is shown: as text, and as an object, which takes far more memory. A guest
/// chooses how many frames there are, and how long the names in them.
const FRAME_UNITS: [u64; 2] = [4, 24];

/// The stacks of tasks, for people or for programs.
#[derive(Debug)]
pub enum RenderedStacks {
    /// Lines.
    Text(Vec<String>),
    /// Objects.
    Objects(Vec<Value>),
}

/// The stacks of the tasks whose id is `wanted`, each as it was at one moment of the running guest.
/// What a CPU is at is known of a core only.
///
/// # Errors
/// The kernel has no ORC data, or its tasks can't be read. Or there are more frames than the guest's budget pays for.
pub fn of(
    output: Output,
    kernel: &Kernel<'_>,
    registers: &[Vcpu],
    wanted: impl Fn(u32) -> bool,
) -> Result<RenderedStacks> {
    let names = FrameNames::read(kernel)?;
    let all = task_stacks::walk(kernel, registers, wanted)?;
    let pay = |one: &TaskStack, units: u64| {
        let frames = one.walk.frames.len() as u64;
        kernel.space.budget().spend(units * frames)
    };
    let [as_text, as_object] = FRAME_UNITS;
    Ok(match output {
        Output::Table => {
            let shown = all.iter().map(|one| {
                pay(one, as_text)?;
                Ok(text(one, &names))
            });
            RenderedStacks::Text(shown.collect::<Result<_>>()?)
        }
        Output::Json => {
            let shown = all.iter().map(|one| {
                pay(one, as_object)?;
                Ok(object(one, &names))
            });
            RenderedStacks::Objects(shown.collect::<Result<_>>()?)
        }
    })
}

/// Shows all stacks.
///
/// # Errors
/// As [`of`].
pub fn show(session: &Session, guest: &Guest, kernel: &Kernel<'_>) -> Result<()> {
    match of(session.output, kernel, &guest.registers, |_| true)? {
        RenderedStacks::Objects(all) => out::object(guest.object(out::list("stack_list", all))),
        RenderedStacks::Text(all) => all.iter().for_each(|one| out::text(one)),
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
