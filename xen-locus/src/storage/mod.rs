//! What is stored outside of guests: the journal, the audit log, nodes in XenStore, what was read of kernels.

pub mod audit;
pub mod journal;
pub mod kernel_cache;
pub mod xenstore;
