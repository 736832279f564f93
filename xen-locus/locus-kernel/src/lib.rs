//! Knows a Linux kernel from its memory alone: where it is, its symbols, types, tasks and modules,
//! and where each thread stands on its stack.
//!
//! No symbol file, debug package or help from the guest is needed. The memory may be that of a
//! running Xen guest or of a saved core, 64-bit x86 in both cases; [`locus_guest`] has the traits
//! that it is read by.
//!
//! # What it promises
//!
//! - **The guest is hostile.** Every number that comes from its memory is checked. No guest memory
//!   makes this crate panic. Names of tasks, modules and types come without control characters.
//! - **Work is bounded.** Each list, table and walk has a limit, and all reading is paid from one
//!   [`Budget`](locus_guest::budget::Budget). A guest whose lists never end costs less than a
//!   second, and gives an error.
//! - **No version numbers.** What differs between kernels is told by a symbol, a member of a type,
//!   or the structure of a table. So kernels of distributions, with their backports, are read like
//!   any other.
//! - **Found is not believed.** The symbol table must agree with two facts that are known otherwise
//!   ([`kallsyms::Anchors`]), and what a cache holds must agree with the guest as it is now
//!   ([`KernelCache`]).
//!
//! It does not promise that a guest tells the truth: a kernel can lie about itself.
//!
//! # An example
//!
//! The tasks of a saved guest, each with its stack:
//!
//! ```no_run
//! use std::path::Path;
//!
//! use locus_guest::core::Core;
//! use locus_kernel::unwind::{frame_names::FrameNames, task_stacks};
//! use locus_kernel::Kernel;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let core = Core::open(Path::new("guest.core"))?;
//! let kernel = Kernel::of_saved(&core, core.kind(), core.vcpus())?;
//! println!("Linux {} at {}", kernel.release, kernel.text_base);
//!
//! // A symbol, and a member of a type.
//! let init = kernel.symbols.need("init_task")?;
//! let comm = kernel.btf()?.offset_of("task_struct", "comm")?;
//! println!("{}", kernel.space.read_cstr(init.plus(comm as u64), 16)?);
//!
//! // All threads, with the functions that each is in.
//! let names = FrameNames::read(&kernel)?;
//! for one in task_stacks::walk(&kernel, core.vcpus(), |_pid| true)? {
//!     println!("{} {}", one.task.pid, one.task.comm);
//!     for frame in one.walk.frames {
//!         println!("    {}", names.of(frame));
//!     }
//! }
//! # Ok(())
//! # }
//! ```
//!
//! `examples/` has programs that run on a saved core: `symbols`, `types` and `stacks`. A running
//! guest is read by [`Kernel::of`] with the same results.
//!
//! # The files, in the order of reading
//!
//! 1. [`locate`]: where the kernel's image is.
//! 2. [`kallsyms`]: its symbol table, found by its structure.
//! 3. [`Kernel`] (`kernel.rs`): puts both together, with release and build-id; [`KernelCache`]
//!    (`cache.rs`) spares the next run the search.
//! 4. [`btf`]: its types. [`vmcoreinfo`]: what it says of itself, as a cross-check.
//! 5. [`tasks`], [`modules`], [`cpu`], `system_state.rs`: what runs, what is loaded, on what
//!    processor, and whether the kernel has started. [`list()`] walks its lists, and `variable.rs` finds
//!    variables.
//! 6. [`orc`]: how to step from a stack frame to its caller's. [`split_functions`]: parts of
//!    functions elsewhere.
//! 7. [`unwind`]: stack traces that are proven to be complete.
//!
//! With the feature `testing`, `fixture` and `fixture_world` make small kernels for tests of other crates.
#![forbid(unsafe_code)]
#![deny(clippy::print_stderr)]

// The examples name this crate as others do.
#[cfg(test)]
extern crate self as locus_kernel;

pub mod btf;
mod cache;
pub mod cpu;
mod error;
#[cfg(test)]
mod examples_tests;
#[cfg(any(test, feature = "testing"))]
pub mod fixture;
#[cfg(any(test, feature = "testing"))]
pub mod fixture_world;
pub mod kallsyms;
mod kernel;
mod list;
pub mod locate;
pub mod modules;
mod name_index;
mod notes;
pub mod orc;
pub mod split_functions;
mod system_state;
pub mod tasks;
pub mod unwind;
mod variable;
pub mod vmcoreinfo;

pub use self::cache::{CachedKernel, KernelCache, NoCache};
pub use self::error::Error;
pub use self::kernel::Kernel;
pub use self::list::list;

use self::error::to_usize;
