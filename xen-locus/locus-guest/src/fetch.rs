//! Little-endian fields of a byte buffer that a guest has filled.
//!
//! Every function checks bounds and returns `None` where the field does not lie in the buffer. Offsets
//! are in bytes from the start of the buffer, and need no alignment.

/// The `N` bytes at offset `at`.
#[must_use]
pub fn array<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at.checked_add(N)?)?.try_into().ok()
}

/// The 16-bit little-endian number at offset `at`.
#[must_use]
pub fn u16(bytes: &[u8], at: usize) -> Option<u16> {
    array(bytes, at).map(u16::from_le_bytes)
}

/// The 32-bit little-endian number at offset `at`.
#[must_use]
pub fn u32(bytes: &[u8], at: usize) -> Option<u32> {
    array(bytes, at).map(u32::from_le_bytes)
}

/// The 64-bit little-endian number at offset `at`.
#[must_use]
pub fn u64(bytes: &[u8], at: usize) -> Option<u64> {
    array(bytes, at).map(u64::from_le_bytes)
}
