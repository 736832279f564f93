//! `libxenstore`: what `xenstore-rs` lacks. Lists of names that do not fit one message, values that are not UTF-8, and
//! permissions.
//!
//! A message of XenStore holds 4096 bytes. A longer list is refused with `E2BIG`, and the library then asks for it in parts
//! (`XS_DIRECTORY_PART`; tools/libs/store/xs.c, `xs_directory`).

use std::ffi::{c_char, c_uint, c_ulong, c_void, CStr, CString};
use std::io;
use std::ptr::NonNull;

use super::library::functions;
use super::Error;

const LIBRARY: &str = "libxenstore.so.4";
/// No transaction (xenstore.h: `XBT_NULL`).
const NO_TRANSACTION: u32 = 0;

/// A connection of the library; only pointers to it are used.
#[repr(C)]
#[allow(non_camel_case_types)]
pub(super) struct xs_handle([u8; 0]);

/// An entry of a node's list of permissions (xenstore_lib.h).
#[repr(C)]
#[allow(non_camel_case_types)]
pub(super) struct xs_permissions {
    id: c_uint,
    perms: c_uint,
}

functions! {
    /// What is used of `libxenstore` (xenstore.h, a stable ABI).
    struct Functions {
        fn xs_open(c_ulong) -> *mut xs_handle;
        fn xs_close(*mut xs_handle);
        fn xs_read(*mut xs_handle, u32, *const c_char, *mut c_uint) -> *mut c_void;
        fn xs_directory(*mut xs_handle, u32, *const c_char, *mut c_uint) -> *mut *mut c_char;
        fn xs_set_permissions(*mut xs_handle, u32, *const c_char, *mut xs_permissions, c_uint) -> bool;
    }
}

/// A connection to xenstored, of `libxenstore`.
pub struct XenstoreList {
    handle: NonNull<xs_handle>,
    functions: Functions,
}

impl std::fmt::Debug for XenstoreList {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("XenstoreList")
    }
}

impl XenstoreList {
    /// Connects to xenstored, where the library finds it: `XENSTORED_PATH`, `socket` in `XENSTORED_RUNDIR` or in
    /// `/run/xenstored`, or the kernel's device (tools/libs/store/xs.c, `xs_open`).
    ///
    /// # Errors
    /// The library is missing, or nobody is there.
    pub fn open() -> Result<XenstoreList, Error> {
        let functions = Functions::load(LIBRARY)?;
        // SAFETY: the flags that are left have no meaning for this use.
        let handle = NonNull::new(unsafe { (functions.xs_open)(0) })
            .ok_or_else(|| Error::last("connecting to xenstored (xs_open)"))?;
        Ok(XenstoreList { handle, functions })
    }

    /// Names of a node's children, however many there are. Names that are not UTF-8 are left out: no node of this tool has one.
    ///
    /// # Errors
    /// There is no such node ([`io::ErrorKind::NotFound`]), or xenstored failed.
    pub fn names(&self, path: &str) -> io::Result<Vec<String>> {
        let path = CString::new(path)?;
        let mut count = 0;
        // SAFETY: a valid handle, a string that ends with NUL, and a place for the count.
        let list = unsafe {
            (self.functions.xs_directory)(
                self.handle.as_ptr(),
                NO_TRANSACTION,
                path.as_ptr(),
                &raw mut count,
            )
        };
        let list = NonNull::new(list).ok_or_else(io::Error::last_os_error)?;
        let names = (0..count as usize).filter_map(|at| {
            // SAFETY: the library gave `count` pointers to strings that end with NUL, which live as long as the list.
            let name = unsafe { CStr::from_ptr(*list.as_ptr().add(at)) };
            name.to_str().ok().map(str::to_owned)
        });
        let names = names.collect();
        // SAFETY: one block of malloc, strings included (xenstore.h), which nothing refers to any more.
        unsafe { libc::free(list.as_ptr().cast::<c_void>()) };
        Ok(names)
    }

    /// The value of a node, whatever bytes it has.
    ///
    /// # Errors
    /// There is no such node ([`io::ErrorKind::NotFound`]), or xenstored failed.
    pub fn value(&self, path: &str) -> io::Result<Vec<u8>> {
        let path = CString::new(path)?;
        let mut len = 0;
        // SAFETY: a valid handle, a string that ends with NUL, and a place for the length.
        let value = unsafe {
            (self.functions.xs_read)(
                self.handle.as_ptr(),
                NO_TRANSACTION,
                path.as_ptr(),
                &raw mut len,
            )
        };
        let value = NonNull::new(value).ok_or_else(io::Error::last_os_error)?;
        // SAFETY: the library gave a block of `len` bytes and a NUL (xenstore.h), which nothing else writes.
        let bytes = unsafe { std::slice::from_raw_parts(value.as_ptr().cast(), len as usize) };
        let bytes = bytes.to_vec();
        // SAFETY: one block of malloc, which nothing refers to any more.
        unsafe { libc::free(value.as_ptr()) };
        Ok(bytes)
    }

    /// Lets only the control domain read and write a node, and the nodes that are made below it from now on.
    ///
    /// # Errors
    /// There is no such node, or xenstored failed.
    pub fn set_private(&self, path: &str) -> io::Result<()> {
        let path = CString::new(path)?;
        // Domain 0 owns it, and others may do nothing (`XS_PERM_NONE`).
        let mut permissions = xs_permissions { id: 0, perms: 0 };
        // SAFETY: a valid handle, a string that ends with NUL, and one entry.
        let done = unsafe {
            (self.functions.xs_set_permissions)(
                self.handle.as_ptr(),
                NO_TRANSACTION,
                path.as_ptr(),
                &raw mut permissions,
                1,
            )
        };
        match done {
            true => Ok(()),
            false => Err(io::Error::last_os_error()),
        }
    }
}

impl Drop for XenstoreList {
    fn drop(&mut self) {
        // SAFETY: the handle is not used any more.
        unsafe { (self.functions.xs_close)(self.handle.as_ptr()) };
    }
}
