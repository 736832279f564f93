//! Whether the running Xen and its library speak as they are understood here.
//!
//! Structures of Xen's control interface change from release to release, and only Xen's own tools are built for each.
//! A domain that is misread may be taken for another one, or for one that is gone. So nothing is believed before the
//! form of the answers is seen ([`Answers`]), and nothing is changed on a Xen whose interface nobody compared
//! ([`XenVersion::is_known`]).

use std::mem::offset_of;

use xenctrl_sys::{self as sys, xc_domaininfo_t};

use super::Error;

/// The first and the last release of Xen 4 whose interface is that of this build, as far as it is used: the structures
/// in xen/include/public/{domctl,arch-x86/xen,arch-x86/hvm/save}.h, and the prototypes in tools/include/xenctrl.h.
/// `struct xen_domctl_getdomaininfo` has 104 bytes up to 4.15, where `gpaddr_bits` is missing.
const KNOWN: std::ops::RangeInclusive<u32> = 16..=22;
/// Versions of the control interface (`XEN_DOMCTL_INTERFACE_VERSION`) of these releases: 4.16, 4.17, 4.18, 4.19 to
/// 4.21, and 4.22. The operations used here are the same in all of them.
pub(super) const INTERFACES: std::ops::RangeInclusive<u32> = 0x14..=0x18;
/// Bytes of an answer's buffer. No version of the structure has a quarter of that.
const LEN: usize = 1024;
/// What the two buffers hold before.
const FILLED: [u8; 2] = [0x5a, 0xa5];

/// A version of Xen, as `xl info` prints it: MAJOR.MINOR.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct XenVersion {
    /// 4 in `4.17`.
    pub major: u32,
    /// 17 in `4.17`.
    pub minor: u32,
}

impl std::fmt::Display for XenVersion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

impl XenVersion {
    /// The version in the files `major` and `minor` of /sys/hypervisor/version.
    ///
    /// # Errors
    /// They are no numbers.
    pub(super) fn parse(major: &str, minor: &str) -> Result<XenVersion, Error> {
        match (major.parse(), minor.parse()) {
            (Ok(major), Ok(minor)) => Ok(XenVersion { major, minor }),
            _ => Err(Error::Environment(format!(
                "Xen's version in /sys/hypervisor/version is {major:?}.{minor:?}, and should be two numbers"
            ))),
        }
    }

    /// Whether its interface was compared with that of this build.
    #[must_use]
    pub fn is_known(self) -> bool {
        self.major == 4 && KNOWN.contains(&self.minor)
    }

    /// Checks that it is not older than any that can be read.
    ///
    /// # Errors
    /// [`Error::Unsupported`]: it is.
    pub(super) fn check_readable(self) -> Result<(), Error> {
        let first = XenVersion {
            major: 4,
            minor: *KNOWN.start(),
        };
        if self >= first {
            return Ok(());
        }
        Err(Error::Unsupported(format!(
            "this is Xen {self}, which describes domains in another form; xen-locus needs Xen {first} or later; nothing \
             was read or changed"
        )))
    }
}

/// Nothing is changed on this version of Xen.
pub(super) fn unknown(version: XenVersion) -> Error {
    Error::Unsupported(format!(
        "this is Xen {version}, whose control interface is none of those that this build of xen-locus knows (Xen 4.{} to \
         4.{}; interface versions {:#x} to {:#x}); guests can be read here, but not changed: use a newer xen-locus",
        KNOWN.start(),
        KNOWN.end(),
        INTERFACES.start(),
        INTERFACES.end()
    ))
}

/// Two answers of `xc_domain_getinfolist` for domain 0 alone, each in a buffer that was filled with a byte of its own
/// before. What differs from that byte in one of them was written.
pub(super) struct Answers([Vec<u64>; 2]);

impl Answers {
    pub(super) fn new() -> Answers {
        Answers(FILLED.map(|byte| vec![u64::from_ne_bytes([byte; 8]); LEN / 8]))
    }

    /// The buffers.
    pub(super) fn each(&mut self) -> impl Iterator<Item = &mut Vec<u64>> {
        self.0.iter_mut()
    }

