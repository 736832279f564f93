//! Frames of a PVH or HVM guest that were written through a mapping, told to Xen.
//!
//! While such a guest is moved as it runs, Xen notes which frames it writes, and those are copied again. A
//! write by the control domain it doesn't see: it is told of it, as device models do (`XEN_DMOP_modified_memory`,
//! xen/include/public/hvm/dm_op.h). If the guest isn't being moved that is no work.
//!
//! libxendevicemodel does the same, but the control domain's kernel pins the caller's memory anew at each of its
//! calls; here what the call is given is made before, so that it can be done in the pause.

use locus_guest::addr::{DomId, Frame};
use xenctrl_sys as sys;

use super::room::{Buffer, Places, Room};
use super::{fault_point, Error};

/// Frames of one call.
const AT_ONCE: usize = 32;

/// What such a call is given, in a room.
#[derive(Debug)]
pub(super) struct Telling {
    buffers: Places<Buffer>,
    op: Places<sys::xen_dm_op>,
    extents: Places<sys::xen_dm_op_modified_memory_extent>,
}

impl Telling {
    /// Bytes that it takes for `frames` frames, but for gaps.
    pub(super) const fn size(frames: usize) -> usize {
        2 * size_of::<Buffer>()
            + size_of::<sys::xen_dm_op>()
            + frames * size_of::<sys::xen_dm_op_modified_memory_extent>()
    }

    /// Places for what says of up to `frames` frames that they were written.
    ///
    /// # Errors
    /// There is no room for them.
    pub(super) fn within(room: &mut Room, frames: usize) -> Result<Telling, Error> {
        Ok(Telling {
            buffers: room.places(2)?,
            op: room.places(1)?,
            extents: room.places(frames)?,
        })
    }

    /// Fills it in for these frames of `id`, and returns the arguments of the call (`__HYPERVISOR_dm_op`). Xen
    /// writes into it.
    pub(super) fn put(&self, room: &Room, id: DomId, frames: &[Frame]) -> [u64; 4] {
        for (n, frame) in frames.iter().enumerate() {
            let extent = sys::xen_dm_op_modified_memory_extent {
                nr: 1,
                first_pfn: frame.0,
                ..sys::xen_dm_op_modified_memory_extent::default()
            };
            room.put(&self.extents, n, extent);
        }
        let mut op = sys::xen_dm_op {
            op: sys::XEN_DMOP_modified_memory,
            ..sys::xen_dm_op::default()
        };
        op.u.modified_memory = sys::xen_dm_op_modified_memory {
            nr_extents: u32::try_from(frames.len()).unwrap_or(0),
            opaque: 0,
        };
        room.put(&self.op, 0, op);
        let extents = frames.len() * size_of::<sys::xen_dm_op_modified_memory_extent>();
        let op = (room.address(&self.op, 0), size_of::<sys::xen_dm_op>());
        let extents = (room.address(&self.extents, 0), extents);
        for (n, (at, len)) in [op, extents].into_iter().enumerate() {
            let len = len as u64;
            room.put(&self.buffers, n, Buffer { at, len });
        }
        [u64::from(id.0), 2, room.address(&self.buffers, 0), 0]
    }
}

/// The way to say so.
#[derive(Debug)]
pub struct Dirty {
    room: Room,
    telling: Telling,
}

impl Dirty {
    /// Opens it.
    ///
    /// # Errors
    /// As [`super::Hypercalls::open`]; no memory for the call.
    pub fn open() -> Result<Dirty, Error> {
        let mut room = Room::new(Telling::size(AT_ONCE))?;
        let telling = Telling::within(&mut room, AT_ONCE)?;
        Ok(Dirty { room, telling })
    }

    /// Says that these guest frames of `id` were written, many in one call. Allocates nothing.
    ///
    /// # Errors
    /// Xen refused.
    pub fn mark(&self, id: DomId, frames: &[Frame]) -> Result<(), Error> {
        for some in frames.chunks(AT_ONCE) {
            fault_point("XEN_DMOP_modified_memory")?;
            let arguments = self.telling.put(&self.room, id, some);
            // SAFETY: the arguments lead to the room's memory, filled in for this call.
            let rc = unsafe { self.room.calls().call(sys::__HYPERVISOR_dm_op, arguments) };
            if rc != 0 {
                return Err(Error::last(failed(id)));
            }
        }
        Ok(())
    }
}

/// What could not be done.
pub(super) fn failed(id: DomId) -> String {
    format!("telling Xen which frames of domain {id} were written (XEN_DMOP_modified_memory)")
}
