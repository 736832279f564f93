//! `libxenforeignmemory`: guest frames mapped into this process.

use std::cell::OnceCell;
use std::ffi::{c_int, c_uint, c_void};
use std::ptr::{null_mut, NonNull};
use std::rc::Rc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::OnceLock;

use locus_guest::addr::{DomId, Frame, Gfn, PAGE_LEN};
use locus_guest::{self as guest, Memory, MemoryMut, Window, WindowMut};
use xenctrl_sys::{xen_pfn_t, xenforeignmemory_handle, xentoollog_logger};

use super::library::functions;
use super::modified_memory::ModifiedMemory;
use super::{fault_point, Error};

const LIBRARY: &str = "libxenforeignmemory.so.1";

functions! {
    /// What is used of `libxenforeignmemory` (tools/include/xenforeignmemory.h, a stable ABI).
    struct Functions {
        fn xenforeignmemory_open(*mut xentoollog_logger, c_uint) -> *mut xenforeignmemory_handle;
        fn xenforeignmemory_close(*mut xenforeignmemory_handle) -> c_int;
        fn xenforeignmemory_map(
            *mut xenforeignmemory_handle, u32, c_int, usize, *const xen_pfn_t, *mut c_int
        ) -> *mut c_void;
        fn xenforeignmemory_unmap(*mut xenforeignmemory_handle, *mut c_void, usize) -> c_int;
    }
}

struct Inner {
    handle: NonNull<xenforeignmemory_handle>,
    functions: Functions,
}

impl Drop for Inner {
    fn drop(&mut self) {
        // SAFETY: the handle was opened by this library; every mapping holds an Rc of this value,
        // so none is left.
        unsafe { (self.functions.xenforeignmemory_close)(self.handle.as_ptr()) };
    }
}

/// The memory of one domain, mapped by frame number: MFNs of a PV guest, GFNs of a PVH or HVM guest.
#[derive(Clone)]
pub struct ForeignMemory {
    inner: Rc<Inner>,
    domain: DomId,
    modified: Rc<OnceCell<ModifiedMemory>>,
}

impl std::fmt::Debug for ForeignMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ForeignMemory")
            .field("domain", &self.domain)
            .finish_non_exhaustive()
    }
}

/// Rights of a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Access {
    /// Read only.
    Read,
    /// Read and write.
    Write,
}

impl ForeignMemory {
    /// Opens the memory of a domain. Whether the domain exists is seen when a frame is mapped.
    ///
    /// # Errors
    /// The library is missing, or no access to `/dev/xen/privcmd`.
    pub fn open(domain: DomId) -> Result<ForeignMemory, Error> {
        let functions = Functions::load(LIBRARY)?;
        // SAFETY: a null logger means the default one; flags 0.
        let handle = NonNull::new(unsafe { (functions.xenforeignmemory_open)(null_mut(), 0) })
            .ok_or_else(|| Error::last("opening foreign memory (xenforeignmemory_open)"))?;
        Ok(ForeignMemory {
            inner: Rc::new(Inner { handle, functions }),
            domain,
            modified: Rc::default(),
        })
    }

    fn map_all(&self, frames: &[Frame], access: Access) -> Result<Mapping, guest::Error> {
        let (mapping, errors) = self.map_each(frames, access)?;
        for (&frame, &error) in frames.iter().zip(&errors) {
            match error.abs() {
                0 => (),
                // A write is refused so for a page that is only for reading too.
                libc::EINVAL if access == Access::Read => {
                    return Err(guest::Error::NoMemory { frame })
                }
                _ => return Err(refused(frame, error)),
            }
        }
        Ok(mapping)
    }