    /// Checks that exactly one structure of the expected size was written, and that it is about domain 0.
    ///
    /// # Errors
    /// [`Error::Unsupported`]: the answers have another form.
    pub(super) fn check(&self, version: XenVersion) -> Result<(), Error> {
        let expected = size_of::<xc_domaininfo_t>();
        let bytes = self.0.each_ref().map(|words| {
            let bytes = words.iter().flat_map(|word| word.to_ne_bytes());
            bytes.collect::<Vec<u8>>()
        });
        let written = |(buffer, filled): (&Vec<u8>, u8)| {
            let last = buffer.iter().rposition(|&byte| byte != filled);
            last.map_or(0, |last| last + 1)
        };
        let found = bytes.iter().zip(FILLED).map(written).max().unwrap_or(0);
        let odd = |why: String| {
            Err(Error::Unsupported(format!(
                "the library of this Xen ({version}) {why}; so domains can't be told apart, and nothing was read or \
                 changed: use a build of xen-locus for that Xen"
            )))
        };
        if found != expected {
            return odd(format!(
                "describes a domain in {found} bytes, and xen-locus reads {expected}"
            ));
        }
        for buffer in &bytes {
            let word = |at: usize| buffer.get(at..at + 4)?.first_chunk().copied();
            let number = |at: usize| word(at).map_or(0, u32::from_ne_bytes);
            let domain = number(offset_of!(xc_domaininfo_t, domain)) & 0xffff;
            let flags = number(offset_of!(xc_domaininfo_t, flags));
            let pages = number(offset_of!(xc_domaininfo_t, tot_pages));
            let online = number(offset_of!(xc_domaininfo_t, nr_online_vcpus));
            let last_vcpu = number(offset_of!(xc_domaininfo_t, max_vcpu_id));
            let ended = sys::XEN_DOMINF_dying | sys::XEN_DOMINF_shutdown;
            let is_vcpus = online > 0 && online - 1 <= last_vcpu && last_vcpu < 1 << 13;
            if domain != 0 || flags & ended != 0 || pages == 0 || !is_vcpus {
                return odd(format!(
                    "does not describe domain 0 as a running domain: id {domain}, flags {flags:#x}, {pages} pages, \
                     {online} vCPUs with ids up to {last_vcpu}"
                ));
            }
        }
        Ok(())
    }
}

/// Bytes behind a [`Filled`] structure. None of those that Xen's libraries fill has a fifth of that more than it had.
const BEHIND: usize = 8192;

/// A structure that a library fills, in the size of its own headers. There is room behind it for what a newer library may
/// have, and that is noticed.
#[repr(C)]
pub(super) struct Filled<T> {
    inner: T,
    behind: [u8; BEHIND],
}

impl<T: Default> Filled<T> {
    /// One that nothing has filled yet.
    pub(super) fn new() -> Box<Self> {
        Box::new(Filled {
            inner: T::default(),
            behind: [FILLED[0]; BEHIND],
        })
    }

    /// Where the library writes. Room for a larger structure follows.
    pub(super) fn as_mut_ptr(&mut self) -> *mut T {
        (&raw mut *self).cast()
    }

