//! BTF: the types of the kernel and of its modules.

use std::rc::Rc;

use locus_guest::budget::Budget;
use locus_kernel::btf::blob::{sample, Blob};
use locus_kernel::btf::{Btf, TypeKind};

use super::guest;

/// Most names looked up for one input.
const NAMES: usize = 24;

/// The types of `data`, read as a kernel's and as a module's on top of a good kernel's.
fn both(data: &[u8]) -> impl Iterator<Item = Btf> {
    let base = Rc::new(Btf::new(sample().bytes()).unwrap());
    let alone = Btf::new(data.to_vec());
    let above = Btf::split(base, data.to_vec());
    [alone, above].into_iter().flatten()
}

/// `data` is a BTF blob.
pub fn run(data: &[u8]) {
    for btf in both(data) {
        for (name, path) in [
            ("task_struct", "comm"),
            ("task_struct", "thread.sp"),
            ("signal_struct", "thread_head"),
            ("outer", "c.x"),
            ("outer", "f"),
            ("outer", "no.such.member"),
        ] {
            let _ = btf.offset_of(name, path);
            let _ = btf.size_of(name);
            let _ = btf.has(name, path);
            let _ = btf.array_len(name, path);
            if let Ok(bits) = btf.bits_of(name, path) {
                let _ = bits.value(data);
            }
        }
        for name in ["state", "wide"] {
            let _ = btf.find(&[TypeKind::Enum, TypeKind::Enum64], name);
            let _ = (btf.enum_name(name, -1), btf.enum_value(name, "HUGE"));
        }
        let _ = btf.len();
    }
}

/// `data` is a BTF blob. The types that its last strings name are printed as C.
pub fn text(data: &[u8]) {
    let names: Vec<&str> = data
        .rsplit(|&b| b == 0)
        .filter_map(|name| std::str::from_utf8(name).ok())
        .take(NAMES)
        .collect();
    for btf in both(data) {
        for name in &names {
            for described in btf.describe(name, &Budget::default()).unwrap_or_default() {
                let odd = |c: char| c.is_control() && c != '\n' && c != '\t';
                assert!(!described.text.contains(odd), "{:?}", described.text);
            }
        }
    }
}

/// The types of the small guest, types of every kind, and those of a module.
pub fn seeds() -> Vec<Vec<u8>> {
    let kernel = sample();
    let mut module = Blob::on(&kernel);
    module.structure("inside", 32, &[("a", 1, 0), ("outer", 9, 8)]);
    vec![guest::types(), kernel.bytes(), module.bytes()]
}