    /// Maps those of `frames` that can be mapped. Returns for each the error, 0 for none.
    fn map_each(
        &self,
        frames: &[Frame],
        access: Access,
    ) -> Result<(Mapping, Vec<c_int>), guest::Error> {
        fault_point(match access {
            Access::Read => "map to read",
            Access::Write => "map to write",
        })?;
        let count = MappingCount::take(mappings_max())?;
        let numbers: Vec<xen_pfn_t> = frames.iter().map(|f| f.0).collect();
        let mut errors = vec![0 as c_int; frames.len()];
        let rights = match access {
            Access::Read => libc::PROT_READ,
            Access::Write => libc::PROT_READ | libc::PROT_WRITE,
        };
        // SAFETY: both arrays have as many elements as the call is given.
        let at = unsafe {
            (self.inner.functions.xenforeignmemory_map)(
                self.inner.handle.as_ptr(),
                u32::from(self.domain.0),
                rights,
                frames.len(),
                numbers.as_ptr(),
                errors.as_mut_ptr(),
            )
        };
        let first = frames.first().copied().unwrap_or(Frame(0));
        let Some(at) = NonNull::new(at.cast::<u8>()) else {
            let why = std::io::Error::last_os_error().to_string();
            return Err(guest::Error::Frame { frame: first, why });
        };
        let mapping = Mapping {
            at,
            size: frames.len() * PAGE_LEN,
            inner: Rc::clone(&self.inner),
            _count: count,
        };
        Ok((mapping, errors))
    }

    /// For each of `frames`, of a PVH or HVM guest, whether it has no memory.
    ///
    /// Xen is asked by a mapping, because only that tells a frame without memory from one with the guest's grant table
    /// or shared info: `XEN_DOMCTL_getpageframeinfo3` calls both invalid.
    ///
    /// # Errors
    /// One of them could not be mapped for another reason than that it has no memory.
    pub fn vacant(&self, frames: &[Gfn]) -> Result<Vec<bool>, guest::Error> {
        let frames: Vec<Frame> = frames.iter().map(|&f| f.into()).collect();
        let (_, errors) = self.map_each(&frames, Access::Read)?;
        let frames = frames.iter().zip(&errors);
        frames.map(|(&f, &error)| is_vacant(f, error)).collect()
    }

    /// For each of `frames`, whether none of the guest's own memory is there. In a PV guest it may be another domain's,
    /// whose grant the guest maps.
    ///
    /// # Errors
    /// One of them could not be mapped for another reason.
    pub fn not_own(&self, frames: &[Frame]) -> Result<Vec<bool>, guest::Error> {
        let (_, errors) = self.map_each(frames, Access::Read)?;
        let frames = frames.iter().zip(&errors);
        frames.map(|(&f, &error)| is_not_own(f, error)).collect()
    }
}

/// As [`is_vacant`]. Of a page that a PV guest does not own, Xen says EBUSY (`get_page_from_l1e`, xen/arch/x86/mm.c).
fn is_not_own(frame: Frame, error: c_int) -> Result<bool, guest::Error> {
    match error.abs() {
        libc::EBUSY => Ok(true),
        _ => is_vacant(frame, error),
    }
}

/// Whether `frame`, whose mapping ended with `error`, has no memory. Xen's answer then is EINVAL, for a PV dom0
/// (`mod_l1_entry`, xen/arch/x86/mm.c) and for a PVH one (`p2m_add_foreign`, xen/arch/x86/mm/p2m.c) alike.
fn is_vacant(frame: Frame, error: c_int) -> Result<bool, guest::Error> {
    match error.abs() {
        0 => Ok(false),
        libc::EINVAL => Ok(true),
        _ => Err(refused(frame, error)),
    }
}

/// `frame` could not be mapped: `error` is its errno.
fn refused(frame: Frame, error: c_int) -> guest::Error {
    let why = std::io::Error::from_raw_os_error(error.abs()).to_string();
    guest::Error::Frame { frame, why }
}

impl Memory for ForeignMemory {
    fn map(&self, frames: &[Frame]) -> Result<Box<dyn Window>, guest::Error> {
        Ok(Box::new(self.map_all(frames, Access::Read)?))
    }

    fn map_some(&self, frames: &[Frame]) -> Result<(Box<dyn Window>, Vec<bool>), guest::Error> {
        let (mapping, errors) = self.map_each(frames, Access::Read)?;
        let there = errors.iter().map(|&error| error == 0).collect();
        Ok((Box::new(mapping), there))
    }
}

impl MemoryMut for ForeignMemory {
    fn map_mut(&self, frames: &[Frame]) -> Result<Box<dyn WindowMut>, guest::Error> {
        Ok(Box::new(self.map_all(frames, Access::Write)?))
    }

