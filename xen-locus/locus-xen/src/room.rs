//! Memory that Xen reads and writes in calls, made before it is needed, and what has a place in it.

use std::marker::PhantomData;
use std::ptr::NonNull;

use xenctrl_sys as sys;

use super::{Error, Hypercalls};

/// Structures of Xen's interfaces that are plain data: whatever bytes stand there are a value.
///
/// # Safety
/// That is so.
pub(super) unsafe trait Plain: Copy {}

// SAFETY: numbers; guest handles among them are pointers, which nobody here follows.
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
unsafe impl Plain for Buffer {}

/// Says where one buffer of a call is (`struct xen_dm_op_buf`, xen/include/public/hvm/dm_op.h).
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(super) struct Buffer {
    pub(super) at: u64,
    pub(super) len: u64,
}

/// Bytes between kinds of values, all together.
const GAPS: usize = 256;

/// Where in its [`Room`] values of a type have their place, one after the other.
pub(super) struct Places<T> {
    offset: usize,
    count: usize,
    of: PhantomData<T>,
}

impl<T> std::fmt::Debug for Places<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} at {}", self.count, self.offset)
    }
}

/// Memory for calls.
#[derive(Debug)]
pub(super) struct Room {
    calls: Hypercalls,
    first: NonNull<u8>,
    len: usize,
    used: usize,
}

impl Room {
    /// Room for `len` bytes of values, and for a few gaps between kinds of them.
    ///
    /// # Errors
    /// As [`Hypercalls::open`]; there is no memory.
    pub(super) fn new(len: usize) -> Result<Room, Error> {
        let calls = Hypercalls::open()?;
        let len = len.saturating_add(GAPS);
        let first = calls.alloc(len)?;
        Ok(Room {
            calls,
            first,
            len,
            used: 0,
        })
    }

    /// The way to make the calls.
    pub(super) fn calls(&self) -> &Hypercalls {
        &self.calls
    }

    /// The next places, for `count` values.
    ///
    /// # Errors
    /// There is no room for them.
    pub(super) fn places<T: Plain>(&mut self, count: usize) -> Result<Places<T>, Error> {
        const { assert!(align_of::<T>() <= 16) };
        let offset = self.used.next_multiple_of(16);
        let end = count
            .checked_mul(size_of::<T>())
            .and_then(|len| offset.checked_add(len))
            .filter(|end| *end <= self.len);
        self.used = end.ok_or_else(|| {
            Error::Environment(format!("{} bytes are too few for a call", self.len))
        })?;
        Ok(Places {
            offset,
            count,
            of: PhantomData,
        })
    }

    /// Where value number `index` stands, if there is room for one.
    fn at<T: Plain>(&self, places: &Places<T>, index: usize) -> Option<*mut T> {
        let within = (index < places.count).then_some(places.offset + index * size_of::<T>())?;
        // SAFETY: `places` gave out so many places inside this memory.
        Some(unsafe { self.first.as_ptr().add(within) }.cast())
    }

    /// The address of value number `index`, for Xen.
    pub(super) fn address<T: Plain>(&self, places: &Places<T>, index: usize) -> u64 {
        self.at(places, index).map_or(0, |at| at.addr() as u64)
    }

    /// Puts a value there, if there is room for it.
    pub(super) fn put<T: Plain>(&self, places: &Places<T>, index: usize, value: T) {
        if let Some(at) = self.at(places, index) {
            // SAFETY: inside the memory, which begins at a page: so the address is aligned.
            unsafe { at.write_volatile(value) };
        }
    }

    /// Looks at what stands there, put there by this process or by Xen; `None` if there is no such place.
    pub(super) fn read<T: Plain, R>(
        &self,
        places: &Places<T>,
        index: usize,
        look: impl FnOnce(&T) -> R,
    ) -> Option<R> {
        // SAFETY: as above; any bytes are a value, the memory was zeroed when it was made, and nobody writes
        // there while `look` lasts: Xen does in calls only, and nothing that `look` is given makes one.
        self.at(places, index).map(|at| look(unsafe { &*at }))
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        // SAFETY: allocated by this handle, and used no more.
        unsafe { self.calls.free(self.first) };
    }
}
