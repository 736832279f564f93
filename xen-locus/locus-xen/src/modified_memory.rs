//! Reports to Xen which frames of a PVH or HVM guest the control domain has written.
//!
//! During a live migration Xen logs which frames the guest makes dirty, and they are copied again. Xen does not see
//! writes by the control domain, so they are reported, as device models do (`XEN_DMOP_modified_memory`,
//! xen/include/public/hvm/dm_op.h). If no migration is running, Xen does nothing.
//!
//! libxendevicemodel makes the same call, but the control domain's kernel pins the caller's memory at each of its
//! calls. Here the arguments are in memory that was allocated before, so that the call can be made in a pause.

use locus_guest::addr::{DomId, Frame};
use xenctrl_sys as sys;

use super::hypercall_buffer::{Array, DmOpBuffer, HypercallBuffer};
use super::{fault_point, Error};

/// Most frames that one call reports.
const AT_ONCE: usize = 32;

/// The arguments of one such call, in a [`HypercallBuffer`].
#[derive(Debug)]
pub(super) struct ModifiedMemoryCall {
    buffers: Array<DmOpBuffer>,
    op: Array<sys::xen_dm_op>,
    extents: Array<sys::xen_dm_op_modified_memory_extent>,
}

impl ModifiedMemoryCall {
    /// Bytes of buffer that it needs for `frames` frames, without alignment.
    pub(super) const fn size(frames: usize) -> usize {
        2 * size_of::<DmOpBuffer>()
            + size_of::<sys::xen_dm_op>()
            + frames * size_of::<sys::xen_dm_op_modified_memory_extent>()
    }

    /// Takes memory of `buffer` for up to `frames` frames.
    ///
    /// # Errors
    /// The buffer is too small.
    pub(super) fn within(
        buffer: &mut HypercallBuffer,
        frames: usize,
    ) -> Result<ModifiedMemoryCall, Error> {
        Ok(ModifiedMemoryCall {
            buffers: buffer.array(2)?,
            op: buffer.array(1)?,
            extents: buffer.array(frames)?,
        })
    }

    /// Fills in the call for these frames (GFNs) of `id`, and returns the arguments of the hypercall
    /// (`__HYPERVISOR_dm_op`). Needed before each call, because Xen writes into the operation.
    pub(super) fn put(&self, buffer: &HypercallBuffer, id: DomId, frames: &[Frame]) -> [u64; 4] {
        for (n, frame) in frames.iter().enumerate() {
            let extent = sys::xen_dm_op_modified_memory_extent {
                nr: 1,
                first_pfn: frame.0,
                ..sys::xen_dm_op_modified_memory_extent::default()
            };
            buffer.put(&self.extents, n, extent);
        }
        let mut op = sys::xen_dm_op {
            op: sys::XEN_DMOP_modified_memory,
            ..sys::xen_dm_op::default()
        };
        op.u.modified_memory = sys::xen_dm_op_modified_memory {
            // There is no memory for more. If there were, Xen would refuse this number.
            nr_extents: u32::try_from(frames.len()).unwrap_or(u32::MAX),
            opaque: 0,
        };
        buffer.put(&self.op, 0, op);
        let extents = frames.len() * size_of::<sys::xen_dm_op_modified_memory_extent>();
        let op = (buffer.address(&self.op, 0), size_of::<sys::xen_dm_op>());
        let extents = (buffer.address(&self.extents, 0), extents);
        for (n, (at, len)) in [op, extents].into_iter().enumerate() {
            let len = len as u64;
            buffer.put(&self.buffers, n, DmOpBuffer { at, len });
        }
        [u64::from(id.0), 2, buffer.address(&self.buffers, 0), 0]
    }
}

/// A call with memory of its own.
#[derive(Debug)]
pub struct ModifiedMemory {
    buffer: HypercallBuffer,
    call: ModifiedMemoryCall,
}

impl ModifiedMemory {
    /// Allocates the memory for the call.
    ///
    /// # Errors
    /// As [`super::Hypercalls::open`]; there is no memory.
    pub fn open() -> Result<ModifiedMemory, Error> {
        let mut buffer = HypercallBuffer::new(ModifiedMemoryCall::size(AT_ONCE))?;
        let call = ModifiedMemoryCall::within(&mut buffer, AT_ONCE)?;
        Ok(ModifiedMemory { buffer, call })
    }

    /// Reports these frames (GFNs) of `id` as written. Allocates no memory.
    ///
    /// # Errors
    /// Xen refused.
    pub fn report(&self, id: DomId, frames: &[Frame]) -> Result<(), Error> {
        for some in frames.chunks(AT_ONCE) {
            fault_point("XEN_DMOP_modified_memory")?;
            let arguments = self.call.put(&self.buffer, id, some);
            // SAFETY: the arguments point into the buffer, filled in for this call.
            let rc = unsafe { self.buffer.calls().call(sys::__HYPERVISOR_dm_op, arguments) };
            if rc != 0 {
                return Err(Error::last(failed(id)));
            }
        }
        Ok(())
    }
}

/// What failed, for the error.
pub(super) fn failed(id: DomId) -> String {
    format!("telling Xen which frames of domain {id} were written (XEN_DMOP_modified_memory)")
}
