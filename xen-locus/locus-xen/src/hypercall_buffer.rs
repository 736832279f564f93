//! Memory for arguments and results of hypercalls, allocated before it is needed: a buffer, and arrays in it.

use std::marker::PhantomData;
use std::ptr::NonNull;

use xenctrl_sys as sys;

use super::{Error, Hypercalls};

/// Structures of Xen's interfaces that are plain data.
///
/// # Safety
/// Any bytes are a valid value of the type.
pub(super) unsafe trait Plain: Copy {}

// SAFETY: numbers; guest handles among them are pointers, which no code here follows.
unsafe impl Plain for sys::multicall_entry {}
// SAFETY: as above, each member of the union.
unsafe impl Plain for sys::xen_domctl {}
// SAFETY: as above, each member of the union.
unsafe impl Plain for sys::vcpu_guest_context_any_t {}
// SAFETY: as above.
unsafe impl Plain for sys::hvm_hw_cpu {}
// SAFETY: as above, each member of the union.
unsafe impl Plain for sys::xen_dm_op {}
// SAFETY: as above.
unsafe impl Plain for sys::xen_dm_op_modified_memory_extent {}
// SAFETY: two numbers.
unsafe impl Plain for DmOpBuffer {}

/// The address and size, in bytes, of one buffer of a device-model operation (`struct xen_dm_op_buf`,
/// xen/include/public/hvm/dm_op.h).
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(super) struct DmOpBuffer {
    pub(super) at: u64,
    pub(super) len: u64,
}

/// Bytes for alignment between the arrays, all together.
const GAPS: usize = 256;

/// Where in its [`HypercallBuffer`] an array of values is.
pub(super) struct Array<T> {
    offset: usize,
    count: usize,
    of: PhantomData<T>,
}

impl<T> std::fmt::Debug for Array<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} at {}", self.count, self.offset)
    }
}

/// Page-aligned memory for hypercalls.
#[derive(Debug)]
pub(super) struct HypercallBuffer {
    calls: Hypercalls,
    first: NonNull<u8>,
    len: usize,
    used: usize,
}

impl HypercallBuffer {
    /// Allocates memory for `len` bytes of values, and for alignment between a few arrays.
    ///
    /// # Errors
    /// As [`Hypercalls::open`]; there is no memory.
    pub(super) fn new(len: usize) -> Result<HypercallBuffer, Error> {
        let calls = Hypercalls::open()?;
        let len = len.saturating_add(GAPS);
        let first = calls.alloc(len)?;
        Ok(HypercallBuffer {
            calls,
            first,
            len,
            used: 0,
        })
    }

    /// The handle to make hypercalls that use the buffer.
    pub(super) fn calls(&self) -> &Hypercalls {
        &self.calls
    }

    /// Takes memory for the next array, of `count` values.
    ///
    /// # Errors
    /// The rest of the memory is too small.
    pub(super) fn array<T: Plain>(&mut self, count: usize) -> Result<Array<T>, Error> {
        const { assert!(align_of::<T>() <= 16) };
        let offset = self.used.next_multiple_of(16);
        let end = count
            .checked_mul(size_of::<T>())
            .and_then(|len| offset.checked_add(len))
            .filter(|end| *end <= self.len);
        self.used = end.ok_or_else(|| {
            Error::Environment(format!("{} bytes are too few for a call", self.len))
        })?;
        Ok(Array {
            offset,
            count,
            of: PhantomData,
        })
    }

    /// Where value number `index` is, if the array has so many.
    fn at<T: Plain>(&self, array: &Array<T>, index: usize) -> Option<*mut T> {
        let within = (index < array.count).then_some(array.offset + index * size_of::<T>())?;
        // SAFETY: `array` reserved `count` values inside this memory.
        Some(unsafe { self.first.as_ptr().add(within) }.cast())
    }

    /// A pointer to value number `index`, for Xen; null if there is no such value, which Xen refuses.
    pub(super) fn pointer<T: Plain>(&self, array: &Array<T>, index: usize) -> *mut T {
        self.at(array, index).unwrap_or(std::ptr::null_mut())
    }

    /// The address of value number `index`, for Xen; 0 if there is no such value, which Xen refuses.
    pub(super) fn address<T: Plain>(&self, array: &Array<T>, index: usize) -> u64 {
        self.pointer(array, index).addr() as u64
    }

    /// Writes value number `index`, if there is one.
    pub(super) fn put<T: Plain>(&self, array: &Array<T>, index: usize, value: T) {
        if let Some(at) = self.at(array, index) {
            // SAFETY: inside the memory, which begins at a page: so the address is aligned.
            unsafe { at.write_volatile(value) };
        }
    }

    /// Reads value number `index`, which this process or Xen wrote.
    ///
    /// # Errors
    /// There is no such value.
    pub(super) fn read<T: Plain, R>(
        &self,
        array: &Array<T>,
        index: usize,
        look: impl FnOnce(&T) -> R,
    ) -> Result<R, Error> {
        let at = self.at(array, index).ok_or_else(|| {
            Error::Environment(format!(
                "a hypercall buffer of {} values has no value {index}",
                array.count
            ))
        });
        // SAFETY: inside the memory and aligned; any bytes are a value, and the memory was zeroed when it was
        // allocated. Nothing writes there during `look`: Xen writes in calls only, and `look` gets nothing to make one
        // with.
        at.map(|at| look(unsafe { &*at }))
    }
}

impl Drop for HypercallBuffer {
    fn drop(&mut self) {
        // SAFETY: allocated by this handle, and used no more.
        unsafe { self.calls.free(self.first) };
    }
}
