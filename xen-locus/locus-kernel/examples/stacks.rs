//! Prints the tasks of a saved guest, each with the functions on its stack:
//!
//! ```text
//! cargo run -p locus-kernel --example stacks CORE
//! ```

use std::error::Error;
use std::fmt::Write as _;
use std::path::Path;

use locus_guest::core::Core;
use locus_kernel::unwind::frame_names::FrameNames;
use locus_kernel::unwind::{task_stacks, WalkEnd};
use locus_kernel::Kernel;

/// The tasks in the core at `path`, each with its stack and whether that is all of it.
pub fn show(path: &Path) -> Result<String, Box<dyn Error>> {
    let core = Core::open(path)?;
    let kernel = Kernel::of_saved(&core, core.kind(), core.vcpus())?;
    let names = FrameNames::read(&kernel)?;
    let mut out = String::new();
    for one in task_stacks::walk(&kernel, core.vcpus(), |_pid| true)? {
        writeln!(
            out,
            "{} {} ({})",
            one.task.pid, one.task.comm, one.detail.state
        )?;
        for frame in one.walk.frames {
            writeln!(out, "    {}", names.of(frame))?;
        }
        match one.walk.end {
            Ok(WalkEnd::User) => writeln!(out, "    to user mode")?,
            Ok(WalkEnd::Kernel) => writeln!(out, "    to the end of the stack")?,
            Ok(WalkEnd::Gone) => writeln!(out, "    no stack: the task is dead")?,
            Err(why) => writeln!(out, "    not reliable: {why}")?,
        }
    }
    Ok(out)
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [core] = arguments.as_slice() else {
        return Err("usage: stacks CORE".into());
    };
    print!("{}", show(Path::new(core))?);
    Ok(())
}
