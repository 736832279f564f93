//! Why a guest's kernel, or something in it, can't be read.

use locus_guest as guest;

/// Why a guest's kernel, or something in it, can't be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel does not run yet, or not any more. A later try may succeed.
    #[error("{0}")]
    NotReady(String),
    /// The guest's memory has no Linux kernel in a form that this crate knows.
    #[error("{0}")]
    NotLinux(String),
    /// The kernel lacks a symbol, type or member: it was built without the feature, or is of
    /// another age. The text names what is missing.
    #[error("the guest's kernel has no {0}")]
    Missing(String),
    /// Several symbols have this name, and no number says which is meant.
    #[error("{count} symbols of the guest's kernel are called {name}, and it is not said which is meant")]
    Several {
        /// Number of these symbols.
        count: usize,
        /// Their name.
        name: String,
    },
    /// The kernel's data contradicts itself or exceeds a bound. The text says what was expected and
    /// what was found.
    #[error("the guest's kernel data is not as it must be: {0}")]
    Odd(String),
    /// Guest memory can't be read there, or reading it has cost more than any honest guest costs
    /// ([`Exhausted`](guest::Error::Exhausted)).
    #[error(transparent)]
    Memory(#[from] guest::Error),
}

/// `bytes`, a length or count that the guest gave, as a length in this program's memory.
pub(crate) fn to_usize(bytes: u64) -> Result<usize, Error> {
    usize::try_from(bytes).map_err(|_| {
        Error::Odd(format!(
            "{bytes} bytes are more than this program can address"
        ))
    })
}
