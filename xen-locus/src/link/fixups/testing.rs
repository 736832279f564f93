//! A guest and code to fix up, for tests of this folder.

use locus_guest::addr::{Gva, Range};
use locus_guest::budget::Budget;
use locus_kernel::fixture::{renewed, vcpus, Fixture, KIND, TEXT};
use locus_kernel::Kernel;

use super::code::{LinkedCode, Runs};
use crate::error::Result;

/// Where the code will stand.
pub const BASE: Gva = Gva(0xffff_ffff_c000_0000);
/// Where the guest's functions begin.
pub const FUNCTIONS: Gva = Gva(TEXT.0 + 0x2000);
/// The function that the first pointer of `pv_ops` holds.
pub const HELD: Gva = Gva(FUNCTIONS.0 + 0x20);
/// The function that does nothing, which the second holds; the third is zero.
pub const NOP: Gva = Gva(FUNCTIONS.0 + 0x40);
/// Where `pv_ops` stands.
pub const POINTERS: Gva = Gva(TEXT.0 + (8 << 20));
/// Where static keys stand: off, on, being switched on.
pub const KEYS: Gva = Gva(POINTERS.0 + 0x100);

/// Code of these bytes at [`BASE`], all of it live, and variables of its own behind.
pub fn code(bytes: &[u8]) -> LinkedCode {
    let all = Range::new(BASE, bytes.len() as u64);
    LinkedCode {
        name: "p".into(),
        base: BASE,
        bytes: bytes.to_vec(),
        live: Runs::new(vec![all]),
        dead: Runs::default(),
        own: Range::new(all.end, 0),
        all,
    }
}

/// Adds a field that leads from its own address `at` to `to`.
pub fn put32(bytes: &mut Vec<u8>, at: Gva, to: Gva) {
    let distance = to.0.wrapping_sub(at.0).cast_signed();
    bytes.extend(i32::try_from(distance).unwrap().to_le_bytes());
}

/// Does something with the kernel of a guest that has the types `btf`.
pub fn kernel<T>(btf: &[u8], then: impl Fn(&Kernel<'_>) -> Result<T>) -> Result<T> {
    with(btf, |_| {}, then)
}

/// The same, with something done to the guest before.
pub fn with<T>(
    btf: &[u8],
    change: impl Fn(&mut Fixture),
    then: impl Fn(&Kernel<'_>) -> Result<T>,
) -> Result<T> {
    let mut fixture = Fixture::new();
    fixture.function(FUNCTIONS.0, "printk", &[0x31, 0xc0, 0xc3]);
    fixture.function(HELD.0, "held", &[0xc3]);
    fixture.function(NOP.0, "nop_func", &[0xc3]);
    fixture.function(NOP.0 + 1, "_paravirt_nop", &[0xc3]);
    fixture.function(NOP.0 + 2, "__x86_return_thunk", &[0xc3]);
    let data = [
        (POINTERS, "pv_ops"),
        (KEYS, "keys"),
        (KEYS.plus(0x80), "x86_return_thunk"),
        (KEYS.plus(0x88), "data_end"),
    ];
    for (at, name) in data {
        fixture.symbols.push((at.0, 'D', name.into()));
    }
    change(&mut fixture);
    let thunk = fixture
        .symbols
        .iter()
        .find(|s| s.2 == "its_return_thunk" || s.2 == "call_depth_return_thunk")
        .map_or(NOP.0 + 2, |s| s.0);
    let memory = fixture.build();
    let mut data = vec![0; 0x200];
    for (i, value) in [HELD.0, NOP.0, 0, NOP.0 + 1].iter().enumerate() {
        data[8 * i..8 * i + 8].copy_from_slice(&value.to_le_bytes());
    }
    for (i, count) in [0i32, 2, -1].iter().enumerate() {
        data[0x100 + 16 * i..0x104 + 16 * i].copy_from_slice(&count.to_le_bytes());
    }
    data[0x180..0x188].copy_from_slice(&thunk.to_le_bytes());
    memory.map_bytes(POINTERS, &data, true, false);
    let kernel = Kernel::read(&memory, KIND, &vcpus())?;
    then(&renewed(&kernel, btf, Budget::default())?)
}
