//! What a program may store of a kernel, so that its next run does not have to search for the
//! kernel's tables.

use std::io;

use serde::{Deserialize, Serialize};

use crate::kallsyms::Symbols;

/// What was read of one kernel.
///
/// Programs store it by serde. Order and types of the fields are their file format.
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

/// A store of what was read of one guest's kernels.
///
/// [`Kernel::of`](crate::Kernel::of) uses a stored kernel only if it agrees with what the guest
/// shows now. So a store may lose kernels. It must keep those of one guest apart from those of
/// another: a hostile guest can show the build-id of another's kernel, with tables of its own
/// making.
pub trait KernelCache {
    /// All kernels that are stored of this guest, the likeliest first.
    fn load(&self) -> Box<dyn Iterator<Item = CachedKernel> + '_>;
    /// Whether [`KernelCache::store`] would store anything. If not, its argument is not gathered,
    /// which takes time.
    fn is_wanted(&self) -> bool;
    /// Stores `kernel`.
    ///
    /// # Errors
    /// It can't be written. What was stored before is still whole.
    fn store(&self, kernel: &CachedKernel) -> io::Result<()>;
}

/// A cache that is always empty, and stores nothing.
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
