//! What is stored outside of guests: nodes in XenStore, what was read of kernels.

pub mod kernel_cache;
pub mod store;
