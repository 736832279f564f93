//! What a program may store of a kernel between runs, so that the next one need not read all of its tables.

use std::io;

use serde::{Deserialize, Serialize};

use crate::kallsyms::Symbols;

/// What was read of one kernel.
#[derive(Debug, Serialize, Deserialize)]
pub struct CachedKernel {
    /// Guest virtual address of `_text` when it was read.
    pub text_base: u64,
    /// Release, as `uname -r` prints it.
    pub release: String,
    /// Build-id of the image.
    pub build_id: Vec<u8>,
    /// Symbols, at the addresses of then.
    pub symbols: Symbols,
    /// The kernel's BTF as it lies in memory; empty if the kernel has none.
    #[serde(with = "serde_bytes")]
    pub btf: Vec<u8>,
}

/// A store of what was read of one guest's kernels. A kernel that comes out of it is used only if it agrees with what the
/// guest shows now, so a store may lose or mix up what it likes.
pub trait KernelCache {
    /// All that is stored of this guest, the likeliest first.
    fn load(&self) -> Box<dyn Iterator<Item = CachedKernel> + '_>;
    /// Whether [`KernelCache::store`] would store anything: what is stored takes time to gather.
    fn is_wanted(&self) -> bool;
    /// Stores `kernel`.
    ///
    /// # Errors
    /// It can't be written; what was stored before is still whole.
    fn store(&self, kernel: &CachedKernel) -> io::Result<()>;
}

/// Stores nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoCache;

impl KernelCache for NoCache {
    fn load(&self) -> Box<dyn Iterator<Item = CachedKernel> + '_> {
        Box::new(std::iter::empty())
    }

    fn is_wanted(&self) -> bool {
        false
    }

    fn store(&self, _kernel: &CachedKernel) -> io::Result<()> {
        Ok(())
    }
}
