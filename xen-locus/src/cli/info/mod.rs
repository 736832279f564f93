#![doc = include_str!("../manual/info.md")]

mod modules;
pub mod raw;
pub(super) mod stacks;
mod summary;
mod symbols;
mod tasks;
mod types;

use locus_kernel::Kernel;

use super::args;
use super::guest;
use super::Session;
use crate::error::ExitCode;

/// Runs the command.
///
/// # Errors
/// No such guest, or its kernel can't be read.
pub fn run(session: &Session, args: &args::Info) -> anyhow::Result<ExitCode> {
    guest::with_kernel(session, &args.guest, |guest, kernel| {
        if let Some(pattern) = &args.view.symbols {
            symbols::show(session, guest, kernel, pattern)?;
        } else if args.view.tasks {
            tasks::show(session, guest, kernel)?;
        } else if args.view.stacks {
            stacks::show(session, guest, kernel)?;
        } else if args.view.modules {
            modules::show(session, guest, kernel)?;
        } else if let Some(name) = &args.view.type_name {
            types::show(session, guest, kernel, name)?;
        } else if let Some(what) = &args.view.raw {
            raw::show(kernel, what)?;
        } else {
            summary::show(session, guest, kernel)?;
        }
        session.say(1, cost(session, kernel));
        Ok(ExitCode::Done)
    })
    .map_err(Into::into)
}

/// What reading the guest has cost so far.
fn cost(session: &Session, kernel: &Kernel<'_>) -> String {
    let budget = kernel.space.budget();
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let peak = status.lines().find_map(|l| l.strip_prefix("VmHWM:"));
    format!(
        "read {} KiB of guest memory in {} us, {}% of what reading a guest may cost; peak memory {}",
        budget.copied() / 1024,
        session.began.elapsed().as_micros(),
        budget.spent() * 100 / budget.limit().max(1),
        peak.map_or("not known", str::trim),
    )
}
