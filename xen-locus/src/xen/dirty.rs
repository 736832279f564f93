//! Frames of a PVH or HVM guest that were written through a mapping, told to Xen.
//!
//! While such a guest is moved as it runs, Xen notes which frames it writes, and those are copied again. A
//! write by the control domain it doesn't see: it is told of it, as device models do (`XEN_DMOP_modified_memory`,
//! xen/include/public/hvm/dm_op.h). If the guest isn't being moved that is no work.
//!
//! It is done in the pause, so not by libxendevicemodel, for which the control domain's kernel pins the
//! caller's memory anew at each call: here the call's buffer is made before.

use std::ptr::NonNull;

use xenctrl_sys as sys;

use super::call::Hypercalls;
use super::{fault, Error};
use crate::addr::{DomId, Frame};

/// Frames of one call.
const AT_ONCE: usize = 32;

/// `struct xen_dm_op_buf`.
#[repr(C)]
struct Buffer {
    at: u64,
    len: u64,
}

/// What a call is given: the buffers, and what they lead to.
#[repr(C)]
struct Given {
    buffers: [Buffer; 2],
    op: sys::xen_dm_op,
    extents: [sys::xen_dm_op_modified_memory_extent; AT_ONCE],
}

/// The way to say so.
pub struct Dirty {
    calls: Hypercalls,
    given: NonNull<Given>,
}

impl Dirty {
    /// Opens it.
    ///
    /// # Errors
    /// As [`Hypercalls::open`]; no memory for the call.
    pub fn open() -> Result<Dirty, Error> {
        let calls = Hypercalls::open()?;
        let given = calls.buffer()?;
        Ok(Dirty { calls, given })
    }

    /// Says that these guest frames of `id` were written, many in one call. Allocates nothing.
    ///
    /// # Errors
    /// Xen refused.
    pub fn mark(&self, id: DomId, frames: &[Frame]) -> Result<(), Error> {
        for some in frames.chunks(AT_ONCE) {
            fault("XEN_DMOP_modified_memory")?;
            let mut extents = [sys::xen_dm_op_modified_memory_extent::default(); AT_ONCE];
            for (extent, frame) in extents.iter_mut().zip(some) {
                extent.nr = 1;
                extent.first_pfn = frame.0;
            }
            let count = u32::try_from(some.len()).unwrap_or(0);
            let mut op = sys::xen_dm_op {
                op: sys::XEN_DMOP_modified_memory,
                ..sys::xen_dm_op::default()
            };
            op.u.modified_memory = sys::xen_dm_op_modified_memory {
                nr_extents: count,
                opaque: 0,
            };
            let at = self.given.as_ptr();
            // SAFETY: the buffer is a `Given` of ours that nobody else has; only addresses are taken of what
            // is not filled yet.
            let rc = unsafe {
                let buffers = [
                    Buffer {
                        at: &raw const (*at).op as u64,
                        len: size_of::<sys::xen_dm_op>() as u64,
                    },
                    Buffer {
                        at: &raw const (*at).extents as u64,
                        len: size_of_val(&extents) as u64,
                    },
                ];
                at.write(Given {
                    buffers,
                    op,
                    extents,
                });
                let arguments = [u64::from(id.0), 2, at as u64, 0];
                self.calls.call(sys::__HYPERVISOR_dm_op, arguments)
            };
            if rc != 0 {
                return Err(Error::last(format!(
                    "telling Xen which frames of domain {id} were written (XEN_DMOP_modified_memory)"
                )));
            }
        }
        Ok(())
    }
}

impl Drop for Dirty {
    fn drop(&mut self) {
        // SAFETY: allocated when this was made, and used no more.
        unsafe { self.calls.release(self.given) };
    }
}
