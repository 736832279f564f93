//! Steps that scenarios share, a file for each subject. No scenario imports from another one.
//!
//! `tool` runs commands of xen-locus; `patches` names the payloads and says what a guest shows when they are
//! in force; `daemon` makes requests through XenStore; `guest_log` watches what a guest's kernel logs;
//! `kernels` lists scenarios for several kernels; `sleepers` are threads inside a kernel function; `wait` looks again
//! until something is so; `beside` runs other tools at the same time.

pub mod beside;
pub mod daemon;
pub mod guest_log;
pub mod kernels;
pub mod patches;
pub mod sleepers;
pub mod tool;
pub mod wait;
