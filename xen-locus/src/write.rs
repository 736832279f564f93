//! One change of a guest's memory, as a value. `plan` decides on it, `apply` carries it out, `recover` undoes it.

use locus_guest::addr::Gva;
use serde::{Deserialize, Serialize};

/// Longest single write, in bytes.
pub const WRITE_MAX: usize = 64;

/// Bytes to be changed, and what must stand there before.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Write {
    /// Address in the guest's kernel, of text or data.
    pub at: Gva,
    /// Bytes expected there.
    pub expect: Vec<u8>,
    /// Bytes to write, as many; the same ones where nothing may have changed for the plan to hold.
    pub new: Vec<u8>,
}