    /// What was filled in by `call`.
    ///
    /// # Errors
    /// [`Error::Unsupported`]: the library has written more than the structure as it is known here.
    pub(super) fn get(&self, call: &str) -> Result<&T, Error> {
        match self.behind.iter().rposition(|&byte| byte != FILLED[0]) {
            None => Ok(&self.inner),
            Some(last) => Err(Error::Unsupported(format!(
                "{call} has written {} bytes, and xen-locus reads {}: the library is of another Xen; nothing was changed: use \
                 a build of xen-locus for that Xen",
                size_of::<T>() + last + 1,
                size_of::<T>()
            ))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const V17: XenVersion = XenVersion {
        major: 4,
        minor: 17,
    };

    fn dom0() -> xc_domaininfo_t {
        xc_domaininfo_t {
            domain: 0,
            flags: sys::XEN_DOMINF_running,
            tot_pages: 0x20000,
            nr_online_vcpus: 2,
            max_vcpu_id: 3,
            ..xc_domaininfo_t::default()
        }
    }

    /// Both answers, of which the library writes `len` bytes: those of `info`, and then zeroes.
    fn answers(info: xc_domaininfo_t, len: usize) -> Answers {
        let mut bytes = Vec::new();
        bytes.extend(info.domain.to_ne_bytes());
        bytes.extend([0; 2]);
        bytes.extend(info.flags.to_ne_bytes());
        bytes.extend(info.tot_pages.to_ne_bytes());
        bytes.resize(offset_of!(xc_domaininfo_t, nr_online_vcpus), 0);
        bytes.extend(info.nr_online_vcpus.to_ne_bytes());
        bytes.extend(info.max_vcpu_id.to_ne_bytes());
        bytes.resize(len, 0);
        let mut answers = Answers::new();
        for answer in answers.each() {
            for (to, from) in answer.iter_mut().zip(bytes.as_chunks::<8>().0) {
                *to = u64::from_ne_bytes(*from);
            }
        }
        answers
    }

    #[test]
    fn an_answer_in_the_form_of_another_xen_is_refused_and_says_both_sizes() {
        let size = size_of::<xc_domaininfo_t>();
        answers(dom0(), size).check(V17).unwrap();
        // Xen up to 4.15; one that grew; and a library that wrote nothing.
        for len in [104, size + 8, size + 64, LEN] {
            let error = answers(dom0(), len).check(V17).unwrap_err().to_string();
            let sizes = format!("in {len} bytes, and xen-locus reads {size}");
            assert!(error.contains(&sizes), "{error}");
        }
        assert!(Answers::new().check(V17).is_err());
    }

    #[test]
    fn an_answer_that_is_not_about_domain_0_is_refused() {
        let wrong: [fn(&mut xc_domaininfo_t); 5] = [
            |info| info.domain = 1,
            |info| info.flags = sys::XEN_DOMINF_dying,
            |info| info.tot_pages = 0,
            |info| info.nr_online_vcpus = 0,
            |info| info.max_vcpu_id = u32::MAX,
        ];
        for change in wrong {
            let mut info = dom0();
            change(&mut info);
            let error = answers(info, size_of::<xc_domaininfo_t>()).check(V17);
            assert!(matches!(error, Err(Error::Unsupported(why)) if why.contains("domain 0")));
        }
    }

    #[test]
    fn old_versions_are_refused_by_name_and_newer_ones_are_read_but_not_known() {
        let of = |text: &str| {
            let (major, minor) = text.split_once('.').unwrap();
            XenVersion::parse(major, minor).unwrap()
        };
        for old in ["3.4", "4.9", "4.13", "4.15"] {
            let error = of(old).check_readable().unwrap_err().to_string();
            assert!(error.contains(&format!("this is Xen {old},")), "{error}");
        }
        for known in ["4.16", "4.17", "4.20", "4.22"] {
            of(known).check_readable().unwrap();
            assert!(of(known).is_known());
        }
        for newer in ["4.23", "5.0", "5.17"] {
            of(newer).check_readable().unwrap();
            assert!(!of(newer).is_known());
        }
        assert!(unknown(of("4.23")).to_string().contains("this is Xen 4.23"));
        assert!(XenVersion::parse("4", "17-unstable").is_err());
    }

    #[test]
    fn a_structure_that_grew_has_room_and_is_refused() {
        let mut filled = Filled::<sys::xc_vcpuinfo_t>::new();
        let size = size_of::<sys::xc_vcpuinfo_t>();
        let write = |filled: &mut Filled<sys::xc_vcpuinfo_t>, at: usize| {
            let to = filled.as_mut_ptr().cast::<u8>();
            // SAFETY: the structure and the room behind it are at least that long.
            unsafe { to.add(at).write(7) };
        };
        write(&mut filled, size - 1);
        filled.get("xc_vcpu_getinfo").unwrap();
        write(&mut filled, size + 8);
        let error = filled.get("xc_vcpu_getinfo").unwrap_err().to_string();
        let said = format!(
            "xc_vcpu_getinfo has written {} bytes, and xen-locus reads {size}",
            size + 9
        );
        assert!(error.contains(&said), "{error}");
    }

    #[test]
    fn this_build_was_made_with_a_version_that_is_known() {
        assert!(INTERFACES.contains(&sys::XEN_DOMCTL_INTERFACE_VERSION));
    }
}
