//! `libxencall`: hypercalls that libxenctrl has no function for. `mmu_update` on another domain's page tables is here;
//! the others have files of their own.

use std::ffi::{c_int, c_uint, c_void};
use std::ptr::{null_mut, NonNull};

use locus_guest::addr::{DomId, Mfn};
use xenctrl_sys::{self as sys, xencall_handle, xentoollog_logger};

use super::library::functions;
use super::{fault_point, Error};

const LIBRARY: &str = "libxencall.so.1";

functions! {
    /// What is used of `libxencall` (tools/include/xencall.h, a stable ABI).
    struct Functions {
        fn xencall_open(*mut xentoollog_logger, c_uint) -> *mut xencall_handle;
        fn xencall_close(*mut xencall_handle) -> c_int;
        fn xencall_alloc_buffer(*mut xencall_handle, usize) -> *mut c_void;
        fn xencall_free_buffer(*mut xencall_handle, *mut c_void);
        fn xencall4(*mut xencall_handle, c_uint, u64, u64, u64, u64) -> c_int;
    }
}

/// A handle for hypercalls (`/dev/xen/privcmd`, `/dev/xen/hypercall`).
pub struct Hypercalls {
    handle: NonNull<xencall_handle>,
    functions: Functions,
}

impl std::fmt::Debug for Hypercalls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Hypercalls")
    }
}

impl Hypercalls {
    /// Opens the handle.
    ///
    /// # Errors
    /// The library is missing, or no access to `/dev/xen/hypercall` and `/dev/xen/privcmd`.
    pub fn open() -> Result<Hypercalls, Error> {
        let functions = Functions::load(LIBRARY)?;
        // SAFETY: a null logger means the default one; flags 0.
        let handle = NonNull::new(unsafe { (functions.xencall_open)(null_mut(), 0) })
            .ok_or_else(|| Error::last("opening hypercalls (xencall_open)"))?;
        Ok(Hypercalls { handle, functions })
    }

    /// Allocates `len` bytes that Xen may read and write in a call, zeroed and aligned to a page.
    ///
    /// # Errors
    /// There is no memory.
    pub(super) fn alloc(&self, len: usize) -> Result<NonNull<u8>, Error> {
        // SAFETY: a valid handle; the result is checked before use.
        let buffer = unsafe { (self.functions.xencall_alloc_buffer)(self.handle.as_ptr(), len) };
        let buffer = NonNull::new(buffer.cast::<u8>())
            .ok_or_else(|| Error::last("allocating a hypercall buffer (xencall_alloc_buffer)"))?;
        // SAFETY: `len` bytes were allocated, and nothing else uses them.
        unsafe { buffer.write_bytes(0, len) };
        Ok(buffer)
    }

    /// Frees memory.
    ///
    /// # Safety
    /// `buffer` is from [`Hypercalls::alloc`] of this handle, and is not used any more.
    pub(super) unsafe fn free(&self, buffer: NonNull<u8>) {
        // SAFETY: as the caller guarantees.
        unsafe {
            (self.functions.xencall_free_buffer)(self.handle.as_ptr(), buffer.as_ptr().cast())
        };
    }

    /// Makes hypercall `number`; -1 and `errno` if it failed.
    ///
    /// # Safety
    /// The arguments are valid for this hypercall (xen/include/public/xen.h), and all that they point to is in buffers
    /// of this handle.
    pub(super) unsafe fn call(&self, number: u32, [a, b, c, d]: [u64; 4]) -> c_int {
        // SAFETY: a valid handle; the rest as the caller guarantees.
        unsafe { (self.functions.xencall4)(self.handle.as_ptr(), number, a, b, c, d) }
    }

    /// Writes page-table entries of a PV domain: entry number `slot` of page-table frame `table`
    /// becomes `entry`, for each of `updates`. Xen checks every entry as it checks the guest's own.
    ///
    /// # Errors
    /// Xen refused one; those before it are written.
    pub fn mmu_update(&self, owner: DomId, updates: &[(Mfn, usize, u64)]) -> Result<(), Error> {
        // The low half is the owner of the mapped pages, the high half the owner of the page tables, plus one
        // (xen/include/public/xen.h, `mmu_update`).
        let domains = u64::from(owner.0) | (u64::from(owner.0) + 1) << 16;
        for &(table, slot, entry) in updates {
            fault_point("mmu_update")?;
            let buffer = self.alloc(size_of::<sys::mmu_update>())?;
            let update = buffer.cast::<sys::mmu_update>();
            let ptr = (table.0 << 12) | ((slot as u64) << 3) | u64::from(sys::MMU_NORMAL_PT_UPDATE);
            // SAFETY: the buffer is page-aligned, ours, and large enough for one update.
            unsafe { update.write(sys::mmu_update { ptr, val: entry }) };
            // SAFETY: the first argument points to one update, as the second says; no count of
            // updates done is asked for.
            let rc = unsafe {
                let arguments = [update.as_ptr() as u64, 1, 0, domains];
                self.call(sys::__HYPERVISOR_mmu_update, arguments)
            };
            let failed = (rc != 0).then(|| {
                Error::last(format!(
                    "writing entry {slot} of page table {table} of domain {owner} (mmu_update)"
                ))
            });
            // SAFETY: allocated above and not used any more.
            unsafe { self.free(buffer) };
            match failed {
                Some(Error::Call {
                    errno: libc::ENOSYS,
                    ..
                }) => {
                    return Err(Error::Unsupported(
                        "this control domain is itself PVH, and Xen offers such a one no way to \
                         change the page tables of PV guests (mmu_update): only PVH and HVM guests \
                         can be patched from here"
                            .into(),
                    ))
                }
                Some(error) => return Err(error),
                None => {}
            }
        }
        Ok(())
    }
}

impl Drop for Hypercalls {
    fn drop(&mut self) {
        // SAFETY: the handle was opened by this library and is used no more.
        unsafe { (self.functions.xencall_close)(self.handle.as_ptr()) };
    }
}
