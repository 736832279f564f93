//! Steps that scenarios share, a file for each subject. No scenario imports from another one.

/// The daemon of dom0, and requests to it through XenStore.
pub mod daemon;
/// What a guest's kernel logs during a test.
pub mod guest_log;
/// Kernels of several releases of Debian.
pub mod kernels;
/// Payloads that several scenarios apply.
pub mod patches;
/// Commands of xen-locus in dom0.
pub mod tool;
/// Waiting until something is so.
pub mod wait;
