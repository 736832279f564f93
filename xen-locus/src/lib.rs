//! xen-locus: changes the kernel of a running Xen guest from dom0.
//!
//! The data flows one way (see ARCHITECTURE.md):
//!
//! ```text
//! guest memory -> locus-kernel    symbols, types, tasks
//! payload file -> locus-payload   functions, sections, relocations
//! both -> target (what the payload refers to) -> link (image for the arena) -> plan (checks and exact writes)
//! plan -> apply                   pause, last look, write, verify, unpause
//! ```
//!
//! The rooms, and which may use which, are in `deploy/rooms`.
#![forbid(unsafe_code)]
#![deny(clippy::print_stderr)]

pub mod apply;
pub mod arena;
pub mod blocker;
pub mod cli;
pub mod daemon;
pub mod domain;
pub mod error;
pub mod guard;
pub mod link;
pub mod machine;
pub mod nudge;
pub mod operation;
pub mod ops;
pub mod paths;
pub mod plan;
pub mod quiesce;
pub mod reclaim;
pub mod recover;
pub mod say;
pub mod storage;
pub mod target;
pub mod verify;
pub mod write;
pub mod x86;
