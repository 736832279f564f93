//! Whether Xen keeps copies of a PV domain's page tables, and thus may log which pages it makes dirty.

use std::ffi::c_uint;

use locus_guest::addr::DomId;
use xenctrl_sys as sys;

use super::{fault_point, Control, Error};

impl Control {
    /// Whether Xen runs a PV domain on copies of its page tables (shadows). `None` if this Xen has none for PV domains.
    ///
    /// While a PV domain is migrated as it runs it has shadows, because Xen logs by them which pages it makes dirty (log-dirty
    /// mode). What the control domain writes to it then is seen by nobody, and may be missing where the domain arrives. Without shadows
    /// nothing is logged: when that mode ends Xen takes the memory of the shadows away
    /// (xen/arch/x86/mm/shadow/common.c: `shadow_one_bit_disable`), and `XEN_DOMCTL_SHADOW_OP_GET_ALLOCATION` returns 0. Also
    /// a domain that Xen protects from L1TF has shadows. `XEN_DOMCTL_SHADOW_OP_PEEK` does not tell whether anything is logged.
    /// A Xen without `CONFIG_SHADOW_PAGING`, as Debian's, answers EINVAL, and one without `CONFIG_PAGING` EOPNOTSUPP or
    /// ENOSYS (xen/arch/x86/domctl.c); it can't migrate a PV domain as it runs.
    ///
    /// # Errors
    /// `xc_shadow_control` failed with another error.
    pub fn has_shadows(&self, id: DomId) -> Result<Option<bool>, Error> {
        fault_point("xc_shadow_control")?;
        let mut mebibytes: c_uint = 0;
        // SAFETY: a valid handle, and a number that the call fills in.
        let rc = unsafe {
            (self.functions.xc_shadow_control)(
                self.handle.as_ptr(),
                u32::from(id.0),
                sys::XEN_DOMCTL_SHADOW_OP_GET_ALLOCATION,
                &raw mut mebibytes,
                0,
            )
        };
        let asked = self.check(rc, || {
            format!("asking for shadows of domain {id} (xc_shadow_control)")
        });
        shadows(asked, mebibytes)
    }
}

/// What an answer to `XEN_DOMCTL_SHADOW_OP_GET_ALLOCATION` means.
fn shadows(asked: Result<(), Error>, mebibytes: u32) -> Result<Option<bool>, Error> {
    match asked {
        Ok(()) => Ok(Some(mebibytes != 0)),
        Err(Error::Call {
            errno: libc::EINVAL | libc::EOPNOTSUPP | libc::ENOSYS,
            ..
        }) => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_xen_without_shadows_is_told_from_one_that_can_not_be_asked() {
        let failed = |errno| {
            Err(Error::Call {
                call: "xc_shadow_control".into(),
                why: String::new(),
                errno,
            })
        };
        assert_eq!(shadows(Ok(()), 0).unwrap(), Some(false));
        assert_eq!(shadows(Ok(()), 1).unwrap(), Some(true));
        for errno in [libc::EINVAL, libc::EOPNOTSUPP, libc::ENOSYS] {
            assert_eq!(shadows(failed(errno), 0).unwrap(), None);
        }
        for errno in [libc::EPERM, libc::EBUSY, libc::ESRCH] {
            assert!(shadows(failed(errno), 0).is_err());
        }
    }
}
