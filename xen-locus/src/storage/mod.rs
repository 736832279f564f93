//! What is stored outside of guests: the journal, the audit log, nodes in XenStore, and the cache of guests' kernels.

pub mod audit;
pub mod durable;
pub mod journal;
pub mod kernel_cache;
#[cfg(test)]
pub(crate) mod mock;
pub mod xenstore;