    /// For PVH and HVM guests only.
    fn written(&self, frames: &[Frame]) -> Result<(), guest::Error> {
        if self.modified.get().is_none() {
            // If another value was set meanwhile, that one is used.
            let _ = self.modified.set(ModifiedMemory::open()?);
        }
        match self.modified.get() {
            Some(modified) if !frames.is_empty() => Ok(modified.report(self.domain, frames)?),
            _ => Ok(()),
        }
    }
}

/// Mapped frames; unmapped when dropped.
struct Mapping {
    at: NonNull<u8>,
    size: usize,
    inner: Rc<Inner>,
    _count: MappingCount,
}

/// Mappings of guests' memory that this process has.
static MAPPINGS: AtomicUsize = AtomicUsize::new(0);
/// Mappings that are left to this process for all else.
const MAPPINGS_SPARE: usize = 4096;

/// Most mappings of guests' memory at a time. Linux gives a process no more than `vm.max_map_count` mappings, and at that
/// number allocations of memory fail too.
fn mappings_max() -> usize {
    static MAX: OnceLock<usize> = OnceLock::new();
    *MAX.get_or_init(|| {
        let text = std::fs::read_to_string("/proc/sys/vm/max_map_count").unwrap_or_default();
        let max = text.trim().parse().unwrap_or(65530);
        usize::saturating_sub(max, MAPPINGS_SPARE)
    })
}

/// One of them.
struct MappingCount;

impl MappingCount {
    /// Counts one more, of at most `max`.
    fn take(max: usize) -> Result<MappingCount, guest::Error> {
        // Dropped if it is one too many.
        let count = MappingCount;
        if MAPPINGS.fetch_add(1, Ordering::Relaxed) < max {
            return Ok(count);
        }
        Err(guest::Error::Unsupported(format!(
            "the guest has so many threads, or its memory is so scattered, that more than {max} mappings of it are \
             needed at a time; dom0's kernel gives a process few more: raise vm.max_map_count (sysctl)"
        )))
    }
}

