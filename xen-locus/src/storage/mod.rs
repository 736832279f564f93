//! What is stored outside of guests.
//!
//! - [`journal`]: a change that is about to be made, on disk before it is;
//! - [`audit`]: what was done, a chain of lines;
//! - [`xenstore`]: nodes in XenStore;
//! - [`kernel_cache`]: what was read of guests' kernels;
//! - [`durable`]: a file that is written wholly or not at all.

pub mod audit;
pub mod durable;
#[cfg(test)]
pub(crate) mod fake_xenstored;
pub mod journal;
pub mod kernel_cache;
#[cfg(test)]
pub(crate) mod mock;
pub mod xenstore;
