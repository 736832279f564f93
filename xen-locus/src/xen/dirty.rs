//! `libxendevicemodel`: frames of a PVH or HVM guest that were written through a mapping, told to Xen.
//!
//! While such a guest is moved as it runs, Xen notes which frames it writes, and those are copied again. A
//! write by the control domain it doesn't see: it is told of it, as device models do (`XEN_DMOP_modified_memory`,
//! xen/include/public/hvm/dm_op.h). If the guest isn't being moved that is no work.

use std::ffi::{c_int, c_uint, c_void};
use std::ptr::{null_mut, NonNull};

use libloading::os::unix::Library;

use super::{fault, load, symbol, Error};
use crate::addr::{DomId, Frame};

type Handle = *mut c_void;
type OpenFn = unsafe extern "C" fn(Handle, c_uint) -> Handle;
type CloseFn = unsafe extern "C" fn(Handle) -> c_int;
type ModifiedFn = unsafe extern "C" fn(Handle, u16, *mut Extent, u32) -> c_int;

const LIBRARY: &str = "libxendevicemodel.so.1";
/// Frames of one call.
const AT_ONCE: usize = 32;

/// `struct xen_dm_op_modified_memory_extent`.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Extent {
    nr: u32,
    pad: u32,
    first_pfn: u64,
}

/// The way to say so.
pub struct Dirty {
    handle: NonNull<c_void>,
    close: CloseFn,
    modified: ModifiedFn,
    _lib: Library,
}

impl Dirty {
    /// Opens it.
    ///
    /// # Errors
    /// No such library, or no access to `/dev/xen/privcmd`.
    pub fn open() -> Result<Dirty, Error> {
        let lib = load(LIBRARY)?;
        macro_rules! get {
            ($symbol:literal) => {
                // SAFETY: the types above are the C prototypes of xendevicemodel.h, a stable ABI.
                unsafe { symbol(&lib, LIBRARY, $symbol)? }
            };
        }
        let open: OpenFn = get!("xendevicemodel_open");
        // SAFETY: a null logger means the default one; flags 0.
        let handle = NonNull::new(unsafe { open(null_mut(), 0) })
            .ok_or_else(|| Error::last("opening Xen's device model calls (xendevicemodel_open)"))?;
        Ok(Dirty {
            handle,
            close: get!("xendevicemodel_close"),
            modified: get!("xendevicemodel_modified_memory_bulk"),
            _lib: lib,
        })
    }

    /// Says that these guest frames of `id` were written, many in one call. Allocates nothing.
    ///
    /// # Errors
    /// Xen refused.
    pub fn mark(&self, id: DomId, frames: &[Frame]) -> Result<(), Error> {
        for some in frames.chunks(AT_ONCE) {
            fault("xendevicemodel_modified_memory_bulk")?;
            let mut extents = [Extent::default(); AT_ONCE];
            for (extent, frame) in extents.iter_mut().zip(some) {
                *extent = Extent {
                    nr: 1,
                    pad: 0,
                    first_pfn: frame.0,
                };
            }
            let count = u32::try_from(some.len()).unwrap_or(0);
            // SAFETY: a valid handle; the array holds at least as many elements as the call is told.
            let rc =
                unsafe { (self.modified)(self.handle.as_ptr(), id.0, extents.as_mut_ptr(), count) };
            if rc != 0 {
                return Err(Error::last(format!(
                    "telling Xen which frames of domain {id} were written \
                     (xendevicemodel_modified_memory_bulk)"
                )));
            }
        }
        Ok(())
    }
}

impl Drop for Dirty {
    fn drop(&mut self) {
        // SAFETY: the handle was opened by this library and is used no more.
        unsafe { (self.close)(self.handle.as_ptr()) };
    }
}
