//! Releases of Debian, and which of their packages are unpacked.

/// A Debian release and what is wanted of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Suite {
    /// Codename or suite, as in the archive's `dists/`.
    pub name: &'static str,
    /// Whether the security archive has it too.
    pub security: bool,
    /// Packages whose closure is unpacked.
    pub packages: &'static [&'static str],
    /// Beginnings of the names of those of the closure that are wanted; none: all but [`SKIP`].
    pub only: &'static [&'static str],
}

/// Debian 12: dom0, and the guests that scenarios use unless they say otherwise.
pub const BOOKWORM: Suite = Suite {
    name: "bookworm",
    security: true,
    packages: &[
        "xen-utils-4.17",
        "xenstore-utils",
        "xen-hypervisor-4.17-amd64",
        "qemu-system-xen",
        "seabios",
        "busybox-static",
        "libgcc-s1",
        "libssl3",
        "libelf1",
        "linux-image-amd64",
        "linux-headers-amd64",
    ],
    only: &[],
};

/// What a guest needs of a release that dom0 is not made of.
const KERNEL: &[&str] = &["linux-image-amd64", "linux-headers-amd64"];

/// The kernel (in newer releases its image and modules are packages of their own), headers, and
/// what compiles modules: kbuild's programs and the compiler, with the libraries that they load.
const KERNEL_ONLY: &[&str] = &[
    "linux-image-",
    "linux-binary-",
    "linux-modules-",
    "linux-headers-",
    "linux-kbuild-",
    "binutils-x86-64-linux-gnu",
    "cpp-",
    "gcc-",
    "libbinutils",
    "libbz2-",
    "libc6",
    "libctf",
    "libelf",
    "libgcc-",
    "libgmp",
    "libgprofng",
    "libisl",
    "libjansson",
    "liblzma",
    "libmpc",
    "libmpfr",
    "libsframe",
    "libssl",
    "libstdc++6",
    "libzstd",
    "zlib1g",
];

/// Debian 11, for its guest kernel.
pub const BULLSEYE: Suite = Suite {
    name: "bullseye",
    security: true,
    packages: KERNEL,
    only: KERNEL_ONLY,
};

/// Debian 13, for its guest kernel.
pub const TRIXIE: Suite = Suite {
    name: "trixie",
    ..BULLSEYE
};

/// What is to become the next Debian, for its guest kernel.
pub const TESTING: Suite = Suite {
    name: "testing",
    security: false,
    ..BULLSEYE
};

/// All releases, oldest kernel first.
pub const SUITES: [&Suite; 4] = [&BULLSEYE, &BOOKWORM, &TRIXIE, &TESTING];

/// In the closure, but of no use in an initramfs (prefixes of package names).
pub const SKIP: &[&str] = &[
    "adduser",
    "binutils",
    "coreutils",
    "cpp-",
    "debconf",
    "dpkg",
    "gcc-12",
    "initramfs-tools",
    "ipxe-qemu",
    "iso-codes",
    "klibc-utils",
    "libasan",
    "libbinutils",
    "libcc1",
    "libgcc-12-dev",
    "libgomp",
    "libisl",
    "libitm",
    "liblsan",
    "libmpc3",
    "libmpfr",
    "libpython3",
    "libquadmath",
    "libtsan",
    "libubsan",
    "linux-base",
    "media-types",
    "passwd",
    "perl",
    "python3",
    "tar",
    "ucf",
    "udev",
];
