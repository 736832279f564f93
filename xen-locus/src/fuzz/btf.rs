//! The kernel's types.

use super::guest;
use crate::kernel::btf::{Btf, Kind};

/// `data` is a BTF blob.
pub fn run(data: &[u8]) {
    let Ok(btf) = Btf::new(data.to_vec()) else {
        return;
    };
    for (name, path) in [
        ("task_struct", "comm"),
        ("task_struct", "thread.sp"),
        ("signal_struct", "thread_head"),
        ("module", "list"),
        ("module", "no.such.member"),
    ] {
        let _ = btf.offset_of(name, path);
        let _ = btf.size_of(name);
    }
    let _ = btf.find(&[Kind::Enum, Kind::Enum64], "module_state");
    let _ = btf.len();
}

/// The types of the small guest.
pub fn seeds() -> Vec<Vec<u8>> {
    vec![guest::types()]
}