impl Drop for MappingCount {
    fn drop(&mut self) {
        MAPPINGS.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Mapping {
    fn check(&self, offset: usize, len: usize) -> Result<NonNull<u8>, guest::Error> {
        match offset.checked_add(len) {
            // SAFETY: offset..offset + len lies inside the mapping.
            Some(end) if end <= self.size => Ok(unsafe { self.at.add(offset) }),
            _ => Err(guest::Error::Bounds {
                offset,
                len,
                size: self.size,
            }),
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by this handle with this size, and nothing points into it any more.
        unsafe {
            (self.inner.functions.xenforeignmemory_unmap)(
                self.inner.handle.as_ptr(),
                self.at.as_ptr().cast(),
                self.size / PAGE_LEN,
            )
        };
    }
}

impl Window for Mapping {
    /// Each aligned word is read by one access, so a word that the guest changes meanwhile is read whole, old or new.
    fn read(&self, offset: usize, buf: &mut [u8]) -> Result<(), guest::Error> {
        let from = self.check(offset, buf.len())?;
        // Most reads in a pause are of one word.
        if let (Some(word), true) = (
            <&mut [u8; 8]>::try_from(&mut *buf).ok(),
            from.cast::<u64>().is_aligned(),
        ) {
            // SAFETY: `check` bounded its eight bytes; the rest as below.
            *word = unsafe { from.cast::<u64>().as_ptr().read_volatile() }.to_le_bytes();
            return Ok(());
        }
        let head = from.as_ptr().align_offset(8).min(buf.len());
        let (first, rest) = buf.split_at_mut(head);
        let read_byte = |i: usize| {
            // SAFETY: `check` bounded every index below `buf.len()`; the guest may write at the
            // same time, which volatile access allows for.
            unsafe { from.add(i).as_ptr().read_volatile() }
        };
        for (i, b) in first.iter_mut().enumerate() {
            *b = read_byte(i);
        }
        let mut at = head;
        let mut words = rest.chunks_exact_mut(8);
        for word in &mut words {
            // SAFETY: as above; `head` bytes on the address is 8-aligned, and so is every step.
            let value = unsafe { from.add(at).cast::<u64>().as_ptr().read_volatile() };
            word.copy_from_slice(&value.to_le_bytes());
            at += 8;
        }
        for (i, b) in words.into_remainder().iter_mut().enumerate() {
            *b = read_byte(at + i);
        }
        Ok(())
    }
}

impl WindowMut for Mapping {
    /// Each aligned word is written by one access: the guest sees a page-table entry or a pointer whole, old or new.
    /// Few accesses are made, because each costs much on an emulated processor that has translated code of the page.
    fn write(&self, offset: usize, bytes: &[u8]) -> Result<(), guest::Error> {
        let to = self.check(offset, bytes.len())?;
        fault_point("write to the guest")?;
        let (first, rest) = bytes.split_at(first_access(to.as_ptr(), bytes.len()));
        // SAFETY: `check` bounded all of `bytes`, and windows for writing are mapped writable.
        unsafe { copy_out(to.as_ptr(), first) };
        if !rest.is_empty() {
            fault_point("write to the guest, after its first access")?;
            // SAFETY: as above.
            unsafe { copy_out(to.as_ptr().add(first.len()), rest) };
        }
        Ok(())
    }
}

/// How many of `len` bytes the first access at `at` takes.
fn first_access(at: *const u8, len: usize) -> usize {
    let fits = |size: &usize| *size <= len && at.addr().is_multiple_of(*size);
    [8, 4, 2].into_iter().find(fits).unwrap_or(len.min(1))
}

/// Copies `bytes` to `at` by the largest aligned accesses that there are.
///
/// # Safety
/// `bytes.len()` bytes at `at` can be written. Others may read them meanwhile.
unsafe fn copy_out(mut at: *mut u8, bytes: &[u8]) {
    let mut rest = bytes;
    macro_rules! piece {
        ($word:ty) => {
            if let (Some((first, behind)), true) =
                (rest.split_first_chunk(), at.cast::<$word>().is_aligned())
            {
                let word = <$word>::from_ne_bytes(*first);
                // SAFETY: aligned, and the caller guarantees as many bytes as `rest` had.
                unsafe { at.cast::<$word>().write_volatile(word) };
                // SAFETY: at most one past the last of these.
                at = unsafe { at.add(size_of::<$word>()) };
                rest = behind;
                continue;
            }
        };
    }
    while !rest.is_empty() {
        piece!(u64);
        piece!(u32);
        piece!(u16);
        piece!(u8);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_many_mappings_are_refused_before_the_kernel_does_and_those_that_end_make_room() {
        let one = MappingCount::take(2).unwrap();
        let _two = MappingCount::take(2).unwrap();
        for _ in 0..3 {
            let error = MappingCount::take(2).err().unwrap();
            assert!(error.to_string().contains("vm.max_map_count"), "{error}");
        }
        drop(one);
        assert!(MappingCount::take(2).is_ok());
    }

    #[test]
    fn a_frame_is_vacant_only_if_xen_says_that_it_has_no_memory() {
        let frame = Frame(0xfe700);
        assert!(!is_vacant(frame, 0).unwrap());
        assert!(is_vacant(frame, -libc::EINVAL).unwrap());
        assert!(is_not_own(frame, -libc::EINVAL).unwrap());
        // Another domain's page, which the guest maps, is no vacant frame.
        assert!(is_not_own(frame, -libc::EBUSY).unwrap());
        assert!(is_vacant(frame, -libc::EBUSY).is_err());
        for other in [
            libc::ENOMEM,
            libc::ENOENT,
            libc::ESRCH,
            libc::EPERM,
            libc::EFAULT,
        ] {
            for is in [is_vacant, is_not_own] {
                let error = is(frame, -other).unwrap_err();
                assert!(error.to_string().contains("0xfe700"), "{error}");
            }
        }
    }

    #[test]
    fn every_byte_is_written_once_wherever_it_lies_and_none_beside_it() {
        #[repr(align(8))]
        struct Padded([u8; 48]);
        for offset in 0..16 {
            for len in 0..=24 {
                let bytes: Vec<u8> = (1..=len).collect();
                let mut padded = Padded([0xee; 48]);
                // SAFETY: 16 + 24 bytes fit the padded.
                unsafe { copy_out(padded.0.as_mut_ptr().add(offset), &bytes) };
                let (before, rest) = padded.0.split_at(offset);
                let (written, behind) = rest.split_at(bytes.len());
                assert_eq!(written, bytes);
                assert!(before.iter().chain(behind).all(|&b| b == 0xee));
            }
        }
    }
}
